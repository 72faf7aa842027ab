"""How long a connection is kept for the next request to the same host."""

from __future__ import annotations

#: A kept connection is closed after so long without use, and after so long in any case: an address that
#: was right is not used for ever.
MAX_IDLE_S = 30.0
MAX_AGE_S = 300.0
#: Connections kept at most, of all hosts together, unless more requests than that may travel at once.
MIN_KEPT = 32


def is_old(*, opened_at: float, released_at: float, now: float) -> bool:
    """Say whether a kept connection should be closed instead of used; all on the monotonic clock."""
    return now - released_at > MAX_IDLE_S or now - opened_at > MAX_AGE_S
