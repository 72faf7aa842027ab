"""A :mod:`requests` adapter whose connections are opened by the attempts that need them.

So every one of them leads to an address that was judged, knows its deadline, and is not kept too long.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
import weakref
from functools import lru_cache, partial
from typing import Any, cast

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ClosedPoolError
from urllib3.poolmanager import PoolManager, proxy_from_url

from ...protocol.urls import CheckedURL
from . import keeping
from .attempt import Attempt, Grip
from .failures import Failure


class _Pinned:
    """What both kinds of connection do beside urllib3: ask the attempt for a socket, and give it a grip."""

    attempt: Attempt | None = None
    grip: Grip | None = None
    opened_at = 0.0
    released_at = 0.0

    def _new_conn(self) -> socket.socket:
        if self.attempt is None:
            raise RuntimeError("A connection of this transport was used outside of it; nothing is checked.")
        connection = cast(HTTPConnection, self)
        self.opened_at = time.monotonic()
        sock = self.attempt.connect(
            connection._dns_host, connection.port, through_proxy=connection.proxy is not None
        )
        try:
            self.grip = Grip(sock)
            self.attempt.hold(self.grip, reused=False)
            sock.settimeout(self.attempt.left_s())
        except BaseException:
            self._drop_grip()
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Close the connection, if it is open."""
        self._drop_grip()
        super().close()  # type: ignore[misc]

    def is_old(self, now: float) -> bool:
        """Say whether it was kept for too long to be used again."""
        return keeping.is_old(opened_at=self.opened_at, released_at=self.released_at, now=now)

    def _drop_grip(self) -> None:
        if self.grip is not None:
            self.grip.close()
            self.grip = None


class PinnedHTTPConnection(_Pinned, HTTPConnection):
    """A plain connection."""


class PinnedHTTPSConnection(_Pinned, HTTPSConnection):
    """A connection over TLS."""


PinnedConnection = PinnedHTTPConnection | PinnedHTTPSConnection


class _Keeping:
    """What both kinds of pool do beside urllib3: hand connections to attempts, and drop old ones."""

    pool: queue.LifoQueue[PinnedConnection | None] | None

    def take(self, attempt: Attempt) -> PinnedConnection:
        """Return a connection for *attempt*, connected."""
        pool = cast(HTTPConnectionPool, self)
        connection = cast(PinnedConnection, pool._get_conn())
        try:
            connection.attempt = attempt
            if connection.sock is not None and connection.grip is not None:
                if attempt.wants_new_connection or connection.is_old(time.monotonic()):
                    connection.close()
                else:
                    attempt.hold(connection.grip, reused=True)
                    connection.sock.settimeout(attempt.left_s())
                    return connection
            if pool.proxy is not None and attempt.checked.scheme == "https":
                pool._prepare_proxy(cast(Any, connection))
            if connection.sock is None:
                connection.connect()
        except Exception as exc:
            by_proxy = connection.proxy is not None and not connection.has_connected_to_proxy
            self.give_back(connection, attempt, keep=False)
            if by_proxy and not isinstance(exc, Failure):
                raise ProxyFailure from exc
            raise
        return connection

    def give_back(self, connection: PinnedConnection, attempt: Attempt, *, keep: bool) -> None:
        """Take back what :meth:`take` gave.

        :param keep: the answer was read to its end, so that another request may follow.
        """
        attempt.let_go()
        connection.attempt = None
        connection.released_at = time.monotonic()
        if not keep:
            connection.close()
        cast(HTTPConnectionPool, self)._put_conn(connection)

    def close_idle(self) -> None:
        """Close connections nobody has used for long."""
        now = time.monotonic()
        looked_at = []
        while (pool := self.pool) is not None:
            try:
                connection = pool.get(block=False)
            except queue.Empty:
                break
            if connection is not None and connection.sock is not None and connection.is_old(now):
                connection.close()
            looked_at.append(connection)
        for connection in reversed(looked_at):
            cast(HTTPConnectionPool, self)._put_conn(connection)


class ProxyFailure(Exception):  # noqa: N818  (never leaves this package)
    """The operator's own proxy could not be reached, or would not open a tunnel; the cause says why."""


class PinnedHTTPPool(_Keeping, HTTPConnectionPool):
    """Plain connections to one host."""

    ConnectionCls = PinnedHTTPConnection


class PinnedHTTPSPool(_Keeping, HTTPSConnectionPool):
    """Connections over TLS to one host."""

    ConnectionCls = PinnedHTTPSConnection


PinnedPool = PinnedHTTPPool | PinnedHTTPSPool


class PinnedAdapter(HTTPAdapter):
    """An adapter all of whose pools and connections are ours.

    Requests do not go through :meth:`send`, which would build and parse far more than is needed, but from
    :meth:`take` straight to the connection.

    :param concurrency: connections that are kept at most, per host.
    :param proxy_url: what every connection goes through.
    """

    def __init__(self, concurrency: int, ssl_context: ssl.SSLContext, proxy_url: str | None) -> None:
        self._ssl_context = ssl_context
        self._sizes = {"num_pools": max(32, concurrency), "maxsize": concurrency}
        self._pools: weakref.WeakSet[PinnedPool] = weakref.WeakSet()
        self._pools_lock = threading.Lock()
        super().__init__(pool_connections=self._sizes["num_pools"], pool_maxsize=concurrency)
        self._manager = cast(
            PoolManager, self.proxy_manager_for(proxy_url) if proxy_url else self.poolmanager
        )
        self._pool_key = lru_cache(maxsize=256)(self._make_pool_key)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._ssl_context, **options)
        self._pin(cast(PoolManager, self.poolmanager))

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy not in self.proxy_manager:
            manager = proxy_from_url(
                proxy,
                proxy_headers=self.proxy_headers(proxy),
                **self._sizes,
                ssl_context=self._ssl_context,
                proxy_ssl_context=self._ssl_context,
                **options,
            )
            self._pin(manager)
            self.proxy_manager[proxy] = manager
        return self.proxy_manager[proxy]

    def take(self, attempt: Attempt) -> tuple[PinnedPool, PinnedConnection]:
        """Return a connection for *attempt*, and the pool to give it back to.

        :raises Failure: when there is none to be had, for one of many reasons.
        :raises ProxyFailure: when it is the proxy's fault.
        """
        while True:
            pool = self._pool(attempt.checked)
            try:
                return pool, pool.take(attempt)
            except ClosedPoolError:  # so many hosts that this one's pool was dropped just now
                continue

    def _pool(self, checked: CheckedURL) -> PinnedPool:
        if self._manager is not self.poolmanager:
            return cast(
                PinnedPool, self._manager.connection_from_host(checked.host, checked.port, checked.scheme)
            )
        key, context = self._pool_key(checked.scheme, checked.host, checked.port)
        return cast(PinnedPool, self._manager.connection_from_pool_key(key, dict(context)))

    def _make_pool_key(self, scheme: str, host: str, port: int) -> tuple[Any, dict[str, Any]]:
        context = {**self._manager.connection_pool_kw, "scheme": scheme, "host": host, "port": port}
        return self._manager.key_fn_by_scheme[scheme](dict(context)), context

    def close_idle(self) -> None:
        """Close kept connections that nobody has used for long."""
        with self._pools_lock:
            pools = list(self._pools)
        for pool in pools:
            pool.close_idle()

    def close(self) -> None:
        """Close every kept connection now; urllib3 leaves it to the garbage collector."""
        with self._pools_lock:
            pools = list(self._pools)
        for pool in pools:
            pool.close()
        super().close()

    def _pin(self, manager: PoolManager) -> None:
        # Replaced, not changed: urllib3 shares the original mapping among all managers of the process.
        manager.pool_classes_by_scheme = cast(
            Any,
            {
                "http": partial(self._new_pool, PinnedHTTPPool),
                "https": partial(self._new_pool, PinnedHTTPSPool),
            },
        )

    def _new_pool(self, pool_class: Any, *args: Any, **options: Any) -> PinnedPool:
        pool = cast(PinnedPool, pool_class(*args, **options))
        with self._pools_lock:
            self._pools.add(pool)
        return pool
