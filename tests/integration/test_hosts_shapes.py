"""Five hosts' shapes, each from nothing to a verified webhook by the documented steps alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from sqlalchemy.orm import close_all_sessions

from flask_rq_webhooks.queue import job_callbacks
from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import get_state
from tests.hosts.shapes import SHAPES, Shape
from tests.servers import Receiver, rq_worker

SECRET = "the client's own secret"


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest, sqlite_url: str, redis_url: str) -> Iterator[Shape]:
    make: Callable[[dict[str, Any]], Shape] = request.param
    settings = {
        "SECRET_KEY": "tests", "SQLALCHEMY_DATABASE_URI": sqlite_url, "REDIS_URL": redis_url,
        "RQ_WEBHOOKS_REDIS_URL": redis_url, "RQ_WEBHOOKS_ALLOW_HTTP": True,
    }  # fmt: skip
    app, call = make(settings)
    yield app, call
    job_callbacks.uninstrument()
    close_all_sessions()
    state = get_state(app)
    state.database.dispose()
    state.redis.close()
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()


def command(app: Flask, *arguments: str) -> None:
    result = app.test_cli_runner().invoke(args=["rq-webhooks", *arguments])
    assert result.exit_code == 0, result.output


def test_from_nothing_to_a_verified_webhook(shape: Shape, redis_url: str, receiver: Receiver) -> None:
    app, (path, body) = shape
    client = app.test_client()
    asked = {**body, "webhook_url": f"http://127.0.0.1:{receiver.port}/hook", "webhook_secret": SECRET}

    command(app, "init-db")
    answer = client.post(path, json=asked)
    plain = client.post(path, json=body)
    refused = client.post(path, json={**body, "webhook_url": "ftp://x"})
    with rq_worker(redis_url, burst=True) as worker:
        assert worker.wait(60) == 0, worker.output
    command(app, "reconcile")  # what a running dispatcher does every RECONCILE_INTERVAL
    command(app, "worker", "--burst")

    assert answer.status_code < 300, answer.text
    assert answer.headers["Webhook-Registered"] == "true"
    job_id = answer.headers["Webhook-Job-Id"]
    assert job_id in answer.text
    assert plain.status_code == answer.status_code
    assert "Webhook-Registered" not in plain.headers
    assert refused.status_code == 400
    assert [json.loads(received.body)["job_id"] for received in receiver.received] == [job_id]
    (received,) = receiver.received
    verified = verify(received.body, received.headers, SECRET)
    assert (verified.json["event"], verified.json["runid"]) == ("job.success", "basin-7")
    if "Success" in refused.get_json():
        assert refused.get_json()["Success"] is False  # the production API's own error shape
    if app.config.get("RQ_WEBHOOKS_BASE_TEMPLATE"):
        page = client.get("/webhooks/deliveries")
        assert page.status_code == 200
        assert "PORTAL" in page.text
        assert job_id in page.text


def test_deduplicated_job_is_reported_to_every_client(
    sqlite_url: str, redis_url: str, receiver: Receiver
) -> None:
    """Two clients of the BI tool submit the same query: one job, two webhooks."""
    settings = {
        "SECRET_KEY": "tests", "SQLALCHEMY_DATABASE_URI": sqlite_url, "REDIS_URL": redis_url,
        "RQ_WEBHOOKS_REDIS_URL": redis_url, "RQ_WEBHOOKS_ALLOW_HTTP": True,
    }  # fmt: skip
    app, (path, body) = SHAPES["BI job layer"](settings)
    command(app, "init-db")
    url = f"http://127.0.0.1:{receiver.port}"
    answers = [
        app.test_client().post(path, json={**body, "webhook_url": f"{url}/{client}"}) for client in ("a", "b")
    ]
    with rq_worker(redis_url, burst=True) as worker:
        assert worker.wait(60) == 0, worker.output
    command(app, "reconcile")  # what a running dispatcher does every RECONCILE_INTERVAL
    command(app, "worker", "--burst")
    state = get_state(app)
    state.database.dispose()
    state.redis.close()

    assert [answer.headers["Webhook-Registered"] for answer in answers] == ["true", "true"]
    assert len({answer.headers["Webhook-Job-Id"] for answer in answers}) == 1
    assert sorted(received.path for received in receiver.received) == ["/a", "/b"]
