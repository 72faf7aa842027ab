"""A whole stack on real servers: host app, stock workers, dispatcher, receiver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from flask import Flask
from flask.testing import FlaskClient

from flask_rq_webhooks.state import get_state
from tests.acceptance.host_app import create_app
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

    def status(self, job_id: str) -> Any:
        return self.client().get(f"/webhooks/jobs/{job_id}").get_json()


@pytest.fixture
def stack(redis_url: str, sqlite_url: str, redis_client: redis.Redis) -> Iterator[Stack]:
    app = create_app({"SQLALCHEMY_DATABASE_URI": sqlite_url, "RQ_WEBHOOKS_REDIS_URL": redis_url})
    state = get_state(app)
    state.database.create_tables()
    with ExitStack() as cleanup, Receiver() as receiver:
        yield Stack(app, redis_url, sqlite_url, redis_client, receiver, cleanup)
    state.database.dispose()
    state.redis.close()
    with app.app_context():
        from tests.acceptance.host_app import db

        for engine in db.engines.values():
            engine.dispose()
