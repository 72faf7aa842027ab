"""One attempt while a thread makes it: its deadlines, and the grip by which it can be ended from outside.

Knows nothing of urllib3; :mod:`.pinned` opens its connections.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from typing import Any

from ...protocol.urls import CheckedURL
from .destinations import Destinations, is_literal
from .failures import Failure, deadline_passed
from .lookups import MAX_ADDRESSES, Lookups, alternate
from .opening import open_one

logger = logging.getLogger(__name__)


class Attempt:
    """One attempt's deadlines, and the grip by which the watchdog ends it.

    The grip is a duplicate of the connection's descriptor: it stays valid while TLS wraps, or urllib3
    closes, the socket itself.
    """

    __slots__ = (
        "_destinations",
        "_fired",
        "_finished",
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
        self.answered = False
        self._lock = threading.Lock()
        self._grip: int | None = None
        self._fired: Failure | None = None
        self._finished = False
        self._reused = False
        self._repeated = False

    def hold(self, sock: Any, *, reused: bool) -> None:
        """Let the watchdog end what happens on *sock*."""
        with self._lock:
            if self._fired is not None:
                raise self._fired
            self._drop_grip()
            self._grip = os.dup(sock.fileno())
            self._reused = reused

    def fire(self, failure: Failure) -> None:
        """End the attempt now; called by the watchdog's thread."""
        with self._lock:
            if self._finished or self._fired is not None:
                return
            self._fired = failure
            if self._grip is not None:
                held = socket.socket(fileno=os.dup(self._grip))
                try:
                    held.shutdown(socket.SHUT_RDWR)
                except OSError as exc:
                    if exc.errno != errno.ENOTCONN:  # the peer was faster
                        logger.warning("A connection past its deadline could not be shut down: %s", exc)
                finally:
                    held.close()

    def finish(self) -> None:
        """Let go of the connection; nothing can fire any more."""
        with self._lock:
            self._finished = True
            self._drop_grip()

    def raise_if_fired(self, cause: BaseException | None = None) -> None:
        with self._lock:
            fired = self._fired
            if fired is None and time.monotonic() >= self.deadline:
                fired = deadline_passed()
        if fired is not None:
            raise fired from cause

    def may_repeat(self) -> bool:
        """Say once whether a broken connection may be blamed on its having been idle."""
        if not self._reused or self._repeated or self.answered:
            return False
        self._repeated = True
        return True

    @property
    def wants_new_connection(self) -> bool:
        return self._repeated

    def connect(self, host: str, port: int, *, through_proxy: bool) -> socket.socket:
        """Open a connection to an address that was checked before the first packet.

        :param through_proxy: *host* is the operator's own proxy, which decides about addresses itself.
        """
        if not through_proxy and (host, port) != (self.checked.host, self.checked.port):
            raise Failure("blocked", "the connection's host is not the one that was checked")
        addresses = [host] if is_literal(host) else self._lookups.look_up(host, port, self.connect_deadline)
        if not addresses:
            raise Failure("dns", f"{host} has no address")
        if not through_proxy:
            self._destinations.check_addresses(self.checked, addresses)
        sock = open_one(alternate(addresses)[:MAX_ADDRESSES], port, self.connect_deadline)
        try:
            self.hold(sock, reused=False)
            sock.settimeout(max(self.deadline - time.monotonic(), 0.001))
        except BaseException:
            sock.close()
            raise
        return sock

    def _drop_grip(self) -> None:
        if self._grip is not None:
            os.close(self._grip)
            self._grip = None


class _ThreadState(threading.local):
    attempt: Attempt | None = None


_thread = _ThreadState()


def set_attempt_of_this_thread(attempt: Attempt | None) -> None:
    """Say what attempt this thread makes, which is how its connections know deadline and policy."""
    _thread.attempt = attempt


def attempt_of_this_thread() -> Attempt | None:
    """Return the attempt this thread is making, if it is one of ours."""
    return _thread.attempt


def current_attempt() -> Attempt:
    """Return the attempt this thread is making.

    :raises RuntimeError: when it makes none: a connection must not be opened unchecked.
    """
    attempt = _thread.attempt
    if attempt is None:
        raise RuntimeError("A connection of this transport was used outside of it; nothing would be checked.")
    return attempt
