"""Deliveries a second: ours against the HTTP client alone, on one slow host, and by two dispatchers."""

from __future__ import annotations

from . import contenders
from .harness import Report, Size, alternately, median_rate, ratios, runs_data
from .installation import KINDS, servers
from .receiver import receiver

HOSTS = 40


def instant(size: Size) -> Report:
    """Receivers that answer at once: what a delivery costs."""
    report = Report(f"Deliveries a second, {HOSTS} hosts that answer at once, one dispatcher, 64 in flight")
    with servers() as some, receiver(HOSTS) as target:
        urls, count = target.urls(), size["count"]
        candidates = {"limit": contenders.limit(target, urls, size["limit"])}
        for kind, database in KINDS.items():
            installation = some.installation(kind)
            candidates[database] = contenders.ours(target, urls, count, installation)
            candidates[f"{database}, due in SQL"] = contenders.ours(
                target, urls, count, installation, waiting_in="sql"
            )
        runs = alternately(candidates, size["rounds"])
    report.data = runs_data(runs)
    report.add("limit: the requests adapter, 64 threads", median_rate(runs["limit"]), "/s")
    for name in list(runs)[1:]:
        report.add(f"ours, {name}", [run.rate for run in runs[name]], "/s")
    for database in KINDS.values():
        for way in (database, f"{database}, due in SQL"):
            shares = ratios(runs[way], runs["limit"])
            report.add(f"{way}: of the limit", shares, "share", promise="limit", at_least=0.6)
    return report


def one_host(size: Size) -> Report:
    """One slow host: the cap per host binds, on purpose."""
    report = Report("One host that takes 50 ms: CONCURRENCY_PER_HOST = 8 binds, 8 / 50 ms = 160/s at most")
    with servers() as some, receiver(HOSTS) as target:
        candidates = {
            f"{hosts} host" + "s" * (hosts > 1): contenders.ours(
                target, target.urls(hosts=hosts, delay_ms=50), size["count"], some.installation()
            )
            for hosts in (1, HOSTS)
        }
        runs = alternately(candidates, size["rounds"])
    report.data = runs_data(runs)
    for name in runs:
        report.add(f"ours, SQLite, {name}", [run.rate for run in runs[name]], "/s")
    return report


def two_dispatchers(size: Size) -> Report:
    """One dispatcher and two on PostgreSQL, bound by concurrency and not by the CPU."""
    report = Report("Two dispatchers against one, PostgreSQL, 50 ms, 8 requests in flight each")
    with servers() as some, receiver(HOSTS) as target:
        urls = target.urls(delay_ms=50)
        installation = some.installation("postgresql")
        candidates = {
            words: contenders.ours(
                target, urls, size["count"] * number // 2, installation,
                concurrency=8, dispatchers=number,
            )
            for number, words in ((1, "one"), (2, "two"))
        }  # fmt: skip
        runs = alternately(candidates, size["rounds"])
    report.data = runs_data(runs)
    one, two = runs["one"], runs["two"]
    busy = max(run.busy or 0 for run in two)
    report.add(
        f"{median_rate(one):,.0f}/s by one, {median_rate(two):,.0f}/s by two, "
        f"processors busy {busy:.0%} at most",
        ratios(two, one),
        "x",
        promise="two-dispatchers",
        at_least=1.8,
    )
    return report
