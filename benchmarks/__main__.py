"""Run the benchmarks: ``python -m benchmarks [--quick] [--json FILE] [NAME …]``.

A benchmark that fails (something was not delivered, or not exactly once, or not signed) is reported, the
others run, and the exit code is 1. A target that is not met is reported; it is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import Report, machine, print_table, write_json
from .registry import BENCHMARKS


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of " + ", ".join(BENCHMARKS) + "; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter; less than three minutes")
    parser.add_argument("--rounds", type=int, help="how often the contenders take turns")
    parser.add_argument("--json", type=Path, default=Path(".bench.json"), metavar="FILE")
    parser.add_argument(
        "--into", action="store_true", help="replace the named benchmarks in FILE, keep the others"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    into = _results_to_keep(parser, arguments.json) if arguments.into else None
    # Compiled modules, as pip leaves them: a forking worker imports some of them in every job.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    print(json.dumps(machine()), flush=True)
    reports = measure(
        arguments.names or list(BENCHMARKS),
        quick=arguments.quick,
        rounds=arguments.rounds,
        path=arguments.json,
        into=into,
    )
    print_table(reports)
    print(f"Written to {arguments.json}.")
    sys.exit(any(report.error for report in reports.values()))


def measure(
    names: Sequence[str],
    *,
    quick: bool,
    rounds: int | None,
    path: Path,
    into: Mapping[str, Any] | None = None,
) -> dict[str, Report]:
    """Run the benchmarks named, and write what is known after each of them."""
    reports = {}
    for name in names:
        print(f"\n{name} ...", flush=True)
        reports[name] = BENCHMARKS[name].measure(quick=quick, rounds=rounds)
        print(f"  took {reports[name].took_s:.0f} s", flush=True)
        write_json(path, reports, into=into)
    return reports


def _results_to_keep(parser: argparse.ArgumentParser, path: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(path.read_text())
    was, here = ({**some, "packages": None} for some in (content["machine"], machine()))
    if was != here:
        parser.error(f"{path} was measured on another machine: {was}; this is {here}")
    return content


if __name__ == "__main__":
    main()
