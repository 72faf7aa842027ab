"""Webhook signatures, and how a secret becomes a key.

Two families of signatures of the same body: Standard Webhooks (``webhook-signature``, over id, timestamp and
body; ``v1`` with a shared secret, ``v1a`` with an Ed25519 key of the server) and the plain one that many
receivers know (``X-Webhook-Signature: sha256=…``, over the body alone). Where secrets are kept and which are
live is decided elsewhere. The receiver imports this module, so it needs only the standard library, plus
``cryptography`` if an Ed25519 key is used.

Source: Standard Webhooks, "Signature scheme" (symmetric ``v1``, asymmetric ``v1a``).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets as random_secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

#: Header of the Standard Webhooks family; the other headers are named after the configured prefix.
STANDARD_SIGNATURE_HEADER = "webhook-signature"

#: Prefixes of Standard Webhooks: a shared secret, an Ed25519 private key, an Ed25519 public key.
_WHSEC, PRIVATE_KEY, PUBLIC_KEY = "whsec_", "whsk_", "whpk_"
_BASE64 = re.compile(r"[A-Za-z0-9+/]*")


def generate_secret() -> str:
    """Return a new secret: ``whsec_`` and the base64 of 32 random bytes."""
    return _WHSEC + base64.b64encode(random_secrets.token_bytes(32)).decode("ascii")


def standard_key(secret: str | bytes) -> bytes:
    """Return the key of the ``v1`` signature.

    ``whsec_`` followed by base64 (padded or not) stands for the bytes it encodes; any other secret stands
    for its UTF-8 bytes. The official libraries know only base64: give them ``whsec_`` + base64 of such a
    plain secret, and they use the same key.

    :raises ValueError: when the secret is empty or contains a lone surrogate.
    """
    key = body_key(secret)
    if key.startswith(_WHSEC.encode()):
        return _decoded(key.removeprefix(_WHSEC.encode())) or key
    return key


def body_key(secret: str | bytes) -> bytes:
    """Return the key of the ``sha256=`` signature: the secret's UTF-8 bytes, unchanged.

    :raises ValueError: when the secret is empty or contains a lone surrogate.
    """
    key = secret.encode() if isinstance(secret, str) else bytes(secret)
    if not key:
        raise ValueError("an empty secret signs nothing")
    return key


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 key of the server: ``whsk_`` and base64 of its seed (32 bytes), or seed and public key (64).

    :param text: the key as configured.
    :raises ValueError: when *text* is not such a key, or its public half belongs to another seed.
    """

    text: str = field(repr=False)

    def __post_init__(self) -> None:
        raw = _decoded(self.text.removeprefix(PRIVATE_KEY).encode()) if self.text.isascii() else None
        if not self.text.startswith(PRIVATE_KEY) or raw is None or len(raw) not in (32, 64):
            raise ValueError("expected whsk_ and the base64 of an Ed25519 seed of 32 bytes")
        if len(raw) == 64 and self._public_bytes != raw[32:]:
            raise ValueError("the public half of the key does not belong to its private half")

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new key of 64 bytes, the form that the official libraries read."""
        seed_only = cls(PRIVATE_KEY + base64.b64encode(random_secrets.token_bytes(32)).decode("ascii"))
        return cls(PRIVATE_KEY + base64.b64encode(seed_only._seed + seed_only._public_bytes).decode("ascii"))

    @property
    def public(self) -> str:
        """Return the public key, ``whpk_…``, with which receivers verify."""
        return PUBLIC_KEY + base64.b64encode(self._public_bytes).decode("ascii")

    def signature(self, event_id: str, timestamp: int, body: bytes) -> str:
        """Return the ``v1a,<base64>`` entry; it signs the same content as ``v1``."""
        signed = self._private.sign(_signed_content(event_id, timestamp, body))
        return "v1a," + base64.b64encode(signed).decode("ascii")

    @property
    def _seed(self) -> bytes:
        return base64.b64decode(self.text.removeprefix(PRIVATE_KEY) + "==")[:32]

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._seed)

    @cached_property
    def _public_bytes(self) -> bytes:
        return self._private.public_key().public_bytes_raw()


def public_key(text: str) -> Ed25519PublicKey:
    """Return the Ed25519 public key that ``whpk_…`` stands for.

    :raises ValueError: when *text* is not such a key.
    :raises ImportError: when ``cryptography`` is not installed.
    """
    raw = _decoded(text.removeprefix(PUBLIC_KEY).encode()) if text.isascii() else None
    if not text.startswith(PUBLIC_KEY) or raw is None or len(raw) != 32:
        raise ValueError("expected whpk_ and the base64 of 32 bytes")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(raw)


def is_signed_by(key: Ed25519PublicKey, entry: str, event_id: str, timestamp: int, body: bytes) -> bool:
    """Return whether *entry* of ``webhook-signature`` is a ``v1a`` signature made by the owner of *key*."""
    from cryptography.exceptions import InvalidSignature

    version, _, given = entry.partition(",")
    raw = _decoded(given.encode()) if version == "v1a" and given.isascii() else None
    if raw is None or len(raw) != 64 or base64.b64encode(raw).decode("ascii") != given:
        return False
    try:
        key.verify(raw, _signed_content(event_id, timestamp, body))
    except InvalidSignature:
        return False
    return True


def _signed_content(event_id: str, timestamp: int, body: bytes) -> bytes:
    return f"{event_id}.{timestamp}.".encode() + body


def standard_signature(secret: str | bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """Return the ``v1,<base64>`` entry for one secret.

    :param timestamp: unix seconds, as in ``webhook-timestamp``.
    :raises ValueError: when the secret cannot sign, see :func:`standard_key`.
    """
    content = _signed_content(event_id, timestamp, body)
    digest = hmac.new(standard_key(secret), content, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode("ascii")


def body_signature(secret: str | bytes, body: bytes) -> str:
    """Return ``sha256=<lower-case hex>`` for one secret.

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
    signature_header: str | None = None,
    timestamp_header: str | None = None,
    signing_keys: Sequence[SigningKey] = (),
) -> dict[str, str]:
    """Return the signature headers of one attempt; none if there is neither a secret nor a key.

    ``webhook-signature`` has one ``v1`` entry per secret, so that receivers can switch at any time during a
    rotation, and one ``v1a`` entry for the newest server key. The plain signature has room for only one and
    uses the newest secret.

    :param secrets: live secrets, newest first.
    :param timestamp: unix seconds of this attempt; the same as ``webhook-timestamp``.
    :param iso_timestamp: write the plain signature's time as ISO 8601 instead of unix seconds.
    :param signature_header: full name of the plain signature's header; ``<prefix>-Signature`` by default.
    :param timestamp_header: full name of the header with its time; ``<prefix>-Timestamp`` by default.
    :param signing_keys: the server's keys, newest first.
    :raises ValueError: when a secret cannot sign. There is no unsigned fallback.
    """
    entries = [standard_signature(secret, event_id, timestamp, body) for secret in secrets]
    entries += [key.signature(event_id, timestamp, body) for key in signing_keys[:1]]
    headers = {STANDARD_SIGNATURE_HEADER: " ".join(entries)} if entries else {}
    if secrets:
        sent = str(timestamp)
        if iso_timestamp:
            sent = datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        headers[signature_header or f"{header_prefix}-Signature"] = body_signature(secrets[0], body)
        headers[timestamp_header or f"{header_prefix}-Timestamp"] = sent
    return headers


def _decoded(text: bytes) -> bytes | None:
    """Return what base64 *text* encodes; ``None`` if it is not complete, standard base64."""
    digits = text.rstrip(b"=")
    padding = len(text) - len(digits)
    if _BASE64.fullmatch(digits.decode("latin-1")) is None or len(digits) % 4 == 1:
        return None
    missing = -len(digits) % 4
    if padding not in (0, missing):
        return None
    return base64.b64decode(digits + b"=" * missing)
