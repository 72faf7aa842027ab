"""Verify received webhooks: the sender knows the secret, and the message is recent.

Uses only the standard library; the decorator imports Flask when it is used, and a public key (``whpk_…``)
needs ``cryptography``. ``docs/receivers`` has the same in one file each for Python, Node and the shell.

::

    from flask_rq_webhooks.receiver import verify

    webhook = verify(request.get_data(), request.headers, secrets=["new secret", "old secret"])
    if not already_seen(webhook.id):
        handle(webhook.json)

Accepted:

* ``webhook-signature`` (Standard Webhooks). If this header is present, it decides: one of its entries must
  be valid, a ``v1`` entry for one of the secrets or a ``v1a`` entry for one of the public keys. Other
  entries, malformed ones included, are skipped, because a sender that rotates its secret sends several.
  ``webhook-id`` and ``webhook-timestamp`` are required.
* ``X-Webhook-Signature: sha256=<lower-case hex>``, only if ``webhook-signature`` is absent **and**
  ``schemes`` names ``"sha256"``. It covers only the body, so anyone who has seen one such request can send it
  again later, and a text that a client chose may have been signed with a shared secret. Only the body is
  taken from the request (``id`` and ``timestamp`` are ``None``); a timestamp header is checked if present.

Refused: a deciding header that comes twice, characters other than printable ASCII, timestamps other than
plain digits without leading zeros, base64 and hex other than the one canonical spelling. Signatures are
compared in constant time. A public key is never used as a shared secret.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hmac import compare_digest
from typing import Any, Literal, ParamSpec

from .errors import SignatureError
from .protocol.signatures import (
    PRIVATE_KEY,
    PUBLIC_KEY,
    body_signature,
    is_signed_by,
    public_key,
    standard_signature,
)

Secrets = str | bytes | Iterable[str | bytes]
Headers = Mapping[Any, Any] | Iterable[tuple[Any, Any]]
Body = bytes | bytearray | memoryview | str
Scheme = Literal["v1", "v1a", "sha256"]

#: Signatures that cover a time. ``"sha256"`` does not, and has to be asked for.
TIMED_SCHEMES: tuple[Scheme, ...] = ("v1", "v1a")
ALL_SCHEMES: tuple[Scheme, ...] = (*TIMED_SCHEMES, "sha256")

P = ParamSpec("P")

_ID = "webhook-id"
_TIMESTAMP = "webhook-timestamp"
_SIGNATURE = "webhook-signature"

# Twelve digits last until the year 33658; int() of many more is slow.
_UNIX_SECONDS = re.compile(r"0|[1-9][0-9]{0,11}")
_ISO_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")
# No full stop: it separates the id from the timestamp in what is signed.
_EVENT_ID = re.compile(r"[!-\-/-~]{1,256}")

_MOST_ENTRIES = 8


@dataclass(frozen=True, slots=True)
class VerifiedWebhook:
    """A webhook whose signature is valid. Every field is covered by that signature.

    :param id: ``webhook-id``: the same on every attempt, so store it to process each event once. ``None``
        under ``sha256``, which does not cover it; the ``job`` payload has it as ``id``, too.
    :param timestamp: aware time of this attempt; ``None`` under ``sha256``.
    :param body: the bytes that were signed.
    :param scheme: ``"v1"``, ``"v1a"`` or ``"sha256"``: which signature was valid.
    """

    id: str | None
    timestamp: datetime | None
    body: bytes = field(repr=False)
    scheme: Scheme = "v1"

    @property
    def json(self) -> Any:
        """Return the body as JSON.

        :raises ValueError: when it is not JSON; a signature says who sent the bytes, not what they are.
        """
        return json.loads(self.body)


def verify(
    body: Body,
    headers: Headers,
    secrets: Secrets,
    *,
    tolerance: float = 300,
    now: datetime | float | None = None,
    header_prefix: str = "X-Webhook",
    schemes: Collection[str] = TIMED_SCHEMES,
    signature_header: str | None = None,
    timestamp_header: str | None = None,
) -> VerifiedWebhook:
    """Verify a received webhook.

    :param body: the bytes as received, before any parsing; a text is taken as its UTF-8 bytes.
    :param headers: any mapping or pairs; names in any case, names and values ``str`` or ASCII ``bytes``.
    :param secrets: the secret, or several of which one must match; empty ones are skipped. A sender's public
        key, ``whpk_…`` (from its ``/webhooks/keys``), verifies ``v1a``.
    :param tolerance: seconds a timestamp may be off, in both directions, the limit included.
    :param now: the time to compare with: aware (a naive one is taken as UTC), or unix seconds.
    :param header_prefix: first part of the sender's ``X-Webhook-*`` headers.
    :param schemes: accepted signatures; one that is not named is treated as absent. Add ``"sha256"`` to
        accept messages whose only signature covers no time.
    :param signature_header: full name of the ``sha256=`` header, if it does not begin with the prefix.
    :param timestamp_header: likewise, of the header with that signature's time.
    :raises SignatureError: for any problem, including arguments of a wrong type. Nothing else is raised.
    """
    try:
        names = (
            signature_header or header_prefix + "-Signature",
            timestamp_header or header_prefix + "-Timestamp",
        )
        return _verify(body, headers, secrets, tolerance, now, names, schemes)
    except SignatureError:
        raise
    except Exception as exc:
        # Header and secret objects come from the caller and may fail in any way; then we must refuse.
        raise SignatureError(f"The webhook could not be read ({type(exc).__name__}).") from exc


def verified_webhook(
    secrets: Secrets | Callable[[], Secrets],
    *,
    tolerance: float = 300,
    header_prefix: str = "X-Webhook",
    schemes: Collection[str] = TIMED_SCHEMES,
    signature_header: str | None = None,
    timestamp_header: str | None = None,
) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
    """Run a Flask view only for webhooks that verify; it finds the webhook in ``flask.g.webhook``.

    Others get 401 and ``{"error": {"code": "invalid_signature", "message": …, "details": {}}}``. Put it
    below ``@app.post``; it works with sync and async views.

    ::

        @app.post("/hooks")
        @verified_webhook(lambda: current_app.config["WEBHOOK_SECRETS"])
        def hook():
            print(g.webhook.json)
            return "", 204

    :param secrets: as for :func:`verify`, or a function that returns them, called for every request. The
        other parameters are those of :func:`verify`.
    """
    # Read once, here: an iterator would be empty at the second request.
    kept: Any = secrets if callable(secrets) or isinstance(secrets, str | bytes) else tuple(secrets)

    def refusal() -> Any:
        import flask

        try:
            flask.g.webhook = verify(
                flask.request.get_data(),
                flask.request.headers,
                kept() if callable(kept) else kept,
                tolerance=tolerance,
                header_prefix=header_prefix,
                schemes=schemes,
                signature_header=signature_header,
                timestamp_header=timestamp_header,
            )
        except SignatureError as exc:
            error = {"code": "invalid_signature", "message": str(exc), "details": {}}
            return flask.jsonify(error=error), 401
        return None

    def decorate(view: Callable[P, Any]) -> Callable[P, Any]:
        if inspect.iscoroutinefunction(view):

            @functools.wraps(view)
            async def async_view(*args: P.args, **kwargs: P.kwargs) -> Any:
                answer = refusal()
                return await view(*args, **kwargs) if answer is None else answer

            return async_view

        @functools.wraps(view)
        def sync_view(*args: P.args, **kwargs: P.kwargs) -> Any:
            answer = refusal()
            return view(*args, **kwargs) if answer is None else answer

        return sync_view

    return decorate


def _verify(
    body: Body,
    headers: Headers,
    secrets: Secrets,
    tolerance: float,
    now: datetime | float | None,
    plain_names: tuple[str, str],
    schemes: Collection[str],
) -> VerifiedWebhook:
    content = body.encode() if isinstance(body, str) else _bytes(body)
    keys = _usable(secrets)
    plain, plain_timestamp = (name.lower() for name in plain_names)
    found = _headers(headers, {_ID, _TIMESTAMP, _SIGNATURE, plain, plain_timestamp})
    current = _unix_time(now)

    if _SIGNATURE in found and not {"v1", "v1a"}.isdisjoint(schemes):
        return _verify_standard(content, found, keys, tolerance, current, schemes)
    if "sha256" not in schemes:
        if plain in found:
            raise SignatureError(
                f"The webhook's only signature, {plain_names[0]}, covers no time, so an old request could be "
                'sent again. Pass schemes=("v1", "sha256") to accept it.'
            )
        raise SignatureError(f"The webhook has no {_SIGNATURE} header.")
    if plain not in found:
        also = f"{_SIGNATURE} and no " if not {"v1", "v1a"}.isdisjoint(schemes) else ""
        raise SignatureError(f"The webhook has no {also}{plain_names[0]} header.")
    for name in (_TIMESTAMP, plain_timestamp):
        if name in found:
            _check_age(_seconds_of(name, found[name], iso=name != _TIMESTAMP), tolerance, current)
    shared = [key for key in keys if not _is_public(key)]
    _require_match([found[plain].encode("ascii")], [body_signature(key, content) for key in shared])
    return VerifiedWebhook(None, None, content, "sha256")


def _verify_standard(
    content: bytes,
    found: Mapping[str, str],
    keys: Iterable[str | bytes],
    tolerance: float,
    current: float,
    schemes: Collection[str],
) -> VerifiedWebhook:
    for name in (_ID, _TIMESTAMP):
        if name not in found:
            raise SignatureError(f"The webhook has no {name} header.")
    event_id = found[_ID]
    if _EVENT_ID.fullmatch(event_id) is None:
        raise SignatureError("The webhook-id header is malformed.")
    timestamp = int(_seconds_of(_TIMESTAMP, found[_TIMESTAMP], iso=False))
    _check_age(timestamp, tolerance, current)
    entries = found[_SIGNATURE].split(" ")
    scheme: Scheme = "v1a"
    if "v1a" not in schemes or not _is_signed_by_any(keys, entries, event_id, timestamp, content):
        scheme = "v1"
        expected = [
            standard_signature(key, event_id, timestamp, content)
            for key in keys
            if "v1" in schemes and not _is_public(key)
        ]
        _require_match([entry.encode("ascii") for entry in entries], expected)
    return VerifiedWebhook(event_id, datetime.fromtimestamp(timestamp, UTC), content, scheme)


def _is_signed_by_any(
    keys: Iterable[str | bytes], entries: Iterable[str], event_id: str, timestamp: int, content: bytes
) -> bool:
    try:
        public = [public_key(_text(key)) for key in keys if _is_public(key)]
    except ValueError as exc:
        raise SignatureError(f"A public key is malformed: {exc}.") from exc
    except ImportError as exc:
        raise SignatureError("Public keys need the package cryptography: pip install cryptography.") from exc
    # Each try costs an elliptic-curve operation; honest senders send one entry for each of a few keys.
    tried = [entry for entry in entries if entry.startswith("v1a,")][:_MOST_ENTRIES]
    return any(is_signed_by(key, entry, event_id, timestamp, content) for key in public for entry in tried)


def _is_public(key: str | bytes) -> bool:
    # A public key is known to everybody: as a shared secret it would let anybody sign.
    return _text(key).startswith(PUBLIC_KEY)


def _text(key: str | bytes) -> str:
    return key if isinstance(key, str) else key.decode("latin-1")


def _require_match(given: Iterable[bytes], expected: Iterable[str]) -> None:
    """Compare whole entries, including the prefix: a signature has one spelling, so nothing is parsed.

    :raises SignatureError: when none of *given* is one of *expected*.
    """
    wanted = [entry.encode("ascii") for entry in expected]
    # A list, not a generator: the number of comparisons does not depend on which one matches.
    if not any([compare_digest(mine, theirs) for mine in wanted for theirs in given]):
        raise SignatureError("No signature of the webhook fits the body and a known secret.")


def _bytes(body: Any) -> bytes:
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    raise SignatureError(f"The body is {type(body).__name__}; pass the bytes as they were received.")


def _usable(secrets: Any) -> list[str | bytes]:
    """Return the secrets that are not empty.

    :raises SignatureError: when there is no secret, or one is not a string.
    """
    listed = [secrets] if isinstance(secrets, str | bytes) else list(secrets)
    for secret in listed:
        if not isinstance(secret, str | bytes):
            raise SignatureError(f"A secret is {type(secret).__name__}; secrets are str or bytes.")
        if _text(secret).startswith(PRIVATE_KEY):
            raise SignatureError("A secret is a private key, whsk_; verify with the public key, whpk_.")
    usable = [secret for secret in listed if secret]
    if isinstance(secrets, Mapping) or not usable:
        raise SignatureError("There is no secret to verify the webhook with.")
    return usable


def _headers(headers: Any, wanted: Collection[str]) -> dict[str, str]:
    """Return the *wanted* headers by lower-case name.

    :raises SignatureError: when one comes twice or is not printable ASCII.
    """
    pairs = headers.items() if hasattr(headers, "items") else headers
    found: dict[str, str] = {}
    for name, value in pairs:
        plain = _ascii(name)
        # ASCII first: lower() turns the Kelvin sign into a k.
        key = None if plain is None else plain.lower()
        if key not in wanted or key is None:
            continue
        if key in found:
            raise SignatureError(f"The {key} header comes twice.")
        text = _ascii(value)
        if text is None or not text.isprintable():
            raise SignatureError(f"The {key} header is malformed.")
        found[key] = text
    return found


def _ascii(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return value if isinstance(value, str) and value.isascii() else None


def _unix_time(now: datetime | float | None) -> float:
    if now is None:
        return datetime.now(UTC).timestamp()
    if isinstance(now, datetime):
        return (now.replace(tzinfo=UTC) if now.tzinfo is None else now).timestamp()
    return float(now)


def _seconds_of(name: str, text: str, *, iso: bool) -> float:
    if _UNIX_SECONDS.fullmatch(text):
        return int(text)
    if iso and _ISO_TIME.fullmatch(text):
        return datetime.fromisoformat(text).timestamp()
    raise SignatureError(f"The {name} header is malformed.")


def _check_age(seconds: float, tolerance: float, current: float) -> None:
    # "not within", rather than "beyond": every comparison with NaN is false.
    if not abs(current - seconds) <= tolerance:
        word = "old" if seconds < current else "new"
        raise SignatureError(f"The webhook's timestamp is too {word}.")
