"""SECURITY 5–8 in the details both transports must agree on: framing, resets, what is left behind, logs."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from flask_rq_webhooks.dispatch.http import Transport, address_guard
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.security.attackers import Attacker, Script, after_request, read_request, then
from tests.security.conftest import Send, request_to, sender
from tests.servers import wait_until

OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"Content-Length: 0\r\n\r\n"

MakeTransport = Callable[..., Transport]


@pytest.fixture
def send(send_over_either: Send) -> Send:
    return send_over_either


def reset(connection: socket.socket) -> None:
    """End the connection with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_after(*chunks: bytes, read: bool = True) -> Script:
    def script(connection: socket.socket) -> None:
        if read:
            read_request(connection)
        for chunk in chunks:
            connection.sendall(chunk)
        time.sleep(0.05)
        reset(connection)

    return script


RESETS = {
    "at-once": reset_after(read=False),
    "after-request": reset_after(),
    "in-status-line": reset_after(b"HTTP/1.1 2"),
    "in-headers": reset_after(OK + b"X-A: b\r\n"),
    "after-interim": reset_after(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "in-body": reset_after(OK + b"Content-Length: 10\r\n\r\nabc"),
    "in-chunk": reset_after(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"),
    "between-chunks": reset_after(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"),
    "until-close": reset_after(OK + b"\r\nabc"),
}


@pytest.mark.parametrize("script", RESETS.values(), ids=RESETS)
def test_a_connection_reset_at_any_stage_is_a_reset(send: Send, script: Script) -> None:
    with Attacker(script) as attacker:
        result = send(attacker.url)
        # What a receiver may do to a connection that it takes for idle is tried again.
        before_a_byte = script in (RESETS["at-once"], RESETS["after-request"])
        assert attacker.connections == 1 + (Attacker.answers_first and before_a_byte)
    assert (result.error_code, result.status_code, result.response_body) == ("reset", None, b"")


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 2\r\nContent-Length: 50\r\n\r\nok",
        OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        OK + b"Content-Length: 2\r\nnonsense\r\n\r\nok",
    ],
    ids=["two-lengths", "length-and-chunks", "chunks-and-length", "no-header"],
)
def test_where_an_answer_ends_in_doubt_the_connection_is_not_used_again(send: Send, answer: bytes) -> None:
    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(answer)

    with Attacker(script) as attacker:
        results = [send(attacker.url, timeout_s=1) for _ in range(2)]
        assert attacker.connections == 2
    assert {(result.status_code, result.error_code) for result in results} <= {(200, None), (None, "reset")}


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_a_body_where_none_may_be_is_ignored(send: Send, status: bytes) -> None:
    answer = b"HTTP/1.1 " + status + b"\r\nContent-Type: text/plain\r\n\r\n<p>thank you</p>"

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(answer)

    with Attacker(script) as attacker:
        results = [send(attacker.url) for _ in range(2)]
    assert {result.status_code for result in results} == {int(status[:3])}
    assert {result.response_body for result in results} == {b""}


def test_long_headers_within_the_bound_are_fine(send: Send) -> None:
    head = OK + b"X-Policy: " + b"a" * 30_000 + b"\r\nRetry-After: 5\r\nContent-Length: 2\r\n\r\n"
    with Attacker(after_request(head + b"ok")) as attacker:
        result = send(attacker.url)
    assert (result.status_code, result.response_body, result.retry_after) == (200, b"ok", "5")


def test_an_answer_byte_by_byte_is_an_answer(send: Send) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in OK + b"Content-Length: 2\r\nServer: slow\r\n\r\nok":
            connection.sendall(bytes([byte]))
            time.sleep(0.002)

    with Attacker(script) as attacker:
        result = send(attacker.url)
    assert (result.status_code, result.response_body) == (200, b"ok")
    assert result.response_headers["server"] == "slow"


def test_an_answer_before_the_request_was_read_counts(send: Send) -> None:
    def script(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        time.sleep(0.3)

    with Attacker(script) as attacker:
        result = send(attacker.url, body=b"x" * 50_000)
    assert result.status_code == 413


def test_header_names_are_found_however_they_are_written(send: Send) -> None:
    head = OK + b"CONTENT-TYPE: text/plain\r\nretry-after: 1\r\nRETRY-AFTER: 2\r\nContent-Length: 0\r\n\r\n"
    with Attacker(after_request(head)) as attacker:
        result = send(attacker.url)
    assert result.response_headers["content-type"] == "text/plain"
    assert result.retry_after == "1, 2"


def test_nothing_is_left_of_a_receiver_that_never_reads(make_transport: MakeTransport) -> None:
    before = len(os.listdir("/proc/self/fd"))
    transport = make_transport()
    with Attacker(lambda _connection: time.sleep(3)) as attacker:
        with_attacker = len(os.listdir("/proc/self/fd"))
        requests = [request_to(attacker.url, timeout_s=0.5, body=b"x" * 8_000_000) for _ in range(4)]
        codes = {future.result(20).error_code for future in [transport.submit(one) for one in requests]}
        assert codes == {"timeout"}
        # The attacker's own ends are in this process too, four of them until it lets go.
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= with_attacker + 4 + 8)
        transport.close(wait=True)
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= with_attacker + 4)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def answer_each(connection: socket.socket) -> None:
    while read_request(connection):
        connection.sendall(EMPTY)


def test_the_connections_kept_are_bounded(make_transport: MakeTransport) -> None:
    """A thousand hosts that get one request each may not take a thousand descriptors."""
    policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
    with Attacker(answer_each) as attacker:
        send = sender(make_transport(policy, resolver=lambda _host, _port: ["127.0.0.1"]))
        for number in range(100):
            assert send(f"http://host{number}.example.com:{attacker.port}/").status_code == 200
        assert attacker.connections == 100
        wait_until(lambda: len(attacker._open) <= 40)


def test_many_hosts_served_in_turn_find_their_connections_again(make_transport: MakeTransport) -> None:
    policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
    with Attacker(answer_each) as attacker:
        transport = make_transport(policy, concurrency=16, resolver=lambda _host, _port: ["127.0.0.1"])
        urls = [f"http://host{number}.example.com:{attacker.port}/" for number in range(60)]
        for _ in range(3):
            futures = [transport.submit(request_to(url)) for url in urls]
            assert {future.result(10).status_code for future in futures} == {200}
        assert attacker.connections == 60


def test_the_connections_kept_are_counted_over_all_hosts(make_transport: MakeTransport) -> None:
    """Hosts that get several requests at once may not take more than those that get one."""
    together = threading.Barrier(4)

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            together.wait(10)
            connection.sendall(EMPTY)

    policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
    with Attacker(script) as attacker:
        transport = make_transport(policy, concurrency=4, resolver=lambda _host, _port: ["127.0.0.1"])
        for number in range(20):
            url = f"http://host{number}.example.com:{attacker.port}/"
            futures = [transport.submit(request_to(url)) for _ in range(4)]
            assert {future.result(10).status_code for future in futures} == {200}
        assert attacker.connections == 80
        wait_until(lambda: len(attacker._open) <= 36)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE])
def test_a_shortage_of_descriptors_is_not_the_receivers_fault(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fail(*_args: object) -> NoReturn:
        raise OSError(error, "none left")

    assert sender(make_transport(resolver=fail))("https://example.com/").error_code == "internal"
    send = sender(make_transport())
    monkeypatch.setattr(address_guard, "_socket_for", fail)
    result = send("http://127.0.0.1:9/")
    assert result.error_code == "internal"
    assert "descriptors" in (result.error_detail or "")


def test_no_log_at_any_level_holds_a_url_or_a_secret(
    make_transport: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    scripts = [
        after_request(EMPTY),
        after_request(b"nonsense\r\n\r\n"),
        after_request(OK + b"no header\r\nContent-Length: 0\r\n\r\n"),
        after_request(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/?token=hunter2\r\n\r\n"),
        then(OK + b"Content-Length: 5\r\n\r\n", lambda _connection: time.sleep(0.4)),
        reset_after(),
    ]
    transport = make_transport()
    for script in scripts:
        with Attacker(script) as attacker:
            request = request_to(
                f"{attacker.url}/hunter2?token=hunter2",
                timeout_s=0.3,
                headers={"Authorization": "hunter2"},
                body=b"hunter2",
            )
            for _ in range(2):
                transport.submit(request).result(10)
    transport.close(wait=True)
    assert "hunter2" not in caplog.text
