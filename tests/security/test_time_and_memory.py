"""SECURITY 5, 7, 8: every attack on time and memory, run for real on loopback.

Bounds: the deadline plus one second, and 30 MB.
"""

from __future__ import annotations

import gzip
import os
import socket
import threading
import time
from collections.abc import Callable

import pytest

from flask_rq_webhooks.dispatch.http import BODY_CAP, Transport
from tests.security.attackers import (
    Attacker,
    MemoryGrowth,
    Script,
    after_request,
    drip,
    elapsed,
    flood,
    read_request,
    silence,
    then,
)
from tests.security.conftest import Send, request_to

DEADLINE_S = 1.0
MAX_GROWTH_MB = 30

OK = b"HTTP/1.1 200 OK\r\n"


def refuse_to_read(connection: socket.socket) -> None:
    """Take nothing of the request, so that the sender's buffers fill."""
    time.sleep(DEADLINE_S + 0.5)


def drip_then_end_headers(connection: socket.socket) -> None:
    """Leave the headers unfinished: cut off there, http.client reports status 200."""
    read_request(connection)
    connection.sendall(OK + b"X-Never: ended")
    silence(connection)


STALLS: dict[str, Script] = {
    "no-answer": silence,
    "slow-status-line": then(b"", drip(b"HTTP/1.1 200 OK" + b" " * 1000)),
    "slow-headers": then(OK, drip(b"X-A: b\r\n")),
    "slow-header-value": then(OK + b"X-A: ", drip(b"a")),
    "unfinished-headers": drip_then_end_headers,
    "slow-body": then(OK + b"Content-Length: 100000\r\n\r\n", drip(b"a")),
    "slow-body-until-close": then(OK + b"\r\n", drip(b"a")),
    "slow-chunks": then(OK + b"Transfer-Encoding: chunked\r\n\r\n", drip(b"1\r\na\r\n")),
    "slow-chunk-size": then(OK + b"Transfer-Encoding: chunked\r\n\r\n", drip(b"0")),
    "slow-trailers": then(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", drip(b"X-A: b\r\n")),
    "silent-body": then(OK + b"Content-Length: 5\r\n\r\n", silence),
    "100-continue-drip": then(b"", drip(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01)),
    "trailer-flood": then(
        OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", flood(b"X-A: bbbbbbbbbbbbbbbbbbbbbbbb\r\n" * 50)
    ),
    "chunk-extension-drip": then(OK + b"Transfer-Encoding: chunked\r\n\r\n1;a=", drip(b"b")),
}


@pytest.fixture
def send(send_over_either: Send) -> Send:
    return send_over_either


@pytest.mark.parametrize("script", STALLS.values(), ids=STALLS)
def test_a_stalling_receiver_is_left_at_the_deadline(send: Send, script: Script) -> None:
    for _ in range(2):  # a flood on a machine that is busy with other tests gets a second chance
        with Attacker(script) as attacker, MemoryGrowth() as growth, elapsed() as seconds:
            result = send(attacker.url, timeout_s=DEADLINE_S)
            took = seconds()
        if took < DEADLINE_S + 1:
            break
    if script is STALLS["trailer-flood"]:  # no more trailers are read than headers
        assert (result.error_code, result.status_code) == ("reset", None)
    else:
        assert (result.error_code, result.status_code) == ("timeout", None)
        assert took >= DEADLINE_S * 0.9
    assert took < DEADLINE_S + 1
    assert growth.peak_mb < MAX_GROWTH_MB
    assert result.response_body == b""


def test_a_receiver_that_does_not_read_is_left_at_the_deadline(send: Send) -> None:
    with Attacker(refuse_to_read) as attacker, elapsed() as seconds:
        result = send(attacker.url, timeout_s=DEADLINE_S, body=b"x" * 20_000_000)
        took = seconds()
    assert result.error_code == "timeout"
    assert took < DEADLINE_S + 1


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (OK + b"\r\n", 200),
        (OK + b"Content-Length: 99999999999999\r\n\r\n", 200),
        (OK + b"Content-Encoding: gzip\r\n\r\n", 200),
        (b"HTTP/1.1 500 Oops\r\n\r\n", 500),
        (b"HTTP/1.1 410 Gone\r\nContent-Length: 10000000000\r\n\r\n", 410),
        (b"HTTP/1.0 200 OK\r\n\r\n", 200),
    ],
    ids=["until-close", "long", "encoded", "500", "410", "http-1.0"],
)
def test_an_endless_body_is_read_up_to_the_cap(send: Send, answer: bytes, status: int) -> None:
    with (
        Attacker(then(answer, flood(b"a" * 65536))) as attacker,
        MemoryGrowth() as growth,
        elapsed() as seconds,
    ):
        result = send(attacker.url, timeout_s=DEADLINE_S)
        took = seconds()
    assert (result.status_code, result.error_code) == (status, None)
    assert result.response_body == b"a" * BODY_CAP
    assert took < DEADLINE_S
    assert growth.peak_mb < MAX_GROWTH_MB


def test_an_endless_chunk_is_read_up_to_the_cap(send: Send) -> None:
    head = OK + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFF\r\n"
    with Attacker(then(head, flood(b"a" * 65536))) as attacker, MemoryGrowth() as growth:
        result = send(attacker.url, timeout_s=DEADLINE_S)
    assert (result.status_code, len(result.response_body)) == (200, BODY_CAP)
    assert growth.peak_mb < MAX_GROWTH_MB


def test_a_gzip_bomb_is_kept_as_it_came(send: Send) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    with Attacker(after_request(head + bomb)) as attacker, MemoryGrowth() as growth:
        result = send(attacker.url)
    assert (result.status_code, result.error_code) == (200, None)
    assert result.response_body == bomb[:BODY_CAP]
    assert growth.peak_mb < MAX_GROWTH_MB


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308, 399])
def test_a_redirect_is_neither_followed_nor_read(send: Send, status: int) -> None:
    with Attacker(after_request(OK + b"Content-Length: 0\r\n\r\n")) as target:
        elsewhere = target.url
        bomb = gzip.compress(b"\0" * 50_000_000)
        head = b"HTTP/1.1 %d Moved\r\nLocation: %s?token=secret\r\n" % (status, elsewhere.encode())
        head += b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % (len(bomb) + 10**9)
        with (
            Attacker(then(head + bomb, flood(b"\0" * 65536))) as attacker,
            MemoryGrowth() as growth,
            elapsed() as seconds,
        ):
            result = send(attacker.url, timeout_s=DEADLINE_S)
            took = seconds()
        assert target.connections == 0
    assert (result.status_code, result.error_code, result.response_body) == (status, "redirect", b"")
    assert result.response_headers["location"] == elsewhere
    assert took < DEADLINE_S
    assert growth.peak_mb < MAX_GROWTH_MB


HEADER_BOMBS = {
    "many": then(OK, flood(b"X-A: b\r\n" * 1000)),
    "long-name": then(OK, flood(b"a" * 65536)),
    "long-value": then(OK + b"X-A: ", flood(b"a" * 65536)),
    "long-values": then(OK, flood(b"X-A: " + b"a" * 60_000 + b"\r\n")),
    "folded": then(OK + b"X-A: b\r\n", flood(b" continued " * 5000 + b"\r\n")),
    "long-status-line": then(b"HTTP/1.1 200 ", flood(b"a" * 65536)),
    "100-continue-flood": then(b"", flood(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)),
    "103-early-hints-flood": then(b"", flood(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 50)),
    "long-interim": then(b"HTTP/1.1 100 Continue\r\nX-A: ", flood(b"a" * 65536)),
}


@pytest.mark.parametrize("script", HEADER_BOMBS.values(), ids=HEADER_BOMBS)
def test_a_header_bomb_ends_the_attempt(send: Send, script: Script) -> None:
    with Attacker(script) as attacker, MemoryGrowth() as growth, elapsed() as seconds:
        result = send(attacker.url, timeout_s=DEADLINE_S)
        took = seconds()
    assert (result.error_code, result.status_code) == ("reset", None)
    assert took < DEADLINE_S + 1
    assert growth.peak_mb < MAX_GROWTH_MB


BROKEN = {
    "closes-at-once": lambda connection: None,
    "closes-after-request": after_request(),
    "closes-in-headers": after_request(OK + b"X-A: b\r\n"),
    "closes-in-status-line": after_request(b"HTTP/1.1 2"),
    "closes-in-body": after_request(OK + b"Content-Length: 10\r\n\r\nabc"),
    "closes-in-chunk": after_request(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"),
    "not-http": after_request(b"220 mail.example.com ESMTP\r\n"),
    "binary": after_request(bytes(range(256))),
    "bad-status": after_request(b"HTTP/1.1 abc OK\r\n\r\n"),
    "status-99": after_request(b"HTTP/1.1 99 OK\r\n\r\n"),
    "status-1000": after_request(b"HTTP/1.1 1000 OK\r\n\r\n"),
    "http-2": after_request(b"HTTP/2 200\r\n\r\n"),
    "bad-chunk-size": after_request(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc"),
}


#: What a receiver may do to a connection that it takes for idle.
BEFORE_A_BYTE = (BROKEN["closes-at-once"], BROKEN["closes-after-request"])


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_a_reset(send: Send, script: Script) -> None:
    with Attacker(script) as attacker:
        result = send(attacker.url)
        repeated = Attacker.answers_first and script in BEFORE_A_BYTE
        assert attacker.connections == 1 + repeated
    assert (result.error_code, result.status_code) == ("reset", None)
    assert result.error_detail


def test_lines_that_are_no_headers_do_not_matter_and_are_not_logged(
    send: Send, caplog: pytest.LogCaptureFixture
) -> None:
    answer = OK + b"Content-Type: text/plain\r\nnonsense\r\n\r\nhello"
    with Attacker(after_request(answer)) as attacker:
        result = send(attacker.url + "?token=secret")
    assert (result.status_code, result.error_code) == (200, None)
    assert "secret" not in caplog.text


def test_interim_responses_are_skipped(send: Send) -> None:
    answer = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok"
    )
    with Attacker(after_request(answer)) as attacker:
        result = send(attacker.url)
    assert (result.status_code, result.response_body) == (201, b"ok")


def test_one_attack_on_every_thread_leaves_the_next_request_alone(
    make_transport: Callable[..., Transport],
) -> None:
    transport = make_transport(concurrency=8)
    with (
        Attacker(then(OK, drip(b"X-A: b\r\n"))) as attacker,
        Attacker(after_request(OK + b"Content-Length: 0\r\n\r\n")) as honest,
        elapsed() as seconds,
    ):
        stuck = [transport.submit(request_to(attacker.url, timeout_s=DEADLINE_S)) for _ in range(8)]
        fine = transport.submit(request_to(honest.url))
        assert fine.result(10).status_code == 200
        assert [future.result(10).error_code for future in stuck] == ["timeout"] * 8
        assert seconds() < DEADLINE_S + 1.5


def test_fifty_attackers_at_once_are_bounded(make_transport: Callable[..., Transport]) -> None:
    transport = make_transport(concurrency=50)
    with (
        Attacker(then(OK, flood(b"X-A: " + b"a" * 600 + b"\r\n"))) as headers,
        Attacker(then(OK + b"\r\n", flood(b"a" * 65536))) as body,
        MemoryGrowth() as growth,
    ):
        futures = [transport.submit(request_to(url, timeout_s=5)) for url in [headers.url, body.url] * 25]
        codes = {future.result(20).error_code for future in futures}
    assert codes == {"reset", None}
    assert growth.peak_mb < 2 * MAX_GROWTH_MB  # the attackers live in this process too


def test_threads_and_descriptors_are_bounded_and_given_back(
    make_transport: Callable[..., Transport],
) -> None:
    before_fds = len(os.listdir("/proc/self/fd"))
    before_threads = threading.active_count()
    transport = make_transport(concurrency=4)
    with Attacker(after_request(OK + b"Content-Length: 0\r\n\r\n")) as honest:
        for future in [transport.submit(request_to(honest.url)) for _ in range(100)]:
            assert future.result(20).status_code == 200
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("rq-webhooks")]
        assert len(names) <= 4 + 2  # the loop and the watchdog
    transport.close(wait=True)
    assert threading.active_count() <= before_threads
    assert len(os.listdir("/proc/self/fd")) <= before_fds
