"""Deliveries a second: ours against the other designs."""

from __future__ import annotations

from . import contenders
from .harness import Contender, Report, Run, Size, alternately, median_rate, ratios, runs_data
from .installation import Servers, servers
from .receiver import RunningReceiver, receiver

HOSTS = 40
#: Ours with as many processes as the peer with two.
TWO = "ours, --processes 2, PostgreSQL"
#: Requests in flight that receivers of 50 ms are worth; with the default of 64, 1,280/s would be the most.
MANY = 256


def instant(size: Size) -> Report:
    """Receivers that answer at once."""
    report = Report(f"Deliveries a second against other designs, {HOSTS} hosts that answer at once")
    with servers() as some, receiver(HOSTS) as target:
        urls = target.urls()
        sqlite = some.installation()
        candidates: dict[str, Contender] = {
            "ours": contenders.ours(target, urls, size["count"], sqlite),
            TWO: contenders.ours(target, urls, size["count"], some.installation("postgresql"), processes=2),
        }
        others: dict[str, Contender | None] = {
            "job per attempt": contenders.job_per_attempt(target, urls, size["others"], some),
            "django-webhook, Celery prefork": contenders.django_webhook(
                target, urls, size["others"], some, "prefork", 2
            ),
            "django-webhook, Celery threads": contenders.django_webhook(
                target, urls, size["others"], some, "threads", 16
            ),
            **_in_the_worker(target, urls, some, size["others"], size["forking"]),
        }
        for name, other in others.items():
            if other is None:
                report.skip(f"{name}: not installed (requirements/bench.txt)")
            else:
                candidates[name] = other
        runs = alternately(candidates, size["rounds"])
    _compare(report, runs)
    return report


def slow(size: Size) -> Report:
    """Receivers that take 50 ms, as the real ones do."""
    report = Report(f"Deliveries a second, {HOSTS} hosts that take 50 ms")
    with servers() as some, receiver(HOSTS) as target:
        urls, count = target.urls(delay_ms=50), size["count"]
        sqlite = some.installation()
        candidates: dict[str, Contender] = {
            "ours": contenders.ours(target, urls, count, sqlite, concurrency=MANY),
            "ours, 64 in flight": contenders.ours(target, urls, count // 2, sqlite),
        }
        candidates |= _in_the_worker(target, urls, some, size["others"], size["others"])
        candidates["limit, 64 threads"] = contenders.limit(target, urls, count // 2)
        runs = alternately(candidates, size["rounds"])
    _compare(report, runs)
    return report


def _in_the_worker(
    target: RunningReceiver, urls: list[str], some: Servers, simple: int, forking: int
) -> dict[str, Contender]:
    """Return those who post in the worker that ran the job."""
    return {
        "inline, forking Worker": contenders.inline(target, urls, forking, some),
        "rq.Webhook, forking Worker": contenders.rq_webhook(target, urls, forking, some),
        "rq.Webhook, SimpleWorker": contenders.rq_webhook(
            target, urls, simple, some, worker_class="rq.SimpleWorker"
        ),
    }


#: Promises by the contender they are about, and the factor that is promised.
_TARGETS = {
    "job per attempt": ("job-per-attempt", 10),
    "django-webhook": ("django-webhook", 8),
    "inline": ("naive", 100),
    "rq.Webhook": ("naive", 100),
}


def _compare(report: Report, runs: dict[str, list[Run]]) -> None:
    report.data = runs_data(runs)
    for name, some in runs.items():
        report.add(name, [run.rate for run in some], "/s")
    promised_here = "naive" if any("64 in flight" in name for name in runs) else ""
    for name in runs:
        if name.startswith(("ours", "limit")):
            continue
        key, target = next(each for start, each in _TARGETS.items() if name.startswith(start))
        promised = key == promised_here or (not promised_here and key != "naive")
        # Celery's pool of processes has two.
        who = TWO if "prefork" in name and TWO in runs else "ours"
        mine = runs[who]
        report.add(
            f"{who} {median_rate(mine):,.0f}/s against {name} {median_rate(runs[name]):,.0f}/s",
            ratios(mine, runs[name]),
            "x",
            promise=key if promised else "",
            at_least=target if promised else None,
        )
