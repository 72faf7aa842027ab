"""Both services in this process: databases in memory, a Redis in memory, jobs run when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fakeredis
import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue, SimpleWorker
from rq.timeouts import TimerDeathPenalty

from example_app import jobs
from flask_rq_webhooks.testing import InMemoryReceiver

TOKEN = "what operators know"
SHARED_SECRET = "what the analysis service and its clients share"


class InProcessWorker(SimpleWorker):
    """Runs jobs without a process of their own, and without signals, which belong to the test runner."""

    death_penalty_class = TimerDeathPenalty


@pytest.fixture(scope="session")
def redis_in_memory() -> Iterator[Redis]:
    """Stand in for the server behind ``jobs.connect``, for the app's queues and for its webhooks."""
    server = fakeredis.FakeServer()
    with pytest.MonkeyPatch.context() as patch, fakeredis.FakeRedis(server=server) as client:
        patch.setattr(jobs, "connect", lambda: fakeredis.FakeRedis(server=server))
        yield client


@pytest.fixture(scope="session")
def imported_app(redis_in_memory: Redis) -> Iterator[Flask]:
    """Give the app of the module, which reads its settings where it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXAMPLE_DATABASE_URI", "sqlite://")
        patch.setenv("ALLOW_HTTP", "1")
        from example_app.app import app, db
    with app.app_context():
        db.create_all()
    yield app
    with app.app_context():
        db.engine.dispose()
    dispose(app)


@pytest.fixture
def app(
    imported_app: Flask, redis_in_memory: Redis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Flask:
    """Give the watershed service with an empty Redis and an empty folder for runs."""
    redis_in_memory.flushdb()
    monkeypatch.setenv("EXAMPLE_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("EXAMPLE_TOKEN", TOKEN)
    return imported_app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def analysis(redis_in_memory: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """Give a new analysis service: a factory needs no more than the environment it reads."""
    redis_in_memory.flushdb()
    monkeypatch.setenv("ANALYSIS_DATABASE_URI", "sqlite://")
    monkeypatch.setenv("ANALYSIS_SIGNING_SECRET", SHARED_SECRET)
    from example_app.analysis import create_app

    made = create_app()
    yield made
    dispose(made)


@pytest.fixture
def work(redis_in_memory: Redis) -> Callable[[], None]:
    """Give a function that runs the jobs that wait, and those they enqueue."""

    def run() -> None:
        queue = Queue("default", connection=redis_in_memory)
        InProcessWorker([queue], connection=redis_in_memory).work(burst=True)

    return run


@pytest.fixture
def receiver() -> InMemoryReceiver:
    """Give a receiver for every URL, which accepts everything."""
    return InMemoryReceiver()


def dispose(app: Flask) -> None:
    """Close the database that webhooks have of their own."""
    app.extensions["rq_webhooks"].database.dispose()
