"""SECURITY 7, 8: where one answer ends and the next begins; what has no clear end is not believed.

Both transports keep to it. Where they differ in how much of a doubtful answer still counts, both ways are
named.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

import pytest

from flask_rq_webhooks.dispatch.http import BODY_CAP, Transport
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.security.attackers import Attacker, MemoryGrowth, after_request, read_request, then
from tests.security.conftest import Send, sender
from tests.security.test_connections import CA, FakeDNS

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

MakeTransport = Callable[..., Transport]


@pytest.fixture
def send(send_over_either: Send) -> Send:
    return send_over_either


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CA:
    return CA(tmp_path_factory.mktemp("ca"))


def a_limited_flood(connection: socket.socket) -> None:
    for _ in range(60):
        connection.sendall(b"A" * (1 << 20))


@pytest.mark.parametrize("size", ["-1", "-5", "+5", "1_0", "0x5", "", " 5", "5;a\rb", "1" + "0" * 16])
def test_what_is_not_the_size_of_a_chunk_is_a_reset(
    send: Send, caplog: pytest.LogCaptureFixture, size: str
) -> None:
    caplog.set_level(logging.WARNING)
    with (
        Attacker(then(CHUNKED + size.encode() + b"\r\n", a_limited_flood)) as attacker,
        MemoryGrowth() as growth,
    ):
        result = send(attacker.url, timeout_s=5)
    if size != "1" + "0" * 16:  # which is a size, to some
        assert (result.error_code, result.status_code) == ("reset", None)
    assert len(result.response_body) <= BODY_CAP
    assert growth.peak_mb < 30
    assert not caplog.records


@pytest.mark.parametrize(
    "chunks",
    [
        b"2;a=b\r\nOK\r\n0\r\n\r\n",
        b"0002\r\nOK\r\n0;b\r\nX-Trailer: 1\r\n\r\n",
        b"1\r\nO\r\n1\r\nK\r\n000\r\n\r\n",
    ],
    ids=["extension", "trailer", "two"],
)
@pytest.mark.parametrize("coding", [b"chunked", b" Chunked"], ids=["plain", "case"])
def test_chunks_are_put_together(send: Send, chunks: bytes, coding: bytes) -> None:
    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(OK + b"Transfer-Encoding:" + coding + b"\r\n\r\n" + chunks)

    with Attacker(script) as attacker:
        for _ in range(2):
            result = send(attacker.url)
            assert (result.status_code, result.response_body) == (200, b"OK")
        assert attacker.connections == 1


def test_where_none_may_be_there_are_no_chunks_either(send: Send) -> None:
    answer = b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(answer)

    with Attacker(script) as attacker:
        results = [send(attacker.url, timeout_s=2) for _ in range(2)]
    assert [(result.status_code, result.response_body) for result in results] == [(204, b"")] * 2


@pytest.mark.parametrize(
    "chunks",
    [b"2\r\nOKxx0\r\n\r\n", b"2\nOK\n0\n\n", b"zz\r\nOK\r\n0\r\n\r\n"],
    ids=["no-end", "line-feeds", "no-size"],
)
def test_chunks_that_are_none_are_a_reset(send: Send, chunks: bytes) -> None:
    with Attacker(after_request(CHUNKED + chunks)) as attacker:
        result = send(attacker.url)
    assert (result.error_code, result.status_code) == ("reset", None)


DOUBTFUL = {
    "lengths-and-chunks": OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n",
    "length-and-unknown-coding": OK + b"Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n",
    "length-and-identity": OK + b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nOK",
    "underscore": OK + b"Content-Length: 1_0\r\n\r\n0123456789",
    "plus": OK + b"Content-Length: +2\r\n\r\nOK",
    "negative": OK + b"Content-Length: -1\r\n\r\nOK",
    "same-length-twice": OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nOK",
    "list": OK + b"Content-Length: 2, 2\r\n\r\nOK",
    "no-length-at-all": OK + b"Content-Length: \r\n\r\nOK",
    "bad-line": OK + b"no colon here\r\nContent-Length: 2\r\n\r\nOK",
    "space-in-name": OK + b"X Y: 1\r\nContent-Length: 2\r\n\r\nOK",
    "lone-cr": OK + b"X: a\rb\r\nContent-Length: 2\r\n\r\nOK",
    "another-protocol": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
}


@pytest.mark.parametrize("answer", DOUBTFUL.values(), ids=DOUBTFUL)
def test_an_answer_whose_end_is_in_doubt_is_over_at_once_and_the_last_on_its_connection(
    send: Send, answer: bytes
) -> None:
    """The receiver keeps the connection open; an answer must not wait for its end."""

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(answer)

    with Attacker(script) as attacker:
        results = [send(attacker.url, timeout_s=5) for _ in range(2)]
        assert attacker.connections == 2
    seen = {(result.status_code, result.error_code) for result in results}
    assert seen in ({(int(answer[9:12]), None)}, {(None, "reset")})


EXTRAS = {
    "text": b"extra",
    "line": b"\r\n",
    "part-of-a-head": b"HTTP/1.1 200 OK\r\nX: ",
    "an-answer": OK + b"Content-Length: 6\r\n\r\nFORGED",
}


@pytest.mark.parametrize("first", [OK + b"Content-Length: 2\r\n\r\nOK", CHUNKED + b"2\r\nOK\r\n0\r\n\r\n"])
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_nothing_that_came_with_an_answer_is_the_next_one(send: Send, first: bytes, extra: bytes) -> None:
    with Attacker(then(first + extra, late_refusal)) as attacker:
        results = [send(attacker.url, timeout_s=5) for _ in range(2)]
        assert attacker.connections == 2
    assert [(result.status_code, result.response_body) for result in results] == [(200, b"OK")] * 2


def late_refusal(connection: socket.socket) -> None:
    """Refuse the second request, if it comes this way."""
    if read_request(connection):
        time.sleep(0.1)
        connection.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\nREAL")


@pytest.mark.parametrize("size", [8192, 16384 - 60, 4000])
def test_an_answer_left_in_the_layers_of_tls_is_not_the_next_ones(
    make_transport: MakeTransport, ca: CA, size: int
) -> None:
    """One TLS record holds an answer that fills a reader's buffer, and a forged one for the next delivery."""
    head = OK + b"Content-Length: 2\r\nX-Pad: "
    first = head + b"p" * (size - len(head) - 6) + b"\r\n\r\nOK"
    forged = OK + b"Content-Length: 6\r\n\r\nFORGED"
    policy = UrlPolicy(allow_networks=["127.0.0.0/8"])
    send = sender(make_transport(policy, resolver=FakeDNS(["127.0.0.1"]), ca_file=str(ca.file)))
    over = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(first + forged)
        read_request(connection)
        over.set()

    with Attacker(script, context=ca.server_context("hooks.example.com")) as server:
        url = f"https://hooks.example.com:{server.port}/hook"
        results = [send(url) for _ in range(2)]
        assert over.wait(5)
        assert server.connections == 2
    assert all(result.response_body in (b"OK", b"") for result in results)
