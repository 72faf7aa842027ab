"""The portal: a customer's whole way on the pages, code that verifies, and nothing of anybody else's."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import DictLoader

from flask_rq_webhooks.cli.doctor import layout
from flask_rq_webhooks.storage.models import new_id
from flask_rq_webhooks.testing import InMemoryReceiver, ReceivedWebhook, deliver_all
from tests import pipeline
from tests.dashboard_app import add_hostile, open_host
from tests.integration import test_tenants as customers
from tests.integration.hosts import FIELDS, Host
from tests.integration.test_dashboard import MANAGED_PAGES, PAGES, Page, filled, submit
from tests.integration.test_tenants import call, create, fill, run_job, work

PORTAL = "/webhooks/portal"
TABLES = ("endpoint", "secret", "delivery", "event", "attempt")

host = customers.host


def visitor(host: Host, who: str | None) -> FlaskClient:
    """Return a browser whose every request says who it is."""
    client = host.app.test_client()
    if who is not None:
        client.environ_base["HTTP_X_WHO"] = who
    return client


def page(client: FlaskClient, path: str, status: int = 200) -> Page:
    response = client.get(path if path.startswith("/webhooks") else PORTAL + path)
    assert response.status_code == status, response.text
    return Page(response)


def answering(host: Host, *answers: Any) -> list[ReceivedWebhook]:
    """Run the jobs and deliver what is due to a receiver that answers so."""
    pipeline.work(host.redis, queue=host.queue)
    return deliver_all(host.app, InMemoryReceiver(*answers), retries=False)


def secret_in(html: str) -> str:
    (found,) = re.findall(r">(whsec_[A-Za-z0-9+/=]+)<", html)
    return str(found)


def test_a_newcomer_adds_an_endpoint_sees_the_answer_fixes_it_and_sends_again(host: Host) -> None:
    ada = visitor(host, "ada")
    assert "Nothing was sent yet" in page(ada, "/").text
    form = page(ada, "/endpoints/new")
    refused = submit(ada, form, "/endpoints/new", url="https://10.1.2.3/hooks")
    assert refused.status_code == 400
    assert "Nothing was saved" in refused.text
    created = submit(ada, form, "/endpoints/new", url="https://ada.example.com/wrong")
    assert created.status_code == 201
    old = secret_in(created.text)
    (path,) = {link for link in Page(created).links if "/endpoints/ep" in link}
    assert path.startswith(PORTAL)

    pinged = submit(ada, page(ada, path), "/test")
    (ping,) = answering(host, (404, {"Server": "hidden"}, b"no such hook: <b>try /right</b>"))
    shown = page(ada, pinged.request.path)
    assert ping.json["event"] == "webhook.ping"
    assert "No attempts left after 1." in shown.text
    assert "HTTP 404" in shown.text
    assert "no such hook: <b>try /right</b>" in shown.text
    assert "hidden" not in shown.text
    (event,) = {link for link in shown.links if "/events/" in link}
    assert "webhook.ping" in page(ada, event).text

    edited = submit(ada, page(ada, f"{path}/edit"), "/edit", url="https://ada.example.com/right")
    assert "The changes were saved." in edited.text
    submit(ada, shown, "/resend")
    (again,) = answering(host, 204)
    assert again.url == "https://ada.example.com/right"
    assert again.header("webhook-id") == ping.header("webhook-id")
    assert "Accepted by attempt 2." in page(ada, pinged.request.path).text

    rotated = submit(ada, page(ada, path), "/rotate", grace_h="1")
    new = secret_in(rotated.text)
    run_job(host, "ada")
    (webhook,) = work(host)
    for secret in (old, new):
        webhook.verify(secret)
    assert "with 2 secrets" in page(ada, path).text
    for later in (path, f"{path}/edit", f"{PORTAL}/endpoints", f"{PORTAL}/deliveries", f"{PORTAL}/"):
        html = ada.get(later).text
        assert old not in html
        assert new not in html

    assert "<bdi>customer</bdi>" in submit(ada, page(ada, path), "/disable").text
    assert "The endpoint is enabled." in submit(ada, page(ada, path), "/enable", recover="yes").text
    assert "were deleted" in submit(ada, page(ada, path), "/delete").text
    assert "standing" not in {row["kind"] for row in host.rows("endpoint")}


def test_customers_see_nothing_that_is_the_operators(host: Host) -> None:
    fill(host)
    ada = visitor(host, "ada")
    for path in ("/", "/deliveries", "/endpoints", "/endpoints/new", "/endpoints?kind=job"):
        text = page(ada, path).text
        for word in (
            "Dispatchers",
            "dispatcher",
            "Pause all",
            "Cancel what",
            "flask rq-webhooks",
            "Tenant",
            "tree",
        ):
            assert word not in text, (path, word)
    for path in ("/tenants", "/pause", "/deliveries/cancel", "/tenants/disable"):
        assert ada.post(PORTAL + path).status_code in (404, 405)
        assert ada.get(PORTAL + path).status_code in (404, 405)
    for who in (None, "nobody"):
        host.webhooks.tenant(lambda: None)
        assert visitor(host, who).get(f"{PORTAL}/").status_code == 403


def test_answers_of_ones_own_endpoint_are_shown_and_no_others(host: Host) -> None:
    mine = create(host, "ada", url="https://ada.example.com/in")["id"]
    run_job(host, "ada", **FIELDS)
    answering(host, (503, {"X-Inner": "inner"}, b"the answer"))
    ada = visitor(host, "ada")

    def answers(url_part: str) -> list[str]:
        found = []
        for delivery in call(host, "ada", "GET", "deliveries").get_json()["items"]:
            if url_part in delivery["url"]:
                detail = call(host, "ada", "GET", f"deliveries/{delivery['id']}")
                html = ada.get(f"{PORTAL}/deliveries/{delivery['id']}").text
                (attempt,) = detail.get_json()["attempts"]
                assert "inner" not in (detail.text + html).lower()
                assert ("the answer" in html) == bool(attempt["response_body"])
                assert (attempt["request_headers"], attempt["error_detail"]) == ({}, None)
                assert "HTTP 503" in html
                found.append(attempt["response_body"])
        return found

    assert answers("ada.example.com") == ["the answer"]
    assert answers("hooks.example.com") == [""]
    object.__setattr__(host.state.settings, "allow_networks", ("10.0.0.0/8",))
    assert answers("ada.example.com") == [""]
    assert mine in ada.get(f"{PORTAL}/endpoints").text


def test_limits_are_said_on_the_page(sqlite_url: str, redis_url: str) -> None:
    made = Host(
        sqlite_url, redis_url, RQ_WEBHOOKS_MAX_ENDPOINTS_PER_TENANT=1, RQ_WEBHOOKS_MAX_WAITING_PER_HOST=1
    )
    made.webhooks.authorize(lambda permission, **what: permission == "own")
    made.webhooks.tenant(lambda: "ada")
    path = f"{PORTAL}/endpoints/{create(made, 'ada')['id']}"
    ada = visitor(made, "ada")
    second = submit(ada, page(ada, "/endpoints/new"), "/endpoints/new", url="https://ada.example.com/2")
    assert second.status_code == 409
    assert "At most 1 endpoints are possible; delete one first." in second.text
    assert submit(ada, page(ada, path), "/test").status_code == 200
    again = submit(ada, page(ada, path), "/test")
    assert again.status_code == 429
    assert "Too many deliveries wait for this host already" in again.text
    assert len(made.rows("delivery")) == 1
    made.close()


# Nothing of anybody else's


def walk_of(host: Host) -> Iterator[tuple[str, str, str]]:
    """Give method, path and kind of id of every page and form of the portal that takes an id."""
    for rule in host.app.url_map.iter_rules():
        if rule.endpoint.startswith("rq_webhooks.portal.") and rule.arguments:
            (part,) = rule.arguments
            for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
                yield method, rule.rule.replace(f"<{part}>", "{}"), part.removesuffix("_id")


def token_of(client: FlaskClient) -> dict[str, str]:
    return {"csrf_token": page(client, "/endpoints/new").form("/endpoints/new")["fields"]["csrf_token"]}


def test_every_page_and_form_answers_a_foreign_id_as_one_that_does_not_exist(host: Host) -> None:
    ids = fill(host)
    before = [host.rows(table) for table in TABLES]
    walked = 0
    for who, other in (("ada", "bob"), ("bob", "ada")):
        client = visitor(host, who)
        data = {"grace_h": "1", "url": "https://evil.example.com/", "recover": "yes", **token_of(client)}
        for method, path, kind in walk_of(host):
            foreign = {ids[other][kind], ids["boss"][kind]} - {
                ids[who][kind]
            }  # an operator's has their event
            random_id = new_id(ids[who][kind].split("_")[0])
            answers = [
                client.open(path.format(item_id), method=method, data=data if method == "POST" else None)
                for item_id in (*sorted(foreign), random_id, "x", "%00")
            ]
            assert {answer.status_code for answer in answers} == {404}, (who, method, path)
            assert len({answer.data for answer in answers}) == 1, (who, method, path)
            walked += 1
    assert walked == 22
    assert [host.rows(table) for table in TABLES] == before
    ada = visitor(host, "ada")
    # Whose it is gets in, so the ids above were right; a token of ours was needed.
    bob = visitor(host, "bob")
    for kind in ("endpoint", "delivery", "event"):
        plural = "deliveries" if kind == "delivery" else f"{kind}s"
        assert bob.get(f"{PORTAL}/{plural}/{ids['bob'][kind]}").status_code == 200
    # The operators' pages are not the customer's, whatever the id.
    for path in ("/", "/deliveries", "/tenants", f"/deliveries/{ids['ada']['delivery']}"):
        assert ada.get(f"/webhooks{path}").status_code == 403


def test_every_link_a_customer_can_follow_stays_within_its_own(host: Host) -> None:
    ids = fill(host)
    run_job(host, "ada", **FIELDS)
    work(host)
    foreign = [*ids["bob"].values(), ids["boss"]["endpoint"], ids["boss"].get("delivery", "dlv_none"),
               "bob.example.com", "boss.example.com", "'bob'"]  # fmt: skip
    foreign += [row["job_id"] for row in host.rows("watch") if row["tenant"] == "bob"]
    ada = visitor(host, "ada")
    open_, seen = [f"{PORTAL}/"], set()
    while open_:
        path = open_.pop()
        if path in seen:
            continue
        seen.add(path)
        response = ada.get(path)
        assert response.status_code == 200, path
        assert [part for part in foreign if part in response.text] == [], path
        found = Page(response)
        for address in (*found.links, *(form["action"] for form in found.forms)):
            parts = urlsplit(address)
            assert address.startswith((f"{PORTAL}/", "#")), (path, address)
            post_only = re.search(r"/(resend|recover|rotate|test|enable|disable|delete)$", parts.path)
            if parts.path and not post_only:
                open_.append(address.partition("#")[0])
    assert len(seen) > 15
    assert any("/events/" in path for path in seen)


def test_foreign_filters_searches_and_form_fields_reach_nothing(host: Host) -> None:
    ids = fill(host)
    with host.state.database.write() as connection:
        connection.execute(sa.text("UPDATE rq_webhooks_delivery SET status = 'exhausted'"))
    before = [host.rows(table) for table in TABLES]
    ada = visitor(host, "ada")
    for path in ("/deliveries", "/endpoints"):
        for tenant in ("bob", "nobody", "x" * 200, "a\0b"):
            assert ada.get(PORTAL + path, query_string={"tenant": tenant}).status_code in (404, 200)
            if path == "/endpoints" or len(tenant) < 100:
                assert (
                    ids["bob"]["endpoint"] not in ada.get(PORTAL + path, query_string={"tenant": tenant}).text
                )
    for text in (*ids["bob"].values(), "bob.example.com", ids["boss"]["endpoint"]):
        answer = ada.get(f"{PORTAL}/deliveries", query_string={"q": text})
        assert answer.status_code == 200, text  # found would be a redirect
        assert "No exact match" in answer.text
    assert ada.get(f"{PORTAL}/deliveries", query_string={"q": ids["ada"]["delivery"]}).status_code == 302
    token = token_of(ada)
    reached = f"{PORTAL}/deliveries/recover"
    assert ada.post(reached, data={"tenant": "bob", "all": "yes", **token}).status_code == 404
    of_bob = {
        "endpoint_id": ids["bob"]["endpoint"],
        "event_id": ids["bob"]["event"],
        "host": "bob.example.com",
    }
    for name, value in of_bob.items():
        assert ada.post(reached, data={name: value, **token}).location.startswith(f"{PORTAL}/deliveries?")
    assert ada.post(f"{PORTAL}/deliveries/recover", data={"all": "yes"}).status_code == 403  # no token
    new = {
        "url": "https://ada.example.com/2",
        "tenant": "bob",
        "only_tenant": "bob",
        "scope": "tree",
        **token,
    }
    assert [host.rows(table) for table in TABLES] == before
    assert ada.post(f"{PORTAL}/endpoints/new", data=new).status_code == 201
    (made,) = [row for row in host.rows("endpoint") if row["url"].endswith("/2")]
    assert (made["tenant"], made["only_tenant"], made["scope"]) == ("ada", None, "job")


def test_a_foreign_cursor_on_a_page_shows_nothing_foreign(host: Host) -> None:
    ids = fill(host)
    create(host, "ada", url="https://ada.example.com/2")
    ada = visitor(host, "ada")
    cursors = [
        call(host, who, "GET", path, query_string={"limit": 1}).get_json()["cursor"]
        for who in ("boss", "bob")
        for path in ("deliveries", "endpoints", "events")
    ]
    jobs = [row["job_id"] for row in host.rows("watch")]
    endpoints = [owned["endpoint"] for owned in ids.values()]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        cursor=st.one_of(st.sampled_from([one for one in cursors if one]), st.text(max_size=60)),
        query=st.fixed_dictionaries(
            {},
            optional={
                "status": st.sampled_from(["succeeded", "pending", "no such"]),
                "job_id": st.sampled_from(jobs),
                "endpoint_id": st.sampled_from(endpoints),
                "runid": st.text(max_size=5),
                "event": st.text(max_size=5),
                "since": st.text(max_size=5),
                "kind": st.sampled_from(["standing", "job"]),
            },
        ),
    )
    def check(cursor: str, query: dict[str, str]) -> None:
        for path in ("/deliveries", "/endpoints"):
            answer = ada.get(PORTAL + path, query_string={**query, "cursor": cursor})
            assert answer.status_code in (200, 404)
            listed = answer.text.partition("<table")[2]
            for foreign in (*ids["bob"].values(), ids["boss"]["endpoint"], "bob.example.com"):
                assert foreign not in listed

    check()


def test_two_tenants_that_chose_one_job_id_do_not_see_each_others_run(host: Host) -> None:
    for who in ("ada", "bob"):
        run_job(host, who, **FIELDS)
    work(host)
    of_bob = next(row for row in host.rows("delivery") if row["tenant"] == "bob")
    with host.state.database.write() as connection:
        move = "UPDATE rq_webhooks_delivery SET event_id = :event WHERE tenant = 'ada'"
        connection.execute(sa.text(move), {"event": of_bob["event_id"]})
        connection.execute(sa.text("UPDATE rq_webhooks_event SET runid = 'run-of-bob' WHERE tenant = 'bob'"))
    (mine,) = customers.deliveries(host, "ada")
    assert mine["runid"] is None
    ada = visitor(host, "ada")
    for path in (f"/deliveries/{mine['id']}", "/deliveries"):
        assert "run-of-bob" not in ada.get(PORTAL + path).text
        assert f"/events/{of_bob['event_id']}" not in ada.get(PORTAL + path).text


def test_what_strangers_wrote_is_text_and_trouble_with_sql_is_a_page(tmp_path: Path, redis_url: str) -> None:
    with open_host(f"sqlite:///{tmp_path / 'rows.db'}", redis_url, {"own"}) as (app, state):
        app.extensions["rq_webhooks"].hooks.tenant_function = lambda: "ada"
        ids = add_hostile(state)
        with state.database.write() as connection:
            for table in ("endpoint", "delivery", "event"):
                connection.execute(sa.text(f"UPDATE rq_webhooks_{table} SET tenant = 'ada'"))
        client = app.test_client()
        for path in (*PAGES, *MANAGED_PAGES):
            if path == "/tenants":
                continue
            response = client.get(PORTAL + filled(path, ids))
            assert response.status_code == 200, path
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert response.headers["Cache-Control"] == "no-store"
            tags = [tag for tag, _attributes in Page(response).tags]
            assert "img" not in tags
            assert tags.count("script") == 1, path
            assert "7006652" not in response.text
            assert "a secret that is never shown" not in response.text
            if "edit" not in path:  # a field to edit holds what is stored
                assert "\u202e" not in response.text
        with state.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE rq_webhooks_delivery RENAME TO gone"))
        response = client.get(f"{PORTAL}/deliveries")
        assert response.status_code == 503
        assert "Try again in a moment." in response.text
        assert "flask rq-webhooks" not in response.text


# What operators see of it


def test_operators_see_tenants_filter_by_them_and_disable_their_endpoints(host: Host) -> None:
    ids = fill(host)
    create(host, "bob", url="https://bob.example.com/2")
    with host.state.database.write() as connection:
        connection.execute(
            sa.text("UPDATE rq_webhooks_delivery SET status = 'exhausted' WHERE tenant = 'bob'")
        )
    boss = visitor(host, "boss")
    tenants = page(boss, "/webhooks/tenants")
    assert re.search(r"\bbob 1 0 Endpoints", tenants.text)
    assert "ada" not in tenants.text
    for path in ("/webhooks/deliveries", "/webhooks/endpoints"):
        of_bob, of_all = (boss.get(path + query).text for query in ("?tenant=bob", ""))
        assert ids["ada"]["endpoint"] not in of_bob
        assert "bob.example.com" in of_bob
        assert "ada.example.com" in of_all
    assert page(boss, f"/webhooks/endpoints/{ids['bob']['endpoint']}").text.count("Tenant bob") == 1
    done = submit(boss, page(boss, "/webhooks/endpoints?tenant=bob"), "/tenants/disable")
    assert "2 endpoints of the tenant were disabled." in done.text
    assert {row["tenant"] for row in host.rows("endpoint") if not row["enabled"]} == {"bob"}
    assert boss.get("/webhooks/endpoints?tenant=" + "x" * 200).status_code == 404
    # A dispatcher configured so knows one tenant only.
    form = page(boss, "/webhooks/endpoints/new")
    made = submit(boss, form, "/endpoints/new", url="https://watch.example.com/", only_tenant="ada")
    assert made.status_code == 201
    assert "ada" in [row["only_tenant"] for row in host.rows("endpoint")]


# The layout


def test_the_portal_is_in_the_customers_layout_and_the_dashboard_is_not(
    sqlite_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = Host(sqlite_url, redis_url, RQ_WEBHOOKS_PORTAL_BASE_TEMPLATE="customer.html")
    made.webhooks.authorize(lambda permission, **what: True)
    made.webhooks.tenant(lambda: "ada")
    text = "{{ now }}<title>{% block title %}{% endblock %}</title>{% block head %}{% endblock %}"
    loader = DictLoader({"customer.html": text + "<nav>Acme</nav>{% block content %}{% endblock %}"})
    made.app.jinja_loader = loader
    made.app.context_processor(lambda: {"now": "theirs"})
    client = visitor(made, "ada")

    portal, dashboard = client.get(f"{PORTAL}/"), client.get("/webhooks/")
    assert "<nav>Acme</nav>" in portal.text
    assert portal.text.startswith("theirs")
    assert portal.text.count("dashboard.css") == 1
    assert portal.headers["Content-Security-Policy"] == "frame-ancestors 'self'"
    assert "Acme" not in dashboard.text
    assert dashboard.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert (
        layout(made.state) == "pages appear in our own layout; in the portal pages appear in 'customer.html'"
    )

    loader.mapping["customer.html"] = "{{ 1 / 0 }}{% block content %}{% endblock %}"
    made.app.jinja_env.cache.clear()  # type: ignore[union-attr]
    made.app.extensions.pop("rq_webhooks_templates")
    with caplog.at_level(logging.ERROR):
        assert "Nothing was sent yet" in client.get(f"{PORTAL}/").text
    assert "cannot be shown in RQ_WEBHOOKS_PORTAL_BASE_TEMPLATE 'customer.html'" in caplog.text
    made.close()


# Code that verifies

#: Language → how a file of ours is run that calls the page's code with the cases of standard input.
HARNESSES = {
    "Python": ("verify.py", "main.py", [sys.executable, "main.py"], """
import base64, json, sys
from verify import handle
cases = json.load(sys.stdin)
class Headers(dict):
    def get(self, name, default=None): return super().get(name.lower(), default)
    def __getitem__(self, name): return super().__getitem__(name.lower())
found = [handle(Headers(headers), base64.b64decode(body)) for headers, body in cases]
print("\\n" + json.dumps(found))
"""),
    "Node.js": ("verify.js", "main.js", ["node", "main.js"], """
const fs = require("node:fs");
eval(fs.readFileSync("verify.js", "utf8") + ";globalThis.handle = handle;");
const cases = JSON.parse(fs.readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(([headers, body]) => handle(headers, Buffer.from(body, "base64")))));
"""),
    "PHP": ("verify.php", "main.php", ["php", "main.php"], """<?php
require "verify.php";
$found = [];
foreach (json_decode(file_get_contents("php://stdin"), true) as [$headers, $body]) {
    $found[] = handle($headers, base64_decode($body));
}
echo "\\n" . json_encode($found) . "\\n";
"""),
    "Go": ("verify.go", "main.go", ["go", "run", "verify.go", "main.go"], """package main

import ("bytes"; "encoding/base64"; "encoding/json"; "fmt"; "net/http/httptest"; "os")

func main() {
	var cases []struct { Headers map[string]string; Body string }
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	found := []int{}
	for _, one := range cases {
		body, _ := base64.StdEncoding.DecodeString(one.Body)
		request := httptest.NewRequest("POST", "/", bytes.NewReader(body))
		for name, value := range one.Headers { request.Header.Set(name, value) }
		recorder := httptest.NewRecorder()
		handle(recorder, request)
		found = append(found, recorder.Code)
	}
	text, _ := json.Marshal(found)
	fmt.Println(string(text))
}
"""),
}  # fmt: skip


@pytest.mark.parametrize("language", list(HARNESSES))
def test_the_code_on_the_page_verifies_what_is_delivered(
    sqlite_url: str, redis_url: str, tmp_path: Path, language: str
) -> None:
    file, main, command, harness = HARNESSES[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    made = Host(sqlite_url, redis_url, RQ_WEBHOOKS_HEADER_PREFIX="X-Acme")
    made.webhooks.authorize(lambda permission, **what: permission == "own")
    made.webhooks.tenant(lambda: "ada")
    made.route(customers.job_view(made), "/job")
    endpoint = create(made, "ada", format="task")
    rotated = call(made, "ada", "POST", f"endpoints/{endpoint['id']}/rotate", json={}).get_json()
    text_endpoint = create(made, "ada", secret="plain text \u00fc")
    run_job(made, "ada")
    first, second = sorted(work(made), key=lambda one: "event_type" not in one.json)

    response = visitor(made, "ada").get(f"{PORTAL}/endpoints/{endpoint['id']}")
    made.close()
    shown = re.findall(r'<pre[^>]*aria-label="Code in ([^"]*)">(.*?)</pre>', response.text, re.S)
    unescape = {"&lt;": "<", "&gt;": ">", "&#34;": '"', "&#39;": "'", "&amp;": "&"}
    code = {name: re.sub("&[^;]+;", lambda one: unescape[one[0]], text) for name, text in shown}
    assert list(code) == list(HARNESSES)
    assert "x-acme-event" in code[language].lower()
    assert "event_type" in code[language]
    (tmp_path / file).write_text(code[language])
    (tmp_path / main).write_text(harness)

    def case(webhook: ReceivedWebhook, **changes: str) -> Any:
        headers = {name.lower(): value for name, value in webhook.headers.items()} | changes
        body = base64.b64encode(webhook.body).decode()
        return {"Headers": headers, "Body": body} if language == "Go" else [headers, body]

    def verdicts(secrets: str, *cases: Any) -> Any:
        done = subprocess.run(
            command, input=json.dumps(cases), cwd=tmp_path, text=True, capture_output=True, timeout=120,
            check=False, env={**os.environ, "WEBHOOK_SECRET": secrets},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().rpartition("\n")[2])

    good = case(first)
    forged = [
        case(first, **{"webhook-id": "evt_other"}),
        case(first, **{"webhook-timestamp": "1700000000"}),
        case(first, **{"webhook-timestamp": "soon"}),
        case(first, **{"webhook-signature": ""}),
        case(second),
    ]
    assert verdicts(endpoint["secret"], good, *forged) == [204] + [401] * 5
    assert verdicts(f"{rotated['secret']} older", good) == [204]
    assert verdicts("whsec_", good) == [401]
    assert verdicts("wrong", good) == [401]
    assert text_endpoint["secret"] == "plain text \u00fc"


def test_the_description_says_which_routes_accept_own(host: Host) -> None:
    document = visitor(host, "boss").get("/webhooks/openapi.json").get_json()
    seen = set()
    for path, item in document["paths"].items():
        address = "/webhooks" + re.sub(r"{\w+}", "some_id", path)
        for method, operation in item.items():
            if operation["x-permission"] in ("read", "manage"):
                # A caller known by its header: a cookie would need our token.
                answer = visitor(host, "ada").open(
                    address, method=method, json=None if method == "get" else {}
                )
                assert (answer.status_code != 403) == operation["x-own"], (method, path)
                assert ("or own" in operation["description"]) == operation["x-own"]
                seen.add(operation["x-own"])
    assert seen == {True, False}
