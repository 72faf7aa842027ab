"""From a name to the addresses worth a connection: look-ups under a deadline, and the order of answers.

Knows nothing of connections, nor of which addresses are allowed (:mod:`.destinations`).
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from .failures import Failure

#: Addresses of one name that are tried.
MAX_ADDRESSES = 4

#: ``(host, port) -> addresses``; answers shaped like those of :func:`socket.getaddrinfo` will do as well.
Resolver = Callable[[str, int], Iterable[str | tuple[Any, ...]]]


def system_resolver(host: str, port: int) -> list[tuple[Any, ...]]:
    """Return what the operating system knows of *host*, best first.

    :raises OSError: when it knows nothing.
    """
    return list(socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM))


class Lookups:
    """Look names up under a deadline, in threads that may be left behind.

    One host occupies one thread however many attempts ask for it, so that a stalling name server cannot
    take them all.
    """

    def __init__(self, resolver: Resolver, *, limit: int) -> None:
        self._resolver = resolver
        self._slots = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._pending: dict[tuple[str, int], Future[list[str]]] = {}

    def look_up(self, host: str, port: int, deadline: float) -> list[str]:
        """Return the addresses of *host* without repeats.

        :param deadline: on :func:`time.monotonic`'s clock.
        """
        future = self.begin(host, port, wait_s=max(deadline - time.monotonic(), 0))
        if future is None:
            raise Failure("dns", f"{host}: too many look-ups are stalled")
        try:
            return future.result(timeout=max(deadline - time.monotonic(), 0))
        except (FutureTimeoutError, OSError) as exc:
            raise look_up_failure(host, exc) from exc

    def begin(self, host: str, port: int, *, wait_s: float = 0) -> Future[list[str]] | None:
        """Have *host* looked up, together with whoever else asks for it just now.

        :param wait_s: seconds to wait for a thread at most.
        :returns: a future for the addresses; ``None`` when all threads are taken by stalled look-ups. It is
            shared, and cannot be cancelled.
        """
        key = (host, port)
        with self._lock:
            if key in self._pending:
                return self._pending[key]
        if not self._slots.acquire(timeout=wait_s):
            return None
        with self._lock:
            if key in self._pending:
                self._slots.release()
                return self._pending[key]
            future = self._pending[key] = Future()
        future.set_running_or_notify_cancel()
        threading.Thread(
            target=self._resolve, args=(key, future), name="rq-webhooks-lookup", daemon=True
        ).start()
        return future

    def _resolve(self, key: tuple[str, int], future: Future[list[str]]) -> None:
        try:
            answers: list[str] | None = list(
                dict.fromkeys(_address(answer) for answer in self._resolver(*key))
            )
            error: Exception | None = None
        except Exception as exc:  # handed to whoever waits; the slot must be given back
            answers, error = None, exc
        with self._lock:
            del self._pending[key]
        self._slots.release()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answers or [])


def look_up_failure(host: str, exc: BaseException) -> Failure:
    """Return what to say of a look-up that raised :exc:`OSError` or did not answer in time."""
    if isinstance(exc, FutureTimeoutError) and not exc.args:
        return Failure("dns", f"{host}: no answer in time")
    return Failure("dns", f"{host}: {getattr(exc, 'strerror', None) or exc}")


def _address(answer: str | tuple[Any, ...]) -> str:
    return answer if isinstance(answer, str) else str(answer[4][0])


def alternate(addresses: Sequence[str]) -> list[str]:
    """Return the addresses with families taking turns, so that a broken one is left early (RFC 8305, 4)."""
    first_is_v6 = ":" in addresses[0]
    same = [address for address in addresses if (":" in address) is first_is_v6]
    other = [address for address in addresses if (":" in address) is not first_is_v6]
    turns = itertools.chain.from_iterable(itertools.zip_longest(same, other))
    return [address for address in turns if address is not None]
