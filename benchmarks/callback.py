"""What our callback costs a job that does nothing: every other job has it, in one and the same burst."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Collection, Sequence

import psutil
import redis
import rq
from rq.job import Job

from flask_rq_webhooks.callbacks import OUTBOX_KEY_PREFIX
from tests.servers import rq_worker, wait_until

from .harness import Report, Size
from .installation import Installation, servers
from .latency import register_endpoint
from .receiver import RunningReceiver, receiver

#: Worker classes with the size's key and the milliseconds promised.
WORKERS = (("rq.SimpleWorker", "simple", 0.35), ("rq.Worker", "forking", 1.2))
HOSTS = 40
SLOW_MS = 500


def callback(size: Size) -> Report:
    """Let one worker of each kind run bursts of jobs, half of them with the callback."""
    report = Report("Job slowed by the callback (no-op jobs, every other one with it, one worker)")
    with servers() as some, receiver(HOSTS) as target:
        installation = some.installation()
        key = f"{OUTBOX_KEY_PREFIX}ep{installation.state.namespace}"
        name = f"flask_rq_webhooks.callbacks.success.ep{installation.state.namespace}_{26 * '0'}"
        for worker_class, which, most in WORKERS:
            pairs = []
            _burst(installation, worker_class, size[which] // 4, [name])
            for _ in range(size["rounds"]):
                pairs.append(_burst(installation, worker_class, size[which], [name]))
                entries = installation.redis.xlen(key)
                assert entries == size[which] // 2, f"{entries} entries of {size[which] // 2} callbacks"
            _tell(report, f"{worker_class}, no dispatcher", pairs, "callback", most)
        for worker_class, which, most in WORKERS:
            beside: dict[int, list[tuple[float, float]]] = {0: [], SLOW_MS: []}
            for _ in range(size["beside"]):
                for delay_ms, pairs in beside.items():
                    count = max(60, size[which] // 2)
                    pairs.append(_beside_receivers(installation, target, worker_class, count, delay_ms))
            for delay_ms, pairs in beside.items():
                _tell(report, f"{worker_class}, a dispatcher, receivers of {delay_ms} ms", pairs)
            report.add(
                f"{worker_class}: more with receivers of {SLOW_MS} ms than with those that answer at once",
                [
                    (slow[1] - slow[0]) - (fast[1] - fast[0])
                    for slow, fast in zip(beside[SLOW_MS], beside[0], strict=True)
                ],
                "ms",
                promise="callback-independent",
                at_most=most,
            )
    return report


def _tell(
    report: Report,
    words: str,
    pairs: Sequence[tuple[float, float]],
    promise: str = "",
    most: float | None = None,
) -> None:
    plain = statistics.median(without for without, _beside in pairs)
    report.data[words] = [{"without_ms": without, "with_ms": beside} for without, beside in pairs]
    report.add(
        f"{words}: {plain:.2f} ms a job without; with it",
        [beside - without for without, beside in pairs],
        "ms",
        promise=promise,
        at_most=most,
    )


def _beside_receivers(
    installation: Installation, target: RunningReceiver, worker_class: str, count: int, delay_ms: int
) -> tuple[float, float]:
    """Run a burst while a dispatcher delivers to receivers that take so long.

    The worker has a processor of its own: what it would lose to a dispatcher on the same one is not the
    callback's doing.
    """
    installation.clear()
    target.ask("/reset")
    names = [register_endpoint(installation, url) for url in target.urls(delay_ms=delay_ms)]
    with installation.dispatcher() as dispatcher:
        dispatcher.wait_for_output("started")
        own, others = _processors()
        for pid in (dispatcher.pid, target.pid):
            _keep_to(pid, others)
        pair = _burst(installation, worker_class, count, names, clear=False, processors=own)
        wait_until(lambda: target.ask("/count") >= count // 2, timeout=60, what="all deliveries")
        installation.wait_until_recorded(count // 2)
    target.check(count // 2)
    return pair


def _processors() -> tuple[set[int], set[int]]:
    """Return a processor for the worker, and those for the others; nothing where that cannot be chosen."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return set(), set()
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others)


def _keep_to(pid: int, processors: Collection[int]) -> None:
    """Let all threads of a process, and what they start from now on, use only *processors*."""
    for thread in psutil.Process(pid).threads() if processors else ():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, processors)


def _burst(
    installation: Installation,
    worker_class: str,
    count: int,
    callbacks: Sequence[str],
    *,
    clear: bool = True,
    processors: Collection[int] = (),
) -> tuple[float, float]:
    """Return the median milliseconds from a job's start to the next one's: without the callback, and with it.

    The callback runs before RQ takes the next job, so all it costs is in between.

    :param callbacks: dotted names that take turns.
    :param processors: those the worker may use; all by default.
    """
    client: redis.Redis = installation.redis
    if clear:
        client.flushdb()
    queue = rq.Queue("bench", connection=client)
    queue.enqueue_many(
        [
            rq.Queue.prepare_data(
                "benchmarks.tasks.nothing",
                result_ttl=600,
                timeout=60,
                on_success=rq.Callback(callbacks[number // 2 % len(callbacks)]) if number % 2 else None,
            )
            for number in range(count)
        ]
    )
    ids = list(queue.job_ids)
    with rq_worker(installation.redis_url, "bench", burst=True, worker_class=worker_class) as worker:
        _keep_to(worker.pid, processors)
        assert worker.wait(300) == 0, worker.output
    jobs = [job for job in Job.fetch_many(ids, connection=client) if job is not None]
    starts = [job.started_at.timestamp() for job in jobs if job.started_at is not None]
    assert len(starts) == count
    periods = [1000 * (after - before) for before, after in zip(starts, starts[1:], strict=False)]
    warm = 2 * (count // 20)
    return statistics.median(periods[warm::2]), statistics.median(periods[warm + 1 :: 2])
