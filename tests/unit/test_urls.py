"""The URL policy: parsing, the address table, options, and what of a URL is shown."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from urllib3.util import parse_url

from flask_rq_webhooks.dispatch.http.address_guard import nat64_prefixes
from flask_rq_webhooks.errors import BlockedURLError, ConfigurationError
from flask_rq_webhooks.protocol.urls import MAX_URL_LENGTH, UrlPolicy, nat64_ipv4, redact_url


def refusal(policy: UrlPolicy, url: object) -> str | None:
    """Return the code *url* is refused with, or ``None``."""
    try:
        policy.check_url(url)  # type: ignore[arg-type]
    except BlockedURLError as exc:
        return exc.code
    return None


def address_refusal(policy: UrlPolicy, ip: str, port: int = 443, scheme: str = "https") -> str | None:
    try:
        policy.check_address(ip, port, scheme=scheme)
    except BlockedURLError as exc:
        return exc.code
    return None


@pytest.mark.parametrize(
    ("url", "normalised", "host", "port", "target", "host_key"),
    [
        ("https://example.com", "https://example.com/", "example.com", 443, "/", "example.com"),
        (
            "HTTPS://Example.COM:443/A?b#c",
            "https://example.com/A?b",
            "example.com",
            443,
            "/A?b",
            "example.com",
        ),
        (
            "https://example.com.:8443",
            "https://example.com:8443/",
            "example.com",
            8443,
            "/",
            "example.com:8443",
        ),
        ("https://example.com?a=b", "https://example.com/?a=b", "example.com", 443, "/?a=b", "example.com"),
        ("https://8.8.8.8:80/", "https://8.8.8.8:80/", "8.8.8.8", 80, "/", "8.8.8.8:80"),
        (
            "https://[2606:4700:0:0::1111]:8443/x",
            "https://[2606:4700::1111]:8443/x",
            "2606:4700::1111",
            8443,
            "/x",
            "[2606:4700::1111]:8443",
        ),
        ("https://[2606:4700::1]/", "https://[2606:4700::1]/", "2606:4700::1", 443, "/", "2606:4700::1"),
        (
            "https://Bücher.example/ü?q=é&r=%c3%a9#ß",
            "https://xn--bcher-kva.example/%C3%BC?q=%C3%A9&r=%c3%a9",
            "xn--bcher-kva.example",
            443,
            "/%C3%BC?q=%C3%A9&r=%c3%a9",
            "xn--bcher-kva.example",
        ),
        (
            "https://example.com/%zz|{a}",
            "https://example.com/%25zz%7C%7Ba%7D",
            "example.com",
            443,
            "/%25zz%7C%7Ba%7D",
            "example.com",
        ),
        (
            "https://example.com//a/../b",
            "https://example.com//a/../b",
            "example.com",
            443,
            "//a/../b",
            "example.com",
        ),
    ],
    ids=["bare", "case", "trailing-dot", "query-only", "ipv4", "ipv6-port", "ipv6", "idn", "escapes", "dots"],
)
def test_an_accepted_url_is_taken_apart_and_normalised(
    url: str, normalised: str, host: str, port: int, target: str, host_key: str
) -> None:
    checked = UrlPolicy().check_url(url)
    assert (checked.url, checked.host, checked.port, checked.target, checked.host_key) == (
        normalised,
        host,
        port,
        target,
        host_key,
    )
    assert checked.scheme == "https"


@pytest.mark.parametrize("value", [None, 1, b"https://example.com/", ["https://example.com/"], {}, object()])
def test_what_is_not_text_is_refused(value: object) -> None:
    assert refusal(UrlPolicy(), value) == "not_text"


def test_a_refusal_does_not_repeat_the_url() -> None:
    with pytest.raises(BlockedURLError) as caught:
        UrlPolicy().check_url("https://user:hunter2@example.com/secret")
    assert "hunter2" not in str(caught.value)
    assert "secret" not in str(caught.value)


class TestAllowHttp:
    @pytest.mark.parametrize(
        "url",
        [
            "http://localhost:8080/",
            "http://app.localhost/",
            "http://127.0.0.1:5000/x",
            "http://127.9.9.9/",
            "http://[::1]:80/",
            "http://[::ffff:127.0.0.1]/",
            "https://127.0.0.1:8443/",
            "https://localhost/",
            "https://example.com/",
        ],
    )
    def test_loopback_is_reachable(self, url: str) -> None:
        assert refusal(UrlPolicy(allow_http=True), url) is None

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("http://example.com/", "http"),
            ("http://receiver/", "http"),
            ("http://8.8.8.8/", "http"),
            ("http://10.0.0.1/", "private_address"),
            ("http://169.254.169.254/", "private_address"),
            ("http://0.0.0.0/", "private_address"),
            ("https://10.0.0.1/", "private_address"),
        ],
    )
    def test_nothing_else_is(self, url: str, code: str) -> None:
        assert refusal(UrlPolicy(allow_http=True), url) == code

    def test_with_networks_http_reaches_them_by_address_and_by_name(self) -> None:
        policy = UrlPolicy(allow_http=True, allow_networks=["10.1.0.0/16"])
        assert refusal(policy, "http://10.1.2.3:8080/") is None
        assert refusal(policy, "http://receiver:8080/") is None
        assert refusal(policy, "http://10.2.0.1/") == "private_address"

    def test_a_name_may_only_lead_where_plain_http_may_go(self) -> None:
        policy = UrlPolicy(allow_http=True, allow_networks=["10.1.0.0/16"])
        assert address_refusal(policy, "10.1.0.9", 80, "http") is None
        assert address_refusal(policy, "127.0.0.1", 80, "http") is None
        assert address_refusal(policy, "::1", 80, "http") is None
        assert address_refusal(policy, "8.8.8.8", 80, "http") == "http"
        assert address_refusal(policy, "10.2.0.1", 80, "http") == "private_address"
        assert address_refusal(policy, "8.8.8.8", 443, "https") is None


class TestNetworks:
    def test_allowed_ones_are_reached_over_https_only(self) -> None:
        policy = UrlPolicy(allow_networks=["10.0.0.0/8", ipaddress.ip_network("fd00::/8")])
        assert refusal(policy, "https://10.1.2.3/") is None
        assert refusal(policy, "https://[fd00::1]/") is None
        assert refusal(policy, "https://intranet/") is None
        assert refusal(policy, "http://10.1.2.3/") == "http"
        assert refusal(policy, "https://192.168.0.1/") == "private_address"
        assert refusal(policy, "https://localhost/") == "local_name"

    def test_an_ipv4_network_covers_its_mapped_form(self) -> None:
        assert address_refusal(UrlPolicy(allow_networks=["10.0.0.0/8"]), "::ffff:10.0.0.1") is None
        assert address_refusal(UrlPolicy(deny_networks=["8.0.0.0/8"]), "::ffff:8.8.8.8") == "denied_network"

    def test_denied_ones_win(self) -> None:
        policy = UrlPolicy(allow_networks=["10.0.0.0/8"], deny_networks=["10.9.0.0/16", "8.8.8.0/24"])
        assert refusal(policy, "https://10.9.0.1/") == "denied_network"
        assert refusal(policy, "https://8.8.8.8/") == "denied_network"
        assert refusal(policy, "https://10.8.0.1/") is None


class TestNat64:
    def test_by_opt_in_the_address_inside_is_judged(self) -> None:
        policy = UrlPolicy(allow_nat64=True, allow_http=True, allow_networks=["10.0.0.0/8"])
        assert refusal(policy, "https://[64:ff9b::8.8.8.8]/") is None
        for inside in ("127.0.0.1", "169.254.169.254", "10.0.0.1", "168.63.129.16", "0.0.0.0", "224.0.0.1"):
            assert refusal(policy, f"https://[64:ff9b::{inside}]/") == "private_address", inside
        assert refusal(policy, "https://[64:ff9b:1::8.8.8.8]/") == "private_address"

    def test_denied_networks_hold_inside_too(self) -> None:
        policy = UrlPolicy(allow_nat64=True, deny_networks=["8.8.8.0/24"])
        assert refusal(policy, "https://[64:ff9b::8.8.8.8]/") == "denied_network"


class TestAllowedDomains:
    @pytest.mark.parametrize(
        "url",
        [
            "https://example.com/",
            "https://EXAMPLE.com./",
            "https://example.com:8443/",
            "https://hooks.example.com/",
            "https://a.b.example.com/",
            "https://xn--bcher-kva.example/",
            "https://bücher.example/",
            "https://shop.bücher.example/",
            "https://8.8.8.8/",
            "https://[2606:4700::1]/",
            "https://sub.only.test/",
        ],
    )
    def test_exact_and_sub_domains_pass(self, url: str) -> None:
        assert refusal(self.policy(), url) is None

    @pytest.mark.parametrize(
        "url",
        [
            "https://example.org/",
            "https://notexample.com/",
            "https://example.com.evil.test/",
            "https://com/",
            "https://evil.test/example.com",
            "https://8.8.8.9/",
            "https://8.8.8.80/",
            "https://127.0.0.1/",
            "https://localhost/",
            "https://only.test/",
            "https://notonly.test/",
        ],
    )
    def test_others_do_not(self, url: str) -> None:
        assert refusal(self.policy(), url) == "domain_not_allowed"

    def policy(self) -> UrlPolicy:
        return UrlPolicy(
            allowed_domains=["Example.com.", "bücher.example", "8.8.8.8", "[2606:4700::1]", "*.only.test"]
        )

    def test_being_listed_makes_no_address_public(self) -> None:
        policy = UrlPolicy(allowed_domains=["127.0.0.1", "localhost", "intranet"])
        assert refusal(policy, "https://127.0.0.1/") == "private_address"
        assert refusal(policy, "https://localhost/") == "local_name"
        assert refusal(policy, "https://intranet/") is None  # a name; its addresses are still judged
        assert address_refusal(policy, "10.0.0.1") == "private_address"

    @pytest.mark.parametrize(
        "entry", ["", "https://example.com", "example.com:443", "a b", "*", "ex*.com", "a..b"]
    )
    def test_a_bad_entry_is_named(self, entry: str) -> None:
        with pytest.raises(ConfigurationError, match="ALLOWED_DOMAINS"):
            UrlPolicy(allowed_domains=[entry])


class TestBlockedPorts:
    def test_they_are_refused_by_url_and_by_address(self) -> None:
        policy = UrlPolicy(blocked_ports=[25, 443])
        assert refusal(policy, "https://example.com:25/") == "port_blocked"
        assert refusal(policy, "https://example.com/") == "port_blocked"
        assert refusal(policy, "https://8.8.8.8:25/") == "port_blocked"
        assert refusal(policy, "https://example.com:8443/") is None
        assert address_refusal(policy, "8.8.8.8", 25) == "port_blocked"


@pytest.mark.parametrize(
    "ip", ["", "localhost", "8.8.8", "8.8.8.8%eth0", "fe80::1%1", "08.8.8.8", "[::1]", "٨.8.8.8"]
)
def test_what_is_no_address_is_refused(ip: str) -> None:
    assert address_refusal(UrlPolicy(), ip) == "address"


def test_an_address_without_a_scheme_is_judged_as_for_https() -> None:
    assert UrlPolicy().check_address("8.8.8.8", 443) is None
    with pytest.raises(BlockedURLError):
        UrlPolicy().check_address("8.8.8.8", 0)


@pytest.mark.parametrize("version", [4, 6])
def test_the_table_never_calls_public_what_the_standard_library_calls_private(version: int) -> None:
    """Walk the edges of every range the library knows; ours may be stricter, never laxer."""
    policy = UrlPolicy()
    cls = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    bits = 32 if version == 4 else 128
    for prefix in range(1 << 12):
        for address in (cls(prefix << (bits - 12)), cls(((prefix + 1) << (bits - 12)) - 1)):
            if not address.is_global or address.is_multicast:
                assert address_refusal(policy, str(address)) is not None, address


# --- properties -------------------------------------------------------------------------------------------

_PIECES = st.sampled_from(
    [
        *("https://", "http://", "//", "/", "\\", "@", ":", "?", "#", "[", "]", "%", "%25", ".", "。", "．"),
        *("127.0.0.1", "localhost", "example.com", "xn--", "xn--bcher-kva", "0x7f", "①", "１", "ü", "\u200d"),
        *("\u00ad", "ﬀ", "℀", "443", "65536", "::1", "::ffff:", "fe80::1%eth0", "\t", "\r\n", "\x00"),
        *("\ud800", "\U0001f4a9", "a" * 64, "א"),
    ]
)
_URLISH = st.one_of(st.text(), st.lists(_PIECES, max_size=12).map("".join)).flatmap(
    lambda text: st.sampled_from([text, f"https://{text}", f"https://{text}/", f"https://example.com{text}"])
)
_POLICIES = [
    UrlPolicy(),
    UrlPolicy(allow_http=True),
    UrlPolicy(allow_http=True, allow_networks=["10.0.0.0/8"], allow_nat64=True),
    UrlPolicy(allowed_domains=["example.com"]),
]


@given(_URLISH, st.sampled_from(_POLICIES))
@example("https://[", _POLICIES[0])
@example("https://℀.example/", _POLICIES[0])
@example("https://xn--\x80/", _POLICIES[0])
@example("https://" + "xn--" + "9" * 60 + ".example/", _POLICIES[0])
def test_only_our_own_error_is_raised_and_what_passes_is_stable(url: str, policy: UrlPolicy) -> None:
    try:
        checked = policy.check_url(url)
    except BlockedURLError:
        return
    assert policy.check_url(checked.url) == checked
    assert checked.url.isascii()
    assert len(checked.url) <= MAX_URL_LENGTH
    assert not set(checked.url) & set(' \\#"<>^`{|}')
    assert checked.url.isprintable()
    assert urlsplit(checked.url).hostname == checked.host
    assert (parse_url(checked.url).host or "").strip("[]") == checked.host
    assert "@" not in urlsplit(checked.url).netloc


@given(st.one_of(st.text(), st.ip_addresses().map(str)), st.integers(-10, 70000))
def test_only_our_own_error_is_raised_for_addresses(ip: str, port: int) -> None:
    try:
        UrlPolicy(allow_nat64=True).check_address(ip, port)
    except BlockedURLError:
        return
    assert ipaddress.ip_address(ip).is_global or ip.startswith("64:ff9b::")


# --- what is shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.com", "https://example.com"),
        ("https://example.com/", "https://example.com/"),
        ("https://u:p@example.com:8443/hook?token=s#f", "https://example.com:8443/hook"),
        ("https://a@b@example.com/", "https://example.com/"),
        ("https://[2606:4700::1]:8443/hook", "https://[2606:4700::1]:8443/hook"),
        (
            "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
            "https://hooks.slack.com/services/…/…/…",
        ),
        (
            "https://discord.com/api/webhooks/1234567890123/aB-c_D3",
            "https://discord.com/api/webhooks/…/…",
        ),
        ("https://api.telegram.org/bot123456:ABC-DEF/send", "https://api.telegram.org/…/send"),
        (
            "https://example.com/6f1c2a1e-58c5-4a7e-9c57-0d1e6a6b1a5e/done",
            "https://example.com/…/done",
        ),
        (
            "https://example.com/api/v2/jobDone/web-hook.php/1234/step_10",
            "https://example.com/api/v2/jobDone/web-hook.php/1234/step_10",
        ),
        ("https://example.com/a%20b/x", "https://example.com/…/x"),
        ("https://example.com/aGVsbG8gd29ybGQ=", "https://example.com/…"),
        ("https://example.com/tok\x1b[31m/", "https://example.com/…/"),
        ("https://exa mple.com/x", "https://…/x"),
        ("https://user@host\\@evil/x", "https://evil/x"),
        ("not a url", "…"),
        ("", "…"),
        (None, "…"),
        (7, "…"),
    ],
)
def test_redact_url(url: object, shown: str) -> None:
    assert redact_url(url) == shown


@given(_URLISH)
def test_redact_url_never_raises_and_shows_no_query(url: str) -> None:
    shown = redact_url(url)
    assert shown.isprintable()
    assert not set(shown) & set("?#@")


@given(st.binary(min_size=12, max_size=40).map(lambda raw: raw.hex()))
def test_redact_url_hides_random_tokens(token: str) -> None:
    assert token not in redact_url(f"https://example.com/hooks/{token}/x")


@pytest.mark.parametrize("path", ["/a%2fb", "/a%2Fb", "/%c3%bc?x=%2f%2F", "/100%25"])
def test_escapes_stay_as_they_were_sent(path: str) -> None:
    """A receiver may sign or route by the exact text."""
    checked = UrlPolicy().check_url(f"https://example.com{path}")
    assert checked.target == path
    assert UrlPolicy().check_url(checked.url) == checked


class TestUnderscores:
    """Containers and Windows machines have such names; the public internet does not."""

    NAMES = ("my_service", "web_1.shop_default", "_x", "a_", "host_a.internal.example")

    @pytest.mark.parametrize("name", NAMES)
    def test_accepted_where_networks_are_allowed(self, name: str) -> None:
        policy = UrlPolicy(allow_networks=["10.0.0.0/8"])
        assert policy.check_url(f"https://{name}/hook").host == name
        policy.check_address("10.1.2.3", 443)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("options", [{}, {"allow_http": True}, {"allowed_domains": ["example"]}])
    def test_refused_elsewhere(self, name: str, options: dict[str, Any]) -> None:
        with pytest.raises(BlockedURLError) as caught:
            UrlPolicy(**options).check_url(f"https://{name}/hook")
        assert caught.value.code == "host"


class TestNat64OfThisNetwork:
    LOCAL = ipaddress.IPv6Network("2a00:64:64::/96")

    @pytest.mark.parametrize(
        ("address", "prefix"),
        [
            ("64:ff9b::192.0.0.170", "64:ff9b::/96"),
            ("2a00:64:64::192.0.0.171", "2a00:64:64::/96"),
            ("2a00:1:c000:aa::", "2a00:1::/32"),
            ("2a00:1:2c0:0:aa::", "2a00:1:200::/40"),
            ("2a00:1:2:c000:0:aa00::", "2a00:1:2::/48"),
            ("2a00:1:2:3c0:0:aa:0:0", "2a00:1:2:300::/56"),
            ("2a00:1:2:3:c0:0:aa00:0", "2a00:1:2:3::/64"),
        ],
    )
    def test_the_prefix_is_seen_in_the_addresses_of_the_probe(self, address: str, prefix: str) -> None:
        """RFC 6052, 2.2 and RFC 7050."""
        network = ipaddress.IPv6Network(prefix)
        assert nat64_prefixes(["192.0.0.170", "192.0.0.171", address, address]) == (network,)
        assert str(nat64_ipv4(ipaddress.ip_address(address), [network])) in ("192.0.0.170", "192.0.0.171")

    def test_without_dns64_there_is_none(self) -> None:
        assert nat64_prefixes(["192.0.0.170", "192.0.0.171"]) == ()
        assert nat64_prefixes(["2606:4700::1111"]) == ()

    @pytest.mark.parametrize("ipv4", ["10.0.0.1", "169.254.169.254", "127.0.0.1"])
    @pytest.mark.parametrize("allow", [False, True])
    def test_a_private_address_behind_a_local_prefix_is_refused(self, ipv4: str, allow: bool) -> None:
        """By itself, the address looks public."""
        policy, address = UrlPolicy(allow_nat64=allow), f"2a00:64:64::{ipv4}"
        policy.check_address(address, 443)
        with pytest.raises(BlockedURLError) as caught:
            policy.check_address(address, 443, nat64=[self.LOCAL])
        assert caught.value.code == "private_address"

    def test_a_public_one_is_allowed(self) -> None:
        UrlPolicy().check_address("2a00:64:64::93.184.216.34", 443, nat64=[self.LOCAL])
        UrlPolicy(allow_nat64=True).check_address("64:ff9b::93.184.216.34", 443, nat64=[self.LOCAL])

    def test_denied_networks_bind_behind_it(self) -> None:
        policy = UrlPolicy(deny_networks=["93.184.216.0/24"])
        with pytest.raises(BlockedURLError) as caught:
            policy.check_address("2a00:64:64::93.184.216.34", 443, nat64=[self.LOCAL])
        assert caught.value.code == "denied_network"
