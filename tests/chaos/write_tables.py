"""Write the tables of ``docs/reliability.rst`` from what the suites measured.

Usage::

    RQ_WEBHOOKS_ENDINGS_FILE=endings.json python -m pytest tests/acceptance/test_endings.py
    RQ_WEBHOOKS_CHAOS_FILE=chaos.jsonl python -m pytest tests/chaos -m "chaos or not chaos"
    python -m tests.chaos.write_tables endings.json chaos.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.servers import ROOT

TARGET = ROOT / "docs" / "_reliability"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an RST list table."""
    lines = [".. list-table::", "    :header-rows: 1", ""]
    for row in [headers, *rows]:
        for number, cell in enumerate(row):
            lines.append(("    * - " if number == 0 else "      - ") + cell)
    return "\n".join(lines) + "\n"


def endings(measured: dict[str, Any]) -> str:
    rows = []
    for name, group in groupby(measured["rows"], key=lambda row: row["row"]):
        told = list(group)
        notes = {row["note"] for row in told if row["note"] and "run" not in row["note"]}
        rows.append(
            (
                name + (f" ({'; '.join(sorted(notes))})" if notes and len(told) == 1 else ""),
                ", then ".join(
                    f"``{row['event']}``" + (" (correction)" if row["note"] == "correction" else "")
                    for row in told
                ),
                ", ".join(dict.fromkeys(row["source"] for row in told)),
                ", ".join(f"{row['seconds']:.2f}" for row in told),
                f"{told[0]['bound']:g}",
                words(told[-1]["rq_webhook"]),
                words(told[-1]["plain_callback"]),
            )
        )
    note = f"RQ {measured['rq']}, ``RECONCILE_INTERVAL = 2``; seconds from RQ's commit to receipt.\n\n"
    return note + table(
        ("The job …", "Told", "Source", "After, s", "Bound, s", "RQ's ``Webhook``", "A callback that posts"),
        rows,
    )


def words(said: Sequence[str]) -> str:
    return ", ".join(said) if said else "—"


def kills(lines: Sequence[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        name = line["name"]
        if line.get("database"):
            name += f", {line['database']}"
        killed = ", ".join(f"{count} × {part}" for part, count in sorted(line["kills"].items()))
        killed = killed or line.get("process", "")
        told = ", ".join(
            f"{count} {event.removeprefix('job.')}" for event, count in sorted(line["told"].items())
        )
        repeats = f"{line['repeats']} of {line['requests']}"
        rows.append(
            (
                name, killed or "—", str(line["accepted"]), told,
                str(line["by_source"].get("reconciled", 0)), str(line["corrections"]),
                str(line["lost"]), str(line["untruthful"]), str(line["doubled"]), repeats,
            )
        )  # fmt: skip
    return table(
        (
            "Run", "Killed", "Jobs", "Told", "By reconcile", "Corrections",
            "Lost", "Untruthful", "Doubled", "Repeated requests",
        ),
        rows,
    )  # fmt: skip


def main() -> None:
    measured, *files = (Path(name) for name in sys.argv[1:])
    TARGET.mkdir(exist_ok=True)
    (TARGET / "endings.inc").write_text(endings(json.loads(measured.read_text())))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    newest = {(line["name"], line.get("seed"), line.get("database")): line for line in lines}
    (TARGET / "kills.inc").write_text(kills(list(newest.values())))


if __name__ == "__main__":
    main()
