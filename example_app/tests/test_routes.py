"""What clients of the routes receive, and what is refused. No server, no network, no waiting."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis

from example_app import model
from flask_rq_webhooks.testing import InMemoryReceiver, deliver_all

from .conftest import SHARED_SECRET

RUN = "/runs/blue-creek/plain/rq/api"
SECRET = "what the client chose"
FIELDS = {"webhook_url": "https://client.example/hooks", "webhook_secret": SECRET}


@pytest.mark.parametrize("route", ["build_landuse", "build_soils", "build_climate"])
def test_a_client_receives_the_result(
    app: Flask, client: FlaskClient, work: Callable[[], None], route: str
) -> None:
    response = client.post(f"{RUN}/{route}", json=FIELDS)
    assert response.headers["Webhook-Registered"] == "true"
    work()
    (webhook,) = deliver_all(app)
    payload = webhook.verify(SECRET).json
    assert payload["event"] == "job.success"
    assert payload["job_id"] == response.get_json()["job_id"]
    assert payload["runid"] == "blue-creek"
    assert payload["result"]


def test_a_client_without_a_webhook_notices_nothing(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    response = client.post(f"{RUN}/build_landuse", json={})
    assert response.get_json()["Success"]
    assert "Webhook-Registered" not in response.headers
    work()
    assert deliver_all(app) == []


def test_a_failure_is_reported_with_its_reason(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    table = (model.DATA / "broken_climate.csv").open("rb")
    with table:
        client.post(f"{RUN}/build_climate", data={**FIELDS, "climate_file": (table, "climate.csv")})
    work()
    (webhook,) = deliver_all(app)
    assert webhook.json["event"] == "job.failure"
    assert webhook.json["error"]["type"] == "InputError"
    assert "line" in webhook.json["error"]["message"]


def test_a_run_is_reported_to_the_client_who_asked(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    job_id = client.post(f"{RUN}/run_wepp", json=FIELDS).get_json()["job_id"]
    work()
    reported = {webhook.json["job_id"]: webhook.json["event"] for webhook in deliver_all(app)}
    assert reported == {job_id: "job.success"}  # the jobs it enqueued are its own business


@pytest.mark.filterwarnings("ignore:Passing a string or function:DeprecationWarning")  # RQ prefers Callback
def test_callbacks_of_the_app_run_as_before(
    app: Flask, client: FlaskClient, work: Callable[[], None], redis_in_memory: Redis
) -> None:
    client.post(f"{RUN}/hello_world", json={**FIELDS, "fail": True})
    work()
    (webhook,) = deliver_all(app)
    assert webhook.json["event"] == "job.failure"
    assert redis_in_memory.lrange("example_app:greetings", 0, -1) != []


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        pytest.param({"webhook_url": "https://10.1.2.3/hooks"}, "webhook_url", id="private-network"),
        pytest.param({"webhook_url": "http://client.example/hooks"}, "webhook_url", id="not-encrypted"),
        pytest.param({**FIELDS, "webhook_secret": ""}, "webhook_secret", id="empty-secret"),
        pytest.param({**FIELDS, "webhook_events": ["job.sucess"]}, "webhook_events", id="misspelt"),
    ],
)
def test_a_bad_webhook_is_refused_and_nothing_is_enqueued(
    client: FlaskClient, redis_in_memory: Redis, fields: dict[str, object], name: str
) -> None:
    response = client.post(f"{RUN}/build_landuse", json=fields)
    assert response.status_code == 400
    assert list(response.get_json()["error"]["details"]) == [name]
    assert redis_in_memory.keys("rq:*") == []


def test_an_outage_of_the_receiver_costs_the_client_nothing(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    client.post(f"{RUN}/build_soils", json=FIELDS)
    work()
    attempts = deliver_all(app, InMemoryReceiver(503, "timeout", 204))
    assert [webhook.header("X-Webhook-Attempt") for webhook in attempts] == ["1", "2", "3"]
    assert len({webhook.header("webhook-id") for webhook in attempts}) == 1
    assert len({webhook.body for webhook in attempts}) == 1


def test_the_status_route_says_how_it_stands(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    job_id = client.post(f"{RUN}/build_soils", json=FIELDS).get_json()["job_id"]
    headers = {"Authorization": "Bearer what operators know"}

    def status() -> str:
        return str(client.get(f"/webhooks/jobs/{job_id}", headers=headers).get_json()["delivery_status"])

    assert status() == "waiting"
    work()
    deliver_all(app, InMemoryReceiver(503), retries=False)
    assert status() == "pending"
    deliver_all(app)
    assert status() == "succeeded"
    assert client.get(f"/webhooks/jobs/{job_id}").status_code == 403  # without the token


def test_the_analysis_service_speaks_as_its_clients_expect(analysis: Flask, work: Callable[[], None]) -> None:
    response = analysis.test_client().post(
        "/api/v1/analyze/async",
        json={"flows": [1, 2, 3], "webhook_url": "https://client.example/hooks", "sign_payload": True},
    )
    assert response.status_code == 202
    work()
    (webhook,) = deliver_all(analysis)
    assert webhook.verify(SHARED_SECRET, header_prefix="X-Analysis").json["event_type"] == "task.completed"
    payload = json.loads(webhook.body)
    assert payload["task"] == {
        "id": response.get_json()["task_id"],
        "name": "analyze_rq",
        "status": "SUCCESS",
    }
    assert webhook.header("X-Analysis-Event") == "job.success"
    assert webhook.header("X-Webhook-Event") is None


@pytest.mark.parametrize("job_id", ["a b", "a\0b", "\U0001f600", "nobody"])
def test_a_job_id_that_can_be_none_is_unknown(client: FlaskClient, job_id: str) -> None:
    assert client.get(f"/rq/api/jobstatus/{quote(job_id)}").status_code == 404
    assert client.get(f"/runs/basin/plain/jobs/{quote(job_id)}").status_code == 404


def test_a_run_id_that_is_no_directory_is_unknown(client: FlaskClient) -> None:
    for runid in ("x" * 300, "a.b", "%00"):
        assert client.post(f"/runs/{runid}/plain/rq/api/build_landuse", json={}).status_code == 404, runid
