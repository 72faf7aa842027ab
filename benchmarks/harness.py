"""Running contenders in turns, and telling what came of it.

Owns rounds, medians, tables and JSON. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from .receiver import RunningReceiver

#: Share of the arrivals that counts: neither the start nor the last few of a run.
WARM, END = 0.15, 0.95


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's run: deliveries a second, and CPU milliseconds of its processes for each."""

    rate: float
    cpu_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the final table.

    :param what: in words.
    :param target: as promised; empty for figures nobody promised.
    :param measured: the figure the target is about.
    :param holds: whether it is met; ``None`` where nothing was promised.
    """

    what: str
    measured: str
    target: str = ""
    holds: bool | None = None


@dataclass
class Report:
    """What one benchmark found."""

    name: str
    lines: list[Line] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, measured: str, *, target: str = "", holds: bool | None = None) -> None:
        line = Line(what=what, measured=measured, target=target, holds=holds)
        self.lines.append(line)
        print("  " + _line(line), flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How long to measure."""

    quick: bool = False
    rounds: int = 3

    def scaled(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def alternately(contenders: Mapping[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Run all contenders in turn, *rounds* times."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            run = contender()
            runs[name].append(run)
            cpu = "" if run.cpu_ms is None else f", {run.cpu_ms:.2f} ms CPU each"
            print(f"  round {number + 1}: {name}: {run.rate:,.0f}/s{cpu}", flush=True)
    return runs


def median_rate(runs: Sequence[Run]) -> float:
    return statistics.median(run.rate for run in runs)


def ratio(over: Sequence[Run], under: Sequence[Run]) -> float:
    """Return the median of the rounds' ratios: what disturbs a round disturbs both of its figures."""
    return statistics.median(a.rate / b.rate for a, b in zip(over, under, strict=True))


def runs_data(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    return {name: [asdict(run) for run in some] for name, some in runs.items()}


def watch(
    target: RunningReceiver,
    count: int,
    pids: Sequence[int],
    *,
    began: float | None = None,
    timeout_s: float = 300,
) -> Run:
    """Wait until *count* requests have arrived, and return their rate.

    :param pids: processes, with all their children, whose CPU counts.
    :param began: when the work began (monotonic); otherwise the first arrivals do not count, nor does
        what came before them. In no case do the last ones count.
    """
    samples: list[tuple[int, float]] = []
    deadline = time.monotonic() + timeout_s
    processes = [psutil.Process(pid) for pid in pids]
    while True:
        arrived = target.ask("/count")
        samples.append((arrived, sum(map(cpu_seconds, processes))))
        if arrived >= count:
            break
        if time.monotonic() > deadline:
            raise AssertionError(f"{arrived} of {count} requests arrived within {timeout_s} s")
        time.sleep(0.05)
    times = sorted(target.ask("/arrivals")[:count])
    last = int(count * END) - 1
    if began is not None:
        rate, begin = (last + 1) / (times[last] - began), samples[0]
    else:
        first = int(count * WARM)
        rate = (last - first) / (times[last] - times[first])
        begin = next(sample for sample in samples if sample[0] >= first)
    end = samples[-1]
    cpu_ms = 1000 * (end[1] - begin[1]) / (end[0] - begin[0]) if end[0] > begin[0] and pids else None
    return Run(rate, cpu_ms)


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of *process* and of its children, those that ended included."""
    try:
        times = process.cpu_times()
        own = times.user + times.system + times.children_user + times.children_system
        return own + sum(cpu_seconds(child) for child in process.children())
    except psutil.NoSuchProcess:
        return 0.0


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def print_table(reports: Sequence[Report]) -> None:
    for report in reports:
        print(f"\n{report.name}")
        for line in report.lines:
            print("  " + _line(line))


def write_json(path: Path, reports: Sequence[Report], options: Options) -> None:
    content = {"machine": machine(), "options": asdict(options), "reports": [asdict(r) for r in reports]}
    path.write_text(json.dumps(content, indent=1))


def _line(line: Line) -> str:
    verdict = {None: "", True: "  holds", False: "  FALLS SHORT"}[line.holds]
    target = f"  (target {line.target})" if line.target else ""
    return f"{line.what:<72} {line.measured}{target}{verdict}"
