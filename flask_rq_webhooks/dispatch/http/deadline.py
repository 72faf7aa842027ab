"""The thread that ends attempts at their deadlines. Knows nothing of what they wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from . import keeping
from .attempt import Attempt
from .transport_errors import deadline_passed, transport_closed


class Watchdog:
    """One thread that ends every attempt at its deadline.

    It sleeps until the earliest deadline it knew of, which in good times it never has to act on.
    """

    def __init__(self, *, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self._condition = threading.Condition()
        self._attempts: set[Attempt] = set()
        self._wakes_at = 0.0
        self._aborted = False
        self._ended = False
        self._thread: threading.Thread | None = None

    def watch(self, attempt: Attempt) -> None:
        """End *attempt* at its deadline unless it is forgotten before."""
        with self._condition:
            self._attempts.add(attempt)
            if self._aborted:
                attempt.fire(transport_closed())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rq-webhooks-watchdog", daemon=True)
                self._thread.start()
            elif attempt.deadline < self._wakes_at:
                self._condition.notify()

    def forget(self, attempt: Attempt) -> None:
        """Let *attempt* be; it has ended."""
        with self._condition:
            self._attempts.discard(attempt)

    def abort(self) -> None:
        """End every attempt now, and all that are still to come."""
        with self._condition:
            self._aborted = True
            attempts = list(self._attempts)
        for attempt in attempts:
            attempt.fire(transport_closed())

    def end(self) -> None:
        """End the thread."""
        with self._condition:
            self._ended = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        next_idle_look = time.monotonic() + keeping.MAX_IDLE_S
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
                attempt.fire(deadline_passed())
            if now >= next_idle_look:
                self._on_idle()
                next_idle_look = now + keeping.MAX_IDLE_S
