"""One installation to measure: Valkey, a database, the app's state, dispatchers, and work that waits.

Work is put where it would be after the step before: outbox entries beside finished jobs, as the callbacks
leave them, or due deliveries, as ingest does. Every job has an endpoint of its own with a secret of its own,
as requests make them.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import func, insert, select

from flask_rq_webhooks.protocol.events import JOB_SUCCESS, Occurrence, format_time
from flask_rq_webhooks.protocol.payloads import occurrence_to_json
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage.models import Attempt, Base, Delivery, Endpoint, Event, Secret, Watch, new_id
from flask_rq_webhooks.storage.subscriptions import EndpointRow
from tests.servers import PostgresHandle, Process, execute, postgres_server, valkey_server, wait_until

from .app import create_app
from .payload import RESULT, SECRET

_CHUNK = 1000

#: Databases by the name people know them by.
KINDS = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


class Installation:
    """An app, its servers, and ways to give them work.

    :param database_url: an empty database.
    """

    def __init__(self, redis_url: str, database_url: str, **settings: Any) -> None:
        self.redis_url = redis_url
        self.database_url = database_url
        self.settings = settings
        self.app = create_app(self.environment)
        self.state: State = get_state(self.app)
        self.state.database.create_tables()
        self.redis = redis.Redis.from_url(redis_url)
        self._sealed = self.state.cipher.encrypt(SECRET)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "BENCH_DATABASE_URL": self.database_url,
            "BENCH_REDIS_URL": self.redis_url,
            "BENCH_SETTINGS": json.dumps(self.settings),
        }

    def dispatcher(self, *options: str, steps: str = "", **settings: Any) -> Process:
        """Start a dispatcher.

        :param steps: file that it writes into when it reaches a step, see :func:`.latency.note_steps`.
        """
        environment = self.environment | {"BENCH_SETTINGS": json.dumps(self.settings | settings)}
        environment["BENCH_STEPS"] = steps
        command = ("python", "-m", "flask", "--app", "benchmarks.app:create_app", "rq-webhooks", "worker")
        return Process(*command, *options, env=environment)

    def close(self) -> None:
        self.state.database.dispose()
        self.state.redis.close()
        self.redis.close()

    # -- work -----------------------------------------------------------------------------------------

    def seed_outbox(self, count: int, urls: Sequence[str], *, result: Any = RESULT) -> None:
        """Leave *count* finished jobs, their watches and their outbox entries."""
        for start in range(0, count, _CHUNK):
            self._seed_outbox(min(_CHUNK, count - start), urls, start, result)

    def _seed_outbox(self, count: int, urls: Sequence[str], start: int, result: Any) -> None:
        now = datetime.now(UTC)
        endpoints = self._endpoints(count, urls, start, now)
        began = format_time(now)
        pipeline = self.redis.pipeline(transaction=False)
        watches = []
        for endpoint in endpoints:
            job_id, endpoint_id = str(uuid.uuid4()), endpoint["id"]
            watches.append(
                {"id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": job_id, "status": "open",
                 "missing_passes": 0, "created_at": now, "confirmed_at": now}
            )  # fmt: skip
            name = f"flask_rq_webhooks.callbacks.success.{endpoint_id}"
            job = {"status": "finished", "origin": "default", "success_callback_name": name,
                   "created_at": began, "enqueued_at": began, "started_at": began, "ended_at": began,
                   "description": "tasks.run_model('basin-7')"}  # fmt: skip
            pipeline.hset(f"rq:job:{job_id}", mapping=job)
            entry = {"v": 1, "kind": "success", "endpoint": endpoint_id, "job_id": job_id, "run": began,
                     "at": time.time(), "func": "tasks.run_model", "queue": "default", "created_at": began,
                     "enqueued_at": began, "started_at": began, "runid": "basin-7", "retries_left": None,
                     "result": result, "result_truncated": False, "error": None}  # fmt: skip
            pipeline.xadd(self.state.outbox.key, {"entry": json.dumps(entry)})
        with self.state.database.write() as connection:
            connection.execute(insert(Watch), watches)
        pipeline.execute()

    def seed_due(self, count: int, urls: Sequence[str]) -> None:
        """Write *count* deliveries that are due."""
        now = datetime.now(UTC)
        for start in range(0, count, _CHUNK):
            self._seed_due(self._endpoints(min(_CHUNK, count - start), urls, start, now), now)

    def _seed_due(self, endpoints: Sequence[dict[str, Any]], now: datetime) -> None:
        events, deliveries = [], []
        for endpoint in endpoints:
            job_id, event_id = str(uuid.uuid4()), new_id("evt")
            occurrence = Occurrence(
                type=JOB_SUCCESS, occurred_at=now, source="callback", job_id=job_id, run=format_time(now),
                runid="basin-7", func="tasks.run_model", queue="default", enqueued_at=now, started_at=now,
                ended_at=now, result=RESULT,
            )  # fmt: skip
            row = EndpointRow(
                id=endpoint["id"], kind="job", host=endpoint["host"], events=None, scope="job", format="job",
                reference=None, runid=None, max_attempts=None, retry_schedule=None, created_at=now,
            )  # fmt: skip
            events.append(
                {"id": event_id, "type": JOB_SUCCESS, "run_key": occurrence.run_key, "job_id": job_id,
                 "runid": "basin-7", "source": "callback", "payload": occurrence_to_json(occurrence),
                 "occurred_at": now, "created_at": now}
            )  # fmt: skip
            deliveries.append(
                {"id": new_id("dlv"), "event_id": event_id, "endpoint_id": endpoint["id"],
                 "host": endpoint["host"], "event_type": JOB_SUCCESS, "status": "pending",
                 "trigger": "scheduled", "body": self.state.render(row, event_id, occurrence),
                 "attempts": 0, "max_attempts": 12,
                 "next_attempt_at": now - timedelta(minutes=1), "created_at": now}
            )  # fmt: skip
        with self.state.database.write() as connection:
            connection.execute(insert(Event), events)
            connection.execute(insert(Delivery), deliveries)

    def _endpoints(self, count: int, urls: Sequence[str], start: int, now: datetime) -> list[dict[str, Any]]:
        checked = [self.state.url_policy.check_url(url) for url in urls]
        rows, secrets = [], []
        for number in range(start, start + count):
            url = checked[number % len(checked)]
            endpoint_id = new_id("ep" + self.state.namespace)
            rows.append(
                {"id": endpoint_id, "kind": "job", "url": url.url, "host": url.host_key, "scope": "job",
                 "format": "job", "sign_payload": False, "enabled": True, "failures": 0,
                 "created_at": now - timedelta(seconds=5), "updated_at": now}
            )  # fmt: skip
            secrets.append(
                {"id": new_id("sec"), "endpoint_id": endpoint_id, "secret": self._sealed, "created_at": now}
            )
        with self.state.database.write() as connection:
            connection.execute(insert(Endpoint), rows)
            connection.execute(insert(Secret), secrets)
        return rows

    def endpoints(self, count: int, urls: Sequence[str]) -> list[tuple[str, str]]:
        """Make *count* endpoints with a secret each, and return their ids and hosts."""
        rows = self._endpoints(count, urls, 0, datetime.now(UTC))
        return [(row["id"], row["host"]) for row in rows]

    # -- what came of it ------------------------------------------------------------------------------

    def wait_until_recorded(self, count: int, *, timeout_s: float = 60) -> None:
        """Wait until *count* deliveries have succeeded; fail unless each took exactly one attempt."""
        mine = Delivery.status == "succeeded"

        def counted(what: Any) -> int:
            with self.state.database.read() as connection:
                return int(connection.execute(what).scalar_one())

        succeeded = select(func.count()).select_from(Delivery).where(mine)
        wait_until(
            lambda: counted(succeeded) >= count, timeout=timeout_s, what=f"{count} recorded deliveries"
        )
        assert counted(succeeded) == count
        attempts = counted(select(func.count()).select_from(Attempt).where(Attempt.status == "succeeded"))
        assert attempts == count, f"{attempts} attempts recorded for {count} deliveries"

    def bytes_per_delivery(self) -> float:
        """Return the disk that all rows of one delivery take in PostgreSQL, from endpoint to attempt."""
        engine = self.state.database.engine
        total = 0
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in Base.metadata.sorted_tables:
                connection.exec_driver_sql(f"VACUUM FULL {table.name}")
                size = f"SELECT pg_total_relation_size('{table.name}')"
                total += int(connection.exec_driver_sql(size).scalar_one())
            count = int(connection.execute(select(func.count()).select_from(Delivery)).scalar_one())
        return total / count

    def clear(self) -> None:
        """Delete all rows and keys."""
        self.redis.flushdb()
        tables = [table for table in Base.metadata.sorted_tables if table.name != "rq_webhooks_dispatcher"]
        with self.state.database.write() as connection:
            if not self.state.database.is_sqlite:
                # What is deleted stays until the next vacuum, and the next run would have to pass it.
                connection.exec_driver_sql(f"TRUNCATE {', '.join(table.name for table in tables)}")
                return
            for table in reversed(tables):
                connection.execute(table.delete())


class Servers:
    """The servers of one benchmark, started when first asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._postgres: PostgresHandle | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="rqw-bench-", dir=os.environ.get("BENCH_DIR")))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)

    @property
    def postgres(self) -> PostgresHandle:
        if self._postgres is None:
            self._postgres = self._stack.enter_context(postgres_server())
            # Tests do not wait for the disk; who is measured does.
            execute(
                self._postgres.url(),
                "ALTER SYSTEM RESET fsync",
                "ALTER SYSTEM RESET full_page_writes",
                "SELECT pg_reload_conf()",
            )
        return self._postgres

    def valkey(self) -> str:
        """Start a Valkey server and return its URL."""
        return self._stack.enter_context(valkey_server()).url

    def installation(self, kind: str = "sqlite", **settings: Any) -> Installation:
        """Give an installation with a Valkey server and a database of its own.

        :param kind: ``"sqlite"`` or ``"postgresql"``.
        """
        redis_url = self.valkey()
        if kind == "sqlite":
            file = self.folder / f"{uuid.uuid4().hex}.db"
            with closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # as docs/operations.rst advises
            url = f"sqlite:///{file}"
        else:
            url = self.postgres.new_database()
        installation = Installation(redis_url, url, **settings)
        self._stack.callback(installation.close)
        return installation


@contextmanager
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack)
