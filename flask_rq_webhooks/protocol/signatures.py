"""What a signed webhook carries.

Two families over the same bytes: the Standard Webhooks one (``webhook-signature``, over id, timestamp
and body) and the plain one many receivers know (``X-Webhook-Signature: sha256=…``, over the body alone).
Owns how a secret becomes a key. Knows nothing of where secrets are kept or which are live. Standard
library only: the receiver helper imports it.

Source: Standard Webhooks, "Signature scheme" (symmetric, ``v1``).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets as random_secrets
from collections.abc import Sequence
from datetime import UTC, datetime

#: Header of the Standard Webhooks family; the others are named after the configured prefix.
STANDARD_SIGNATURE_HEADER = "webhook-signature"

_WHSEC = "whsec_"
_BASE64 = re.compile(r"[A-Za-z0-9+/]*")


def generate_secret() -> str:
    """Return a new secret, ``whsec_`` and the base64 of 32 random bytes."""
    return _WHSEC + base64.b64encode(random_secrets.token_bytes(32)).decode("ascii")


def standard_key(secret: str | bytes) -> bytes:
    """Return the key of the ``v1`` signature.

    ``whsec_`` followed by base64 (padded or not) stands for the bytes it encodes; anything else is its
    UTF-8 bytes. The official libraries know only base64: they take ``whsec_`` + base64 of such a plain
    secret and arrive at the same key.

    :raises ValueError: when the secret is empty or holds a lone surrogate.
    """
    key = body_key(secret)
    if key.startswith(_WHSEC.encode()):
        return _decoded(key.removeprefix(_WHSEC.encode())) or key
    return key


def body_key(secret: str | bytes) -> bytes:
    """Return the key of the ``sha256=`` signature: the secret's UTF-8 bytes as they are.

    :raises ValueError: when the secret is empty or holds a lone surrogate.
    """
    key = secret.encode() if isinstance(secret, str) else bytes(secret)
    if not key:
        raise ValueError("an empty secret signs nothing")
    return key


def standard_signature(secret: str | bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """Return the ``v1,<base64>`` entry of one secret.

    :param timestamp: unix seconds, as ``webhook-timestamp`` says them.
    :raises ValueError: when the secret cannot sign, see :func:`standard_key`.
    """
    signed = f"{event_id}.{timestamp}.".encode() + body
    digest = hmac.new(standard_key(secret), signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode("ascii")


def body_signature(secret: str | bytes, body: bytes) -> str:
    """Return ``sha256=<lower-case hex>`` of one secret.

    :raises ValueError: when the secret cannot sign, see :func:`body_key`.
    """
    return "sha256=" + hmac.new(body_key(secret), body, hashlib.sha256).hexdigest()


def signature_headers(
    secrets: Sequence[str],
    *,
    event_id: str,
    timestamp: int,
    body: bytes,
    header_prefix: str,
    iso_timestamp: bool,
) -> dict[str, str]:
    """Return the headers that prove one attempt; none where there is no secret.

    ``webhook-signature`` has one entry per secret, so that receivers can change over at any time during a
    rotation. ``<prefix>-Signature`` has room for one and uses the newest.

    :param secrets: live secrets, newest first.
    :param timestamp: unix seconds of this attempt; the same as ``webhook-timestamp``.
    :param iso_timestamp: write ``<prefix>-Timestamp`` as ISO 8601 instead of unix seconds.
    :raises ValueError: when a secret cannot sign. There is no unsigned fallback.
    """
    if not secrets:
        return {}
    entries = [standard_signature(secret, event_id, timestamp, body) for secret in secrets]
    sent = str(timestamp)
    if iso_timestamp:
        sent = datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        STANDARD_SIGNATURE_HEADER: " ".join(entries),
        f"{header_prefix}-Signature": body_signature(secrets[0], body),
        f"{header_prefix}-Timestamp": sent,
    }


def _decoded(text: bytes) -> bytes | None:
    """Return what base64 *text* encodes, ``None`` where it is not whole, standard base64."""
    digits = text.rstrip(b"=")
    padding = len(text) - len(digits)
    if _BASE64.fullmatch(digits.decode("latin-1")) is None or len(digits) % 4 == 1:
        return None
    missing = -len(digits) % 4
    if padding not in (0, missing):
        return None
    return base64.b64decode(digits + b"=" * missing)
