"""SECURITY 7, 8: what a receiver can do with a connection that is kept for the next request, or is to end."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flask_rq_webhooks.dispatch.http import Transport
from tests.security.attackers import Attacker, MemoryGrowth, after_request, elapsed, flood, read_request, then
from tests.security.conftest import request_to, sender
from tests.security.test_connections import CA, tls_transport
from tests.servers import wait_until

EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
MAX_GROWTH_MB = 30

MakeTransport = Callable[..., Transport]


def client_ends(attacker: Attacker, before: int) -> int:
    """Return how many descriptors this process has more than *before*, without the attacker's own."""
    return len(os.listdir("/proc/self/fd")) - before - len(attacker._open)


@pytest.mark.parametrize(
    "data", [EMPTY * 1000, b"\r\n" * 30_000, b"a" * 60_000], ids=["answers", "empty-lines", "bytes"]
)
def test_a_flood_on_an_idle_connection_is_not_taken_in(make_transport: MakeTransport, data: bytes) -> None:
    send = sender(make_transport())
    with (
        Attacker(then(EMPTY, flood(data))) as attacker,
        Attacker(after_request(EMPTY)) as honest,
        MemoryGrowth() as growth,
    ):
        assert send(attacker.url).status_code == 200
        with elapsed() as seconds:
            while seconds() < 0.5:
                assert send(honest.url).status_code == 200
    assert growth.peak_mb < MAX_GROWTH_MB


@pytest.mark.parametrize(
    "unasked",
    [b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-A: ", EMPTY, b"\0"],
    ids=["empty-lines", "half-a-head", "an-answer", "a-byte"],
)
def test_a_connection_that_spoke_unasked_is_not_used_again(
    make_transport: MakeTransport, unasked: bytes
) -> None:
    spoken = threading.Event()

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(EMPTY)
            time.sleep(0.05)
            connection.sendall(unasked)
            spoken.set()

    send = sender(make_transport())
    with Attacker(script) as attacker:
        assert send(attacker.url).status_code == 200
        assert spoken.wait(10)
        time.sleep(0.1)
        assert send(attacker.url).status_code == 200
        assert attacker.connections == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say how much has come")
def test_a_quiet_connection_is_known_without_polling(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    polled: list[object] = []
    monkeypatch.setattr(
        "urllib3.connection.wait_for_read", lambda sock, timeout: bool(polled.append(sock)) or False
    )
    answers = [EMPTY, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"] * 3

    def script(connection: socket.socket) -> None:
        for answer in answers:
            read_request(connection)
            connection.sendall(answer)

    send = sender(make_transport())
    with Attacker(script) as attacker:
        for _ in answers:
            assert send(attacker.url).status_code == 200
        assert attacker.connections == 1
    assert polled == []


def test_a_receiver_that_answers_and_never_reads_holds_up_no_closing(make_transport: MakeTransport) -> None:
    """Part of the request is still unsent; an orderly end of the connection would wait for it."""
    release = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(EMPTY)
        release.wait(30)

    transport = make_transport()
    before = len(os.listdir("/proc/self/fd"))
    with Attacker(script) as attacker:
        requests = [request_to(attacker.url, timeout_s=1, body=b"x" * 8_000_000) for _ in range(2)]
        for future in [transport.submit(request) for request in requests]:
            assert future.result(10).error_code in (None, "timeout")
        assert attacker.connections == 2  # what is unsent would be the beginning of another request
        closing = threading.Thread(target=transport.close, kwargs={"wait": False}, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        wait_until(lambda: client_ends(attacker, before) <= 1)  # the listener
        release.set()


def test_tls_connections_end_without_the_peer(make_transport: MakeTransport, tmp_path: Path) -> None:
    """A peer that does not answer the end of a TLS connection may not hold the descriptor."""
    release = threading.Event()
    ca = CA(tmp_path)

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(EMPTY)
        release.wait(30)

    transport = tls_transport(make_transport, ca)
    send = sender(transport)
    before = len(os.listdir("/proc/self/fd"))
    with Attacker(script, context=ca.server_context("*.example.com")) as attacker:
        for number in range(100):
            assert send(f"https://host{number}.example.com:{attacker.port}/").status_code == 200
        assert attacker.connections == 100
        wait_until(lambda: client_ends(attacker, before) <= 80)  # requests has two for each
        transport.close(wait=True)
        wait_until(lambda: client_ends(attacker, before) <= 2)
        release.set()
