"""SECURITY 1–2, 6: a corpus of hostile and ordinary URLs, and ssrfguard as a second opinion."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import ssrfguard

from flask_rq_webhooks.errors import BlockedURLError
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.unit.url_corpus import CASES, DNS

POLICY = UrlPolicy()
ORACLE = ssrfguard.Policy(
    allowed_schemes=frozenset({"https"}),
    allowed_ports=frozenset(range(1, 65536)),
    max_url_length=2048,
)


def resolve(host: str) -> list[str]:
    """Answer as glibc would: shorthand IPv4 is an address, other names come from the corpus."""
    if ":" in host:
        return [host]
    try:
        return [socket.inet_ntoa(socket.inet_aton(host))]
    except OSError:
        if host.rstrip(".") not in DNS:
            raise socket.gaierror(socket.EAI_NONAME, "unknown name") from None
        return DNS[host.rstrip(".")]


def getaddrinfo(host: str | bytes, port: int, *_args: Any, **_options: Any) -> list[tuple[Any, ...]]:
    name = host.decode() if isinstance(host, bytes) else host
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (ip, port, 0, 0))
        if ":" in ip
        else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
        for ip in resolve(name)
    ]


def our_refusal(url: str) -> str | None:
    try:
        checked = POLICY.check_url(url)
        for ip in resolve(checked.host):
            POLICY.check_address(ip, checked.port, scheme=checked.scheme)
    except BlockedURLError as exc:
        return exc.code
    return None


def oracle_refuses(url: str) -> bool:
    try:
        ssrfguard.resolve(ORACLE.check_url(url), policy=ORACLE, resolver=getaddrinfo)
    except (ssrfguard.SSRFGuardError, OSError, ValueError):
        return True
    return False


def test_the_corpus_is_large_and_has_no_repeats() -> None:
    urls = [case.url for case in CASES]
    assert len(urls) == len(set(urls))
    assert len(urls) >= 300
    assert sum(case.code is None for case in CASES) >= 75


def test_every_url_meets_its_verdict() -> None:
    got = {case.url: our_refusal(case.url) for case in CASES}
    assert got == {case.url: case.code for case in CASES}


def test_every_disagreement_with_ssrfguard_is_explained() -> None:
    disagreements = {
        case.url for case in CASES if oracle_refuses(case.url) != (our_refusal(case.url) is not None)
    }
    assert disagreements == {case.url for case in CASES if case.differs is not None}


def test_no_disagreement_is_an_escape() -> None:
    """Where we accept what ssrfguard refuses, the destination must be public by any table."""
    for case in CASES:
        if case.code is None and oracle_refuses(case.url):
            for ip in resolve(POLICY.check_url(case.url).host):
                assert ipaddress.ip_address(ip).is_global, case.url


def test_development_settings_open_loopback_and_nothing_else() -> None:
    """ALLOW_HTTP lets a refused URL through only if all it reaches is loopback."""
    policy = UrlPolicy(allow_http=True)
    opened = 0
    for case in CASES:
        if case.code is None:
            continue
        try:
            checked = policy.check_url(case.url)
            addresses = [ipaddress.ip_address(ip.partition("%")[0]) for ip in resolve(checked.host)]
            for address in addresses:
                policy.check_address(str(address), checked.port, scheme=checked.scheme)
        except (BlockedURLError, socket.gaierror):
            continue
        opened += 1
        for address in addresses:
            mapped = getattr(address, "ipv4_mapped", None) or address
            assert mapped.is_loopback, case.url
    assert opened
