"""What settled watches cost a pass of reconcile, and how much memory, over a restart of the dispatcher.

First the memory of two dispatcher processes, one after the other, while RQ keeps every job (a ``result_ttl``
of a day). Then passes of reconcile in this process: RQ keeps every job, one of them runs again, RQ has
forgotten them all. Starts its own servers.

Usage: ``python -m benchmarks.settled_watches [WATCHES] [sqlite|postgresql]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import redis
from sqlalchemy import insert

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.models import SETTLED, Watch, new_id

from .installation import Installation, servers

#: Seconds for which a dispatcher is watched, and between two of its passes.
WATCHED_S, EVERY_S = 60, 5
#: When the jobs were enqueued, and when their runs were reported.
BEGAN = datetime.now(UTC) - timedelta(hours=2)


def fill(database: Database, client: redis.Redis, count: int) -> None:
    """Make *count* jobs that finished, and the settled watches on them."""
    settled_at = BEGAN + timedelta(minutes=1)
    run = format_time(BEGAN)
    fields: Any = {"status": "finished", "created_at": run, "enqueued_at": run, "origin": "default"}
    for start in range(0, count, 5000):
        numbers = range(start, min(start + 5000, count))
        with client.pipeline(transaction=False) as pipeline:
            for number in numbers:
                pipeline.hset(f"rq:job:job-{number}", mapping=fields)
            pipeline.execute()
        rows = [
            {"id": new_id("wat"), "endpoint_id": None, "job_id": f"job-{number}", "status": SETTLED,
             "run": run, "missing_passes": 0, "created_at": BEGAN, "confirmed_at": BEGAN,
             "settled_at": settled_at, "outcome": "job.success", "recheck_at": settled_at}
            for number in numbers
        ]  # fmt: skip
        with database.write() as connection:
            connection.execute(insert(Watch), rows)


@contextmanager
def measured(name: str) -> Iterator[dict[str, float]]:
    """Print CPU, wall time and the growth of this process's memory."""
    process = psutil.Process()
    before, cpu, wall = process.memory_info().rss, time.process_time(), time.perf_counter()
    figures: dict[str, float] = {}
    yield figures
    figures["cpu_s"] = time.process_time() - cpu
    figures["wall_s"] = time.perf_counter() - wall
    figures["grown_mb"] = (process.memory_info().rss - before) / 2**20
    print(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in figures.items()), flush=True)


def watch_process(installation: Installation, name: str) -> None:
    """Print the memory of a dispatcher process: after its start, at most, and at the end."""
    with installation.dispatcher(reconcile_interval=EVERY_S) as dispatcher:
        dispatcher.wait_for_output("started")
        process = psutil.Process(dispatcher.pid)
        samples = []
        for _ in range(2 * WATCHED_S):
            samples.append(process.memory_info().rss / 2**20)
            time.sleep(0.5)
        cpu = sum(process.cpu_times()[:2])
        assert dispatcher.stop() == 0, dispatcher.output
    print(f"{name}: {samples[0]:.0f} MB at the start, at most {max(samples):.0f}, {samples[-1]:.0f} after "
          f"{WATCHED_S} s; {cpu:.0f} s of CPU", flush=True)  # fmt: skip


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    kind = sys.argv[2] if len(sys.argv) > 2 else "sqlite"
    with servers() as some:
        installation = some.installation(kind)
        database, client = installation.state.database, installation.redis
        fill(database, client, count)
        for name in ("a dispatcher", "after a restart"):
            watch_process(installation, name)
        published: list[Any] = []

        def dispatcher() -> Reconciler:
            return Reconciler(database, client, publish=published.extend, settings=load_settings({}, {}))

        print(f"{count} settled watches, memory {psutil.Process().memory_info().rss / 2**20:.0f} MB")
        reconciler = dispatcher()
        with measured("first pass after a start"):
            reconciler.run_once()
        with measured("four more passes"):
            for _ in range(4):
                reconciler.run_once()
        reconciler = dispatcher()
        with measured("first pass after a restart"):
            reconciler.run_once()
        client.hset(f"rq:job:job-{count - 1}", "enqueued_at", format_time(datetime.now(UTC)))
        passes = 0
        with measured("until a new run is found"):
            while not published:
                reconciler.run_once()
                passes += 1
        print(f"found after {passes} passes: {published[0].occurrence.run}")
        client.flushdb()
        with measured("first pass when RQ has forgotten them"):
            reconciler.run_once()
        for _ in range(count // 100_000 + 1):
            reconciler.run_once()
        with measured("a later pass"):
            reconciler.run_once()


if __name__ == "__main__":
    main()
