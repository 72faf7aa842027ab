"""How the bytes of one attempt travel, and what may come back.

Owns look-ups, connections, deadlines and caps. The receiver is a stranger who may stall, flood, lie or
redirect: every attempt ends within its deadline, keeps a few kilobytes, and reaches only addresses the
policy has seen. Knows nothing of events, retries, SQL or Redis.

A :class:`Transport` is an object handed to the dispatcher; tests hand in another one.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import itertools
import logging
import os
import queue
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, Protocol, cast

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3 import exceptions as urllib3_errors
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.poolmanager import PoolManager, proxy_from_url

from ..errors import BlockedURLError
from ..protocol.urls import CheckedURL, UrlPolicy, redact_url

logger = logging.getLogger(__name__)

#: Bytes of a response body that are kept.
BODY_CAP = 16 * 1024
#: Addresses of one name that are tried.
MAX_ADDRESSES = 4
#: Bytes of one response's status line and headers.
MAX_HEADER_BYTES = 64 * 1024
#: A kept connection is closed after so long without use, and after so long in any case: an address that
#: was right is not used for ever.
MAX_IDLE_S = 30.0
MAX_AGE_S = 300.0

#: Response headers worth keeping; everything else a receiver sends is dropped.
KEPT_HEADERS = (
    "content-type",
    "content-length",
    "content-encoding",
    "date",
    "server",
    "retry-after",
    "location",
    "allow",
    "www-authenticate",
    "x-request-id",
    "x-correlation-id",
)
_MAX_KEPT_VALUE = 256
_MAX_DETAIL = 300

#: The connection layer's own; a request's headers cannot set them.
_TRANSPORT_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "transfer-encoding"}
)

#: ``(host, port) -> addresses``; answers shaped like those of :func:`socket.getaddrinfo` will do as well.
Resolver = Callable[[str, int], Iterable[str | tuple[Any, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRequest:
    """One HTTP request to be made.

    :param url: as stored; judged again before it is used.
    :param headers: final, in order.
    :param timeout_s: total deadline, from the look-up to the last byte read.
    :param connect_timeout_s: deadline for the look-up and opening a connection.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    timeout_s: float
    connect_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptResult:
    """What came of one request.

    :param started_at: aware UTC.
    :param status_code: the response's, if one arrived whole and in time.
    :param error_code: ``None`` where the status says everything, else one of ``blocked``, ``dns``,
        ``connect``, ``tls``, ``timeout``, ``reset``, ``redirect``, ``internal``.
    :param error_detail: for people; never shown to the client.
    :param response_headers: those of :data:`KEPT_HEADERS` that came, in lower case, shortened.
    :param response_body: as it came over the wire, at most the transport's cap.
    :param retry_after: the header as it came; see :mod:`flask_rq_webhooks.protocol.retry`.
    """

    started_at: datetime
    duration_ms: float
    status_code: int | None = None
    error_code: str | None = None
    error_detail: str | None = None
    response_headers: Mapping[str, str] = field(default_factory=dict)
    response_body: bytes = b""
    retry_after: str | None = None


class Transport(Protocol):
    """What sends requests."""

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        """Send *request* as soon as a slot is free.

        :returns: a future that never raises: what went wrong is in the result.
        :raises RuntimeError: after :meth:`close`.
        """
        ...

    def close(self, *, wait: bool) -> None:
        """Take no more requests.

        :param wait: let those under way end by themselves, which their deadlines bound, instead of breaking
            them off.
        """
        ...


def system_resolver(host: str, port: int) -> list[tuple[Any, ...]]:
    """Return what the operating system knows of *host*, best first.

    :raises OSError: when it knows nothing.
    """
    return list(socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM))


def default_ssl_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Return a context that verifies certificate and name, whatever the environment says.

    :param ca_file: PEM bundle instead of certifi's. ``ssl.create_default_context`` is not used since it
        obeys ``SSLKEYLOGFILE``, nor the system's store since it obeys ``SSL_CERT_FILE``.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=ca_file or DEFAULT_CA_BUNDLE_PATH)
    return context


class RequestsTransport:
    """Send through :mod:`requests` adapters on a bounded pool of daemon threads.

    :param policy: what may be reached.
    :param concurrency: requests in flight at most.
    :param proxy_url: egress proxy; it then decides about addresses, and may itself have a private one.
    :param resolver: ``(host, port) -> addresses``; may block and raise :exc:`OSError`. Called in a thread of
        its own, since a look-up cannot be given a deadline.
    :param ssl_context: instead of :func:`default_ssl_context`.
    :param ca_file: PEM bundle for :func:`default_ssl_context`.
    :param body_cap: bytes of a response body that are kept.
    """

    def __init__(
        self,
        policy: UrlPolicy,
        *,
        concurrency: int,
        proxy_url: str | None = None,
        resolver: Resolver = system_resolver,
        ssl_context: ssl.SSLContext | None = None,
        ca_file: str | None = None,
        body_cap: int = BODY_CAP,
    ) -> None:
        self._policy = policy
        self._body_cap = body_cap
        self._proxies = {"http": proxy_url, "https": proxy_url} if proxy_url else None
        # The policy never changes, so neither does its answer; the same few endpoints are sent to all day.
        self._check_url = lru_cache(maxsize=256)(policy.check_url)
        self._adapter = _PinnedAdapter(concurrency, ssl_context or default_ssl_context(ca_file))
        self._lookups = _Lookups(resolver, limit=max(8, 2 * concurrency))
        self._watchdog = _Watchdog(on_idle=self._adapter.close_idle)
        self._threads = _DaemonThreads("rq-webhooks-send", concurrency)
        self._closed = False
        self._close_lock = threading.Lock()

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        """Send *request* as soon as a thread is free.

        :returns: a future that never raises: what went wrong is in the result.
        :raises RuntimeError: after :meth:`close`.
        """
        future: Future[AttemptResult] = Future()
        with self._close_lock:
            if self._closed:
                raise RuntimeError("This transport is closed; make a new one.")
            self._threads.run(partial(self._fulfil, future, request))
        return future

    def close(self, *, wait: bool) -> None:
        """Take no more requests, end the threads and close the connections.

        :param wait: let requests under way end by themselves, which their deadlines bound. Otherwise they
            are broken off and end as ``internal``.
        """
        with self._close_lock:
            already, self._closed = self._closed, True
        if not already:
            self._threads.end()
        if not wait:
            self._watchdog.abort()
        self._threads.join()
        if not already:
            self._watchdog.end()
            self._adapter.close()

    def __enter__(self) -> RequestsTransport:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close(wait=True)

    def _fulfil(self, future: Future[AttemptResult], request: AttemptRequest) -> None:
        if not future.set_running_or_notify_cancel():
            return
        started_at = datetime.now(UTC)
        started = time.monotonic()
        try:
            outcome = self._attempt(request, started)
        except _Failure as failure:
            outcome = {"error_code": failure.code, "error_detail": _clean(failure.detail, _MAX_DETAIL)}
        except Exception:  # the future's promise: a fault of ours is a result too, and is logged
            logger.exception("Sending to %s failed in an unforeseen way.", redact_url(request.url))
            outcome = {"error_code": "internal", "error_detail": "an error of the sender; see its log"}
        duration_ms = (time.monotonic() - started) * 1000
        future.set_result(AttemptResult(started_at=started_at, duration_ms=duration_ms, **outcome))

    def _attempt(self, request: AttemptRequest, started: float) -> dict[str, Any]:
        try:
            checked = self._check_url(request.url)
        except BlockedURLError as exc:
            raise _Failure("blocked", f"{exc.code}: {exc}") from exc
        attempt = _Attempt(
            checked=checked,
            policy=self._policy,
            lookups=self._lookups,
            deadline=started + request.timeout_s,
            connect_deadline=started + min(request.connect_timeout_s, request.timeout_s),
        )
        prepared = _prepare(checked, request)
        self._watchdog.watch(attempt)
        _thread.attempt = attempt
        try:
            attempt.raise_if_fired()
            try:
                return self._exchange(attempt, prepared)
            except _Failure as failure:
                if failure.code not in ("reset", "tls") or not attempt.may_repeat():
                    raise
            # The receiver closed an idle connection while we were writing to it: not its verdict on this
            # request. Receivers tell repeats by webhook-id, so one more try on a new connection is safe.
            return self._exchange(attempt, prepared)
        finally:
            _thread.attempt = None
            self._watchdog.forget(attempt)
            attempt.finish()

    def _exchange(self, attempt: _Attempt, prepared: requests.PreparedRequest) -> dict[str, Any]:
        """Make the request once; translate everything that can go wrong on the way."""
        timeout = max(attempt.deadline - time.monotonic(), 0.001)
        raw: HTTPResponse | None = None
        try:
            raw = self._adapter.send(prepared, stream=True, timeout=timeout, proxies=self._proxies).raw
            outcome = self._read(raw)
        except _Failure:
            raise
        except (
            requests.RequestException,
            urllib3_errors.HTTPError,
            http.client.HTTPException,
            OSError,
        ) as exc:
            attempt.raise_if_fired(exc)
            raise _failure(exc) from exc
        finally:
            if raw is not None:
                if not raw.closed:
                    raw.close()  # never drained: what follows may have no end
                raw.release_conn()
        # A socket shut down in mid-headers or mid-body can look like a short, valid response.
        attempt.raise_if_fired()
        return outcome

    def _read(self, raw: HTTPResponse) -> dict[str, Any]:
        status = raw.status
        headers = {
            name: _clean(value, _MAX_KEPT_VALUE)
            for name in KEPT_HEADERS
            if (value := raw.headers.get(name)) is not None
        }
        if "location" in headers:
            headers["location"] = headers["location"].partition("?")[0]
        outcome: dict[str, Any] = {
            "status_code": status,
            "response_headers": headers,
            "retry_after": headers.get("retry-after"),
        }
        if 300 <= status < 400:
            raw.close()
            return outcome | {
                "error_code": "redirect",
                "error_detail": f"redirects are not followed ({status})",
            }
        body = b""
        # One byte more than is kept, so that a body of just that size is seen to have ended.
        while chunk := raw.read(self._body_cap + 1 - len(body), decode_content=False):
            body += chunk
            if len(body) > self._body_cap:
                break
        return outcome | {"response_body": body[: self._body_cap]}


# --- one attempt ------------------------------------------------------------------------------------------


class _Failure(Exception):  # noqa: N818  (never leaves this module)
    """An attempt failed for a known reason.

    Not an :exc:`OSError`, so that it passes through urllib3 and requests as it is.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class _ThreadState(threading.local):
    attempt: _Attempt | None = None


#: The attempt a sender thread is making; how the connection classes know their deadline and policy.
_thread = _ThreadState()


def _not_ours(_record: logging.LogRecord) -> bool:
    return _thread.attempt is None


# At DEBUG urllib3 logs whole URLs. Those of webhooks often hold a secret, so its lines about our requests
# are dropped; about everybody else's they stay.
for _name in ("urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_not_ours)


def _current_attempt() -> _Attempt:
    attempt = _thread.attempt
    if attempt is None:
        raise RuntimeError("A connection of this transport was used outside of it; nothing would be checked.")
    return attempt


class _Attempt:
    """One attempt's deadlines, and the grip by which the watchdog ends it.

    The grip is a duplicate of the connection's descriptor: it stays valid while TLS wraps, or urllib3
    closes, the socket itself.
    """

    __slots__ = (
        "_fired",
        "_finished",
        "_grip",
        "_lock",
        "_repeated",
        "_reused",
        "answered",
        "checked",
        "connect_deadline",
        "deadline",
        "lookups",
        "policy",
    )

    def __init__(
        self,
        *,
        checked: CheckedURL,
        policy: UrlPolicy,
        lookups: _Lookups,
        deadline: float,
        connect_deadline: float,
    ) -> None:
        self.checked = checked
        self.policy = policy
        self.lookups = lookups
        self.deadline = deadline
        self.connect_deadline = connect_deadline
        self.answered = False
        self._lock = threading.Lock()
        self._grip: int | None = None
        self._fired: _Failure | None = None
        self._finished = False
        self._reused = False
        self._repeated = False

    def hold(self, sock: Any, *, reused: bool) -> None:
        """Let the watchdog end what happens on *sock*."""
        with self._lock:
            if self._fired is not None:
                raise self._fired
            self._drop_grip()
            self._grip = os.dup(sock.fileno())
            self._reused = reused

    def fire(self, failure: _Failure) -> None:
        """End the attempt now; called by the watchdog's thread."""
        with self._lock:
            if self._finished or self._fired is not None:
                return
            self._fired = failure
            if self._grip is not None:
                held = socket.socket(fileno=os.dup(self._grip))
                try:
                    held.shutdown(socket.SHUT_RDWR)
                except OSError as exc:
                    if exc.errno != errno.ENOTCONN:  # the peer was faster
                        logger.warning("A connection past its deadline could not be shut down: %s", exc)
                finally:
                    held.close()

    def finish(self) -> None:
        """Let go of the connection; nothing can fire any more."""
        with self._lock:
            self._finished = True
            self._drop_grip()

    def raise_if_fired(self, cause: BaseException | None = None) -> None:
        with self._lock:
            fired = self._fired
            if fired is None and time.monotonic() >= self.deadline:
                fired = _deadline_passed()
        if fired is not None:
            raise fired from cause

    def may_repeat(self) -> bool:
        """Say once whether a broken connection may be blamed on its having been idle."""
        if not self._reused or self._repeated or self.answered:
            return False
        self._repeated = True
        return True

    @property
    def wants_new_connection(self) -> bool:
        return self._repeated

    def connect(self, connection: HTTPConnection) -> socket.socket:
        """Open a connection to an address that was checked before the first packet."""
        host, port = connection._dns_host, connection.port
        through_proxy = connection.proxy is not None
        if not through_proxy and (host, port) != (self.checked.host, self.checked.port):
            raise _Failure("blocked", "the connection's host is not the one that was checked")
        addresses = self._addresses(host, port)
        if not through_proxy:
            for address in addresses:
                try:
                    self.policy.check_address(address, port, scheme=self.checked.scheme)
                except BlockedURLError as exc:
                    raise _Failure("blocked", f"{exc.code}: {host} has the address {address}") from exc
        sock = self._connect_to_one(_alternate(addresses)[:MAX_ADDRESSES], port)
        try:
            for option in connection.socket_options or ():
                sock.setsockopt(*option)
            self.hold(sock, reused=False)
            sock.settimeout(max(self.deadline - time.monotonic(), 0.001))
        except BaseException:
            sock.close()
            raise
        return sock

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            addresses = self.lookups.look_up(host, port, self.connect_deadline)
            if not addresses:
                raise _Failure("dns", f"{host} has no address") from None
            return addresses
        return [host]

    def _connect_to_one(self, addresses: Sequence[str], port: int) -> socket.socket:
        reasons = []
        for tried, address in enumerate(addresses):
            # The first addresses may not use up the time of the others.
            share_s = (self.connect_deadline - time.monotonic()) / (len(addresses) - tried)
            if share_s <= 0:
                reasons.append("no time left")
                break
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                return _open(family, address, port, share_s)
            except OSError as exc:
                reasons.append(
                    f"{address}: {'timed out' if isinstance(exc, TimeoutError) else exc.strerror or exc}"
                )
        raise _Failure("connect", "; ".join(reasons))

    def _drop_grip(self) -> None:
        if self._grip is not None:
            os.close(self._grip)
            self._grip = None


def _open(family: socket.AddressFamily, address: str, port: int, timeout_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect((address, port))
        peer = sock.getpeername()[0]
        if ipaddress.ip_address(peer.partition("%")[0]) != ipaddress.ip_address(address):
            raise _Failure("blocked", f"connected to {peer} instead of {address}")
    except BaseException:
        sock.close()
        raise
    return sock


def _alternate(addresses: Sequence[str]) -> list[str]:
    """Return the addresses with families taking turns, so that a broken one is left early (RFC 8305, 4)."""
    first_is_v6 = ":" in addresses[0]
    same = [address for address in addresses if (":" in address) is first_is_v6]
    other = [address for address in addresses if (":" in address) is not first_is_v6]
    turns = itertools.chain.from_iterable(itertools.zip_longest(same, other))
    return [address for address in turns if address is not None]


def _prepare(checked: CheckedURL, request: AttemptRequest) -> requests.PreparedRequest:
    by_name = {name.lower(): (name, value) for name, value in request.headers.items()}
    headers = dict(pair for name, pair in by_name.items() if name not in _TRANSPORT_HEADERS)
    headers["Accept-Encoding"] = "identity"
    headers["Content-Length"] = str(len(request.body))
    prepared = requests.PreparedRequest()
    prepared.method = "POST"
    prepared.url = checked.url
    prepared.headers = cast(Any, headers)  # the adapter only looks for Content-Length, as spelled here
    prepared.body = request.body
    return prepared


def _deadline_passed() -> _Failure:
    return _Failure("timeout", "the total deadline passed")


def _transport_closed() -> _Failure:
    return _Failure("internal", "the transport was closed")


def _failure(exc: BaseException) -> _Failure:
    """Return the coarse code for an error of requests, urllib3, http.client or the socket."""
    detail = _innermost(exc)
    if isinstance(exc, requests.exceptions.SSLError | ssl.SSLError | urllib3_errors.SSLError):
        return _Failure("tls", detail)
    if isinstance(exc, requests.exceptions.ProxyError | urllib3_errors.ProxyError):
        return _Failure("connect", f"proxy: {detail}")
    if isinstance(exc, requests.exceptions.Timeout | urllib3_errors.TimeoutError | TimeoutError):
        return _Failure("timeout", detail)
    if isinstance(exc, requests.exceptions.InvalidURL | requests.exceptions.InvalidHeader):
        return _Failure("internal", detail)
    return _Failure("reset", detail)


def _innermost(exc: BaseException) -> str:
    """Return what the last exception of the chain says; those around it repeat the whole URL."""
    seen: set[int] = set()
    while id(exc) not in seen:
        seen.add(id(exc))
        inner = getattr(exc, "reason", None) or exc.__cause__ or exc.__context__
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in reversed(exc.args) if isinstance(arg, BaseException)), None)
        if inner is None:
            break
        exc = inner
    return f"{type(exc).__name__}: {exc}"


def _clean(text: str, limit: int) -> str:
    """Return untrusted text fit for a database column and a page."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text[:limit])


# --- connections ------------------------------------------------------------------------------------------


class _BoundedHeaders:
    """A response's stream while its headers are read: counts bytes, and tells an end from an empty line."""

    def __init__(self, stream: Any, attempt: _Attempt | None) -> None:
        self._stream = stream
        self._attempt = attempt
        self._left = MAX_HEADER_BYTES

    def readline(self, limit: int = -1) -> bytes:
        line: bytes = self._stream.readline(min(limit, self._left + 1) if limit >= 0 else self._left + 1)
        if self._attempt is not None:
            self._attempt.answered = self._attempt.answered or bool(line)
            if not line and self._attempt.answered:
                raise http.client.IncompleteRead(b"")  # http.client takes this for the end of the headers
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("headers")
        if line in (b"\r\n", b"\n"):
            self._left = MAX_HEADER_BYTES  # the end of an interim response
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Response(http.client.HTTPResponse):
    """A response whose headers are bounded, and which skips every interim response."""

    def begin(self, *args: Any, **options: Any) -> None:
        stream = self.fp
        self.fp = cast(Any, _BoundedHeaders(stream, _thread.attempt))
        try:
            super().begin(*args, **options)
            while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
                self.headers = cast(
                    Any, None
                )  # http.client skips 100 by itself, but takes 103 for the answer
                super().begin(*args, **options)
        finally:
            if self.fp is not None:
                self.fp = stream
        if self.msg.defects or self.msg.get_payload():
            # Lines that are no headers: believe the status, not the framing. urllib3 would log them with
            # the whole URL.
            self.msg.defects.clear()
            self.msg.set_payload("")
            self.will_close = True


class _PinnedHTTPConnection(HTTPConnection):
    response_class = _Response
    opened_at = 0.0
    released_at = 0.0

    def _new_conn(self) -> socket.socket:
        self.opened_at = time.monotonic()
        return _current_attempt().connect(self)


class _PinnedHTTPSConnection(HTTPSConnection):
    response_class = _Response
    opened_at = 0.0
    released_at = 0.0

    def _new_conn(self) -> socket.socket:
        self.opened_at = time.monotonic()
        return _current_attempt().connect(self)


class _Keeping:
    """What both kinds of pool do beside urllib3: tell the attempt of a kept connection, and drop old ones."""

    pool: queue.LifoQueue[Any] | None
    close: Callable[[], None]

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)  # type: ignore[misc]
        if connection.sock is not None:
            attempt = _current_attempt()
            if attempt.wants_new_connection or _is_old(connection, time.monotonic()):
                connection.close()
            else:
                attempt.hold(connection.sock, reused=True)
        return connection

    def _put_conn(self, connection: Any) -> None:
        if connection is not None:
            connection.released_at = time.monotonic()
        super()._put_conn(connection)  # type: ignore[misc]

    def close_idle(self) -> None:
        """Close connections nobody has used for long."""
        now = time.monotonic()
        kept = []
        while (pool := self.pool) is not None:
            try:
                connection = pool.get(block=False)
            except queue.Empty:
                break
            if connection is not None and connection.sock is not None and _is_old(connection, now):
                connection.close()
            kept.append(connection)
        for connection in reversed(kept):
            super()._put_conn(connection)  # type: ignore[misc]


def _is_old(connection: _PinnedHTTPConnection | _PinnedHTTPSConnection, now: float) -> bool:
    return now - connection.released_at > MAX_IDLE_S or now - connection.opened_at > MAX_AGE_S


class _PinnedHTTPPool(_Keeping, HTTPConnectionPool):
    ConnectionCls = _PinnedHTTPConnection


class _PinnedHTTPSPool(_Keeping, HTTPSConnectionPool):
    ConnectionCls = _PinnedHTTPSConnection


class _PinnedAdapter(HTTPAdapter):
    """An adapter all of whose connections are pinned, and which keeps no cookies."""

    def __init__(self, concurrency: int, ssl_context: ssl.SSLContext) -> None:
        self._ssl_context = ssl_context
        self._sizes = {"num_pools": max(32, concurrency), "maxsize": concurrency}
        self._pools: weakref.WeakSet[_Keeping] = weakref.WeakSet()
        self._pools_lock = threading.Lock()
        super().__init__(pool_connections=self._sizes["num_pools"], pool_maxsize=concurrency)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._ssl_context, **options)
        self._pin(cast(PoolManager, self.poolmanager))

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy not in self.proxy_manager:
            manager = proxy_from_url(
                proxy,
                proxy_headers=self.proxy_headers(proxy),
                **self._sizes,
                ssl_context=self._ssl_context,
                proxy_ssl_context=self._ssl_context,
                **options,
            )
            self._pin(manager)
            self.proxy_manager[proxy] = manager
        return self.proxy_manager[proxy]

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave verification to the context; the inherited method would load a bundle per connection."""

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """Return the bare response; the inherited method parses the receiver's cookies."""
        response = requests.Response()
        response.status_code = resp.status
        response.raw = resp
        return response

    def close_idle(self) -> None:
        """Close kept connections that nobody has used for long."""
        with self._pools_lock:
            pools = list(self._pools)
        for pool in pools:
            pool.close_idle()

    def close(self) -> None:
        """Close every kept connection now; urllib3 leaves it to the garbage collector."""
        with self._pools_lock:
            pools = list(self._pools)
        for pool in pools:
            pool.close()
        super().close()

    def _pin(self, manager: PoolManager) -> None:
        # Replaced, not changed: urllib3 shares the original mapping among all managers of the process.
        manager.pool_classes_by_scheme = cast(
            Any,
            {
                "http": partial(self._new_pool, _PinnedHTTPPool),
                "https": partial(self._new_pool, _PinnedHTTPSPool),
            },
        )

    def _new_pool(self, pool_class: Any, *args: Any, **options: Any) -> _Keeping:
        pool = cast(_Keeping, pool_class(*args, **options))
        with self._pools_lock:
            self._pools.add(pool)
        return pool


# --- threads ----------------------------------------------------------------------------------------------


class _DaemonThreads:
    """At most *limit* daemon threads that run what they are given, started as needed.

    The standard library's pool is not used: the interpreter waits for its threads at exit, and a look-up
    can hang for half a minute.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._tasks: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting = 0
        self._called = False
        self._ended = False
        self._threads: list[threading.Thread] = []

    def run(self, task: Callable[[], None]) -> None:
        """Run *task* in a thread; tasks are begun in the order in which they came."""
        with self._lock:
            self._tasks.append(task)
            self._call()

    def end(self) -> None:
        """Let every thread end after the work already given."""
        with self._lock:
            self._ended = True
            for _ in range(self._waiting):
                self._calls.put(None)
            self._waiting = 0

    def join(self) -> None:
        """Wait until all threads have ended."""
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        """Call one thread for the next task; the lock is held.

        One at a time: whoever takes a task calls the next before beginning. So tasks that are over in no
        time are run by the few threads that are awake, and waking a thread for each of them, which costs
        more than such a task, is spared. Where tasks take their time, all threads are soon awake.
        """
        if self._called or not self._tasks:
            return
        if self._waiting:
            self._waiting -= 1
            self._calls.put(None)
        elif len(self._threads) < self._limit:
            name = f"{self._name}-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
            self._threads[-1].start()
        else:
            return  # all are busy; the first to be done takes it
        self._called = True

    def _serve(self) -> None:
        was_called = True
        while True:
            task = None
            with self._lock:
                if was_called:
                    self._called = was_called = False
                if self._tasks:
                    task = self._tasks.popleft()
                    self._call()
                elif self._ended:
                    return
                else:
                    self._waiting += 1
            if task is not None:
                task()
            else:
                self._calls.get()
                was_called = True


class _Lookups:
    """Look names up under a deadline, in threads that may be left behind.

    One host occupies one thread however many attempts ask for it, so that a stalling name server cannot
    take them all.
    """

    def __init__(self, resolver: Resolver, *, limit: int) -> None:
        self._resolver = resolver
        self._slots = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._pending: dict[tuple[str, int], Future[list[str]]] = {}

    def look_up(self, host: str, port: int, deadline: float) -> list[str]:
        """Return the addresses of *host* without repeats.

        :param deadline: on :func:`time.monotonic`'s clock.
        """
        key = (host, port)
        with self._lock:
            future = self._pending.get(key)
        if future is None:
            if not self._slots.acquire(timeout=max(deadline - time.monotonic(), 0)):
                raise _Failure("dns", f"{host}: too many look-ups are stalled")
            with self._lock:
                shared = self._pending.get(key)
                future = shared or self._pending.setdefault(key, Future())
            if shared is not None:
                self._slots.release()
            else:
                threading.Thread(
                    target=self._resolve, args=(key, future), name="rq-webhooks-lookup", daemon=True
                ).start()
        try:
            return future.result(timeout=max(deadline - time.monotonic(), 0))
        except FutureTimeoutError:
            raise _Failure("dns", f"{host}: no answer in time") from None
        except OSError as exc:
            raise _Failure("dns", f"{host}: {exc.strerror or exc}") from exc

    def _resolve(self, key: tuple[str, int], future: Future[list[str]]) -> None:
        try:
            answers: list[str] | None = list(
                dict.fromkeys(_address(answer) for answer in self._resolver(*key))
            )
            error: Exception | None = None
        except Exception as exc:  # handed to whoever waits; the slot must be given back
            answers, error = None, exc
        with self._lock:
            del self._pending[key]
        self._slots.release()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answers or [])


def _address(answer: str | tuple[Any, ...]) -> str:
    return answer if isinstance(answer, str) else str(answer[4][0])


class _Watchdog:
    """One thread that ends every attempt at its deadline.

    It sleeps until the earliest deadline it knew of, which in good times it never has to act on.
    """

    def __init__(self, *, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self._condition = threading.Condition()
        self._attempts: set[_Attempt] = set()
        self._wakes_at = 0.0
        self._aborted = False
        self._ended = False
        self._thread: threading.Thread | None = None

    def watch(self, attempt: _Attempt) -> None:
        """End *attempt* at its deadline unless it is forgotten before."""
        with self._condition:
            self._attempts.add(attempt)
            if self._aborted:
                attempt.fire(_transport_closed())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rq-webhooks-watchdog", daemon=True)
                self._thread.start()
            elif attempt.deadline < self._wakes_at:
                self._condition.notify()

    def forget(self, attempt: _Attempt) -> None:
        """Let *attempt* be; it has ended."""
        with self._condition:
            self._attempts.discard(attempt)

    def abort(self) -> None:
        """End every attempt now, and all that are still to come."""
        with self._condition:
            self._aborted = True
            attempts = list(self._attempts)
        for attempt in attempts:
            attempt.fire(_transport_closed())

    def end(self) -> None:
        """End the thread."""
        with self._condition:
            self._ended = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        next_idle_look = time.monotonic() + MAX_IDLE_S
        while True:
            with self._condition:
                if self._ended:
                    return
                now = time.monotonic()
                late = [attempt for attempt in self._attempts if attempt.deadline <= now]
                self._attempts.difference_update(late)
                if not late and now < next_idle_look:
                    self._wakes_at = min(
                        (attempt.deadline for attempt in self._attempts), default=next_idle_look
                    )
                    self._wakes_at = min(self._wakes_at, next_idle_look)
                    self._condition.wait(self._wakes_at - now)
                    continue
            for attempt in late:
                attempt.fire(_deadline_passed())
            if now >= next_idle_look:
                self._on_idle()
                next_idle_look = now + MAX_IDLE_S
