"""Write the tables of ``docs/performance.rst``: ``python -m benchmarks.write_tables [FILE]``.

Every figure of that page comes from here, so that none can drift away from the file of results. Owns words
and arithmetic on figures; measures nothing.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import ceil
from pathlib import Path
from typing import Any, Final

from .harness import Report, figure, read_json
from .promises import PROMISES

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results.json"
TARGET: Final = ROOT / "docs" / "_performance"
HOUR = 1_000_000
A_SECOND = HOUR / 3600
#: Measured with rates of deliveries.
RATED = ("deliveries", "designs", "slow", "processes", "one-host", "two-dispatchers")

Reports = Mapping[str, Report]


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], widths: str = "auto") -> str:
    """Return an RST list table."""
    lines = [".. list-table::", "    :header-rows: 1", f"    :widths: {widths}", ""]
    for row in [headers, *rows]:
        for number, cell in enumerate(row):
            lines.append((("    * - " if number == 0 else "      - ") + cell).rstrip())
    return "\n".join(lines) + "\n"


def on_what(machine: Mapping[str, Any], reports: Reports) -> str:
    """Say what the figures were taken on, and when."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    days = sorted({report.at[:10] for report in reports.values()})
    minutes = sum(report.took_s for report in reports.values()) / 60
    loads = [report.load for report in reports.values()]
    text = (
        f"{machine['processors']} processors ({machine['processor']}), {machine['memory_gb']} GB of memory, "
        f"{machine['system']}, {machine['python']}; {packages}. Measured on {' and '.join(days)} within "
        f"{minutes:.0f} minutes; everything, servers and receivers included, on this one machine. Load "
        f"average when each benchmark began: {min(loads):.1f} to {max(loads):.1f}.\n"
    )
    if any(report.quick for report in reports.values()):
        text += "\n**From a quick run: good for a look, not for conclusions.**\n"
    return text


def promises(reports: Reports) -> str:
    """Return the table of what is promised, with every figure about it."""
    rows = []
    for key, words in PROMISES.items():
        lines = [line for report in reports.values() for line in report.lines if line.promise == key]
        if not lines:
            rows.append((f"**{words}**", "not measured", "", "", ""))
        else:
            rows.append((f"**{words}**", "", "", "", ""))
        for line in lines:
            verdict = {True: "yes", False: "**no**", None: ""}[line.holds]
            rows.append((line.what, figure(line.value, line.unit), line.spread, line.target, verdict))
    headers = ("What", "Median", "Lowest … highest", "Target", "Met")
    return table(headers, rows, "52 14 16 10 8")


def verdict(reports: Reports) -> str:
    """Say how many targets are met, and name those that are not."""
    lines = [line for report in reports.values() for line in report.lines if line.holds is not None]
    missed = [line for line in lines if not line.holds]
    failed = [name for name, report in reports.items() if report.error]
    skipped = sorted({what for report in reports.values() for what in report.skipped})
    text = f"{len(lines) - len(missed)} of {len(lines)} targets are met."
    if missed:
        text += " Not met:\n\n" + "\n".join(
            f"- {PROMISES[line.promise]}: {line.what}: {figure(line.value, line.unit)}, target {line.target}"
            for line in missed
        )
    text += "".join(f"\n\nNot finished: {name}." for name in failed)
    text += "".join(f"\n\nLeft out: {what}." for what in skipped)
    return text + "\n"


def rates(machine: Mapping[str, Any], reports: Reports) -> str:
    """Return a table per benchmark of deliveries: who, how many a second, at what cost."""
    parts = []
    for name in RATED:
        report = reports.get(name)
        if report is None or not report.data:
            continue
        rows = []
        for who, runs in report.data.items():
            rate = [run["rate"] for run in runs]
            spread = f"{figure(min(rate), '/s')} … {figure(max(rate), '/s')}" if len(rate) > 1 else ""
            busy = [run["busy"] for run in runs if run["busy"] is not None]
            rows.append(
                (
                    who, figure(statistics.median(rate), "/s"), spread, _cpu(runs),
                    f"{statistics.median(busy):.0%}" if busy else "",
                )
            )  # fmt: skip
        headers = ("Who", "Median", "Lowest … highest", "CPU each", "Machine busy")
        where = f"{machine['processors']} × {machine['processor']}, {report.at[:10]}"
        parts.append(f"{report.title} (``{name}``; {where}):\n\n" + table(headers, rows))
    if "jobs" in reports:
        parts.append(_jobs(reports["jobs"]))
    return "\n".join(parts)


def _jobs(report: Report) -> str:
    rows = [(line.what, figure(line.value, line.unit)) for line in report.lines]
    return f"{report.title} (``jobs``, {report.at[:10]}):\n\n" + table(("Workers", "Median"), rows)


def latency(machine: Mapping[str, Any], reports: Reports) -> str:
    """Return the stages of a delivery, from the end of its job until it is received."""
    report = reports.get("latency")
    measured = _staged(reports)
    if report is None or not measured:
        return "Not measured.\n"
    rows = [
        (name, *(f"{stages[stage]:.1f}" for stage in stages), f"**{data['p50']:.1f}**", f"{data['p99']:.1f}")
        for name, data in measured.items()
        for stages in [data["stages"]]
    ]
    stages = next(iter(measured.values()))["stages"]
    where = f"{machine['processors']} × {machine['processor']}, {report.at[:10]}"
    return f"{report.title}; medians in milliseconds ({where}):\n\n" + table(
        ("", *stages, "p50 of the whole", "p99"), rows
    )


def _staged(reports: Reports) -> dict[str, Any]:
    report = reports.get("latency")
    return {} if report is None else {name: one for name, one in report.data.items() if "stages" in one}


# -- charts -----------------------------------------------------------------------------------------------

WIDTH, LABELS, BAR = 760, 250, 24
_COLORS = ("#4c6ef5", "#12b886", "#fab005", "#fa5252", "#7950f2", "#15aabf", "#868e96")


def rates_chart(machine: Mapping[str, Any], reports: Reports) -> str:
    """Return a chart of deliveries a second, ours and the peers'."""
    report = reports.get("designs")
    bars = [
        (who, [statistics.median(run["rate"] for run in runs)])
        for who, runs in (report.data if report is not None else {}).items()
    ]
    title = "Deliveries a second, receivers that answer at once"
    return _chart(title, _where(machine, report), bars, (), lambda values: f"{values[0]:,.0f}/s")


def stages_chart(machine: Mapping[str, Any], reports: Reports) -> str:
    """Return a chart of what a delivery waits for, from the end of its job until it is received."""
    measured = _staged(reports)
    bars = [(name, list(one["stages"].values())) for name, one in measured.items()]
    names = tuple(next(iter(measured.values()))["stages"]) if measured else ()
    title = "From the end of a job to the receiver, medians of the stages"
    where = _where(machine, reports.get("latency"))
    return _chart(title, where, bars, names, lambda values: f"{sum(values):.1f} ms")


def _where(machine: Mapping[str, Any], report: Report | None) -> str:
    day = "not measured" if report is None else report.at[:10]
    return f"{machine['processors']} processors ({machine['processor']}), {machine['python']}, {day}"


def _chart(
    title: str,
    where: str,
    bars: Sequence[tuple[str, Sequence[float]]],
    parts: Sequence[str],
    words: Callable[[Sequence[float]], str],
) -> str:
    """Return horizontal bars as SVG, each of one part or more.

    :param parts: names of the parts, for the legend.
    """
    longest = max((sum(values) for _name, values in bars), default=1) or 1
    scale = (WIDTH - LABELS - 90) / longest
    legend_y = 60 + len(bars) * (BAR + 8)
    height = legend_y + 20 * ceil(len(parts) / 4) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="16" fill="#212529">{escape(title)}</text>',
        f'<text x="12" y="42" fill="#495057">{escape(where)}</text>',
    ]
    for row, (name, values) in enumerate(bars):
        x, y = float(LABELS), 56 + row * (BAR + 8)
        lines.append(
            f'<text x="{LABELS - 8}" y="{y + 17}" text-anchor="end" fill="#212529">{escape(name)}</text>'
        )
        for number, value in enumerate(values):
            color = _COLORS[number % len(_COLORS)] if parts or name.startswith("ours") else "#adb5bd"
            width = max(0.0, value) * scale
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}"/>')
            x += width
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 17}" fill="#212529">{escape(words(values))}</text>')
    for number, name in enumerate(parts):
        x, y = 12 + 185 * (number % 4), legend_y + 20 * (number // 4)
        lines.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLORS[number % len(_COLORS)]}"/>'
        )
        lines.append(f'<text x="{x + 18}" y="{y + 11}" fill="#212529">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def stages(reports: Reports) -> str:
    """Return CPU by stage, and what it says about the next factor of two."""
    report = reports.get("stages")
    if report is None or not report.data:
        return "Not measured.\n"
    measured = {
        name: steps for name, steps in report.data.items() if name != "bytes" and "profile" not in name
    }
    steps = list(next(iter(measured.values())))
    rows = [
        (name, *(f"{each[step]:.3f}" for step in steps), f"**{sum(each.values()):.2f}**")
        for name, each in measured.items()
    ]
    return (
        table(("CPU milliseconds", *steps, "together"), rows)
        + "\n"
        + _next_factor(measured, reports)
        + "\n"
        + _profiles(report)
    )


def _next_factor(measured: Mapping[str, Mapping[str, float]], reports: Reports) -> str:
    lines = []
    for name, steps in measured.items():
        whole = sum(steps.values())
        order = sorted(steps, key=lambda step: -steps[step])
        first, second = order[:2]
        lines.append(
            f"- {name}: *{first}* is {steps[first] / whole:.0%} and *{second}* {steps[second] / whole:.0%}. "
            f"If *{first}* cost nothing, one processor could deliver {whole / (whole - steps[first]):.1f} "
            f"times as much; if both cost half, "
            f"{whole / (whole - (steps[first] + steps[second]) / 2):.1f} times."
        )
    alone = _median_cpu(reports, "deliveries", "limit")
    if alone is not None:
        lines.append(
            f"- The HTTP client alone (*limit*: the ``requests`` adapter with pre-made bytes, its threads "
            f"included) takes {alone:.2f} ms."
        )
    return "\n".join(lines) + "\n"


def _profiles(report: Report) -> str:
    lines = []
    for name, shares in report.data.items():
        if "profile" not in name:
            continue
        listed = ", ".join(f"{package} {share:.0%}" for package, share in shares.items() if share >= 0.03)
        lines.append(
            f"- {name} (cProfile, CPU time, from 3 %; built-in functions count for their callers): {listed}."
        )
    return "\n".join(lines) + "\n" if lines else ""


def million(reports: Reports, processors: int) -> str:
    """Work out what a million deliveries an hour need.

    :param processors: of the machine that was measured.
    """
    rows = [row for row in _Need(reports, processors).rows() if row is not None]
    text = (
        f"{HOUR:,} an hour are {A_SECOND:.0f} a second, day and night; each is a request with a "
        "webhook, a job, an event and one attempt.\n\n"
    )
    return text + table(("What", "Measured", f"At {A_SECOND:.0f} a second"), rows, "20 40 40")


class _Need:
    """One row for each thing that could run out; ``None`` where its figure was not measured."""

    def __init__(self, reports: Reports, processors: int) -> None:
        self._reports = reports
        self._processors = processors

    def rows(self) -> list[tuple[str, str, str] | None]:
        return [
            self._dispatchers(), self._in_flight(), self._one_host(),
            self._machine(), self._ingest(), self._stream(), self._routes(), self._workers(), self._disk(),
        ]  # fmt: skip

    def _dispatchers(self) -> tuple[str, str, str] | None:
        rate = _median_rate(self._reports, "deliveries", "PostgreSQL")
        cpu = _median_cpu(self._reports, "deliveries", "PostgreSQL")
        if rate is None or cpu is None:
            return None
        return (
            "Dispatchers",
            f"one delivers {rate:,.0f}/s at {cpu:.2f} ms of CPU each (PostgreSQL, receivers that answer at "
            "once)",
            f"{ceil(A_SECOND / rate)} by rate, busy to {A_SECOND / rate:.0%}; {A_SECOND * cpu / 1000:.2f} "
            "processors. One more, so that one may fail",
        )

    def _in_flight(self) -> tuple[str, str, str]:
        return (
            "Requests in flight",
            "rate × time of the receivers (Little's law); ``CONCURRENCY`` = 64 for each dispatcher",
            f"receivers of 50 ms: {A_SECOND * 0.05:.0f}, one dispatcher. Of 1 s: {A_SECOND:.0f}, "
            f"{ceil(A_SECOND / 64)} dispatchers, or one with ``CONCURRENCY`` = 512",
        )

    def _one_host(self) -> tuple[str, str, str] | None:
        rate = _median_rate(self._reports, "one-host", "1 host")
        if rate is None:
            return None
        return (
            "One host for all",
            f"{rate:,.0f}/s to one host of 50 ms by one dispatcher: ``CONCURRENCY_PER_HOST`` = 8 binds",
            f"{ceil(A_SECOND / rate)} dispatchers, or ``CONCURRENCY_PER_HOST`` = "
            f"{ceil(8 * A_SECOND / rate)}; with many hosts it does not bind",
        )

    def _machine(self) -> tuple[str, str, str] | None:
        runs = self._runs("deliveries", "PostgreSQL")
        if not runs or any(run["busy"] is None for run in runs):
            return None
        # CPU of everything on the machine for one delivery: busy processors over deliveries a second.
        each = statistics.median(run["busy"] * self._processors / run["rate"] * 1000 for run in runs)
        return (
            "Everything of the pipeline",
            f"{each:.2f} ms of CPU a delivery: dispatcher, PostgreSQL, Valkey, and the receiver that is "
            "measured with",
            f"{A_SECOND * each / 1000:.1f} processors",
        )

    def _ingest(self) -> tuple[str, str, str] | None:
        steps = self._data("stages").get("PostgreSQL")
        if steps is None:
            return None
        return (
            "Streams",
            f"ingest takes {steps['ingest']:.2f} ms of CPU an entry",
            "one stream, read by all dispatchers as one group: "
            f"{A_SECOND * steps['ingest'] / 1000:.2f} processors. There is one stream for each database of "
            "ours; a second one needs a second installation",
        )

    def _stream(self) -> tuple[str, str, str] | None:
        sizes = self._data("stages").get("bytes")
        if sizes is None:
            return None
        return (
            "Outbox while no dispatcher runs",
            f"{sizes['outbox entry']:,.0f} bytes of Redis an entry; ``OUTBOX_MAXLEN`` = 100,000",
            f"full after {100_000 / A_SECOND / 60:.0f} minutes; for an hour set it to {HOUR:,}: "
            f"{HOUR * sizes['outbox entry'] / 1e9:.1f} GB. Reconcile finds what was trimmed",
        )

    def _routes(self) -> tuple[str, str, str] | None:
        figures = self._data("route").get("postgresql")
        if figures is None:
            return None
        more = figures["with webhook"]["p50"] - figures["plain"]["p50"]
        return (
            "Web processes",
            f"a webhook adds {more:.2f} ms to a request (PostgreSQL)",
            f"{A_SECOND * more / 1000:.1f} processors at most, PostgreSQL's part included, beside what the "
            "routes themselves need",
        )

    def _workers(self) -> tuple[str, str, str] | None:
        pairs = self._data("callback").get("rq.Worker, no dispatcher")
        if pairs is None:
            return None
        plain = statistics.median(pair["without_ms"] for pair in pairs)
        more = statistics.median(pair["with_ms"] - pair["without_ms"] for pair in pairs)
        return (
            "RQ workers (forking)",
            f"{plain:.1f} ms for a job that does nothing, {more:.1f} ms more with the callback",
            f"{ceil(A_SECOND * (plain + more) / 1000)} workers for jobs that do nothing; the callback's part "
            f"of it is {A_SECOND * more / 1000:.1f}",
        )

    def _disk(self) -> tuple[str, str, str] | None:
        sizes = self._data("stages").get("bytes")
        if sizes is None:
            return None
        day = 24 * HOUR * sizes["sql"]
        return (
            "Disk and partitions",
            f"{sizes['sql'] / 1000:.1f} kB of PostgreSQL a delivery, indexes included (endpoint, secret, "
            "watch, event, delivery, attempt)",
            f"{day / 1e9:,.0f} GB a day. ``RETENTION_DAYS`` = 30 would be {30 * day / 1e12:.1f} TB and "
            f"{30 * 24 * HOUR / 1e6:,.0f} million deliveries; at this rate keep 1 or 2 days, or partition by "
            "day the delivery table (by its id, which begins with the time) and the attempt table (by "
            "``delivery_id``), and drop partitions instead of pruning; the event table is unique in its run "
            "key and stays whole. The index that claims use holds only what is due",
        )

    def _runs(self, name: str, who: str) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = self._data(name).get(who, [])
        return runs

    def _data(self, name: str) -> dict[str, Any]:
        report = self._reports.get(name)
        return report.data if report is not None else {}


def _cpu(runs: Sequence[Mapping[str, Any]]) -> str:
    known = [run["cpu_ms"] for run in runs if run["cpu_ms"] is not None]
    return figure(statistics.median(known), "ms") if known else ""


def _median_cpu(reports: Reports, name: str, who: str) -> float | None:
    return _median(reports, name, who, lambda run: run["cpu_ms"])


def _median_rate(reports: Reports, name: str, who: str) -> float | None:
    return _median(reports, name, who, lambda run: run["rate"])


def _median(
    reports: Reports, name: str, who: str, value: Callable[[Mapping[str, Any]], float | None]
) -> float | None:
    report = reports.get(name)
    runs = report.data.get(who, []) if report is not None else []
    known = [each for run in runs if (each := value(run)) is not None]
    return statistics.median(known) if known else None


def pages(path: Path) -> dict[str, str]:
    """Return the content of each file that the documentation includes, by name."""
    machine, reports = read_json(path)
    return {
        "machine.inc": on_what(machine, reports),
        "promises.inc": promises(reports),
        "verdict.inc": verdict(reports),
        "rates.inc": rates(machine, reports),
        "latency.inc": latency(machine, reports),
        "rates.svg": rates_chart(machine, reports),
        "stages.svg": stages_chart(machine, reports),
        "stages.inc": stages(reports),
        "million.inc": million(reports, machine["processors"]),
    }


def main() -> None:
    """Write the files."""
    TARGET.mkdir(exist_ok=True)
    for name, content in pages(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS).items():
        (TARGET / name).write_text(content)


if __name__ == "__main__":
    main()
