"""The transport of :mod:`aiohttp`, on one event loop in a thread of its own: the extra ``fast``.

The promises are those of :class:`.RequestsTransport`, and they come from the same modules: which URL and
address may be used, what goes out, what may come back, why there is no answer. What differs is who waits: one
loop instead of many threads.

Of aiohttp it uses the connector, whose ``connect`` and ``_create_connection`` are made to be overridden, and
the protocol that the connector makes, with its parser. The session is left out: what it does for a request
(redirects, cookies, decoding, the environment's proxies) is what must not happen here, and costs as much as
the rest.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpResponseParser, HttpResponseParserPy
from yarl import URL

from ...errors import ConfigurationError
from ...protocol.urls import CheckedURL, UrlPolicy, redact_url
from . import keeping
from .address_guard import Destinations, is_literal
from .answers import BODY_CAP, MAX_HEADER_BYTES, MAX_HEADERS, broken, failed, head_of
from .contract import AttemptRequest, AttemptResult
from .dns import MAX_ADDRESSES, Lookups, Resolver, alternate, look_up_failure, system_resolver
from .loop import LoopThread, fastest_loop
from .opening import open_one_in_loop
from .request_encoding import request_bytes
from .tls import verifying_context
from .transport_errors import Failure, deadline_passed, innermost, transport_closed

logger = logging.getLogger(__name__)

#: aiohttp's own, which would cost a timer each; the attempt's deadlines are above them.
_NO_TIMEOUTS = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
#: Seconds between two tries to get a thread for a look-up.
_LOOK_UP_PAUSE_S = 0.02


class AiohttpTransport:
    """Send through :mod:`aiohttp` on one event loop in a daemon thread.

    :param policy: what may be reached.
    :param concurrency: requests in flight at most.
    :param proxy_url: egress proxy; it then decides about addresses, and may itself have a private one.
    :param resolver: ``(host, port) -> addresses``; may block and raise :exc:`OSError`. Called in a thread of
        its own, since a look-up cannot be given a deadline.
    :param ssl_context: instead of :func:`.default_ssl_context`; has to verify names.
    :param ca_file: PEM bundle for :func:`.default_ssl_context`.
    :param body_cap: bytes of a response body that are kept.
    :param loop_factory: makes the event loop.
    :raises ConfigurationError: where aiohttp has no parser but the one in Python.
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
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = fastest_loop,
    ) -> None:
        if HttpResponseParser is HttpResponseParserPy:  # it takes for answers what the other refuses
            raise ConfigurationError(
                "RQ_WEBHOOKS_TRANSPORT is 'aiohttp', and aiohttp's compiled parser is missing: either "
                "AIOHTTP_NO_EXTENSIONS is set, or it was built without. Use 'requests' instead."
            )
        context = verifying_context(ssl_context, ca_file)
        self._concurrency = concurrency
        self._closing = threading.Lock()
        self._closed = False
        self._submitted: deque[tuple[Future[AttemptResult], AttemptRequest]] = deque()
        self._drain_is_due = False
        self._thread = LoopThread("rq-webhooks-send", loop_factory())
        self._loop = self._thread.loop
        try:
            self._exchanges: _Exchanges = self._thread.call(
                _open_exchanges,
                Destinations(policy),
                Lookups(resolver, limit=max(8, 2 * concurrency)),
                context,
                proxy_url=proxy_url,
                concurrency=concurrency,
                body_cap=body_cap,
            )
        except BaseException:
            self._thread.stop()
            raise
        # What follows belongs to the loop's thread.
        self._tasks: set[asyncio.Task[None]] = set()
        self._deadlines = _Deadlines(self._loop)

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        """Send *request* as soon as a slot is free.

        :returns: a future that never raises: what went wrong is in the result.
        :raises RuntimeError: after :meth:`close`.
        """
        future: Future[AttemptResult] = Future()
        with self._closing:
            if self._closed:
                raise RuntimeError("This transport is closed; make a new one.")
            self._submitted.append((future, request))
            if not self._drain_is_due:  # one call for all that comes until the loop looks
                self._drain_is_due = True
                self._loop.call_soon_threadsafe(self._drain)
        return future

    def close(self, *, wait: bool) -> None:
        """Take no more requests, end the thread and close the connections.

        :param wait: let requests under way end by themselves, which their deadlines bound. Otherwise they
            are broken off and end as ``internal``.
        """
        with self._closing:
            already, self._closed = self._closed, True
            if not wait and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deadlines.abort)
        if already:
            self._thread.join()
            return
        self._thread.call(self._finish)
        with self._closing:
            self._thread.stop()

    def __enter__(self) -> AiohttpTransport:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close(wait=True)

    # -- in the loop's thread ---------------------------------------------------------------------------

    def _drain(self) -> None:
        """Start as many tasks as there are requests and slots."""
        self._drain_is_due = False
        for _ in range(min(len(self._submitted), self._concurrency - len(self._tasks))):
            self._tasks.add(self._loop.create_task(self._work()))

    async def _work(self) -> None:
        """Make one attempt after the other until nothing is left."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            while self._submitted:
                future, request = self._submitted.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_result(await self._make(request, task))
        finally:
            self._tasks.discard(task)  # not a moment later, or a request might wait for a slot that is free

    async def _make(self, request: AttemptRequest, task: asyncio.Task[None]) -> AttemptResult:
        started_at = datetime.now(UTC)
        started = time.monotonic()
        if self._deadlines.aborted:
            return AttemptResult(started_at=started_at, duration_ms=0.0, **failed(transport_closed()))
        attempt = _Attempt(task, request, started)
        self._deadlines.watch(attempt)
        try:
            outcome = await self._exchanges.run(attempt, request)
        except Failure as failure:
            outcome = failed(failure)
        except asyncio.CancelledError:
            outcome = failed(attempt.fired or transport_closed())
        except Exception:  # the future's promise: a fault of ours is a result too, and is logged
            logger.exception("Sending to %s failed in an unforeseen way.", redact_url(request.url))
            outcome = broken()
        finally:
            self._deadlines.forget(attempt)
        if attempt.fired is not None:
            while task.uncancel():  # also what was asked for and not yet thrown
                pass
            outcome = failed(attempt.fired)
        duration_ms = (time.monotonic() - started) * 1000
        return AttemptResult(started_at=started_at, duration_ms=duration_ms, **outcome)

    async def _finish(self) -> None:
        while self._submitted or self._tasks:
            self._drain()
            await asyncio.wait(self._tasks)
        self._deadlines.end()
        await self._exchanges.close()


class _Attempt:
    """One attempt's deadlines, and the task that can be cancelled to end it."""

    __slots__ = (
        "answered",
        "checked",
        "connect_deadline",
        "deadline",
        "fired",
        "late",
        "opened_at",
        "protocol",
        "reused",
        "task",
        "wants_new_connection",
    )

    checked: CheckedURL

    def __init__(self, task: asyncio.Task[None], request: AttemptRequest, started: float) -> None:
        self.task = task
        self.deadline = started + request.timeout_s
        self.connect_deadline = started + min(request.connect_timeout_s, request.timeout_s)
        #: Why it was ended from outside.
        self.fired: Failure | None = None
        #: What it comes to if the deadline passes now; a timeout, if nothing else.
        self.late: Failure | None = None
        self.protocol: _Protocol | None = None
        self.opened_at = 0.0
        self.reused = False
        self.wants_new_connection = False

    def fire(self, failure: Failure | None = None) -> None:
        """End the attempt now."""
        if self.fired is None:
            self.fired = failure or self.late or deadline_passed()
            self.task.cancel()

    def may_repeat(self, failure: Failure) -> bool:
        """Say once whether *failure* may be blamed on the connection's having been idle."""
        answered = self.protocol is not None and bool(self.protocol.answer)
        if not keeping.is_blameless(
            failure, reused=self.reused, repeated=self.wants_new_connection, answered=answered
        ):
            return False
        self.wants_new_connection = True
        return True


#: The attempt a task is making; how the connector knows its deadline.
_current: ContextVar[_Attempt] = ContextVar("rq_webhooks_attempt")


class _Deadlines:
    """End attempts at their deadlines, with one timer that in good times never has to act."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._attempts: set[_Attempt] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0
        self.aborted = False

    def watch(self, attempt: _Attempt) -> None:
        self._attempts.add(attempt)
        if self._timer is None or attempt.deadline < self._wakes_at:
            self._wake_at(attempt.deadline)

    def forget(self, attempt: _Attempt) -> None:
        self._attempts.discard(attempt)

    def abort(self) -> None:
        """End every attempt now; no other may begin."""
        self.aborted = True
        for attempt in self._attempts:
            attempt.fire(transport_closed())

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = when
        # uvloop's clock has another zero, so seconds from now are what both understand.
        self._timer = self._loop.call_later(max(when - time.monotonic(), 0) + 0.001, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = time.monotonic()
        for attempt in self._attempts:
            if attempt.deadline <= now:
                attempt.fire()
        waiting = [attempt.deadline for attempt in self._attempts if attempt.fired is None]
        if waiting:
            self._wake_at(min(waiting))


async def _open_exchanges(
    destinations: Destinations,
    lookups: Lookups,
    context: ssl.SSLContext,
    *,
    proxy_url: str | None,
    concurrency: int,
    body_cap: int,
) -> _Exchanges:
    proxy = _Proxy(URL(proxy_url)) if proxy_url else None
    keep = keeping.most_kept(concurrency)
    connector = _PinnedConnector(destinations, lookups, context, proxy=proxy, keep=keep)
    return _Exchanges(destinations, connector, proxy=proxy, body_cap=body_cap)


class _Proxy:
    """The operator's egress proxy; aiohttp is told neither name nor password of its user."""

    def __init__(self, url: URL) -> None:
        self.url = url.with_user(None)
        self.host = cast(str, url.raw_host)
        self.port = cast(int, url.port)
        self.headers: dict[str, str] = {}
        if url.user is not None:
            credentials = base64.b64encode(f"{url.user}:{url.password or ''}".encode())
            self.headers["Proxy-Authorization"] = f"Basic {credentials.decode()}"

    def ask_for_tunnel(self, checked: CheckedURL) -> bytes:
        """Return the request for a tunnel to the receiver."""
        host = f"[{checked.host}]" if ":" in checked.host else checked.host
        lines = [f"CONNECT {host}:{checked.port} HTTP/1.1", f"Host: {host}:{checked.port}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("ascii")


class _Exchanges:
    """Requests and their answers over the connections of one connector."""

    def __init__(
        self, destinations: Destinations, connector: _PinnedConnector, *, proxy: _Proxy | None, body_cap: int
    ) -> None:
        self._destinations = destinations
        self._connector = connector
        self._proxy = proxy
        self._body_cap = body_cap
        self._destination = lru_cache(maxsize=256)(self._make_destination)

    async def run(self, attempt: _Attempt, request: AttemptRequest) -> dict[str, Any]:
        """Return the fields of the result.

        :raises Failure: when there is no answer.
        """
        checked = attempt.checked = self._destinations.check_url(request.url)
        _current.set(attempt)
        destination = self._destination(checked.url)
        try:
            return await self._exchange(attempt, request, destination)
        except Failure as failure:
            if not attempt.may_repeat(failure):
                raise
        return await self._exchange(attempt, request, destination)

    async def close(self) -> None:
        """Close every connection."""
        await self._connector.close()

    def _make_destination(self, url: str) -> aiohttp.ClientRequest:
        """Return what the connector finds or opens a connection for; nothing of it is sent."""
        return aiohttp.ClientRequest(
            "POST",
            URL(url, encoded=True),
            loop=asyncio.get_running_loop(),
            proxy=self._proxy.url if self._proxy else None,
        )

    async def _exchange(
        self, attempt: _Attempt, request: AttemptRequest, destination: aiohttp.ClientRequest
    ) -> dict[str, Any]:
        """Make the request once; translate everything that can go wrong on the way."""
        attempt.protocol = None
        connection: Connection | None = None
        keep = False
        try:
            connection = await self._connector.connect(destination, [], _NO_TIMEOUTS)
            protocol = cast(_Protocol, connection.protocol)
            transport = cast(asyncio.Transport, protocol.transport)
            protocol.parse(self._body_cap)
            proxy_headers = None
            if self._proxy is not None and attempt.checked.scheme == "http":
                proxy_headers = self._proxy.headers
            transport.write(request_bytes(attempt.checked, request, proxy_headers))
            message, payload = await protocol.read_head()
            outcome = head_of(message.code, message.raw_headers)
            if "error_code" not in outcome:
                outcome["response_body"] = await self._read(payload)
                if protocol.broken and not message.chunked and "Content-Length" not in message.headers:
                    raise protocol.broken  # only its end can tell that such a body is whole
                # What is still unsent would be the beginning of the next request.
                keep = payload.at_eof() and not transport.get_write_buffer_size()
            return outcome
        except (aiohttp.ClientError, HttpProcessingError, OSError) as exc:
            readable = _readable_part(exc, attempt.protocol)
            if readable is None:
                raise _failure(exc) from exc
            return readable
        finally:
            if connection is not None:
                if keep:
                    protocol.rest()
                    connection.release()
                else:
                    connection.close()  # never drained: what follows may have no end
                self._connector.done(attempt)

    async def _read(self, payload: aiohttp.StreamReader) -> bytes:
        body = b""
        # One byte more than is kept, so that a body of just that size is seen to have ended.
        while not payload.at_eof() and len(body) <= self._body_cap:
            body += await payload.read(self._body_cap + 1 - len(body))
        return body[: self._body_cap]


_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)[0-9][0-9][ \r]")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([2-5][0-9]{2})(?: [^\r\n]*)?\r\n")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*)", re.DOTALL)
_BEGINNING = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]*(?:\Z|(?<=.):)")
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class _Protocol(ResponseHandler):
    """A connection that bounds the heads of an answer, and takes nothing that nobody asked for."""

    #: What came since the request until the final head had ended, and sometimes a little more.
    answer = bytearray()
    #: What the connection broke of, if it did not end orderly.
    broken: BaseException | None = None
    #: Whether the final head has not ended yet, and the bytes that may come until it has.
    _head_open = True
    _head_left = MAX_HEADER_BYTES
    _at_rest = False

    def expect_answer(self) -> None:
        """Begin to count: a request is about to be sent."""
        self.answer = bytearray()
        self._head_open = True
        self._head_left = MAX_HEADER_BYTES
        self._at_rest = False

    def parse(self, body_cap: int) -> None:
        """Begin to parse, what has come already too; hold no more than a few times *body_cap* of a body."""
        self.set_response_params(
            read_until_eof=True,
            auto_decompress=False,
            read_bufsize=body_cap,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
        )

    async def read_head(self) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
        """Return the first head that is not an interim one, and the body's reader."""
        while True:
            message, payload = await self.read()
            if message.code >= 200 or message.code == 101:
                return message, payload

    def rest(self) -> None:
        """Be kept for another request: until then, whatever comes ends the connection."""
        self._at_rest = True

    def close(self) -> None:
        """End the connection at once: an orderly end waits for a peer that may never read."""
        self.abort()

    def data_received(self, data: bytes) -> None:
        """Hand *data* to the parser, which tells of every head that ended by :meth:`feed_data`."""
        if self._at_rest:
            self.abort()
        elif self._head_open:
            self._receive_heads(data)
        elif data and (self._payload is None or self._payload.is_eof()):
            self.force_close()  # behind the answer; not even looked at
        else:
            super().data_received(data)
            if self._exception is not None and self._payload is not None and not self._payload.is_eof():
                self._payload.set_exception(self._exception)  # or its reader would wait for the deadline

    def _receive_heads(self, data: bytes) -> None:
        """Hand over no more than one head at a time: what follows cannot make the parser forget it."""
        bound = self._head_left + 1  # one byte above it is seen to be too much
        data, beyond = data[:bound], data[bound:]
        self._head_left -= len(data)
        before, taken = len(self.answer), 0
        self.answer += data
        searched = max(before - 3, 0)
        while (end := self.answer.find(b"\r\n\r\n", searched)) >= 0:
            searched = end + 4
            super().data_received(data[taken : searched - before])
            taken = searched - before
            if self._exception is not None:
                return
            if not self._head_open:
                if rest := data[taken:] + beyond:
                    self.data_received(rest)
                return
        super().data_received(data[taken:])
        if not self._head_open:  # it ended with bare line feeds
            if beyond:
                self.data_received(beyond)
        elif self._head_left < 0:
            self.set_exception(aiohttp.ClientPayloadError("the headers are too long"))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Remember how it ended; aiohttp takes every end for the end of a body without a length."""
        self.broken = exc
        super().connection_lost(exc)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Take a head from the parser."""
        if data[0].code >= 200:
            self._head_open = False
        super().feed_data(data, size)


def _readable_part(exc: BaseException, protocol: _Protocol | None) -> dict[str, Any] | None:
    """Return what can be told of an answer whose headers the parser would not have.

    The status is believed, whatever lines stand below it, and of these the readable ones; not the body.
    """
    if protocol is None or not isinstance(exc, HttpProcessingError):
        return None
    rest = bytes(protocol.answer)
    while _INTERIM.match(rest):
        rest = rest.partition(b"\r\n\r\n")[2]
    head, end, _ = rest.partition(b"\r\n\r\n")
    match = _STATUS_LINE.match(head + end)
    if match is None or len(head) > MAX_HEADER_BYTES:
        return None
    lines = head.split(b"\r\n")[1:]
    beginning = b"" if end else lines.pop().removesuffix(b"\r")  # the parser did not wait for more of it
    pairs = [(line[1], line[2]) for text in lines if (line := _HEADER_LINE.fullmatch(text))]
    if (
        len(pairs) == len(lines)
        and _BEGINNING.match(beginning)
        and not any(_CONTROLS.search(text) for text in [*lines, beginning])
    ):
        return None  # it is broken elsewhere
    return head_of(int(match[1]), pairs)


class _PinnedConnector(aiohttp.TCPConnector):
    """A connector that opens connections to judged addresses only, and does not keep them too long."""

    def __init__(
        self,
        destinations: Destinations,
        lookups: Lookups,
        context: ssl.SSLContext,
        *,
        proxy: _Proxy | None,
        keep: int,
    ) -> None:
        super().__init__(
            resolver=aiohttp.ThreadedResolver(),  # never asked: this class opens every connection
            use_dns_cache=False,
            ssl=context,
            limit=0,  # the transport counts
            keepalive_timeout=keeping.MAX_IDLE_S,
            happy_eyeballs_delay=None,
        )
        self._destinations = destinations
        self._lookups = lookups
        self._context = context
        self._proxy = proxy
        self._keep = keep
        self._kept: OrderedDict[ResponseHandler, float] = OrderedDict()
        self._factory = cast("partial[ResponseHandler]", partial(_Protocol, loop=asyncio.get_running_loop()))

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Connection:
        """Return a kept connection that is clean and young enough, or a new one."""
        attempt = _current.get()
        while True:
            attempt.reused = True
            connection = await super().connect(req, traces, timeout)
            protocol = cast(_Protocol, connection.protocol)
            if attempt.reused:
                attempt.opened_at = self._kept.pop(protocol, 0.0)
                if (
                    attempt.wants_new_connection
                    or protocol.should_close  # it said something nobody asked for
                    or time.monotonic() - attempt.opened_at > keeping.MAX_AGE_S
                ):
                    connection.close()
                    continue
            attempt.protocol = protocol
            protocol.expect_answer()
            return connection

    def done(self, attempt: _Attempt) -> None:
        """Count the connection of *attempt* among the kept ones, if it was kept."""
        protocol = attempt.protocol
        if protocol is None or not protocol.is_connected():
            return
        self._kept[protocol] = attempt.opened_at
        if len(self._kept) > self._keep:
            self._kept.popitem(last=False)[0].close()

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        attempt = _current.get()
        attempt.reused = False
        attempt.opened_at = time.monotonic()
        checked = attempt.checked
        if self._proxy is not None:
            return await self._through(self._proxy, attempt, checked)
        sock = await self._open(attempt, checked)
        return await self._converse(attempt, sock, checked.host if checked.scheme == "https" else None)

    async def _converse(self, attempt: _Attempt, sock: socket.socket, tls_name: str | None) -> _Protocol:
        """Make a connection of *sock*, by TLS to *tls_name* if there is one."""
        loop = asyncio.get_running_loop()
        try:
            if tls_name is None:
                _, protocol = await loop.create_connection(self._factory, sock=sock)
            else:
                _, protocol = await loop.create_connection(
                    self._factory,
                    sock=sock,
                    ssl=self._context,
                    server_hostname=tls_name,
                    ssl_handshake_timeout=_handshake_timeout(attempt),
                )
        except BaseException as exc:
            sock.close()
            _raise_if_tls(exc)
            raise
        return cast(_Protocol, protocol)

    async def _through(self, proxy: _Proxy, attempt: _Attempt, checked: CheckedURL) -> _Protocol:
        """Open a connection to *proxy*, and through it one to the receiver if that speaks TLS."""
        sock = await self._open_proxy(proxy, attempt)
        protocol = await self._converse(attempt, sock, proxy.host if proxy.url.scheme == "https" else None)
        if checked.scheme == "http":
            return protocol
        try:
            try:
                async with asyncio.timeout(max(attempt.connect_deadline - time.monotonic(), 0)):
                    await _open_tunnel(protocol, proxy.ask_for_tunnel(checked))
            except TimeoutError:
                if attempt.connect_deadline >= attempt.deadline:
                    raise deadline_passed() from None
                raise Failure("connect", "proxy: no tunnel in time") from None
            receiver = _Protocol(asyncio.get_running_loop())
            transport = await asyncio.get_running_loop().start_tls(
                cast(asyncio.Transport, protocol.transport),
                receiver,
                self._context,
                server_hostname=checked.host,
                ssl_handshake_timeout=_handshake_timeout(attempt),
            )
            if transport is None:
                raise ConnectionResetError("closed amid the handshake")
        except BaseException as exc:
            protocol.abort()
            _raise_if_tls(exc)
            raise
        receiver.connection_made(transport)
        return receiver

    async def _open_proxy(self, proxy: _Proxy, attempt: _Attempt) -> socket.socket:
        """Open a connection to the operator's own proxy, which may be anywhere."""
        deadline = attempt.connect_deadline
        try:
            addresses = [proxy.host]
            if not is_literal(proxy.host):
                attempt.late = Failure("dns", f"{proxy.host}: no answer in time")
                addresses = await _look_up(self._lookups, proxy.host, proxy.port, deadline)
            attempt.late = Failure("connect", f"proxy: {proxy.host}: no connection in time")
            sock = await open_one_in_loop(alternate(addresses)[:MAX_ADDRESSES], proxy.port, deadline)
        except Failure as failure:
            raise Failure(failure.code, f"proxy: {failure.detail}") from failure
        attempt.late = None
        return sock

    async def _open(self, attempt: _Attempt, checked: CheckedURL) -> Any:
        host, port = checked.host, checked.port
        deadline = attempt.connect_deadline
        if is_literal(host):
            addresses = [host]
        else:
            attempt.late = Failure("dns", f"{host}: no answer in time")
            addresses = await _look_up(self._lookups, host, port, deadline)
        self._destinations.check_addresses(checked, addresses)
        attempt.late = Failure("connect", f"{host}: no connection in time")
        sock = await open_one_in_loop(alternate(addresses)[:MAX_ADDRESSES], port, deadline)
        attempt.late = None
        return sock


async def _open_tunnel(protocol: _Protocol, request: bytes) -> None:
    """Have the proxy that *protocol* speaks with open the tunnel that *request* asks for."""
    try:
        protocol.expect_answer()
        protocol.parse(BODY_CAP)
        cast(asyncio.Transport, protocol.transport).write(request)
        message, _ = await protocol.read_head()
    except (aiohttp.ClientError, HttpProcessingError, ConnectionError) as exc:
        raise Failure("connect", f"proxy: {innermost(exc)}") from exc
    if message.code != 200:
        raise Failure("connect", f"proxy: no tunnel: {message.code} {message.reason}")


def _handshake_timeout(attempt: _Attempt) -> float:
    """Return seconds that are never used up: the attempt's deadline comes first; asyncio's is a minute."""
    return attempt.deadline - time.monotonic() + 60


def _raise_if_tls(exc: BaseException) -> None:
    """Raise what *exc* means if it comes of a handshake.

    asyncio knows no SSLError for a peer that leaves amid the handshake.
    """
    if isinstance(exc, ssl.SSLError) or (isinstance(exc, ConnectionResetError) and not exc.errno):
        raise Failure("tls", innermost(exc)) from exc


async def _look_up(lookups: Lookups, host: str, port: int, deadline: float) -> list[str]:
    while (future := lookups.begin(host, port)) is None:
        if time.monotonic() >= deadline:
            raise Failure("dns", f"{host}: too many look-ups are stalled")
        await asyncio.sleep(_LOOK_UP_PAUSE_S)
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
            addresses = await asyncio.wrap_future(future)
    except OSError as exc:
        raise look_up_failure(host, exc) from exc
    if not addresses:
        raise Failure("dns", f"{host} has no address")
    return addresses


def _failure(exc: BaseException) -> Failure:
    """Return the coarse code for an error of aiohttp or the socket."""
    detail = innermost(exc)
    if isinstance(exc, ssl.SSLError | aiohttp.ClientSSLError):
        return Failure("tls", detail)
    if isinstance(exc, aiohttp.InvalidURL):
        return Failure("internal", "the URL cannot be sent")
    return Failure("reset", detail)
