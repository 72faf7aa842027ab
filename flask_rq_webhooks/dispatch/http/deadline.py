"""Total deadlines: the state of one attempt in progress, and the watchdog thread that aborts it in time.

A socket's own timeout is per read, so a receiver that sends one byte at a time would never trigger it. The
watchdog shuts the socket down from another thread instead (SECURITY 7).
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable

from ...protocol.urls import CheckedURL
from .contract import Failure, deadline_passed, transport_closed

logger = logging.getLogger(__name__)


class SocketHandle:
    """A handle that lets the watchdog abort an attempt.

    It holds a duplicate of the connection's descriptor, which stays valid while TLS wraps the socket
    itself, and until the connection closes it.
    """

    __slots__ = ("_lock", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock: socket.socket | None = sock.dup()
        self._lock = threading.Lock()

    def abort(self) -> None:
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
        """Release the descriptor; the connection itself stays open."""
        with self._lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None


class RunningAttempt:
    """The deadlines of one attempt, and what the watchdog needs to abort it.

    :param checked: the URL that the request goes to.
    :param deadline: total deadline, on :func:`time.monotonic`'s clock.
    :param connect_deadline: deadline for the look-up and for opening a connection.
    """

    __slots__ = (
        "_handle",
        "_lock",
        "_reused",
        "aborted_by",
        "answered",
        "checked",
        "connect_deadline",
        "deadline",
        "is_repeat",
    )

    def __init__(self, checked: CheckedURL, *, deadline: float, connect_deadline: float) -> None:
        self.checked = checked
        self.deadline = deadline
        self.connect_deadline = connect_deadline
        #: Whether any byte of a response arrived.
        self.answered = False
        #: Why the watchdog aborted the attempt, if it did.
        self.aborted_by: Failure | None = None
        self._lock = threading.Lock()
        self._handle: SocketHandle | None = None
        self._reused = False
        #: Whether this is the second try.
        self.is_repeat = False

    def attach(self, handle: SocketHandle, *, reused: bool) -> None:
        """Let the watchdog abort the connection of *handle* from now on.

        :param reused: whether the connection was kept from an earlier request.
        :raises Failure: when the attempt has already been aborted.
        """
        with self._lock:
            if self.aborted_by is not None:
                raise self.aborted_by
            self._handle = handle
            self._reused = reused

    def detach(self) -> None:
        """Release the connection for other attempts to use; the watchdog can no longer abort it."""
        with self._lock:
            self._handle = None

    def abort(self, failure: Failure) -> None:
        """Abort the attempt now; called by the watchdog's thread."""
        with self._lock:
            if self.aborted_by is None:
                self.aborted_by = failure
                if self._handle is not None:
                    self._handle.abort()

    def left_s(self) -> float:
        """Return the seconds until the deadline, as a timeout for a socket."""
        return max(self.deadline - time.monotonic(), 0.001)

    def raise_if_aborted(self, cause: BaseException | None = None) -> None:
        """Raise the reason if the attempt was aborted, or should have been by now.

        :raises Failure: the reason.
        """
        with self._lock:
            failure = self.aborted_by
            if failure is None and time.monotonic() >= self.deadline:
                failure = deadline_passed()
        if failure is not None:
            raise failure from cause

    def may_repeat(self, failure: Failure) -> bool:
        """Return whether the request may be sent again, on a new connection; ``True`` at most once.

        It may if a kept connection was closed before any byte of a response: most likely the receiver ended
        an idle connection while the request was being written. Receivers know a repeat by ``webhook-id``.
        """
        if self.is_repeat or self.answered or not self._reused or failure.code not in ("reset", "tls"):
            return False
        self.is_repeat = True
        return True


class Watchdog:
    """One thread that aborts every attempt at its deadline.

    It sleeps until the earliest deadline it knows of, and usually finds that attempt finished by then.

    :param on_idle: called every *idle_s* seconds in the watchdog's thread.
    """

    def __init__(self, *, on_idle: Callable[[], None], idle_s: float) -> None:
        self._on_idle = on_idle
        self._idle_s = idle_s
        self._condition = threading.Condition()
        self._attempts: set[RunningAttempt] = set()
        self._wakes_at = 0.0
        self._aborted = False
        self._ended = False
        self._thread: threading.Thread | None = None

    def watch(self, attempt: RunningAttempt) -> None:
        """Abort *attempt* at its deadline unless :meth:`forget` is called first."""
        with self._condition:
            self._attempts.add(attempt)
            if self._aborted:
                attempt.abort(transport_closed())
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="rq-webhooks-watchdog", daemon=True)
                thread.start()
                self._thread = thread  # only now: if no thread could be started, the next attempt tries again
            elif attempt.deadline < self._wakes_at:
                self._condition.notify()

    def forget(self, attempt: RunningAttempt) -> None:
        """Stop watching *attempt*, which has ended."""
        with self._condition:
            self._attempts.discard(attempt)

    def abort(self) -> None:
        """Abort every attempt now, and all that start later."""
        with self._condition:
            self._aborted = True
            attempts = list(self._attempts)
        for attempt in attempts:
            attempt.abort(transport_closed())

    def end(self) -> None:
        """End the thread and wait for it."""
        with self._condition:
            self._ended = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        next_idle_look = time.monotonic() + self._idle_s
        while True:
            with self._condition:
                if self._ended:
                    return
                now = time.monotonic()
                late = [attempt for attempt in self._attempts if attempt.deadline <= now]
                self._attempts.difference_update(late)
                if not late and now < next_idle_look:
                    self._wakes_at = min(
                        (attempt.deadline for attempt in self._attempts), default=next_idle_look
                    )
                    self._wakes_at = min(self._wakes_at, next_idle_look)
                    self._condition.wait(self._wakes_at - now)
                    continue
            for attempt in late:
                attempt.abort(deadline_passed())
            if now >= next_idle_look:
                next_idle_look = now + self._idle_s
                try:
                    self._on_idle()
                except Exception:  # without this thread, no attempt would ever be aborted
                    logger.exception("Idle connections could not be closed.")
