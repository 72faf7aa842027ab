"""From a name to the addresses worth a connection: look-ups under a deadline, and the order of answers.

Knows nothing of connections, nor of which addresses are allowed (:mod:`.address_guard`).
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from .transport_errors import Failure, descriptor_shortage, transport_closed

#: Addresses of one name that are tried.
MAX_ADDRESSES = 4

#: ``(host, port) -> addresses``; answers shaped like those of :func:`socket.getaddrinfo` will do as well.
Resolver = Callable[[str, int], Iterable[str | tuple[Any, ...]]]

#: Host and port.
_Name = tuple[str, int]


def system_resolver(host: str, port: int) -> list[tuple[Any, ...]]:
    """Return the addresses that the operating system has for *host*, best first.

    :raises OSError: when it has none.
    """
    return list(socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM))


class Lookups:
    """Look names up under a deadline, in threads that may be left behind.

    One name takes one thread however many attempts ask for it. The names of one domain take at most a quarter
    of all threads, so one stalling name server cannot take them all. An owner of several domains can: until
    those look-ups end, other names are not found (``dns``). A domain is the last two labels of a name, so
    the names below ``co.uk`` share a quarter.

    :param limit: look-ups at once.
    """

    def __init__(self, resolver: Resolver, *, limit: int) -> None:
        self._resolver = resolver
        self._limit = limit
        self._limit_per_domain = max(1, limit // 4)
        self._changed = threading.Condition()
        self._pending: dict[_Name, Future[list[str]]] = {}
        self._per_domain: Counter[str] = Counter()
        self._aborted = False

    def look_up(self, host: str, port: int, deadline: float) -> list[str]:
        """Return the addresses of *host* without repeats.

        :param deadline: on :func:`time.monotonic`'s clock.
        :raises Failure: ``dns``, also when there was no thread in time; ``internal`` after :meth:`abort`.
        """
        future = self._begin((host, port), deadline)
        if future is None:
            raise Failure("dns", f"{host}: too many look-ups are stalled")
        try:
            return future.result(timeout=max(deadline - time.monotonic(), 0))
        except (FutureTimeoutError, OSError) as exc:
            raise look_up_failure(host, exc) from exc

    def begin(self, host: str, port: int) -> Future[list[str]] | None:
        """Have *host* looked up, together with other attempts that ask for it now.

        :returns: a future for the addresses; ``None`` when all threads it might have are taken. It is shared,
            and cannot be cancelled.
        """
        return self._begin((host, port), 0)

    def abort(self) -> None:
        """End every look-up that is waited for, and refuse new ones."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()
            pending = list(self._pending.values())
        for future in pending:
            _settle(future, transport_closed())

    def _begin(self, name: _Name, deadline: float) -> Future[list[str]] | None:
        domain = _domain(name)
        with self._changed:
            while True:
                if self._aborted:
                    raise transport_closed()
                if name in self._pending:
                    return self._pending[name]
                if len(self._pending) < self._limit and self._per_domain[domain] < self._limit_per_domain:
                    break
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
            future = self._pending[name] = Future()
            self._per_domain[domain] += 1
        future.set_running_or_notify_cancel()
        try:
            threading.Thread(
                target=self._resolve, args=(name, future), name="rq-webhooks-lookup", daemon=True
            ).start()
        except RuntimeError as exc:  # no thread to be had; the next one may try again
            self._end(name)
            _settle(future, exc)
        return future

    def _resolve(self, name: _Name, future: Future[list[str]]) -> None:
        outcome: list[str] | Exception
        try:
            outcome = list(dict.fromkeys(_address(answer) for answer in self._resolver(*name)))
        except Exception as exc:  # passed to those that wait; the thread must be given back
            outcome = exc
        self._end(name)
        _settle(future, outcome)

    def _end(self, name: _Name) -> None:
        domain = _domain(name)
        with self._changed:
            del self._pending[name]
            self._per_domain[domain] -= 1
            if not self._per_domain[domain]:
                del self._per_domain[domain]
            self._changed.notify_all()


def _domain(name: _Name) -> str:
    return ".".join(name[0].rstrip(".").split(".")[-2:])


def _settle(future: Future[list[str]], outcome: list[str] | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # it was aborted
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def look_up_failure(host: str, exc: BaseException) -> Failure:
    """Return what to say of a look-up that raised :exc:`OSError` or did not answer in time."""
    if isinstance(exc, OSError) and (shortage := descriptor_shortage(exc)) is not None:
        return shortage
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
