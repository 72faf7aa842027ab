"""Check the URL and the addresses of an attempt, look names up, and open connections (nothing else does).

Every step is checked: the URL before anything else, every address of a name before the first packet, and the
peer after connecting (SECURITY 3). Names are looked up under a deadline.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import lru_cache
from typing import Any

from ...errors import BlockedURLError
from ...protocol.urls import CheckedURL, UrlPolicy, embedded_ipv4, nat64_ipv4
from .contract import Failure, descriptor_shortage, transport_closed
from .deadline import RunningAttempt, SocketHandle

#: Maximum addresses of one name. An answer may hold thousands, and checking them would delay other attempts.
_MAX_JUDGED = 256
#: Seconds for which the NAT64 prefixes of this network are cached, and seconds their look-up may take.
NAT64_LASTS_S = 300.0
NAT64_WAIT_S = 1.0


class AddressGuard:
    """Apply the URL policy to attempts, and open their connections.

    :param policy: decides what may be reached.
    :param lookups: resolves names.
    """

    def __init__(self, policy: UrlPolicy, lookups: Lookups) -> None:
        self._policy = policy
        self._lookups = lookups
        # The policy never changes, so its answers can be cached; the same few endpoints are used all day.
        self._check_url = lru_cache(maxsize=256)(policy.check_url)
        self._nat64: tuple[ipaddress.IPv6Network, ...] = ()
        self._nat64_until = 0.0

    def check_url(self, url: str) -> CheckedURL:
        """Return *url* parsed.

        :raises Failure: ``blocked``, when the policy refuses it.
        """
        try:
            return self._check_url(url)
        except BlockedURLError as exc:
            raise Failure("blocked", f"{exc.code}: {exc}") from exc

    def connect(
        self, attempt: RunningAttempt, host: str, port: int, *, through_proxy: bool
    ) -> tuple[socket.socket, SocketHandle]:
        """Open a connection for *attempt* to an address that was checked before the first packet.

        :param through_proxy: whether *host* is the operator's own proxy, which checks addresses itself.
        :returns: the socket, and the handle that aborts it.
        :raises Failure: when no address may be used or none answers.
        """
        checked = attempt.checked
        if not through_proxy and (host, port) != (checked.host, checked.port):
            raise Failure("blocked", "the connection's host is not the one that was checked")
        if is_literal(host):
            addresses = [host]
        else:
            addresses = self._lookups.look_up(host, port, attempt.connect_deadline)
        if not addresses:
            raise Failure("dns", f"{host} has no address")
        if not through_proxy:
            addresses = self._usable(checked, addresses, attempt.connect_deadline)
        if len(addresses) > 1:
            addresses = alternate(addresses)[:MAX_ADDRESSES]
        return _open_for(attempt, addresses, port)

    def _usable(self, checked: CheckedURL, addresses: list[str], deadline: float) -> list[str]:
        """Check every address of a host and return those to connect to.

        An address that DNS64 synthesized from a public IPv4 address of the name is left out if the policy
        refuses such addresses: the name is then reached by its IPv4 address.

        :raises Failure: ``blocked``, when any other address is refused; ``dns``, when there are too many.
        """
        if len(addresses) > _MAX_JUDGED:
            raise Failure("dns", f"{checked.host} has {len(addresses)} addresses")
        has_ipv4 = any(":" not in address for address in addresses)
        prefixes: tuple[ipaddress.IPv6Network, ...] = ()
        if not is_literal(checked.host) and any(":" in address for address in addresses):
            prefixes = self._nat64_prefixes(deadline)
        usable = []
        for address in addresses:
            try:
                self._policy.check_address(address, checked.port, scheme=checked.scheme, nat64=prefixes)
            except BlockedURLError as exc:
                embedded = None
                if exc.code != "address":
                    embedded = nat64_ipv4(ipaddress.ip_address(address), prefixes)
                if embedded is None or not self._is_allowed(checked, str(embedded)):
                    raise Failure("blocked", f"{exc.code}: {checked.host} has the address {address}") from exc
                if not has_ipv4:
                    raise Failure(
                        "blocked",
                        f"{exc.code}: {checked.host} has only {address}, which a NAT64 network made of "
                        f"{embedded}; if this machine has no IPv4, set RQ_WEBHOOKS_ALLOW_NAT64",
                    ) from exc
            else:
                usable.append(address)
        return usable

    def _is_allowed(self, checked: CheckedURL, address: str) -> bool:
        try:
            self._policy.check_address(address, checked.port, scheme=checked.scheme)
        except BlockedURLError:
            return False
        return True

    def _nat64_prefixes(self, deadline: float) -> tuple[ipaddress.IPv6Network, ...]:
        """Return the NAT64 prefixes of this network, looked up again from time to time."""
        now = time.monotonic()
        if now >= self._nat64_until:
            self._nat64_until = now + NAT64_LASTS_S  # other attempts do not wait for the look-up
            self._nat64 = find_nat64(self._lookups, min(deadline, now + NAT64_WAIT_S))
        return self._nat64


def find_nat64(lookups: Lookups, deadline: float) -> tuple[ipaddress.IPv6Network, ...]:
    """Return the NAT64 prefixes of this network; none if DNS does not answer in time.

    :param deadline: on :func:`time.monotonic`'s clock.
    """
    try:
        return nat64_prefixes(lookups.look_up(NAT64_PROBE, 443, deadline))
    except Failure:  # no such name: no NAT64, or no answer from DNS
        return ()


def is_literal(host: str) -> bool:
    """Return whether *host* is an address, which needs no look-up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def open_one(
    addresses: Sequence[str], port: int, deadline: float, begun: Callable[[socket.socket], None]
) -> socket.socket:
    """Return a socket connected to the first of *addresses* that answers.

    :param deadline: on :func:`time.monotonic`'s clock.
    :param begun: called with every socket before it connects, so that others can shut it down.
    :raises Failure: ``connect``, when none answers.
    """
    reasons: list[str] = []
    for address, share_s in _in_turn(addresses, deadline, reasons):
        try:
            return _open(address, port, share_s, begun)
        except OSError as exc:
            reasons.append(_refusal(address, exc))
    raise Failure("connect", "; ".join(reasons))


def _open_for(attempt: RunningAttempt, addresses: list[str], port: int) -> tuple[socket.socket, SocketHandle]:
    handles: list[SocketHandle] = []

    def begun(sock: socket.socket) -> None:
        handles.append(SocketHandle(sock))
        attempt.attach(handles[-1], reused=False)

    try:
        sock = open_one(addresses, port, attempt.connect_deadline, begun)
    except BaseException as exc:
        attempt.detach()
        for handle in handles:
            handle.close()
        failure = attempt.aborted_by
        if failure is None or not isinstance(exc, Failure) or exc.code == "blocked":
            raise
        if failure.code == "timeout":
            failure = Failure("connect", "no connection in time")
        raise failure from None
    for handle in handles[:-1]:
        handle.close()
    return sock, handles[-1]


def _in_turn(addresses: Sequence[str], deadline: float, reasons: list[str]) -> Iterator[tuple[str, float]]:
    """Yield each address with its share of the time: the first must not use up what the others need."""
    for tried, address in enumerate(addresses):
        share_s = (deadline - time.monotonic()) / (len(addresses) - tried)
        if share_s <= 0:
            reasons.append("no time left")
            return
        yield address, share_s


def _open(address: str, port: int, timeout_s: float, begun: Callable[[socket.socket], None]) -> socket.socket:
    sock = _socket_for(address)
    try:
        begun(sock)
        sock.settimeout(timeout_s)
        sock.connect((address, port))
        _check_peer(sock.getpeername()[0], address)
    except BaseException:
        sock.close()
        raise
    return sock


def _socket_for(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _check_peer(peer: str, address: str) -> None:
    """Make sure that a connection leads to the address it was opened to.

    :raises Failure: ``blocked``, when it does not.
    """
    if peer != address and ipaddress.ip_address(peer.partition("%")[0]) != ipaddress.ip_address(address):
        raise Failure("blocked", f"connected to {peer} instead of {address}")


def _refusal(address: str, exc: OSError) -> str:
    if (shortage := descriptor_shortage(exc)) is not None:
        raise shortage from exc
    if isinstance(exc, TimeoutError):
        return f"{address}: timed out"
    return f"{address}: {os.strerror(exc.errno) if exc.errno else exc}"


# -- NAT64 ------------------------------------------------------------------------------------------------

#: A name that has only IPv4 addresses, which are well known: the addresses that DNS64 synthesizes from them
#: reveal the prefix (RFC 7050, 2).
NAT64_PROBE = "ipv4only.arpa"
_PROBE_ADDRESSES = (ipaddress.IPv4Address("192.0.0.170"), ipaddress.IPv4Address("192.0.0.171"))
#: RFC 6052, 2.2.
_PREFIX_LENGTHS = (96, 64, 56, 48, 40, 32)


def nat64_prefixes(addresses: Iterable[str]) -> tuple[ipaddress.IPv6Network, ...]:
    """Return the NAT64 prefixes of a network, the well-known one included.

    :param addresses: those of :data:`NAT64_PROBE`, as returned by this network's resolver.
    """
    found: dict[ipaddress.IPv6Network, None] = {}
    for text in addresses:
        try:
            address = ipaddress.IPv6Address(text)
        except ValueError:  # IPv4
            continue
        for length in _PREFIX_LENGTHS:
            if embedded_ipv4(address, length) in _PROBE_ADDRESSES:
                found[ipaddress.IPv6Network((address, length), strict=False)] = None
                break
    return tuple(found)


# -- look-ups ---------------------------------------------------------------------------------------------

#: Maximum number of addresses tried for one name.
MAX_ADDRESSES = 4

#: ``(host, port) -> addresses``; answers shaped like those of :func:`socket.getaddrinfo` are accepted, too.
Resolver = Callable[[str, int], Iterable[str | tuple[Any, ...]]]

#: Host and port.
_Name = tuple[str, int]


def system_resolver(host: str, port: int) -> list[tuple[Any, ...]]:
    """Return the addresses that the operating system has for *host*, best first.

    :raises OSError: when it has none.
    """
    return list(socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM))


class Lookups:
    """Look names up under a deadline, in threads that may be abandoned.

    One name takes one thread, however many attempts ask for it. The names of one domain take at most a
    quarter of all threads, so one stalling name server cannot occupy them all. The owner of several domains
    can: until those look-ups end, other names are not found (``dns``). A domain is the last two labels of a
    name, so the names below ``co.uk`` share a quarter.

    :param limit: maximum number of look-ups at once.
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
        """Return the addresses of *host* without duplicates.

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
        """Start looking up *host*, or join the look-up of other attempts that are asking for it now.

        :returns: a future for the addresses; ``None`` when all threads it might use are taken. The future is
            shared, and cannot be cancelled.
        """
        return self._begin((host, port), 0)

    def abort(self) -> None:
        """End every pending look-up, and refuse new ones."""
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
        except RuntimeError as exc:  # no thread could be started; the next look-up may try again
            self._end(name)
            _settle(future, exc)
        return future

    def _resolve(self, name: _Name, future: Future[list[str]]) -> None:
        outcome: list[str] | Exception
        try:
            outcome = list(dict.fromkeys(_address(answer) for answer in self._resolver(*name)))
        except Exception as exc:  # passed to the waiting attempts; the thread must be given back
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
    """Return the failure for a look-up that raised :exc:`OSError` or did not answer in time."""
    if isinstance(exc, OSError) and (shortage := descriptor_shortage(exc)) is not None:
        return shortage
    if isinstance(exc, FutureTimeoutError) and not exc.args:
        return Failure("dns", f"{host}: no answer in time")
    return Failure("dns", f"{host}: {getattr(exc, 'strerror', None) or exc}")


def _address(answer: str | tuple[Any, ...]) -> str:
    return answer if isinstance(answer, str) else str(answer[4][0])


def alternate(addresses: Sequence[str]) -> list[str]:
    """Return the addresses with alternating families, so that a broken family is left early (RFC 8305, 4)."""
    first_is_v6 = ":" in addresses[0]
    same = [address for address in addresses if (":" in address) is first_is_v6]
    other = [address for address in addresses if (":" in address) is not first_is_v6]
    turns = itertools.chain.from_iterable(itertools.zip_longest(same, other))
    return [address for address in turns if address is not None]
