"""One attempt while a thread makes it: its deadlines, and the grip by which it can be ended from outside.

Knows nothing of urllib3; :mod:`.pinned` holds the connections.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time

from ...protocol.urls import CheckedURL
from .address_guard import Destinations, is_literal
from .dns import MAX_ADDRESSES, Lookups, alternate
from .keeping import is_blameless
from .opening import open_one
from .transport_errors import Failure, deadline_passed

logger = logging.getLogger(__name__)


class Grip:
    """A hold on a connection by which another thread can end it.

    It is a duplicate of the connection's descriptor, made once: it stays valid while TLS wraps the socket
    itself, and until the connection lets it go.
    """

    __slots__ = ("_lock", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock: socket.socket | None = sock.dup()
        self._lock = threading.Lock()

    def end(self) -> None:
        """Shut the connection down, which ends every read and write on it."""
        with self._lock:
            if self._sock is None:
                return
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError as exc:
                if exc.errno != errno.ENOTCONN:  # the peer was faster
                    logger.warning("A connection past its deadline could not be shut down: %s", exc)

    def close(self) -> None:
        """Let go."""
        with self._lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None


class Attempt:
    """One attempt's deadlines, and what the watchdog needs to end it."""

    __slots__ = (
        "_destinations",
        "_fired",
        "_grip",
        "_lock",
        "_lookups",
        "_repeated",
        "_reused",
        "answered",
        "checked",
        "connect_deadline",
        "deadline",
    )

    def __init__(
        self,
        *,
        checked: CheckedURL,
        destinations: Destinations,
        lookups: Lookups,
        deadline: float,
        connect_deadline: float,
    ) -> None:
        self.checked = checked
        self._destinations = destinations
        self._lookups = lookups
        self.deadline = deadline
        self.connect_deadline = connect_deadline
        #: Whether any byte of an answer came.
        self.answered = False
        self._lock = threading.Lock()
        self._grip: Grip | None = None
        self._fired: Failure | None = None
        self._reused = False
        self._repeated = False

    def hold(self, grip: Grip, *, reused: bool) -> None:
        """Let the watchdog end what happens on a connection.

        :param reused: it was kept from an earlier request.
        """
        with self._lock:
            if self._fired is not None:
                raise self._fired
            self._grip = grip
            self._reused = reused

    def let_go(self) -> None:
        """Let go of the connection, which others may use from here on; nothing can end it any more."""
        with self._lock:
            self._grip = None

    def fire(self, failure: Failure) -> None:
        """End the attempt now; called by the watchdog's thread."""
        with self._lock:
            if self._fired is None:
                self._fired = failure
                if self._grip is not None:
                    self._grip.end()

    def left_s(self) -> float:
        """Return the seconds until the deadline, as a timeout for a socket."""
        return max(self.deadline - time.monotonic(), 0.001)

    def raise_if_fired(self, cause: BaseException | None = None) -> None:
        """Raise why the attempt was ended, if it was, or should have been by now."""
        with self._lock:
            fired = self._fired
            if fired is None and time.monotonic() >= self.deadline:
                fired = deadline_passed()
        if fired is not None:
            raise fired from cause

    def may_repeat(self, failure: Failure) -> bool:
        """Say once whether *failure* may be blamed on the connection's having been idle."""
        if not is_blameless(failure, reused=self._reused, repeated=self._repeated, answered=self.answered):
            return False
        self._repeated = True
        return True

    @property
    def wants_new_connection(self) -> bool:
        """Say whether this is the repeat, for which no kept connection will do."""
        return self._repeated

    def connect(self, host: str, port: int, *, through_proxy: bool) -> tuple[socket.socket, Grip]:
        """Open a connection to an address that was checked before the first packet; give the grip on it.

        :param through_proxy: *host* is the operator's own proxy, which decides about addresses itself.
        """
        if not through_proxy and (host, port) != (self.checked.host, self.checked.port):
            raise Failure("blocked", "the connection's host is not the one that was checked")
        addresses = [host] if is_literal(host) else self._lookups.look_up(host, port, self.connect_deadline)
        if not addresses:
            raise Failure("dns", f"{host} has no address")
        if not through_proxy:
            self._destinations.check_addresses(self.checked, addresses)
        return self._open(alternate(addresses)[:MAX_ADDRESSES], port)

    def _open(self, addresses: list[str], port: int) -> tuple[socket.socket, Grip]:
        grips: list[Grip] = []

        def begun(sock: socket.socket) -> None:
            grips.append(Grip(sock))
            self.hold(grips[-1], reused=False)

        try:
            sock = open_one(addresses, port, self.connect_deadline, begun)
        except BaseException as exc:
            self.let_go()
            for grip in grips:
                grip.close()
            fired = self._fired
            if fired is None or not isinstance(exc, Failure) or exc.code == "blocked":
                raise
            if fired.code == "timeout":
                fired = Failure("connect", "no connection in time")
            raise fired from None
        for grip in grips[:-1]:
            grip.close()
        return sock, grips[-1]
