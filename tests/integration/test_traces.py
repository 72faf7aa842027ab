"""The trace of the request that enqueued a job, as a receiver sees it and as OpenTelemetry records it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from tests.integration.hosts import Host
from tests.pipeline import work
from tests.servers import Receiver, wait_until

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACE = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "vendor=abc"}
OTHER = f"00-{'1' * 32}-{'2' * 16}-01"


def test_every_attempt_continues_the_trace_of_its_request(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    base = receiver.url.removesuffix("/hook")
    answers = iter([503, 204])
    receiver.respond = lambda received: next(answers) if received.path == "/mine" else 204
    host = Host(database_url, redis_url, RQ_WEBHOOKS_ALLOW_HTTP=True, RQ_WEBHOOKS_RETRY_SCHEDULE=[0.1])
    host.route(lambda: {"job_id": host.enqueue()})

    def post(path: str, trace: dict[str, str]) -> None:
        fields = {"webhook_url": base + path, "webhook_headers": {"Traceparent": OTHER, "Tracestate": "x=y"}}
        assert host.post("/job", json=fields, headers=trace).headers["Webhook-Registered"] == "true"
        work(host.redis)
        Dispatcher(host.state).run(burst=True)

    try:
        made = host.app.test_client().post("/webhooks/api/endpoints", json={"url": f"{base}/standing"})
        assert made.status_code == 201
        post("/mine", TRACE)
        wait_until(lambda: len(receiver.received) == 3 or Dispatcher(host.state).run(burst=True))
        post("/no-state", {"traceparent": TRACE["traceparent"]})
        post("/wrong", {"traceparent": TRACE["traceparent"].upper(), "tracestate": "vendor=abc"})
        first = host.rows("attempt")[0]
    finally:
        host.close()

    by_path: dict[str, list[dict[str, str]]] = {}
    for one in receiver.received:
        headers = {name.lower(): value for name, value in one.headers.items()}
        by_path.setdefault(one.path, []).append(headers)
    continued = [*by_path["/mine"], by_path["/standing"][0]]
    spans = [re.fullmatch(f"00-{TRACE_ID}-([0-9a-f]{{16}})-01", one["traceparent"]) for one in continued]
    ids = {found[1] for found in spans if found}
    assert len(ids - {SPAN_ID}) == 3  # each attempt has its own
    assert {one["tracestate"] for one in continued} == {"vendor=abc"}
    (alone,) = by_path["/no-state"]
    assert TRACE_ID in alone["traceparent"]
    assert "tracestate" not in alone
    # Without a valid trace nothing is sent but what the client itself asked for.
    (wrong,) = by_path["/wrong"]
    assert (wrong["traceparent"], wrong["tracestate"]) == (OTHER, "x=y")
    assert "traceparent" not in by_path["/standing"][2]
    assert TRACE_ID in first["request_headers"]


def test_opentelemetry_sees_request_job_event_and_attempts_as_one_tree(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    answers = iter([503, 204])
    receiver.respond = lambda received: next(answers)
    done = subprocess.run(
        [sys.executable, "-m", "tests.traced_host", database_url, redis_url, receiver.url, OTHER],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spans: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert {span["trace"] for span in spans} == {"1" * 32}
    named = {span["name"]: span for span in spans}
    tree = {
        span["name"]: next((one["name"] for one in spans if one["id"] == span["parent"]), None)
        for span in spans
    }
    assert tree == {
        "request": None, "job": "request", "rq_webhooks register": "request",
        "rq_webhooks ingest": "job", "rq_webhooks attempt": "rq_webhooks ingest",
    }  # fmt: skip
    assert named["request"]["parent"] == "2" * 16
    attempts = [span for span in spans if span["name"] == "rq_webhooks attempt"]
    sent = [one.headers["traceparent"] for one in receiver.received]
    assert sent == [f"00-{span['trace']}-{span['id']}-01" for span in attempts]
    assert [span["is_error"] for span in attempts] == [True, False]
    facts = [span["attributes"] for span in attempts]
    assert [one["http.response.status_code"] for one in facts] == [503, 204]
    assert [one["rq_webhooks.attempt"] for one in facts] == [1, 2]
    assert facts[0]["error.type"] == "http_5xx"
    assert (
        facts[0]["rq_webhooks.event_id"] == named["rq_webhooks ingest"]["attributes"]["rq_webhooks.event_id"]
    )
    assert receiver.url not in done.stdout
