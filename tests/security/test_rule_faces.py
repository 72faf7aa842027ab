"""SECURITY 13–18: who is answered what, and what those who write where they should not can do."""

from __future__ import annotations

import json
import logging
import pickle
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import redirect
from werkzeug.routing import Rule

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.observe.conclusions import CALLBACK_GRACE
from flask_rq_webhooks.queue.safe_pickle import load_plain
from flask_rq_webhooks.storage.dispatchers import paused_since
from flask_rq_webhooks.storage.endpoints import confirm
from tests.integration.hosts import FIELDS, Host
from tests.pipeline import (
    add_endpoint,
    deliveries,
    enqueue,
    events,
    open_state,
    work,
)
from tests.security.conftest import MakeHost
from tests.servers import Receiver

#: Open to everybody: says whether a dispatcher is alive; our own style sheet and script.
OPEN = {"rq_webhooks.health", "rq_webhooks.keys", "rq_webhooks.static"}


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return make_host()


def routes(host: Host) -> list[tuple[str, str, Rule]]:
    """Return method, path and rule of everything we serve, added by us or by the host."""
    found = []
    for rule in host.app.url_map.iter_rules():
        if not rule.endpoint.startswith("rq_webhooks."):
            continue
        path = rule.rule
        for argument in rule.arguments:
            for converter in ("", "path:"):
                path = path.replace(f"<{converter}{argument}>", "dlv_x")
        for method in sorted((rule.methods or set()) - {"OPTIONS"}):
            found.append((method, path, rule))
    assert len(found) > 30
    return found


def everything(host: Host) -> dict[str, list[dict[str, Any]]]:
    tables = ("endpoint", "secret", "watch", "event", "delivery", "attempt", "dispatcher")
    return {table: host.rows(table) for table in tables}


# -- who may ----------------------------------------------------------------------------------------------


def no(permission: str, **what: Any) -> bool:
    return False


async def yes_in_a_coroutine(permission: str, **what: Any) -> bool:
    return True


def to_the_login(permission: str, **what: Any) -> Any:
    return redirect("/login")


def with_a_status(permission: str, **what: Any) -> Any:
    return "Forbidden", 403


def yes_as_an_object(permission: str, **what: Any) -> Any:
    class Future:
        def __await__(self) -> Any:
            yield

    return Future()


@pytest.mark.parametrize(
    "function",
    [None, no, yes_in_a_coroutine, to_the_login, with_a_status, yes_as_an_object],
    ids=lambda function: getattr(function, "__name__", "nobody asked"),
)
def test_without_permission_every_route_is_closed(host: Host, function: Any) -> None:
    host.post(json=FIELDS)
    host.webhooks.authorize_function = function
    before = everything(host)
    client = host.app.test_client()

    for method, path, rule in routes(host):
        answer = client.open(path, method=method, json={} if method in ("POST", "PATCH") else None)
        if rule.endpoint in OPEN:
            continue
        assert answer.status_code in (403, 404), (method, path)
        if method == "GET" and "<" not in rule.rule:
            assert answer.status_code == 403, path
        assert "example.com" not in answer.text

    assert everything(host) == before


@pytest.mark.parametrize("granted", ["status", "read"])
def test_no_lesser_permission_changes_anything(host: Host, granted: str) -> None:
    created = host.app.test_client().post("/webhooks/api/endpoints", json={"url": "https://a.example.com/"})
    host.webhooks.authorize(lambda permission, **what: permission == granted)
    before = everything(host)
    client = host.app.test_client()
    ids = [created.get_json()["id"], "dlv_x"]

    for method, path, rule in routes(host):
        if method in ("GET", "HEAD"):
            continue
        for item_id in ids:
            answer = client.open(path.replace("dlv_x", item_id), method=method, json={})
            assert answer.status_code == 403, (method, path, rule.endpoint)

    assert everything(host) == before


def test_who_may_only_ask_for_a_status_reads_nothing_else(host: Host) -> None:
    host.webhooks.authorize(lambda permission, **what: permission == "status")
    client = host.app.test_client()
    published = {"rq_webhooks.job", "rq_webhooks.job_webhook"} | OPEN

    for method, path, rule in routes(host):
        if method == "GET" and rule.endpoint not in published:
            assert client.get(path).status_code in (403, 404), path
    assert client.get("/webhooks/api/events?runid=r1").status_code == 200
    assert client.get("/webhooks/api/events").status_code == 403


def test_unknown_and_impossible_ids_look_alike(host: Host) -> None:
    client = host.app.test_client()
    for kind in ("deliveries", "endpoints", "events"):
        answers = {
            client.get(f"/webhooks/api/{kind}/{item_id}").status_code
            for item_id in (
                "x",
                "%00",
                "a%00b",
                "x" * 600,
                "..%2f..%2fetc",
                "%ff%fe",
                "'%20OR%201=1--",
                "a%0d%0ab",
            )
        }
        assert answers == {404}
    for job_id in ("x", "a%00b", "x" * 600, "..%2f..%2fetc%2fpasswd", "%ff%fe", "%ed%a0%80"):
        answer = client.get(f"/webhooks/jobs/{job_id}")
        assert answer.status_code == 200
        assert answer.get_json()["webhook_configured"] is False


@pytest.mark.parametrize(
    "path",
    [
        "jobs/a%00b", "job/a%00b/webhook", "api/deliveries/%00", "api/events/%00", "api/endpoints/a%00",
        "deliveries/%00", "events/%00", "endpoints/%00",
    ],
)  # fmt: skip
def test_nul_in_a_path_is_no_error_of_any_database(database_url: str, make_host: MakeHost, path: str) -> None:
    assert make_host(database_url).app.test_client().get(f"/webhooks/{path}").status_code in (200, 404)


# -- headers of answers -----------------------------------------------------------------------------------


def test_every_answer_carries_the_safe_headers(host: Host) -> None:
    client = host.app.test_client()
    for method, path, rule in routes(host):
        if rule.endpoint == "rq_webhooks.static":
            continue
        answer = client.open(path, method=method, json={} if method in ("POST", "PATCH") else None)
        assert answer.headers["X-Content-Type-Options"] == "nosniff", path
        cached = "public, max-age=300" if rule.endpoint == "rq_webhooks.keys" else "no-store"
        assert answer.headers["Cache-Control"] == cached, path
        if answer.status_code == 200:
            policy = answer.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'"), path
            assert "frame-ancestors" in policy
            assert "unsafe" not in policy
        assert "Access-Control-Allow-Origin" not in answer.headers


# -- forged and hostile requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://["},
        {"Origin": "http://]"},
        {"Origin": ""},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://localhost@evil.example"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "nonsense"},
        {"Cookie": "other=1"},
        {"Cookie": "other=1", "X-CSRFToken": "\u00e9".encode().decode("latin-1")},
        {"Cookie": "other=1", "X-CSRFToken": ""},
        {"Cookie": "session=forged", "X-CSRFToken": "a.b"},
    ],
    ids=str,
)
def test_a_change_from_elsewhere_is_refused(host: Host, headers: dict[str, str]) -> None:
    answer = host.app.test_client(use_cookies=False).post("/webhooks/api/pause", headers=headers)

    assert answer.status_code == 403
    assert answer.get_json()["error"]["code"] == "csrf"
    assert not paused_since(host.state.database)


DEEP = 50_000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("[" * DEEP, 400),
        ('{"a":' * DEEP, 400),
        ("[" * 1000 + "]" * 1000, 400),
        ('{"max_attempts": ' + "9" * 5000 + "}", 400),
        ('{"url": "https://a.example.com", "timeout_s": NaN}', 400),
        ('{"url": "https://a.example.com", "timeout_s": 1e999}', 400),
        ('{"url": "https://a.example.com", "max_attempts": Infinity}', 400),
        ('{"url": "https://a.example.com", "description": "\\ud800"}', 400),
        ('{"url": "https://a.example.com", "\\ud800": 1}', 400),
        (b"\xff\xfe\x00", 400),
        (b"\x80\x04K\x01.", 400),
        (" " * 300_000, 413),
    ],
    ids=range(12),
)
def test_hostile_json_is_refused(host: Host, body: str | bytes, status: int) -> None:
    for path in ("endpoints", "recover", "cancel", "pause"):
        answer = host.app.test_client().post(
            f"/webhooks/api/{path}", data=body, content_type="application/json"
        )
        assert answer.status_code == status, path
        assert len(answer.data) < 2000
    assert host.rows("endpoint") == []


@pytest.mark.parametrize(
    "fields",
    [
        {"webhook_events": [1] * 50_000},
        {"webhook_events": ["job.unknown" + "x" * 50] * 50_000},
        {"webhook_events": [f"e{number}" for number in range(50_000)]},
        {"webhook_headers": {f"Host-{number}": 1 for number in range(50_000)}},
        {"webhook_headers": "[" * DEEP},
        {"webhook_format": "f" * 500_000},
        {"webhook_reference": "r" * 500_000},
        {"webhook_secret": "s" * 500_000},
        {"webhook_timeout": "1" * 500_000},
        {"webhook_retry_count": "9" * 500_000},
        {"webhook_url": "https://example.com/" + "x" * 500_000},
        {"sign_payload": [[]]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_refusal_is_small_however_large_the_request(host: Host, fields: dict[str, Any]) -> None:
    answer = host.post(json={"webhook_url": "https://hooks.example.com/", **fields})

    assert answer.status_code == 400
    assert len(answer.data) < 4000
    assert host.rows("endpoint") == []
    assert host.redis.keys("rq:*") == []


def test_many_unknown_fields_are_not_all_repeated(host: Host) -> None:
    client = host.app.test_client()
    many = {f"field{number}" + "x" * 300: 1 for number in range(500)}
    by_body = client.post("/webhooks/api/recover", json=many)
    by_query = client.get("/webhooks/api/deliveries", query_string=many)

    assert (by_body.status_code, by_query.status_code) == (400, 400)
    assert len(by_body.data) + len(by_query.data) < 20_000


@pytest.mark.parametrize(
    "cursor", ["x", "MQA", "MQ==", "..", "MWR", "%00", "\u0661", "MQ" * 5000, "MWV2dF8nIE9SIDE9MSAtLQ"]
)
def test_a_cursor_of_their_own_shows_nothing_more(host: Host, cursor: str) -> None:
    host.webhooks.authorize(lambda permission, **what: permission == "status" and what["runid"] == "mine")
    client = host.app.test_client()
    answer = client.get("/webhooks/api/events", query_string={"runid": "mine", "after": cursor})

    assert answer.status_code in (200, 400)
    assert answer.get_json().get("items", []) == []


# -- logs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["api/deliveries/a%0aERROR%20forged", "jobs/a%0aERROR%20forged/b",
                                  "deliveries/a%0aERROR%20forged"])  # fmt: skip
def test_a_path_cannot_forge_log_lines(
    host: Host, caplog: pytest.LogCaptureFixture, tmp_path: Path, path: str
) -> None:
    host.state.database.dispose()
    (tmp_path / "host.db").rename(tmp_path / "away.db")
    (tmp_path / "host.db").mkdir()
    try:
        answer = host.app.test_client().get(f"/webhooks/{path}")
    finally:
        (tmp_path / "host.db").rmdir()
        (tmp_path / "away.db").rename(tmp_path / "host.db")

    assert answer.status_code in (404, 503)
    for record in caplog.records:
        assert "\n" not in record.getMessage().partition("forged")[0], record.getMessage()


def test_job_ids_and_runs_cannot_forge_log_lines(
    sqlite_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="flask_rq_webhooks")
    with open_state(sqlite_url, redis_url) as state:
        endpoint_id = add_endpoint(state, "http://127.0.0.1:1/")
        state.hooks.scrub_function = lambda payload: 1 / 0  # type: ignore[misc]
        entry = {**ENTRY, "endpoint": endpoint_id, "job_id": "a\nERROR forged", "runid": "r\nERROR forged"}
        confirm(state.database, endpoint_id, existing=[entry["job_id"]], unseen=[], reserved_job_id=None)
        state.outbox.append(entry)
        Dispatcher(state).run(burst=True)
        assert len(events(state)) == 1

    assert any("scrub function failed" in record.getMessage() for record in caplog.records)
    for record in caplog.records:
        assert "\n" not in record.getMessage()


# -- the outbox -------------------------------------------------------------------------------------------

ENTRY: dict[str, Any] = {
    "v": 1, "kind": "success", "endpoint": "", "job_id": "job-1", "run": "2024-01-01T00:00:00.000000Z",
    "at": 1704067200.0, "func": "f", "queue": "default", "created_at": None,
    "enqueued_at": "2024-01-01T00:00:00.000000Z", "started_at": None, "runid": None, "retries_left": None,
    "result": None, "result_truncated": False, "error": None,
}  # fmt: skip


class Exploit:
    """A pickle of it runs a command in the process that loads it."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/rq-webhooks-was-here",)


def poison(own: str) -> list[bytes]:
    """Return entries that an attacker might write into Redis, for a stream that also has good ones."""
    foreign = "epzzzzzzzz_" + "0" * 26
    good = {**ENTRY, "endpoint": own}

    def changed(**values: Any) -> bytes:
        return json.dumps({**good, **values}).encode()

    return [
        b"", b"\0", b"\xff\xfe\x00", b"null", b"[]", b"1", b'"text"', b"{", b"{}", b"[" * DEEP,
        b'{"a":' * DEEP, pickle.dumps(Exploit()), pickle.dumps(good),
        zlib.compress(json.dumps(good).encode()), b" " * 3_000_000,
        json.dumps(good).encode("utf-16"), b"\xef\xbb\xbf" + changed(),
        changed(endpoint=foreign), changed(endpoint="ep' OR 1=1"), changed(endpoint=None),
        changed(endpoint=[]),
        changed(job_id=""), changed(job_id="j" * 513), changed(job_id="a\0b"), changed(job_id="\ud800"),
        changed(job_id=["a"]), changed(job_id={"$ne": None}), changed(run="yesterday"), changed(run="9" * 27),
        changed(run="created:" * 100), changed(at=float("nan")), changed(at=1e300), changed(at=-1),
        changed(at=True), changed(v=2), changed(v="1"), changed(v=None), changed(kind="retry"),
        changed(kind=["success"]), changed(result_truncated=1), changed(retries_left=-1),
        changed(retries_left=2**70), changed(func="f" * 5000), changed(runid="r" * 5000),
        changed(runid="r\0"), changed(error={"type": "x"}), changed(extra=1), changed(url="http://evil"),
        changed(result=float("inf")), changed(result={"a": "\ud800"}),
        changed(kind="confirm"),
        json.dumps({"v": 1, "kind": "confirm", "endpoint": own, "jobs": []}).encode(),
        json.dumps({"v": 1, "kind": "confirm", "endpoint": own, "jobs": ["j"] * 20_000}).encode(),
        json.dumps({"v": 1, "kind": "confirm", "endpoint": foreign, "jobs": ["j"]}).encode(),
        changed() [:-1] + b', "job_id": "other"}',
    ]  # fmt: skip


def test_poisoned_entries_are_set_aside_and_hold_nothing_up(
    database_url: str, redis_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    witness = Path("/tmp/rq-webhooks-was-here")
    with open_state(database_url, redis_url) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        bad = poison(endpoint_id)
        first = enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
        for raw in bad:
            state.redis.xadd(state.outbox.key, {"entry": raw})
        state.redis.xadd(state.outbox.key, {"other": "field"})
        state.redis.xadd(state.outbox.key, {b"\xff": b"\xff", b"entry ": b"{}"})
        last = enqueue(state, endpoint_id, "tests.jobs.add", 3, 4)
        Dispatcher(state).run(burst=True)

        assert {received.json["job_id"] for received in receiver.received} == {first, last}
        assert sorted(row.job_id for row in events(state)) == sorted([first, last])
        assert state.outbox.length() == 0
        aside = state.redis.xrange(state.outbox.rejected_key)
        assert len(aside) == len(bad) + 2
        assert all(len(fields[b"entry"]) <= 65_536 and fields[b"why"] for _id, fields in aside)
    assert not witness.exists()
    assert caplog.text.count("is set aside in") == len(bad) + 2
    assert len(caplog.text) < 200_000


def test_forged_entries_choose_neither_sql_nor_where_to_send(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    """Whoever writes to Redis can say how a watched job ended, and no more."""
    with open_state(database_url, redis_url) as state, Receiver() as elsewhere:
        endpoint_id = add_endpoint(state, receiver.url)
        unknown = f"ep{state.namespace}_" + "0" * 26
        forged_ids = ["'; DROP TABLE rq_webhooks_event; --", "../../etc/passwd", elsewhere.url, "é" * 500]
        for job_id in forged_ids:
            for endpoint in (endpoint_id, unknown):
                forged = {**ENTRY, "endpoint": endpoint, "job_id": job_id, "result": {"url": elsewhere.url}}
                state.outbox.append(forged)
        state.outbox.append({"v": 1, "kind": "confirm", "endpoint": unknown, "jobs": ["x", "'; --"]})
        Dispatcher(state).run(burst=True)

        assert events(state) == []
        assert deliveries(state) == []
        assert receiver.received == []
        assert elsewhere.received == []
        assert state.outbox.length() == 0


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(b"cbuiltins\nbytearray\n(I%d\ntR." % 2**45, id="bytearray"),
        pytest.param(b"cbuiltins\nset\n(cbuiltins\nrange\n(I%d\ntRtR." % 2**45, id="set of range"),
        pytest.param(b"ccollections\ndeque\n(cbuiltins\nrange\n(I%d\ntRtR." % 2**45, id="deque of range"),
        pytest.param(b"cfractions\nFraction\n(S'1e999999999'\ntR.", id="fraction"),
        pytest.param(pickle.dumps(Exploit()), id="command"),
    ],
)
def test_a_pickle_of_rq_runs_nothing_and_makes_nothing_large(made: bytes) -> None:
    raw = made if made.startswith(b"\x80") else b"\x80\x02" + made
    began = time.process_time()
    load_plain(raw)

    assert time.process_time() - began < 1
    assert not Path("/tmp/rq-webhooks-was-here").exists()


def test_what_a_job_calls_its_run_fits_every_database(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    """Reconcile reads it from RQ: a first argument of any length, with any character."""
    import random

    from flask_rq_webhooks.dispatch.dispatcher import reconcile_now

    noise = random.Random(1)
    long = "\0" + "".join(chr(noise.randrange(0x4E00, 0x9FFF)) for _ in range(20_000))
    with open_state(database_url, redis_url) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        job_id = enqueue(state, endpoint_id, "tests.jobs.run", long)
        state.redis.delete(state.outbox.key)  # the callback's word is lost
        time.sleep(CALLBACK_GRACE.total_seconds())
        report = reconcile_now(state)

        assert report is not None
        assert dict(report.reported) == {"job.success": 1}
        (event,) = events(state)
        assert event.job_id == job_id
        assert event.runid is None  # no name: too long, see callbacks.run_name


# -- what the host edits, and what holds it up ------------------------------------------------------------


def test_what_scrub_removes_is_nowhere(make_host: MakeHost, receiver: Receiver, tmp_path: Path) -> None:
    host = make_host(RQ_WEBHOOKS_ALLOW_HTTP=True)
    seen: list[dict[str, Any]] = []

    @host.webhooks.scrub
    def scrub(payload: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(payload))
        payload["result"] = {"peak": payload["result"]["peak"]}
        return payload

    def model() -> Any:
        job = host.queue.enqueue("tests.acceptance.tasks.run_model", "private-basin")
        return {"job_id": job.id}

    host.route(model, "/model")
    host.webhooks.scrub_function = scrub
    host.post("/model", json={"webhook_url": receiver.url})
    work(host.redis)
    Dispatcher(host.state).run(burst=True)

    assert seen[0]["result"]["outlet"] == "/data/private-basin"
    (received,) = receiver.received
    assert received.json["result"] == {"peak": 12.5}
    (delivery,) = host.rows("delivery")
    detail = host.app.test_client().get(f"/webhooks/api/deliveries/{delivery['id']}").data
    files = b"".join(path.read_bytes() for path in tmp_path.glob("host.db*"))
    for place in (received.body, detail, files):
        assert b"/data/private-basin" not in place


@pytest.mark.parametrize(
    "runid", ["r" * 100_000, "\0", 7, ["a"], {"a": 1}, "\ud800"], ids=lambda value: repr(value)[:9]
)
def test_what_scrub_makes_of_a_run_fits_every_database(
    database_url: str, redis_url: str, receiver: Receiver, runid: Any
) -> None:
    with open_state(database_url, redis_url) as state:
        state.hooks.scrub_function = lambda payload: {**payload, "runid": runid}
        endpoint_id = add_endpoint(state, receiver.url)
        enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
        Dispatcher(state).run(burst=True)

        (event,) = events(state)
        assert len(event.runid) <= 512
        assert [row.status for row in deliveries(state)] == ["succeeded"]


def test_a_host_that_holds_the_write_lock_since_before_the_view_gets_a_503(make_host: MakeHost) -> None:
    """SQLite has one writer: where the host writes in before_request, ours waits for it, and it for us."""
    host = make_host(SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"timeout": 0.5}})
    with host.app.app_context():
        host.db.session.execute(sa.text("CREATE TABLE visit (id INTEGER PRIMARY KEY)"))
        host.db.session.commit()
    holds = True

    @host.app.before_request
    def note_the_visit() -> None:
        if holds:
            host.db.session.execute(sa.text("INSERT INTO visit DEFAULT VALUES"))

    began = time.monotonic()
    refused = host.post()
    took = time.monotonic() - began
    without = host.app.test_client().post("/job", json={})
    holds = False
    accepted = host.post()

    assert refused.status_code == 503
    assert refused.get_json()["error"]["code"] == "webhooks_unavailable"
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.headers["Webhook-Registered"] == "false"
    assert took < 5
    assert without.status_code == 200  # who asks for no webhook does not wait
    assert accepted.headers["Webhook-Registered"] == "true"
    assert len(host.redis.keys("rq:job:*")) == 2
