"""Which addresses are public, and which IPv4 address hides in one of a NAT64 network.

The standard library's ``is_global`` is not used: its answers differ between Python versions and miss ranges
(multicast, 168.63.129.16, NAT64, 6to4, IPv4-compatible addresses). Knows nothing of settings and names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

#: No public receiver lives here. Source: IANA IPv4 Special-Purpose Address Registry,
#: plus multicast, the deprecated 6to4 relays, and two addresses outside of it on which clouds serve secrets.
_IPV4_DENIED = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # "this network"; Linux connects 0.0.0.0 to itself
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; 100.100.100.200 is Alibaba's metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host agent, inside a public range
        "169.254.0.0/16",  # link local; 169.254.169.254 is the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # 192.0.0.192 is Oracle's metadata
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
#: The rest of IPv6 is not, or not yet, the public internet.
_IPV6_PUBLIC = ipaddress.IPv6Network("2000::/3")
_IPV6_DENIED = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # Teredo, ORCHID, benchmarking
        "2001:db8::/32",
        "2002::/16",  # 6to4: carries any IPv4 address
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
LOOPBACK: tuple[IPNetwork, ...] = (
    ipaddress.IPv4Network("127.0.0.0/8"),
    ipaddress.IPv6Network("::1/128"),
)
#: Upper half of an ISATAP interface identifier; the lower half is an IPv4 address (RFC 5214, 6.1).
_ISATAP = (0x00005EFE, 0x02005EFE)
#: The name whose only IPv4 addresses are known to all, so that what DNS64 makes of them shows the prefix
#: (RFC 7050, 2).
NAT64_PROBE = "ipv4only.arpa"
_PROBE_ADDRESSES = (ipaddress.IPv4Address("192.0.0.170"), ipaddress.IPv4Address("192.0.0.171"))
#: RFC 6052, 2.2.
_PREFIX_LENGTHS = (96, 64, 56, 48, 40, 32)


def inside(address: IPAddress, networks: tuple[IPNetwork, ...]) -> bool:
    """Say whether *address* is in one of *networks*."""
    return any(address in network for network in networks)


def is_public(address: IPAddress) -> bool:
    """Say whether a webhook of a stranger may be sent to *address*."""
    if isinstance(address, ipaddress.IPv4Address):
        return not inside(address, _IPV4_DENIED)
    if address not in _IPV6_PUBLIC or inside(address, _IPV6_DENIED):
        return False
    return (int(address) >> 32) & 0xFFFFFFFF not in _ISATAP


def nat64_ipv4(
    address: IPAddress, prefixes: Iterable[ipaddress.IPv6Network] = ()
) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address to which a NAT64 gateway translates *address*; ``None`` for any other.

    :param prefixes: of this network, beside the well-known one.
    """
    if isinstance(address, ipaddress.IPv6Address):
        for prefix in (_NAT64, *prefixes):
            if address in prefix:
                return _embedded(address, prefix.prefixlen)
    return None


def nat64_prefixes(addresses: Iterable[str]) -> tuple[ipaddress.IPv6Network, ...]:
    """Return the NAT64 prefixes of a network, the well-known one included.

    :param addresses: of :data:`NAT64_PROBE`, as this network's resolver has them.
    """
    found: dict[ipaddress.IPv6Network, None] = {}
    for text in addresses:
        try:
            address = ipaddress.IPv6Address(text)
        except ValueError:  # IPv4
            continue
        for length in _PREFIX_LENGTHS:
            if _embedded(address, length) in _PROBE_ADDRESSES:
                found[ipaddress.IPv6Network((address, length), strict=False)] = None
                break
    return tuple(found)


def _embedded(address: ipaddress.IPv6Address, length: int) -> ipaddress.IPv4Address:
    """Return the four bytes after the prefix, without the byte that is always zero (RFC 6052, 2.2)."""
    after = [byte for index, byte in enumerate(address.packed) if index >= length // 8 and index != 8]
    return ipaddress.IPv4Address(bytes(after[:4]))
