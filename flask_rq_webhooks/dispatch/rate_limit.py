"""How often a host may be called per minute, counted in Redis for all dispatchers together.

While Redis does not answer, there is no limit: neither a delivery nor the calling thread waits for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from limits import RateLimitItemPerMinute
from limits.storage import RedisStorage
from limits.strategies import FixedWindowRateLimiter
from redis import ConnectionPool, Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

logger = logging.getLogger(__name__)

#: Seconds one call to Redis may take.
ANSWER_S = 0.25
#: Seconds after a failure in which Redis is not called.
PAUSE_S = 5.0
#: A large limit is counted in this many blocks: Redis is called at most once per block, window and host.
BLOCKS = 100
#: Hosts with requests counted in advance; above this number, those whose window has ended are forgotten.
MAX_AHEAD = 1000


class RateLimiter:
    """Allow a number of requests per host and minute (fixed windows, the ``limits`` package).

    Limits of :data:`BLOCKS` and more are counted in blocks of one hundredth, of which a dispatcher may leave
    a part unused at the end of a window. The limit is never exceeded; at most one per cent of it is lost.

    :param redis: client of the server to use. Connections are our own, because the sender needs shorter
        timeouts.
    :param per_minute: requests per host and minute; 0 for no limit.
    :param namespace: keeps apart the counts of two apps on one Redis.
    :param clock: unix seconds.
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
        """Count one request to *host* and return 0, or how many seconds are left until the next window.

        :param host: as :attr:`CheckedURL.host_key` has it.
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
        """Return the hosts known to have had their requests of this window, with the seconds left."""
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
            # Built on first use: a script is registered there, and Redis may be down until now.
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
    """Return a pool to the same server whose connections give up soon and never try again.

    A pool that is not a plain one (Sentinel finds its server by itself) is shared as it is.
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
