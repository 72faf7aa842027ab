"""Signatures: known answers, both families, several secrets, and the official libraries' verdict."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any

import pytest
import standardwebhooks
import svix.webhooks
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from flask_rq_webhooks.protocol.signatures import (
    SigningKey,
    body_key,
    body_signature,
    generate_secret,
    signature_headers,
    standard_key,
    standard_signature,
)

# The vector published with Standard Webhooks and by Svix.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
EVENT_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
TIMESTAMP = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_published_vector() -> None:
    assert standard_signature(SECRET, EVENT_ID, TIMESTAMP, BODY) == SIGNATURE


def test_body_signature_known_answers() -> None:
    # RFC 4231, test case 2.
    expected = "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert body_signature("Jefe", b"what do ya want for nothing?") == expected
    # A whsec_ secret is not decoded here: the key is the text as the client sent it.
    own = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()
    assert body_signature(SECRET, BODY) == f"sha256={own}"


@pytest.mark.parametrize(
    ("secret", "key"),
    [
        ("whsec_QUJDRA==", b"ABCD"),
        ("whsec_QUJDRA", b"ABCD"),
        ("whsec_QUJD", b"ABC"),
        ("whsec_+/+/", b"\xfb\xff\xbf"),
        (b"whsec_QUJD", b"ABC"),
        ("plain", b"plain"),
        ("QUJDRA==", b"QUJDRA=="),
        ("gehei\u00df", "gehei\u00df".encode()),
        ("  spaces are kept ", b"  spaces are kept "),
        (b"\xff\x00", b"\xff\x00"),
        # Not base64, so text like any other:
        ("whsec_", b"whsec_"),
        ("whsec_A", b"whsec_A"),
        ("whsec_QUJDRA=", b"whsec_QUJDRA="),
        ("whsec_QUJD=", b"whsec_QUJD="),
        ("whsec_QUJDRA===", b"whsec_QUJDRA==="),
        ("whsec_QU-_", b"whsec_QU-_"),
        ("whsec_QU JD", b"whsec_QU JD"),
        ("whsec_QUJD\n", b"whsec_QUJD\n"),
        ("whsec_\u00e9\u00e9", "whsec_\u00e9\u00e9".encode()),
        ("WHSEC_QUJD", b"WHSEC_QUJD"),
        (" whsec_QUJD", b" whsec_QUJD"),
        ("whsec_whsec_QUJD", b"whsec_whsec_QUJD"),
    ],
)
def test_how_a_secret_becomes_a_key(secret: str | bytes, key: bytes) -> None:
    assert standard_key(secret) == key
    assert body_key(secret) == (secret.encode() if isinstance(secret, str) else secret)


@pytest.mark.parametrize("secret", ["", b"", "\ud800"], ids=repr)
def test_secrets_that_cannot_sign(secret: Any) -> None:
    with pytest.raises(ValueError):
        standard_signature(secret, EVENT_ID, TIMESTAMP, BODY)
    with pytest.raises(ValueError):
        body_signature(secret, BODY)


def test_headers_of_a_rotation() -> None:
    headers = signature_headers(
        ["new", SECRET],
        event_id=EVENT_ID,
        timestamp=TIMESTAMP,
        body=BODY,
        header_prefix="X-Webhook",
        iso_timestamp=False,
    )
    assert headers == {
        "webhook-signature": standard_signature("new", EVENT_ID, TIMESTAMP, BODY) + " " + SIGNATURE,
        "X-Webhook-Signature": body_signature("new", BODY),
        "X-Webhook-Timestamp": "1614265330",
    }


def test_headers_with_another_prefix_and_iso_time() -> None:
    headers = signature_headers(
        ["s"],
        event_id="e",
        timestamp=1704067200,
        body=b"{}",
        header_prefix="X-Guardrails",
        iso_timestamp=True,
    )
    assert list(headers) == ["webhook-signature", "X-Guardrails-Signature", "X-Guardrails-Timestamp"]
    assert headers["X-Guardrails-Timestamp"] == "2024-01-01T00:00:00Z"


def test_no_secret_no_headers() -> None:
    assert (
        signature_headers(
            [], event_id="e", timestamp=1, body=b"", header_prefix="X-Webhook", iso_timestamp=False
        )
        == {}
    )


def test_generated_secrets() -> None:
    first, second = generate_secret(), generate_secret()
    assert first != second
    assert len(standard_key(first)) == 32


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=64), st.text(max_size=200))
def test_official_libraries_accept_what_we_sign(secret: str, text: str) -> None:
    now = datetime.now(UTC)
    body = text.encode()
    headers = {
        "webhook-id": EVENT_ID,
        "webhook-timestamp": str(int(now.timestamp())),
        **signature_headers(
            ["another", secret],
            event_id=EVENT_ID,
            timestamp=int(now.timestamp()),
            body=body,
            header_prefix="X-Webhook",
            iso_timestamp=False,
        ),
    }
    # The documented way to hand a plain secret to a library that knows base64 only.
    official = "whsec_" + base64.b64encode(standard_key(secret)).decode()
    standardwebhooks.Webhook(official).verify(body, headers, json_parse=False)
    theirs = standardwebhooks.Webhook(official).sign(EVENT_ID, now.replace(microsecond=0), text)
    assert theirs in headers["webhook-signature"].split(" ")
    svix.webhooks.Webhook(official).verify(body, headers)
    with pytest.raises(svix.webhooks.WebhookVerificationError):
        svix.webhooks.Webhook(official).verify(body + b" ", headers)


# -- Ed25519 ----------------------------------------------------------------------------------------------

# The pair of keys that Svix's documentation and libraries use in their tests.
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="


def test_the_published_pair_of_keys() -> None:
    key = SigningKey(PRIVATE)
    assert key.public == PUBLIC
    # Ed25519 is deterministic, so a signature is a known answer: RFC 8032 by another implementation.
    seed = base64.b64decode(PRIVATE.removeprefix("whsk_"))[:32]
    signed = Ed25519PrivateKey.from_private_bytes(seed).sign(f"{EVENT_ID}.{TIMESTAMP}.".encode() + BODY)
    assert key.signature(EVENT_ID, TIMESTAMP, BODY) == "v1a," + base64.b64encode(signed).decode()
    assert SigningKey("whsk_" + base64.b64encode(seed).decode()).public == PUBLIC
    assert "6Xb" not in repr(key)


def test_a_generated_key_has_its_public_half() -> None:
    key = SigningKey.generate()
    assert SigningKey(key.text).public == key.public
    assert key.public.startswith("whpk_")
    assert key.text != SigningKey.generate().text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsk_",
        "whsk_AAAA",
        PUBLIC,
        PRIVATE[5:],
        "whsec_" + PRIVATE[5:],
        PRIVATE[:-4] + "AA==",
        "whsk_\u2713",
    ],
)
def test_what_is_no_private_key(text: str) -> None:
    with pytest.raises(ValueError, match="whsk_|public half"):
        SigningKey(text)


def test_a_server_key_signs_with_and_without_a_secret() -> None:
    key, old = SigningKey(PRIVATE), SigningKey.generate()
    common: dict[str, Any] = {
        "event_id": EVENT_ID, "timestamp": TIMESTAMP, "body": BODY, "iso_timestamp": False,
        "header_prefix": "X-Webhook", "signing_keys": [key, old],
    }  # fmt: skip
    entry = key.signature(EVENT_ID, TIMESTAMP, BODY)
    assert signature_headers([], **common) == {"webhook-signature": entry}
    headers = signature_headers(
        [SECRET], **common, signature_header="Guard-Sig", timestamp_header="Guard-Time"
    )
    assert headers == {
        "webhook-signature": f"{SIGNATURE} {entry}",
        "Guard-Sig": body_signature(SECRET, BODY),
        "Guard-Time": str(TIMESTAMP),
    }
    # The official libraries skip entries they do not know.
    sent = {"webhook-id": EVENT_ID, "webhook-timestamp": str(TIMESTAMP), **headers}
    webhook = standardwebhooks.Webhook(SECRET)
    assert any(
        hmac.compare_digest(
            one, webhook.sign(EVENT_ID, datetime.fromtimestamp(TIMESTAMP, UTC), BODY.decode())
        )
        for one in sent["webhook-signature"].split(" ")
    )
