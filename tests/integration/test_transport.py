"""The transport against receivers that behave, or nearly: bytes on the wire, connections, closing."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from flask_rq_webhooks.dispatch.http import BODY_CAP, AttemptRequest, RequestsTransport, pool
from flask_rq_webhooks.dispatch.http.pool import PinnedHTTPConnection
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.security.attackers import Attacker, after_request, read_request, silence
from tests.security.test_connections import unanswering
from tests.servers import ROOT, Receiver, wait_until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Make = Callable[[int], RequestsTransport]


@pytest.fixture
def make() -> Make:
    """Give a function that makes a transport for so many requests at once."""
    return lambda concurrency: RequestsTransport(UrlPolicy(allow_http=True), concurrency=concurrency)


@pytest.fixture
def transport(make: Make) -> Iterator[RequestsTransport]:
    with make(4) as made:
        yield made


def request_to(url: str, **changes: Any) -> AttemptRequest:
    values: dict[str, Any] = {
        "url": url,
        "headers": {},
        "body": b"{}",
        "timeout_s": 5,
        "connect_timeout_s": 2,
    }
    return AttemptRequest(**(values | changes))


def keep_alive(answer: bytes = OK, requests: int = 1000) -> Callable[[socket.socket], None]:
    """Answer *requests* requests on one connection."""

    def script(connection: socket.socket) -> None:
        for _ in range(requests):
            if not read_request(connection):
                return
            connection.sendall(answer)

    return script


def test_the_bytes_on_the_wire(transport: RequestsTransport) -> None:
    got: list[bytes] = []

    def script(connection: socket.socket) -> None:
        got.append(read_request(connection))
        connection.sendall(OK)

    with Attacker(script) as server:
        request = request_to(
            f"http://127.0.0.1:{server.port}/a/../päth%2f?q={{x}}#fragment",
            headers={
                "Content-Type": "application/json",
                "User-Agent": "flask-rq-webhooks/test",
                "webhook-id": "evt_1",
                # what must not come from here
                "Host": "evil.example",
                "content-length": "1",
                "Transfer-Encoding": "chunked",
                "Accept-Encoding": "gzip",
                "Connection": "close",
                "Expect": "100-continue",
            },
            body=b'{"a": "\xc3\xbc"}',
        )
        assert transport.submit(request).result(10).status_code == 200
    assert got[0] == (
        b"POST /a/../p%C3%A4th%2f?q=%7Bx%7D HTTP/1.1\r\n"
        + b"Host: 127.0.0.1:%d\r\n" % server_port(request)
        + b"Content-Type: application/json\r\n"
        b"User-Agent: flask-rq-webhooks/test\r\n"
        b"webhook-id: evt_1\r\n"
        b"Accept-Encoding: identity\r\n"
        b"Content-Length: 11\r\n"
        b"\r\n"
        b'{"a": "\xc3\xbc"}'
    )


def server_port(request: AttemptRequest) -> int:
    match = re.search(r":(\d+)/", request.url)
    assert match is not None
    return int(match[1])


def test_the_result_of_an_answer(transport: RequestsTransport) -> None:
    before = datetime.now(UTC)
    headers = {
        "Content-Type": "text/plain",
        "Retry-After": "120",
        "X-Request-Id": "r" * 1000,
        "X-Secret": "internal",
        "Set-Cookie": "a=b",
    }
    with Receiver(lambda _received: (503, headers, b"busy\x00\xff")) as receiver:
        result = transport.submit(request_to(receiver.url)).result(10)
    assert (result.status_code, result.error_code, result.error_detail) == (503, None, None)
    assert result.response_body == b"busy\x00\xff"
    assert result.retry_after == "120"
    assert result.response_headers["content-type"] == "text/plain"
    assert result.response_headers["x-request-id"] == "r" * 256
    assert not {"x-secret", "set-cookie"} & set(result.response_headers)
    assert before <= result.started_at <= datetime.now(UTC)
    assert 0 < result.duration_ms < 5000


def test_header_values_are_made_fit_for_the_database(transport: RequestsTransport) -> None:
    answer = b"HTTP/1.1 200 OK\r\nServer: a\x00b\x1b[31mc\x85d\r\nContent-Length: 0\r\n\r\n"
    with Attacker(after_request(answer)) as server:
        result = transport.submit(request_to(server.url)).result(10)
    assert result.response_headers["server"] == "a\ufffdb\ufffd[31mc\ufffdd"


@pytest.mark.parametrize("size", [0, 1, BODY_CAP - 1, BODY_CAP, BODY_CAP + 1, 10 * BODY_CAP])
def test_a_connection_is_kept_if_the_body_was_read_whole(transport: RequestsTransport, size: int) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    with Attacker(keep_alive(answer)) as server:
        for _ in range(3):
            result = transport.submit(request_to(server.url)).result(10)
            assert (result.status_code, len(result.response_body)) == (200, min(size, BODY_CAP))
        assert server.connections == (
            1 if size <= BODY_CAP + 1 else 3
        )  # one byte more is read, to see the end


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 1),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 1),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno", 1),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 3),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 3),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", 3),
    ],
    ids=["204", "chunked", "500", "close", "http-1.0", "redirect"],
)
def test_when_connections_are_kept(transport: RequestsTransport, answer: bytes, connections: int) -> None:
    with Attacker(keep_alive(answer)) as server:
        for _ in range(3):
            transport.submit(request_to(server.url)).result(10)
        assert server.connections == connections


@pytest.mark.parametrize("pause_s", [0, 0.03], ids=["together", "later"])
def test_an_answer_nobody_asked_for_is_not_believed(transport: RequestsTransport, pause_s: float) -> None:
    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(OK)
            time.sleep(pause_s)
            connection.sendall(b"HTTP/1.1 201 Smuggled\r\nContent-Length: 0\r\n\r\n")

    with Attacker(script) as server:
        for _ in range(3):
            result = transport.submit(request_to(server.url)).result(10)
            assert (result.status_code, result.response_body) == (200, b"ok")
            time.sleep(0.1)


def test_a_connection_closed_while_idle_costs_no_attempt(transport: RequestsTransport) -> None:
    with Attacker(keep_alive(requests=1)) as server:
        for _ in range(3):
            assert transport.submit(request_to(server.url)).result(10).status_code == 200
            time.sleep(0.05)
        assert server.connections == 3


class ClosesOnSecondRequest:
    """Answer the first request of every connection and hang up on the second without a word."""

    def __init__(self, last_words: bytes = b"", *, first_connection_only: bool = True) -> None:
        self.requests = 0
        self.connections = 0
        self._last_words = last_words
        self._first_only = first_connection_only

    def __call__(self, connection: socket.socket) -> None:
        self.connections += 1
        number = self.connections
        served = 0
        while read_request(connection):
            self.requests += 1
            served += 1
            if served == 2 and (number == 1 or not self._first_only):
                connection.sendall(self._last_words)
                return
            connection.sendall(OK)


def test_a_connection_closed_as_we_write_is_replaced_once(transport: RequestsTransport) -> None:
    script = ClosesOnSecondRequest()
    with Attacker(script) as server:
        assert transport.submit(request_to(server.url)).result(10).status_code == 200
        assert transport.submit(request_to(server.url)).result(10).status_code == 200
    assert (script.connections, script.requests) == (2, 3)


def test_once_an_answer_has_begun_nothing_is_repeated(transport: RequestsTransport) -> None:
    script = ClosesOnSecondRequest(b"HTTP/1.1 200")
    with Attacker(script) as server:
        assert transport.submit(request_to(server.url)).result(10).status_code == 200
        assert transport.submit(request_to(server.url)).result(10).error_code == "reset"
    assert (script.connections, script.requests) == (1, 2)


def test_a_new_connection_that_is_closed_is_not_tried_again(transport: RequestsTransport) -> None:
    with Attacker(lambda connection: None) as server:
        assert transport.submit(request_to(server.url)).result(10).error_code == "reset"
        assert server.connections == 1


def test_a_kept_connection_still_has_a_deadline(transport: RequestsTransport) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK)
        silence(connection)

    with Attacker(script) as server:
        assert transport.submit(request_to(server.url)).result(10).status_code == 200
        started = time.monotonic()
        result = transport.submit(request_to(server.url, timeout_s=0.5)).result(10)
        assert (result.error_code, time.monotonic() - started < 1.5) == ("timeout", True)
        assert server.connections == 1


@pytest.mark.parametrize("limit", ["MAX_IDLE_S", "MAX_AGE_S"])
def test_old_connections_are_not_used(make: Make, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(pool, limit, 0.05)
    with make(4) as transport, Attacker(keep_alive()) as server:
        for _ in range(3):
            assert transport.submit(request_to(server.url)).result(10).status_code == 200
            time.sleep(0.1)
        assert server.connections == 3


def test_idle_connections_are_closed_without_another_request(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MAX_IDLE_S", 0.1)
    ended = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK)
        if connection.recv(1) == b"":
            ended.set()

    with (
        make(2) as transport,
        Attacker(script) as server,
    ):
        assert transport.submit(request_to(server.url)).result(10).status_code == 200
        assert ended.wait(5)


def test_hosts_do_not_share_connections(transport: RequestsTransport) -> None:
    with Attacker(keep_alive()) as server:
        for host in ("127.0.0.1", "localhost", "127.0.0.1"):
            assert transport.submit(request_to(f"http://{host}:{server.port}/")).result(10).status_code == 200
        assert server.connections == 2


def test_no_more_requests_travel_at_once_than_allowed(make: Make) -> None:
    lock = threading.Lock()
    now = peak = 0

    def respond(_received: object) -> int:
        nonlocal now, peak
        with lock:
            now += 1
            peak = max(peak, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return 204

    with (
        Receiver(respond) as receiver,
        make(3) as transport,
    ):
        futures = [transport.submit(request_to(receiver.url)) for _ in range(12)]
        assert {future.result(10).status_code for future in futures} == {204}
    assert peak == 3


def test_a_fault_of_ours_is_a_result_and_is_logged(
    transport: RequestsTransport, caplog: pytest.LogCaptureFixture, receiver: Receiver
) -> None:
    result = transport.submit(
        request_to(receiver.url + "?token=hunter2", headers={"X-Bad": object()})
    ).result(10)
    assert (result.error_code, result.status_code) == ("internal", None)
    assert "Sending to http://127.0.0.1" in caplog.text
    assert "hunter2" not in caplog.text
    assert transport.submit(request_to(receiver.url)).result(10).status_code == 204


@pytest.mark.parametrize("headers", [{"X-A": "✓"}, {"X-A": "a\r\nb: c"}, {"X-A\n": "b"}])
def test_headers_that_slipped_through_are_not_sent(
    transport: RequestsTransport, receiver: Receiver, headers: dict[str, str]
) -> None:
    result = transport.submit(request_to(receiver.url, headers=headers)).result(10)
    assert result.error_code == "internal"
    assert not receiver.received


def test_a_cancelled_future_is_left_alone(make: Make) -> None:
    with (
        make(1) as transport,
        Attacker(silence) as server,
    ):
        stuck = transport.submit(request_to(server.url, timeout_s=0.5))
        waiting = transport.submit(request_to(server.url, timeout_s=0.5))
        assert waiting.cancel()
        assert stuck.result(10).error_code == "timeout"
    assert server.connections == 1


class TestClosing:
    def test_requests_under_way_may_end(self, make: Make) -> None:
        release = threading.Event()
        with Receiver(lambda _received: release.wait(5) and 204) as receiver:
            transport = make(2)
            futures = [transport.submit(request_to(receiver.url)) for _ in range(4)]
            threading.Timer(0.2, release.set).start()
            transport.close(wait=True)
            assert [future.result(0).status_code for future in futures] == [204] * 4

    def test_or_are_broken_off(self, make: Make) -> None:
        with Attacker(silence) as server:
            transport = make(2)
            futures = [transport.submit(request_to(server.url, timeout_s=30)) for _ in range(4)]
            wait_until(lambda: server.connections == 2)
            started = time.monotonic()
            transport.close(wait=False)
            assert time.monotonic() - started < 2
            assert [future.result(0).error_code for future in futures] == ["internal"] * 4

    def test_so_are_look_ups(self) -> None:
        """Those that wait for an answer, and those that wait for a thread."""
        asked = threading.Semaphore(0)
        release = threading.Event()

        def resolver(_host: str, _port: int) -> list[str]:
            asked.release()
            release.wait(30)
            return []

        transport = RequestsTransport(UrlPolicy(), concurrency=4, resolver=resolver)
        requests = [
            request_to(f"https://{name}.example.com/", timeout_s=30, connect_timeout_s=30) for name in "abcd"
        ]
        futures = [transport.submit(request) for request in requests]
        for _ in range(2):
            assert asked.acquire(timeout=5)
        started = time.monotonic()
        transport.close(wait=False)
        assert time.monotonic() - started < 5
        assert [future.result(0).error_code for future in futures] == ["internal"] * 4
        release.set()

    def test_so_are_connections_that_nobody_accepts(self, make: Make) -> None:
        with unanswering("127.0.0.1") as port:
            transport = make(2)
            url = f"http://127.0.0.1:{port}/"
            futures = [
                transport.submit(request_to(url, timeout_s=30, connect_timeout_s=30)) for _ in range(2)
            ]
            wait_until(lambda: all(future.running() for future in futures))
            time.sleep(0.2)
            started = time.monotonic()
            transport.close(wait=False)
            assert time.monotonic() - started < 5
            assert [future.result(0).error_code for future in futures] == ["internal"] * 2

    def test_afterwards_nothing_is_taken(self, make: Make) -> None:
        transport = make(1)
        transport.close(wait=True)
        transport.close(wait=False)
        with pytest.raises(RuntimeError, match="closed"):
            transport.submit(request_to("https://example.com/"))

    def test_a_stalled_look_up_does_not_keep_the_process(self) -> None:
        """The interpreter must be able to exit while getaddrinfo hangs."""
        program = """
import time
from flask_rq_webhooks.dispatch.http import AttemptRequest, RequestsTransport
from flask_rq_webhooks.protocol.urls import UrlPolicy
transport = RequestsTransport(UrlPolicy(), concurrency=1, resolver=lambda host, port: time.sleep(60))
request = AttemptRequest(
    url="https://example.com/", headers={}, body=b"", timeout_s=0.2, connect_timeout_s=0.2
)
print(transport.submit(request).result().error_code)
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=15,
            cwd=ROOT,
            check=True,
        )
        assert done.stdout.strip() == "dns"


def test_nothing_of_a_request_shows_in_its_representation() -> None:
    shown = repr(
        request_to("https://example.com/hunter2", headers={"Authorization": "hunter2"}, body=b"hunter2")
    )
    assert "hunter2" not in shown


def test_a_connection_outside_an_attempt_is_refused() -> None:
    connection = PinnedHTTPConnection("127.0.0.1", 1)
    with pytest.raises(RuntimeError, match="outside"):
        connection.connect()


def test_urllib3s_own_pools_are_not_changed() -> None:
    from urllib3 import poolmanager

    RequestsTransport(UrlPolicy(), concurrency=1).close(wait=True)
    assert poolmanager.pool_classes_by_scheme["https"] is poolmanager.HTTPSConnectionPool
    assert poolmanager.pool_classes_by_scheme["http"] is poolmanager.HTTPConnectionPool


def test_a_transport_that_cannot_be_made_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with pytest.raises(Exception, match=r".+"):
        RequestsTransport(UrlPolicy(), concurrency=1, proxy_url="http://[::1")
    assert set(threading.enumerate()) <= before
