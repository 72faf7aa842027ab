"""The transport: a :mod:`requests` adapter, one thread that never waits for receivers, and threads that may.

Requests go through :meth:`requests.adapters.HTTPAdapter.send`, so that whatever intercepts it (such as the
package ``responses``) sees every delivery. Where the adapter would call urllib3's ``urlopen``, it calls
:class:`.Exchange`, which uses checked addresses, a total deadline, strict parsing, and half the CPU.

Most requests find a kept connection. One thread (while it sleeps, the submitting one) writes them, and reads
responses that come in one piece without TLS. With one thread per request, switching would take as long again.
"""

from __future__ import annotations

import logging
import queue
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import HTTPResponse, Timeout

from ...config import Settings
from ...errors import ConfigurationError
from ...protocol.urls import UrlPolicy, redact_url
from . import pool
from .address_guard import AddressGuard, Lookups, Resolver, system_resolver
from .contract import NETWORK_ERRORS, AttemptRequest, AttemptResult, Failure, failure_of
from .deadline import RunningAttempt, Watchdog
from .pool import ConnectionPool, default_ssl_context, verifying_context
from .wire_format import BODY_CAP, Exchange, clean, head_of, wire_headers

logger = logging.getLogger(__name__)

#: Socket timeout in the form :mod:`requests` uses: none, the watchdog aborts what takes too long.
_BY_WATCHDOG: Any = Timeout()
#: Maximum characters of an error that are kept.
_MAX_DETAIL = 300
#: Requests started before the loop looks for responses.
_BEGUN_AT_ONCE = 16
#: Seconds the loop pauses after an error of its own.
_REST_S = 0.1


def open_transport(settings: Settings, policy: UrlPolicy, *, concurrency: int) -> RequestsTransport:
    """Return a transport configured by *settings*; the caller has to close it.

    :param concurrency: maximum number of requests in flight.
    :raises ConfigurationError: when a certificate or key file cannot be used.
    """
    try:
        return RequestsTransport(
            policy,
            concurrency=concurrency,
            proxy_url=settings.proxy_url,
            ca_file=settings.ca_file,
            client_certs={host: (cert, key) for host, cert, key in settings.client_certs},
        )
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigurationError(
            f"A file of RQ_WEBHOOKS_CA_FILE ({settings.ca_file!r}) or RQ_WEBHOOKS_CLIENT_CERTS "
            f"({settings.client_certs!r}) cannot be used: {exc}. Each has to be a PEM file that this "
            "process may read, and a key has to belong to its certificate and have no password."
        ) from exc


class RequestsTransport:
    """Send through a :mod:`requests` adapter.

    :param policy: decides what may be reached.
    :param concurrency: maximum number of requests in flight.
    :param proxy_url: egress proxy; it then decides about addresses, and may itself have a private one.
    :param resolver: ``(host, port) -> addresses``; may block and raise :exc:`OSError`. Called in a thread of
        its own, since a look-up cannot be given a deadline.
    :param ssl_context: used instead of :func:`.default_ssl_context`; must verify names.
    :param ca_file: PEM file of certificate authorities to trust in addition to the public ones.
    :param client_certs: certificate file and key file by host; presented to no other host.
    :param body_cap: maximum bytes of a response body that are kept.
    :raises ValueError: for a context that does not verify certificates and names.
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
        client_certs: Mapping[str, tuple[str, str]] = MappingProxyType({}),
        body_cap: int = BODY_CAP,
    ) -> None:
        context = verifying_context(ssl_context, ca_file)
        self._lookups = Lookups(resolver, limit=max(8, 2 * concurrency))
        self._guard = AddressGuard(policy, self._lookups)
        self._pool = ConnectionPool(
            self._guard,
            concurrency=concurrency,
            ssl_context=context,
            proxy_url=proxy_url,
            host_contexts={host: default_ssl_context(ca_file, files) for host, files in client_certs.items()},
        )
        self._adapter = WebhookAdapter(self._pool, body_cap)
        self._watchdog = Watchdog(on_idle=self._pool.close_idle, idle_s=pool.MAX_IDLE_S)
        self._loop = SendLoop("rq-webhooks-http", concurrency)
        self._closed = False
        self._close_lock = threading.Lock()

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        """Send *request* as soon as fewer than *concurrency* are in flight.

        :returns: a future that never raises: errors are reported in the result.
        :raises RuntimeError: after :meth:`close`.
        """
        future: Future[AttemptResult] = Future()
        with self._close_lock:
            if self._closed:
                raise RuntimeError("This transport is closed; make a new one.")
            self._loop.add(Submission(request, future, self._guard, self._adapter, self._watchdog))
        return future

    def close(self, *, wait: bool) -> None:
        """Accept no more requests, end the threads and close the connections.

        :param wait: let requests in flight finish, at their deadlines at the latest. Otherwise they are
            aborted and end as ``internal``.
        """
        with self._close_lock:
            already, self._closed = self._closed, True
        if not already:
            self._loop.end()
        if not wait:
            self._watchdog.abort()
            self._lookups.abort()
        self._loop.join()
        if not already:
            self._watchdog.end()
            self._pool.close()
            self._adapter.close()

    def __enter__(self) -> RequestsTransport:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close(wait=True)


class Submission:
    """A request in progress. Errors are reported in its result.

    :param future: receives the result.
    """

    def __init__(
        self,
        request: AttemptRequest,
        future: Future[AttemptResult],
        guard: AddressGuard,
        adapter: WebhookAdapter,
        watchdog: Watchdog,
    ) -> None:
        self._request = request
        self._future = future
        self._guard = guard
        self._adapter = adapter
        self._watchdog = watchdog
        self._running: RunningAttempt | None = None
        self._exchange: Exchange | None = None
        self._started_at: datetime
        self._started: float

    @property
    def waits_for(self) -> socket.socket | None:
        """Return the socket to become readable before :meth:`resume`; if ``None``, :meth:`finish` is next."""
        return self._exchange.waits_for if self._exchange is not None else None

    def begin(self) -> bool:
        """Proceed as far as possible without waiting; return whether the request has ended."""
        if not self._future.set_running_or_notify_cancel():
            return True
        self._started_at = datetime.now(UTC)
        self._started = time.monotonic()
        return self._go_on(self._send)

    def resume(self) -> bool:
        """Continue when something can be read; return whether the request has ended."""
        return self._go_on(cast(Exchange, self._exchange).resume)

    def finish(self) -> None:
        """Do the rest, waiting where necessary."""
        self._go_on(cast(Exchange, self._exchange).finish)

    def _send(self) -> dict[str, Any] | None:
        request = self._request
        self._running = RunningAttempt(
            self._guard.check_url(request.url),
            deadline=self._started + request.timeout_s,
            connect_deadline=self._started + min(request.connect_timeout_s, request.timeout_s),
        )
        self._watchdog.watch(self._running)
        self._running.raise_if_aborted()
        outgoing = _OutgoingRequest(self._running, request)
        try:
            response = self._adapter.send(outgoing, timeout=_BY_WATCHDOG)
        except NETWORK_ERRORS as exc:  # only raised by what replaces the adapter in tests
            raise failure_of(exc) from exc
        self._exchange = outgoing.exchange
        return cast(_IncomingResponse, response).outcome or None

    def _go_on(self, step: Callable[[], dict[str, Any] | None]) -> bool:
        try:
            outcome = step()
            if outcome is None:
                return False
        except Failure as failure:
            outcome = {"error_code": failure.code, "error_detail": clean(failure.detail, _MAX_DETAIL)}
        except BaseException:  # the future never raises: our own faults are results too, and logged
            logger.exception("Sending to %s failed with an unexpected error.", redact_url(self._request.url))
            outcome = {"error_code": "internal", "error_detail": "an error of the sender; see its log"}
        if self._running is not None:
            self._watchdog.forget(self._running)
        duration_ms = (time.monotonic() - self._started) * 1000
        self._future.set_result(
            AttemptResult(started_at=self._started_at, duration_ms=duration_ms, **outcome)
        )
        return True


class _OutgoingRequest(PreparedRequest):
    """One attempt as :mod:`requests` sees it, without the cost of preparing it.

    :raises Failure: ``internal``, when a header must not be sent.
    """

    def __init__(self, attempt: RunningAttempt, request: AttemptRequest) -> None:
        super().__init__()
        self.method = "POST"
        self.url = attempt.checked.url
        self.wire_headers = wire_headers(request)
        self.headers = CaseInsensitiveDict()
        vars(self.headers)["_store"] = self.wire_headers  # its own format; filling it takes far longer
        self.body = request.body
        self.attempt = attempt
        #: Created by the adapter, unless something intercepts the request.
        self.exchange: Exchange | None = None


class _IncomingResponse(Response):
    """One response as :mod:`requests` sees it.

    :param outcome: the fields of :class:`.AttemptResult` that it fills; empty until it has arrived.
    """

    def __init__(self, request: PreparedRequest, outcome: dict[str, Any]) -> None:
        # The base class's is not called: its cookie jar costs as much as the rest of the adapter.
        self.request = request
        self.url = cast(str, request.url)
        self.status_code = outcome.get("status_code", 0)
        self.headers = outcome.get("response_headers", {})
        self._content = outcome.get("response_body", b"")
        self._content_consumed = True
        self.encoding = self.raw = None
        self.reason = ""
        self.history = []
        self.outcome = outcome


class WebhookAdapter(HTTPAdapter):
    """A :mod:`requests` adapter that sends requests over the connections of a :class:`.ConnectionPool`.

    :meth:`send` itself is not overridden: it is what ``responses`` replaces.

    :param body_cap: maximum bytes of a response body that are kept.
    """

    def __init__(self, connections: ConnectionPool, body_cap: int) -> None:
        super().__init__(pool_connections=1, pool_maxsize=1)
        self._connections = connections
        self._body_cap = body_cap

    def get_connection_with_tls_context(self, request: PreparedRequest, *_args: Any, **_options: Any) -> Any:
        """Return the object on which :meth:`send` calls ``urlopen``."""
        outgoing = cast(_OutgoingRequest, request)
        outgoing.exchange = Exchange(
            outgoing.attempt,
            outgoing.wire_headers.values(),
            cast(bytes, outgoing.body),
            self._connections,
            self._body_cap,
        )
        return outgoing.exchange

    def cert_verify(self, *_args: Any, **_options: Any) -> None:
        """Do nothing: the pool's TLS context verifies certificates and names."""

    def request_url(self, *_args: Any, **_options: Any) -> str:
        """Return an empty string: the exchange writes the request line itself."""
        return ""

    def build_response(self, req: PreparedRequest, resp: Any) -> Response:
        """Return the response to *req*.

        :param resp: what :class:`.Exchange` returned, or a urllib3 response from a package that intercepts
            requests.
        """
        if isinstance(resp, HTTPResponse):
            outcome = head_of(resp.status, resp.headers.items())
            if "error_code" not in outcome:
                outcome["response_body"] = resp.read(decode_content=False)[: self._body_cap]
        else:
            outcome = resp
        return _IncomingResponse(req, outcome)


class SendLoop:
    """Start submissions in the order they were added, and continue each as soon as possible.

    One thread does everything that needs no waiting; the rest is done in threads started as needed. The
    standard library's pool is not used for these: the interpreter waits for its threads at exit.

    :param name: name of the threads.
    :param limit: maximum number of submissions in progress.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Submission] = deque()
        self._in_progress = 0
        self._sleeps = self._ended = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._name = name
        self._others = DaemonThreads(name, limit)
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)

    def add(self, submission: Submission) -> None:
        """Start *submission* as soon as there is a place: at once, in this thread, if the loop is asleep."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread  # only now: if no thread could be started, the next one tries again
            here = self._sleeps and not self._waiting and self._in_progress < self._limit
            self._in_progress += here
            if not here:
                self._waiting.append(submission)
        if here:
            self._go_on(submission, submission.begin)
        self._wake()

    def end(self) -> None:
        """Let all threads end once the submissions added so far have ended."""
        self._ended = True
        self._wake()

    def join(self) -> None:
        """Wait until all threads have ended."""
        if self._thread is not None:
            self._thread.join()
        self._others.end()
        self._others.join()
        for opened in (self._selector, self._waker, self._woken):
            opened.close()

    def _wake(self) -> None:
        with self._lock:
            sleeps, self._sleeps = self._sleeps, False
        if sleeps:
            self._waker.send(b"\0")

    def _run(self) -> None:
        goes_on = True
        while goes_on:
            try:
                goes_on = self._advance()
            except BaseException:  # the host app's code raised it; without this thread, nothing is sent
                logger.exception("The loop of requests failed; it goes on.")
                time.sleep(_REST_S)

    def _advance(self) -> bool:
        """Do what can be done now, or wait until there is something; return whether there may be more."""
        with self._lock:
            if self._ended and not self._waiting and not self._in_progress:
                return False
            sleeps = self._sleeps = not (self._waiting and self._in_progress < self._limit)
        ready = self._selector.select(None if sleeps else 0)
        self._sleeps = False
        for key, _events in ready:
            if key.data is None:
                self._woken.recv(1024)
                continue
            self._selector.unregister(key.fileobj)
            self._go_on(key.data, key.data.resume)
        for _ in range(_BEGUN_AT_ONCE):
            with self._lock:
                if not self._waiting or self._in_progress >= self._limit:
                    break
                submission = self._waiting.popleft()
                self._in_progress += 1
            self._go_on(submission, submission.begin)
        return True

    def _go_on(self, submission: Submission, step: Callable[[], bool]) -> None:
        has_ended = True
        try:
            has_ended = step()
        finally:
            if has_ended:
                self._count_out()
        if has_ended:
            return
        try:
            if (sock := submission.waits_for) is not None:
                self._selector.register(sock, selectors.EVENT_READ, submission)
                return
        except Exception:  # no memory for it
            logger.exception("A connection cannot be watched; a thread waits for it.")
        try:
            self._others.run(partial(self._finish, submission))
        except Exception:  # there is no thread at all
            logger.exception("A request has to be made by the thread that others wait for.")
            self._finish(submission)

    def _finish(self, submission: Submission) -> None:
        try:
            submission.finish()
        finally:
            self._count_out()
            self._wake()

    def _count_out(self) -> None:
        with self._lock:
            self._in_progress -= 1


class DaemonThreads:
    """Run tasks that may wait, in at most *limit* daemon threads, started as needed."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        #: Threads without a task; negative: tasks without a thread.
        self._idle = 0
        self._threads: list[threading.Thread] = []

    def run(self, task: Callable[[], None]) -> None:
        """Run *task* in a thread; tasks start in the order in which they were given.

        :raises RuntimeError: if there is no thread and none can be started.
        """
        with self._lock:
            if self._idle <= 0 and len(self._threads) < self._limit:
                self._start()
            self._idle -= 1
            self._tasks.put(task)

    def _start(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
            return  # the first free thread takes the task
        self._threads.append(thread)
        self._idle += 1

    def end(self) -> None:
        """Let every thread end once the tasks given so far are done."""
        for _ in self._threads:
            self._tasks.put(None)

    def join(self) -> None:
        """Wait until all threads have ended."""
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            finally:
                with self._lock:
                    self._idle += 1
