"""SECURITY 13–18: whatever is sent to the API, no answer is a 5xx, and each is one that is described."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation import GenerationMode

from flask_rq_webhooks import RQWebhooks
from flask_rq_webhooks.observe.publisher import safe_render
from flask_rq_webhooks.protocol.events import JOB_SUCCESS, Occurrence, format_time
from flask_rq_webhooks.storage.dispatchers import heartbeat
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.web.api_contract import Route, routes_of
from tests.integration.hosts import Host
from tests.storage_rows import set_values

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


def _routes() -> list[Route]:
    app = Flask("described")
    app.config["RQ_WEBHOOKS_DATABASE_URI"] = "sqlite://"
    RQWebhooks(app)
    return routes_of(app)


ROUTES = _routes()


def openapi_path(route: Route) -> str:
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", route.path)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, redis_server_url: str) -> Iterator[Host]:
    """Give a host with a standing endpoint, a delivery and a dispatcher that will be alive for long."""
    path = tmp_path_factory.mktemp("schemathesis") / "host.db"
    made = Host(f"sqlite:///{path}", redis_server_url)
    client = made.app.test_client()
    created = client.post("/webhooks/api/endpoints", json={"url": "https://hooks.example.com/in?key=hidden"})
    assert created.status_code == 201
    now = datetime.now(UTC)
    occurrence = Occurrence(
        type=JOB_SUCCESS, occurred_at=now, source="callback", job_id="job-1", run=format_time(now),
        runid="run-1", enqueued_at=now, started_at=now, ended_at=now, result={"answer": 42},
    )  # fmt: skip
    ingest(made.state.database, [IngestItem(occurrence)], render=safe_render(made.state), max_attempts=3)
    heartbeat(made.state.database, "dsp_tests", started=True)
    from flask_rq_webhooks.storage.models import Dispatcher

    later = now + timedelta(hours=1)
    set_values(made.state.database, Dispatcher, "dsp_tests", heartbeat_at=later)
    yield made
    made.close()


@pytest.fixture(scope="module")
def api(host: Host) -> Any:
    return schemathesis.openapi.from_wsgi("/webhooks/openapi.json", host.app)


def test_every_route_of_the_api_is_described_and_no_other(host: Host) -> None:
    document = host.app.test_client().get("/webhooks/openapi.json").get_json()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    served = {
        (method, _as_openapi(rule.rule))
        for rule in host.app.url_map.iter_rules()
        if rule.endpoint.startswith("rq_webhooks.")
        and not rule.endpoint.rpartition(".")[2].startswith(("page_", "static"))
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }

    assert described == served


def _as_openapi(rule: str) -> str:
    path = rule.removeprefix("/webhooks").replace("<path:", "<")
    return path.replace("<", "{").replace(">", "}")


def test_the_description_follows_the_app_to_where_it_is_mounted(host: Host) -> None:
    plain = host.app.test_client().get("/webhooks/openapi.json").get_json()
    below = host.app.test_client().get("/webhooks/openapi.json", base_url="http://localhost/host").get_json()

    assert plain["openapi"].startswith("3.1")
    assert plain["servers"] == [{"url": "/webhooks"}]
    assert below["servers"] == [{"url": "/host/webhooks"}]


def test_what_real_rows_are_answered_with_is_as_described(host: Host, api: Any) -> None:
    """Generated ids meet nothing; these meet the rows there are."""
    client = host.app.test_client()
    (delivery,) = client.get("/webhooks/api/deliveries").get_json()["items"]
    ids = {
        "delivery_id": delivery["id"],
        "event_id": delivery["event_id"],
        "endpoint_id": delivery["endpoint_id"],
        "job_id": "job-1",
    }
    checked = 0
    for route in ROUTES:
        if route.method != "GET" or not isinstance(route.answers[200][0], type):
            continue
        path = openapi_path(route).format(**ids)
        response = client.get(f"/webhooks{path}")
        assert response.status_code == 200, path
        api[openapi_path(route)]["GET"].validate_response(schemathesis.Response.from_any(response))
        checked += 1

    assert checked >= 10


@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value
)
@pytest.mark.parametrize(
    "route", ROUTES, ids=lambda route: f"{route.method.lower()} {openapi_path(route)}".replace("/", ".")
)
def test_no_answer_is_a_server_error_and_each_is_as_described(
    api: Any, route: Route, mode: GenerationMode
) -> None:
    cases = api[openapi_path(route)][route.method].as_strategy(generation_mode=mode)

    @given(case=cases)
    @settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=list(CHECKS))

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # there is no wrong way to ask
