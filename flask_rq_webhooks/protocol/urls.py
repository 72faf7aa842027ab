"""Which URLs and addresses a webhook may go to.

Contains parsing, the policy, and what may be shown of a URL. :meth:`UrlPolicy.check_url` checks a URL before
it is stored and again before it is used; :meth:`UrlPolicy.check_address` checks every address of its name
before a connection is opened. Does not know about DNS, sockets or SQL.

The standard library's ``is_global`` is not used: its answers differ between Python versions and miss ranges
(multicast, 168.63.129.16, NAT64, 6to4, IPv4-compatible addresses).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

import idna
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from ..errors import BlockedURLError, ConfigurationError

MAX_URL_LENGTH = 2048
_DEFAULT_PORTS = {"http": 80, "https": 443}

#: Names of the machine itself or of the cloud's metadata service, whatever DNS says.
_LOCAL_NAMES = frozenset((
    "localhost.localdomain", "localhost6.localdomain6", "metadata.google.internal", "metadata.goog",
    "instance-data.ec2.internal",
))  # fmt: skip

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
#: Control characters, spaces of every script, line and paragraph separators, surrogates, backslash.
_FORBIDDEN = re.compile(
    "[\x00-\x20\\\\\x7f-\xa0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ud800-\udfff\ufeff]"
)
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
#: Host names of containers and Windows machines; no public host name has underscores (RFC 1123, 2.1).
_INSIDE_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_DOTS = re.compile("[.\u3002\uff0e\uff61]")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_DOTTED_QUAD = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_IPV6_TEXT = re.compile(r"[0-9A-Fa-f:.]{2,45}")
#: Characters not allowed unescaped in a path or query (RFC 3986, 3.3 and 3.4); urllib3 sends others as is.
_UNSAFE = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9._~!$&'()*+,;=:@/?%-]")

_MESSAGES = {
    "not_text": "The URL must be a string.",
    "empty": "The URL is empty.",
    "too_long": f"The URL is longer than {MAX_URL_LENGTH} characters.",
    "characters": "The URL contains a space, a control character, a backslash or a lone surrogate.",
    "scheme": "The URL must start with https://.",
    "http": "http:// is not accepted here; use https://.",
    "userinfo": "The URL must not contain a user name or password.",
    "host": "The URL's host is not a valid host name or address.",
    "idna": "The URL's host is not a valid internationalised name.",
    "numeric_host": "An IPv4 address must be written as four decimal numbers.",
    "port": "The URL's port must be a number from 1 to 65535.",
    "ambiguous": "The URL is understood differently by different programs; write it plainly.",
    "local_name": "The URL's host is a local name; a public host name is needed.",
    "domain_not_allowed": "The URL's host is not one of the allowed domains.",
    "port_blocked": "The URL's port is not allowed.",
    "denied_network": "The destination address is in a network that is not allowed.",
    "private_address": "The destination address is not a public one.",
    "address": "The destination is not an IP address.",
}


def _refuse(code: str, cause: BaseException | None = None) -> NoReturn:
    raise BlockedURLError(_MESSAGES[code], code=code) from cause


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedURL:
    """A URL that was parsed strictly and may be used, as far as can be decided without DNS.

    :param url: normalised: ASCII, no fragment, no default port, host in lower case. Checking it again
        gives the same result.
    :param scheme: ``"http"`` or ``"https"``.
    :param host: ASCII, lower case, without brackets or trailing dot.
    :param port: the given port, or the scheme's default.
    :param target: path and query, as they appear in the request line.
    :param host_key: identifies one destination: the host, with its port unless that is the scheme's default.
    """

    url: str
    scheme: str
    host: str
    port: int
    target: str
    host_key: str


class UrlPolicy:
    """Decide where webhooks may go.

    Immutable; one instance serves all threads.

    :param allow_http: for development and tests: allows ``http://`` to loopback and to *allow_networks*, and
        makes loopback addresses reachable.
    :param allow_networks: private networks that may be reached.
    :param deny_networks: networks that may not be reached; wins over *allow_networks*.
    :param allowed_domains: if any is given, only these hosts and their sub-domains. ``"*.example.com"`` or
        ``".example.com"`` means only the sub-domains.
    :param blocked_ports: ports that may not be reached.
    :param allow_nat64: allow addresses in ``64:ff9b::/96`` that carry a public IPv4 address.
    :raises ConfigurationError: names the entry that is not a domain.
    """

    def __init__(
        self,
        *,
        allow_http: bool = False,
        allow_networks: Iterable[str | IPNetwork] = (),
        deny_networks: Iterable[str | IPNetwork] = (),
        allowed_domains: Iterable[str] = (),
        blocked_ports: Iterable[int] = (),
        allow_nat64: bool = False,
    ) -> None:
        self._allow_http = bool(allow_http)
        self._allow_networks = tuple(map(ipaddress.ip_network, allow_networks))
        self._deny_networks = tuple(map(ipaddress.ip_network, deny_networks))
        self._allowed_domains = tuple(map(_domain, allowed_domains))
        self._blocked_ports = frozenset(blocked_ports)
        self._allow_nat64 = bool(allow_nat64)
        self._loopback_allowed = self._allow_http or any(
            network.version == loopback.version and network.overlaps(loopback)
            for network in self._allow_networks
            for loopback in LOOPBACK
        )

    def check_url(self, url: str) -> CheckedURL:
        """Parse *url* strictly and refuse it if it may not be a destination.

        A literal address is judged here already; for a name, :meth:`check_address` judges the addresses it
        resolves to.

        :param url: untrusted text.
        :raises BlockedURLError: with one of the codes ``not_text``, ``empty``, ``too_long``, ``characters``,
            ``scheme``, ``http``, ``userinfo``, ``host``, ``idna``, ``numeric_host``, ``port``, ``ambiguous``,
            ``local_name``, ``domain_not_allowed``, ``port_blocked``, ``denied_network``, ``private_address``.
        """
        scheme, authority, rest = _split(url)
        if scheme == "http" and not self._allow_http:
            _refuse("http")
        raw_host, raw_port = _split_authority(authority)
        port = _parse_port(raw_port, scheme)
        address: IPAddress | None = _parse_literal(raw_host)
        host = str(address) if address is not None else _ascii_host(raw_host, bool(self._allow_networks))
        if address is None and _NUMERIC_LABEL.fullmatch(host.rpartition(".")[2]):
            if not _DOTTED_QUAD.fullmatch(raw_host):
                _refuse("numeric_host")
            address = ipaddress.IPv4Address(raw_host)

        if self._allowed_domains and not _covered(host, self._allowed_domains):
            _refuse("domain_not_allowed")
        if address is not None:
            self.check_address(host, port, scheme=scheme)
        else:
            self._check_name(host, scheme)
            if port in self._blocked_ports:
                _refuse("port_blocked")

        shown_host = f"[{host}]" if ":" in host else host
        is_default = port == _DEFAULT_PORTS[scheme]
        netloc = shown_host if is_default else f"{shown_host}:{port}"
        target = _target(rest)
        normalised = f"{scheme}://{netloc}{target}"
        if len(normalised) > MAX_URL_LENGTH:
            _refuse("too_long")
        _check_agreement(url, raw_host, raw_port)
        _check_agreement(normalised, host, None if is_default else str(port))
        key = host if is_default else netloc
        return CheckedURL(url=normalised, scheme=scheme, host=host, port=port, target=target, host_key=key)

    def check_address(
        self, ip: str, port: int, *, scheme: str = "https", nat64: Iterable[ipaddress.IPv6Network] = ()
    ) -> None:
        """Refuse an address to which no connection may be opened.

        Call it with every address that a name resolved to, before the first packet. An address within a
        NAT64 prefix leads to the IPv4 address it contains, so that one is judged too.

        :param ip: the address as text, without zone.
        :param port: the port to connect to.
        :param scheme: plain ``http`` may only go to loopback and to the allowed networks.
        :param nat64: NAT64 prefixes of this network, in addition to the well-known ``64:ff9b::/96``.
        :raises BlockedURLError: with one of the codes ``address``, ``port_blocked``, ``denied_network``,
            ``private_address``, ``http``.
        """
        if not isinstance(port, int) or not 1 <= port <= 65535:
            _refuse("port")
        if port in self._blocked_ports:
            _refuse("port_blocked")
        address = _parse_address(ip)
        if inside(address, self._deny_networks):
            _refuse("denied_network")
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
            if inside(address, self._deny_networks):
                _refuse("denied_network")
        if inside(address, self._allow_networks) or (self._allow_http and inside(address, LOOPBACK)):
            return
        embedded = nat64_ipv4(address, nat64)
        if embedded is not None:
            if inside(embedded, self._deny_networks):
                _refuse("denied_network")
            if not is_public(embedded):
                _refuse("private_address")
        if not is_public(address) and (embedded is None or not self._allow_nat64):
            _refuse("private_address")
        if scheme != "https":
            _refuse("http")

    def _check_name(self, host: str, scheme: str) -> None:
        if host == "localhost" or host.endswith(".localhost"):
            if not self._loopback_allowed:
                _refuse("local_name")
            return
        if self._allow_networks:
            return  # operators' own names, of any form, may lead to these networks; addresses are judged
        if scheme == "http":
            _refuse("http")
        if host in _LOCAL_NAMES or ("." not in host and not self._allowed_domains):
            _refuse("local_name")


def redact_url(url: object) -> str:
    """Return the part of *url* that may be shown to people and written to logs.

    Keeps scheme, host and port; drops user name, query and fragment; keeps only plain words, versions and
    short numbers of the path, because many services put their secret there. Never raises.

    :param url: any text, also a malformed URL.
    """
    form = r"([A-Za-z][A-Za-z0-9+.-]{0,15})://([^/?#]*)([^?#]*)"
    match = re.match(form, url, re.ASCII | re.DOTALL) if isinstance(url, str) else None
    if match is None:
        return "…"
    scheme, authority, path = match.groups()
    host = authority.rpartition("@")[2]
    if not re.fullmatch(r"[\w.:\[\]-]{1,260}", host):
        host = "…"
    segments = [segment if _is_plain_segment(segment) else "…" for segment in path.split("/")[:32]]
    return f"{scheme.lower()}://{host}{'/'.join(segments)}"


_PLAIN_WORD = (
    r"(?:[a-z]{1,15}[0-9]{0,2}"  # hooks, v2, step10
    r"|[A-Z]{1,6}"
    r"|(?:[A-Z]?[a-z]{2,12})(?:[A-Z][a-z]{2,12}){0,3}"  # Hooks, webHooks, JobDoneHook
    r"|[0-9]{1,4})"
)
_PLAIN_SEGMENT = re.compile(rf"{_PLAIN_WORD}(?:[-_.]{_PLAIN_WORD}){{0,3}}", re.ASCII)


def _is_plain_segment(segment: str) -> bool:
    if len(segment) > 32 or (segment and not _PLAIN_SEGMENT.fullmatch(segment)):
        return False
    return sum(character.isdigit() for character in segment) <= 6


def _split(url: Any) -> tuple[str, str, str]:
    """Return scheme, authority and the rest, which is empty or starts with ``/``, ``?`` or ``#``."""
    if not isinstance(url, str):
        _refuse("not_text")
    if not url:
        _refuse("empty")
    if len(url) > MAX_URL_LENGTH:
        _refuse("too_long")
    if _FORBIDDEN.search(url):
        _refuse("characters")
    match = _SCHEME.match(url)
    if match is None or match[1].lower() not in _DEFAULT_PORTS:
        _refuse("scheme")
    after = url[match.end() :]
    end = next((index for index, character in enumerate(after) if character in "/?#"), len(after))
    return match[1].lower(), after[:end], after[end:]


def _split_authority(authority: str) -> tuple[str, str | None]:
    if "@" in authority:
        _refuse("userinfo")
    if authority.startswith("["):
        host, bracket, after = authority.partition("]")
        if not bracket or (after and not after.startswith(":")):
            _refuse("host")
        return host + bracket, after[1:] if after else None
    host, colon, port = authority.partition(":")
    if not host or ":" in port:
        _refuse("host")
    return host, port if colon else None


def _parse_port(text: str | None, scheme: str) -> int:
    if text is None:
        return _DEFAULT_PORTS[scheme]
    if not _PORT.fullmatch(text) or int(text) > 65535:
        _refuse("port")
    return int(text)


def _parse_literal(host: str) -> ipaddress.IPv6Address | None:
    if not host.startswith("["):
        return None
    text = host[1:-1]
    if not _IPV6_TEXT.fullmatch(text):  # no zone, no IPvFuture
        _refuse("host")
    try:
        return ipaddress.IPv6Address(text)
    except ValueError as exc:
        _refuse("host", exc)


def _ascii_host(host: str, underscores: bool) -> str:
    """Return the host name in lower case and ASCII, without trailing dot.

    :param underscores: whether to accept them, because an operator's own network may have such names.
    """
    if len(host) > 254:
        _refuse("host")
    labels = _DOTS.split(host) if not host.isascii() else host.lower().split(".")
    if len(labels) > 1 and labels[-1] == "":
        labels.pop()
    ascii_labels = [_ascii_label(label, underscores) for label in labels]
    if not host.isascii() and not any(label.startswith("xn--") for label in ascii_labels):
        _refuse("idna")  # other programs may read another host than we do, as in 127。0。0。1
    name = ".".join(ascii_labels)
    if len(name) > 253:
        _refuse("host")
    return name


def _ascii_label(label: str, underscores: bool) -> str:
    """Return one label as an A-label, or as letters, digits and hyphens (RFC 5890, 2.3)."""
    try:
        if label.isascii():
            label = label.lower()
            if label.startswith("xn--"):
                idna.ulabel(label)
        else:
            label = idna.encode(label, uts46=True, std3_rules=True).decode("ascii")
            if not label.startswith("xn--"):  # ｅxample, ①②⑦: ASCII in disguise
                _refuse("idna")
    except (UnicodeError, ValueError, IndexError) as exc:
        _refuse("idna", exc)
    if not (_INSIDE_LABEL if underscores else _LABEL).fullmatch(label):
        _refuse("host")
    return label


def _target(rest: str) -> str:
    """Return path and query as sent over the wire; existing escapes stay, because URLs may be signed."""
    path, mark, query = rest.partition("#")[0].partition("?")
    return _UNSAFE.sub(lambda found: quote(found[0], safe=""), (path or "/") + mark + query)


def _check_agreement(url: str, host: str, port: str | None) -> None:
    """Refuse a URL that either of the two parsers used before the socket reads differently from us."""
    expected = (host.strip("[]").lower(), None if port is None else int(port), None)
    try:
        by_stdlib = urlsplit(url)
        seen = [(by_stdlib.hostname, by_stdlib.port, by_stdlib.username)]
        if host.isascii():  # urllib3 encodes other hosts itself, so the normalised form is compared
            by_urllib3 = parse_url(url)
            seen.append(((by_urllib3.host or "").strip("[]").lower(), by_urllib3.port, by_urllib3.auth))
    except (ValueError, LocationParseError) as exc:
        _refuse("ambiguous", exc)
    if any(parsed != expected for parsed in seen):
        _refuse("ambiguous")


def _parse_address(ip: Any) -> IPAddress:
    if not isinstance(ip, str) or "%" in ip:
        _refuse("address")
    try:
        return ipaddress.ip_address(ip)
    except ValueError as exc:
        _refuse("address", exc)


def _domain(entry: Any) -> str:
    """Return the entry in ASCII; a leading dot means only the sub-domains."""
    try:
        if not isinstance(entry, str) or not entry.isprintable():
            _refuse("host")
        if entry.startswith("["):
            return str(_parse_literal(entry))
        name = entry.removeprefix("*")
        sub_domains_only = name.startswith(".")
        ascii_name = _ascii_host(name.removeprefix("."), True)
    except BlockedURLError as exc:
        raise ConfigurationError(
            f"ALLOWED_DOMAINS contains {entry!r}, which is not a host name; write it like 'example.com' "
            "(without scheme, port or path; sub-domains are included)."
        ) from exc
    return f".{ascii_name}" if sub_domains_only else ascii_name


def _covered(host: str, domains: tuple[str, ...]) -> bool:
    if ":" in host or _DOTTED_QUAD.fullmatch(host):
        return host in domains
    return any(
        host.endswith(domain) if domain.startswith(".") else host == domain or host.endswith(f".{domain}")
        for domain in domains
    )


# -- which addresses are public ---------------------------------------------------------------------------

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Networks without public receivers. Source: IANA IPv4 Special-Purpose Address Registry, plus multicast,
#: the deprecated 6to4 relays, and two addresses outside the registry on which clouds serve secrets.
_IPV4_DENIED = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8",  # "this network"; Linux connects 0.0.0.0 to itself
    "10.0.0.0/8", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
    "100.64.0.0/10",  # carrier-grade NAT; 100.100.100.200 is Alibaba's metadata
    "168.63.129.16/32",  # Azure's host agent, inside a public range
    "169.254.0.0/16",  # link local; 169.254.169.254 is the metadata of most clouds
    "192.0.0.0/24",  # 192.0.0.192 is Oracle's metadata
    "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.175.48.0/24",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
)))  # fmt: skip
#: The rest of IPv6 is not, or not yet, part of the public internet.
_IPV6_PUBLIC = ipaddress.IPv6Network("2000::/3")
_IPV6_DENIED = tuple(map(ipaddress.IPv6Network, (
    "2001::/23",  # Teredo, ORCHID, benchmarking
    "2001:db8::/32", "3fff::/20",
    "2002::/16",  # 6to4: carries any IPv4 address
)))  # fmt: skip
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
LOOPBACK: tuple[IPNetwork, ...] = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128"))
#: Upper half of an ISATAP interface identifier; the lower half is an IPv4 address (RFC 5214, 6.1).
_ISATAP = (0x00005EFE, 0x02005EFE)


def inside(address: IPAddress, networks: tuple[IPNetwork, ...]) -> bool:
    """Return whether *address* is in one of *networks*."""
    return any(address in network for network in networks)


def is_public(address: IPAddress) -> bool:
    """Return whether an untrusted client's webhook may be sent to *address*."""
    if isinstance(address, ipaddress.IPv4Address):
        return not inside(address, _IPV4_DENIED)
    is_isatap = (int(address) >> 32) & 0xFFFFFFFF in _ISATAP
    return address in _IPV6_PUBLIC and not inside(address, _IPV6_DENIED) and not is_isatap


def nat64_ipv4(
    address: IPAddress, prefixes: Iterable[ipaddress.IPv6Network] = ()
) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address to which a NAT64 gateway translates *address*; ``None`` for any other.

    :param prefixes: NAT64 prefixes of this network, in addition to the well-known one.
    """
    if isinstance(address, ipaddress.IPv6Address):
        for prefix in (_NAT64, *prefixes):
            if address in prefix:
                return embedded_ipv4(address, prefix.prefixlen)
    return None


def embedded_ipv4(address: ipaddress.IPv6Address, length: int) -> ipaddress.IPv4Address:
    """Return the IPv4 address after the prefix, skipping the byte that is always zero (RFC 6052, 2.2)."""
    after = [byte for index, byte in enumerate(address.packed) if index >= length // 8 and index != 8]
    return ipaddress.IPv4Address(bytes(after[:4]))
