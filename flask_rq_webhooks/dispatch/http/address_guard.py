"""Which URL and which address an attempt may use, and the only place where a connection is opened.

The policy is asked at every step: the URL before anything else, every address of a name before the first
packet, and the peer after connecting (SECURITY 3).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from ...errors import BlockedURLError
from ...protocol.addresses import NAT64_PROBE, nat64_ipv4, nat64_prefixes
from ...protocol.urls import CheckedURL, UrlPolicy
from .deadline import RunningAttempt, SocketHandle
from .dns import MAX_ADDRESSES, Lookups, alternate
from .transport_errors import Failure, descriptor_shortage

#: Addresses of one name at most. An answer may hold thousands, and judging them would delay other attempts.
_MAX_JUDGED = 256
#: Seconds for which the NAT64 prefixes of this network are believed, and seconds their look-up may take.
NAT64_LASTS_S = 300.0
NAT64_WAIT_S = 1.0


class AddressGuard:
    """Apply the URL policy to attempts, and open their connections.

    :param policy: what may be reached.
    :param lookups: resolves names.
    """

    def __init__(self, policy: UrlPolicy, lookups: Lookups) -> None:
        self._policy = policy
        self._lookups = lookups
        # The policy never changes, so neither does its answer; the same few endpoints are used all day.
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
        """Open a connection for *attempt* to an address that was judged before the first packet.

        :param through_proxy: *host* is the operator's own proxy, which decides about addresses itself.
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
        """Judge every address of a host and return those to connect to.

        An address that DNS64 made of a public IPv4 address of the name is left out, if the policy refuses
        such addresses: the name is then reached by its IPv4 address.

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
        """Return the NAT64 prefixes of this network, looked up once in a while."""
        now = time.monotonic()
        if now >= self._nat64_until:
            self._nat64_until = now + NAT64_LASTS_S  # others do not wait for the look-up
            self._nat64 = find_nat64(self._lookups, min(deadline, now + NAT64_WAIT_S))
        return self._nat64


def find_nat64(lookups: Lookups, deadline: float) -> tuple[ipaddress.IPv6Network, ...]:
    """Return the NAT64 prefixes of this network; none where DNS does not answer in time.

    :param deadline: on :func:`time.monotonic`'s clock.
    """
    try:
        return nat64_prefixes(lookups.look_up(NAT64_PROBE, 443, deadline))
    except Failure:  # no such name: no NAT64, or no answer from DNS
        return ()


def is_literal(host: str) -> bool:
    """Say whether *host* is an address, which needs no look-up."""
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
    """Yield each address with its share of the time: the first may not use up what the others need."""
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
