"""Why an attempt came to nothing: one exception, and the coarse code it carries into the result.

Each transport translates what its own library raises; the codes and the wording they share stand here.
"""

from __future__ import annotations

import errno
import os


class Failure(Exception):  # noqa: N818  (never leaves this package)
    """An attempt failed for a known reason.

    Not an :exc:`OSError`, so that it passes through urllib3, requests and aiohttp as it is.

    :param code: one of :attr:`.contract.AttemptResult.error_code`'s.
    :param detail: for people; may hold what a receiver sent.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def deadline_passed() -> Failure:
    return Failure("timeout", "the total deadline passed")


def transport_closed() -> Failure:
    return Failure("internal", "the transport was closed")


def own_shortage(exc: OSError) -> Failure | None:
    """Return what to say if *exc* is about this machine, which has no file descriptors left."""
    if exc.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return Failure("internal", f"the sender is short of file descriptors: {os.strerror(exc.errno)}")


def innermost(exc: BaseException) -> str:
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
