"""Open a connection to one of the addresses that were judged, and to nothing else."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from .destinations import check_peer
from .failures import Failure


def open_one(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Return a socket connected to the first of *addresses* that answers.

    :param deadline: on :func:`time.monotonic`'s clock.
    :raises Failure: ``connect``, when none does.
    """
    reasons = []
    for tried, address in enumerate(addresses):
        # The first addresses may not use up the time of the others.
        share_s = (deadline - time.monotonic()) / (len(addresses) - tried)
        if share_s <= 0:
            reasons.append("no time left")
            break
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return _open(family, address, port, share_s)
        except OSError as exc:
            reasons.append(refusal(address, exc))
    raise Failure("connect", "; ".join(reasons))


def refusal(address: str, exc: OSError) -> str:
    """Return for people why there is no connection to *address*."""
    return f"{address}: {'timed out' if isinstance(exc, TimeoutError) else exc.strerror or exc}"


def _open(family: socket.AddressFamily, address: str, port: int, timeout_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect((address, port))
        check_peer(sock.getpeername()[0], address)
    except BaseException:
        sock.close()
        raise
    return sock
