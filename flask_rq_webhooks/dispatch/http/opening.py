"""Open a connection to one of the addresses that were judged, and to nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from .address_guard import check_peer
from .transport_errors import Failure, own_shortage


def open_one(
    addresses: Sequence[str], port: int, deadline: float, begun: Callable[[socket.socket], None]
) -> socket.socket:
    """Return a socket connected to the first of *addresses* that answers.

    :param deadline: on :func:`time.monotonic`'s clock.
    :param begun: is given every socket before it is connected, so that others can shut it down.
    :raises Failure: ``connect``, when none does.
    """
    reasons: list[str] = []
    for address, share_s in _in_turn(addresses, deadline, reasons):
        try:
            return _open(address, port, share_s, begun)
        except OSError as exc:
            reasons.append(_refusal(address, exc))
    raise Failure("connect", "; ".join(reasons))


async def open_one_in_loop(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Do what :func:`open_one` does, in the running event loop."""
    reasons: list[str] = []
    for address, share_s in _in_turn(addresses, deadline, reasons):
        try:
            return await _open_in_loop(address, port, share_s)
        except OSError as exc:
            reasons.append(_refusal(address, exc))
    raise Failure("connect", "; ".join(reasons))


def _in_turn(addresses: Sequence[str], deadline: float, reasons: list[str]) -> Iterator[tuple[str, float]]:
    """Give each address with the seconds it may take: the first may not use up the time of the others."""
    for tried, address in enumerate(addresses):
        share_s = (deadline - time.monotonic()) / (len(addresses) - tried)
        if share_s <= 0:
            reasons.append("no time left")
            return
        yield address, share_s


def _refusal(address: str, exc: OSError) -> str:
    if (shortage := own_shortage(exc)) is not None:
        raise shortage from exc
    if isinstance(exc, TimeoutError):
        return f"{address}: timed out"
    return f"{address}: {os.strerror(exc.errno) if exc.errno else exc}"


def _open(address: str, port: int, timeout_s: float, begun: Callable[[socket.socket], None]) -> socket.socket:
    sock = _socket_for(address)
    try:
        begun(sock)
        sock.settimeout(timeout_s)
        sock.connect((address, port))
        check_peer(sock.getpeername()[0], address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _open_in_loop(address: str, port: int, timeout_s: float) -> socket.socket:
    sock = _socket_for(address)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
        check_peer(sock.getpeername()[0], address)
    except BaseException:
        sock.close()
        raise
    return sock


def _socket_for(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
