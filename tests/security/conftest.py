"""A host with one route, a transport for development settings, and the request it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_rq_webhooks.dispatch.http import AttemptRequest, AttemptResult, RequestsTransport, Transport
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.integration.hosts import Host
from tests.security.attackers import Attacker

Send = Callable[..., AttemptResult]
MakeHost = Callable[..., Host]


@pytest.fixture
def make_host(sqlite_url: str, redis_url: str) -> Iterator[MakeHost]:
    """Give a function that makes host apps with ``/job``, which enqueues; all are closed at the end."""
    hosts: list[Host] = []

    def make(database_url: str = sqlite_url, **config: Any) -> Host:
        host = Host(database_url, redis_url, **config)
        host.route(lambda: {"job_id": host.enqueue()}, "/job")
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def make_transport() -> Iterator[Callable[..., Transport]]:
    """Give a function that makes transports; all are closed at the end."""
    made: list[Transport] = []

    def make(policy: UrlPolicy | None = None, **options: Any) -> Transport:
        options.setdefault("concurrency", 4)
        made.append(RequestsTransport(policy or UrlPolicy(allow_http=True), **options))
        return made[-1]

    yield make
    for transport in made:
        transport.close(wait=True)


@pytest.fixture
def send(make_transport: Callable[..., Transport]) -> Send:
    """Give a function that sends one request through one transport and waits for the result."""
    return sender(make_transport())


@pytest.fixture(params=["new", "kept"])
def send_over_either(request: pytest.FixtureRequest, send: Send, monkeypatch: pytest.MonkeyPatch) -> Send:
    """Give the same for attackers, over a new connection and over one kept from a request before."""
    if request.param == "new":
        return send
    monkeypatch.setattr(Attacker, "answers_first", True)
    met: set[str] = set()

    def send_again(url: str, **changes: Any) -> AttemptResult:
        if url not in met:
            met.add(url)
            assert send(url).status_code == 200
        return send(url, **changes)

    return send_again


def request_to(url: str, *, timeout_s: float = 5, **changes: Any) -> AttemptRequest:
    values: dict[str, Any] = {
        "url": url,
        "headers": {"Content-Type": "application/json", "webhook-id": "evt_1"},
        "body": b'{"event": "job.success"}',
        "timeout_s": timeout_s,
        "connect_timeout_s": min(timeout_s, 2),
    }
    return AttemptRequest(**(values | changes))


def sender(transport: Transport) -> Send:
    def send(url: str, **changes: Any) -> AttemptResult:
        return transport.submit(request_to(url, **changes)).result(timeout=30)

    return send
