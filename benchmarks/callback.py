"""What our callback costs a job that does nothing: every other job has it, in one and the same burst."""

from __future__ import annotations

import statistics

import redis
import rq
from rq.job import Job

from tests.servers import rq_worker

from .harness import Options, Report
from .installation import servers


def callback(options: Options) -> Report:
    """Let one worker of each kind run a burst of jobs, half of them with the callback."""
    report = Report("Job slowed by the callback (no-op jobs, every other one with it, one worker)")
    with servers() as some:
        installation = some.installation()
        name = f"flask_rq_webhooks.callbacks.success.ep{installation.state.namespace}_{26 * '0'}"
        for worker_class, count, most in (("rq.SimpleWorker", 3000, 0.5), ("rq.Worker", 1200, 2.0)):
            number = options.scaled(count, count // 3)
            without, beside = _periods(installation.redis, installation.redis_url, worker_class, number, name)
            plain, more = statistics.median(without), statistics.median(beside) - statistics.median(without)
            report.data[worker_class] = {"without_ms": plain, "more_ms": more}
            report.add(
                f"{worker_class}: {plain:.2f} ms a job without; with the callback",
                f"{more:+.2f} ms",
                target=f"<= {most} ms",
                holds=more <= most,
            )
    return report


def _periods(
    client: redis.Redis, redis_url: str, worker_class: str, count: int, callback: str
) -> tuple[list[float], list[float]]:
    """Return the milliseconds from each job's start to the next one's: without the callback, and with it.

    The callback runs before RQ takes the next job, so all it costs is in between.
    """
    client.flushdb()
    queue = rq.Queue("bench", connection=client)
    queue.enqueue_many(
        [
            rq.Queue.prepare_data(
                "benchmarks.tasks.nothing",
                result_ttl=600,
                timeout=60,
                on_success=rq.Callback(callback) if number % 2 else None,
            )
            for number in range(count)
        ]
    )
    ids = list(queue.job_ids)
    with rq_worker(redis_url, "bench", burst=True, worker_class=worker_class) as worker:
        assert worker.wait(300) == 0, worker.output
    jobs = [job for job in Job.fetch_many(ids, connection=client) if job is not None]
    starts = [job.started_at.timestamp() for job in jobs if job.started_at is not None]
    assert len(starts) == count
    periods = [1000 * (after - before) for before, after in zip(starts, starts[1:], strict=False)]
    warm = 2 * (count // 20)
    return periods[warm::2], periods[warm + 1 :: 2]
