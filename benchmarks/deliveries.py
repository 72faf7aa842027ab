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


def others(options: Options) -> Report:
    """Ours against the other designs, receivers that answer at once."""
    report = Report("Deliveries a second against other designs, 40 hosts that answer at once")
    count = options.scaled(4000, 1500)
    with servers() as some, receiver(40) as target:
        urls = target.urls()
        candidates = {
            "ours, SQLite": contenders.ours(target, urls, count, some.installation()),
            "job per attempt": contenders.job_per_attempt(target, urls, count // 4, some),
            "rq.Webhook, SimpleWorker": contenders.rq_webhook(
                target, urls, count // 4, some, worker_class="rq.SimpleWorker"
            ),
        }
        for pool, processes in (("prefork", 2), ("threads", 16)):
            celery = contenders.django_webhook(target, urls, count // 4, some, pool, processes)
            if celery is not None:
                candidates[f"django-webhook, Celery {pool}"] = celery
        runs = alternately(candidates, options.rounds)
    report.data = runs_data(runs)
    for name in runs:
        if name == "ours, SQLite":
            continue
        factor = ratio(runs["ours, SQLite"], runs[name])
        least = 4.0 if name == "job per attempt" or name.startswith("django") else None
        report.add(
            f"ours {median_rate(runs['ours, SQLite']):,.0f}/s, {name} {median_rate(runs[name]):,.0f}/s",
            f"{factor:.1f}x",
            target=f">= {least:.0f}x" if least else "",
            holds=factor >= least if least else None,
        )
    return report


def slow(options: Options) -> Report:
    """Receivers that take 50 ms, as the real ones do."""
    report = Report("Deliveries a second, 40 hosts that take 50 ms")
    count = options.scaled(4000, 1500)
    with servers() as some, receiver(40) as target:
        urls = target.urls(delay_ms=50)
        sqlite = some.installation()
        runs = alternately(
            {
                "ours": contenders.ours(target, urls, count, sqlite),
                "ours, CONCURRENCY=256": contenders.ours(target, urls, count, sqlite, concurrency=256),
                "limit, 64 threads": contenders.limit(target, urls, count),
                "inline, forking Worker": contenders.inline(target, urls, 100, some),
                "rq.Webhook, forking Worker": contenders.rq_webhook(target, urls, 100, some),
                "rq.Webhook, SimpleWorker": contenders.rq_webhook(
                    target, urls, 150, some, worker_class="rq.SimpleWorker"
                ),
            },
            options.rounds,
        )
    report.data = runs_data(runs)
    for name in list(runs)[2:]:
        for mine in ("ours", "ours, CONCURRENCY=256"):
            factor = ratio(runs[mine], runs[name])
            promised = name != "limit, 64 threads"
            report.add(
                f"{mine} {median_rate(runs[mine]):,.0f}/s, {name} {median_rate(runs[name]):,.0f}/s",
                f"{factor:.1f}x",
                target=">= 40x" if promised else "",
                holds=factor >= 40 if promised else None,
            )
    return report


def one_host(options: Options) -> Report:
    """One slow host: the cap per host binds, on purpose."""
    report = Report("One host that takes 50 ms: CONCURRENCY_PER_HOST = 8 binds, 160/s at most")
    with servers() as some, receiver(1) as target:
        urls = target.urls(delay_ms=50)
        runs = alternately(
            {"ours": contenders.ours(target, urls, options.scaled(1200, 500), some.installation())}, 1
        )
    report.data = runs_data(runs)
    report.add("ours", f"{median_rate(runs['ours']):,.0f}/s")
    return report


def two_dispatchers(options: Options) -> Report:
    """One dispatcher and two on PostgreSQL, bound by concurrency and not by the CPU."""
    report = Report("Two dispatchers against one, PostgreSQL, 50 ms, 16 requests in flight each")
    count = options.scaled(4000, 1600)
    with servers() as some, receiver(40) as target:
        urls = target.urls(delay_ms=50)
        installation = some.installation("postgresql")
        runs = alternately(
            {
                "one": contenders.ours(target, urls, count, installation, concurrency=16),
                "two": contenders.ours(target, urls, count, installation, concurrency=16, dispatchers=2),
            },
            options.rounds,
        )
    report.data = runs_data(runs)
    factor = ratio(runs["two"], runs["one"])
    report.add(
        f"one {median_rate(runs['one']):,.0f}/s, two {median_rate(runs['two']):,.0f}/s",
        f"{factor:.2f}x",
        target=">= 1.8x",
        holds=factor >= 1.8,
    )
    return report
