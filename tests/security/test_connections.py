"""SECURITY 3, 4: names, addresses, TLS, proxies, and everything of the environment that must not matter."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.dispatch.http import Transport, default_ssl_context, open_transport
from flask_rq_webhooks.dispatch.http.address_guard import alternate
from flask_rq_webhooks.errors import ConfigurationError
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.certificates import CA
from tests.security.attackers import Attacker, after_request, elapsed, read_request, silence
from tests.security.conftest import Send, request_to, sender
from tests.servers import Receiver, free_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

MakeTransport = Callable[..., Transport]


class FakeDNS:
    """A resolver that gives one set of answers after the other, then the last one always."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def tls_transport(make_transport: MakeTransport, ca: CA) -> Transport:
    """Return a transport that finds every name on loopback and trusts the test's CA."""
    policy = UrlPolicy(allow_networks=["127.0.0.0/8"])
    return make_transport(policy, resolver=FakeDNS(["127.0.0.1"]), ca_file=str(ca.file))


class Connects:
    """Record every address a socket is connected to from here on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[str] = []
        original = socket.socket.connect

        def recording(sock: socket.socket, address: tuple[str, int]) -> None:
            self.addresses.append(address[0])
            original(sock, address)

        monkeypatch.setattr(socket.socket, "connect", recording)


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> Connects:
    return Connects(monkeypatch)


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"],
        ["93.184.215.14", "127.0.0.1"],
        ["127.0.0.1", "93.184.215.14"],
        ["93.184.215.14", "::ffff:127.0.0.1"],
        ["2606:4700::1", "::1"],
        ["169.254.169.254"],
        [*(f"93.184.215.{number}" for number in range(199)), "10.0.0.1"],
        ["fe80::1%lo"],
        ["nonsense"],
    ],
)
def test_a_name_with_any_refused_address_is_refused_before_the_first_packet(
    make_transport: MakeTransport, connects: Connects, answers: list[str]
) -> None:
    with Attacker(after_request(OK)) as internal:
        send = sender(make_transport(UrlPolicy(), resolver=FakeDNS(answers)))
        result = send(f"https://rebind.example.com:{internal.port}/hook")
        assert (result.error_code, result.status_code) == ("blocked", None)
        assert internal.connections == 0
    assert connects.addresses == []


def test_a_refused_literal_is_never_looked_up(make_transport: MakeTransport, connects: Connects) -> None:
    dns = FakeDNS(["93.184.215.14"])
    send = sender(make_transport(UrlPolicy(), resolver=dns))
    for url in (
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://2130706433/",
        "http://example.com/",
        "nonsense",
    ):
        assert send(url).error_code == "blocked"
    assert (dns.asked, connects.addresses) == ([], [])


def test_a_rebinding_name_is_looked_up_once_and_the_checked_address_is_used(
    make_transport: MakeTransport, connects: Connects
) -> None:
    """First answer allowed, every later one would be another machine."""
    with Attacker(after_request(OK)) as allowed:
        dns = FakeDNS(["127.0.0.5"], ["127.0.0.1"])
        policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.5/32"])
        send = sender(make_transport(policy, resolver=dns))
        result = send(f"http://rebind.example.com:{allowed.port}/hook")
    assert result.error_code == "connect"  # nobody listens on 127.0.0.5, and nothing else was tried
    assert len(dns.asked) == 1
    assert connects.addresses == ["127.0.0.5"]


def test_every_new_connection_is_checked_anew(make_transport: MakeTransport) -> None:
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with Attacker(after_request(closing)) as attacker:
        dns = FakeDNS(["127.0.0.1"], ["10.0.0.1"])
        policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
        send = sender(make_transport(policy, resolver=dns))
        url = f"http://rebind.example.com:{attacker.port}/"
        assert send(url).status_code == 200
        assert send(url).error_code == "blocked"
        assert attacker.connections == 1


def test_of_two_hundred_addresses_four_are_tried(make_transport: MakeTransport, connects: Connects) -> None:
    port = free_port()
    answers = [f"127.0.1.{number}" for number in range(1, 201)]
    policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
    send = sender(make_transport(policy, resolver=FakeDNS(answers)))
    result = send(f"http://many.example.com:{port}/")
    assert result.error_code == "connect"
    assert connects.addresses == answers[:4]


def test_a_name_with_thousands_of_addresses_is_left_alone(
    make_transport: MakeTransport, connects: Connects
) -> None:
    answers = [f"93.184.{high}.{low}" for high in range(20) for low in range(200)]
    result = sender(make_transport(UrlPolicy(), resolver=FakeDNS(answers)))("https://many.example.com/")
    assert (result.error_code, result.error_detail) == ("dns", "many.example.com has 4000 addresses")
    assert connects.addresses == []


def test_an_address_that_does_not_answer_leaves_time_for_the_next(make_transport: MakeTransport) -> None:
    with Attacker(after_request(OK)) as attacker, unanswering("127.0.0.9", attacker.port):
        policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
        send = sender(make_transport(policy, resolver=FakeDNS(["127.0.0.9", "127.0.0.1"])))
        with elapsed() as seconds:
            result = send(f"http://two.example.com:{attacker.port}/", connect_timeout_s=1)
            assert (result.status_code, seconds() < 1) == (200, True)


@contextlib.contextmanager
def unanswering(host: str, port: int = 0) -> Iterator[int]:
    """Listen at an address without ever accepting, with the backlog full; give the port."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind((host, port))
        full.listen(0)
        for _ in range(3):  # fill the backlog
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield full.getsockname()[1]


def test_families_take_turns() -> None:
    assert alternate(["::1", "::2", "::3", "1.1.1.1", "2.2.2.2"]) == [
        "::1",
        "1.1.1.1",
        "::2",
        "2.2.2.2",
        "::3",
    ]


def test_a_peer_other_than_the_one_connected_to_is_refused(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "getpeername", lambda _self: ("10.0.0.1", 80))
    with Attacker(after_request(OK)) as attacker:
        result = sender(make_transport())(attacker.url)
    assert result.error_code == "blocked"


def test_a_stalling_name_server_is_left_in_time(make_transport: MakeTransport) -> None:
    release = threading.Event()

    def stall(_host: str, _port: int) -> list[str]:
        release.wait(30)
        return ["127.0.0.1"]

    transport = make_transport(resolver=stall, concurrency=2)
    with elapsed() as seconds:
        futures = [
            transport.submit(request_to("https://stalling.example.com/", timeout_s=1)) for _ in range(4)
        ]  # more than there are threads
        results = [future.result(20) for future in futures]
        took = seconds()
    lookups = [thread for thread in threading.enumerate() if thread.name == "rq-webhooks-lookup"]
    release.set()
    assert {result.error_code for result in results} == {"dns"}
    assert took < 2 * 1 + 1
    assert len(lookups) == 1  # one name occupies one thread
    for thread in lookups:
        thread.join(5)


def test_the_stalled_names_of_one_domain_do_not_stop_the_others(make_transport: MakeTransport) -> None:
    """More of them than there are threads for look-ups; all still stall when nobody waits any more."""
    release = threading.Event()

    def resolver(host: str, _port: int) -> list[str]:
        if host.startswith("stall"):
            release.wait(30)
        return ["127.0.0.1"]

    policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
    transport = make_transport(policy, resolver=resolver, concurrency=4)
    with Attacker(after_request(OK)) as attacker:
        stalled = [
            transport.submit(request_to(f"https://stall{number}.evil.example.com/", timeout_s=0.2))
            for number in range(12)
        ]
        fine = transport.submit(request_to(f"http://fine.example.org:{attacker.port}/", timeout_s=5))
        assert fine.result(10).status_code == 200
    assert [future.result(10).error_code for future in stalled] == ["dns"] * 12
    release.set()
    for thread in threading.enumerate():
        if thread.name == "rq-webhooks-lookup":
            thread.join(5)


@pytest.mark.parametrize(
    "failure", [socket.gaierror(-2, "Name or service not known"), OSError("no route"), TimeoutError()]
)
def test_a_failing_look_up_is_a_dns_error(make_transport: MakeTransport, failure: OSError) -> None:
    def fail(_host: str, _port: int) -> list[str]:
        raise failure

    assert sender(make_transport(resolver=fail))("https://example.com/").error_code == "dns"


def test_a_name_without_addresses_is_a_dns_error(make_transport: MakeTransport) -> None:
    assert sender(make_transport(resolver=FakeDNS([])))("https://example.com/").error_code == "dns"


def test_a_broken_resolver_is_our_own_fault_and_logged(
    make_transport: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_host: str, _port: int) -> list[str]:
        raise KeyError("bug")

    result = sender(make_transport(resolver=fail))("https://example.com/hook?token=secret")
    assert result.error_code == "internal"
    assert "https://example.com/hook" in caplog.text
    assert "token=secret" not in caplog.text


def test_a_resolver_may_answer_like_getaddrinfo(make_transport: MakeTransport) -> None:
    with Attacker(after_request(OK)) as attacker:
        send = sender(make_transport(resolver=socket.getaddrinfo))
        assert send(f"http://localhost:{attacker.port}/").status_code == 200


def test_nobody_listening_is_a_connect_error(send: Send) -> None:
    result = send(f"http://127.0.0.1:{free_port()}/")
    assert (result.error_code, result.error_detail) == ("connect", "127.0.0.1: Connection refused")


def test_a_connection_that_is_not_accepted_is_a_connect_error(send: Send) -> None:
    with unanswering("127.0.0.1") as port, elapsed() as seconds:
        result = send(f"http://127.0.0.1:{port}/", timeout_s=5, connect_timeout_s=0.5)
        took = seconds()
    assert (result.error_code, took < 1.5) == ("connect", True)
    assert result.error_detail == "127.0.0.1: timed out"


# --- TLS --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CA:
    return CA(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def tls_send(make_transport: MakeTransport, ca: CA) -> Send:
    return sender(tls_transport(make_transport, ca))


def test_tls_is_verified_against_the_name_while_the_address_is_pinned(tls_send: Send, ca: CA) -> None:
    seen: list[str | None] = []
    context = ca.server_context("hooks.example.com", "xn--bcher-kva.example")
    context.sni_callback = lambda _sock, name, _context: seen.append(name)
    with Attacker(after_request(OK), context=context) as server:
        assert tls_send(f"https://hooks.example.com:{server.port}/hook").status_code == 200
        assert tls_send(f"https://hooks.example.com.:{server.port}/hook").status_code == 200
        assert tls_send(f"https://bücher.example:{server.port}/hook").status_code == 200
    assert set(seen) == {"hooks.example.com", "xn--bcher-kva.example"}


def test_tls_to_an_address_is_verified_against_the_address(tls_send: Send, ca: CA) -> None:
    with Attacker(after_request(OK), context=ca.server_context("127.0.0.1")) as server:
        assert tls_send(f"https://127.0.0.1:{server.port}/hook").status_code == 200


@pytest.mark.parametrize(
    ("names", "days", "says"),
    [
        (("evil.example.com",), 30, "hostname"),
        (("example.com",), 30, "hostname"),
        (("127.0.0.1",), 30, "hostname"),
        (("hooks.example.com",), -1, "expired"),
    ],
    ids=["wrong-name", "parent", "address-only", "expired"],
)
def test_a_certificate_that_does_not_fit_is_a_tls_error(
    tls_send: Send, ca: CA, names: tuple[str, ...], days: int, says: str
) -> None:
    got: list[bytes] = []
    with Attacker(
        lambda sock: got.append(read_request(sock)), context=ca.server_context(*names, days=days)
    ) as server:
        result = tls_send(f"https://hooks.example.com:{server.port}/hook")
    assert (result.error_code, result.status_code) == ("tls", None)
    assert says in (result.error_detail or "").lower()
    assert not any(got)  # nothing of the webhook was sent


def test_an_unknown_authority_is_a_tls_error(make_transport: MakeTransport, ca: CA) -> None:
    policy = UrlPolicy(allow_networks=["127.0.0.0/8"])
    send = sender(make_transport(policy, resolver=FakeDNS(["127.0.0.1"])))
    with Attacker(after_request(OK), context=ca.server_context("hooks.example.com")) as server:
        result = send(f"https://hooks.example.com:{server.port}/hook")
    assert result.error_code == "tls"


def test_environment_bundles_change_nothing(
    make_transport: MakeTransport, ca: CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(variable, str(ca.file))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys.log"))
    policy = UrlPolicy(allow_networks=["127.0.0.0/8"])
    send = sender(make_transport(policy, resolver=FakeDNS(["127.0.0.1"])))
    with Attacker(after_request(OK), context=ca.server_context("hooks.example.com")) as server:
        assert send(f"https://hooks.example.com:{server.port}/hook").error_code == "tls"
    assert not (tmp_path / "keys.log").exists()


def test_a_plain_server_on_a_tls_port_is_a_tls_error(tls_send: Send) -> None:
    with Attacker(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")) as server:
        assert tls_send(f"https://hooks.example.com:{server.port}/hook").error_code in ("tls", "reset")


def test_a_context_that_does_not_verify_is_refused(make_transport: MakeTransport) -> None:
    nobody_checked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody_checked.check_hostname = False
    with pytest.raises(ValueError, match="verify"):
        make_transport(ssl_context=nobody_checked)
    nobody_checked.verify_mode = ssl.CERT_NONE
    with pytest.raises(ValueError, match="verify"):
        make_transport(ssl_context=nobody_checked)


def slow_handshake(connection: socket.socket) -> None:
    """Answer the greeting with one long record, a byte at a time."""
    connection.recv(65536)
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while True:
        connection.sendall(b"\x02")
        time.sleep(0.05)


@pytest.mark.parametrize("script", [silence, slow_handshake], ids=["silent", "slow"])
def test_a_stalling_handshake_is_left_at_the_deadline(
    tls_send: Send, script: Callable[[socket.socket], None]
) -> None:
    with Attacker(script) as server, elapsed() as seconds:
        result = tls_send(f"https://hooks.example.com:{server.port}/hook", timeout_s=1)
        took = seconds()
    assert (result.error_code, result.status_code) == ("timeout", None)
    assert took < 2


def test_a_slow_answer_over_tls_is_left_at_the_deadline(tls_send: Send, ca: CA) -> None:
    def drip(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-A: b\r\n")
            time.sleep(0.05)

    with Attacker(drip, context=ca.server_context("hooks.example.com")) as server, elapsed() as seconds:
        result = tls_send(f"https://hooks.example.com:{server.port}/hook", timeout_s=1)
        took = seconds()
    assert (result.error_code, result.status_code) == ("timeout", None)
    assert took < 2


# --- the environment, cookies -------------------------------------------------------------------------------


def test_environment_proxies_and_netrc_are_ignored(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, receiver: Receiver
) -> None:
    with Attacker(after_request(OK)) as proxy:
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        netrc = tmp_path / ".netrc"
        netrc.write_text("machine 127.0.0.1 login admin password hunter2\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(netrc))
        assert sender(make_transport())(receiver.url).status_code == 204
        assert proxy.connections == 0
    assert "Authorization" not in receiver.received[0].headers


def test_no_cookie_comes_back(send: Send) -> None:
    with Receiver(lambda _received: (200, {"Set-Cookie": "session=abc; Path=/"}, b"")) as receiver:
        for _ in range(3):
            result = send(receiver.url)
            assert "set-cookie" not in result.response_headers
        assert all("Cookie" not in received.headers for received in receiver.received)
        assert len(receiver.received) == 3


# --- PROXY_URL ----------------------------------------------------------------------------------------------


class Proxy:
    """An HTTP proxy that sends everything to one port on loopback and keeps what it was asked."""

    def __init__(self, target_port: int, refuse: bytes | None = None) -> None:
        self.heads: list[bytes] = []
        self._target_port = target_port
        self._refuse = refuse

    def __call__(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(65536)
        self.heads.append(request)
        if self._refuse is not None:
            connection.sendall(self._refuse)
            return
        with socket.create_connection(("127.0.0.1", self._target_port)) as upstream:
            if request.startswith(b"CONNECT"):
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                upstream.sendall(request)
            back = threading.Thread(target=self._pump, args=(upstream, connection), daemon=True)
            back.start()
            self._pump(connection, upstream)
            back.join(5)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def test_https_goes_through_a_tunnel_and_names_are_left_to_the_proxy(
    make_transport: MakeTransport, ca: CA
) -> None:
    got: list[bytes] = []

    def server(connection: socket.socket) -> None:
        while request := read_request(connection):
            got.append(request)
            connection.sendall(OK)

    with Attacker(server, context=ca.server_context("hooks.example.com")) as origin:
        proxy = Proxy(origin.port)
        with Attacker(proxy) as front:
            transport = make_transport(
                UrlPolicy(),
                proxy_url=f"http://user:secret@127.0.0.1:{front.port}",
                ca_file=str(ca.file),
                resolver=FakeDNS([]),
            )
            send = sender(transport)
            results = [send("https://hooks.example.com/hook?x=1") for _ in range(2)]
            assert [(result.status_code, result.error_code) for result in results] == [(200, None)] * 2
            transport.close(wait=True)
            assert front.connections == 1
    assert proxy.heads[0].startswith(b"CONNECT hooks.example.com:443 HTTP/1.")
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"user:secret") in proxy.heads[0]
    assert got[0].startswith(b"POST /hook?x=1 HTTP/1.1\r\nHost: hooks.example.com\r\n")
    assert b"roxy-" not in got[0]


def test_http_goes_through_the_proxy_with_the_whole_url(
    make_transport: MakeTransport, receiver: Receiver
) -> None:
    proxy = Proxy(receiver.port)
    with Attacker(proxy) as front:
        transport = make_transport(
            UrlPolicy(allow_http=True, allow_networks=["10.0.0.0/8"]),
            proxy_url=f"http://127.0.0.1:{front.port}",
        )
        assert sender(transport)("http://10.0.0.9:8080/hook").status_code == 204
        transport.close(wait=True)
    assert proxy.heads[0].startswith(b"POST http://10.0.0.9:8080/hook HTTP/1.1\r\nHost: 10.0.0.9:8080\r\n")


def test_the_url_policy_still_holds_with_a_proxy(make_transport: MakeTransport) -> None:
    with Attacker(after_request(OK)) as front:
        send = sender(make_transport(UrlPolicy(), proxy_url=f"http://127.0.0.1:{front.port}"))
        for url in ("https://127.0.0.1/", "http://example.com/", "https://169.254.169.254/"):
            assert send(url).error_code == "blocked"
        assert front.connections == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 407 Request rejected by proxy\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n",
    ],
    ids=["407", "403", "502", "302"],
)
def test_a_refusing_proxy_is_a_connect_error(make_transport: MakeTransport, answer: bytes) -> None:
    with Attacker(Proxy(0, refuse=answer)) as front:
        send = sender(make_transport(UrlPolicy(), proxy_url=f"http://127.0.0.1:{front.port}"))
        result = send("https://hooks.example.com/hook")
    assert (result.error_code, result.status_code) == ("connect", None)


def test_an_absent_proxy_is_a_connect_error(make_transport: MakeTransport) -> None:
    send = sender(make_transport(UrlPolicy(), proxy_url=f"http://127.0.0.1:{free_port()}"))
    assert send("https://hooks.example.com/hook").error_code == "connect"


def test_a_stalling_proxy_is_left_at_the_deadline(make_transport: MakeTransport) -> None:
    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-A: b\r\n")
            time.sleep(0.05)

    with Attacker(drip) as front, elapsed() as seconds:
        send = sender(make_transport(UrlPolicy(), proxy_url=f"http://127.0.0.1:{front.port}"))
        result = send("https://hooks.example.com/hook", timeout_s=1)
        took = seconds()
    assert (result.error_code, result.status_code) == ("timeout", None)
    assert took < 2


# --- NAT64 ------------------------------------------------------------------------------------------------


def dns64(answers: list[str], probe: list[str]) -> Callable[[str, int], list[str]]:
    """Return a resolver of a network with DNS64."""
    return lambda host, _port: ["192.0.0.170", *probe] if host == "ipv4only.arpa" else answers


WELL_KNOWN, LOCAL = "64:ff9b::", "2a00:64:64::"


@pytest.mark.parametrize("prefix", [WELL_KNOWN, LOCAL])
def test_a_name_with_ipv4_is_sent_to_by_it_where_dns64_adds_addresses(
    make_transport: MakeTransport, connects: Connects, prefix: str
) -> None:
    resolver = dns64([f"{prefix}7f00:1", "127.0.0.1"], [f"{prefix}192.0.0.170"])
    policy = UrlPolicy(allow_http=True, allow_networks=["127.0.0.0/8"])
    with Attacker(after_request(OK)) as server:
        result = sender(make_transport(policy, resolver=resolver))(f"http://hooks.example.com:{server.port}/")
    assert result.status_code == 200
    assert connects.addresses == ["127.0.0.1"]


@pytest.mark.parametrize("prefix", [WELL_KNOWN, LOCAL])
@pytest.mark.parametrize("ipv4", ["127.0.0.1", "169.254.169.254"])
@pytest.mark.parametrize("beside", [[], ["93.184.215.14"]])
def test_a_private_address_behind_nat64_is_refused(
    make_transport: MakeTransport, connects: Connects, prefix: str, ipv4: str, beside: list[str]
) -> None:
    """Whatever the name has beside it: an attacker can publish such an address himself."""
    resolver = dns64([f"{prefix}{ipv4}", *beside], [f"{prefix}192.0.0.170"])
    for allow in (False, True):
        transport = make_transport(UrlPolicy(allow_nat64=allow), resolver=resolver)
        assert sender(transport)("https://hooks.example.com/").error_code == "blocked"
    assert connects.addresses == []


def test_a_name_with_nothing_else_says_what_to_set(make_transport: MakeTransport, connects: Connects) -> None:
    resolver = dns64(["64:ff9b::93.184.215.14"], ["64:ff9b::192.0.0.170"])
    result = sender(make_transport(UrlPolicy(), resolver=resolver))("https://hooks.example.com/")
    assert result.error_code == "blocked"
    assert "NAT64" in str(result.error_detail)
    assert "RQ_WEBHOOKS_ALLOW_NAT64" in str(result.error_detail)
    assert connects.addresses == []


def test_the_prefix_is_looked_up_once_and_only_for_names_with_ipv6(make_transport: MakeTransport) -> None:
    asked: list[str] = []

    def resolver(host: str, _port: int) -> list[str]:
        asked.append(host)
        if host == "ipv4only.arpa":
            raise OSError("no such name")
        return ["::1", "127.0.0.1"] if host.startswith("six") else ["127.0.0.1"]

    with Attacker(after_request(OK)) as server:
        send = sender(make_transport(UrlPolicy(allow_http=True), resolver=resolver))
        for host in ("four.localhost", "six.localhost", "six2.localhost"):
            send(f"http://{host}:{server.port}/")
    assert asked == ["four.localhost", "six.localhost", "ipv4only.arpa", "six2.localhost"]


# --- authorities and client certificates ------------------------------------------------------------------


def test_an_own_authority_is_believed_beside_the_public_ones(ca: CA) -> None:
    public, both = default_ssl_context(), default_ssl_context(str(ca.file))
    assert both.cert_store_stats()["x509_ca"] == public.cert_store_stats()["x509_ca"] + 1


@pytest.mark.parametrize("host", ["bank.example.com", "other.example.com", "sub.bank.example.com"])
def test_a_client_certificate_is_shown_to_its_host_and_no_other(
    make_transport: MakeTransport, ca: CA, host: str
) -> None:
    shown: list[bytes | None] = []

    def script(connection: socket.socket) -> None:
        assert isinstance(connection, ssl.SSLSocket)
        shown.append(connection.getpeercert(binary_form=True))
        after_request(OK)(connection)

    ca.server_context("client")
    files = (ca.latest, ca.latest)
    context = ca.server_context(host)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(ca.file)
    policy = UrlPolicy(allow_networks=["127.0.0.0/8"])
    transport = make_transport(
        policy,
        resolver=FakeDNS(["127.0.0.1"]),
        ca_file=str(ca.file),
        client_certs={"bank.example.com": files},
    )
    with Attacker(script, context=context) as server:
        result = sender(transport)(f"https://{host}:{server.port}/hook")
        assert result.status_code == 200, result
    assert [one is not None for one in shown] == [host == "bank.example.com"]


def test_unusable_files_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    for name, value in (("CA_FILE", missing), ("CLIENT_CERTS", {"a.example": (missing, missing)})):
        settings = load_settings({f"RQ_WEBHOOKS_{name}": value}, {})
        with pytest.raises(ConfigurationError, match=rf"{name}.*missing\.pem"):
            open_transport(settings, UrlPolicy(), concurrency=1)
