"""A :mod:`requests` adapter all of whose connections go through the attempt that needs them.

So every one of them is opened to an address that was judged, knows its deadline, and is not kept too long.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.poolmanager import PoolManager, proxy_from_url

from . import keeping
from .attempt import current_attempt
from .heads import Response


def _connect(connection: HTTPConnection) -> socket.socket:
    return current_attempt().connect(
        connection._dns_host,
        connection.port,
        through_proxy=connection.proxy is not None,
    )


class PinnedHTTPConnection(HTTPConnection):
    response_class = Response
    opened_at = 0.0
    released_at = 0.0

    def _new_conn(self) -> socket.socket:
        self.opened_at = time.monotonic()
        return _connect(self)


class _PinnedHTTPSConnection(HTTPSConnection):
    response_class = Response
    opened_at = 0.0
    released_at = 0.0

    def _new_conn(self) -> socket.socket:
        self.opened_at = time.monotonic()
        return _connect(self)


class _Keeping:
    """What both kinds of pool do beside urllib3: tell the attempt of a kept connection, and drop old ones."""

    pool: queue.LifoQueue[Any] | None
    close: Callable[[], None]

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)  # type: ignore[misc]
        if connection.sock is not None:
            attempt = current_attempt()
            if attempt.wants_new_connection or _is_old(connection, time.monotonic()):
                connection.close()
            else:
                attempt.hold(connection.sock, reused=True)
        return connection

    def _put_conn(self, connection: Any) -> None:
        if connection is not None:
            connection.released_at = time.monotonic()
        super()._put_conn(connection)  # type: ignore[misc]

    def close_idle(self) -> None:
        """Close connections nobody has used for long."""
        now = time.monotonic()
        kept = []
        while (pool := self.pool) is not None:
            try:
                connection = pool.get(block=False)
            except queue.Empty:
                break
            if connection is not None and connection.sock is not None and _is_old(connection, now):
                connection.close()
            kept.append(connection)
        for connection in reversed(kept):
            super()._put_conn(connection)  # type: ignore[misc]


def _is_old(connection: PinnedHTTPConnection | _PinnedHTTPSConnection, now: float) -> bool:
    return keeping.is_old(opened_at=connection.opened_at, released_at=connection.released_at, now=now)


class _PinnedHTTPPool(_Keeping, HTTPConnectionPool):
    ConnectionCls = PinnedHTTPConnection


class _PinnedHTTPSPool(_Keeping, HTTPSConnectionPool):
    ConnectionCls = _PinnedHTTPSConnection


class PinnedAdapter(HTTPAdapter):
    """An adapter all of whose connections are pinned, and which keeps no cookies."""

    def __init__(self, concurrency: int, ssl_context: ssl.SSLContext) -> None:
        self._ssl_context = ssl_context
        self._sizes = {"num_pools": max(32, concurrency), "maxsize": concurrency}
        self._pools: weakref.WeakSet[_Keeping] = weakref.WeakSet()
        self._pools_lock = threading.Lock()
        super().__init__(pool_connections=self._sizes["num_pools"], pool_maxsize=concurrency)

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

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave verification to the context; the inherited method would load a bundle per connection."""

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """Return the bare response; the inherited method parses the receiver's cookies."""
        response = requests.Response()
        response.status_code = resp.status
        response.raw = resp
        return response

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
                "http": partial(self._new_pool, _PinnedHTTPPool),
                "https": partial(self._new_pool, _PinnedHTTPSPool),
            },
        )

    def _new_pool(self, pool_class: Any, *args: Any, **options: Any) -> _Keeping:
        pool = cast(_Keeping, pool_class(*args, **options))
        with self._pools_lock:
            self._pools.add(pool)
        return pool
