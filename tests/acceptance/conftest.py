"""A whole stack on real servers: host app, stock workers, dispatcher, receiver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient

from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.models import Base
from tests.acceptance.host_app import create_app, db
from tests.servers import Process, Receiver, rq_worker

FLASK = ("python", "-m", "flask", "--app", "tests.acceptance.host_app")
SECRET = "a secret between the client and the host"


@dataclass
class Stack:
    """The parts of one running installation; workers and dispatchers are started on demand."""

    app: Flask
    redis_url: str
    database_url: str
    redis: redis.Redis
    receiver: Receiver
    cleanup: ExitStack = field(repr=False)
    processes: list[Process] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"TEST_DATABASE_URL": self.database_url, "TEST_REDIS_URL": self.redis_url}

    def _start(self, process: Process) -> Process:
        self.cleanup.enter_context(process)
        self.processes.append(process)
        return process

    def start_worker(self, **options: Any) -> Process:
        return self._start(rq_worker(self.redis_url, env=self.environment, **options))

    def start_dispatcher(self, *options: str) -> Process:
        process = self._start(Process(*FLASK, "rq-webhooks", "worker", *options, env=self.environment))
        return process

    def client(self) -> FlaskClient:
        return self.app.test_client()

    def submit(self, path: str, body: dict[str, Any] | None = None, **fields: Any) -> Any:
        """POST a job with a webhook to our receiver; return the response."""
        fields = {"webhook_url": self.receiver.url, "webhook_secret": SECRET, **fields}
        return self.client().post(path, json={**(body or {}), **fields})

    def call(self, name: str, *args: Any, webhook: dict[str, Any] | None = None, **options: Any) -> str:
        """Enqueue a task of ``tasks`` through the host app; return the job id."""
        response = self.submit(f"/call/{name}", {"args": args, **options}, **(webhook or {}))
        assert response.status_code == 200, response.text
        assert response.headers["Webhook-Registered"] == "true"
        return str(response.get_json()["job_id"])

    def stored(self) -> bytes:
        """Return everything in our tables, as text."""
        with get_state(self.app).database.read() as connection:
            return "\n".join(
                repr(tuple(row))
                for table in Base.metadata.sorted_tables
                for row in connection.execute(sa.text(f"SELECT * FROM {table.name}"))
            ).encode()

    def status(self, job_id: str) -> Any:
        return self.client().get(f"/webhooks/jobs/{job_id}").get_json()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a module's tests once per database of its ``DATABASES``, the slow ones on the first only.

    SQLite alone where a module does not say. ``RQ_WEBHOOKS_TEST_DATABASES=sqlite,postgresql`` runs all of
    them on all of these.
    """
    by_itself = any(
        "stack_database_url" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "stack_database_url" not in metafunc.fixturenames or by_itself:
        return
    chosen = os.environ.get("RQ_WEBHOOKS_TEST_DATABASES")
    kinds = tuple(getattr(metafunc.module, "DATABASES", ("sqlite",)))
    if chosen:
        kinds = tuple(chosen.split(","))
    elif metafunc.definition.get_closest_marker("slow"):
        kinds = kinds[:1]
    metafunc.parametrize("stack_database_url", kinds, indirect=True)


@pytest.fixture
def stack_database_url(request: pytest.FixtureRequest) -> str:
    """Give the URL of an empty database of the kind asked for."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    return str(request.getfixturevalue("postgres").new_database())


@pytest.fixture
def stack(redis_url: str, stack_database_url: str, redis_client: redis.Redis) -> Iterator[Stack]:
    with running_stack(redis_url, stack_database_url, redis_client) as running:
        yield running


@contextmanager
def running_stack(redis_url: str, database_url: str, client: redis.Redis, **config: Any) -> Iterator[Stack]:
    """Give a stack on servers that run already; its processes end with it."""
    app = create_app({"SQLALCHEMY_DATABASE_URI": database_url, "RQ_WEBHOOKS_REDIS_URL": redis_url, **config})
    state = get_state(app)
    state.database.create_tables()
    with ExitStack() as cleanup, Receiver() as receiver:
        yield Stack(app, redis_url, database_url, client, receiver, cleanup)
    state.database.dispose()
    state.redis.close()
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()
