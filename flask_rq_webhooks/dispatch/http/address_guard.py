"""Which URL and which address an attempt may use: the policy, asked at every step of the way.

Both transports ask here, so that there is one place where a request may be refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from ...errors import BlockedURLError
from ...protocol.urls import CheckedURL, UrlPolicy
from .transport_errors import Failure

#: Addresses of one name at most. An answer may hold thousands, and judging them would hold up others.
_MAX_JUDGED = 256


class Destinations:
    """The policy, in the words of an attempt.

    :param policy: what may be reached.
    """

    def __init__(self, policy: UrlPolicy) -> None:
        self._policy = policy
        # The policy never changes, so neither does its answer; the same few endpoints are sent to all day.
        self._check_url = lru_cache(maxsize=256)(policy.check_url)

    def check_url(self, url: str) -> CheckedURL:
        """Return *url* parsed.

        :raises Failure: ``blocked``, when the policy refuses it.
        """
        try:
            return self._check_url(url)
        except BlockedURLError as exc:
            raise Failure("blocked", f"{exc.code}: {exc}") from exc

    def check_addresses(self, checked: CheckedURL, addresses: Sequence[str]) -> None:
        """Judge every address the host of *checked* has, before the first packet to any of them.

        :raises Failure: ``blocked``, when one of them is refused; ``dns``, when they are too many.
        """
        if len(addresses) > _MAX_JUDGED:
            raise Failure("dns", f"{checked.host} has {len(addresses)} addresses")
        for address in addresses:
            try:
                self._policy.check_address(address, checked.port, scheme=checked.scheme)
            except BlockedURLError as exc:
                raise Failure("blocked", f"{exc.code}: {checked.host} has the address {address}") from exc


def check_peer(peer: str, address: str) -> None:
    """Make sure that a connection leads to the address it was opened to.

    :raises Failure: ``blocked``, when it does not.
    """
    if peer != address and ipaddress.ip_address(peer.partition("%")[0]) != ipaddress.ip_address(address):
        raise Failure("blocked", f"connected to {peer} instead of {address}")


def is_literal(host: str) -> bool:
    """Say whether *host* is an address, which needs no look-up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
