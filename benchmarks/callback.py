"""What our callback costs a job: jobs that do nothing, with it and without, in turns."""

from __future__ import annotations

import statistics

import redis
import rq

from tests.servers import rq_worker

from .harness import Options, Report
from .installation import servers


def callback(options: Options) -> Report:
    """Let one worker of each kind run bursts of jobs, with callbacks and without."""
    report = Report("Job slowed by the callback (no-op job, burst of jobs, one worker)")
    with servers() as some:
        installation = some.installation()
        name = f"flask_rq_webhooks.callbacks.success.ep{installation.state.namespace}_{26 * '0'}"
        for worker_class, count, most in (("rq.SimpleWorker", 600, 0.5), ("rq.Worker", 250, 2.0)):
            count = options.scaled(count, count // 2)
            without, more = [], []
            for _ in range(options.rounds + 1):
                off = _seconds(installation.redis, installation.redis_url, worker_class, count, None)
                on = _seconds(installation.redis, installation.redis_url, worker_class, count, name)
                without.append(1000 * off / count)
                more.append(1000 * (on - off) / count)
            extra = statistics.median(more)
            report.data[worker_class] = {"without_ms": without, "more_ms": more}
            report.add(
                f"{worker_class}: {statistics.median(without):.2f} ms a job without; with the callback",
                f"+{extra:.2f} ms",
                target=f"<= {most} ms",
                holds=extra <= most,
            )
    return report


def _seconds(
    client: redis.Redis, redis_url: str, worker_class: str, count: int, callback: str | None
) -> float:
    """Return how long the worker took from its first job to its last."""
    client.flushdb()
    queue = rq.Queue("bench", connection=client)
    options = {"on_success": rq.Callback(callback)} if callback else {}
    queue.enqueue_many(
        [
            rq.Queue.prepare_data("benchmarks.tasks.nothing", result_ttl=600, timeout=60, **options)
            for _ in range(count)
        ]
    )
    ids = list(queue.job_ids)
    with rq_worker(redis_url, "bench", burst=True, worker_class=worker_class) as worker:
        assert worker.wait(300) == 0, worker.output
    jobs = rq.job.Job.fetch_many([ids[count // 10], ids[-1]], connection=client)
    started, ended = (job.ended_at if job is not None else None for job in jobs)
    assert started is not None
    assert ended is not None
    return (ended - started).total_seconds() / 0.9
