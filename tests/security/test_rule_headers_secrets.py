"""SECURITY 10–12 from the outside: headers that may not be sent, and secrets that are nowhere."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.job import Job

from flask_rq_webhooks.cli import cli
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.errors import ConfigurationError, DecryptionError, InvalidWebhookError
from flask_rq_webhooks.receiver import verify
from tests.integration.hosts import Host
from tests.pipeline import SECRET, add_endpoint, attempts, deliveries, enqueue, open_state, rows, work
from tests.security.conftest import MakeHost
from tests.servers import Receiver

HEADER_VALUE = "Bearer a value nobody else may see"
QUERY_SECRET = "a-token-in-the-query"
PATH_SECRET = "T0A1B2C3D4E5F6G7H8I9J0"
STANDING_SECRET = "a standing secret of an operator"


@pytest.fixture
def make_host(make_host: MakeHost) -> MakeHost:
    return partial(make_host, RQ_WEBHOOKS_ALLOW_HTTP=True)


# -- headers ----------------------------------------------------------------------------------------------

#: Each was let through, or broke the sender, in libraries that were tried.
BAD_HEADERS: list[tuple[str, dict[str, Any]]] = [
    ("framing", {"Transfer-Encoding": "chunked"}),
    ("length", {"Content-Length": "0"}),
    ("host", {"Host": "internal"}),
    ("case", {"hOsT": "internal"}),
    ("underscore", {"Content_Length": "0"}),
    ("connection", {"Connection": "close"}),
    ("proxy", {"Proxy-Authorization": "Basic eDp5"}),
    ("type", {"Content-Type": "text/html"}),
    ("encoding", {"Accept-Encoding": "gzip"}),
    ("expect", {"Expect": "100-continue"}),
    ("cookie", {"Set-Cookie": "a=1"}),
    ("our id", {"webhook-id": "evt_forged"}),
    ("our signature", {"X-Webhook-Signature": "sha256=forged"}),
    ("newline", {"X-A": "1\r\nX-Evil: 1"}),
    ("newline in name", {"X-A\r\nX-Evil": "1"}),
    ("trailing newline", {"X-A": "1\n"}),
    ("trailing space in name", {"X-A ": "1"}),
    ("colon in name", {"X-A:": "1"}),
    ("nul", {"X-A": "1\0"}),
    ("not latin-1", {"X-A": "✓"}),
    ("latin-1", {"X-A": "é"}),
    ("surrogate", {"X-A": "\ud800"}),
    ("number", {"X-A": 1}),
    ("list", {"X-A": ["1"]}),
    ("null", {"X-A": None}),
    ("empty name", {"": "1"}),
    ("twice by case", {"X-A": "1", "x-a": "2"}),
    ("33", {f"X-{number}": "1" for number in range(33)}),
    ("long value", {"X-A": "v" * 4097}),
    ("long together", {f"X-{number}": "v" * 4000 for number in range(5)}),
]


@pytest.mark.parametrize("headers", [pytest.param(headers, id=name) for name, headers in BAD_HEADERS])
def test_a_bad_header_is_answered_at_once_and_nothing_is_enqueued(
    make_host: MakeHost, receiver: Receiver, headers: dict[str, Any]
) -> None:
    host = make_host()
    client = host.app.test_client()
    text = json.dumps(headers)
    answers = [
        client.post("/job", json={"webhook_url": receiver.url, "webhook_headers": headers}),
        client.post("/job", data={"webhook_url": receiver.url, "webhook_headers": text}),
        client.post("/job", headers={"X-Webhook-Url": receiver.url, "X-Webhook-Headers": text}),
    ]
    standing = client.post("/webhooks/api/endpoints", json={"url": receiver.url, "headers": headers})

    for answer in answers:
        assert answer.status_code == 400
        assert set(answer.get_json()["error"]["details"]) == {"webhook_headers"}
        assert answer.headers["Webhook-Registered"] == "false"
    assert standing.status_code == 400
    assert host.rows("endpoint") == []
    assert host.redis.keys("rq:*") == []


def test_good_headers_arrive_and_override_nothing(make_host: MakeHost, receiver: Receiver) -> None:
    host = make_host()
    own = {"Authorization": HEADER_VALUE, "X-Tenant": "a\tb", "x-empty": ""}
    host.post(json={"webhook_url": receiver.url, "webhook_secret": "s", "webhook_headers": own})
    work(host.redis)
    Dispatcher(host.state).run(burst=True)

    (received,) = receiver.received
    assert received.headers["Authorization"] == HEADER_VALUE
    assert received.headers["X-Tenant"] == "a\tb"
    assert received.headers["Content-Type"] == "application/json"
    assert received.headers["Host"] == f"127.0.0.1:{receiver.port}"
    verify(received.body, received.headers, "s")


# -- secrets ----------------------------------------------------------------------------------------------


def dump_redis(client: redis.Redis) -> bytes:
    """Return all there is in a Redis, as readable as can be."""
    parts: list[bytes] = []
    for key in client.scan_iter():
        kind = client.type(key)
        parts += [key, client.dump(key) or b""]
        if kind == b"hash":
            parts += [part for pair in client.hgetall(key).items() for part in pair]
        elif kind == b"stream":
            parts.append(repr(client.xrange(key)).encode())
        if key.startswith(b"rq:job:"):
            job = Job.fetch(key.decode().removeprefix("rq:job:"), connection=client)
            parts.append(repr([job.args, job.kwargs, job.meta, job.description]).encode())
    return b"\n".join(parts)


def test_secrets_are_nowhere(
    make_host: MakeHost, receiver: Receiver, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    host = make_host(RQ_WEBHOOKS_RETRY_SCHEDULE=[0.1, 0.1])
    client = host.app.test_client()
    places: dict[str, bytes] = {}
    url = f"{receiver.url}/{PATH_SECRET}?token={QUERY_SECRET}"
    receiver.respond = lambda received: (
        (500, {"Location": "/x?token=1", "X-A": "b"}, b"no") if len(receiver.received) < 3 else 204
    )
    created = client.post(
        "/webhooks/api/endpoints",
        json={"url": url, "secret": STANDING_SECRET, "headers": {"Authorization": HEADER_VALUE}},
    )
    assert created.status_code == 201  # the one answer a secret is in
    endpoint_id = created.get_json()["id"]
    fields = {
        "webhook_url": url,
        "webhook_secret": SECRET,
        "webhook_headers": {"Authorization": HEADER_VALUE},
    }
    accepted = host.post(json=fields)
    job_id = accepted.get_json()["job_id"]
    refused = host.post(
        json=fields | {"webhook_url": url.replace("http:", "ftp:"), "webhook_secret": SECRET * 90}
    )
    assert refused.status_code == 400
    places["redis before"] = dump_redis(host.redis)
    work(host.redis)
    places["redis between"] = dump_redis(host.redis)
    while {row["status"] for row in host.rows("delivery")} != {"succeeded"}:
        Dispatcher(host.state).run(burst=True)  # ends while a retry waits for its time
    # A connection that is refused is another way for a URL into a log or a row.
    port = receiver.port
    receiver.close()
    assert receiver.port == port
    host.post(json=fields)
    work(host.redis)
    Dispatcher(host.state).run(burst=True)

    places["redis after"] = dump_redis(host.redis)
    paths = [
        f"jobs/{job_id}", f"job/{job_id}/webhook", "api/deliveries", "api/endpoints",
        "api/endpoints?kind=job", f"api/endpoints/{endpoint_id}", "api/events", "api/stats", "metrics",
        "openapi.json", "", "deliveries", "endpoints", f"endpoints/{endpoint_id}",
        f"endpoints/{endpoint_id}/edit",
    ]  # fmt: skip
    for row in host.rows("delivery"):
        paths += [f"api/deliveries/{row['id']}", f"deliveries/{row['id']}"]
    for row in host.rows("event"):
        paths += [f"api/events/{row['id']}", f"events/{row['id']}"]
    for path in paths:
        answer = client.get(f"/webhooks/{path}")
        assert answer.status_code == 200, path
        places[f"GET {path}"] = answer.data + str(answer.headers).encode()
    places["accepted"], places["refused"] = accepted.data, refused.data
    places["logs"] = caplog.text.encode()
    places["records"] = repr([vars(record) for record in caplog.records]).encode()
    places["sql"] = b"".join(path.read_bytes() for path in tmp_path.glob("host.db*"))

    assert job_id.encode() in places["redis between"]
    assert b"rq_webhooks_endpoint" in places["sql"]
    assert b"Dispatcher" in places["logs"]
    for place, content in places.items():
        for secret in (SECRET, HEADER_VALUE, STANDING_SECRET):
            assert secret.encode() not in content, place
        if place != "sql":  # where to send to is kept as it is
            assert QUERY_SECRET.encode() not in content, place
            assert PATH_SECRET.encode() not in content, place


def test_urllib3_still_logs_the_requests_of_others(caplog: pytest.LogCaptureFixture) -> None:
    import urllib3

    with (
        Receiver() as server,
        caplog.at_level(logging.DEBUG, logger="urllib3"),
        urllib3.PoolManager() as pool,
    ):
        pool.request("POST", f"{server.url}?own=1", body=b"{}")

    assert "own=1" in caplog.text


def test_errors_do_not_repeat_secrets(make_host: MakeHost) -> None:
    host = make_host()
    with host.app.app_context(), pytest.raises(InvalidWebhookError) as caught:
        host.webhooks.enqueue_with_webhook(
            host.queue,
            "tests.acceptance.tasks.add",
            (1, 2),
            payload={
                "webhook_url": "https://hooks.example.com/",
                "webhook_secret": SECRET,
                "webhook_headers": {"Authorization": HEADER_VALUE, "Host": HEADER_VALUE},
            },
        )

    seen: list[BaseException] = [caught.value]
    while cause := seen[-1].__cause__ or (None if seen[-1].__suppress_context__ else seen[-1].__context__):
        seen.append(cause)
    for exc in seen:
        assert SECRET not in repr(exc) + str(exc) + repr(vars(exc))
        assert HEADER_VALUE not in repr(exc) + str(exc) + repr(vars(exc))


# -- keys -------------------------------------------------------------------------------------------------


def test_without_any_key_a_webhook_is_refused_and_the_log_says_what_to_set(
    make_host: MakeHost, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host()
    host.app.config["SECRET_KEY"] = None
    host.app.testing = False

    with host.app.app_context(), pytest.raises(ConfigurationError, match="RQ_WEBHOOKS_ENCRYPTION_KEYS"):
        host.state.cipher  # noqa: B018
    answer = host.post(json={"webhook_url": receiver.url, "webhook_secret": SECRET})

    assert answer.status_code == 500
    assert "set SECRET_KEY" in caplog.text
    assert SECRET not in caplog.text
    assert host.rows("endpoint") == []
    assert host.redis.keys("rq:*") == []


def test_several_keys_rekey_and_then_the_old_one_may_go(
    sqlite_url: str, redis_url: str, receiver: Receiver
) -> None:
    with open_state(sqlite_url, redis_url, encryption_keys=["old"]) as state:
        endpoint_id = add_endpoint(state, receiver.url, headers={"X-Own": "value"})
        enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
    host = Host(
        sqlite_url, redis_url, RQ_WEBHOOKS_ALLOW_HTTP=True, RQ_WEBHOOKS_ENCRYPTION_KEYS=["new", "old"]
    )
    try:
        result = host.app.test_cli_runner().invoke(cli, ["rekey"])
    finally:
        host.close()
    assert result.exit_code == 0, result.output
    with open_state(sqlite_url, redis_url, encryption_keys=["new"]) as state:
        state.app.config["SECRET_KEY"] = None
        Dispatcher(state).run(burst=True)

    (received,) = receiver.received
    assert received.headers["X-Own"] == "value"
    verify(received.body, received.headers, SECRET)


def test_a_wrong_key_says_so_and_loses_nothing(
    database_url: str, redis_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    with open_state(database_url, redis_url, encryption_keys=["right"]) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
    with open_state(database_url, redis_url, encryption_keys=["wrong"]) as state:
        Dispatcher(state).run(burst=True)
        (waiting,) = deliveries(state)
        assert (waiting.status, waiting.attempts) == ("pending", 0)
        assert attempts(state) == []
        with pytest.raises(DecryptionError, match="Nothing is lost"):
            state.cipher.decrypt(rows(state, _secret_table())[0].secret)
    assert receiver.received == []
    assert "cannot be decrypted with any configured key" in caplog.text
    assert SECRET not in caplog.text

    with open_state(database_url, redis_url, encryption_keys=["newest", "right"]) as state:
        from flask_rq_webhooks.storage.deliveries import resend

        resend(state.database, waiting.id)  # due now, instead of when its pause is over
        Dispatcher(state).run(burst=True)
        assert [row.status for row in deliveries(state)] == ["succeeded"]
    (received,) = receiver.received
    verify(received.body, received.headers, SECRET)


def _secret_table() -> Any:
    from flask_rq_webhooks.storage.models import Secret

    return Secret
