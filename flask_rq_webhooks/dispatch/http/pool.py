"""Connections to checked addresses, kept for the next request, and the TLS verification settings.

Every connection is opened through :class:`.AddressGuard`, knows the deadline of its attempt, and is not kept
too long. Kept connections of all hosts are counted together, whereas urllib3's pools count per host.
"""

from __future__ import annotations

import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.poolmanager import PoolManager, proxy_from_url

from .address_guard import AddressGuard
from .contract import Failure, ProxyFailure
from .deadline import RunningAttempt, SocketHandle

if sys.platform != "win32":
    import resource

#: Seconds after which a kept connection is closed: if unused, and in any case. The latter because an address
#: that was checked once must not be used forever.
MAX_IDLE_S = 30.0
MAX_AGE_S = 300.0
#: Connections kept, of all hosts together, per request in flight: many hosts that receive in turn find theirs
#: open. Opening a connection costs more than a request, and with TLS many times as much.
KEPT_EACH = 4
#: At most one connection is kept per this many files that the process may open; at least :data:`MIN_KEPT`.
FILES_EACH = 8
MIN_KEPT = 32

#: The beginning of Linux's ``struct tcp_info`` (since 4.1): its first byte is the state, its last eight are
#: ``tcpi_bytes_received``, the number of bytes received, whether read or not.
_TCP_INFO_BYTES = 136
_ESTABLISHED = 1
_BYTES_RECEIVED = struct.Struct("=Q")

#: Connections with the same scheme, host and port are interchangeable.
_Key = tuple[str, str, int]


class _Pinned:
    """Additions to both kinds of connection: the guard opens the socket, and the watchdog can abort it."""

    guard: AddressGuard | None = None
    attempt: RunningAttempt | None = None
    handle: SocketHandle | None = None
    key: _Key = ("", "", 0)
    opened_at = 0.0
    released_at = 0.0
    #: Bytes read from it.
    received = 0
    #: Whether reads and writes block. With TLS within TLS, they always do.
    waits = True

    def _new_conn(self) -> socket.socket:
        if self.guard is None or self.attempt is None:
            raise RuntimeError("A connection of this transport was used outside of it; nothing is checked.")
        connection = cast(HTTPConnection, self)
        self.opened_at = time.monotonic()
        sock, self.handle = self.guard.connect(
            self.attempt, connection._dns_host, connection.port, through_proxy=connection.proxy is not None
        )
        sock.settimeout(self.attempt.left_s())
        return sock

    def close(self) -> None:
        """Close the connection, if it is open."""
        self._drop_handle()
        super().close()  # type: ignore[misc]

    def let_wait(self, waits: bool) -> None:
        """Make reads and writes block, without a deadline of their own, or not block."""
        sock = cast(HTTPConnection, self).sock
        if waits is not self.waits and isinstance(sock, socket.socket):
            sock.setblocking(waits)
            self.waits = waits

    def is_old(self, now: float) -> bool:
        """Return whether it is too old to be used again."""
        return now - self.released_at > MAX_IDLE_S or now - self.opened_at > MAX_AGE_S

    def _drop_handle(self) -> None:
        if self.handle is not None:
            self.handle.close()
            self.handle = None


class PinnedHTTPConnection(_Pinned, HTTPConnection):
    """A plain connection."""

    @property
    def is_connected(self) -> bool:
        """Return whether it is still open and nothing unsolicited has arrived."""
        return self._is_quiet() or super().is_connected

    def _is_quiet(self) -> bool:
        """Return whether Linux says so; unlike polling, asking it lets no other thread run in between."""
        if type(self.sock) is not socket.socket or sys.platform != "linux":
            return False
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        if len(info) < _TCP_INFO_BYTES or info[0] != _ESTABLISHED:
            return False
        received: int = _BYTES_RECEIVED.unpack_from(info, _TCP_INFO_BYTES - _BYTES_RECEIVED.size)[0]
        return received == self.received


class PinnedHTTPSConnection(_Pinned, HTTPSConnection):
    """A connection over TLS."""


#: Number of destinations whose pools urllib3 remembers; creating one takes a few microseconds.
_POOLS = 256

PinnedConnection = PinnedHTTPConnection | PinnedHTTPSConnection


class KeptConnections:
    """Idle connections to all hosts, kept for the next request.

    :param limit: maximum number of connections; beyond it, the one idle for longest is closed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        #: All kept connections, and those of each key; oldest first.
        self._all: dict[PinnedConnection, None] = {}
        self._by_key: dict[_Key, list[PinnedConnection]] = {}

    def take(self, key: _Key) -> PinnedConnection | None:
        """Return the most recently used connection that is still open and unused; the caller then owns it."""
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
        """Keep *connection*; the caller must not use it any more."""
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
        """Close connections that are too old to be used again."""
        now = time.monotonic()
        self._close([connection for connection in self._listed() if connection.is_old(now)])

    def close(self) -> None:
        """Close all kept connections."""
        self._close(self._listed())

    def _listed(self) -> list[PinnedConnection]:
        with self._lock:
            return list(self._all)

    def _close(self, connections: list[PinnedConnection]) -> None:
        for connection in connections:
            with self._lock:
                if connection not in self._all:  # another thread was faster
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


class PinnedHTTPPool(HTTPConnectionPool):
    """Creates plain connections to one host."""

    ConnectionCls = PinnedHTTPConnection


class PinnedHTTPSPool(HTTPSConnectionPool):
    """Creates TLS connections to one host."""

    ConnectionCls = PinnedHTTPSConnection


class ConnectionPool:
    """Open connections for attempts, and keep those that may carry another request.

    urllib3's pools are only used to create connections; they keep none.

    :param guard: opens every socket.
    :param concurrency: maximum number of requests in flight; determines how many connections are kept.
    :param ssl_context: TLS verification settings for receivers and for the proxy.
    :param proxy_url: proxy that every connection goes through.
    :param host_contexts: the same for individual hosts that get a client certificate.
    """

    def __init__(
        self,
        guard: AddressGuard,
        *,
        concurrency: int,
        ssl_context: ssl.SSLContext,
        proxy_url: str | None,
        host_contexts: Mapping[str, ssl.SSLContext],
    ) -> None:
        self._guard = guard
        self._host_contexts = host_contexts
        self._kept = KeptConnections(most_kept(concurrency))
        #: Headers for the proxy, sent with a request that it has to forward.
        self.forwarding_headers: Mapping[str, str] = {}
        if proxy_url is None:
            self._manager = PoolManager(num_pools=_POOLS, maxsize=1, ssl_context=ssl_context)
        else:
            self.forwarding_headers = HTTPAdapter().proxy_headers(proxy_url)
            self._manager = proxy_from_url(
                proxy_url,
                num_pools=_POOLS,
                maxsize=1,
                proxy_headers=self.forwarding_headers,
                ssl_context=ssl_context,
                proxy_ssl_context=ssl_context,
            )
        # Replaced, not changed: urllib3 shares the original mapping among all managers of the process.
        self._manager.pool_classes_by_scheme = {"http": PinnedHTTPPool, "https": PinnedHTTPSPool}

    def take_kept(self, attempt: RunningAttempt) -> PinnedConnection | None:
        """Return a kept connection for *attempt*, to be given back; ``None`` if a new one is needed."""
        if attempt.is_repeat or (kept := self._kept.take(_key_of(attempt))) is None:
            return None
        kept.attempt = attempt
        try:
            attempt.attach(cast(SocketHandle, kept.handle), reused=True)
        except BaseException:
            self.give_back(kept, attempt, keep=False)
            raise
        return kept

    def take(self, attempt: RunningAttempt) -> PinnedConnection:
        """Return an open connection for *attempt*, to be given back.

        :raises Failure: when none could be opened; it says why.
        """
        if (kept := self.take_kept(attempt)) is not None:
            return kept
        checked = attempt.checked
        own = self._host_contexts.get(checked.host) if checked.scheme == "https" else None
        pool = self._manager.connection_from_host(
            checked.host, checked.port, checked.scheme, pool_kwargs={"ssl_context": own} if own else None
        )
        connection = cast(PinnedConnection, pool._new_conn())
        connection.key = _key_of(attempt)
        connection.guard = self._guard
        connection.attempt = attempt
        try:
            if pool.proxy is not None and checked.scheme == "https":
                pool._prepare_proxy(cast(Any, connection))
            if connection.sock is None:
                connection.connect()
            # From here on, only the watchdog enforces the deadline: a socket with its own timeout would be
            # polled before every read and write.
            connection.sock.settimeout(None)
        except Exception as exc:
            by_proxy = connection.proxy is not None and not connection.has_connected_to_proxy
            self.give_back(connection, attempt, keep=False)
            if by_proxy and not isinstance(exc, Failure):
                raise ProxyFailure from exc
            raise
        return connection

    def give_back(self, connection: PinnedConnection, attempt: RunningAttempt, *, keep: bool) -> None:
        """Take back what :meth:`take` returned.

        :param keep: whether the response was read to its end, so that another request may follow.
        """
        attempt.detach()
        connection.attempt = None
        connection.released_at = time.monotonic()
        if keep:
            connection.let_wait(False)
            self._kept.put(connection)
        else:
            connection.close()

    def close_idle(self) -> None:
        """Close kept connections that have been idle for too long."""
        self._kept.close_old()

    def close(self) -> None:
        """Close every kept connection now."""
        self._kept.close()
        self._manager.clear()


def _key_of(attempt: RunningAttempt) -> _Key:
    checked = attempt.checked
    return checked.scheme, checked.host, checked.port


def most_kept(concurrency: int) -> int:
    """Return the maximum number of connections kept, of all hosts together."""
    return max(MIN_KEPT, min(KEPT_EACH * concurrency, _file_limit() // FILES_EACH))


def _file_limit() -> int:
    """Return how many files this process may have open."""
    if sys.platform == "win32":
        return 512  # the C library's limit
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def default_ssl_context(
    ca_file: str | None = None, client_cert: tuple[str, str] | None = None
) -> ssl.SSLContext:
    """Return a context that verifies certificates and host names, regardless of environment variables.

    ``ssl.create_default_context`` is not used because it obeys ``SSLKEYLOGFILE``, and the system's store of
    certificates is not used because it obeys ``SSL_CERT_FILE``.

    :param ca_file: PEM file of certificate authorities to trust in addition to certifi's.
    :param client_cert: certificate file and key file, presented to a receiver that asks for a certificate.
    :raises OSError: for a file that cannot be read or has the wrong content.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=DEFAULT_CA_BUNDLE_PATH)
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    if client_cert is not None:
        context.load_cert_chain(*client_cert)
    return context


def verifying_context(context: ssl.SSLContext | None, ca_file: str | None) -> ssl.SSLContext:
    """Return *context*, or :func:`default_ssl_context` if it is ``None``.

    :raises ValueError: for a context that does not verify certificates and names.
    """
    if context is None:
        return default_ssl_context(ca_file)
    if not context.check_hostname or context.verify_mode != ssl.CERT_REQUIRED:
        raise ValueError("The TLS context has to verify certificates and names.")
    return context
