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
from hypothesis import given
from hypothesis import strategies as st

from flask_rq_webhooks.protocol.signatures import (
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
