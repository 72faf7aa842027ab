"""The operators' JSON API: lists, changes, standing endpoints, and who may."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from flask import request, session
from flask_wtf import CSRFProtect

from flask_rq_webhooks.observe.publisher import safe_render
from flask_rq_webhooks.protocol.events import JOB_SUCCESS, Occurrence, format_time
from flask_rq_webhooks.storage.dispatchers import paused_since
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.web import operations
from flask_rq_webhooks.web.operations import AT_MOST, PER_PART
from tests.integration.hosts import Host

HOOK = "https://receiver.example.com/hooks/T0000000/XXXXXXXXXXXXXXXXXXXXXXXX?key=hidden"


def create(host: Host, **values: Any) -> dict[str, Any]:
    response = host.post("/webhooks/api/endpoints", json={"url": HOOK, **values})
    assert response.status_code == 201, response.text
    return dict(response.get_json())


def succeed(host: Host, *job_ids: str, runid: str = "r1", result: Any = 42) -> None:
    """Store the success of jobs, one transaction each."""
    for job_id in job_ids:
        now = datetime.now(UTC)
        occurrence = Occurrence(
            type=JOB_SUCCESS, occurred_at=now, source="callback", job_id=job_id, run=format_time(now),
            runid=runid, enqueued_at=now, started_at=now, ended_at=now, result=result,
        )  # fmt: skip
        ingest(host.state.database, [IngestItem(occurrence)], render=safe_render(host.state), max_attempts=3)


def succeed_many(host: Host, count: int) -> None:
    """Store the success of many jobs, in one transaction."""
    now = datetime.now(UTC)
    items = [
        IngestItem(
            Occurrence(
                type=JOB_SUCCESS,
                occurred_at=now,
                source="callback",
                job_id=f"job-{number}",
                run=format_time(now),
                enqueued_at=now,
            )  # fmt: skip
        )
        for number in range(count)
    ]
    ingest(host.state.database, items, render=safe_render(host.state), max_attempts=3)


def get(at: Host, path: str, **query: Any) -> Any:
    response = at.app.test_client().get(f"/webhooks/api/{path}", query_string=query)
    assert response.status_code == 200, response.text
    return response.get_json()


def set_deliveries(host: Host, **values: Any) -> None:
    with host.state.database.write() as connection:
        changes = ", ".join(f"{name} = :{name}" for name in values)
        connection.execute(sa.text(f"UPDATE rq_webhooks_delivery SET {changes}"), values)


def age_events(host: Host) -> None:
    """Let the events be older than what the feed stays behind."""
    with host.state.database.write() as connection:
        connection.execute(sa.text("UPDATE rq_webhooks_event SET created_at = '2024-01-01 00:00:00.000000'"))


# Who may


READS = [
    "deliveries",
    "deliveries/x",
    "endpoints",
    "endpoints/x",
    "events",
    "events/x",
    "stats",
    "csrf",
    "tenants",
]
CHANGES = [
    ("POST", "deliveries/x/resend"), ("POST", "recover"), ("POST", "cancel"), ("POST", "pause"),
    ("POST", "resume"), ("POST", "endpoints"), ("PATCH", "endpoints/x"), ("DELETE", "endpoints/x"),
    ("POST", "endpoints/x/rotate"), ("POST", "endpoints/x/test"), ("POST", "endpoints/x/enable"),
    ("POST", "endpoints/x/disable"), ("POST", "erase"), ("POST", "tenants/disable"),
]  # fmt: skip


@pytest.mark.parametrize("granted", ["nobody asked", "none", "read"])
def test_every_route_needs_its_permission(host: Host, granted: str) -> None:
    if granted == "nobody asked":
        host.webhooks.authorize_function = None
    else:
        host.webhooks.authorize(lambda permission, **what: permission == granted)
    client = host.app.test_client()

    reads = [client.get(f"/webhooks/api/{path}").status_code for path in READS]
    changes = [
        client.open(f"/webhooks/api/{path}", method=method, json={}).status_code for method, path in CHANGES
    ]

    assert 403 not in reads if granted == "read" else set(reads) == {403}
    assert set(changes) == {403}
    assert not paused_since(host.state.database)


def test_these_are_all_the_routes(host: Host) -> None:
    """A route that is not in the lists above would go unasked for its permission."""
    listed = {("GET", path) for path in READS} | set(CHANGES)
    served = {
        (method, rule.rule.removeprefix("/webhooks/api/").replace("<endpoint_id>", "x")
         .replace("<delivery_id>", "x").replace("<event_id>", "x"))
        for rule in host.app.url_map.iter_rules()
        if rule.rule.startswith("/webhooks/api/")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }  # fmt: skip

    assert served == listed


@pytest.mark.parametrize("path", ["deliveries/x", "endpoints/x", "events/x"])
def test_unknown_ids_are_404(host: Host, path: str) -> None:
    response = host.app.test_client().get(f"/webhooks/api/{path}")

    assert response.status_code == 404
    assert response.get_json()["error"]["code"] == "not_found"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", [path for method, path in CHANGES if method == "POST" and "/x/" in path])
def test_changes_of_unknown_ids_are_404(host: Host, path: str) -> None:
    assert host.post(f"/webhooks/api/{path}", json={}).status_code == 404


# Lists


def test_deliveries_by_filter_and_page(host: Host) -> None:
    endpoint = create(host)
    succeed(host, "a", "b", "c", runid="r1")
    succeed(host, "d", runid="r2")

    first = get(host, "deliveries", limit=3)
    second = get(host, "deliveries", limit=3, cursor=first["cursor"])

    assert [item["job_id"] for item in first["items"] + second["items"]] == ["d", "c", "b", "a"]
    assert second["cursor"] is None
    item = first["items"][0]
    assert (item["endpoint_id"], item["status"], item["event"]) == (endpoint["id"], "pending", "job.success")
    assert "hidden" not in item["url"]
    assert "XXXX" not in item["url"]
    for query, expected in [
        ({"runid": "r2"}, ["d"]),
        ({"job_id": "b"}, ["b"]),
        ({"status": "succeeded,exhausted"}, []),
        ({"status": ["pending", "sending"]}, ["d", "c", "b", "a"]),
        ({"host": "receiver.example.com", "event": "job.success", "endpoint_id": endpoint["id"]},
         ["d", "c", "b", "a"]),
        ({"host": "other.example.com"}, []),
        ({"since": "2100-01-01T00:00:00Z"}, []),
        ({"until": "2100-01-01T00:00:00+00:00"}, ["d", "c", "b", "a"]),
        ({"limit": 100_000}, ["d", "c", "b", "a"]),
    ]:  # fmt: skip
        assert [found["job_id"] for found in get(host, "deliveries", **query)["items"]] == expected, query


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("deliveries", {"cursor": "made up"}, "cursor"),
        ("deliveries", {"limit": "0"}, "limit"),
        ("deliveries", {"limit": "many"}, "limit"),
        ("deliveries", {"status": "lost"}, "status"),
        ("deliveries", {"since": "yesterday"}, "since"),
        ("deliveries", {"since": "2024-01-01T00:00:00"}, "since"),
        ("deliveries", {"stauts": "pending"}, "stauts"),
        ("endpoints", {"kind": "other"}, "kind"),
        ("events", {"after": "made up"}, "cursor"),
        ("stats", {"hours": "0"}, "hours"),
    ],
)
def test_bad_queries(host: Host, path: str, query: dict[str, str], field: str) -> None:
    response = host.app.test_client().get(f"/webhooks/api/{path}", query_string=query)

    assert response.status_code == 400
    assert response.get_json()["error"]["code"] == "invalid"
    assert list(response.get_json()["error"]["details"]) == [field]


def test_delivery_with_everything_that_was_kept(host: Host) -> None:
    create(host, headers={"Authorization": "Bearer abc"})
    succeed(host, "a")
    (delivery,) = host.rows("delivery")
    with host.state.database.write() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO rq_webhooks_attempt (id, delivery_id, number, trigger, status, status_code,"
                " error_code, error_detail, started_at, duration_ms, request_headers, response_headers,"
                " response_body)"
                " VALUES ('att_1', :id, 1, 'scheduled', 'failed', 500, 'server_error', 'said so',"
                ' \'2024-01-01 00:00:00.000000\', 1.5, \'{"A": "***"}\', \'{"Server": "x"}\', :body)'
            ),
            {"id": delivery["id"], "body": b"<b>\xff</b>"},
        )

    found = get(host, f"deliveries/{delivery['id']}")

    assert found["body"].encode() == delivery["body"]
    (attempt,) = found["attempts"]
    assert (attempt["status_code"], attempt["error_detail"]) == (500, "said so")
    assert attempt["response_body"] == "<b>\ufffd</b>"
    assert attempt["request_headers"] == {"A": "***"}
    assert found["endpoint"]["headers"] == {"Authorization": "***"}
    assert found["event"]["job_id"] == "a"
    assert "abc" not in str(found)


def test_feed_of_events_goes_on_where_it_ended(host: Host) -> None:
    create(host)
    succeed(host, "a", "b")
    age_events(host)
    first = get(host, "events", limit=1)
    second = get(host, "events", after=first["cursor"])
    nothing = get(host, "events", after=second["cursor"])
    succeed(host, "c")
    age_events(host)
    third = get(host, "events", after=nothing["cursor"])

    seen = [item["job_id"] for page in (first, second, nothing, third) for item in page["items"]]
    assert seen == ["a", "b", "c"]
    payload = first["items"][0]["payload"]
    assert {"event", "job_id", "runid", "timestamp", "result"} <= set(payload)
    assert (payload["event"], payload["result"], payload["id"]) == (
        "job.success", 42, first["items"][0]["id"],
    )  # fmt: skip
    assert get(host, f"events/{payload['id']}") == first["items"][0]


def test_feed_of_one_run_needs_no_more_than_status(host: Host) -> None:
    create(host)
    succeed(host, "a", runid="mine")
    succeed(host, "b", runid="foreign")
    age_events(host)
    host.webhooks.authorize(lambda permission, **what: permission == "status" and what["runid"] == "mine")
    client = host.app.test_client()

    mine = client.get("/webhooks/api/events?runid=mine")
    others = [client.get(f"/webhooks/api/events{query}").status_code for query in ("", "?runid=foreign")]

    assert [item["job_id"] for item in mine.get_json()["items"]] == ["a"]
    assert others == [403, 403]


def test_stats(host: Host) -> None:
    create(host)
    succeed(host, "a", "b")

    numbers = get(host, "stats", hours=1)

    assert numbers["counts"]["pending"] == 2
    assert numbers["paused_since"] is None
    assert numbers["success_rate"] is None


# Changes


def test_resend(host: Host) -> None:
    create(host)
    succeed(host, "a")
    set_deliveries(host, status="succeeded", next_attempt_at=None, attempts=3)
    (before,) = host.rows("delivery")

    answers = [host.post(f"/webhooks/api/deliveries/{before['id']}/resend", json={}) for _ in range(2)]

    assert [(answer.status_code, answer.get_json()["status"]) for answer in answers] == [(202, "pending")] * 2
    (after,) = host.rows("delivery")
    assert (after["status"], after["trigger"], after["max_attempts"]) == ("pending", "manual", 4)
    assert (after["event_id"], after["body"]) == (before["event_id"], before["body"])


def test_cancel_and_recover_by_filter(host: Host) -> None:
    create(host)
    succeed(host, "a", "b", runid="r1")
    succeed(host, "c", runid="r2")

    canceled = host.post("/webhooks/api/cancel", json={"runid": "r1"})
    statuses = sorted(row["status"] for row in host.rows("delivery"))
    recovered = host.post("/webhooks/api/recover", json={"job_id": "a"})
    everything = host.post("/webhooks/api/cancel", json={"all": True})

    done = {"remaining": 0, "cursor": None}
    assert canceled.get_json() == {"canceled": 2, **done}
    assert statuses == ["canceled", "canceled", "pending"]
    assert recovered.get_json() == {"recovered": 1, **done}
    assert everything.get_json() == {"canceled": 2, **done}


def test_one_request_does_a_bounded_part_and_says_how_to_go_on(host: Host) -> None:
    create(host)
    succeed_many(host, AT_MOST + 40)
    one, another = ({"all": True}, {"status": ["canceled"]})

    first = host.post("/webhooks/api/cancel", json=one).get_json()
    rest = host.post("/webhooks/api/cancel", json={**one, "cursor": first["cursor"]}).get_json()
    again = host.post("/webhooks/api/recover", json=another).get_json()
    last = host.post("/webhooks/api/recover", json={**another, "cursor": again["cursor"]}).get_json()

    assert (first["canceled"], first["remaining"]) == (AT_MOST, 40)
    assert rest == {"canceled": 40, "remaining": 0, "cursor": None}
    assert (again["recovered"], again["remaining"]) == (AT_MOST, 40)
    assert last == {"recovered": 40, "remaining": 0, "cursor": None}
    assert {row["status"] for row in host.rows("delivery")} == {"pending"}


def test_a_request_stops_when_its_time_is_over(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    create(host)
    succeed_many(host, PER_PART + 10)
    monkeypatch.setattr(operations, "ENOUGH_S", 0.0)

    answer = host.post("/webhooks/api/cancel", json={"all": True}).get_json()

    assert (answer["canceled"], answer["remaining"]) == (PER_PART, 10)
    assert answer["cursor"] is not None


def test_an_endpoint_with_many_deliveries_is_deleted_in_parts(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint_id = create(host)["id"]
    succeed_many(host, 2100)
    monkeypatch.setattr(operations, "ENOUGH_S", 0.0)

    client = host.app.test_client()
    first, second, third, fourth = (client.delete(f"/webhooks/api/endpoints/{endpoint_id}") for _ in range(4))

    assert (first.status_code, first.get_json()["enabled"]) == (202, False)
    assert first.get_json()["disabled_reason"] == "deleted"
    assert (second.status_code, third.status_code, fourth.status_code) == (202, 204, 404)
    assert host.rows("delivery") == host.rows("endpoint") == []


@pytest.mark.parametrize("path", ["cancel", "recover"])
def test_a_cursor_is_no_filter_and_must_be_one_of_ours(host: Host, path: str) -> None:
    create(host)
    succeed(host, "a")

    alone = host.post(f"/webhooks/api/{path}", json={"cursor": "dlv_" + "0" * 26})
    strange = host.post(f"/webhooks/api/{path}", json={"all": True, "cursor": "x"})

    assert (alone.status_code, strange.status_code) == (400, 400)
    assert list(alone.get_json()["error"]["details"]) == ["all"]
    assert list(strange.get_json()["error"]["details"]) == ["cursor"]
    assert [row["status"] for row in host.rows("delivery")] == ["pending"]


@pytest.mark.parametrize("path", ["cancel", "recover"])
@pytest.mark.parametrize("body", [{}, {"all": False}, {"statsu": "pending"}, {"status": []}, [], "all"])
def test_nothing_is_changed_by_mistake(host: Host, path: str, body: Any) -> None:
    create(host)
    succeed(host, "a")

    response = host.post(f"/webhooks/api/{path}", json=body)

    assert response.status_code == 400
    assert [row["status"] for row in host.rows("delivery")] == ["pending"]


def test_pause_and_resume(host: Host) -> None:
    paused = host.post("/webhooks/api/pause", json={})
    assert paused.get_json() == {"paused": True}
    assert paused_since(host.state.database)
    assert get(host, "stats")["paused_since"] is not None
    resumed = host.post("/webhooks/api/resume", json={})
    assert resumed.get_json() == {"paused": False}
    assert not paused_since(host.state.database)


def test_form_bodies_are_refused(host: Host) -> None:
    response = host.post("/webhooks/api/cancel", data={"all": "1"})

    assert response.status_code == 415
    assert response.get_json()["error"]["code"] == "not_json"


# Standing endpoints


def test_endpoint_is_created_and_its_secret_shown_once(host: Host) -> None:
    made = create(
        host,
        headers={"Authorization": "Bearer abc"},
        events=["job.failure", "model.published", "*"],
        format="standard",
        description="the archive",
        timeout_s=3,
        max_attempts=2,
        reference="ref",
    )

    assert made["secret"].startswith("whsec_")
    (row,), (secret,) = host.rows("endpoint"), host.rows("secret")
    assert (row["kind"], row["url"], row["host"]) == ("standing", HOOK, "receiver.example.com")
    assert (row["format"], row["timeout_s"], row["max_attempts"]) == ("standard", 3, 2)
    assert host.state.cipher.decrypt(secret["secret"]) == made["secret"]
    shown = get(host, f"endpoints/{made['id']}")
    assert shown == {name: value for name, value in made.items() if name != "secret"}
    assert (shown["secrets"], shown["headers"]) == (1, {"Authorization": "***"})
    assert shown["events"] == ["job.failure", "model.published", "*"]
    assert get(host, "endpoints")["items"] == [shown]
    assert "hidden" not in str(shown)


def test_own_secret_and_none(host: Host) -> None:
    assert create(host, secret="  own ")["secret"] == "  own "
    unsigned = create(host, secret=None)
    assert (unsigned["secret"], unsigned["secrets"]) == (None, 0)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": None}, "url"),
        ({"events": []}, "events"),
        ({"events": ["Job Success"]}, "events"),
        ({"format": "xml"}, "format"),
        ({"secret": ""}, "secret"),
        ({"headers": {"Host": "x"}}, "headers"),
        ({"scope": "forest"}, "scope"),
        ({"sign_payload": True}, "sign_payload"),
        ({"timeout_s": 99}, "timeout_s"),
        ({"enabled": False}, "enabled"),
        ({"description": "NUL \0"}, "description"),
    ],
)
def test_bad_endpoints(host: Host, values: dict[str, Any], field: str) -> None:
    response = host.post("/webhooks/api/endpoints", json={"url": HOOK, **values})

    assert response.status_code == 400
    assert list(response.get_json()["error"]["details"]) == [field]
    assert host.rows("endpoint") == []


def test_endpoint_is_changed(host: Host) -> None:
    made = create(host, headers={"A": "b"}, description="old")
    client = host.app.test_client()

    changed = client.patch(
        f"/webhooks/api/endpoints/{made['id']}",
        json={"url": "https://new.example.com/in", "headers": {}, "events": None, "max_attempts": None},
    )
    refused = client.patch(f"/webhooks/api/endpoints/{made['id']}", json={"secret": "x"})
    unknown = client.patch("/webhooks/api/endpoints/ep_x", json={"description": "x"})

    assert changed.status_code == 200
    (row,) = host.rows("endpoint")
    assert (row["url"], row["host"]) == ("https://new.example.com/in", "new.example.com")
    assert (row["description"], row["headers"]) == ("old", None)
    assert refused.status_code == 400
    assert unknown.status_code == 404


def test_rotation_shows_the_new_secret_once_and_keeps_the_old_one_for_a_while(host: Host) -> None:
    made = create(host)

    rotated = host.post(f"/webhooks/api/endpoints/{made['id']}/rotate", json={"grace_s": 60}).get_json()
    own = host.post(f"/webhooks/api/endpoints/{made['id']}/rotate", json={"secret": "own"}).get_json()

    assert rotated["secret"].startswith("whsec_")
    assert rotated["secret"] != made["secret"]
    assert own["secret"] == "own"
    assert get(host, f"endpoints/{made['id']}")["secrets"] == 3


def test_disable_enable_and_delete(host: Host) -> None:
    made = create(host)
    succeed(host, "a")
    path = f"/webhooks/api/endpoints/{made['id']}"

    disabled = host.post(f"{path}/disable", json={}).get_json()
    enabled = host.post(f"{path}/enable", json={}).get_json()
    deleted = host.app.test_client().delete(path)

    assert (disabled["enabled"], disabled["disabled_reason"]) == (False, "operator")
    assert (enabled["enabled"], enabled["disabled_at"]) == (True, None)
    assert deleted.status_code == 204
    assert host.rows("endpoint") == host.rows("delivery") == []


def test_ping_goes_through_the_pipeline(host: Host) -> None:
    made = create(host, events=["job.failure"])

    response = host.post(f"/webhooks/api/endpoints/{made['id']}/test", json={})

    assert response.status_code == 202
    (delivery,) = host.rows("delivery")
    assert (delivery["endpoint_id"], delivery["status"]) == (made["id"], "pending")
    (event,) = host.rows("event")
    assert (event["id"], event["type"]) == (response.get_json()["event_id"], "webhook.ping")


def test_job_bound_endpoints_are_shown_and_not_changed(host: Host) -> None:
    def build() -> Any:
        return {"job_id": host.enqueue()}

    host.route(build)
    host.post()
    (bound,) = get(host, "endpoints", kind="job")["items"]

    assert get(host, "endpoints")["items"] == []
    path = f"/webhooks/api/endpoints/{bound['id']}"
    answers = [host.post(f"{path}/{action}", json={}) for action in ("rotate", "test", "enable", "disable")]
    answers += [host.app.test_client().delete(path), host.app.test_client().patch(path, json={"url": HOOK})]
    assert {answer.status_code for answer in answers} == {404}
    assert len(host.rows("endpoint")) == 1


# Forged requests


@pytest.fixture(params=["without CSRFProtect", "CSRFProtect before us", "CSRFProtect after us"])
def cookie_host(request: pytest.FixtureRequest, make_host: Callable[..., Host], monkeypatch: Any) -> Host:
    """Give a host whose operators are known by session, with and without a global CSRFProtect."""
    if request.param == "CSRFProtect before us":
        from tests.integration import hosts

        original = hosts.SQLAlchemy

        def protected_first(app: Any) -> Any:
            CSRFProtect(app)
            return original(app)

        monkeypatch.setattr(hosts, "SQLAlchemy", protected_first)
    host = make_host()
    if request.param == "CSRFProtect after us":
        CSRFProtect(host.app)
    host.webhooks.authorize(may_operate)

    @host.app.get("/login")
    def login() -> str:
        session["user"] = "operator"
        return "welcome"

    return host


def may_operate(permission: str, **what: Any) -> bool:
    return session.get("user") == "operator" or request.headers.get("Authorization") == "Bearer operator"


def test_caller_known_by_cookie_needs_the_token(cookie_host: Host) -> None:
    client = cookie_host.app.test_client()
    client.get("/login")
    token = client.get("/webhooks/api/csrf").get_json()["csrf_token"]
    elsewhere = cookie_host.app.test_client()
    elsewhere.get("/login")
    foreign_token = elsewhere.get("/webhooks/api/csrf").get_json()["csrf_token"]

    for headers in (
        {},
        {"X-CSRFToken": "made up"},
        {"X-CSRFToken": foreign_token},
        {"X-CSRFToken": token[:-1]},
    ):
        forged = client.post("/webhooks/api/pause", headers=headers)
        assert forged.status_code == 403
        assert forged.get_json()["error"]["code"] == "csrf"
    assert not paused_since(cookie_host.state.database)

    assert client.post("/webhooks/api/pause", headers={"X-CSRFToken": token}).status_code == 200
    assert paused_since(cookie_host.state.database)


def test_caller_with_own_credentials_needs_none(cookie_host: Host) -> None:
    client = cookie_host.app.test_client()

    response = client.post("/webhooks/api/pause", headers={"Authorization": "Bearer operator"})

    assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}],
    ids=str,
)
def test_another_site_may_change_nothing_even_without_cookies(host: Host, headers: dict[str, str]) -> None:
    response = host.app.test_client().post("/webhooks/api/pause", headers=headers)

    assert response.status_code == 403
    assert not paused_since(host.state.database)


def test_csrf_protect_still_guards_the_hosts_own_routes(make_host: Callable[..., Host]) -> None:
    host = make_host()
    CSRFProtect(host.app)
    host.app.add_url_rule("/own", view_func=lambda: "done", methods=["POST"])

    assert host.app.test_client().post("/own").status_code == 400


def test_app_without_secret_key_serves_callers_without_cookies(make_host: Callable[..., Host]) -> None:
    host = make_host(RQ_WEBHOOKS_ENCRYPTION_KEYS=["a key for tests"])
    host.app.secret_key = None
    client = host.app.test_client()

    assert client.post("/webhooks/api/pause").status_code == 200
    client.set_cookie("other", "1")
    assert client.post("/webhooks/api/resume").status_code == 403
    assert client.get("/webhooks/api/csrf").get_json() == {"csrf_token": ""}


# SQL gone


def test_sql_unreachable_is_503(host: Host, tmp_path: Any) -> None:
    host.state.database.dispose()
    (tmp_path / "host.db").rename(tmp_path / "away.db")
    (tmp_path / "host.db").mkdir()
    try:
        response = host.app.test_client().get("/webhooks/api/deliveries")
        status = host.app.test_client().get("/webhooks/jobs/x")
        health = host.app.test_client().get("/webhooks/health")
    finally:
        (tmp_path / "host.db").rmdir()
        (tmp_path / "away.db").rename(tmp_path / "host.db")

    assert (response.status_code, status.status_code, health.status_code) == (503, 503, 503)
    assert response.get_json()["error"]["code"] == "unavailable"
    assert int(response.headers["Retry-After"]) > 0
    assert "host.db" not in response.text + status.text + health.text
