"""A :mod:`requests` adapter whose connections are opened by the attempts that need them.

So every one of them leads to an address that was judged, knows its deadline, and is not kept too long. Those
that are kept are counted together, whatever host they lead to: urllib3's pools would count per host.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.poolmanager import PoolManager, ProxyManager, proxy_from_url

from . import keeping
from .attempt import Attempt, Grip
from .transport_errors import Failure

#: What connections have to have in common to stand in for each other: scheme, host, port.
_Key = tuple[str, str, int]


class _Pinned:
    """What both kinds of connection do beside urllib3: ask the attempt for a socket, and give it a grip."""

    attempt: Attempt | None = None
    grip: Grip | None = None
    key: _Key = ("", "", 0)
    opened_at = 0.0
    released_at = 0.0

    def _new_conn(self) -> socket.socket:
        if self.attempt is None:
            raise RuntimeError("A connection of this transport was used outside of it; nothing is checked.")
        connection = cast(HTTPConnection, self)
        self.opened_at = time.monotonic()
        sock, self.grip = self.attempt.connect(
            connection._dns_host, connection.port, through_proxy=connection.proxy is not None
        )
        sock.settimeout(self.attempt.left_s())
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


#: Destinations whose pools urllib3 remembers; one costs a few microseconds to make.
_POOLS = 256

PinnedConnection = PinnedHTTPConnection | PinnedHTTPSConnection


class KeptConnections:
    """Connections that are kept for the next request, of all hosts together.

    :param limit: so many at most; of more, the one that waited longest is closed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        #: All of them, and those of one key, in the order in which they were put here.
        self._all: dict[PinnedConnection, None] = {}
        self._by_key: dict[_Key, list[PinnedConnection]] = {}

    def take(self, key: _Key) -> PinnedConnection | None:
        """Return the one that was used last, if it is as it was then; it belongs to the caller."""
        while True:
            with self._lock:
                if key not in self._by_key:
                    return None
                connection = self._by_key[key][-1]
                self._remove(connection)
            if connection.is_old(time.monotonic()) or not connection.is_connected:
                connection.close()
            else:
                return connection

    def put(self, connection: PinnedConnection) -> None:
        """Keep *connection*, which nobody may use from here on."""
        dropped = None
        with self._lock:
            self._all[connection] = None
            self._by_key.setdefault(connection.key, []).append(connection)
            if len(self._all) > self._limit:
                dropped = next(iter(self._all))
                self._remove(dropped)
        if dropped is not None:
            dropped.close()

    def close_old(self) -> None:
        """Close those nobody has used for long."""
        now = time.monotonic()
        self._close([connection for connection in self._listed() if connection.is_old(now)])

    def close(self) -> None:
        """Close all."""
        self._close(self._listed())

    def _listed(self) -> list[PinnedConnection]:
        with self._lock:
            return list(self._all)

    def _close(self, connections: list[PinnedConnection]) -> None:
        for connection in connections:
            with self._lock:
                if connection not in self._all:  # somebody was faster
                    continue
                self._remove(connection)
            connection.close()

    def _remove(self, connection: PinnedConnection) -> None:
        del self._all[connection]
        same = self._by_key[connection.key]
        if same[-1] is connection:
            same.pop()
        else:
            same.remove(connection)
        if not same:
            del self._by_key[connection.key]


class ProxyFailure(Exception):  # noqa: N818  (never leaves this package)
    """The operator's own proxy could not be reached, or would not open a tunnel; the cause says why."""


class PinnedHTTPPool(HTTPConnectionPool):
    """What makes plain connections to one host."""

    ConnectionCls = PinnedHTTPConnection


class PinnedHTTPSPool(HTTPSConnectionPool):
    """What makes connections over TLS to one host."""

    ConnectionCls = PinnedHTTPSConnection


class PinnedAdapter(HTTPAdapter):
    """An adapter all of whose pools and connections are ours.

    Requests do not go through :meth:`send`, which would build and parse far more than is needed, but from
    :meth:`take` straight to the connection. The pools know how to make connections, and keep none.

    :param keep: connections that are kept at most, of all hosts together.
    :param proxy_url: what every connection goes through.
    """

    def __init__(self, keep: int, ssl_context: ssl.SSLContext, proxy_url: str | None) -> None:
        self._ssl_context = ssl_context
        self._kept = KeptConnections(keep)
        super().__init__(pool_connections=_POOLS, pool_maxsize=1)
        self._manager = cast(
            PoolManager, self.proxy_manager_for(proxy_url) if proxy_url else self.poolmanager
        )
        #: What the proxy is told with a request that it has to pass on.
        self.forwarding_headers: Mapping[str, str] = (
            self._manager.proxy_headers if isinstance(self._manager, ProxyManager) else {}
        )

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._ssl_context, **options)
        _pin(cast(PoolManager, self.poolmanager))

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy not in self.proxy_manager:
            manager = proxy_from_url(
                proxy,
                num_pools=_POOLS,
                proxy_headers=self.proxy_headers(proxy),
                ssl_context=self._ssl_context,
                proxy_ssl_context=self._ssl_context,
                **options,
            )
            _pin(manager)
            self.proxy_manager[proxy] = manager
        return self.proxy_manager[proxy]

    def take(self, attempt: Attempt) -> PinnedConnection:
        """Return a connection for *attempt*, connected; to be given back.

        :raises Failure: when there is none to be had, for one of many reasons.
        """
        checked = attempt.checked
        key = (checked.scheme, checked.host, checked.port)
        if not attempt.wants_new_connection and (kept := self._kept.take(key)) is not None:
            return self._reuse(kept, attempt)
        pool = self._manager.connection_from_host(checked.host, checked.port, checked.scheme)
        connection = cast(PinnedConnection, pool._new_conn())
        connection.key = key
        connection.attempt = attempt
        try:
            if pool.proxy is not None and checked.scheme == "https":
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
        if keep:
            self._kept.put(connection)
        else:
            connection.close()

    def close_idle(self) -> None:
        """Close kept connections that nobody has used for long."""
        self._kept.close_old()

    def close(self) -> None:
        """Close every kept connection now."""
        self._kept.close()
        super().close()

    def _reuse(self, connection: PinnedConnection, attempt: Attempt) -> PinnedConnection:
        connection.attempt = attempt
        try:
            attempt.hold(cast(Grip, connection.grip), reused=True)
            connection.sock.settimeout(attempt.left_s())
        except BaseException:
            self.give_back(connection, attempt, keep=False)
            raise
        return connection


def _pin(manager: PoolManager) -> None:
    # Replaced, not changed: urllib3 shares the original mapping among all managers of the process.
    manager.pool_classes_by_scheme = {"http": PinnedHTTPPool, "https": PinnedHTTPSPool}
