"""Run the benchmarks: ``python -m benchmarks [--quick] [--json FILE] [NAME …]``."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import callback, deliveries, hanging, latency, route, scale, stages
from .harness import Options, Report, machine, print_table, write_json

BENCHMARKS: dict[str, Callable[[Options], Report]] = {
    "instant": deliveries.instant,
    "others": deliveries.others,
    "slow": deliveries.slow,
    "one-host": deliveries.one_host,
    "two": deliveries.two_dispatchers,
    "stages": stages.stages,
    "routes": route.routes,
    "callback": callback.callback,
    "latency": latency.end_to_end,
    "hanging": hanging.hanging,
    "growth": scale.growth,
    "memory": scale.memory,
}
#: Left out of a quick run, unless named: filling tables takes longer than measuring.
SLOW = {"one-host", "growth", "memory"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of " + ", ".join(BENCHMARKS) + "; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter; less than three minutes")
    parser.add_argument("--rounds", type=int, help="how often the contenders take turns")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    options = Options(quick=arguments.quick, rounds=arguments.rounds or (1 if arguments.quick else 3))
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as bytecode:
        # Compiled modules, as pip leaves them: a forking worker imports some of them in every job.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = bytecode
        reports = measure(arguments.names, options)
    print_table(reports)
    write_json(arguments.json, reports, options)


def measure(names: Sequence[str], options: Options) -> list[Report]:
    """Run the benchmarks named, or all that a run of this kind has."""
    reports = []
    chosen = names or [name for name in BENCHMARKS if not options.quick or name not in SLOW]
    for name in chosen:
        print(f"\n{name} ...", flush=True)
        started = time.monotonic()
        reports.append(BENCHMARKS[name](options))
        print(f"  took {time.monotonic() - started:.0f} s", flush=True)
    return reports


if __name__ == "__main__":
    main()
