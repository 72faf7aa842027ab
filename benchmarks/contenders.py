"""Who delivers: each drains work that waits, in processes of its own, to the same receiver.

Every function here returns another one that makes one run, for :func:`.harness.alternately`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import redis
import rq

from tests.servers import Process, rq_worker

from .harness import Run, watch
from .installation import Installation, Servers
from .receiver import RunningReceiver

Contender = Callable[[], Run]


def limit(target: RunningReceiver, urls: Sequence[str], count: int, *, threads: int = 64) -> Contender:
    """Return the HTTP client alone; see :mod:`.limit`."""

    def run() -> Run:
        target.ask("/reset")
        with Process("python", "-m", "benchmarks.limit", str(threads), str(count), *urls) as process:
            return watch(target, count, [process.pid])

    return run


def ours(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    installation: Installation,
    *,
    waiting_in: str = "outbox",
    dispatchers: int = 1,
    **settings: Any,
) -> Contender:
    """Return our dispatcher.

    :param waiting_in: ``"outbox"``: the whole way from the callbacks' word, through ingest; ``"sql"``: due
        deliveries.
    """

    def run() -> Run:
        installation.clear()
        target.ask("/reset")
        seed = installation.seed_outbox if waiting_in == "outbox" else installation.seed_due
        seed(count, urls)
        with ExitStack() as stack:
            processes = [stack.enter_context(installation.dispatcher(**settings)) for _ in range(dispatchers)]
            for process in processes:
                process.wait_for_output("started")
            return watch(target, count, [process.pid for process in processes], began=time.monotonic())

    return run


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
    return _rq(target, urls, count, servers, worker_class, lambda url: options)


def rq_webhook(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    servers: Servers,
    *,
    worker_class: str = "rq.Worker",
) -> Contender:
    """Return RQ's own ``Webhook``: one worker."""
    return _rq(
        target, urls, count, servers, worker_class,
        lambda url: {"webhooks": [rq.Webhook(url, "finished", method="POST")]},
    )  # fmt: skip


def _rq(
    target: RunningReceiver,
    urls: Sequence[str],
    count: int,
    servers: Servers,
    worker_class: str,
    options: Callable[[str], dict[str, Any]],
) -> Contender:
    redis_url = servers.valkey()

    def run() -> Run:
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
                return watch(target, count, [process.pid])

    return run


def job_per_attempt(target: RunningReceiver, urls: Sequence[str], count: int, servers: Servers) -> Contender:
    """Return an RQ job per delivery, see :mod:`.job_per_attempt`: one ``SimpleWorker``."""
    redis_url = servers.valkey()
    environment = {"BENCH_ATTEMPTS": str(servers.folder / "attempts.db")}

    def run() -> Run:
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
            with rq_worker(redis_url, "bench", worker_class="rq.SimpleWorker", env=environment) as process:
                return watch(target, count, [process.pid])

    return run


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
        print("  django-webhook is not installed (requirements/bench.txt); left out", flush=True)
        return None
    environment = {
        "BENCH_REDIS_URL": servers.valkey(),
        "BENCH_DJANGO_DATABASE": str(servers.folder / f"django-{pool}.db"),
        "DJANGO_SETTINGS_MODULE": "benchmarks.django_app.settings",
        "BENCH_URLS": json.dumps(list(urls)),
    }
    with Process("python", "-m", "benchmarks.django_app", "migrate", env=environment) as process:
        assert process.wait() == 0, process.output

    def run() -> Run:
        with Process("python", "-m", "benchmarks.django_app", "fill", str(count), env=environment) as process:
            assert process.wait() == 0, process.output
        target.ask("/reset")
        quiet = ("--loglevel", "WARNING", "--without-mingle", "--without-gossip")
        command = ("-A", "benchmarks.django_app.celery", "worker", *quiet, "--pool", pool)
        with Process(
            "python", "-m", "celery", *command, "--concurrency", str(concurrency), env=environment
        ) as process:
            return watch(target, count, [process.pid])

    return run
