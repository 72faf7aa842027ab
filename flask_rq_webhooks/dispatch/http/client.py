"""The transport of :mod:`requests` adapters, on a bounded pool of threads. Needs nothing installed beside.

Pools and connections are the adapter's and urllib3's, with what TLS and proxies need; answers are read by
:mod:`http.client`. What requests and urllib3 build around one exchange (prepared request, retry plan, two
response objects, cookies) carries no promise of ours and costs twice as much as the exchange, so the request
goes from :mod:`.outgoing` straight to the connection.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import ssl
import threading
import time
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from typing import Any

from urllib3 import exceptions as urllib3_errors

from ...protocol.urls import UrlPolicy, redact_url
from . import keeping
from .address_guard import Destinations
from .answers import BODY_CAP, broken, failed, head_of
from .attempt import Attempt
from .contract import AttemptRequest, AttemptResult
from .deadline import Watchdog
from .dns import Lookups, Resolver, system_resolver
from .pool import PinnedAdapter, PinnedConnection, ProxyFailure
from .request_encoding import request_bytes
from .response_parser import Answer
from .threads import DaemonThreads
from .tls import verifying_context
from .transport_errors import Failure, innermost

logger = logging.getLogger(__name__)


class RequestsTransport:
    """Send through :mod:`requests` adapters on a bounded pool of daemon threads.

    :param policy: what may be reached.
    :param concurrency: requests in flight at most.
    :param proxy_url: egress proxy; it then decides about addresses, and may itself have a private one.
    :param resolver: ``(host, port) -> addresses``; may block and raise :exc:`OSError`. Called in a thread of
        its own, since a look-up cannot be given a deadline.
    :param ssl_context: instead of :func:`.default_ssl_context`; has to verify names.
    :param ca_file: PEM bundle for :func:`.default_ssl_context`.
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
        self._body_cap = body_cap
        self._destinations = Destinations(policy)
        context = verifying_context(ssl_context, ca_file)
        self._adapter = PinnedAdapter(keeping.most_kept(concurrency), context, proxy_url)
        self._lookups = Lookups(resolver, limit=max(8, 2 * concurrency))
        self._watchdog = Watchdog(on_idle=self._adapter.close_idle)
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

        :param wait: let requests under way end by themselves, which their deadlines bound. Otherwise they
            are broken off and end as ``internal``.
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
            outcome = failed(failure)
        except Exception:  # the future's promise: a fault of ours is a result too, and is logged
            logger.exception("Sending to %s failed in an unforeseen way.", redact_url(request.url))
            outcome = broken()
        duration_ms = (time.monotonic() - started) * 1000
        future.set_result(AttemptResult(started_at=started_at, duration_ms=duration_ms, **outcome))

    def _attempt(self, request: AttemptRequest, started: float) -> dict[str, Any]:
        checked = self._destinations.check_url(request.url)
        attempt = Attempt(
            checked=checked,
            destinations=self._destinations,
            lookups=self._lookups,
            deadline=started + request.timeout_s,
            connect_deadline=started + min(request.connect_timeout_s, request.timeout_s),
        )
        self._watchdog.watch(attempt)
        try:
            attempt.raise_if_fired()
            try:
                return self._exchange(attempt, request)
            except Failure as failure:
                if not attempt.may_repeat(failure):
                    raise
            return self._exchange(attempt, request)
        finally:
            self._watchdog.forget(attempt)

    def _exchange(self, attempt: Attempt, request: AttemptRequest) -> dict[str, Any]:
        """Make the request once; translate everything that can go wrong on the way."""
        try:
            connection = self._adapter.take(attempt)
            keep = False
            try:
                outcome, keep = self._converse(attempt, request, connection)
            finally:
                self._adapter.give_back(connection, attempt, keep=keep)
        except Failure:
            raise
        except (ProxyFailure, urllib3_errors.HTTPError, http.client.HTTPException, OSError) as exc:
            attempt.raise_if_fired(exc)
            raise _failure(exc) from exc
        # A socket shut down in mid-headers or mid-body can look like a short, valid response.
        attempt.raise_if_fired()
        return outcome

    def _converse(
        self, attempt: Attempt, request: AttemptRequest, connection: PinnedConnection
    ) -> tuple[dict[str, Any], bool]:
        """Write the request and read the answer; return it, and whether the connection may be kept."""
        proxy_headers = self._adapter.forwarding_headers if connection.proxy_is_forwarding else None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before
            connection.sock.sendall(request_bytes(attempt.checked, request, proxy_headers))
        with Answer(connection.sock, attempt) as answer:
            answer.begin()
            raw_headers = ((n.encode("latin-1"), v.encode("latin-1")) for n, v in answer.headers.items())
            outcome = head_of(answer.status, raw_headers)
            if "error_code" in outcome:
                return outcome, False
            # One byte more than is kept, so that a body of just that size is seen to have ended.
            body = answer.read_body(self._body_cap + 1)
            outcome["response_body"] = body[: self._body_cap]
            return outcome, answer.may_be_followed


def _failure(exc: BaseException) -> Failure:
    """Return the coarse code for an error of urllib3, http.client or the socket."""
    detail = innermost(exc)
    if isinstance(exc, ssl.SSLError | urllib3_errors.SSLError):
        return Failure("tls", detail)
    if isinstance(exc, ProxyFailure):
        return Failure("connect", f"proxy: {detail}")
    if isinstance(exc, TimeoutError):
        return Failure("timeout", detail)
    return Failure("reset", detail)
