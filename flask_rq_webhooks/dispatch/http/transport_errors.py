"""Why an attempt failed: one exception, and the coarse error code it carries into the result."""

from __future__ import annotations

import errno
import http.client
import os
import ssl

import requests
from urllib3 import exceptions as urllib3_errors


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


#: Everything an exchange may raise beside :exc:`Failure`.
NETWORK_ERRORS = (ProxyFailure, urllib3_errors.HTTPError, http.client.HTTPException, OSError)


def deadline_passed() -> Failure:
    """Return the failure of an attempt that ran out of time."""
    return Failure("timeout", "the total deadline passed")


def transport_closed() -> Failure:
    """Return the failure of an attempt that was aborted when the transport closed."""
    return Failure("internal", "the transport was closed")


def descriptor_shortage(exc: OSError) -> Failure | None:
    """Return a failure that names this machine if *exc* says it has no file descriptors left."""
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
    """Describe the innermost exception of a chain; those around it repeat the whole URL."""
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
