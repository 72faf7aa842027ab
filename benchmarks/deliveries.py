"""Deliveries a second: ours against the HTTP client alone and against the other designs."""

from __future__ import annotations

from . import contenders
from .harness import Options, Report, alternately, median_rate, ratio, runs_data
from .installation import servers
from .receiver import receiver


def instant(options: Options) -> Report:
    """Receivers that answer at once: what a delivery costs."""
    report = Report("Deliveries a second, 40 hosts that answer at once")
    count = options.scaled(6000, 2500)
    with servers() as some, receiver(40) as target:
        urls = target.urls()
        sqlite, postgresql = some.installation("sqlite"), some.installation("postgresql")
        runs = alternately(
            {
                "limit": contenders.limit(target, urls, 2 * count),
                "ours, SQLite": contenders.ours(target, urls, count, sqlite),
                "ours, SQLite, from SQL": contenders.ours(target, urls, count, sqlite, waiting_in="sql"),
                "ours, PostgreSQL": contenders.ours(target, urls, count, postgresql),
                "ours, PostgreSQL, from SQL": contenders.ours(
                    target, urls, count, postgresql, waiting_in="sql"
                ),
            },
            options.rounds,
        )
    report.data = runs_data(runs)
    report.add("limit: requests adapter, 64 threads", f"{median_rate(runs['limit']):,.0f}/s")
    for name in list(runs)[1:]:
        share = ratio(runs[name], runs["limit"])
        report.add(
            f"{name}: {median_rate(runs[name]):,.0f}/s; of the limit",
            f"{share:.2f}",
            target=">= 0.6",
            holds=share >= 0.6,
        )
    return report
