"""The transport of :mod:`requests` adapters, on a bounded pool of threads. Needs nothing installed beside."""

from __future__ import annotations

import http.client
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import requests
from urllib3 import HTTPResponse
from urllib3 import exceptions as urllib3_errors

from ...protocol.urls import CheckedURL, UrlPolicy, redact_url
from .answers import BODY_CAP, broken, failed, head_of
from .attempt import Attempt, attempt_of_this_thread, set_attempt_of_this_thread
from .contract import AttemptRequest, AttemptResult
from .destinations import Destinations
from .failures import Failure, innermost
from .lookups import Lookups, Resolver, system_resolver
from .outgoing import wire_headers
from .pinned import PinnedAdapter
from .threads import DaemonThreads
from .tls import default_ssl_context
from .watchdog import Watchdog

logger = logging.getLogger(__name__)


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
        self._body_cap = body_cap
        self._proxies = {"http": proxy_url, "https": proxy_url} if proxy_url else None
        self._destinations = Destinations(policy)
        self._adapter = PinnedAdapter(concurrency, ssl_context or default_ssl_context(ca_file))
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
        prepared = _prepare(checked, request)
        self._watchdog.watch(attempt)
        set_attempt_of_this_thread(attempt)
        try:
            attempt.raise_if_fired()
            try:
                return self._exchange(attempt, prepared)
            except Failure as failure:
                if failure.code not in ("reset", "tls") or not attempt.may_repeat():
                    raise
            # The receiver closed an idle connection while we were writing to it: not its verdict on this
            # request. Receivers tell repeats by webhook-id, so one more try on a new connection is safe.
            return self._exchange(attempt, prepared)
        finally:
            set_attempt_of_this_thread(None)
            self._watchdog.forget(attempt)
            attempt.finish()

    def _exchange(self, attempt: Attempt, prepared: requests.PreparedRequest) -> dict[str, Any]:
        """Make the request once; translate everything that can go wrong on the way."""
        timeout = max(attempt.deadline - time.monotonic(), 0.001)
        raw: HTTPResponse | None = None
        try:
            raw = self._adapter.send(prepared, stream=True, timeout=timeout, proxies=self._proxies).raw
            outcome = self._read(raw)
        except Failure:
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
        outcome = head_of(raw.status, _raw_headers(raw))
        if "error_code" in outcome:
            raw.close()
            return outcome
        body = b""
        # One byte more than is kept, so that a body of just that size is seen to have ended.
        while chunk := raw.read(self._body_cap + 1 - len(body), decode_content=False):
            body += chunk
            if len(body) > self._body_cap:
                break
        return outcome | {"response_body": body[: self._body_cap]}


def _prepare(checked: CheckedURL, request: AttemptRequest) -> requests.PreparedRequest:
    prepared = requests.PreparedRequest()
    prepared.method = "POST"
    prepared.url = checked.url
    # The adapter only looks for Content-Length, as spelled there.
    prepared.headers = cast(Any, wire_headers(request))
    prepared.body = request.body
    return prepared


def _raw_headers(raw: HTTPResponse) -> Iterator[tuple[bytes, bytes]]:
    return ((name.encode("latin-1"), value.encode("latin-1")) for name, value in raw.headers.iteritems())


def _failure(exc: BaseException) -> Failure:
    """Return the coarse code for an error of requests, urllib3, http.client or the socket."""
    detail = innermost(exc)
    if isinstance(exc, requests.exceptions.SSLError | ssl.SSLError | urllib3_errors.SSLError):
        return Failure("tls", detail)
    if isinstance(exc, requests.exceptions.ProxyError | urllib3_errors.ProxyError):
        return Failure("connect", f"proxy: {detail}")
    if isinstance(exc, requests.exceptions.Timeout | urllib3_errors.TimeoutError | TimeoutError):
        return Failure("timeout", detail)
    if isinstance(exc, requests.exceptions.InvalidURL | requests.exceptions.InvalidHeader):
        return Failure("internal", detail)
    return Failure("reset", detail)


def _not_ours(_record: logging.LogRecord) -> bool:
    return attempt_of_this_thread() is None


# At DEBUG urllib3 logs whole URLs. Those of webhooks often hold a secret, so its lines about our requests
# are dropped; about everybody else's they stay.
for _name in ("urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_not_ours)
