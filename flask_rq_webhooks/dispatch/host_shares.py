"""How hosts share the places: which host may have one more request in flight.

A stranger's thousand names that hang must not make others wait (SECURITY 24), and hosts that are merely new
must not wait for a stranger. What a host has a part in depends on its attempts as this process knows them:

======== =================================================================== ================================
proven   the latest attempt succeeded                                        all places
failing  the latest attempt failed, an earlier one succeeded                 half of the places
unproven none succeeded; one failed, or is in flight for more than a second a quarter, within that half
new      no result is known                                                  a quarter of its own, within that
                                                                             half; all of it while no
                                                                             host fails or hangs
======== =================================================================== ================================
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..storage.claims import ClaimedDelivery
from .http import AttemptResult

#: What is known of a host; see above.
PROVEN, FAILING, UNPROVEN, NEW = "proven", "failing", "unproven", "new"
#: Shares of the places.
FAILING_SHARE, UNPROVEN_SHARE = 0.5, 0.25
#: Seconds after which a request without an answer makes its host unproven.
HANGING_S = 1.0
#: Seconds for which a failure of a host that never succeeded limits those that are new.
DOUBT_S = 60.0
#: Seconds for which a delivery beyond the share is put off.
SHORTEST_HOLD_S, LONGEST_HOLD_S = 0.05, 60.0
#: Hosts that are remembered: those that succeeded once, and as many that never did.
MOST_HOSTS = 50_000


class HostRecords:
    """How the latest attempt to each host ended, and whether one ever succeeded, as far as it is known."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, str] = {}
        self._unproven: dict[str, None] = {}  # apart, so that a stranger's names do not evict others
        #: Seconds that an attempt to a host takes which is not proven, on average.
        self.unproven_s = 0.25
        #: When the latest attempt to an unproven host failed (monotonic).
        self.failed_at = float("-inf")
        self.restored = False

    def restore(self, latest: Mapping[str, bool]) -> None:
        """Take what SQL knows, so that a restart forgets nothing.

        :param latest: hosts to which an attempt succeeded, with whether the latest one did.
        """
        with self._lock:
            known = {host: PROVEN if succeeded else FAILING for host, succeeded in latest.items()}
            self._kinds = known | self._kinds
            self.restored = True

    def kind(self, host: str) -> str:
        """Return what is known of *host*."""
        return self._kinds.get(host) or (UNPROVEN if host in self._unproven else NEW)

    def note(self, host: str, result: AttemptResult) -> None:
        """Take the result of an attempt, from any thread."""
        with self._lock:
            if self._kinds.get(host) != PROVEN:
                self.unproven_s += (result.duration_ms / 1000 - self.unproven_s) / 8
            if result.error_code is None and result.status_code is not None and result.status_code < 300:
                self._unproven.pop(host, None)
                _put(self._kinds, host, PROVEN)
            elif host in self._kinds:
                self._kinds[host] = FAILING
            else:
                _put(self._unproven, host, None)
                self.failed_at = time.monotonic()


def _put(hosts: dict[str, Any], host: str, value: Any) -> None:
    hosts.pop(host, None)  # so that the oldest come first
    hosts[host] = value
    if len(hosts) > MOST_HOSTS:
        del hosts[next(iter(hosts))]


class InFlight:
    """Deliveries given to the transport whose results are still to come, counted by host.

    Used from the sender's thread and from the transport's.

    :param hosts: says what is known of a host.
    :param concurrency: places, that is requests in flight at once.
    """

    def __init__(self, hosts: HostRecords, concurrency: int) -> None:
        self._hosts = hosts
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._deliveries: dict[tuple[str, str], ClaimedDelivery] = {}
        #: Those to hosts that are not proven: what was known of the host, and since when it is in flight.
        self._doubtful: dict[tuple[str, str], tuple[str, float]] = {}
        self._per_host: Counter[str] = Counter()
        #: Whether a host is in trouble: it hangs, it failed lately, or it is failing.
        self.is_doubtful = False
        #: Results that arrived since the start.
        self.answered = 0

    def __len__(self) -> int:
        return len(self._deliveries)

    def per_host(self) -> dict[str, int]:
        """Return the count by host, without hosts that have none."""
        with self._lock:
            return dict(self._per_host)

    def deliveries(self) -> list[ClaimedDelivery]:
        """Return all of them."""
        with self._lock:
            return list(self._deliveries.values())

    def has_place(self, host: str) -> bool:
        """Say whether one more request may go to *host*."""
        kind = self._hosts.kind(host)
        if kind == PROVEN:
            return True
        new, unproven = self._count()
        if len(self._doubtful) >= self._places(FAILING_SHARE):
            return False
        if kind == NEW:
            return not self.is_doubtful or new < self._places(UNPROVEN_SHARE)
        return kind == FAILING or unproven < self._places(UNPROVEN_SHARE)

    def _count(self) -> tuple[int, int]:
        """Return how many are in flight to new and to unproven hosts; note whether a host is in trouble."""
        now = time.monotonic()
        with self._lock:
            new = sum(kind == NEW and now - since < HANGING_S for kind, since in self._doubtful.values())
            failing = sum(kind == FAILING for kind, _since in self._doubtful.values())
            unproven = len(self._doubtful) - new - failing
        self.is_doubtful = failing + unproven > 0 or now - self._hosts.failed_at < DOUBT_S
        return new, unproven

    def hold_s(self, waiting: int) -> float:
        """Return for how many seconds to put off *waiting* deliveries that have no place."""
        if not self.is_doubtful:
            return SHORTEST_HOLD_S
        needed_s = waiting / self._places(UNPROVEN_SHARE) * self._hosts.unproven_s
        return min(max(needed_s, SHORTEST_HOLD_S), LONGEST_HOLD_S)

    def add(self, delivery: ClaimedDelivery) -> None:
        """Count *delivery*, and keep what is known of its host until :meth:`remove`."""
        kind = self._hosts.kind(delivery.host)
        with self._lock:
            if kind != PROVEN:
                self._doubtful[delivery.id, delivery.lease_id] = kind, time.monotonic()
            self._deliveries[delivery.id, delivery.lease_id] = delivery
            self._per_host[delivery.host] += 1

    def remove(self, delivery: ClaimedDelivery, *, answered: bool) -> None:
        """Forget *delivery*.

        :param answered: its result arrived; otherwise it was taken back.
        """
        with self._lock:
            del self._deliveries[delivery.id, delivery.lease_id]
            self._doubtful.pop((delivery.id, delivery.lease_id), None)
            self.answered += answered
            left = self._per_host[delivery.host] - 1
            if left:
                self._per_host[delivery.host] = left
            else:
                del self._per_host[delivery.host]

    def _places(self, share: float) -> int:
        return max(1, int(self._concurrency * share))
