"""The tests that the two source designs describe, with ``responses`` and ``pytest-flask``.

Every request is one of the real dispatcher's transport: ``responses`` stands where the network would be. The
examples of ``docs/testing.rst`` run here, too.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis
import requests
import responses
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from flask_sqlalchemy import SQLAlchemy
from limits.strategies import FixedWindowRateLimiter
from responses import matchers
from rq.timeouts import TimerDeathPenalty

from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.models import Attempt, Delivery, Endpoint
from tests.pipeline import InProcessWorker
from tests.servers import ROOT

URL = "https://client.example/hook"
SECRET = "s3cret"
FIELDS = {"webhook_url": URL, "webhook_secret": SECRET}


def add(first: int, second: int) -> int:
    return first + second


def fail(message: str) -> None:
    raise ValueError(message)


class TimedWorker(InProcessWorker):
    """Run jobs without signals, which belong to the test runner."""

    death_penalty_class = TimerDeathPenalty


@pytest.fixture(autouse=True)
def _push_request_context() -> None:
    """Override pytest-flask's: a view must find its own request's context and no other."""


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of the app; a test parametrizes this fixture to change them."""
    return {}


@pytest.fixture
def fake_redis() -> Iterator[redis.Redis]:
    with fakeredis.FakeRedis(server=fakeredis.FakeServer()) as client:
        yield client


@pytest.fixture
def app(fake_redis: redis.Redis, settings: dict[str, Any]) -> Iterator[Flask]:
    """Give a host app whose jobs run at once; pytest-flask makes ``client`` of it."""
    app = Flask("host")
    app.config.update(TESTING=True, SECRET_KEY="tests", SQLALCHEMY_DATABASE_URI="sqlite://")
    app.config.update({f"RQ_WEBHOOKS_{name}": value for name, value in settings.items()})
    db = SQLAlchemy(app)
    webhooks = RQWebhooks(app, db=db, redis=fake_redis)
    webhooks.authorize(lambda permission, **what: True)
    at_once = Queue("default", connection=fake_redis, is_async=False)
    later = Queue("default", connection=fake_redis)

    @app.post("/add")
    @webhooks.accepts_webhook
    def start_add() -> Any:
        from flask import request

        values = request.get_json()
        queue = later if values.get("later") else at_once
        return {"job_id": queue.enqueue(add, values["a"], values["b"]).id}

    @app.post("/fail")
    @webhooks.accepts_webhook
    def start_fail() -> Any:
        return {"job_id": at_once.enqueue(fail, "no outlet found").id}

    yield app
    get_state(app).database.dispose()
    with app.app_context():
        db.engine.dispose()


def submit(client: FlaskClient, path: str = "/add", **fields: Any) -> str:
    response = client.post(path, json={"a": 2, "b": 3, **FIELDS, **fields})
    assert response.status_code == 200, response.json
    assert response.headers["Webhook-Registered"] == "true"
    return str(response.json["job_id"])


def deliver(app: Flask) -> None:
    """Run the dispatcher's process until nothing is due, in this one."""
    done = app.test_cli_runner().invoke(args=["rq-webhooks", "worker", "--burst"])
    assert done.exit_code == 0, done.output


def attempts(app: Flask) -> list[tuple[int, int | None, str | None]]:
    query = sa.select(Attempt.number, Attempt.status_code, Attempt.error_code).order_by(Attempt.number)
    with get_state(app).database.read() as connection:
        return [tuple(row) for row in connection.execute(query)]


def delivery_status(client: FlaskClient, job_id: str) -> str:
    return str(client.get(f"/webhooks/jobs/{job_id}").json["delivery_status"])


@responses.activate
def test_payload_and_signature_on_success(app: Flask, client: FlaskClient) -> None:
    responses.post(
        URL,
        status=204,
        match=[
            matchers.header_matcher({"Content-Type": "application/json", "X-Webhook-Event": "job.success"}),
            matchers.json_params_matcher({"event": "job.success", "result": 5}, strict_match=False),
        ],
    )
    job_id = submit(client)
    deliver(app)
    (call,) = responses.calls
    assert json.loads(call.request.body)["job_id"] == job_id
    assert verify(call.request.body, call.request.headers, SECRET).scheme == "v1"
    assert call.response.status_code == 204
    assert attempts(app) == [(1, 204, None)]
    assert delivery_status(client, job_id) == "succeeded"


@responses.activate
@pytest.mark.parametrize("settings", [{"FORMAT": "task"}])
def test_payload_of_the_task_format_on_failure(app: Flask, client: FlaskClient) -> None:
    responses.post(URL, status=200)
    job_id = submit(client, "/fail")
    deliver(app)
    body = responses.calls[0].request.body
    payload = json.loads(body)
    assert payload["event_type"] == "task.failed"
    assert payload["task"] == {"id": job_id, "name": "fail", "status": "FAILURE"}
    assert "no outlet found" in payload["error"]
    assert body == json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()


@responses.activate
@pytest.mark.parametrize("settings", [{"RETRY_SCHEDULE": [0.01, 0.01]}])
def test_three_attempts_on_a_500(app: Flask, client: FlaskClient) -> None:
    responses.post(URL, status=500, body="out of order")
    job_id = submit(client)
    deadline = time.monotonic() + 30
    while delivery_status(client, job_id) != "exhausted":
        assert time.monotonic() < deadline
        deliver(app)
    calls = list(responses.calls)
    assert [call.request.headers["X-Webhook-Attempt"] for call in calls] == ["1", "2", "3"]
    assert len({call.request.body for call in calls}) == 1
    assert len({call.request.headers["webhook-id"] for call in calls}) == 1
    assert attempts(app) == [(1, 500, "http_5xx"), (2, 500, "http_5xx"), (3, 500, "http_5xx")]
    with get_state(app).database.read() as connection:
        assert connection.scalar(sa.select(Attempt.response_body).limit(1)) == b"out of order"


@responses.activate
def test_the_value_of_the_signature(app: Flask, client: FlaskClient) -> None:
    responses.post(URL)
    submit(client)
    deliver(app)
    request = responses.calls[0].request
    expected = hmac.new(SECRET.encode(), request.body, hashlib.sha256).hexdigest()
    assert request.headers["X-Webhook-Signature"] == f"sha256={expected}"
    assert request.headers["x-webhook-signature"] == f"sha256={expected}", "names in any case"


@responses.activate
@pytest.mark.parametrize("settings", [{"ALLOWED_DOMAINS": ["client.example"]}])
def test_the_allow_list_when_asked_and_again_when_sent(
    app: Flask, client: FlaskClient, fake_redis: redis.Redis
) -> None:
    responses.post(URL)
    refused = client.post("/add", json={"a": 1, "b": 2, "webhook_url": "https://other.example/hook"})
    assert refused.status_code == 400
    assert "webhook_url" in refused.json["error"]["details"]
    assert fake_redis.keys("rq:job:*") == []
    job_id = submit(client)
    with get_state(app).database.write() as connection:  # as if the domain had been allowed before
        connection.execute(sa.update(Endpoint).values(url="https://other.example/hook"))
    deliver(app)
    assert len(responses.calls) == 0
    assert attempts(app) == [(1, None, "blocked")]
    assert delivery_status(client, job_id) == "exhausted"


@responses.activate
@pytest.mark.parametrize("settings", [{"RATE_LIMIT_PER_MINUTE": 5}])
def test_the_rate_limit_fails_open(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(*_args: object, **_options: object) -> bool:
        raise redis.ConnectionError("connection refused")

    monkeypatch.setattr(FixedWindowRateLimiter, "hit", down)
    responses.post(URL)
    job_id = submit(client)
    deliver(app)
    assert len(responses.calls) == 1
    assert "rate limit cannot be counted" in caplog.text
    assert delivery_status(client, job_id) == "succeeded"


@responses.activate
def test_the_worker_triggers_and_the_dispatcher_sends(
    app: Flask, client: FlaskClient, fake_redis: redis.Redis
) -> None:
    responses.post(URL)
    job_id = submit(client, later=True)
    deliver(app)
    assert len(responses.calls) == 0, "nothing has ended"
    assert delivery_status(client, job_id) == "waiting"
    TimedWorker([Queue("default", connection=fake_redis)], connection=fake_redis).work(burst=True)
    assert len(responses.calls) == 0, "a worker sends nothing itself"
    deliver(app)
    assert json.loads(responses.calls[0].request.body)["result"] == 5


@responses.activate
def test_every_delivery_of_a_dispatchers_transport_is_seen(app: Flask, client: FlaskClient) -> None:
    responses.post(re.compile(r"https://client\d\.example/.*"), status=202)
    for number in range(4):
        submit(client, webhook_url=f"https://client{number}.example/hook")
    Dispatcher(get_state(app)).run(burst=True)
    hosts = sorted(call.request.url for call in responses.calls)
    assert hosts == [f"https://client{number}.example/hook" for number in range(4)]
    assert attempts(app) == [(1, 202, None)] * 4


@responses.activate
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (requests.Timeout("slow"), "timeout"),
        (requests.exceptions.SSLError("certificate"), "tls"),
        (requests.ConnectionError("refused"), "connect"),
        (None, "connect"),
    ],
    ids=["timeout", "tls", "connect", "unregistered"],
)
def test_what_responses_raises_is_a_failed_attempt(
    app: Flask, client: FlaskClient, error: Exception | None, code: str
) -> None:
    if error is not None:
        responses.post(URL, body=error)
    submit(client)
    deliver(app)
    assert attempts(app) == [(1, None, code)]
    with get_state(app).database.read() as connection:
        assert connection.scalar(sa.select(Delivery.status)) == "pending"


@responses.activate
def test_a_redirect_is_not_followed_and_long_answers_are_cut(app: Flask, client: FlaskClient) -> None:
    responses.post(URL, status=302, body="elsewhere", headers={"Location": "https://other.example/?secret=1"})
    responses.post("https://long.example/", body=b"x" * 50_000, headers={"X-Kept": "no", "Server": "mock"})
    submit(client)
    submit(client, webhook_url="https://long.example/")
    deliver(app)
    assert len(responses.calls) == 2
    with get_state(app).database.read() as connection:
        rows = {
            row.status_code: row
            for row in connection.execute(
                sa.select(
                    Attempt.status_code, Attempt.error_code, Attempt.response_headers, Attempt.response_body
                )
            )
        }
    assert rows[302].error_code == "redirect"
    assert json.loads(rows[302].response_headers)["location"] == "https://other.example/"
    assert rows[302].response_body == b""
    assert len(rows[200].response_body) == 16 * 1024
    kept = json.loads(rows[200].response_headers)
    assert kept["server"] == "mock"
    assert "x-kept" not in kept


@responses.activate
@pytest.mark.parametrize("settings", [{"RETRY_SCHEDULE": [0.01] * 8}])
@pytest.mark.parametrize(
    ("status", "format", "made"),
    [
        (401, "job", 5), (403, "job", 5), (404, "job", 5), (400, "job", 1), (422, "job", 1), (429, "job", 9),
        (404, "task", 1), (429, "task", 1), (503, "task", 9),
    ],
)  # fmt: skip
def test_attempts_by_status_and_format(
    app: Flask, client: FlaskClient, status: int, format: str, made: int
) -> None:
    responses.post(URL, status=status)
    job_id = submit(client, webhook_format=format)
    deadline = time.monotonic() + 60
    while delivery_status(client, job_id) != "exhausted":
        assert time.monotonic() < deadline
        deliver(app)
    assert len(responses.calls) == made


@responses.activate
def test_a_client_may_answer_404_until_it_knows_the_job(app: Flask, client: FlaskClient) -> None:
    responses.post(URL, status=404)
    responses.post(URL, status=204)
    job_id = submit(client)
    deadline = time.monotonic() + 30
    while delivery_status(client, job_id) == "pending" or len(responses.calls) < 2:
        assert time.monotonic() < deadline
        deliver(app)
    assert delivery_status(client, job_id) == "succeeded"


@responses.activate
def test_every_request_has_an_accept_header(app: Flask, client: FlaskClient) -> None:
    responses.post(URL, match=[matchers.header_matcher({"Accept": "*/*"})])
    responses.post(URL, match=[matchers.header_matcher({"Accept": "application/json"})])
    submit(client)
    submit(client, webhook_headers={"Accept": "application/json"})
    deliver(app)
    assert attempts(app) == [(1, 200, None)] * 2


def documented_tests() -> dict[str, Any]:
    """Return the test functions of ``docs/testing.rst``."""
    page = (ROOT / "docs" / "testing.rst").read_text()
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    functions: dict[str, Any] = {}
    for block in blocks:
        namespace: dict[str, Any] = {}
        exec(inspect.cleandoc("\n" + block), namespace)  # noqa: S102
        functions |= {name: item for name, item in namespace.items() if name.startswith("test_")}
    return functions


@pytest.mark.parametrize("name", documented_tests())
def test_the_examples_of_the_page_testing(app: Flask, client: FlaskClient, name: str) -> None:
    documented_tests()[name](app=app, client=client)
