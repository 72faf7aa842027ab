"""The contract between dispatcher and transport: the request, the result, and the transport's protocol.

A :class:`Failure` carries the coarse error code into the result. How requests are sent is not known here.
"""

from __future__ import annotations

import errno
import http.client
import os
import ssl
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import requests
from urllib3 import exceptions as urllib3_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRequest:
    """One HTTP request to be made.

    :param url: as stored; checked again before it is used.
    :param headers: the final headers, in order.
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
    """The result of one request.

    :param started_at: aware UTC.
    :param status_code: of the response, if a complete one arrived in time.
    :param error_code: ``None`` if the status says everything, else one of ``blocked``, ``dns``,
        ``connect``, ``tls``, ``timeout``, ``reset``, ``redirect``, ``internal``.
    :param error_detail: for people; never shown to the client.
    :param response_headers: the received :data:`~.wire_format.KEPT_HEADERS`, names in lower case, shortened.
    :param response_body: as received on the wire, at most the transport's cap.
    :param retry_after: the header as received; see :mod:`flask_rq_webhooks.storage.attempts`.
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
    """An object that sends requests."""

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        """Send *request* as soon as a slot is free.

        :returns: a future that never raises: errors are reported in the result.
        :raises RuntimeError: after :meth:`close`.
        """
        ...

    def close(self, *, wait: bool) -> None:
        """Accept no more requests.

        :param wait: let requests in progress finish, at their deadlines at the latest, instead of aborting
            them.
        """
        ...


# -- why there is no response -----------------------------------------------------------------------------


class Failure(Exception):  # noqa: N818  (never leaves this package)
    """An attempt failed for a known reason.

    Not an :exc:`OSError`, so that it passes through urllib3 and requests unchanged.

    :param code: one of the codes of :attr:`.contract.AttemptResult.error_code`.
    :param detail: for operators; may contain text from a receiver.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class ProxyFailure(Exception):  # noqa: N818  (never leaves this package)
    """The operator's own proxy could not be reached or refused the tunnel; the cause says why."""


#: Everything an exchange may raise besides :exc:`Failure`.
NETWORK_ERRORS = (ProxyFailure, urllib3_errors.HTTPError, http.client.HTTPException, OSError)


def deadline_passed() -> Failure:
    """Return the failure of an attempt that ran out of time."""
    return Failure("timeout", "the total deadline passed")


def transport_closed() -> Failure:
    """Return the failure of an attempt that was aborted when the transport closed."""
    return Failure("internal", "the transport was closed")


def descriptor_shortage(exc: OSError) -> Failure | None:
    """Return a failure that blames this machine, if *exc* says it has no file descriptors left."""
    if exc.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return Failure("internal", f"the sender is short of file descriptors: {os.strerror(exc.errno)}")


def failure_of(exc: BaseException) -> Failure:
    """Translate an error of requests, urllib3, http.client or the socket.

    Errors of requests itself come only from what replaces its adapter in tests, such as ``responses``.
    """
    detail = root_cause(exc)
    if isinstance(exc, ssl.SSLError | urllib3_errors.SSLError | requests.exceptions.SSLError):
        return Failure("tls", detail)
    if isinstance(exc, ProxyFailure):
        return Failure("connect", f"proxy: {detail}")
    if isinstance(exc, TimeoutError | requests.Timeout):
        return Failure("timeout", detail)
    if isinstance(exc, requests.ConnectionError):
        return Failure("connect", detail)
    return Failure("reset", detail)


def root_cause(exc: BaseException) -> str:
    """Describe the innermost exception of a chain; the outer ones repeat the whole URL."""
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
