"""Deliveries a second: ours against the HTTP client alone, on one slow host, by two dispatchers or processes,
and as fast as workers end jobs."""

from __future__ import annotations

import statistics
import uuid
from contextlib import ExitStack

import rq

from tests.servers import rq_worker

from . import contenders
from .harness import Report, Size, alternately, median_rate, ratios, runs_data, watch
from .installation import KINDS, servers
from .latency import register_endpoint
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
            report.add(f"{way}: of the limit", shares, "share", promise="limit", at_least=0.8)
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


def processes(size: Size) -> Report:
    """One process and two of one command, on PostgreSQL, bound by the CPU; and what everybody else takes."""
    report = Report("--processes 2 against one, PostgreSQL, receivers that answer at once")
    with servers() as some, receiver(HOSTS) as target:
        urls = target.urls()
        installation = some.installation("postgresql")
        others = {
            "receiver": target.pid,
            "PostgreSQL": some.postgres.pid,
            "Valkey": int(installation.redis.info("server")["process_id"]),
        }
        candidates = {
            f"ours, --processes {number}": contenders.ours(
                target, urls, size["count"] * number, installation, processes=number, others=others
            )
            for number in (1, 2)
        }
        runs = alternately(candidates, size["rounds"])
    report.data = runs_data(runs)
    one, two = runs.values()
    report.add(
        f"{median_rate(one):,.0f}/s by one process, {median_rate(two):,.0f}/s by two; receiver and servers "
        "on the same processors",
        ratios(two, one),
        "x",
    )
    for name in others:
        report.add(
            f"CPU of {name} for each delivery, two processes", [run.others_ms[name] for run in two], "ms"
        )
    report.add(
        "calculated from the CPU of one and of two: a processor for each process, all others apart",
        [2 * (alone.cpu_ms or 0) / (both.cpu_ms or 1) for alone, both in zip(one, two, strict=True)],
        "x",
        promise="processes",
        at_least=1.6,
    )
    return report


def jobs(size: Size) -> Report:
    """Jobs a second that several workers run and one dispatcher reports, from the queue to the receiver."""
    report = Report("Jobs a second from the queue to the receiver, no-op jobs, forking Workers, PostgreSQL")
    with servers() as some, receiver(HOSTS) as target:
        urls = target.urls()
        installation = some.installation("postgresql")
        for workers in (1, 2, 4):
            rates = []
            for _ in range(size["rounds"]):
                installation.clear()
                target.ask("/reset")
                queue = rq.Queue("default", connection=installation.redis)
                data = []
                for number in range(size["count"]):
                    job_id = str(uuid.uuid4())
                    name = register_endpoint(installation, urls[number % HOSTS], job_id)
                    data.append(
                        rq.Queue.prepare_data(
                            "benchmarks.tasks.nothing", job_id=job_id, result_ttl=600, timeout=60,
                            on_success=rq.Callback(name),
                        )
                    )  # fmt: skip
                queue.enqueue_many(data)
                with ExitStack() as stack:
                    stack.enter_context(installation.dispatcher()).wait_for_output("started: ")
                    for _worker in range(workers):
                        stack.enter_context(rq_worker(installation.redis_url))
                    rates.append(watch(target, size["count"], []).rate)
                    installation.wait_until_recorded(size["count"])
                target.check(size["count"])
            report.data[f"{workers} workers"] = rates
            report.add(f"{workers} workers", statistics.median(rates), "/s")
    return report
