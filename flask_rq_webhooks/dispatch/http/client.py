"""The transport: :mod:`requests` adapters on a bounded pool of daemon threads.

Requests go through :meth:`requests.adapters.HTTPAdapter.send`, so that whatever intercepts it (such as the
package ``responses``) sees every delivery. Where the adapter would call urllib3's ``urlopen``, it calls
:class:`_Exchange`: judged addresses, a total deadline, strict parsing, and half the CPU.
"""

from __future__ import annotations

import contextlib
import logging
import queue
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
from .pool import ConnectionPool, PinnedConnection, default_ssl_context, verifying_context
from .wire_format import BODY_CAP, BoundedResponse, clean, head_of, request_bytes, wire_headers

logger = logging.getLogger(__name__)

#: Timeout of a socket as :mod:`requests` has it: none, the watchdog ends what takes too long.
_BY_WATCHDOG: Any = Timeout()
#: Characters of an error that are kept.
_MAX_DETAIL = 300


def open_transport(settings: Settings, policy: UrlPolicy, *, concurrency: int) -> RequestsTransport:
    """Return a transport as *settings* ask for, to be closed by the caller.

    :param concurrency: requests in flight at most.
    :raises ConfigurationError: when a file of certificates cannot be used.
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
    """Send through :mod:`requests` adapters on a bounded pool of daemon threads.

    :param policy: what may be reached.
    :param concurrency: requests in flight at most.
    :param proxy_url: egress proxy; it then decides about addresses, and may itself have a private one.
    :param resolver: ``(host, port) -> addresses``; may block and raise :exc:`OSError`. Called in a thread of
        its own, since a look-up cannot be given a deadline.
    :param ssl_context: instead of :func:`.default_ssl_context`; has to verify names.
    :param ca_file: PEM file of authorities that are believed beside the public ones.
    :param client_certs: files of certificate and key by host; shown to no other host.
    :param body_cap: bytes of a response body that are kept.
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
        self._threads = DaemonThreads("rq-webhooks-send", concurrency)
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

        :param wait: let requests in flight finish, which their deadlines bound. Otherwise they are aborted
            and end as ``internal``.
        """
        with self._close_lock:
            already, self._closed = self._closed, True
        if not already:
            self._threads.end()
        if not wait:
            self._watchdog.abort()
            self._lookups.abort()
        self._threads.join()
        if not already:
            self._watchdog.end()
            self._pool.close()
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
        except Failure as failure:
            outcome = {"error_code": failure.code, "error_detail": clean(failure.detail, _MAX_DETAIL)}
        except Exception:  # the future's promise: a fault of ours is a result too, and is logged
            logger.exception("Sending to %s failed with an unexpected error.", redact_url(request.url))
            outcome = {"error_code": "internal", "error_detail": "an error of the sender; see its log"}
        duration_ms = (time.monotonic() - started) * 1000
        future.set_result(AttemptResult(started_at=started_at, duration_ms=duration_ms, **outcome))

    def _attempt(self, request: AttemptRequest, started: float) -> dict[str, Any]:
        attempt = RunningAttempt(
            self._guard.check_url(request.url),
            deadline=started + request.timeout_s,
            connect_deadline=started + min(request.connect_timeout_s, request.timeout_s),
        )
        self._watchdog.watch(attempt)
        try:
            attempt.raise_if_aborted()
            response = self._adapter.send(_OutgoingRequest(attempt, request), timeout=_BY_WATCHDOG)
        except NETWORK_ERRORS as exc:  # only from what stands in for the adapter in tests
            raise failure_of(exc) from exc
        finally:
            self._watchdog.forget(attempt)
        return cast(_IncomingResponse, response).outcome


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
        vars(self.headers)["_store"] = self.wire_headers  # as it keeps them; filling it takes far longer
        self.body = request.body
        self.attempt = attempt


class _IncomingResponse(Response):
    """One response as :mod:`requests` sees it.

    :param outcome: the fields of :class:`.AttemptResult` that it fills.
    """

    def __init__(self, request: PreparedRequest, outcome: dict[str, Any]) -> None:
        # Not the base class's: its cookie jar costs as much as the rest of the adapter.
        self.request = request
        self.url = cast(str, request.url)
        self.status_code = outcome["status_code"]
        self.headers = outcome["response_headers"]
        self._content = outcome.get("response_body", b"")
        self._content_consumed = True
        self.encoding = self.raw = None
        self.reason = ""
        self.history = []
        self.outcome = outcome


class WebhookAdapter(HTTPAdapter):
    """A :mod:`requests` adapter whose requests travel over the connections of a :class:`.ConnectionPool`.

    :meth:`send` itself is not overridden: it is what ``responses`` replaces.

    :param body_cap: bytes of a response body that are kept.
    """

    def __init__(self, connections: ConnectionPool, body_cap: int) -> None:
        super().__init__(pool_connections=1, pool_maxsize=1)
        self._connections = connections
        self._body_cap = body_cap

    def get_connection_with_tls_context(self, request: PreparedRequest, *_args: Any, **_options: Any) -> Any:
        """Return what :meth:`send` calls ``urlopen`` on."""
        return _Exchange(cast(_OutgoingRequest, request), self._connections, self._body_cap)

    def cert_verify(self, *_args: Any, **_options: Any) -> None:
        """Change nothing: the pool's TLS context verifies certificates and names."""

    def request_url(self, *_args: Any, **_options: Any) -> str:
        """Return nothing of use: the exchange writes the request line itself."""
        return ""

    def build_response(self, req: PreparedRequest, resp: Any) -> Response:
        """Return the response to *req*.

        :param resp: what :class:`_Exchange` returned, or a urllib3 response of a package that intercepts
            requests.
        """
        if isinstance(resp, HTTPResponse):
            outcome = head_of(resp.status, resp.headers.items())
            if "error_code" not in outcome:
                outcome["response_body"] = resp.read(decode_content=False)[: self._body_cap]
        else:
            outcome = resp
        return _IncomingResponse(req, outcome)


class _Exchange:
    """One request and its response over one connection; in rare cases over a second one.

    :param body_cap: bytes of a response body that are kept.
    """

    def __init__(self, request: _OutgoingRequest, connections: ConnectionPool, body_cap: int) -> None:
        self._request = request
        self._attempt = request.attempt
        self._connections = connections
        self._body_cap = body_cap

    def urlopen(self, **_options: Any) -> dict[str, Any]:
        """Make the exchange; the options are those of :class:`_OutgoingRequest` once more.

        :returns: fields of :class:`.AttemptResult`.
        :raises Failure: when there is no response.
        """
        try:
            return self._make()
        except Failure as failure:
            if not self._attempt.may_repeat(failure):
                raise
        return self._make()

    def _make(self) -> dict[str, Any]:
        """Make the exchange once; translate everything that can go wrong on the way."""
        try:
            connection = self._connections.take(self._attempt)
            keep = False
            try:
                outcome, keep = self._converse(connection)
            finally:
                self._connections.give_back(connection, self._attempt, keep=keep)
        except NETWORK_ERRORS as exc:
            self._attempt.raise_if_aborted(exc)
            raise failure_of(exc) from exc
        # A socket shut down in mid-headers or mid-body can look like a short, valid response.
        self._attempt.raise_if_aborted()
        return outcome

    def _converse(self, connection: PinnedConnection) -> tuple[dict[str, Any], bool]:
        """Write the request and read the response; return it, and whether the connection may be kept."""
        proxy_headers = self._connections.forwarding_headers if connection.proxy_is_forwarding else None
        data = request_bytes(
            self._attempt.checked,
            self._request.wire_headers.values(),
            cast(bytes, self._request.body),
            proxy_headers,
        )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before
            connection.sock.sendall(data)
        response = BoundedResponse(connection.sock, self._attempt)
        response.read_head()
        outcome = head_of(response.status, response.headers.items())
        if "error_code" in outcome:
            return outcome, False
        # One byte more than is kept, so that a body of just that size is seen to have ended.
        body = response.read_body(self._body_cap + 1)
        outcome["response_body"] = body[: self._body_cap]
        connection.received += response.received
        return outcome, response.may_be_followed


class DaemonThreads:
    """Run tasks in at most *limit* daemon threads, started as needed.

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
        """Run *task* in a thread; tasks begin in the order in which they were given."""
        with self._lock:
            self._tasks.append(task)
            self._call()

    def end(self) -> None:
        """Let every thread end once the tasks given so far are done."""
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
        """Wake one thread for the next task; the lock is held.

        One at a time: a thread that takes a task wakes the next one before it begins. So short tasks are run
        by the few threads that are awake, without waking a thread for each, which costs more than such a
        task. With long tasks, all threads are soon awake.
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
            return  # all are busy; the first one free takes it
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
