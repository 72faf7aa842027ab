"""What one pass of reconcile costs with many jobs waiting.

Starts its own Valkey and uses SQLite in a temporary directory, or the database named by
``RQ_WEBHOOKS_BENCH_DATABASE_URL``. Prints CPU and wall seconds of the first pass (which notes every run)
and of later ones (which find nothing new).

Usage: ``python -m benchmarks.reconcile_cost [WATCHES]``
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import redis
import rq
from sqlalchemy import insert

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.storage.crypto import Cipher
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from flask_rq_webhooks.storage.models import OPEN, Watch, new_id
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


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with valkey_server() as server, tempfile.TemporaryDirectory() as folder:
        client = redis.Redis.from_url(server.url)
        url = os.environ.get("RQ_WEBHOOKS_BENCH_DATABASE_URL", f"sqlite:///{Path(folder) / 'bench.db'}")
        database = Database(url)
        database.create_tables()
        fill(database, client, count)
        told: list[object] = []
        reconciler = Reconciler(database, client, publish=told.extend, settings=load_settings({}, {}))
        for name in ("first pass", "second pass", "third pass", "fourth pass"):
            cpu, wall = time.process_time(), time.perf_counter()
            report = reconciler.run_once()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(f"{name}: {report.looked_at} watches, {cpu:.3f} s CPU, {wall:.3f} s")
        assert not told, told[:3]
        database.dispose()
        client.close()


if __name__ == "__main__":
    main()
