"""The pages, as a browser without JavaScript gets them: every page, every form, everybody who may not."""

from __future__ import annotations

import re
import shlex
import time
from base64 import b64decode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rq
from flask import Flask, render_template_string, request
from flask.testing import FlaskClient
from flask_wtf.csrf import CSRFProtect
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import TestResponse

from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.dispatchers import heartbeat, paused_since
from flask_rq_webhooks.storage.models import Attempt, Delivery, Endpoint, Event, Secret
from flask_rq_webhooks.web import monitoring, operations
from flask_rq_webhooks.web.operations import AT_MOST
from flask_rq_webhooks.web.pages import REFRESH_ALARM_S, REFRESH_IDLE_S
from tests import storage_rows
from tests.dashboard_app import (
    HOSTILE,
    add_deliveries,
    add_delivery,
    add_endpoint,
    add_hostile,
    add_watch,
    attempt_all,
    open_host,
)

PREFIX = "/webhooks"
#: Routes that need no permission: whether a dispatcher is alive, and public keys.
OPEN = ("rq_webhooks.health", "rq_webhooks.keys")

PAGES = (
    "/",
    "/?hours=168",
    "/?hours=720",
    "/deliveries",
    "/deliveries?status=pending&status=sending",
    "/deliveries/<delivery_id>",
    "/events/<event_id>",
    "/endpoints",
    "/endpoints?kind=job",
    "/endpoints/<endpoint_id>",
    "/tenants",
)
MANAGED_PAGES = ("/endpoints/new", "/endpoints/<endpoint_id>/edit")
FORMS = (
    "/pause",
    "/resume",
    "/deliveries/recover",
    "/deliveries/cancel",
    "/deliveries/<delivery_id>/resend",
    "/endpoints/new",
    "/endpoints/<endpoint_id>/edit",
    "/endpoints/<endpoint_id>/rotate",
    "/endpoints/<endpoint_id>/test",
    "/endpoints/<endpoint_id>/enable",
    "/endpoints/<endpoint_id>/disable",
    "/endpoints/<endpoint_id>/delete",
    "/tenants/disable",
)


@pytest.fixture
def allowed() -> set[str]:
    """Give the permissions of the caller; a test may change them."""
    return {"status", "read", "manage"}


@pytest.fixture
def host(sqlite_url: str, redis_url: str, allowed: set[str]) -> Iterator[tuple[Flask, State]]:
    with open_host(sqlite_url, redis_url, allowed) as opened:
        yield opened


@pytest.fixture
def state(host: tuple[Flask, State]) -> State:
    return host[1]


@pytest.fixture
def client(host: tuple[Flask, State]) -> FlaskClient:
    return host[0].test_client()


class Page(HTMLParser):
    """A page as a reader without JavaScript has it: forms with their fields, links, and text."""

    def __init__(self, response: TestResponse) -> None:
        super().__init__()
        self.forms: list[dict[str, Any]] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(response.text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "form":
            self.forms.append(
                {"action": attributes.get("action"), "method": attributes.get("method"), "fields": {}}
            )
        elif tag == "input" and self.forms and attributes.get("type") == "hidden":
            self.forms[-1]["fields"][attributes["name"]] = attributes.get("value") or ""
        elif tag == "a":
            self.links.append(attributes.get("href") or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def form(self, ending: str) -> dict[str, Any]:
        """Return the form whose action ends so."""
        (found,) = [form for form in self.forms if (form["action"] or "").endswith(ending)]
        return found


def page(client: FlaskClient, path: str, status: int = 200, **options: Any) -> Page:
    response = client.get(PREFIX + path, **options)
    assert response.status_code == status, response.text
    return Page(response)


def submit(client: FlaskClient, found: Page, ending: str, follow: bool = True, **fields: Any) -> TestResponse:
    """Send a form of a page as a browser would, with what a person filled in."""
    form = found.form(ending)
    assert form["method"] == "post"
    return client.post(form["action"], data={**form["fields"], **fields}, follow_redirects=follow)


def token(client: FlaskClient) -> str:
    return str(page(client, "/endpoints/new").form("/endpoints/new")["fields"]["csrf_token"])


def filled(path: str, ids: dict[str, str]) -> str:
    return re.sub(r"<(\w+)>", lambda found: ids[found[1]], path)


def status_of(state: State, delivery_id: str) -> str:
    return str(storage_rows.row(state.database, Delivery, Delivery.id == delivery_id).status)


# -- what every page has in common ------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, *MANAGED_PAGES])
def test_every_page_is_served_safely(client: FlaskClient, state: State, path: str) -> None:
    response = client.get(PREFIX + filled(path, add_hostile(state)))
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self';")
    assert "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    found = Page(response)
    for _tag, attributes in found.tags:
        assert "style" not in attributes  # which the policy would block
        assert not [name for name in attributes if name.startswith("on")]
    assert len([tag for tag, _ in found.tags if tag == "h1"]) == 1
    for form in found.forms:
        assert form["method"] == "get" or form["fields"]["csrf_token"]


@pytest.mark.parametrize("path", [*PAGES, *MANAGED_PAGES])
def test_what_strangers_wrote_is_text_everywhere(client: FlaskClient, state: State, path: str) -> None:
    ids = add_hostile(state)
    response = client.get(PREFIX + filled(path, ids))
    clean = client.get(PREFIX + "/endpoints?kind=job").text
    tags = {tag for tag, _ in Page(response).tags}
    assert "img" not in tags
    assert len(re.findall("<script", response.text)) == len(re.findall("<script", clean)) == 1
    if "edit" not in path:  # a field to edit holds what is stored
        assert "\u202e" not in response.text
    assert "7006652" not in response.text  # {{1234*5678}} is text, not a template
    assert "a secret that is never shown" not in response.text
    for link in Page(response).links:
        assert link.startswith((PREFIX + "/", "#")), link


def test_hostile_text_is_still_readable(client: FlaskClient, state: State) -> None:
    ids = add_hostile(state)
    text = page(client, f"/deliveries/{ids['delivery_id']}").text
    assert "<script>window.hacked=1</script>" in text  # as text, after parsing
    assert "\\u202e" in text
    assert "\\u0000\ufffd" in text  # the body's NUL and its byte that is no UTF-8


def test_secret_parts_of_urls_and_values_of_headers_are_nowhere(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(
        state, "https://hooks.example.com/services/T0XYZSECRETPART?key=k3y", headers={"X-Key": "hidden-value"}
    )
    delivery_id = add_delivery(state, endpoint_id)
    attempt_all(state, storage_rows.SUCCEEDED, request_headers={"X-Key": "***"})
    for path in (f"/deliveries/{delivery_id}", "/endpoints", f"/endpoints/{endpoint_id}",
                 f"/endpoints/{endpoint_id}/edit", "/deliveries", "/"):  # fmt: skip
        text = client.get(PREFIX + path).text
        for secret in ("T0XYZSECRETPART", "k3y", "hidden-value"):
            assert secret not in text, path
    assert "hooks.example.com/services/…" in page(client, f"/deliveries/{delivery_id}").text
    assert "X-Key : ***" in page(client, f"/endpoints/{endpoint_id}").text


# -- who may ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, *MANAGED_PAGES])
def test_pages_need_their_permission(client: FlaskClient, state: State, allowed: set[str], path: str) -> None:
    ids = add_hostile(state)
    allowed.clear()
    allowed.add("status")
    assert client.get(PREFIX + filled(path, ids)).status_code == 403
    allowed.add("read")
    expected = 403 if path in MANAGED_PAGES else 200
    assert client.get(PREFIX + filled(path, ids)).status_code == expected


@pytest.mark.parametrize("path", FORMS)
def test_forms_need_manage_and_a_token(
    client: FlaskClient, state: State, allowed: set[str], path: str
) -> None:
    ids = add_hostile(state)
    before = [storage_rows.rows(state.database, table) for table in (Delivery, Endpoint, Secret)]
    good = token(client)
    address = PREFIX + filled(path, ids)
    data = {"all": "yes", "grace_h": "1", "url": "https://other.example.com/x", "csrf_token": good}
    allowed.discard("manage")
    assert client.post(address, data=data).status_code == 403
    allowed.add("manage")
    for wrong in ({}, {"csrf_token": ""}, {"csrf_token": good[:-1]}, {"csrf_token": "x" * 5000}):
        assert client.post(address, data={**data, "csrf_token": "", **wrong}).status_code == 403
    other = client.application.test_client()
    assert other.post(address, data=data, headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.get(address).status_code in (200, 404, 405)
    assert [storage_rows.rows(state.database, table) for table in (Delivery, Endpoint, Secret)] == before
    assert not paused_since(state.database)


def test_a_reader_is_offered_nothing_to_change(client: FlaskClient, state: State, allowed: set[str]) -> None:
    ids = add_hostile(state)
    allowed.discard("manage")
    for path in PAGES:
        found = page(client, filled(path, ids))
        assert {form["method"] for form in found.forms} == {"get"}, path


@pytest.mark.parametrize(
    "path",
    [
        "/deliveries/dlv_unknown",
        "/deliveries/%00",
        "/deliveries/" + "x" * 300,
        "/events/evt_unknown",
        "/events/%F0%9F%92%A9",
        "/endpoints/ep_unknown",
        "/endpoints/ep_unknown/edit",
        "/endpoints?kind=other",
        "/endpoints?cursor=%21",
        "/deliveries?cursor=%21",
        "/?hours=5",
    ],
)
def test_unknown_is_404(client: FlaskClient, path: str) -> None:
    assert client.get(PREFIX + path).status_code == 404


@pytest.mark.parametrize("path", [form for form in FORMS if "<" in form])
def test_forms_on_unknown_ids_are_404(client: FlaskClient, path: str) -> None:
    ids = {"delivery_id": "dlv_unknown", "endpoint_id": "ep_unknown"}
    data = {"csrf_token": token(client), "grace_h": "1"}
    assert client.post(PREFIX + filled(path, ids), data=data).status_code == 404


def test_no_route_of_the_blueprint_is_forgotten_here(host: tuple[Flask, State], allowed: set[str]) -> None:
    app, _state = host
    shown = {f"{PREFIX}{path.partition('?')[0]}" for path in (*PAGES, *MANAGED_PAGES, *FORMS)}
    rules = {rule.rule for rule in app.url_map.iter_rules() if rule.endpoint.startswith("rq_webhooks.page_")}
    assert rules == shown
    allowed.clear()
    client = app.test_client()
    for rule in app.url_map.iter_rules():
        if not rule.endpoint.startswith("rq_webhooks.") or rule.endpoint in OPEN:
            continue
        address = re.sub(r"<[^>]*>", "unknown", rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            response = client.open(address, method=method)
            assert response.status_code in (403, 404), (method, rule.rule)


def test_without_dashboard_there_are_no_pages(sqlite_url: str, redis_url: str, allowed: set[str]) -> None:
    with open_host(sqlite_url, redis_url, allowed, RQ_WEBHOOKS_DASHBOARD=False) as (app, _state):
        client = app.test_client()
        assert not [rule for rule in app.url_map.iter_rules() if "page_" in rule.endpoint]
        for path in ("/", "/deliveries", "/endpoints", "/assets/dashboard.css"):
            assert client.get(PREFIX + path).status_code == 404
        assert client.get(PREFIX + "/api/stats").status_code == 200


def test_database_down_is_a_page_that_says_so(tmp_path: Path, redis_url: str, allowed: set[str]) -> None:
    with open_host(f"sqlite:///{tmp_path / 'x.db'}", redis_url, allowed) as (app, state):
        state.database.dispose()
        state.database.url = state.database.url.set(database=str(tmp_path / "none" / "x.db"))
        state.database.engine = state.database._create_engine(None, {}, 1)
        response = app.test_client().get(PREFIX + "/deliveries")
    assert response.status_code == 503
    assert "The database cannot be reached" in response.text
    assert response.headers["Retry-After"] == "5"


# -- forms ------------------------------------------------------------------------------------------------


def test_an_endpoint_is_created_and_its_secret_shown_once(client: FlaskClient, state: State) -> None:
    response = submit(
        client, page(client, "/endpoints/new"), "/endpoints/new",
        url="https://Hooks.Example.com/in?key=1", description="Mine", events=["job.failure"],
        other_events="model.published, model.removed", headers="X-A: 1\nX-B: 2", format="standard",
        max_attempts="3", timeout_s="2.5", retry_schedule="60, 1.5", retry_statuses="404, 5xx",
    )  # fmt: skip
    assert response.status_code == 201
    secret = re.search(r"whsec_[A-Za-z0-9+/=]+", response.text)
    assert secret is not None
    row = storage_rows.row(state.database, Endpoint)
    assert (row.url, row.host) == ("https://hooks.example.com/in?key=1", "hooks.example.com")
    assert row.events == '["job.failure", "model.published", "model.removed"]'
    assert (row.format, row.max_attempts, row.timeout_s, row.scope) == ("standard", 3, 2.5, "job")
    assert (row.retry_schedule, row.retry_statuses) == ("[60.0, 1.5]", '["404", "5xx"]')
    assert state.cipher.decrypt(row.headers) == '{"X-A": "1", "X-B": "2"}'
    stored = storage_rows.row(state.database, Secret)
    assert state.cipher.decrypt(stored.secret) == secret[0]
    for path in ("/endpoints", f"/endpoints/{row.id}", f"/endpoints/{row.id}/edit"):
        assert secret[0] not in client.get(PREFIX + path).text


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"url": "http://10.0.0.1/x"}, "error-url"),
        ({"url": "javascript:alert(1)"}, "error-url"),
        ({"url": ""}, "error-url"),
        ({"other_events": "Job Success"}, "error-events"),
        ({"headers": "no colon"}, "error-headers"),
        ({"headers": "Host: x"}, "error-headers"),
        ({"headers": "X-A: 1\nX-A: 2"}, "error-headers"),
        ({"max_attempts": "0"}, "error-max_attempts"),
        ({"timeout_s": "nan"}, "error-timeout_s"),
        ({"retry_schedule": "0"}, "error-retry_schedule"),
        ({"retry_statuses": "410"}, "error-retry_statuses"),
        ({"format": "none"}, "error-format"),
        ({"sign_payload": "yes"}, "error-sign_payload"),
        ({"secret": "x" * 513}, "error-secret"),
        ({"reference": "x" * 257}, "error-reference"),
    ],
)
def test_a_form_that_is_not_acceptable_comes_back(
    client: FlaskClient, state: State, fields: dict[str, str], why: str
) -> None:
    response = submit(
        client, page(client, "/endpoints/new"), "/endpoints/new",
        **{"url": "https://hooks.example.com/in", "description": HOSTILE, "secret": "s3cr3t", **fields},
    )  # fmt: skip
    assert response.status_code == 400
    found = Page(response)
    assert any(attributes.get("id") == why for _tag, attributes in found.tags)
    inputs = [attributes for tag, attributes in found.tags if tag == "input"]
    values = {attributes.get("name"): attributes.get("value") for attributes in inputs}
    assert values["description"] == HOSTILE
    assert values["secret"] is None  # never comes back
    assert storage_rows.rows(state.database, Endpoint) == []


def test_an_endpoint_is_edited_without_seeing_what_is_secret(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state, "https://hooks.example.com/a?key=k3y", headers={"X-A": "1"})
    delivery_id = add_delivery(state, endpoint_id)
    found = page(client, f"/endpoints/{endpoint_id}/edit")
    response = submit(client, found, "/edit", url="", description="New words", headers="")
    assert "The changes were saved." in response.text
    row = storage_rows.row(state.database, Endpoint)
    assert row.url == "https://hooks.example.com/a?key=k3y"
    assert state.cipher.decrypt(row.headers) == '{"X-A": "1"}'
    assert row.description == "New words"

    submit(client, found, "/edit", url="https://other.example.com/b", no_headers="yes", events=["*"])
    row = storage_rows.row(state.database, Endpoint)
    assert (row.host, row.headers, row.events, row.description) == ("other.example.com", None, '["*"]', None)
    assert storage_rows.row(state.database, Delivery, Delivery.id == delivery_id).host == "other.example.com"


def test_rotation_shows_the_new_secret_and_keeps_the_old_one_for_a_while(
    client: FlaskClient, state: State
) -> None:
    endpoint_id = add_endpoint(state, secret="the old one")
    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/rotate", grace_h="2")
    assert response.status_code == 200
    assert "whsec_" in response.text
    assert "for 2 h" in Page(response).text
    old, new = storage_rows.rows(state.database, Secret)
    assert state.cipher.decrypt(new.secret) in response.text
    assert timedelta(hours=1.9) < old.expires_at - datetime.now(UTC) < timedelta(hours=2.1)
    assert "with 2 secrets" in page(client, f"/endpoints/{endpoint_id}").text
    for wrong in ("", "-1", "nan", "721", "x"):
        answer = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/rotate", grace_h=wrong)
        assert answer.status_code == 400
    assert len(storage_rows.rows(state.database, Secret)) == 2


def test_a_test_ping_goes_through_the_pipeline(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state)
    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/test")
    assert "A test ping is on its way" in response.text
    (event,) = storage_rows.rows(state.database, Event)
    (delivery,) = storage_rows.rows(state.database, Delivery)
    assert (event.type, delivery.status, delivery.max_attempts) == ("webhook.ping", "pending", 1)
    assert response.request.path == f"{PREFIX}/deliveries/{delivery.id}"


def test_disabled_by_hand_and_enabled_with_what_was_missed(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state)
    early = add_delivery(state, endpoint_id, job_id="early")
    attempt_all(state, storage_rows.EXHAUSTED)
    time.sleep(0.01)  # ids differ by milliseconds
    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/disable")
    assert "Disabled since" in response.text
    other = add_endpoint(state, "https://other.example.com/x", kind="job")
    add_delivery(state, other, job_id="missed")
    assert len(storage_rows.rows(state.database, Delivery, Delivery.endpoint_id == endpoint_id)) == 1

    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/enable", recover="yes")
    assert "1 delivery is due now. The endpoint is enabled." in Page(response).text
    made = storage_rows.rows(
        state.database, Delivery, Delivery.endpoint_id == endpoint_id, Delivery.status == "pending"
    )
    assert len(made) == 1
    assert status_of(state, early) == "exhausted"  # its receiver had refused it; nobody was to blame


def test_disabled_by_failures_and_enabled_with_what_failed(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state)
    failed = add_delivery(state, endpoint_id)
    attempt_all(state, storage_rows.EXHAUSTED)
    now = datetime.now(UTC)
    storage_rows.set_values(
        state.database, Endpoint, endpoint_id, enabled=False, disabled_at=now, disabled_reason="failures",
        failures=100, failing_since=now,
    )  # fmt: skip
    submit(client, page(client, f"/endpoints/{endpoint_id}"), "/enable", recover="yes")
    assert status_of(state, failed) == "pending"


def test_enabled_without_recovering(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state)
    submit(client, page(client, f"/endpoints/{endpoint_id}"), "/disable")
    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/enable")
    assert "The endpoint is enabled." in response.text
    assert storage_rows.row(state.database, Endpoint).enabled


def test_deleted_with_its_deliveries(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state)
    add_delivery(state, endpoint_id)
    attempt_all(state, storage_rows.SUCCEEDED)
    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/delete")
    assert "were deleted" in response.text
    for table in (Endpoint, Delivery, Attempt, Secret):
        assert storage_rows.rows(state.database, table) == []


def test_deleted_in_parts_where_there_are_many(
    client: FlaskClient, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint_id = add_endpoint(state)
    add_deliveries(state, endpoint_id, 1100)
    monkeypatch.setattr(operations, "ENOUGH_S", 0.0)
    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/delete")
    assert "There are more: delete it again to continue." in Page(response).text
    assert len(storage_rows.rows(state.database, Delivery)) == 100
    response = submit(client, Page(response), "/delete")
    assert "The endpoint and its deliveries were deleted." in Page(response).text
    assert storage_rows.rows(state.database, Endpoint) == storage_rows.rows(state.database, Delivery) == []


def test_an_endpoint_from_a_request_is_shown_and_not_changed(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state, kind="job", runid="blue-creek")
    found = page(client, f"/endpoints/{endpoint_id}")
    assert "blue-creek" in found.text
    assert {form["method"] for form in found.forms} == {"get"}
    for action in ("edit", "rotate", "test", "enable", "disable", "delete"):
        data = {"csrf_token": token(client), "grace_h": "1"}
        assert client.post(f"{PREFIX}/endpoints/{endpoint_id}/{action}", data=data).status_code == 404
    assert client.get(f"{PREFIX}/endpoints/{endpoint_id}/edit").status_code == 404


def test_resend_of_one(client: FlaskClient, state: State) -> None:
    delivery_id = add_delivery(state, add_endpoint(state))
    attempt_all(state, storage_rows.EXHAUSTED, status_code=404, error_code="http_4xx", response_body=b"gone")
    found = page(client, f"/deliveries/{delivery_id}")
    assert "No attempts left after 1." in found.text
    assert "http_4xx HTTP 404" in found.text
    response = submit(client, found, "/resend")
    assert "The delivery is due now, for one more attempt." in response.text
    row = storage_rows.row(state.database, Delivery)
    assert (row.status, row.trigger) == ("pending", "manual")
    storage_rows.claim(state.database)
    response = submit(client, page(client, f"/deliveries/{delivery_id}"), "/resend")
    assert "An attempt is already in progress" in response.text


def test_what_was_erased_is_not_sent_again_and_a_page_says_why(client: FlaskClient, state: State) -> None:
    delivery_id = add_delivery(state, add_endpoint(state), job_id="j")
    attempt_all(state, storage_rows.EXHAUSTED)
    found = page(client, f"/deliveries/{delivery_id}")
    operations.erase(state, {"job_id": "j"})
    response = submit(client, found, "/resend")
    assert response.status_code == 409
    assert '<body class="rqw-body">' in response.text
    assert "erased" in response.text
    assert response.headers["Cache-Control"] == "no-store"
    assert status_of(state, delivery_id) == "exhausted"


def test_recover_and_cancel_by_filter(client: FlaskClient, state: State) -> None:
    first = add_endpoint(state, "https://one.example.com/x", kind="job")
    second = add_endpoint(state, "https://two.example.com/x", kind="job")
    one, two = add_delivery(state, first, job_id="a"), add_delivery(state, second, job_id="b")
    attempt_all(state, storage_rows.EXHAUSTED)

    found = page(client, "/deliveries?host=one.example.com&status=exhausted")
    assert ("host", "one.example.com") in found.form("/recover")["fields"].items()
    response = submit(client, found, "/deliveries/recover")
    assert "1 delivery is due now" in Page(response).text
    assert response.request.query_string.decode().count("status=") == 0
    assert (status_of(state, one), status_of(state, two)) == ("pending", "exhausted")

    response = submit(client, page(client, "/deliveries?job_id=a"), "/deliveries/cancel")
    assert "1 delivery was canceled." in Page(response).text
    assert status_of(state, one) == "canceled"

    everything = page(client, "/deliveries")
    assert submit(client, everything, "/deliveries/recover").status_code == 400
    response = submit(client, everything, "/deliveries/recover", all="yes")
    assert "2 deliveries are due now" in Page(response).text
    assert (status_of(state, one), status_of(state, two)) == ("pending", "pending")


def test_a_page_does_a_bounded_part_and_a_button_goes_on(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state, kind="job")
    add_deliveries(state, endpoint_id, AT_MOST + 30)
    other = add_delivery(
        state, add_endpoint(state, "https://other.example.com/x", kind="job"), job_id="other"
    )

    first = submit(client, page(client, "/deliveries?host=hooks.example.com"), "/deliveries/cancel")
    found = Page(first)
    assert "1,000 deliveries were canceled. 30 more match." in found.text
    goes_on = next(form for form in found.forms if "cursor" in form["fields"])
    assert goes_on["fields"]["host"] == "hooks.example.com"
    last = client.post(goes_on["action"], data=goes_on["fields"], follow_redirects=True)
    assert "1,030 deliveries were canceled." in Page(last).text
    assert not [form for form in Page(last).forms if "cursor" in form["fields"]]
    assert status_of(state, other) == "pending"

    everything = submit(client, page(client, "/deliveries?status=canceled"), "/deliveries/recover")
    found = Page(everything)
    assert "30 more match." in found.text
    goes_on = next(form for form in found.forms if "cursor" in form["fields"])
    assert goes_on["fields"]["status"] == "canceled"
    last = client.post(goes_on["action"], data=goes_on["fields"], follow_redirects=True)
    assert "1,030 deliveries are due now" in Page(last).text
    assert {one.status for one in storage_rows.rows(state.database, Delivery)} == {"pending"}


def test_an_endpoint_that_missed_many_goes_on_with_a_button(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state)
    submit(client, page(client, f"/endpoints/{endpoint_id}"), "/disable")
    add_deliveries(state, add_endpoint(state, "https://other.example.com/x", kind="job"), AT_MOST + 30)
    response = submit(client, page(client, f"/endpoints/{endpoint_id}"), "/enable", recover="yes")
    found = Page(response)
    assert "1,000 deliveries are due now" in found.text
    assert "There may be more that disabled endpoints missed." in found.text
    goes_on = next(form for form in found.forms if "cursor" in form["fields"])
    last = client.post(goes_on["action"], data=goes_on["fields"], follow_redirects=True)
    assert "1,030 deliveries are due now" in Page(last).text
    made = storage_rows.rows(state.database, Delivery, Delivery.endpoint_id == endpoint_id)
    assert len(made) == AT_MOST + 30


def test_readers_get_no_button_to_go_on_and_strange_cursors_change_nothing(
    client: FlaskClient, state: State, allowed: set[str]
) -> None:
    delivery_id = add_delivery(state, add_endpoint(state))
    data = {"csrf_token": token(client), "all": "yes", "cursor": "strange"}
    for action in ("cancel", "recover"):
        assert client.post(f"{PREFIX}/deliveries/{action}", data=data).status_code == 400
    assert status_of(state, delivery_id) == "pending"
    allowed.discard("manage")
    found = page(client, "/deliveries?done=canceled&n=5&next=dlv_1&left=3")
    assert {form["method"] for form in found.forms} == {"get"}


def test_a_bulk_form_with_a_bad_filter_changes_nothing(client: FlaskClient, state: State) -> None:
    delivery_id = add_delivery(state, add_endpoint(state))
    for fields in ({"status": "unknown"}, {"since": "never"}, {"host": "\0"}):
        data = {"csrf_token": token(client), "all": "yes", **fields}
        assert client.post(f"{PREFIX}/deliveries/cancel", data=data).status_code == 400
    assert status_of(state, delivery_id) == "pending"


def test_pause_and_resume(client: FlaskClient, state: State) -> None:
    response = submit(client, page(client, "/"), "/pause")
    assert paused_since(state.database)
    assert "All sending is paused since" in response.text
    assert "All sending is paused since" in page(client, "/deliveries").text
    response = submit(client, Page(response), "/resume")
    assert not paused_since(state.database)
    assert "Sending is resumed." in response.text


# -- lists ------------------------------------------------------------------------------------------------


def test_the_list_is_walked_by_cursor(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state, kind="job")
    ids = [add_delivery(state, endpoint_id, job_id=f"job-{number}") for number in range(60)]
    first = page(client, f"/deliveries?endpoint_id={endpoint_id}&status=pending")
    (older,) = [link for link in first.links if "cursor=" in link]
    assert f"endpoint_id={endpoint_id}" in older
    assert "status=pending" in older
    second = page(client, older.removeprefix(PREFIX))

    def listed(found: Page) -> list[str]:
        return [link.rpartition("/")[2] for link in found.links if "/deliveries/dlv_" in link]

    assert [*listed(first), *listed(second)] == ids[::-1]
    assert not [link for link in second.links if "cursor=" in link]
    assert f"{PREFIX}/deliveries?endpoint_id={endpoint_id}&status=pending" in {
        re.sub("status=pending&(.*)", r"\1&status=pending", link) for link in second.links
    } | set(second.links)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("host=one.example.com", ["a"]),
        ("event=job.failure", ["b", "a"]),
        ("event=job.success", []),
        ("job_id=b", ["b"]),
        ("runid=run-b", ["b"]),
        ("status=succeeded&status=exhausted", []),
        ("status=pending&job_id=a", ["a"]),
        ("since=2020-01-01T00:00", ["b", "a"]),
        ("since=2020-01-01T00:00%2B02:00&until=2020-01-02", []),
        ("unknown=1", ["b", "a"]),
    ],
)
def test_filters(client: FlaskClient, state: State, query: str, expected: list[str]) -> None:
    for name, host in (("a", "one"), ("b", "two")):
        endpoint_id = add_endpoint(state, f"https://{host}.example.com/x", kind="job")
        add_delivery(state, endpoint_id, job_id=name, runid=f"run-{name}")
    text = page(client, f"/deliveries?{query}").text
    assert re.findall(r"([ab]) · run-", text) == expected


@pytest.mark.parametrize("query", ["status=unknown", "since=never", "host=%00", "job_id=" + "x" * 600])
def test_a_filter_that_makes_no_sense_is_explained(client: FlaskClient, query: str) -> None:
    found = page(client, f"/deliveries?{query}")
    assert any("rqw-error" in (attributes.get("class") or "") for _tag, attributes in found.tags)


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00%2B14:00", "9999-12-31T23:59-14:00", "0001-01-01", "9999-12-31"]
)
def test_times_at_the_ends_of_time(client: FlaskClient, moment: str) -> None:
    for name in ("since", "until"):
        page(client, f"/deliveries?{name}={moment}")


def test_search_finds_by_whole_names(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state, "https://one.example.com:8443/x")
    delivery_id = add_delivery(state, endpoint_id, job_id="the/job id", runid="run-1")
    event_id = storage_rows.row(state.database, Event).id
    for text, path in (
        (delivery_id, f"/deliveries/{delivery_id}"),
        (event_id, f"/events/{event_id}"),
        (endpoint_id, f"/endpoints/{endpoint_id}"),
        ("the/job id", "/deliveries?job_id=the/job+id"),
        ("run-1", "/deliveries?runid=run-1"),
        ("one.example.com:8443", "/deliveries?host=one.example.com:8443"),
        (" https://user@ONE.example.com:8443/x?y ", "/deliveries?host=one.example.com:8443"),
        ("job.failure", "/deliveries?event=job.failure"),
    ):
        response = client.get(f"{PREFIX}/deliveries", query_string={"q": text})
        assert (response.status_code, response.headers["Location"]) == (302, PREFIX + path), text
    for text in ("nothing", "\0", "x" * 3000, "http://[", "dlv_unknown", HOSTILE, "\ud800"[:0] + "\u202e"):
        assert client.get(f"{PREFIX}/deliveries", query_string={"q": text}).status_code == 200, text


# -- what is shown to nobody ----------------------------------------------------------------------------


def test_alarms(client: FlaskClient, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No dispatcher is alive" in page(client, "/").text
    heartbeat(state.database, "dsp_1", started=True)
    quiet = Page(client.get(PREFIX + "/"))
    assert not [1 for _tag, attributes in quiet.tags if "rqw-alarm" in (attributes.get("class") or "")]
    endpoint_id = add_endpoint(state)
    delivery_id = add_delivery(state, endpoint_id)
    storage_rows.set_values(
        state.database, Delivery, delivery_id, next_attempt_at=datetime.now(UTC) - timedelta(minutes=7)
    )
    add_watch(state, endpoint_id, "slow", created_at=datetime.now(UTC) - timedelta(days=2))
    submit(client, page(client, f"/endpoints/{endpoint_id}"), "/disable")
    monkeypatch.setattr(monitoring, "OUTBOX_LONG", 2)
    for number in range(3):
        state.outbox.append({"number": number})
    state.redis.xadd(state.outbox.rejected_key, {"why": "not JSON"})
    text = page(client, "/").text
    for sentence in (
        "The oldest due delivery has been due for 7 min",
        "1 standing endpoints are disabled",
        "has been waiting for 2 d",
        "3 callbacks wait in the outbox",
        "1 outbox entries were set aside",
    ):
        assert sentence in text


def test_the_state_of_the_job_in_rq(client: FlaskClient, state: State) -> None:
    job = rq.Queue("low", connection=state.redis).enqueue(time.time)
    endpoint_id = add_endpoint(state)
    for job_id, shown in (
        (job.id, "Job status queued in queue low"),
        ("gone", "Job status no longer in Redis"),
    ):
        delivery_id = add_delivery(state, endpoint_id, job_id=job_id)
        assert shown in page(client, f"/deliveries/{delivery_id}").text


def test_redis_down_is_an_alarm_and_pages_go_on(sqlite_url: str, allowed: set[str]) -> None:
    with open_host(sqlite_url, "redis://127.0.0.1:1/0", allowed) as (app, state):
        delivery_id = add_delivery(state, add_endpoint(state))
        client = app.test_client()
        assert "Redis cannot be reached" in page(client, "/").text
        assert "Job status unknown" in page(client, f"/deliveries/{delivery_id}").text


# -- overview ---------------------------------------------------------------------------------------------


def test_the_overview_counts_what_is_there(client: FlaskClient, state: State) -> None:
    endpoint_id = add_endpoint(state, kind="job")
    for number in range(4):
        add_delivery(state, endpoint_id, job_id=f"good-{number}")
    attempt_all(state, storage_rows.SUCCEEDED, duration_ms=80.0)
    add_delivery(state, endpoint_id, job_id="bad")
    attempt_all(state, storage_rows.EXHAUSTED, duration_ms=2500.0, error_code="http_5xx")
    add_delivery(state, endpoint_id, job_id="waiting")
    add_watch(state, endpoint_id, "open")
    found = page(client, "/")
    assert "Success rate 80.0 %" in found.text
    assert "Latency 80 ms p95 2.5 s" in found.text
    assert "Backlog 1" in found.text
    assert "Waiting jobs 1" in found.text
    bars = {attributes["class"] for tag, attributes in found.tags if tag == "rect"}
    assert {"rqw-bar-succeeded", "rqw-bar-exhausted"} == {bar for bar in bars if bar and "bar" in bar}
    assert f"{datetime.now(UTC):%Y-%m-%d %H}:00 4 1 0" in found.text  # the table below the chart
    svg = [attributes for tag, attributes in found.tags if tag == "svg" and attributes.get("role") == "img"]
    assert svg[0]["aria-labelledby"] == "rqw-chart-title rqw-chart-desc"


def test_the_overview_looks_sooner_while_nothing_is_delivered(client: FlaskClient, state: State) -> None:
    def refresh_s() -> list[str | None]:
        tags = page(client, "/").tags
        return [fields["data-rqw-refresh"] for _tag, fields in tags if "data-rqw-refresh" in fields]

    assert refresh_s() == [str(REFRESH_ALARM_S)]  # no dispatcher is alive
    heartbeat(state.database, "dsp_x", started=True)
    assert refresh_s() == [str(REFRESH_IDLE_S)]


def test_pages_refresh_only_while_something_is_in_flight(client: FlaskClient, state: State) -> None:
    delivery_id = add_delivery(state, add_endpoint(state))

    def seconds() -> str | None:
        found = page(client, f"/deliveries/{delivery_id}")
        (attributes,) = [attributes for _tag, attributes in found.tags if attributes.get("id") == "rqw-page"]
        return attributes.get("data-rqw-refresh")

    assert seconds() == "2"
    attempt_all(state, storage_rows.retry_in(300))
    assert seconds() == "15"
    storage_rows.set_values(state.database, Delivery, delivery_id, status="succeeded", next_attempt_at=None)
    assert seconds() is None


# -- hosts of many kinds ----------------------------------------------------------------------------------


def test_under_a_prefix_behind_a_proxy(sqlite_url: str, redis_url: str, allowed: set[str]) -> None:
    with open_host(sqlite_url, redis_url, allowed, RQ_WEBHOOKS_URL_PREFIX="/admin/webhooks") as (app, state):
        app.wsgi_app = ProxyFix(app.wsgi_app, x_prefix=1, x_proto=1, x_host=1)  # type: ignore[method-assign]
        client = app.test_client()
        proxied = {
            "X-Forwarded-Prefix": "/tenant", "X-Forwarded-Proto": "https",
            "X-Forwarded-Host": "www.example.com", "Sec-Fetch-Site": "same-origin",
        }  # fmt: skip
        endpoint_id = add_endpoint(state)
        response = client.get(f"/admin/webhooks/endpoints/{endpoint_id}", headers=proxied)
        found = Page(response)
        addresses = [*found.links, *(form["action"] for form in found.forms)]
        addresses += [attributes["href"] or "" for tag, attributes in found.tags if tag == "link"]
        addresses += [attributes["src"] or "" for tag, attributes in found.tags if tag == "script"]
        assert all(address.startswith(("/tenant/admin/webhooks/", "#")) for address in addresses), addresses
        form = found.form("/test")
        answer = client.post(
            form["action"].removeprefix("/tenant"), data=form["fields"], base_url="https://www.example.com",
            headers={**proxied, "Cookie": response.headers["Set-Cookie"].partition(";")[0]},
        )  # fmt: skip
        assert answer.status_code == 303
        assert answer.headers["Location"].startswith("/tenant/admin/webhooks/deliveries/dlv_")


def test_beside_a_global_csrf_protect(sqlite_url: str, redis_url: str, allowed: set[str]) -> None:
    with open_host(sqlite_url, redis_url, allowed) as (app, state):
        CSRFProtect(app)
        app.add_url_rule("/own", view_func=lambda: "", methods=["POST"], endpoint="own")
        client = app.test_client()
        endpoint_id = add_endpoint(state)
        found = page(client, f"/endpoints/{endpoint_id}")
        assert submit(client, found, "/disable").status_code == 200
        assert not storage_rows.row(state.database, Endpoint).enabled
        assert client.post(f"{PREFIX}/endpoints/{endpoint_id}/enable").status_code == 403
        assert client.post("/own").status_code == 400  # theirs is still theirs


def test_inside_the_layout_of_a_host(
    sqlite_url: str, redis_url: str, allowed: set[str], tmp_path: Path
) -> None:
    (tmp_path / "admin.html").write_text(
        "<html><head><title>{% block title %}{% endblock %} – Admin</title>{% block head %}<meta name=mine>"
        "{% endblock %}</head><body><nav>Own menu</nav><main>{% block content %}{% endblock %}</main></body>"
    )
    with open_host(
        sqlite_url, redis_url, allowed, template_folder=str(tmp_path), RQ_WEBHOOKS_BASE_TEMPLATE="admin.html"
    ) as (app, state):
        ids = add_hostile(state)
        client = app.test_client()
        for path in (*PAGES, *MANAGED_PAGES):
            response = client.get(PREFIX + filled(path, ids))
            found = Page(response)
            assert found.text.count("Own menu") == 1
            assert "· Webhooks – Admin" in found.text
            assert "dashboard.css" in response.text
            assert "<meta name=mine>" in response.text
            assert [tag for tag, _ in found.tags].count("main") == 1
            # The host's own styles and scripts are not ours to forbid.
            assert response.headers["Content-Security-Policy"] == "frame-ancestors 'self'"


def test_the_roles_of_a_login_extension_decide(sqlite_url: str, redis_url: str) -> None:
    """As with Flask-Login and Flask-Security: the caller's roles, looked up in the request."""
    roles = {"alice": {"operator"}, "bob": {"support"}, "eve": set()}

    class Permissions(set[str]):
        def __contains__(self, permission: object) -> bool:
            mine = roles.get(request.headers.get("X-User", ""), set())
            return "operator" in mine or (permission == "read" and "support" in mine)

    with open_host(sqlite_url, redis_url, Permissions()) as (app, _state):
        client = app.test_client()
        paths = ("/", "/endpoints/new")
        seen = {
            name: [client.get(PREFIX + path, headers={"X-User": name}).status_code for path in paths]
            for name in (*roles, "nobody")
        }  # fmt: skip
    assert seen == {"alice": [200, 200], "bob": [200, 403], "eve": [403, 403], "nobody": [403, 403]}


# -- the host's own pages ---------------------------------------------------------------------------------

JOB_PAGE = "{% from 'rq_webhooks/_macros.html' import webhook_of_job %}<h1>Mine</h1>{{ webhook_of_job(id) }}"


def job_page(app: Flask, job_id: str) -> str:
    with app.test_request_context("/"):
        return render_template_string(JOB_PAGE, id=job_id)


def test_a_hosts_job_page_shows_the_webhook(host: tuple[Flask, State], allowed: set[str]) -> None:
    app, state = host
    endpoint_id = add_endpoint(state, "https://hooks.example.com/in?key=k3y", kind="job")
    delivery_id = add_delivery(state, endpoint_id, job_id="job-1", runid=HOSTILE)
    attempt_all(state, storage_rows.retry_in(60), status_code=None, error_code="dns", error_detail="internal")
    text = job_page(app, "job-1")
    assert "https://hooks.example.com/in" in text
    assert "k3y" not in text
    assert (
        "failed, <bdi>unreachable</bdi>" in text
    )  # coarse: whether a name exists is not the client's business
    assert f'href="/webhooks/deliveries/{delivery_id}"' in text
    allowed.discard("read")
    assert "href" not in job_page(app, "job-1")
    allowed.discard("status")
    assert job_page(app, "job-1").strip() == "<h1>Mine</h1>"


def test_a_hosts_job_page_without_webhook_or_database(
    host: tuple[Flask, State], tmp_path: Path, redis_url: str, allowed: set[str]
) -> None:
    app, _state = host
    assert job_page(app, HOSTILE).strip() == "<h1>Mine</h1>"
    with open_host(f"sqlite:///{tmp_path / 'x.db'}", redis_url, allowed) as (broken, state):
        state.database.dispose()
        state.database.url = state.database.url.set(database=str(tmp_path / "none" / "x.db"))
        state.database.engine = state.database._create_engine(None, {}, 1)
        assert job_page(broken, "job-1").strip() == "<h1>Mine</h1>"


def test_the_hosts_job_page_never_shows_hostile_markup(host: tuple[Flask, State]) -> None:
    app, state = host
    ids = add_hostile(state)
    bound = add_endpoint(state, "https://hooks.example.com/in", kind="job")
    add_delivery(state, bound, job_id="job-2", runid=HOSTILE, type="job.success", result=HOSTILE)
    text = job_page(app, "job-2") + job_page(app, HOSTILE)
    assert ids
    assert "<script" not in text
    assert "<img" not in text


def test_curl_quotes_whatever_a_body_holds(client: FlaskClient, state: State) -> None:
    delivery_id = add_delivery(state, add_endpoint(state))
    for body in (b"$(touch /tmp/x) `id` '; rm -rf / #\n@file", b"\xff\x00binary", "ü \u202e".encode()):
        storage_rows.set_values(state.database, Delivery, delivery_id, body=body)
        found = page(client, f"/deliveries/{delivery_id}")
        command = next(word for word in found.words if "curl 'https" in word or "curl https" in word)
        words = shlex.split(command.replace("\\\n", ""))
        if "|" in words:
            assert b64decode(words[2]) == body
        else:
            assert words[words.index("--data-raw") + 1].encode() == body
