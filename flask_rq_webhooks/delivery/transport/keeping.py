"""How long a connection is kept for the next request to the same host, and what its end means."""

from __future__ import annotations

from .failures import Failure

#: A kept connection is closed after so long without use, and after so long in any case: an address that
#: was right is not used for ever.
MAX_IDLE_S = 30.0
MAX_AGE_S = 300.0
#: Connections kept at most, of all hosts together, unless more requests than that may travel at once.
MIN_KEPT = 32


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
