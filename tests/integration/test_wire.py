"""What travels, as a receiver sees it: keys of the server, whole header names, content types."""

from __future__ import annotations

import json
import ssl
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flask_rq_webhooks import Queue
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.errors import ConfigurationError, SignatureError
from flask_rq_webhooks.protocol.signatures import SigningKey
from flask_rq_webhooks.receiver import verify
from tests.acceptance import tasks
from tests.certificates import CA
from tests.integration.hosts import Host
from tests.servers import Received, Receiver, wait_until

NEW, OLD = SigningKey.generate(), SigningKey.generate()


@contextmanager
def host_with(database_url: str, redis_url: str, **settings: Any) -> Iterator[Host]:
    config = {f"RQ_WEBHOOKS_{name}": value for name, value in settings.items()}
    host = Host(database_url, redis_url, RQ_WEBHOOKS_ALLOW_HTTP=True, **config)
    queue = Queue("default", connection=host.redis, is_async=False)

    def job() -> Any:
        return {"job_id": queue.enqueue(tasks.add, 1, 2).id}

    host.route(job)
    yield host
    host.close()


def deliver(host: Host, receiver: Receiver, **fields: Any) -> Received:
    response = host.post("/job", json={"webhook_url": receiver.url, **fields})
    assert response.headers["Webhook-Registered"] == "true", response.text
    Dispatcher(host.state).run(burst=True)
    return receiver.received[-1]


def test_a_key_of_the_server_signs_every_delivery(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    with host_with(database_url, redis_url, SIGNING_KEYS=[NEW.text, OLD.text]) as host:
        published = host.app.test_client().get("/webhooks/keys")
        assert published.headers["Cache-Control"] == "public, max-age=300"
        keys = published.get_json()["keys"]
        assert [key["signs"] for key in keys] == [True, False]

        unsigned = deliver(host, receiver)
        assert verify(unsigned.body, unsigned.headers, keys[0]["key"]).scheme == "v1a"
        with pytest.raises(SignatureError):
            verify(unsigned.body, unsigned.headers, keys[1]["key"])
        assert "X-Webhook-Signature" not in unsigned.headers

        signed = deliver(host, receiver, webhook_secret="s3cret")
        assert verify(signed.body, signed.headers, "s3cret").scheme == "v1"
        assert verify(signed.body, signed.headers, keys[0]["key"]).scheme == "v1a"


def test_without_a_key_there_is_none_to_publish(sqlite_url: str, redis_url: str) -> None:
    with host_with(sqlite_url, redis_url) as host:
        assert host.app.test_client().get("/webhooks/keys").get_json() == {"keys": []}


def test_a_key_that_is_none_stops_the_app_and_is_not_shown(sqlite_url: str, redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="SIGNING_KEYS") as caught:
        Host(sqlite_url, redis_url, RQ_WEBHOOKS_SIGNING_KEYS=["whsk_c2VjcmV0"])
    assert "c2VjcmV0" not in str(caught.value)


def test_whole_header_names(database_url: str, redis_url: str, receiver: Receiver) -> None:
    names = {"SIGNATURE_HEADER": "Guard-Signature", "TIMESTAMP_HEADER": "Guard-Time"}
    with host_with(database_url, redis_url, **names) as host:
        # A client cannot put its own in their place.
        received = deliver(host, receiver, webhook_secret="s", webhook_headers={"guard-time": "0"})
    assert "X-Webhook-Signature" not in received.headers
    assert received.headers["Guard-Time"] == received.headers["webhook-timestamp"]
    options: dict[str, Any] = {"signature_header": "Guard-Signature", "timestamp_header": "Guard-Time"}
    plain = {name: value for name, value in received.headers.items() if name != "webhook-signature"}
    assert verify(received.body, plain, "s", schemes=["sha256"], **options).scheme == "sha256"


@pytest.mark.parametrize("name", ["webhook-signature", "Content-Type", "a b", "", "x" * 101, "é"])
def test_header_names_that_are_refused(sqlite_url: str, redis_url: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match="SIGNATURE_HEADER"):
        Host(sqlite_url, redis_url, RQ_WEBHOOKS_SIGNATURE_HEADER=name)


def test_the_server_wide_secret_where_asked(database_url: str, redis_url: str, receiver: Receiver) -> None:
    with host_with(database_url, redis_url, SIGNING_SECRET="the server's") as host:
        received = deliver(host, receiver, sign_payload=True)
    assert verify(received.body, received.headers, "the server's").scheme == "v1"
    plain = {name: value for name, value in received.headers.items() if name != "webhook-signature"}
    with pytest.raises(SignatureError):  # no time under it
        verify(received.body, plain, "the server's")
    assert verify(received.body, plain, "the server's", schemes=["sha256"]).scheme == "sha256"


def test_cloudevents_arrive_as_such(database_url: str, redis_url: str, receiver: Receiver) -> None:
    with host_with(database_url, redis_url) as host:
        received = deliver(host, receiver, webhook_secret="s", webhook_format="cloudevents")
    assert received.headers["Content-Type"] == "application/cloudevents+json"
    event = json.loads(received.body)
    assert event["id"] == verify(received.body, received.headers, "s").id
    assert (event["type"], event["data"]["result"]) == ("job.success", {"sum": 3})


def test_what_a_4xx_means(database_url: str, redis_url: str, receiver: Receiver) -> None:
    receiver.respond = lambda received: int(received.path[1:4])
    base = receiver.url.removesuffix("/hook")
    with host_with(database_url, redis_url, RETRY_SCHEDULE=[0.05] * 8) as host:
        for status in (401, 403, 404, 400, 410, 422):
            host.post("/job", json={"webhook_url": f"{base}/{status}"})
        host.post("/job", json={"webhook_url": f"{base}/404-task", "webhook_format": "task"})

        def is_over() -> bool:
            Dispatcher(host.state).run(burst=True)
            return {row["status"] for row in host.rows("delivery")} == {"exhausted"}

        wait_until(is_over, timeout=20)
    assert Counter(one.path for one in receiver.received) == {
        "/401": 5, "/403": 5, "/404": 5, "/400": 1, "/410": 1, "/422": 1, "/404-task": 1,
    }  # fmt: skip


def test_a_receiver_with_an_own_authority_that_wants_a_certificate(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    ca = CA(tmp_path)
    ca.server_context("client")
    client = ca.latest
    context = ca.server_context("localhost")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca.file)
    settings = {"CA_FILE": str(ca.file), "CLIENT_CERTS": {"localhost": (client, client)}}
    with Receiver(context=context) as receiver, host_with(database_url, redis_url, **settings) as host:
        received = deliver(host, receiver, webhook_secret="s")
        assert verify(received.body, received.headers, "s").scheme == "v1"


def test_a_standing_endpoint_has_its_own_schedule_and_statuses(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    answers = {"/own": iter([404, 503, 418]), "/task": iter([429, 204]), "/app": iter([404])}
    receiver.respond = lambda received: next(answers[received.path])
    base = receiver.url.removesuffix("/hook")
    own: dict[str, Any] = {"retry_schedule": [1, 1, 1], "retry_statuses": [404, "5xx"]}
    endpoints = [
        {"url": f"{base}/own", **own},
        {"url": f"{base}/task", "format": "task", "retry_schedule": [1], "retry_statuses": ["4xx"]},
        {"url": f"{base}/app"},
    ]
    with host_with(database_url, redis_url, RETRY_SCHEDULE=[600, 600]) as host:
        for one in endpoints:
            made = host.app.test_client().post("/webhooks/api/endpoints", json=one)
            assert made.status_code == 201, made.text
        # The request's own endpoint gets nothing of a job that succeeds.
        host.post("/job", json={"webhook_url": f"{base}/app", "webhook_events": ["job.failure"]})
        wait_until(lambda: Dispatcher(host.state).run(burst=True) or len(receiver.received) == 6, timeout=20)
        Dispatcher(host.state).run(burst=True)
        urls = {row["id"]: row["url"] for row in host.rows("endpoint")}
        ended = {urls[row["endpoint_id"]]: row for row in host.rows("delivery")}
    assert Counter(one.path for one in receiver.received) == {"/own": 3, "/task": 2, "/app": 1}
    # 418 is not among its own: final, although an attempt is left.
    first, second, third = (one.at for one in receiver.received if one.path == "/own")
    assert 0.9 <= second - first < 8
    assert 0.9 <= third - second < 8
    assert (ended[f"{base}/own"]["status"], ended[f"{base}/own"]["max_attempts"]) == ("exhausted", 4)
    assert (ended[f"{base}/task"]["status"], ended[f"{base}/task"]["max_attempts"]) == ("succeeded", 2)
    assert (ended[f"{base}/app"]["status"], ended[f"{base}/app"]["max_attempts"]) == ("pending", 3)


def test_the_content_type_of_a_format_is_kept_for_every_attempt(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    xml = "application/xml; charset=utf-8"
    answers = iter([503, 204])
    receiver.respond = lambda received: next(answers)
    with host_with(database_url, redis_url, RETRY_SCHEDULE=[0.1]) as host:
        host.webhooks.payload_format("xml")(lambda payload: (f"<{payload['event']}/>".encode(), xml))
        deliver(host, receiver, webhook_format="xml", webhook_secret="s")
        while len(receiver.received) < 2:
            Dispatcher(host.state).run(burst=True)
    first, second = receiver.received
    assert first.body == second.body == b"<job.success/>"
    assert first.headers["Content-Type"] == second.headers["Content-Type"] == xml
    assert verify(second.body, second.headers, "s").id == first.headers["webhook-id"]
