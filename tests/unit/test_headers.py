"""Headers and secrets a client brings, and what of them is shown."""

from __future__ import annotations

import http.client

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_rq_webhooks.errors import InvalidWebhookError
from flask_rq_webhooks.protocol.headers import MASK, mask_headers, validate_headers, validate_secret


def reasons(mapping: object, **options: str) -> list[str]:
    """Return why the headers are refused; none: they are accepted."""
    try:
        assert validate_headers(mapping, **options) == mapping
    except InvalidWebhookError as exc:
        assert list(exc.details) == ["webhook_headers"]  # noqa: PT017
        return exc.details["webhook_headers"]
    return []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer abc.def-ghi_jkl=="},
        {"authorization": "Basic dXNlcjpwYXNz", "X-Api-Key": "k"},
        {"X-Custom": "inner\ttab and  spaces"},
        {"X-Empty": ""},
        {"X-One": "!"},
        {"X-All": "".join(map(chr, range(0x21, 0x7F)))},
        {"!#$%&'*+-.^_`|~09azAZ": "token characters"},
        {
            "Accept": "*/*",
            "X-Request-Id": "1",
            "Date": "today",
            "Cache-Control": "no-store",
        },
        {"X-Webhooks": "not our family", "Webhooks": "x", "Contented": "x", "Hostname": "x", "Teapot": "x"},
        {f"X-{number}": "v" for number in range(32)},
        {"X-Long": "v" * 4096},
        {"X" * 256: "v"},
        {f"X-{number}": "v" * (4096 - 3) for number in range(4)},
    ],
)
def test_ordinary_headers_are_kept_as_they_are(headers: dict[str, str]) -> None:
    assert reasons(headers) == []


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "X A",
            "X-A ",
            " X-A",
            "X-A\t",
            "X-A\n",
            "X-A\r\n",
            "X\x00A",
            "X-A:",
            ":path",
            "X:A",
            "X(A)",
        ),
        *(
            "X/A",
            "X[A]",
            "X{A}",
            "X@A",
            "X,A",
            "X;A",
            "X=A",
            'X"A',
            "X?A",
            "X<A>",
            "X\\A",
            "X\x7f",
            "Ä",
            "X-✓",
        ),
        *("X-A\r\nHost: evil", "X-A\x0b", "ｘ-a", "X-A\u2028"),
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    assert len(reasons({name: "v"})) == 1


@pytest.mark.parametrize(
    "value",
    [
        *(
            " v",
            "v ",
            "\tv",
            "v\t",
            " ",
            "\t",
            "a\nb",
            "a\rb",
            "a\r\nb",
            "v\n",
            "v\r\n",
            "\nv",
            "a\r\n b",
            "a\x00b",
        ),
        *(
            "a\x01b",
            "a\x0bb",
            "a\x0cb",
            "a\x1bb",
            "a\x7fb",
            "a\x80b",
            "ä",
            "✓",
            "\ud800",
            "a\xa0b",
            "a\u2028b",
        ),
        *("v\r\nX-Injected: 1", "v\r\n\r\nbody"),
    ],
)
def test_what_is_no_value_is_refused(value: str) -> None:
    assert len(reasons({"X-A": value})) == 1


@pytest.mark.parametrize(
    "name",
    [
        *(
            "Connection",
            "Keep-Alive",
            "TE",
            "Trailer",
            "Transfer-Encoding",
            "Upgrade",
            "HTTP2-Settings",
            "Expect",
        ),
        *("Proxy-Authorization", "Proxy-Authenticate", "Proxy-Connection", "Proxy-Anything"),
        *("Host", "Content-Length", "Content-Type", "Content-Encoding", "Content-Disposition", "Content-MD5"),
        *("Set-Cookie", "Set-Cookie2", "Cookie", "Accept-Encoding", "User-Agent"),
        *("webhook-id", "Webhook-Timestamp", "webhook-signature", "webhook-anything"),
        *(
            "X-Webhook-Signature",
            "X-Webhook-Event",
            "X-Webhook-Delivery",
            "X-Webhook-Attempt",
            "x-webhook-new",
        ),
        *("Content_Length", "Transfer_Encoding", "X_Webhook_Signature", "webhook_id", "cONNECTION", "hOsT"),
    ],
)
def test_headers_that_are_not_the_clients_are_refused(name: str) -> None:
    for spelling in (name, name.lower(), name.upper()):
        assert len(reasons({spelling: "v"})) == 1


def test_our_family_follows_the_prefix() -> None:
    assert reasons({"X-Guardrails-Signature": "v"}, header_prefix="X-Guardrails")
    assert not reasons({"X-Webhook-Event": "v"}, header_prefix="X-Guardrails")
    assert not reasons({"X-Guardrails-Event": "v"})


@pytest.mark.parametrize("mapping", [None, [], "X-A: b", [("X-A", "b")], 7, {"X-A"}])
def test_what_is_no_object_is_refused(mapping: object) -> None:
    assert len(reasons(mapping)) == 1


@pytest.mark.parametrize(
    "headers", [{"X-A": 1}, {"X-A": None}, {"X-A": ["v"]}, {"X-A": b"v"}, {1: "v"}, {None: "v"}]
)
def test_what_is_not_text_is_refused(headers: object) -> None:
    assert len(reasons(headers)) == 1


def test_limits() -> None:
    assert reasons({f"X-{number}": "v" for number in range(33)})
    assert reasons({f"X-{number}": "v" for number in range(1000)})
    assert reasons({"X-Long": "v" * 4097})
    assert reasons({"X" * 257: "v"})
    assert reasons({f"X-{number}": "v" * 4096 for number in range(4)})


def test_repeats_are_found_whatever_the_case() -> None:
    (reason,) = reasons({"X-Token": "a", "x-token": "b"})
    assert "more than once" in reason


def test_every_reason_is_given_and_no_value_is_shown() -> None:
    found = reasons({"Host": "hunter2", "X A": "hunter2", "X-B": "hunter2\n", "X-C": "fine"})
    assert len(found) == 3
    assert "hunter2" not in "".join(found)


@given(
    st.dictionaries(
        st.one_of(st.text(), st.none(), st.integers()), st.one_of(st.text(), st.none()), max_size=40
    )
)
def test_only_our_own_error_is_raised_and_what_passes_can_be_sent(mapping: dict[object, object]) -> None:
    try:
        accepted = validate_headers(mapping)
    except InvalidWebhookError as exc:
        assert all(isinstance(reason, str) for reason in exc.details["webhook_headers"])  # noqa: PT017
        return
    connection = http.client.HTTPConnection("example.com")
    connection.putrequest("POST", "/")
    for name, value in accepted.items():
        connection.putheader(name, value)


@pytest.mark.parametrize(
    "secret", ["s", " padded ", "x" * 512, "ü" * 256, "whsec_", "\n", "whsec_not base64!"]
)
def test_a_secret_is_returned_untouched(secret: str) -> None:
    assert validate_secret(secret) == secret


@pytest.mark.parametrize("secret", ["", "x" * 513, "ü" * 257, "\ud800", None, 1, b"secret", ["s"], True])
def test_what_is_no_secret_is_refused_without_showing_it(secret: object) -> None:
    with pytest.raises(InvalidWebhookError) as caught:
        validate_secret(secret)
    assert list(caught.value.details) == ["webhook_secret"]
    assert not secret or str(secret) not in str(caught.value) + str(caught.value.details)


@given(st.one_of(st.text(), st.binary(), st.none(), st.integers()))
def test_only_our_own_error_is_raised_for_secrets(secret: object) -> None:
    try:
        accepted = validate_secret(secret)
    except InvalidWebhookError:
        return
    assert accepted == secret
    assert 1 <= len(accepted.encode()) <= 512


def test_masked_headers_show_names_and_only_harmless_values() -> None:
    shown = mask_headers(
        {
            "Authorization": "Bearer hunter2",
            "X-Api-Key": "hunter2",
            "Content-Type": "application/json",
            "webhook-id": "evt_1",
            "webhook-signature": "v1,abc",
            "X-Hook-Attempt": "2",
            "X-Hook-Signature": "sha256=abc",
            "X-Webhook-Event": "not of our family here",
        },
        header_prefix="X-Hook",
    )
    assert shown == {
        "Authorization": MASK,
        "X-Api-Key": MASK,
        "Content-Type": "application/json",
        "webhook-id": "evt_1",
        "webhook-signature": MASK,
        "X-Hook-Attempt": "2",
        "X-Hook-Signature": MASK,
        "X-Webhook-Event": MASK,
    }


@pytest.mark.parametrize(
    "name",
    [
        "X-Forwarded-For", "x-forwarded-host", "X_Forwarded_Proto", "X-Forwarded-User", "X-Forwarded-Any",
        "Forwarded", "X-Forwarded", "Via", "X-Real-IP", "True-Client-IP", "CF-Connecting-IP", "X-Client-Ip",
        "X-Original-URL", "X-Original-Host", "X-Rewrite-URL", "X-HTTP-Method-Override", "X-HTTP-Method",
        "X-Method-Override", "Metadata", "Metadata-Flavor", "X-aws-ec2-metadata-token", "X-Google-Metadata",
        "X-aws-ec2-metadata-token-ttl-seconds", "Metadata-Token", "X-aliyun-ecs-metadata-token",
        "X-Remote-User", "Remote_User", "X-WEBAUTH-USER", "X-Auth-Request-Email", "X-SSL-Client-Cert",
        "X-Amzn-Oidc-Identity", "X-MS-CLIENT-PRINCIPAL-ID",
    ],
)  # fmt: skip
def test_headers_that_servers_inside_trust_are_refused(name: str) -> None:
    """SECURITY 22."""
    (reason,) = reasons({name: "v"})
    assert "servers inside a network trust it" in reason


@pytest.mark.parametrize(
    "name",
    [
        "X-Hub-Signature", "X-Hub-Signature-256", "Stripe-Signature", "X-Slack-Signature", "Signature",
        "Signature-Input", "X-Shopify-Hmac-Sha256", "X-Twilio-Signature", "Svix-Signature", "svix-id",
        "X-Signature-Ed25519", "Paypal-Transmission-Sig", "X-Gitlab-Token", "X_Hub_Signature_256",
        "X-Telegram-Bot-Api-Secret-Token",
    ],
)  # fmt: skip
def test_signatures_of_other_senders_are_refused(name: str) -> None:
    """SECURITY 22."""
    (reason,) = reasons({name: "v"})
    assert "a sender's signature" in reason


@pytest.mark.parametrize(
    "name",
    [
        "Authorization", "X-Api-Key", "X-Request-Id", "traceparent", "Accept", "Date", "Priority",
        "X-Design", "X-Signal", "X-Assigned-To", "X-Origin", "X-Sslmode", "Viable", "X-Metadata",
    ],
)  # fmt: skip
def test_names_that_only_look_alike_are_accepted(name: str) -> None:
    assert reasons({name: "v"}) == []
