"""SECURITY 7: one thread sends on all kept connections; no receiver can make it wait."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from requests.adapters import HTTPAdapter

from flask_rq_webhooks.dispatch.http import BODY_CAP, AttemptResult, Transport
from flask_rq_webhooks.dispatch.http.client import DaemonThreads, RequestsTransport
from flask_rq_webhooks.dispatch.http.wire_format import BoundedResponse
from tests.security.attackers import (
    Attacker,
    MemoryGrowth,
    Script,
    drip,
    elapsed,
    flood,
    read_request,
    silence,
)
from tests.security.conftest import request_to, sender
from tests.security.test_connections import CA, tls_transport
from tests.servers import wait_until

OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"Content-Length: 0\r\n\r\n"
DEADLINE_S = 1.5

MakeTransport = Callable[..., Transport]


def honest(connection: socket.socket) -> None:
    while read_request(connection):
        connection.sendall(EMPTY)


def honest_while(answers: threading.Event) -> Script:
    """Return a script that answers while *answers* is set."""

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            answers.wait(10)
            connection.sendall(EMPTY)

    return script


def honest_once(then: Script, together: threading.Barrier) -> Script:
    """Return a script that answers one request, all connections at once, and goes on with *then*."""

    def script(connection: socket.socket) -> None:
        read_request(connection)
        together.wait(10)
        connection.sendall(EMPTY)
        then(connection)

    return script


def answered(*chunks: bytes, rest: Script = silence) -> Script:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        for chunk in chunks:
            connection.sendall(chunk)
        rest(connection)

    return script


STOPS = {
    "before-an-answer": answered(),
    "in-the-status-line": answered(b"HTTP/1.1 2"),
    "in-the-head": answered(OK + b"X-A: b\r\n"),
    "in-the-body": answered(OK + b"Content-Length: 10\r\n\r\nabc"),
    "in-a-chunk": answered(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"),
    "drips": answered(OK, rest=drip(b"X-A: b\r\n")),
    "never-reads": lambda connection: time.sleep(DEADLINE_S + 1),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_receivers_that_stop_on_kept_connections_hold_nobody_up(
    make_transport: MakeTransport, stop: Script
) -> None:
    transport = make_transport(concurrency=8)
    send = sender(transport)
    large = b"x" * (8_000_000 if stop is STOPS["never-reads"] else 100)
    with Attacker(honest) as other, Attacker(honest_once(stop, threading.Barrier(4))) as attacker:
        kept = [transport.submit(request_to(attacker.url)) for _ in range(4)]
        assert [future.result(10).status_code for future in kept] == [200] * 4
        assert send(other.url).status_code == 200
        stuck = [
            transport.submit(request_to(attacker.url, timeout_s=DEADLINE_S, body=large)) for _ in range(4)
        ]
        with elapsed() as seconds:
            for _ in range(100):
                assert send(other.url).status_code == 200
            assert seconds() < DEADLINE_S * 0.8
        assert not any(future.done() for future in stuck)
        assert [future.result(10).error_code for future in stuck] == ["timeout"] * 4
        assert attacker.connections == 4


FLOODS = {
    "extensions": OK + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"a" * 60_000 + b"\r\nb\r\n") * 200,
    "trailers": OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: b\r\n" * 100_000,
    "interim": b"HTTP/1.1 103 Early\r\n\r\n" * 100_000,
    "body": OK + b"\r\n" + b"a" * 1_000_000,
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS)
def test_a_flood_on_a_kept_connection_holds_nobody_up(make_transport: MakeTransport, data: bytes) -> None:
    longest = 0.0
    transport = make_transport(concurrency=4)
    send = sender(transport)
    flooding = answered(rest=flood(data))
    with (
        Attacker(honest) as other,
        Attacker(honest_once(flooding, threading.Barrier(1))) as attacker,
        MemoryGrowth() as growth,
    ):
        assert send(attacker.url).status_code == send(other.url).status_code == 200
        future = transport.submit(request_to(attacker.url, timeout_s=DEADLINE_S))
        for _ in range(50):
            with elapsed() as seconds:
                assert send(other.url).status_code == 200
            longest = max(longest, seconds())
        assert future.result(10).error_code in ("timeout", "reset", None)
    assert longest < DEADLINE_S / 2
    assert growth.peak_mb < 30


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS)
def test_no_more_than_a_little_is_read_while_others_wait(data: bytes) -> None:
    """Whatever comes, and however fast: the rest is for a thread of its own."""
    taken = 0

    def recv(size: int) -> bytes:
        nonlocal taken
        piece = data[taken : taken + min(size, 5000)]
        taken += len(piece)
        return piece

    sock, attempt = cast(Any, SimpleNamespace(recv=recv)), cast(Any, SimpleNamespace(answered=False))
    response = BoundedResponse(sock, attempt, at_once=True)

    def read() -> None:
        response.read_head()
        response.read_body(BODY_CAP * 10)

    with pytest.raises(BlockingIOError):
        read()
    assert taken == response.received <= 32 * 1024
    assert response.so_far == data[:taken]


@pytest.mark.parametrize("stop", [STOPS["before-an-answer"], STOPS["in-the-head"]], ids=["waits", "reads"])
def test_closing_aborts_what_waits_on_kept_connections(make_transport: MakeTransport, stop: Script) -> None:
    transport = make_transport()
    with Attacker(honest_once(stop, threading.Barrier(1))) as attacker, elapsed() as seconds:
        assert sender(transport)(attacker.url).status_code == 200
        future = transport.submit(request_to(attacker.url, timeout_s=30))
        time.sleep(0.2)
        assert future.running()
        transport.close(wait=False)
        assert future.result(10).error_code == "internal"
        assert seconds() < 5


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_in_flight_than_the_limit_and_in_order(
    make_transport: MakeTransport, concurrency: int
) -> None:
    transport = make_transport(concurrency=concurrency)
    lock = threading.Lock()
    begun: list[int] = []
    answered = most = ahead = 0

    def script(connection: socket.socket) -> None:
        nonlocal answered, most, ahead
        while request := read_request(connection):
            with lock:
                begun.append(int(request.split(b"/", 2)[1].split()[0]))
                most = max(most, len(begun) - answered)
                ahead = max(ahead, begun[-1] - answered)
            time.sleep(0.003)
            with lock:
                answered += 1
            connection.sendall(EMPTY)

    with Attacker(script) as attacker:
        host = attacker.url.removesuffix("/hook")
        futures = [transport.submit(request_to(f"{host}/{number}")) for number in range(60)]
        assert {future.result(20).status_code for future in futures} == {200}
        assert attacker.connections <= concurrency
    assert most == concurrency
    assert sorted(begun) == list(range(60))
    # In whatever order the receiver's threads read: none comes while as many before it are not answered.
    assert ahead < concurrency


def test_many_who_submit_lose_nothing(make_transport: MakeTransport) -> None:
    transport = make_transport(concurrency=8)
    futures: list[Future[AttemptResult]] = []

    def give() -> None:
        for _ in range(150):
            futures.append(transport.submit(request_to(attacker.url)))

    with Attacker(honest) as attacker:
        givers = [threading.Thread(target=give) for _ in range(6)]
        for giver in givers:
            giver.start()
        for giver in givers:
            giver.join()
        assert len(futures) == 900
        assert {future.result(20).status_code for future in futures} == {200}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Give the list of what threads of their own had to do."""
    tasks: list[object] = []
    run = DaemonThreads.run

    def counted(self: DaemonThreads, task: Callable[[], None]) -> None:
        tasks.append(task)
        run(self, task)

    monkeypatch.setattr(DaemonThreads, "run", counted)
    return tasks


def test_kept_connections_need_no_further_thread(make_transport: MakeTransport, tasks: list[object]) -> None:
    send = sender(make_transport())
    with Attacker(honest) as attacker:
        for _ in range(50):
            assert send(attacker.url).status_code == 200
        assert attacker.connections == len(tasks) == 1


def test_answers_over_tls_are_read_by_a_thread_each(
    make_transport: MakeTransport, tmp_path: Path, tasks: list[object]
) -> None:
    """One read of OpenSSL lasts as long as records come that hold no data, such as tickets."""
    ca = CA(tmp_path)
    answers = [
        [EMPTY],
        [OK + b"Content-Length: 2\r\n\r\n", b"ok"],
        [
            b"HTTP/1.1 103 Early\r\n\r\n",
            OK,
            b"Transfer-Encoding: chunked\r\n\r\n",
            b"2\r\nok\r\n",
            b"0\r\n\r\n",
        ],
        [OK + b"Content-Length: 2\r\n\r\nok"],
        [OK + b"\r\nok"],
    ]

    def script(connection: socket.socket) -> None:
        for pieces in answers:
            if len(read_request(connection)) < 100_000:
                return
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.02)

    transport = tls_transport(make_transport, ca)
    with Attacker(script, context=ca.server_context("*.example.com")) as attacker:
        url = f"https://a.example.com:{attacker.port}/hook"
        for pieces in answers:
            result = sender(transport)(url, body=b"x" * 100_000)
            assert (result.status_code, result.error_code) == (200, None)
            assert result.response_body == (b"" if pieces is answers[0] else b"ok")
        assert attacker.connections == 1
        assert len(tasks) == len(answers)


def test_a_connection_closed_after_a_kept_request_is_replaced(make_transport: MakeTransport) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(EMPTY)
        read_request(connection)  # and closes: it took the connection for idle

    send = sender(make_transport())
    with Attacker(script) as attacker:
        for _ in range(3):
            assert send(attacker.url).status_code == 200
        assert attacker.connections == 3


def test_a_request_is_made_where_there_is_no_thread_for_it(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(DaemonThreads, "run", none)
    caplog.set_level(logging.ERROR)
    send = sender(make_transport())
    with Attacker(honest) as attacker:
        for _ in range(3):
            assert send(attacker.url).status_code == 200
        assert attacker.connections == len(caplog.records) == 1


def test_a_connection_that_cannot_be_watched_has_a_thread(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch, tasks: list[object]
) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError("no space for it")

    send = sender(make_transport())
    with Attacker(honest) as attacker:
        assert send(attacker.url).status_code == 200
        monkeypatch.setattr(selectors.DefaultSelector, "register", full)
        for _ in range(3):
            assert send(attacker.url).status_code == 200
        assert attacker.connections == 1
        assert len(tasks) == 4


def test_the_first_request_after_a_rest_is_begun_where_it_is_submitted(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread less on its way; the loop reads the answer, and begins what comes while it is busy."""
    real, begun_by = HTTPAdapter.send, []

    def noted(*arguments: Any, **options: Any) -> Any:
        begun_by.append(threading.current_thread())
        return real(*arguments, **options)

    monkeypatch.setattr(HTTPAdapter, "send", noted)
    transport = cast(RequestsTransport, make_transport(concurrency=1))
    answers = threading.Event()
    answers.set()
    with Attacker(honest_while(answers)) as attacker:
        assert transport.submit(request_to(attacker.url)).result(10).status_code == 200
        wait_until(lambda: transport._loop._sleeps, what="the loop sleeps")
        answers.clear()
        futures = [transport.submit(request_to(attacker.url)) for _ in range(3)]
        answers.set()
        assert [future.result(10).status_code for future in futures] == [200] * 3
    here = threading.current_thread()
    assert [thread is here for thread in begun_by[1:]] == [True, False, False]


@pytest.mark.parametrize("error", [SystemExit, KeyError])
def test_whatever_is_raised_the_next_requests_are_made(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """By what replaces the adapter, and by who is told of the result."""
    transport = make_transport(concurrency=1)
    send = sender(transport)

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    answers = threading.Event()
    answers.set()
    with Attacker(honest_while(answers)) as attacker:
        assert send(attacker.url).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(HTTPAdapter, "send", fail)
            assert send(attacker.url).error_code == "internal"
        answers.clear()
        told = [transport.submit(request_to(attacker.url)) for _ in range(3)]
        for future in told:
            future.add_done_callback(fail)
        answers.set()
        assert [future.result(10).status_code for future in told] == [200] * 3
        assert send(attacker.url).status_code == 200
    transport.close(wait=True)
