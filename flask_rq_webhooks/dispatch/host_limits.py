"""Limits per host: requests in flight (:class:`InFlight`) and requests per minute (:class:`RateLimiter`).

A thousand hanging host names of one stranger must not delay other hosts (SECURITY 24), not even hosts that
are merely new. The share of a host depends on those of its attempts that this process knows of:

======== =================================================================== ================================
proven   the latest attempt succeeded                                        all places
failing  the latest attempt failed, an earlier one succeeded                 half of the places
unproven none succeeded; one failed or has been in flight for over a second  a quarter, within that half
new      no result is known                                                  a separate quarter within that
                                                                             half; the whole half while no
                                                                             host fails or hangs
======== =================================================================== ================================

Requests per minute are counted in Redis for all dispatchers together. While Redis does not answer, there is
no such limit: neither a delivery nor the calling thread waits for Redis.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from limits import RateLimitItemPerMinute
from limits.storage import RedisStorage
from limits.strategies import FixedWindowRateLimiter
from redis import ConnectionPool, Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..storage.claims import ClaimedDelivery
from .http import AttemptResult

logger = logging.getLogger(__name__)

#: What is known about a host; see above.
PROVEN, FAILING, UNPROVEN, NEW = "proven", "failing", "unproven", "new"
#: Shares of the places.
FAILING_SHARE, UNPROVEN_SHARE = 0.5, 0.25
#: Seconds after which a request without an answer makes its host unproven.
HANGING_S = 1.0
#: Seconds for which a failure of a host that never succeeded limits new hosts.
DOUBT_S = 60.0
#: Shortest and longest time for which a delivery beyond the share is deferred, seconds.
SHORTEST_HOLD_S, LONGEST_HOLD_S = 0.05, 60.0
#: Maximum number of hosts remembered: this many that succeeded once, and as many that never did.
MOST_HOSTS = 50_000


class HostRecords:
    """How the latest attempt to each host ended, and whether one ever succeeded, as far as known."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, str] = {}
        self._unproven: dict[str, None] = {}  # separate, so that a stranger's names do not evict others
        #: Average duration of an attempt to a host that is not proven, seconds.
        self.unproven_s = 0.25
        #: When the latest attempt to an unproven host failed (monotonic).
        self.failed_at = float("-inf")
        self.restored = False

    def restore(self, latest: Mapping[str, bool]) -> None:
        """Load what SQL knows, so that a restart forgets nothing.

        :param latest: hosts to which an attempt succeeded, each with whether the latest attempt did.
        """
        with self._lock:
            known = {host: PROVEN if succeeded else FAILING for host, succeeded in latest.items()}
            self._kinds = known | self._kinds
            self.restored = True

    def kind(self, host: str) -> str:
        """Return what is known about *host*."""
        return self._kinds.get(host) or (UNPROVEN if host in self._unproven else NEW)

    def note(self, host: str, result: AttemptResult) -> None:
        """Note the result of an attempt; may be called from any thread."""
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
    """Deliveries handed to the transport whose results have not arrived yet, counted by host.

    Used from the threads of the sender and of the transport.

    :param hosts: what is known about each host.
    :param concurrency: number of places, that is, of requests in flight at once.
    """

    def __init__(self, hosts: HostRecords, concurrency: int) -> None:
        self._hosts = hosts
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._deliveries: dict[tuple[str, str], ClaimedDelivery] = {}
        #: Deliveries to hosts that are not proven: what was known about the host, and the start time.
        self._doubtful: dict[tuple[str, str], tuple[str, float]] = {}
        self._per_host: Counter[str] = Counter()
        #: Places reserved for deliveries that are being stored, by host; they count as taken.
        self._kept: Counter[str] = Counter()
        #: Whether a host is in trouble: it hangs, it failed lately, or it is failing.
        self.is_doubtful = False
        #: Results that arrived since the start.
        self.answered = 0

    def __len__(self) -> int:
        return len(self._deliveries)

    @property
    def places_taken(self) -> int:
        """Return how many deliveries are in flight or have a reserved place."""
        return len(self._deliveries) + self._kept.total()

    def per_host(self) -> dict[str, int]:
        """Return the count by host, without hosts that have none; reserved places count as well."""
        with self._lock:
            return dict(self._per_host + self._kept)

    def keep_place(self, host: str, *, most: int) -> bool:
        """Reserve a place for a request to *host*, unless it has *most* already; see :meth:`free_places`."""
        with self._lock:
            if self._per_host[host] + self._kept[host] >= most:
                return False
            self._kept[host] += 1
            return True

    def free_places(self, hosts: Iterable[str]) -> None:
        """Free the places that were reserved for *hosts*, one for each."""
        with self._lock:
            self._kept -= Counter(hosts)

    def deliveries(self) -> list[ClaimedDelivery]:
        """Return all deliveries in flight."""
        with self._lock:
            return list(self._deliveries.values())

    def has_place(self, host: str) -> bool:
        """Return whether one more request may go to *host*."""
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
        """Return how many are in flight to new and to unproven hosts; update :attr:`is_doubtful`."""
        now = time.monotonic()
        with self._lock:
            new = sum(kind == NEW and now - since < HANGING_S for kind, since in self._doubtful.values())
            failing = sum(kind == FAILING for kind, _since in self._doubtful.values())
            unproven = len(self._doubtful) - new - failing
        self.is_doubtful = failing + unproven > 0 or now - self._hosts.failed_at < DOUBT_S
        return new, unproven

    def hold_s(self, waiting: int) -> float:
        """Return for how many seconds to defer *waiting* deliveries that have no place."""
        if not self.is_doubtful:
            return SHORTEST_HOLD_S
        needed_s = waiting / self._places(UNPROVEN_SHARE) * self._hosts.unproven_s
        return min(max(needed_s, SHORTEST_HOLD_S), LONGEST_HOLD_S)

    def add(self, delivery: ClaimedDelivery) -> None:
        """Add *delivery*, and remember what is known about its host now until :meth:`remove`."""
        kind = self._hosts.kind(delivery.host)
        with self._lock:
            if kind != PROVEN:
                self._doubtful[delivery.id, delivery.lease_id] = kind, time.monotonic()
            self._deliveries[delivery.id, delivery.lease_id] = delivery
            self._per_host[delivery.host] += 1

    def remove(self, delivery: ClaimedDelivery, *, answered: bool) -> None:
        """Remove *delivery*.

        :param answered: whether its result arrived; otherwise it was taken back.
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


# -- requests per minute ----------------------------------------------------------------------------------

#: Seconds one call to Redis may take.
ANSWER_S = 0.25
#: Seconds after a failure in which Redis is not called.
PAUSE_S = 5.0
#: A large limit is counted in this many blocks: Redis is called at most once per block, window and host.
BLOCKS = 100
#: With more hosts than this that have requests counted in advance, those whose window ended are forgotten.
MAX_AHEAD = 1000


class RateLimiter:
    """Limit the requests per host and minute (fixed windows, with the ``limits`` package).

    Limits of :data:`BLOCKS` or more are counted in blocks of one hundredth; a dispatcher may leave part of a
    block unused at the end of a window. The limit is never exceeded; at most one per cent of it is lost.

    :param redis: client of the server to use. We open our own connections, because the sender needs shorter
        timeouts.
    :param per_minute: requests per host and minute; 0 for no limit.
    :param namespace: separates the counts of apps that share one Redis.
    :param clock: returns unix seconds.
    """

    def __init__(
        self,
        redis: Redis,
        per_minute: int,
        *,
        namespace: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._namespace = namespace
        self._item = RateLimitItemPerMinute(per_minute) if per_minute else None
        self._pool = _impatient_pool(redis)
        self._own_pool = self._pool is not redis.connection_pool
        self._limiter: FixedWindowRateLimiter | None = None
        self._full_until: dict[str, float] = {}
        self._block = max(1, per_minute // BLOCKS)
        #: Host → requests counted but not yet made, and the end of their window.
        self._ahead: dict[str, tuple[int, float]] = {}
        self._silent_until = 0.0

    def wait_s(self, host: str) -> float:
        """Count one request to *host* and return 0; at the limit, return the seconds until the next window.

        :param host: in the form of :attr:`CheckedURL.host_key`.
        """
        if self._item is None:
            return 0.0
        now = self._clock()
        full_until = self._full_until.get(host)
        if full_until is not None:
            if now < full_until:
                return full_until - now
            del self._full_until[host]
        left, until = self._ahead.get(host, (0, 0.0))
        if left and now < until:
            self._ahead[host] = left - 1, until
            return 0.0
        if now < self._silent_until:
            return 0.0
        try:
            return self._ask(self._item, host)
        except (RedisError, OSError) as exc:
            self._silent_until = now + PAUSE_S
            logger.warning(
                "The rate limit cannot be counted in Redis (%s: %s); sending without it for %.0f s.",
                type(exc).__name__, exc, PAUSE_S,
            )  # fmt: skip
            return 0.0

    def full_hosts(self) -> dict[str, float]:
        """Return the hosts known to have used up their requests of this window, with the seconds left."""
        now = self._clock()
        self._full_until = {host: until for host, until in self._full_until.items() if until > now}
        if len(self._ahead) > MAX_AHEAD:
            self._ahead = {host: block for host, block in self._ahead.items() if block[1] > now}
        return {host: until - now for host, until in self._full_until.items()}

    def close(self) -> None:
        """Close the connections, if they are not shared."""
        if self._own_pool:
            self._pool.disconnect()

    def _ask(self, item: RateLimitItemPerMinute, host: str) -> float:
        if self._limiter is None:
            # Created on first use: this registers a script, and Redis may have been down until now.
            storage = RedisStorage("redis://", connection_pool=self._pool, key_prefix="rq_webhooks:limits")
            self._limiter = FixedWindowRateLimiter(storage)
        if self._limiter.hit(item, self._namespace, host, cost=self._block):
            if self._block > 1:
                _left, until = self._ahead.get(host, (0, 0.0))
                if until <= self._clock():  # the first block of a window
                    until = self._limiter.get_window_stats(item, self._namespace, host).reset_time
                self._ahead[host] = self._block - 1, until
            return 0.0
        self._ahead.pop(host, None)
        window = self._limiter.get_window_stats(item, self._namespace, host)
        self._full_until[host] = max(window.reset_time, self._clock() + 0.05)
        return self._full_until[host] - self._clock()


def _impatient_pool(redis: Redis) -> ConnectionPool:
    """Return a pool for the same server whose connections time out quickly and never retry.

    A pool of any other class (Sentinel finds its server by itself) is shared as it is.
    """
    pool = redis.connection_pool
    if type(pool) is not ConnectionPool:
        return pool
    return ConnectionPool(
        connection_class=pool.connection_class,
        **{
            **pool.connection_kwargs,
            "socket_timeout": ANSWER_S,
            "socket_connect_timeout": ANSWER_S,
            "retry": Retry(NoBackoff(), 0),
        },
    )
