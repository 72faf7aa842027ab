"""Who delivers: each drains work that waits, in processes of its own, to the same receiver.

Every function here returns a :class:`~.harness.Contender`. After each run it is checked that everything has
arrived once, with the right signature where the contender signs, and that its log has a row for each.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import redis
import rq

from tests.servers import Process, rq_worker, wait_until

from .harness import Contender, Run, watch
from .installation import Installation, Servers
from .receiver import RunningReceiver


def limit(target: RunningReceiver, urls: Sequence[str], count: int, *, threads: int = 64) -> Contender:
    """Return the HTTP client alone; see :mod:`.limit`."""

    def run(count: int) -> Run:
        target.ask("/reset")
        with Process("python", "-m", "benchmarks.limit", str(threads), str(count), *urls) as process:
            result = watch(target, count, [process.pid])
            assert process.wait() == 0, process.output
        target.check(count, distinct=False)
        return result

    return Contender(count, run)


def ours(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    installation: Installation,
    *,
    waiting_in: str = "outbox",
    dispatchers: int = 1,
    processes: int = 1,
    others: Mapping[str, int] | None = None,
    **settings: Any,
) -> Contender:
    """Return our dispatcher: everything on, signatures, log, address policy and rate limit.

    :param waiting_in: ``"outbox"``: the whole way from the callbacks' word, through ingest; ``"sql"``: due
        deliveries.
    :param processes: of each dispatcher command.
    :param others: see :func:`.watch`.
    :param settings: of the dispatcher.
    """

    def run(count: int) -> Run:
        installation.clear()
        target.ask("/reset")
        seed = installation.seed_outbox if waiting_in == "outbox" else installation.seed_due
        seed(count, urls)
        with ExitStack() as stack:
            options = ("--processes", str(processes)) if processes > 1 else ()
            commands = [
                stack.enter_context(installation.dispatcher(*options, **settings)) for _ in range(dispatchers)
            ]
            for command in commands:
                command.wait_for_output("started: ")
            result = watch(
                target, count, [one.pid for one in commands], began=time.monotonic(), others=others
            )
            installation.wait_until_recorded(count)
            for command in commands:
                assert command.stop() == 0, command.output
        target.check(count)
        return result

    return Contender(count, run)


def inline(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    servers: Servers,
    *,
    worker_class: str = "rq.Worker",
) -> Contender:
    """Return the naive design, a callback that posts: one worker."""
    options = {"on_success": rq.Callback("benchmarks.naive.post")}
    return _rq(target, urls, count, servers, worker_class, lambda url: options, signed=True)


def rq_webhook(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    servers: Servers,
    *,
    worker_class: str = "rq.Worker",
) -> Contender:
    """Return RQ's own ``Webhook``, which does not sign: one worker."""
    return _rq(
        target, urls, count, servers, worker_class,
        lambda url: {"webhooks": [rq.Webhook(url, "finished", method="POST")]},
        signed=False,
    )  # fmt: skip


def _rq(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    servers: Servers,
    worker_class: str,
    options: Callable[[str], dict[str, Any]],
    *,
    signed: bool,
) -> Contender:
    redis_url = servers.valkey()

    def run(count: int) -> Run:
        with redis.Redis.from_url(redis_url) as client:
            client.flushdb()
            queue = rq.Queue("bench", connection=client)
            data = []
            for url in itertools.islice(itertools.cycle(urls), count):
                data.append(
                    rq.Queue.prepare_data(
                        "benchmarks.tasks.nothing",
                        kwargs={"url": url},
                        result_ttl=60,
                        timeout=60,
                        **options(url),
                    )
                )
            queue.enqueue_many(data)
            target.ask("/reset")
            with rq_worker(redis_url, "bench", worker_class=worker_class) as process:
                result = watch(target, count, [process.pid])
                wait_until(lambda: queue.finished_job_registry.get_job_count(cleanup=False) == count,
                           what="all jobs to be finished")  # fmt: skip
            target.check(count, signed=signed)
            return result

    return Contender(count, run)


def job_per_attempt(target: RunningReceiver, urls: Sequence[str], count: int, servers: Servers) -> Contender:
    """Return an RQ job per delivery, see :mod:`.job_per_attempt`: one ``SimpleWorker``."""
    redis_url = servers.valkey()
    log = servers.folder / "attempts.db"

    def run(count: int) -> Run:
        log.unlink(missing_ok=True)
        with redis.Redis.from_url(redis_url) as client:
            client.flushdb()
            queue = rq.Queue("bench", connection=client)
            targets = itertools.islice(itertools.cycle(urls), count)
            queue.enqueue_many(
                [
                    rq.Queue.prepare_data(
                        "benchmarks.job_per_attempt.deliver", (f"job-{number}", url), result_ttl=0, timeout=60
                    )
                    for number, url in enumerate(targets)
                ]
            )
            target.ask("/reset")
            environment = {"BENCH_ATTEMPTS": str(log)}
            with rq_worker(redis_url, "bench", worker_class="rq.SimpleWorker", env=environment) as process:
                result = watch(target, count, [process.pid])
                _wait_for_rows(log, "SELECT count(*) FROM attempt WHERE status = 200", count)
        target.check(count)
        return result

    return Contender(count, run)


def django_webhook(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    servers: Servers,
    pool: str,
    concurrency: int,
) -> Contender | None:
    """Return django-webhook on Celery with Redis as broker, its log of events on; see :mod:`.django_app`.

    :param pool: ``"prefork"`` or ``"threads"``.
    :returns: ``None`` where ``requirements/bench.txt`` is not installed.
    """
    if importlib.util.find_spec("django_webhook") is None:
        return None
    log = servers.folder / f"django-{pool}.db"
    environment = {
        "BENCH_REDIS_URL": servers.valkey(),
        "BENCH_DJANGO_DATABASE": str(log),
        "DJANGO_SETTINGS_MODULE": "benchmarks.django_app.settings",
        "BENCH_URLS": json.dumps(list(urls)),
    }
    _django("migrate", environment=environment)

    def run(count: int) -> Run:
        _django("fill", str(count), environment=environment)
        target.ask("/reset")
        quiet = ("--loglevel", "WARNING", "--without-mingle", "--without-gossip")
        command = ("-A", "benchmarks.django_app.celery", "worker", *quiet, "--pool", pool)
        with Process(
            "python", "-m", "celery", *command, "--concurrency", str(concurrency), env=environment
        ) as process:
            result = watch(target, count, [process.pid])
            sql = "SELECT count(*) FROM django_webhook_webhookevent WHERE status = 'SUCCESS'"
            _wait_for_rows(log, sql, count)
        target.check(count)
        return result

    return Contender(count, run)


def _django(*arguments: str, environment: dict[str, str]) -> None:
    with Process("python", "-m", "benchmarks.django_app", *arguments, env=environment) as process:
        assert process.wait() == 0, process.output


def _wait_for_rows(path: Path, sql: str, count: int) -> None:
    with closing(sqlite3.connect(path, timeout=30)) as database:
        wait_until(lambda: database.execute(sql).fetchone()[0] >= count, what=f"{count} rows: {sql}")
        rows = database.execute(sql).fetchone()[0]
    assert rows == count, f"{rows} rows for {count} deliveries: {sql}"
