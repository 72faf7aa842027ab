"""SECURITY 1–6 and 18 from the outside: what a request asks for, and where it then goes or does not go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.dispatch.http import RequestsTransport
from flask_rq_webhooks.errors import InvalidWebhookError
from flask_rq_webhooks.protocol.urls import UrlPolicy
from flask_rq_webhooks.storage.models import Endpoint
from tests.integration.hosts import Host
from tests.pipeline import work
from tests.security.conftest import MakeHost
from tests.servers import Receiver

Deliver = Callable[..., None]


def ask(host: Host, url: object, **fields: Any) -> Any:
    return host.post(json={"webhook_url": url, **fields})


def submit(host: Host, url: str) -> str:
    response = ask(host, url)
    assert response.headers["Webhook-Registered"] == "true", response.text
    return str(response.get_json()["job_id"])


@pytest.fixture
def deliver() -> Deliver:
    """Give a function that runs what is queued, and delivers, through real sockets."""

    def run(host: Host, policy: UrlPolicy | None = None, **options: Any) -> None:
        work(host.redis)
        chosen = policy or host.state.url_policy
        with RequestsTransport(chosen, concurrency=4, **options) as transport:
            Dispatcher(host.state, transport=transport).run(burst=True)

    return run


def status(host: Host, job_id: str) -> Any:
    return host.app.test_client().get(f"/webhooks/jobs/{job_id}").get_json()


# -- the allow-list -------------------------------------------------------------------------------------

ALLOWED = ["example.com", "*.partner.example", "bücher.example", "93.184.216.34"]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "https://EXAMPLE.com/",
        "https://example.com./",
        "https://example.com:8443/",
        "https://hooks.example.com/in",
        "https://a.b.example.com./in",
        "https://x.partner.example/",
        "https://bücher.example/",
        "https://xn--bcher-kva.example/",
        "https://shop.BÜCHER.example/",
        "https://93.184.216.34/",
        "https://93.184.216.34:444/",
    ],
)
def test_the_allow_list_lets_these_through(make_host: MakeHost, url: str) -> None:
    host = make_host(RQ_WEBHOOKS_ALLOWED_DOMAINS=ALLOWED)

    assert ask(host, url).headers["Webhook-Registered"] == "true"
    assert host.app.test_client().post("/webhooks/api/endpoints", json={"url": url}).status_code == 201


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/",
        "https://notexample.com/",
        "https://example.com.evil.example/",
        "https://example.com@evil.example/",
        "https://evil.example/#example.com",
        "https://evil.example/?example.com",
        "https://evil.example\\.example.com/",
        "https://partner.example/",
        "https://bucher.example/",
        "https://93.184.216.35/",
        "https://x.93.184.216.34/",
        "https://example.com..evil.example/",
        "https://ｅxample.com/",
    ],
)
def test_the_allow_list_stops_these(make_host: MakeHost, url: str) -> None:
    host = make_host(RQ_WEBHOOKS_ALLOWED_DOMAINS=ALLOWED)
    created = host.app.test_client().post("/webhooks/api/endpoints", json={"url": url})

    assert ask(host, url).status_code == 400
    assert created.status_code == 400
    assert host.rows("endpoint") == []


# -- every way in -----------------------------------------------------------------------------------------

INTERNAL = [
    "http://93.184.216.34/",
    "https://127.0.0.1/",
    "https://10.0.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://[::1]/",
    "https://[::ffff:10.0.0.1]/",
    "https://[64:ff9b::a00:1]/",
    "https://2130706433/",
    "https://0x7f.1/",
    "https://localhost/",
    "https://metadata.google.internal/",
    "https://user:password@example.com/",
    "https://hooks.example.com\\@127.0.0.1/",
    "https://①②⑦.0.0.1/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "https://example.com/\r\nHost: internal",
]


@pytest.mark.parametrize("url", INTERNAL)
def test_no_way_in_takes_such_a_url(make_host: MakeHost, url: str) -> None:
    host = make_host()
    client = host.app.test_client()
    good = client.post("/webhooks/api/endpoints", json={"url": "https://hooks.example.com/"}).get_json()
    with host.app.app_context():
        job = host.queue.enqueue("tests.acceptance.tasks.add", 1, 2)
        for way in (
            lambda: host.webhooks.watch(job, url),
            lambda: host.webhooks.enqueue_with_webhook(
                host.queue, "tests.acceptance.tasks.add", (1, 2), payload={"webhook_url": url}
            ),
        ):
            with pytest.raises(InvalidWebhookError):
                way()
    header_value = url.encode("utf-8").decode("latin-1")
    answers = [
        ask(host, url),
        client.post("/job", data={"webhook_url": url}),
        client.post("/job", query_string={"webhook_url": url}),
        client.post("/webhooks/api/endpoints", json={"url": url}),
        client.patch(f"/webhooks/api/endpoints/{good['id']}", json={"url": url}),
    ]
    if "\r" not in url:
        answers.append(client.post("/job", json=[], headers={"X-Webhook-Url": header_value}))

    assert {answer.status_code for answer in answers} == {400}
    assert [row["url"] for row in host.rows("endpoint")] == ["https://hooks.example.com/"]


# -- and what goes out ------------------------------------------------------------------------------------


def test_a_url_is_judged_again_before_every_attempt(
    make_host: MakeHost, deliver: Deliver, receiver: Receiver
) -> None:
    """An operator may have closed a network since; and write access to SQL opens no way in."""
    host = make_host(RQ_WEBHOOKS_ALLOW_HTTP=True)
    narrowed, forged = submit(host, receiver.url), submit(host, receiver.url)
    endpoint_id = host.rows("endpoint")[1]["id"]
    with host.state.database.write() as connection:
        connection.execute(
            update(Endpoint).where(Endpoint.id == endpoint_id).values(url="https://user@127.0.0.1:1/")
        )

    deliver(host, UrlPolicy(allow_http=True, deny_networks=["127.0.0.0/8"]))

    assert receiver.received == []
    for row in host.rows("attempt"):
        assert (row["error_code"], row["status_code"], row["number"]) == ("blocked", None, 1)
    assert [row["status"] for row in host.rows("delivery")] == ["exhausted", "exhausted"]
    assert {status(host, job)["delivery_status"] for job in (narrowed, forged)} == {"exhausted"}


def test_a_name_that_leads_inside_is_not_connected_to(
    make_host: MakeHost, deliver: Deliver, receiver: Receiver
) -> None:
    host = make_host(RQ_WEBHOOKS_RETRY_SCHEDULE=[])
    port = receiver.port
    jobs = {
        name: submit(host, f"https://{name}.example.com:{port}/hook")
        for name in ("inside", "both", "nowhere", "closed")
    }
    answers = {"inside": ["127.0.0.1"], "both": ["93.184.216.34", "10.0.0.1"], "closed": ["0.0.0.0"]}

    def resolve(name: str, _port: int) -> list[str]:
        found = answers.get(name.partition(".")[0])
        if found is None:
            raise OSError("no such name")
        return found

    deliver(host, resolver=resolve)

    assert receiver.received == []
    codes = {row["id"]: row["error_code"] for row in host.rows("delivery")}
    assert sorted(codes.values()) == ["blocked", "blocked", "blocked", "dns"]
    reported = {name: status(host, job) for name, job in jobs.items()}
    for answer in reported.values():
        (delivery,) = answer["deliveries"]
        # All one to the client: whether there is such a name, and where it leads.
        assert delivery["error_code"] == "unreachable"
        assert {attempt["error_code"] for attempt in delivery["attempts"]} == {"unreachable"}
        assert not {"error_detail", "response_headers", "response_body"} & set(delivery["attempts"][0])
        assert "10.0.0.1" not in str(answer)
        assert "127.0.0.1" not in str(answer)


def test_registering_looks_no_name_up(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """So neither the answer nor the time it takes can tell whether a name exists."""
    import socket

    host = make_host()
    asked: list[Any] = []
    system = socket.getaddrinfo

    def getaddrinfo(name: Any, *args: Any, **options: Any) -> Any:
        asked.append(name)
        return system(name, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    answers = [ask(host, f"https://{name}/") for name in ("intranet.example.com", "no-such-name.example.com")]

    assert [answer.headers["Webhook-Registered"] for answer in answers] == ["true", "true"]
    assert not any("example.com" in str(name) for name in asked)


def test_a_redirect_inside_is_not_followed(make_host: MakeHost, deliver: Deliver, receiver: Receiver) -> None:
    host = make_host(RQ_WEBHOOKS_ALLOW_HTTP=True, RQ_WEBHOOKS_RETRY_SCHEDULE=[])
    with Receiver(lambda _received: (307, {"Location": receiver.url}, b"")) as redirecting:
        job_id = submit(host, redirecting.url)
        deliver(host)
        assert len(redirecting.received) == 1

    assert receiver.received == []
    (delivery,) = status(host, job_id)["deliveries"]
    assert (delivery["status"], delivery["error_code"], delivery["status_code"]) == (
        "exhausted",
        "redirect",
        307,
    )
