"""An operator acts: API, pages and commands accept the same, and a ping is an event like every other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from flask import Flask
from flask.cli import FlaskGroup
from flask.testing import FlaskClient

from flask_rq_webhooks import signals
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.models import Delivery, Endpoint, Secret
from tests import storage_rows
from tests.dashboard_app import add_delivery, add_endpoint, open_host

MAY = {"status", "read", "manage"}


@pytest.fixture
def host(sqlite_url: str, redis_url: str) -> Iterator[tuple[Flask, State]]:
    with open_host(sqlite_url, redis_url, MAY) as opened:
        yield opened


class Faces:
    """One action by API, page and command; each returns whether it was accepted."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.client: FlaskClient = app.test_client()
        page = self.client.get("/webhooks/endpoints/new").text
        self.token = page.partition('name="csrf_token" value="')[2].partition('"')[0]

    def api(self, path: str, values: dict[str, Any]) -> bool:
        response = self.client.post(f"/webhooks/api{path}", json=values, headers={"X-CSRFToken": self.token})
        assert response.status_code < 500
        return response.status_code < 300

    def page(self, path: str, **values: Any) -> bool:
        response = self.client.post(f"/webhooks{path}", data={"csrf_token": self.token, **values})
        assert response.status_code < 500
        return response.status_code < 400

    def command(self, *arguments: str) -> bool:
        group = FlaskGroup(create_app=lambda: self.app, set_debug_flag=False)
        result = CliRunner().invoke(group, ["rq-webhooks", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result.exit_code == 0


@pytest.mark.parametrize(
    ("hours", "accepted"),
    [(0, True), (1.5, True), (720, True), (720.1, False), (1e9, False), (-1, False), (float("nan"), False)],
)
def test_the_grace_of_a_rotation(host: tuple[Flask, State], hours: float, accepted: bool) -> None:
    app, state = host
    endpoint_id = add_endpoint(state, secret="the first")
    faces = Faces(app)
    text = json.dumps(hours * 3600)
    by_api = faces.client.post(
        f"/webhooks/api/endpoints/{endpoint_id}/rotate",
        data=f'{{"grace_s": {text}}}',
        headers={"X-CSRFToken": faces.token, "Content-Type": "application/json"},
    )
    assert (by_api.status_code == 200) is accepted, by_api.text
    assert faces.page(f"/endpoints/{endpoint_id}/rotate", grace_h=str(hours)) is accepted
    assert faces.command("endpoints", "rotate", endpoint_id, f"--grace-hours={hours}") is accepted
    kept = storage_rows.rows(state.database, Secret)
    assert (len(kept) > 1) is accepted


@pytest.mark.parametrize(
    ("name", "option", "value", "accepted"),
    [
        ("host", "host", "a" * 512, True),
        ("host", "host", "a" * 513, False),
        ("runid", "runid", "x" * 600, False),
        ("status", "status", "pending", True),
        ("status", "status", "unknown", False),
        ("since", "since", "2026-01-31T00:00:00+00:00", True),
        ("since", "since", "yesterday", False),
        ("event", "event-type", "job.failure", True),
    ],
)
@pytest.mark.parametrize("action", ["recover", "cancel"])
def test_the_filter_of_many(
    host: tuple[Flask, State], action: str, name: str, option: str, value: str, accepted: bool
) -> None:
    app, state = host
    delivery_id = add_delivery(state, add_endpoint(state))
    faces = Faces(app)
    raw = [value] if name == "status" else value
    assert faces.api(f"/{action}", {name: raw}) is accepted
    assert faces.page(f"/deliveries/{action}", **{name: value}) is accepted
    assert faces.command(action, f"--{option}", value) is accepted
    if not accepted:
        assert storage_rows.row(state.database, Delivery, Delivery.id == delivery_id).status == "pending"


@pytest.mark.parametrize("action", ["recover", "cancel"])
def test_all_are_meant_only_where_that_is_said(host: tuple[Flask, State], action: str) -> None:
    app, state = host
    add_delivery(state, add_endpoint(state))
    faces = Faces(app)
    assert not faces.api(f"/{action}", {})
    assert not faces.page(f"/deliveries/{action}")
    assert not faces.command(action)
    assert storage_rows.row(state.database, Delivery).status == "pending"
    assert faces.api(f"/{action}", {"all": True})
    assert faces.page(f"/deliveries/{action}", all="yes")
    assert faces.command(action, "--all")


@pytest.mark.parametrize(
    ("field", "option", "value", "accepted"),
    [
        ("url", None, "https://hooks.example.com/in", True),
        ("url", None, "https://u:p@hooks.example.com/in", False),
        ("timeout_s", "timeout", "0", False),
        ("timeout_s", "timeout", "1e6", False),
        ("max_attempts", "attempts", "0", False),
        ("max_attempts", "attempts", "1", True),
        ("max_attempts", "attempts", "1000", False),
        ("retry_schedule", "retry-schedule", "60, 300.5 86400", True),
        ("retry_schedule", "retry-schedule", "60, 0.5", False),
        ("retry_schedule", "retry-schedule", "86401", False),
        ("retry_schedule", "retry-schedule", "86400," * 8, False),
        ("retry_schedule", "retry-schedule", "1," * 100, False),
        ("retry_schedule", "retry-schedule", "nan", False),
        ("retry_schedule", "retry-schedule", ",", False),
        ("retry_statuses", "retry-statuses", "404, 5XX", True),
        ("retry_statuses", "retry-statuses", "404, 410", False),
        ("retry_statuses", "retry-statuses", "302", False),
        ("retry_statuses", "retry-statuses", "200", False),
        ("retry_statuses", "retry-statuses", "5x", False),
        ("format", "format", "nonsense", False),
        ("secret", "secret", "x" * 513, False),
        ("description", "description", "x" * 1001, False),
    ],
)
def test_a_new_endpoint(
    host: tuple[Flask, State], field: str, option: str | None, value: str, accepted: bool
) -> None:
    app, state = host
    faces = Faces(app)
    url = value if field == "url" else "https://hooks.example.com/in"
    sent = {"url": url, field: value}
    assert faces.api("/endpoints", sent) is accepted
    assert faces.page("/endpoints/new", **sent) is accepted
    arguments = ["endpoints", "create", url, *([] if option is None else [f"--{option}", value])]
    assert faces.command(*arguments) is accepted
    assert len(storage_rows.rows(state.database, Endpoint)) == (3 if accepted else 0)


@pytest.mark.parametrize("by", ["api", "page"])
def test_a_ping_emits_the_signal_of_every_event(host: tuple[Flask, State], by: str) -> None:
    app, state = host
    endpoint_id = add_endpoint(state)
    faces = Faces(app)
    seen: list[str] = []

    def note(_sender: Any, *, event_type: str, **_more: Any) -> None:
        seen.append(event_type)

    pinged: dict[str, Callable[[], bool]] = {
        "api": lambda: faces.api(f"/endpoints/{endpoint_id}/test", {}),
        "page": lambda: faces.page(f"/endpoints/{endpoint_id}/test"),
    }
    with signals.event_recorded.connected_to(note):
        assert pinged[by]()
    assert seen == ["webhook.ping"]
    assert storage_rows.row(state.database, Delivery).max_attempts == 1
