"""``RQ_WEBHOOKS_ATTACH="all"``: standing endpoints get every ending of every job the app enqueues."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from redis import Redis
from rq.command import send_stop_job_command
from rq.job import Job

from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher, reconcile_now
from flask_rq_webhooks.queue.job_callbacks import set_default_attachment
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage.models import Event, Watch
from tests.pipeline import add_endpoint, rows
from tests.servers import Receiver, rq_worker, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def host(database_url: str, redis_url: str, receiver: Receiver) -> Iterator[Flask]:
    app = Flask("host")
    app.config.update(
        SECRET_KEY="tests", RQ_WEBHOOKS_DATABASE_URI=database_url, RQ_WEBHOOKS_REDIS_URL=redis_url,
        RQ_WEBHOOKS_ATTACH="all", RQ_WEBHOOKS_ALLOW_HTTP=True,
    )  # fmt: skip
    RQWebhooks(app)
    state = get_state(app)
    state.database.create_tables()
    add_endpoint(state, receiver.url, kind="standing")

    @app.post("/enqueue/<function>")
    def enqueue(function: str) -> str:
        return str(Queue(connection=state.redis).enqueue(f"tests.jobs.{function}", 3).id)

    yield app
    set_default_attachment(None)
    state.database.dispose()
    state.redis.close()


def run_worker(redis: Redis) -> None:
    url = "redis://{host}:{port}/{db}".format(**redis.connection_pool.connection_kwargs)
    command = [sys.executable, "-m", "rq.cli", "worker", "--burst", "--quiet", "--url", url, "default"]
    subprocess.run(command, timeout=60, check=True)


def cancel(state: State, job_id: str) -> None:
    Job.fetch(job_id, state.redis).cancel()


def delete(state: State, job_id: str) -> None:
    Job.fetch(job_id, state.redis).delete()


def lose(state: State, job_id: str) -> None:
    state.redis.flushdb()


def work(state: State, _job_id: str) -> None:
    run_worker(state.redis)


def stop(state: State, job_id: str) -> None:
    """Stop a running job whose record has lost its callbacks."""
    url = "redis://{host}:{port}/{db}".format(**state.redis.connection_pool.connection_kwargs)
    with rq_worker(url) as worker:
        key = f"rq:job:{job_id}"
        wait_until(lambda: state.redis.hget(key, "status") == b"started", what=lambda: worker.output)
        state.redis.hdel(key, "success_callback_name", "failure_callback_name", "stopped_callback_name")
        send_stop_job_command(state.redis, job_id)
        wait_until(lambda: state.redis.hget(key, "status") == b"stopped", what=lambda: worker.output)


ENDINGS: list[tuple[str, Callable[[State, str], None], str]] = [
    ("same", work, "job.success"),
    ("fail", work, "job.failure"),
    ("exit_at_once", work, "job.failure"),
    ("kill_work_horse", work, "job.failure"),
    ("sleep", stop, "job.stopped"),
    ("same", cancel, "job.canceled"),
    ("same", delete, "job.lost"),
    ("same", lose, "job.lost"),
]


@pytest.mark.parametrize(
    ("function", "end", "event"), ENDINGS,
    ids=["success", "failure", "os._exit", "SIGKILL", "stopped", "canceled", "deleted", "lost"],
)  # fmt: skip
def test_each_ending_is_reported_once(
    host: Flask, receiver: Receiver, function: str, end: Callable[[State, str], None], event: str
) -> None:
    state = get_state(host)
    job_id = host.test_client().post(f"/enqueue/{function}").text
    assert rows(state, Watch) == []  # no SQL in the request
    Dispatcher(state).run(burst=True)
    assert [(row.job_id, row.status, row.endpoint_id) for row in rows(state, Watch)] == [
        (job_id, "open", None)
    ]
    end(state, job_id)
    for _ in range(3):
        Dispatcher(state).run(burst=True)
        reconcile_now(state)
    Dispatcher(state).run(burst=True)
    assert [(one.json["event"], one.json["job_id"]) for one in receiver.received] == [(event, job_id)]
    assert [row.type for row in rows(state, Event)] == [event]


def test_job_that_ends_before_it_is_watched_is_reported_once(host: Flask, receiver: Receiver) -> None:
    state = get_state(host)
    host.test_client().post("/enqueue/same")
    run_worker(state.redis)
    for _ in range(2):
        Dispatcher(state).run(burst=True)
        reconcile_now(state)
    Dispatcher(state).run(burst=True)
    assert [one.json["event"] for one in receiver.received] == ["job.success"]
    assert [row.status for row in rows(state, Watch)] == ["settled"]


def test_outside_of_a_request(host: Flask, receiver: Receiver) -> None:
    state = get_state(host)
    with host.app_context():
        job = Queue(connection=state.redis).enqueue("tests.jobs.same", 3)
        Dispatcher(state).run(burst=True)
        assert [row.status for row in rows(state, Watch)] == ["reserved"]
    Dispatcher(state).run(burst=True)
    assert [row.status for row in rows(state, Watch)] == ["open"]
    job.cancel()
    for _ in range(2):
        reconcile_now(state)
        Dispatcher(state).run(burst=True)
    assert [one.json["event"] for one in receiver.received] == ["job.canceled"]


def test_redis_that_fails_after_the_view_fails_no_request(host: Flask, monkeypatch: Any) -> None:
    state = get_state(host)

    def fail(_entry: object) -> None:
        raise ConnectionError

    from redis.exceptions import ConnectionError

    monkeypatch.setattr(state.outbox, "append", fail)
    assert host.test_client().post("/enqueue/same").status_code == 200
