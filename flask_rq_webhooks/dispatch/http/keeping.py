"""How long a connection is kept for the next request to the same host, and what its end means."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import resource

from .transport_errors import Failure

#: A kept connection is closed after so long without use, and after so long in any case: an address that
#: was right is not used for ever.
MAX_IDLE_S = 30.0
MAX_AGE_S = 300.0
#: Connections kept, of all hosts together, for each request that may travel at once: many hosts that are told
#: things in turn find theirs again. Opening one costs more than a request, with TLS many times as much.
KEPT_EACH = 4
#: One connection for so many files that this process may open; but this many in any case.
FILES_EACH = 8
MIN_KEPT = 32


def most_kept(concurrency: int) -> int:
    """Return how many connections are kept at most, of all hosts together."""
    return max(MIN_KEPT, min(KEPT_EACH * concurrency, _files() // FILES_EACH))


def _files() -> int:
    """Return how many files this process may have open."""
    if sys.platform == "win32":
        return 512  # of the C library
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def is_old(*, opened_at: float, released_at: float, now: float) -> bool:
    """Say whether a kept connection should be closed instead of used; all on the monotonic clock."""
    return now - released_at > MAX_IDLE_S or now - opened_at > MAX_AGE_S


def is_blameless(failure: Failure, *, reused: bool, repeated: bool, answered: bool) -> bool:
    """Say whether a request may be made once more, on a new connection.

    The receiver closed an idle connection while it was written to: not its verdict on this request. Receivers
    tell repeats by ``webhook-id``.

    :param reused: the connection was kept from an earlier request.
    :param repeated: this is the repeat already.
    :param answered: any byte of an answer came.
    """
    return failure.code in ("reset", "tls") and reused and not repeated and not answered
