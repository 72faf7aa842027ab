"""What one pass of reconcile costs with many jobs waiting.

Starts its own Valkey and uses SQLite in a temporary directory, or the database named by
``RQ_WEBHOOKS_BENCH_DATABASE_URL``. Prints CPU and wall seconds of the first pass (which notes every run)
and of later ones (which find nothing new). Then all jobs run and write progress: passes whose endpoint wants
``job.progress`` and passes whose endpoint does not, in turn.

Usage: ``python -m benchmarks.reconcile_cost [WATCHES]``
"""

from __future__ import annotations

import os
import pickle
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import redis
import rq
from sqlalchemy import insert, update

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.storage.crypto import Cipher
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from flask_rq_webhooks.storage.models import OPEN, Endpoint, Watch, new_id
from tests.servers import valkey_server


def fill(database: Database, client: redis.Redis, count: int) -> None:
    """Enqueue *count* jobs and watch each for an endpoint of its own, as requests do."""
    queue = rq.Queue(connection=client)
    jobs = []
    for start in range(0, count, 1000):
        data = [rq.Queue.prepare_data("tests.jobs.add", (1, 2)) for _ in range(min(1000, count - start))]
        jobs += [job.id for job in queue.enqueue_many(data)]
    cipher = Cipher(["a key for benchmarks"])
    now = datetime.now(UTC)
    endpoint_id = register(
        database,
        cipher,
        NewEndpoint(url="https://hooks.example.com/x", host="hooks.example.com"),
        namespace="benchmrk",
        reserved_job_id=None,
        now=datetime(2020, 1, 1, tzinfo=UTC),
    )
    rows = [
        {"id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": job_id, "status": OPEN,
         "missing_passes": 0, "created_at": now, "confirmed_at": now}
        for job_id in jobs
    ]  # fmt: skip
    for start in range(0, count, 1000):
        with database.write() as connection:
            connection.execute(insert(Watch), rows[start : start + 1000])


def compare_progress(database: Database, client: redis.Redis, count: int) -> None:
    """Print what passes cost that look for progress, beside those of the same jobs that do not."""
    ids = rq.Queue(connection=client).get_job_ids()
    assert len(ids) == count
    with client.pipeline(transaction=False) as pipeline:
        for number, job_id in enumerate(ids):
            meta = pickle.dumps({"progress": number % 100, "runid": f"run-{number}"})
            pipeline.hset(f"rq:job:{job_id}", mapping={"status": "started", "meta": meta})
        pipeline.execute()
    found: list[object] = []
    reconciler = Reconciler(database, client, publish=found.extend, settings=load_settings({}, {}))
    costs: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(12):
        name = ("without", "with")[turn % 2]
        with database.write() as connection:
            wanted = '["job.success","job.progress"]' if name == "with" else None
            connection.execute(update(Endpoint).values(events=wanted))
        cpu = time.process_time()
        reconciler.run_once()
        if turn > 1:  # the first one publishes the progress of every job
            costs[name].append(time.process_time() - cpu)
    assert len(found) == count, len(found)
    without, with_ = (statistics.median(costs[name]) for name in ("without", "with"))
    print(f"{count} running jobs, a pass without progress: {without:.3f} s CPU; with: {with_:.3f} s CPU")
    print(f"ratio: {with_ / without:.2f} (bound: 2)")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with valkey_server() as server, tempfile.TemporaryDirectory() as folder:
        client = redis.Redis.from_url(server.url)
        url = os.environ.get("RQ_WEBHOOKS_BENCH_DATABASE_URL", f"sqlite:///{Path(folder) / 'bench.db'}")
        database = Database(url)
        database.create_tables()
        fill(database, client, count)
        reported: list[object] = []
        reconciler = Reconciler(database, client, publish=reported.extend, settings=load_settings({}, {}))
        for name in ("first pass", "second pass", "third pass", "fourth pass"):
            cpu, wall = time.process_time(), time.perf_counter()
            report = reconciler.run_once()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(f"{name}: {report.looked_at} watches, {cpu:.3f} s CPU, {wall:.3f} s")
        assert not reported, reported[:3]
        compare_progress(database, client, count)
        database.dispose()
        client.close()


if __name__ == "__main__":
    main()
