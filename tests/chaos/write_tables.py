"""Write the tables of ``docs/reliability.rst`` from what the suites measured.

Usage::

    RQ_WEBHOOKS_ENDINGS_FILE=endings.json python -m pytest tests/acceptance/test_endings.py
    RQ_WEBHOOKS_CHAOS_FILE=chaos.jsonl python -m pytest tests/chaos -m "chaos or slow"
    python -m tests.chaos.write_tables endings.json chaos.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
        published = list(group)
        notes = {row["note"] for row in published if row["note"] and "run" not in row["note"]}
        rows.append(
            (
                name + (f" ({'; '.join(sorted(notes))})" if notes and len(published) == 1 else ""),
                ", then ".join(
                    f"``{row['event']}``" + (" (correction)" if row["note"] == "correction" else "")
                    for row in published
                ),
                ", ".join(dict.fromkeys(row["source"] for row in published)),
                ", ".join(f"{row['seconds']:.2f}" for row in published),
                f"{published[0]['bound']:g}",
                words(published[-1]["rq_webhook"]),
                words(published[-1]["plain_callback"]),
            )
        )
    note = f"RQ {measured['rq']}, ``RECONCILE_INTERVAL = 2``; seconds from RQ's commit to receipt.\n\n"
    return note + table(
        (
            "The job …",
            "Reported",
            "Source",
            "After, s",
            "Bound, s",
            "RQ's ``Webhook``",
            "A callback that posts",
        ),
        rows,
    )


def words(said: Sequence[str]) -> str:
    return ", ".join(said) if said else "—"


#: Faults, in the order of the tables' columns.
FAULTS = ("lost", "untruthful", "doubled", "early", "altered")
#: Hits after which every process lives on.
NO_KILLS = ("receiver answers 503", "receiver resets", "dispatcher stopped", "time passes")


def kills(lines: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            line["name"], counted(line["kills"]) or "—", str(line["accepted"]), reported(line["reported"]),
            str(line["by_source"].get("reconciled", 0)), faults(line), repeats(line),
        )
        for line in lines
    ]  # fmt: skip
    return table(("Run", "Killed", "Jobs", "Reported", "By reconcile", "Faults", "Repeated requests"), rows)


def storms(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table of storms, what was hit in them all, and which kinds of jobs took part."""
    lines = sorted(lines, key=lambda line: (line["profile"], line["seed"]))
    rows = [
        (
            line["profile"], str(line["seed"]), f"{line['accepted']:,}", f"{killed_in(line['kills']):,}",
            f"{line['by_source'].get('reconciled', 0):,}", str(line["corrections"]),
            *(str(line["faults"].get(kind, 0)) for kind in FAULTS), repeats(line),
        )
        for line in lines
    ]  # fmt: skip
    headers = ("Profile", "Seed", "Jobs", "Kills", "By reconcile", "Corrections",
               *(kind.capitalize() for kind in FAULTS), "Repeated requests")  # fmt: skip
    killed, kinds, events = (
        sum((Counter(line[name]) for line in lines), Counter()) for name in ("kills", "kinds", "reported")
    )
    falsified = min(line["falsified"] for line in lines)
    return (
        f"{sum(line['accepted'] for line in lines):,} accepted jobs, {sum(line['runs'] for line in lines):,} "
        f"runs, {killed_in(killed):,} kills and {killed.total() - killed_in(killed):,} other hits.\n\n"
        + table(headers, rows)
        + f"\n*Hit*: {counted(killed)}.\n"
        + f"\n*Jobs*: {counted(kinds)}.\n"
        + f"\n*Reported*: {reported(events)}.\n"
        + f"\nAt least {falsified} falsifications were put into each finished storm; each was counted.\n"
    )


def killed_in(hits: Mapping[str, int]) -> int:
    return sum(count for part, count in hits.items() if part not in NO_KILLS)


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in sorted(counts.items()))


def reported(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {event.removeprefix('job.')}" for event, count in sorted(counts.items()))


def faults(line: dict[str, Any]) -> str:
    return counted(line["faults"]) or "none"


def repeats(line: dict[str, Any]) -> str:
    return f"{line['repeats']:,} of {line['requests']:,}"


def main() -> None:
    measured, *files = (Path(name) for name in sys.argv[1:])
    TARGET.mkdir(exist_ok=True)
    (TARGET / "endings.inc").write_text(endings(json.loads(measured.read_text())))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    newest = {(line["name"], line.get("profile"), line.get("seed")): line for line in lines}
    of_storms = [line for line in newest.values() if line["name"] == "storm"]
    (TARGET / "kills.inc").write_text(kills([line for line in newest.values() if line not in of_storms]))
    (TARGET / "storms.inc").write_text(storms(of_storms))


if __name__ == "__main__":
    main()
