"""The inner half of the pipeline for tests: state without the extension, jobs whose callbacks run at once."""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import rq
from flask import Flask
from sqlalchemy import select
from sqlalchemy.engine import Row

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.protocol.payloads import FORMATS
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import NewEndpoint, confirm, register
from flask_rq_webhooks.storage.models import Attempt, Base, Delivery, Event

SECRET = "a secret of the client"


class Hooks:
    """What a host registered; tests set the attributes."""

    def __init__(self) -> None:
        self.authorize_function: Any = None
        self.scrub_function: Any = None
        self.error_envelope_function: Any = None
        self.tenant_function: Any = None
        self.formats: dict[str, Any] = dict(FORMATS)


@contextmanager
def open_state(database_url: str, redis_url: str, **settings: Any) -> Iterator[State]:
    """Give the state of an app on empty tables, and close what it opened."""
    app = Flask("host")
    app.config.update(
        {
            "SECRET_KEY": "a key for tests only",
            "RQ_WEBHOOKS_DATABASE_URI": database_url,
            "RQ_WEBHOOKS_REDIS_URL": redis_url,
            "RQ_WEBHOOKS_ALLOW_HTTP": True,
            **{f"RQ_WEBHOOKS_{name.upper()}": value for name, value in settings.items()},
        }
    )
    state = State(app, load_settings(app.config, {}), Hooks())
    app.extensions["rq_webhooks"] = state
    state.database.create_tables()
    try:
        yield state
    finally:
        state.database.dispose()
        state.redis.close()


@contextmanager
def running_dispatcher(state: State, **options: Any) -> Iterator[Dispatcher]:
    """Run a dispatcher in a thread, and stop it gracefully."""
    dispatcher = Dispatcher(state, **options)
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    try:
        yield dispatcher
    finally:
        dispatcher.stop()
        thread.join(30)
    assert not thread.is_alive()


def add_endpoint(state: State, url: str, *, reserved_job_id: str | None = None, **options: Any) -> str:
    """Register a job-bound endpoint and return its id."""
    checked = state.url_policy.check_url(url)
    endpoint = NewEndpoint(
        url=checked.url, host=checked.host_key, **{"secret": SECRET, "format": "job", **options}
    )
    return register(
        state.database, state.cipher, endpoint, namespace=state.namespace, reserved_job_id=reserved_job_id
    )


def callbacks(endpoint_id: str) -> dict[str, str]:
    """Return the arguments that make RQ report a job to an endpoint."""
    return {
        f"on_{kind}": f"flask_rq_webhooks.callbacks.{kind}.{endpoint_id}"
        for kind in ("success", "failure", "stopped")
    }


def enqueue(
    state: State, endpoint_id: str, function: str, *args: Any, is_async: bool = False, **options: Any
) -> str:
    """Enqueue a job that reports to an endpoint, as a view would; return its id.

    :param is_async: ``False`` runs it here and now.
    """
    job_id = str(uuid.uuid4())
    queue = rq.Queue(connection=state.redis, is_async=is_async)
    ours = {name: rq.Callback(path) for name, path in callbacks(endpoint_id).items()}
    job = queue.create_job(function, args=args, job_id=job_id, **ours, **options)
    queue.enqueue_job(job)
    confirm(state.database, endpoint_id, existing=[job_id], unseen=[], reserved_job_id=None)
    return job_id


def rows(state: State, table: type[Base]) -> list[Row[Any]]:
    """Return every row of a table in the order of ids."""
    with state.database.read() as connection:
        return list(connection.execute(select(table.__table__).order_by(table.__table__.c.id)))


def events(state: State) -> list[Row[Any]]:
    return rows(state, Event)


def deliveries(state: State) -> list[Row[Any]]:
    return rows(state, Delivery)


def attempts(state: State) -> list[Row[Any]]:
    return rows(state, Attempt)


class InProcessWorker(rq.SimpleWorker):
    """Take no commands: RQ waits up to a second for the thread that does."""

    def subscribe(self, *_args: Any, **_kwargs: Any) -> None:
        """Start no thread."""


def work(redis_client: redis.Redis, jobs: int | None = None, *, queue: str | rq.Queue = "default") -> None:
    """Run what is queued, in this process, as a stock worker would.

    :param jobs: at most so many.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # RQ 1.16 calls what it has itself deprecated
        InProcessWorker([queue], connection=redis_client).work(
            burst=True, max_jobs=jobs, logging_level="CRITICAL"
        )
