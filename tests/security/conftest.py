"""A transport for development settings, and the request it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_rq_webhooks.delivery.transport import AttemptRequest, AttemptResult, RequestsTransport
from flask_rq_webhooks.protocol.urls import UrlPolicy

Send = Callable[..., AttemptResult]


@pytest.fixture
def make_transport() -> Iterator[Callable[..., RequestsTransport]]:
    """Give a function that makes transports, all closed at the end."""
    made: list[RequestsTransport] = []

    def make(policy: UrlPolicy | None = None, **options: Any) -> RequestsTransport:
        options.setdefault("concurrency", 4)
        made.append(RequestsTransport(policy or UrlPolicy(allow_http=True), **options))
        return made[-1]

    yield make
    for transport in made:
        transport.close(wait=True)


@pytest.fixture
def send(make_transport: Callable[..., RequestsTransport]) -> Send:
    """Give a function that sends one request through one transport and waits for the result."""
    return sender(make_transport())


def request_to(url: str, *, timeout_s: float = 5, **changes: Any) -> AttemptRequest:
    values: dict[str, Any] = {
        "url": url,
        "headers": {"Content-Type": "application/json", "webhook-id": "evt_1"},
        "body": b'{"event": "job.success"}',
        "timeout_s": timeout_s,
        "connect_timeout_s": min(timeout_s, 2),
    }
    return AttemptRequest(**(values | changes))


def sender(transport: RequestsTransport) -> Send:
    def send(url: str, **changes: Any) -> AttemptResult:
        return transport.submit(request_to(url, **changes)).result(timeout=30)

    return send
