"""Customers: their own endpoints, jobs reported there without a URL, and nothing of anybody else's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_rq_webhooks.accept import tenants
from flask_rq_webhooks.protocol.events import OPERATOR_TYPES
from flask_rq_webhooks.storage.models import new_id
from flask_rq_webhooks.testing import deliver_all
from tests.integration.hosts import FIELDS, Host

HOOK = "https://hooks.example.com/in"


@pytest.fixture
def host(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Give a host whose callers say who they are in a header; ``boss`` is an operator."""
    monkeypatch.setattr(tenants, "LOOK_EVERY_S", 0.0)
    made = Host(database_url, redis_url)

    def may(permission: str, **what: Any) -> bool:
        who = request.headers.get("X-Who")
        return who == "boss" or (permission == "own" and who is not None and what["tenant"] == who)

    made.webhooks.authorize(may)
    made.webhooks.tenant(lambda: request.headers.get("X-Who"))
    made.route(lambda_view(made), "/job")
    yield made
    made.close()


def lambda_view(made: Host) -> Callable[[], Any]:
    def job() -> Any:
        return {"job_id": made.enqueue()}

    return job


def call(host: Host, who: str | None, method: str, path: str, **options: Any) -> Any:
    headers = {} if who is None else {"X-Who": who}
    return host.app.test_client().open(f"/webhooks/api/{path}", method=method, headers=headers, **options)


def create(host: Host, who: str, **values: Any) -> dict[str, Any]:
    response = call(host, who, "POST", "endpoints", json={"url": HOOK, **values})
    assert response.status_code == 201, response.text
    return dict(response.get_json())


def run_job(host: Host, who: str | None, **fields: Any) -> Any:
    headers = {} if who is None else {"X-Who": who}
    response = host.app.test_client().post("/job", headers=headers, json=fields)
    assert response.status_code == 200, response.text
    return response


def work(host: Host) -> None:
    """Run all jobs and store what their callbacks report; nothing is sent anywhere."""
    import rq

    rq.SimpleWorker([host.queue], connection=host.redis).work(burst=True)
    from flask_rq_webhooks.observe.ingest import Ingest
    from flask_rq_webhooks.observe.publisher import Publisher

    ingest = Ingest(host.state, consumer="tests", publisher=Publisher(host.state))
    for _ in range(20):
        ingest.step(block_ms=10) if hasattr(ingest, "step") else ingest.run_once()


def deliveries(host: Host, who: str) -> list[dict[str, Any]]:
    found = call(host, who, "GET", "deliveries").get_json()
    return list(found["items"])
