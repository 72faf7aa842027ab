"""What host apps write with flask_rq_webhooks.testing: synchronous queues, fakeredis, SQLite in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from rq.job import Job

from flask_rq_webhooks import Queue, RQWebhooks, SignatureError
from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.models import Attempt, Delivery, Event
from flask_rq_webhooks.testing import InMemoryReceiver, deliver_all
from tests.acceptance import tasks
from tests.pipeline import work

SECRET = "a secret"
FIELDS = {"webhook_url": "https://client.example/hook", "webhook_secret": SECRET}


def make_app(client: redis.Redis, *, is_async: bool = False, **config: Any) -> Flask:
    """Build a host app as its own tests do: one module-level client, everything in this process."""
    app = Flask("host")
    app.config.update(TESTING=True, SECRET_KEY="tests", SQLALCHEMY_DATABASE_URI="sqlite://", **config)
    db = SQLAlchemy(app)
    webhooks = RQWebhooks(app, db=db, redis=client)
    webhooks.authorize(lambda permission, **what: True)
    queue = Queue("default", connection=client, is_async=is_async)

    @app.post("/runs/<runid>/<name>")
    @webhooks.accepts_webhook
    def call(runid: str, name: str) -> Any:
        from flask import request

        job = queue.enqueue_call(getattr(tasks, name), tuple((request.get_json() or {}).get("args", ())))
        return {"job_id": job.id}

    return app


@pytest.fixture
def fake() -> Iterator[redis.Redis]:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    yield client
    client.close()


@pytest.fixture
def host(fake: redis.Redis) -> Iterator[Flask]:
    app = make_app(fake)
    yield app
    close(app)


def close(app: Flask) -> None:
    get_state(app).database.dispose()
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()


def submit(app: Flask, name: str, *args: Any, **fields: Any) -> str:
    response = app.test_client().post(f"/runs/basin-7/{name}", json={"args": args, **FIELDS, **fields})
    assert response.headers["Webhook-Registered"] == "true"
    return str(response.get_json()["job_id"])


def attempts(app: Flask, job_id: str) -> list[tuple[Any, ...]]:
    columns = (Attempt.number, Attempt.status_code, Attempt.error_code, Attempt.trigger)
    query = (
        sa.select(*columns)
        .join(Delivery, Delivery.id == Attempt.delivery_id)
        .join(Event, Event.id == Delivery.event_id)
        .where(Event.job_id == job_id)
        .order_by(Attempt.number)
    )
    with get_state(app).database.read() as connection:
        return [tuple(row) for row in connection.execute(query)]


def status(app: Flask, job_id: str) -> str:
    return str(app.test_client().get(f"/webhooks/jobs/{job_id}").get_json()["delivery_status"])


def test_synchronous_job_on_fakeredis_is_reported_and_logged(host: Flask) -> None:
    job_id = submit(host, "add", 1, 2)

    (webhook,) = deliver_all(host)

    assert webhook.url == FIELDS["webhook_url"]
    assert webhook.verify(SECRET).json == webhook.json
    assert webhook.json["event"] == "job.success"
    assert webhook.json["job_id"] == job_id
    assert webhook.json["runid"] == "basin-7"
    assert webhook.json["result"] == {"sum": 3}
    assert webhook.header("x-webhook-event") == "job.success"
    assert webhook.header("webhook-id") == webhook.json["id"]
    assert webhook.header("absent") is None
    assert status(host, job_id) == "succeeded"
    assert attempts(host, job_id) == [(1, 204, None, "scheduled")]
    assert deliver_all(host) == []
    with pytest.raises(SignatureError):
        webhook.verify("another secret")


def test_failing_job_and_one_more_receiver(host: Flask) -> None:
    job_id = submit(host, "fail", "no rain data")
    receiver = InMemoryReceiver()

    assert deliver_all(host, receiver) == receiver.received
    (webhook,) = receiver.received
    assert webhook.json["event"] == "job.failure"
    assert webhook.json["error"]["type"] == "ValueError"
    assert webhook.json["error"]["message"] == "no rain data"
    other = submit(host, "add", 1, 2)

    (second,) = deliver_all(host, receiver)
    assert second.json["job_id"] == other
    assert [received.json["job_id"] for received in receiver.received] == [job_id, other]


def test_retries_are_made_at_once_with_the_same_bytes(host: Flask) -> None:
    job_id = submit(host, "add", 1, 2)

    received = deliver_all(
        host, InMemoryReceiver(500, "timeout", (429, {"Retry-After": "3600"}, b"later"), 204)
    )

    assert len({webhook.body for webhook in received}) == 1
    assert [webhook.header("X-Webhook-Attempt") for webhook in received] == ["1", "2", "3", "4"]
    assert attempts(host, job_id) == [
        (1, 500, "http_5xx", "scheduled"),
        (2, None, "timeout", "scheduled"),
        (3, 429, "http_4xx", "scheduled"),
        (4, 204, None, "scheduled"),
    ]
    assert status(host, job_id) == "succeeded"


def test_without_retries_the_delivery_waits(host: Flask) -> None:
    job_id = submit(host, "add", 1, 2)

    assert len(deliver_all(host, InMemoryReceiver(503), retries=False)) == 1
    assert status(host, job_id) == "pending"
    assert len(deliver_all(host, InMemoryReceiver(503))) == 11
    assert status(host, job_id) == "exhausted"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(410, (1, 410, "http_4xx", "scheduled"), id="gone"),
        pytest.param(302, (1, 302, "redirect", "scheduled"), id="redirect"),
        pytest.param("blocked", (1, None, "blocked", "scheduled"), id="blocked"),
    ],
)
def test_answers_that_end_a_delivery(host: Flask, answer: Any, expected: tuple[Any, ...]) -> None:
    job_id = submit(host, "add", 1, 2)

    assert len(deliver_all(host, InMemoryReceiver(answer))) == 1
    assert attempts(host, job_id) == [expected]
    assert status(host, job_id) == "exhausted"


def test_function_that_answers(host: Flask) -> None:
    submit(host, "add", 1, 2)
    submit(host, "fail", "dry")

    received = deliver_all(
        host, InMemoryReceiver(lambda webhook: 204 if webhook.json["event"] == "job.success" else 410)
    )

    assert sorted(webhook.json["event"] for webhook in received) == ["job.failure", "job.success"]


def test_unknown_network_error_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'gremlins' is not a network error"):
        InMemoryReceiver(204, "gremlins")


def test_jobs_worked_off_by_a_simple_worker(fake: redis.Redis) -> None:
    app = make_app(fake, is_async=True)
    good = submit(app, "add", 1, 2)
    canceled = submit(app, "add", 3, 4)
    Job.fetch(canceled, connection=fake).cancel()
    assert deliver_all(app) != []  # the canceled one, which no callback reports
    work(fake)

    (webhook,) = deliver_all(app)

    assert webhook.json["job_id"] == good
    assert status(app, canceled) == "succeeded"
    close(app)


def test_deleted_job_is_lost_at_the_second_look(fake: redis.Redis) -> None:
    app = make_app(fake, is_async=True)
    job_id = submit(app, "add", 1, 2)
    Job.fetch(job_id, connection=fake).delete()

    reported: list[Any] = []
    for _look in range(3):
        reported += deliver_all(app)

    assert [webhook.json["event"] for webhook in reported] == ["job.lost"]
    close(app)


def test_each_app_has_a_database_of_its_own_in_memory(fake: redis.Redis) -> None:
    first, second = make_app(fake), make_app(fake)
    submit(first, "add", 1, 2)

    assert deliver_all(second) == []
    assert len(deliver_all(first)) == 1
    close(first)
    close(second)


def test_what_cannot_be_opened_does_not_hold_the_test_up(
    host: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flask_rq_webhooks.storage.crypto import Cipher

    job_id = submit(host, "add", 1, 2)
    get_state(host)._built["cipher"] = Cipher(["another key"])

    assert deliver_all(host) == []
    assert status(host, job_id) == "pending"


def test_notices_and_signals_come_as_from_a_dispatcher(host: Flask) -> None:
    from flask_rq_webhooks import signals

    reported: list[dict[str, Any]] = []

    def note(sender: Any, **what: Any) -> None:
        reported.append(what)

    job_id = submit(host, "add", 1, 2)
    with signals.delivery_succeeded.connected_to(note):
        deliver_all(host)

    assert [what["job_id"] for what in reported] == [job_id]


@pytest.fixture
def any_database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.create_tables()
    yield database
    database.dispose()


def test_files_and_servers_work_as_well(redis_client: redis.Redis, any_database: Database) -> None:
    app = make_app(
        redis_client, RQ_WEBHOOKS_DATABASE_URI=any_database.url.render_as_string(hide_password=False)
    )
    job_id = submit(app, "add", 1, 2)

    (webhook,) = deliver_all(app, InMemoryReceiver(500, 200))[1:]

    assert webhook.json["job_id"] == job_id
    assert attempts(app, job_id) == [(1, 500, "http_5xx", "scheduled"), (2, 200, None, "scheduled")]
    close(app)
