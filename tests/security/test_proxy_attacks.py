"""SECURITY 3, 7, 11 by way of ``PROXY_URL``: its password, its deadline, and what it may answer."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import pytest

from flask_rq_webhooks.dispatch.http import Transport
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.security.attackers import Attacker, elapsed
from tests.security.conftest import sender
from tests.security.test_connections import unanswering

MakeTransport = Callable[..., Transport]
REFUSAL = b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n"


def answering(data: bytes) -> Callable[[socket.socket], None]:
    def script(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(data)

    return script


@pytest.mark.parametrize(
    "answer",
    [
        REFUSAL,
        b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\n\r\nnonsense",
    ],
    ids=["refusal", "no-header", "no-http", "nothing", "no-tls"],
)
@pytest.mark.parametrize("url", ["https://hooks.example.com/hook", "http://hooks.example.com/hook"])
def test_the_password_of_a_proxy_is_shown_to_nobody(
    make_transport: MakeTransport, caplog: pytest.LogCaptureFixture, answer: bytes, url: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with Attacker(answering(answer)) as front:
        proxy_url = f"http://robert:hunter2@127.0.0.1:{front.port}"
        send = sender(make_transport(UrlPolicy(allow_http=True), proxy_url=proxy_url))
        result = send(url, timeout_s=1)
    for secret in ("hunter2", "robert"):
        assert secret not in repr(result)
        assert secret not in caplog.text


def test_an_address_of_a_proxy_that_does_not_answer_leaves_time_for_the_next(
    make_transport: MakeTransport,
) -> None:
    with Attacker(answering(REFUSAL)) as front, unanswering("127.0.0.9", front.port), elapsed() as seconds:
        transport = make_transport(
            UrlPolicy(),
            proxy_url=f"http://proxy.example.com:{front.port}",
            resolver=lambda _host, _port: ["127.0.0.9", "127.0.0.1"],
        )
        result = sender(transport)("https://hooks.example.com/hook", timeout_s=20, connect_timeout_s=1)
        assert (result.error_code, seconds() < 10) == ("connect", True)
    assert "407" in str(result.error_detail)
