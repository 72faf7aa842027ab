"""The explicit helper, and ATTACH="all": jobs with callbacks where no decorator is involved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import rq
import sqlalchemy as sa
from flask import Flask
from redis import Redis

from flask_rq_webhooks import InvalidWebhookError, Queue, RQWebhooks
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage.models import Endpoint, Watch
from tests.acceptance import tasks

URL = "https://hooks.example.com/in"
ASKED = {"webhook_url": URL, "webhook_secret": "s3cret", "other": 1}


@pytest.fixture
def make_state(redis_url: str, sqlite_url: str) -> Iterator[Any]:
    states: list[State] = []

    def make(**config: Any) -> tuple[RQWebhooks, State]:
        host = Flask("host")
        host.config.update(
            SECRET_KEY="tests", RQ_WEBHOOKS_DATABASE_URI=sqlite_url, RQ_WEBHOOKS_REDIS_URL=redis_url, **config
        )
        webhooks = RQWebhooks(host)
        state = get_state(host)
        state.database.create_tables()
        states.append(state)
        return webhooks, state

    yield make
    from flask_rq_webhooks.queue.job_callbacks import set_default_attachment

    set_default_attachment(None)
    for state in states:
        state.database.dispose()
        state.redis.close()


def success_callback(redis: Redis, job_id: str) -> str:
    return redis.hget(f"rq:job:{job_id}", "success_callback_name").decode()


def test_fields_come_from_the_payload(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    queue = rq.Queue(connection=redis_client)

    with state.app.app_context():
        job = webhooks.enqueue_with_webhook(
            queue, tasks.add, (1, 2), timeout=30, runid="basin", payload=ASKED, meta={"kept": 1}, job_id="own"
        )

    assert job.id == "own"
    assert job.timeout == 30
    assert job.meta == {"runid": "basin", "kept": 1}
    with state.database.read() as connection:
        endpoint = connection.execute(sa.select(Endpoint.id, Endpoint.url, Endpoint.runid)).one()
        watches = connection.execute(sa.select(Watch.job_id, Watch.status)).all()
    assert (endpoint.url, endpoint.runid) == (URL, "basin")
    assert ("own", "open") in [tuple(watch) for watch in watches]
    assert success_callback(redis_client, "own") == f"flask_rq_webhooks.callbacks.success.{endpoint.id}"


def test_a_payload_without_url_enqueues_as_if_nobody_had_asked(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()

    with state.app.app_context():
        job = webhooks.enqueue_with_webhook(rq.Queue(connection=redis_client), tasks.add, (1, 2), payload={})

    assert success_callback(redis_client, job.id) == ""
    with state.database.read() as connection:
        assert connection.execute(sa.select(Endpoint.id)).all() == []


def test_bad_fields_enqueue_nothing(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    queue = rq.Queue(connection=redis_client)

    with state.app.app_context(), pytest.raises(InvalidWebhookError) as caught:
        webhooks.enqueue_with_webhook(queue, tasks.add, (1, 2), payload={"webhook_url": "http://10.0.0.1/"})

    assert list(caught.value.details) == ["webhook_url"]
    assert queue.job_ids == []


def test_bad_fields_in_a_view_answer_400(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    def view() -> Any:
        webhooks.enqueue_with_webhook(
            rq.Queue(connection=redis_client), tasks.add, (1, 2), payload={"webhook_url": "nonsense"}
        )
        return {}

    response = state.app.test_client().post("/job")

    assert response.status_code == 400
    assert response.get_json()["error"]["code"] == "invalid_webhook"


def test_in_a_decorated_view_the_requests_fields_count_for_a_plain_queue(
    make_state: Any, redis_client: Redis
) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook
    def view() -> Any:
        job = webhooks.enqueue_with_webhook(rq.Queue(connection=redis_client), tasks.add, (1, 2))
        return {"job_id": job.id}

    response = state.app.test_client().post("/job", json=ASKED)

    assert response.headers["Webhook-Registered"] == "true"
    name = success_callback(redis_client, response.get_json()["job_id"])
    assert name.startswith("flask_rq_webhooks.callbacks.success.ep")


def test_disabled_enqueues_without_webhook(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state(RQ_WEBHOOKS_ENABLED=False)

    with state.app.app_context():
        job = webhooks.enqueue_with_webhook(
            rq.Queue(connection=redis_client), tasks.add, (1, 2), payload=ASKED
        )

    assert success_callback(redis_client, job.id) == ""


def test_attach_all_gives_every_job_of_the_app_callbacks(make_state: Any, redis_client: Redis) -> None:
    _webhooks, state = make_state(RQ_WEBHOOKS_ATTACH="all")
    queue = Queue(connection=redis_client)

    with state.app.app_context():
        inside = queue.enqueue(tasks.add, 1, 2)
    outside = queue.enqueue(tasks.add, 1, 2)

    assert success_callback(redis_client, inside.id) == (
        f"flask_rq_webhooks.callbacks.success.ep{state.namespace}_all"
    )
    assert success_callback(redis_client, outside.id) == ""


def test_watch_promises_to_report_a_job_made_elsewhere(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    job = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)

    with state.app.app_context():
        endpoint_id = webhooks.watch(job, URL, secret="s3cret", runid="basin", events=["job.failure"])

    with state.database.read() as connection:
        watch = connection.execute(sa.select(Watch.endpoint_id, Watch.job_id, Watch.status)).one()
        endpoint = connection.execute(sa.select(Endpoint.url, Endpoint.runid, Endpoint.events)).one()
    assert tuple(watch) == (endpoint_id, job.id, "open")
    assert tuple(endpoint) == (URL, "basin", '["job.failure"]')


@pytest.mark.parametrize("fields", [{"url": "http://10.0.0.1/"}, {"url": URL, "colour": "blue"}])
def test_watch_refuses_what_it_cannot_promise(make_state: Any, redis_client: Redis, fields: Any) -> None:
    webhooks, state = make_state()
    job = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)

    with state.app.app_context(), pytest.raises(InvalidWebhookError):
        webhooks.watch(job, **fields)

    with state.database.read() as connection:
        assert connection.execute(sa.select(Watch.id)).all() == []
