"""Customers: their own endpoints, jobs reported there without a URL, and nothing of anybody else's."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from flask import request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import tenants as many
from flask_rq_webhooks.accept import tenants
from flask_rq_webhooks.storage.models import new_id
from flask_rq_webhooks.testing import InMemoryReceiver, deliver_all
from tests import pipeline
from tests.dashboard_app import open_host
from tests.integration.hosts import FIELDS, Host
from tests.servers import PostgresHandle

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
    made.route(job_view(made), "/job")
    yield made
    made.close()


def job_view(made: Host) -> Callable[[], Any]:
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


def work(host: Host) -> list[Any]:
    """Run all jobs; return what receivers got."""
    pipeline.work(host.redis, queue=host.queue)
    return deliver_all(host.app)


def deliveries(host: Host, who: str) -> list[dict[str, Any]]:
    found = call(host, who, "GET", "deliveries").get_json()
    return list(found["items"])


# Subscribed once


def test_a_job_without_a_url_is_reported_to_its_own_tenant_and_to_operators(host: Host) -> None:
    create(host, "ada", url="https://ada.example.com/in")
    create(host, "bob", url="https://bob.example.com/in")
    create(host, "boss", url="https://all.example.com/in")
    create(host, "boss", url="https://only-bob.example.com/in", only_tenant="bob")

    response = run_job(host, "ada")

    assert response.headers["Webhook-Registered"] == "true"
    received = work(host)
    assert sorted(one.url for one in received) == ["https://ada.example.com/in", "https://all.example.com/in"]
    assert {one.json["job_id"] for one in received} == {response.get_json()["job_id"]}
    assert {row["tenant"] for row in host.rows("watch")} == {"ada"}
    assert {row["tenant"] for row in host.rows("event")} == {"ada"}
    assert [one["url"] for one in deliveries(host, "ada")] == ["https://ada.example.com/in"]
    assert deliveries(host, "bob") == []


def test_with_a_url_both_hear_it_one_event_two_deliveries(host: Host) -> None:
    create(host, "ada", url="https://ada.example.com/in")

    run_job(host, "ada", **FIELDS)

    received = work(host)
    assert {one.url for one in received} == {"https://ada.example.com/in", FIELDS["webhook_url"]}
    assert len({one.header("webhook-id") for one in received}) == 1
    assert len(deliveries(host, "ada")) == 2


def test_a_job_that_vanishes_without_a_report_is_reported_lost(host: Host) -> None:
    create(host, "ada")
    job_id = run_job(host, "ada").get_json()["job_id"]
    host.redis.flushdb()

    received = deliver_all(host.app) + deliver_all(host.app)

    assert [(one.json["event"], one.json["job_id"]) for one in received] == [("job.lost", job_id)]


def test_a_caller_without_an_endpoint_finds_the_view_undecorated(host: Host) -> None:
    create(host, "ada")
    disabled = create(host, "cleo")["id"]
    assert call(host, "cleo", "POST", f"endpoints/{disabled}/disable", json={}).status_code == 200
    create(host, "dan", events=["model.published"])

    for who in ("bob", "cleo", "dan", None):
        assert "Webhook-Registered" not in run_job(host, who).headers

    assert host.rows("watch") == []


def test_an_endpoint_made_in_this_process_counts_at_once_and_stops_at_once(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "LOOK_EVERY_S", 3600.0)

    def registered() -> bool:
        return "Webhook-Registered" in run_job(host, "ada").headers

    assert not registered()
    first = create(host, "ada")["id"]
    assert registered()
    for method, path, then in (
        ("POST", f"endpoints/{first}/disable", False),
        ("POST", f"endpoints/{first}/enable", True),
        ("PATCH", f"endpoints/{first}", False),
        ("DELETE", f"endpoints/{first}", False),
    ):
        values = {"events": ["model.published"]} if method == "PATCH" else {}
        assert call(host, "ada", method, path, json=values).status_code < 300
        assert registered() is then
    create(host, "ada")
    assert registered()
    assert call(host, "boss", "POST", "tenants/disable", json={"tenant": "ada"}).status_code == 200
    assert not registered()


def test_only_a_request_after_a_rest_waits_for_the_look(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    create(host, "ada")
    monkeypatch.setattr(tenants, "LOOK_EVERY_S", 5.0)
    now = 1000.0
    monkeypatch.setattr(tenants, "time", SimpleNamespace(monotonic=lambda: now))
    looked: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "endpoint.tenant IS NOT NULL" in statement:
            looked.append(threading.current_thread().name.partition("-")[0])

    sa.event.listen(host.state.database.engine, "before_cursor_execute", note)
    for now, by in ((1000.0, "MainThread"), (1002.4, None), (1002.6, "rq"), (1004.9, None), (1005.2, "rq"),
                    (1010.3, "MainThread"), (1011.0, None)):  # fmt: skip
        looked.clear()
        assert run_job(host, "ada").headers["Webhook-Registered"] == "true"
        assert "Webhook-Registered" not in run_job(host, "bob").headers
        for thread in threading.enumerate():
            if thread.name == "rq-webhooks-subscribers":
                thread.join()
        assert looked == ([] if by is None else [by]), now


def test_more_endpoints_than_one_look_reads_are_looked_at_tenant_by_tenant(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "MAX_REMEMBERED", 1)
    for events in (["job.failure"], ["job.success"]):
        create(host, "ada", events=events)
    create(host, "dan", events=["model.published"])
    monkeypatch.setattr(tenants, "LOOK_EVERY_S", 3600.0)

    for _ in range(2):
        assert [("Webhook-Registered" in run_job(host, who).headers) for who in ("ada", "bob", "dan")] == [
            True, False, False,
        ]  # fmt: skip
    assert json.loads(host.rows("endpoint")[-1]["events"]) == ["job.failure", "job.success"]


@pytest.mark.parametrize("value", ["", "x" * 129, "a\nb", 7, "a\x00b"])
def test_a_bad_tenant_is_logged_and_means_none(
    host: Host, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    create(host, "ada")
    host.webhooks.tenant(lambda: value)

    response = run_job(host, "ada", **FIELDS)

    assert response.headers["Webhook-Registered"] == "true"
    assert "1 to 128 printable characters" in caplog.text
    assert {row["tenant"] for row in host.rows("watch")} == {None}
    assert call(host, "ada", "GET", "endpoints").status_code == 403


def test_a_tenant_function_that_fails_never_fails_the_request(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    create(host, "ada")

    def fails() -> str:
        raise RuntimeError("no such user")

    host.webhooks.tenant(fails)

    assert "Webhook-Registered" not in run_job(host, "ada").headers
    assert "no such user" in caplog.text
    assert call(host, "ada", "GET", "deliveries").status_code == 403


def test_trouble_with_sql_in_the_look_leaves_the_request_alone(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    with host.state.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE rq_webhooks_endpoint RENAME TO gone"))

    assert "Webhook-Registered" not in run_job(host, "ada").headers
    assert "goes on without" in caplog.text


def test_send_reaches_the_tenant_and_operators_and_nobody_else(host: Host) -> None:
    for who in ("ada", "bob", "boss"):
        create(host, who, url=f"https://{who}.example.com/in", events=["model.published"])
    with host.app.app_context():
        host.webhooks.send("model.published", {"n": 1}, tenant="ada")
        host.webhooks.send("model.published", {"n": 2})
        with pytest.raises(ValueError, match="not a tenant's name"):
            host.webhooks.send("model.published", {}, tenant="")

    received = [(one.url.split("/")[2].split(".")[0], one.json["data"]["n"]) for one in deliver_all(host.app)]

    assert sorted(received) == [("ada", 1), ("boss", 1), ("boss", 2)]


# Own endpoints


def test_an_endpoint_gets_a_secret_once_and_is_rotated_with_grace(host: Host) -> None:
    made = create(host, "ada", secret=None)
    assert made["secret"].startswith("whsec_")
    rotated = call(host, "ada", "POST", f"endpoints/{made['id']}/rotate", json={}).get_json()
    run_job(host, "ada")

    (received,) = work(host)

    received.verify(made["secret"])
    received.verify(rotated["secret"])
    shown = call(host, "ada", "GET", f"endpoints/{made['id']}").text
    assert made["secret"] not in shown
    assert rotated["secret"] not in shown


@pytest.mark.parametrize(
    "values",
    [{"url": "http://127.0.0.1/"}, {"url": "https://10.0.0.1/"}, {"headers": {"Host": "x"}},
     {"scope": "tree"}, {"runid": "r"}, {"only_tenant": "bob"}, {"tenant": "bob"},
     {"format": "no such"}, {"secret": ""}],
)  # fmt: skip
def test_a_tenant_may_choose_no_more_than_a_request_can(host: Host, values: dict[str, Any]) -> None:
    assert call(host, "ada", "POST", "endpoints", json={"url": HOOK, **values}).status_code == 400
    assert host.rows("endpoint") == []


def test_two_at_once_do_not_exceed_the_limit(database_url: str, redis_url: str) -> None:
    made = Host(database_url, redis_url, RQ_WEBHOOKS_MAX_ENDPOINTS_PER_TENANT=3)
    made.webhooks.authorize(lambda permission, **what: permission == "own")
    made.webhooks.tenant(lambda: "ada")
    statuses: list[int] = []

    def post() -> None:
        statuses.append(call(made, None, "POST", "endpoints", json={"url": HOOK}).status_code)

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(statuses) == [201] * 3 + [409] * 5
    assert len(made.rows("endpoint")) == 3
    made.close()


def test_an_idempotency_key_is_the_tenants_own(host: Host) -> None:
    path, key = "/webhooks/api/endpoints", {"Idempotency-Key": "k"}
    client = host.app.test_client()
    answers = [
        client.post(path, json={"url": f"https://{who}.example.com/"}, headers={"X-Who": who, **key})
        for who in ("ada", "bob", "boss", "ada")
    ]

    assert [answer.status_code for answer in answers] == [201, 201, 201, 200]
    assert len({answer.get_json()["id"] for answer in answers}) == 3
    other = client.post(path, json={"url": "https://bob.example.com/"}, headers={"X-Who": "ada", **key})
    assert (other.status_code, other.get_json()["error"]["code"]) == (409, "idempotency_key")


def test_trouble_with_an_own_endpoint_is_an_event_for_its_tenant_and_for_operators_only(host: Host) -> None:
    types = ["webhook.delivery_exhausted", "webhook.endpoint_disabled"]
    for who in ("ada", "bob", "boss"):
        create(host, who, url=f"https://{who}-watch.example.com/in", events=types)
    broken = create(host, "ada", url="https://broken.example.com/in?token=private")
    run_job(host, "ada")
    pipeline.work(host.redis, queue=host.queue)
    receiver = InMemoryReceiver(lambda webhook: 410 if "broken" in webhook.url else 204)

    for _ in range(3):
        deliver_all(host.app, receiver)

    found = [(one.url.split("/")[2].split(".")[0], one.json["event"]) for one in receiver.received
             if "broken" not in one.url]  # fmt: skip
    assert sorted(found) == sorted((who, kind) for who in ("ada-watch", "boss-watch") for kind in types)
    for one in receiver.received:
        if "watch" in one.url:
            assert one.json["data"]["endpoint_id"] == broken["id"]
            assert b"private" not in one.body
    mine = call(host, "ada", "GET", "events").get_json()["items"]
    assert {one["type"] for one in mine} == {"job.success", *types}
    assert call(host, "bob", "GET", "events").get_json()["items"] == []
    assert not call(host, "ada", "GET", f"endpoints/{broken['id']}").get_json()["enabled"]


def test_a_ping_of_a_tenant_keeps_the_limit_of_its_host_and_one_of_an_operator_does_not(
    database_url: str, redis_url: str
) -> None:
    made = Host(database_url, redis_url, RQ_WEBHOOKS_MAX_WAITING_PER_HOST=2)
    made.webhooks.tenant(lambda: request.headers.get("X-Who"))
    made.webhooks.authorize(lambda permission, **what: what.get("tenant") == "ada" or who_is_boss())
    ping = f"endpoints/{create(made, 'ada')['id']}/test"
    try:
        answers = [call(made, "ada", "POST", ping, json={}) for _ in range(3)]
        by_operator = call(made, "boss", "POST", ping, json={})
        before = len(made.rows("delivery"))
        deliver_all(made.app)
        again = call(made, "ada", "POST", ping, json={})
    finally:
        made.close()

    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[-1].get_json()["error"]["code"] == "too_many_waiting"
    assert (by_operator.status_code, before, again.status_code) == (202, 3, 202)


def who_is_boss() -> bool:
    return request.headers.get("X-Who") == "boss"


def test_secrets_of_tenants_survive_a_change_of_keys_and_are_never_stored_or_shown_as_they_are(
    database_url: str, redis_url: str
) -> None:
    def opened(*keys: str) -> Host:
        made = Host(database_url, redis_url, RQ_WEBHOOKS_ENCRYPTION_KEYS=list(keys))
        made.webhooks.tenant(lambda: request.headers.get("X-Who"))
        made.webhooks.authorize(lambda permission, **what: permission == "own")
        made.route(job_view(made), "/job")
        return made

    old = opened("old")
    generated = create(old, "ada", headers={"X-Own": "hidden value"})
    chosen = create(old, "bob", secret="chosen by the customer", url="https://bob.example.com/in")
    assert len(generated["secret"]) > 40
    assert generated["secret"] != create(old, "ada")["secret"]
    for endpoint_id, who in ((generated["id"], "ada"), (chosen["id"], "bob")):
        shown = call(old, who, "GET", f"endpoints/{endpoint_id}").text
        assert not any(text in shown for text in (generated["secret"], "chosen by", "hidden value"))
    stored = json.dumps([old.rows("secret"), old.rows("endpoint")], default=str)
    assert not any(text in stored for text in (generated["secret"], "chosen by", "hidden value"))
    old.close()
    both = opened("new", "old")
    assert both.app.test_cli_runner().invoke(args=["rq-webhooks", "rekey"]).output.startswith("4 values")
    both.close()

    new = opened("new")
    for who in ("ada", "bob"):
        run_job(new, who)
    received = {one.url: one for one in work(new) if one.header("X-Own") or "bob" in one.url}
    new.close()

    received[HOOK].verify(generated["secret"])
    assert received[HOOK].header("X-Own") == "hidden value"
    received["https://bob.example.com/in"].verify("chosen by the customer")


# Nothing of anybody else's


def fill(host: Host) -> dict[str, dict[str, str]]:
    """Give two tenants and an operator an endpoint and a delivery each; return their ids by owner."""
    found: dict[str, dict[str, str]] = {}
    for who in ("ada", "bob", "boss"):
        found[who] = {"endpoint": create(host, who, url=f"https://{who}.example.com/in")["id"]}
    for who in ("ada", "bob"):
        run_job(host, who)
    work(host)
    for row in host.rows("delivery"):
        owner = next(who for who in found if found[who]["endpoint"] == row["endpoint_id"])
        found[owner] |= {"delivery": row["id"], "event": row["event_id"]}
    return found


def routes(host: Host) -> list[tuple[str, str, str]]:
    """Return method, path and name of the part of every route of the API that takes an id."""
    return [
        (method, rule.rule.removeprefix("/webhooks/api/"), next(iter(rule.arguments)))
        for rule in host.app.url_map.iter_rules()
        if rule.rule.startswith("/webhooks/api/") and rule.arguments
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]


def test_every_route_with_an_id_answers_a_foreign_one_as_it_answers_one_that_does_not_exist(
    host: Host,
) -> None:
    ids = fill(host)
    before = [host.rows(table) for table in ("endpoint", "secret", "delivery", "event")]
    walked = 0
    for method, path, part in routes(host):
        kind = part.removesuffix("_id")
        random_id = new_id(next(iter(ids["ada"][kind].split("_"))))
        answers = []
        foreign = {ids["bob"][kind], ids["boss"][kind]} - {ids["ada"][kind]}  # an operator's has ada's event
        for item_id in (*sorted(foreign), random_id, "x", "%00"):
            body = {} if method in ("POST", "PATCH") else None
            answers.append(call(host, "ada", method, path.replace(f"<{part}>", item_id), json=body))
        assert {answer.status_code for answer in answers} == {404}, (method, path)
        assert len({answer.data for answer in answers[:-1]}) == 1, (method, path)
        walked += 1
    assert walked >= 10
    assert [host.rows(table) for table in ("endpoint", "secret", "delivery", "event")] == before


def test_lists_hold_only_what_is_ones_own_whatever_the_filter(host: Host) -> None:
    ids = fill(host)
    assert [one["id"] for one in deliveries(host, "ada")] == [ids["ada"]["delivery"]]
    assert [one["id"] for one in call(host, "ada", "GET", "endpoints").get_json()["items"]] == [
        ids["ada"]["endpoint"]
    ]
    feed = call(host, "ada", "GET", "events").get_json()["items"]
    assert {one["tenant"] for one in feed} == {"ada"}
    for query in ({"endpoint_id": ids["bob"]["endpoint"]}, {"event_id": ids["bob"]["event"]},
                  {"host": "bob.example.com"}):  # fmt: skip
        answer = call(host, "ada", "GET", "deliveries", query_string=query).get_json()
        assert answer == {"items": [], "cursor": None}
    for path in ("deliveries", "endpoints", "events"):
        for other in ("bob", "nobody"):
            assert call(host, "ada", "GET", path, query_string={"tenant": other}).status_code == 404
    assert call(host, "ada", "POST", "recover", json={"tenant": "bob", "all": True}).status_code == 404
    stats = call(host, "ada", "GET", "stats").get_json()
    assert stats["counts"]["succeeded"] == 1
    assert (stats["dispatchers"], stats["watches"]) == (0, {})


def test_recover_touches_no_foreign_delivery_and_makes_none_of_foreign_events(host: Host) -> None:
    ids = fill(host)
    with host.state.database.write() as connection:
        connection.execute(sa.text("UPDATE rq_webhooks_delivery SET status = 'exhausted'"))
    call(host, "ada", "POST", f"endpoints/{ids['ada']['endpoint']}/disable", json={})
    run_job(host, "bob")
    work(host)
    call(host, "ada", "POST", f"endpoints/{ids['ada']['endpoint']}/enable", json={})

    answer = call(host, "ada", "POST", "recover", json={"all": True}).get_json()

    assert answer["recovered"] == 1
    rows = host.rows("delivery")
    assert {row["status"] for row in rows if row["id"] == ids["ada"]["delivery"]} == {"pending"}
    assert {row["status"] for row in rows if row["id"] == ids["bob"]["delivery"]} == {"exhausted"}
    assert len([row for row in rows if row["tenant"] == "ada"]) == 1


def test_a_foreign_cursor_shows_nothing_foreign(host: Host) -> None:
    fill(host)
    foreign = call(host, "boss", "GET", "deliveries", query_string={"limit": 1}).get_json()["cursor"]
    after = call(host, "bob", "GET", "events").get_json()["cursor"]
    jobs = [row["job_id"] for row in host.rows("watch")]
    endpoints = [row["id"] for row in host.rows("endpoint")]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        cursor = data.draw(st.one_of(st.sampled_from([foreign, after]), st.text(max_size=60)))
        query = data.draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "status": st.sampled_from(["succeeded", "pending", "succeeded,exhausted"]),
                    "job_id": st.sampled_from(jobs),
                    "runid": st.text(max_size=5),
                    "endpoint_id": st.sampled_from(endpoints),
                },
            )
        )
        for path, name in (("deliveries", "cursor"), ("endpoints", "cursor"), ("events", "after")):
            some = query if path == "deliveries" else {}
            answer = call(host, "ada", "GET", path, query_string={**some, name: cursor})
            assert answer.status_code in (200, 400)
            items = answer.get_json().get("items", [])
            assert all(item["tenant"] == "ada" for item in items)

    check()


def test_what_a_client_may_not_learn_is_hidden_from_a_tenant_too(host: Host) -> None:
    create(host, "ada", headers={"Authorization": "Bearer hidden"}, max_attempts=1)
    run_job(host, "ada")
    pipeline.work(host.redis, queue=host.queue)
    deliver_all(host.app, InMemoryReceiver("blocked"))
    (delivery,) = deliveries(host, "ada")

    shown = call(host, "ada", "GET", f"deliveries/{delivery['id']}")
    for_operator = call(host, "boss", "GET", f"deliveries/{delivery['id']}").get_json()

    assert delivery["error_code"] == "unreachable"
    assert for_operator["delivery"]["error_code"] == "blocked"
    (attempt,) = shown.get_json()["attempts"]
    assert attempt["error_code"] == "unreachable"
    assert not attempt["error_detail"]
    assert not attempt["request_headers"]
    assert not attempt["response_body"]
    assert "hidden" not in shown.text
    assert "blocked" not in shown.text


def test_a_tenant_sets_its_own_schedule_within_the_bounds_of_a_request(host: Host) -> None:
    made = create(host, "ada", retry_schedule=[60, 3600.5], retry_statuses=[429, "5xx"])
    assert (made["retry_schedule"], made["retry_statuses"]) == ([60.0, 3600.5], ["429", "5xx"])
    path = f"endpoints/{made['id']}"
    refused = call(host, "ada", "PATCH", path, json={"retry_schedule": [1] * 12, "retry_statuses": [410]})
    assert refused.status_code == 400
    details = refused.get_json()["error"]["details"]
    assert "at most 11" in details["retry_schedule"][0]
    assert "410 cannot be retried" in details["retry_statuses"][0]
    assert call(host, "boss", "PATCH", path, json={"retry_schedule": [1] * 12}).status_code == 200
    back = call(host, "ada", "PATCH", path, json={"retry_schedule": None, "retry_statuses": None})
    assert (back.get_json()["retry_schedule"], back.get_json()["retry_statuses"]) == (None, None)


def test_operators_see_filter_and_disable_tenants(host: Host) -> None:
    ids = fill(host)
    listed = call(host, "boss", "GET", "deliveries", query_string={"tenant": "ada"}).get_json()["items"]
    assert [one["id"] for one in listed] == [ids["ada"]["delivery"]]
    with host.state.database.write() as connection:
        connection.execute(
            sa.text("UPDATE rq_webhooks_delivery SET status = 'exhausted' WHERE tenant = 'bob'")
        )
    assert call(host, "boss", "GET", "tenants").get_json()["items"] == [
        {"tenant": "bob", "failures": 1, "backlog": 0}
    ]
    assert call(host, "ada", "GET", "tenants").status_code == 403

    answer = call(host, "boss", "POST", "tenants/disable", json={"tenant": "bob"})

    assert answer.get_json() == {"tenant": "bob", "disabled": 1}
    assert {row["id"] for row in host.rows("endpoint") if not row["enabled"]} == {ids["bob"]["endpoint"]}
    runner = host.app.test_cli_runner()
    out = runner.invoke(args=["rq-webhooks", "endpoints", "list", "--tenant", "bob"]).output
    assert ids["bob"]["endpoint"] in out
    assert ids["ada"]["endpoint"] not in out
    erased = runner.invoke(args=["rq-webhooks", "erase", "--tenant", "ada"]).output
    assert erased.startswith("1 events erased")
    assert {row["tenant"] for row in host.rows("event") if row["erased_at"]} == {"ada"}
    resent = call(host, "ada", "POST", f"deliveries/{ids['ada']['delivery']}/resend", json={})
    assert (resent.status_code, resent.get_json()["error"]["code"]) == (409, "erased")


# Among many


@pytest.mark.timeout(180)
def test_no_list_of_a_tenant_reads_a_large_table_or_what_is_not_its_own(
    postgres: PostgresHandle, redis_url: str
) -> None:
    """The plans with statistics, of every statement of every list, page and number that a tenant may ask for.

    The benchmark ``lists`` times the same with a million rows.
    """
    owners, each = 300, 200
    allowed = {"own"}
    with open_host(postgres.new_database(), redis_url, allowed) as (app, state):
        state.hooks.tenant_function = lambda: request.headers.get(many.HEADER)
        asked = many.own_lists(state, owners, each, many.fill(state, owners, each))
        statements = many.Statements(state)
        chance, client = random.Random(1), app.test_client()
        found: list[str] = []
        for made in asked.values():
            for _ in range(5):
                tenant, address = made(chance)
                assert client.get(address, headers={many.HEADER: tenant}).status_code in (200, 302)
        allowed.add("read")
        assert client.get("/webhooks/api/tenants").get_json()["items"]
        assert len(statements.seen) > 200
        with state.database.engine.connect() as connection:
            found += statements.faults(connection, 2 * each)

            # It sees one where there is one.
            statements.seen = [("SELECT id FROM rq_webhooks_delivery WHERE error_code = 'none'", None)]
            assert len(statements.faults(connection, 2 * each)) == 1
    assert found == []
