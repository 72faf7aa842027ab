"""Which headers and secrets a client may supply, and which header values may be shown.

Everything is checked at the client's request, so that no bad value surfaces hours later in the sender. Source
of the grammar: RFC 9110, sections 5.1, 5.5 and 5.6.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..errors import InvalidWebhookError
from ..tracing import TRACEPARENT, checked

MAX_HEADERS = 32
MAX_NAME_BYTES = 256
MAX_VALUE_BYTES = 4096
MAX_TOTAL_BYTES = 16 * 1024
MAX_SECRET_BYTES = 512

#: Shown in place of a header's value.
MASK = "***"

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"(?:[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?)?")

#: Headers that frame the message, belong to one hop, or are set by the sender itself.
_REFUSED = frozenset({
    "accept-encoding", "alt-svc", "close", "connection", "cookie", "cookie2", "expect", "host",
    "http2-settings", "keep-alive", "set-cookie", "set-cookie2", "te", "trailer", "trailers",
    "transfer-encoding", "upgrade", "user-agent",
})  # fmt: skip
_REFUSED_FAMILIES = ("content-", "proxy-", "webhook-")
#: Headers that servers inside a network trust: a request with them may pass as one from the network's proxy,
#: from another client, for another path, or from a machine that may read cloud metadata (SECURITY 22).
_TRUSTED_INSIDE = frozenset({
    "cdn-loop", "client-ip", "fastly-client-ip", "forwarded", "fly-client-ip", "front-end-https",
    "metadata",  # Azure
    "remote-addr", "remote-user", "true-client-ip", "via", "x-authenticated-user", "x-client-ip",
    "x-cluster-client-ip", "x-envoy-external-address", "x-envoy-original-path", "x-forwarded", "x-host",
    "x-http-destinationurl", "x-http-host-override", "x-http-method", "x-http-method-override",
    "x-metadata-token", "x-method-override", "x-real-ip", "x-rewrite-url",
})  # fmt: skip
_TRUSTED_INSIDE_FAMILIES = (
    "cf-",  # Cloudflare
    "metadata-",  # Google Cloud and others
    "x-arr-",  # Azure's request routing
    "ssl-client-", "x-aliyun-", "x-amzn-", "x-appengine-", "x-auth-request-", "x-aws-ec2-metadata-",
    "x-azure-", "x-envoy-internal", "x-forwarded-", "x-goog-", "x-google-", "x-ms-client-principal",
    "x-original-", "x-remote-", "x-ssl-", "x-webauth-",
)  # fmt: skip
#: Signature headers of other senders: their receivers must not take our request for one of theirs.
_SIGNATURE = re.compile(
    r"(?:.*-)?(?:signature|sig|hmac|signed)(?:-.*)?"
    r"|x-gitlab-token|x-goog-channel-token|x-telegram-bot-api-secret-token|aws-signature|svix-.*"
)

#: Headers whose values reveal nothing about the client; they are shown unchanged.
_SHOWN = frozenset(
    {"accept", "content-type", "user-agent", "accept-encoding", "webhook-id", "webhook-timestamp"}
)
_SHOWN_OF_FAMILY = ("event", "delivery", "attempt", "timestamp")


def validate_headers(mapping: object, *, header_prefix: str = "X-Webhook") -> dict[str, str]:
    """Return the client's headers if all of them may be sent.

    :param mapping: untrusted; names to values.
    :param header_prefix: prefix of our own headers, which a client cannot set.
    :raises InvalidWebhookError: with every reason under ``details["webhook_headers"]``.
    """
    if not isinstance(mapping, Mapping):
        raise _invalid(["Expected an object of header names and values."])
    if len(mapping) > MAX_HEADERS:
        raise _invalid([f"At most {MAX_HEADERS} headers are accepted, not {len(mapping)}."])
    reasons: list[str] = []
    accepted: dict[str, str] = {}
    seen: set[str] = set()
    total = 0
    for name, value in mapping.items():
        reason = _refusal(name, value, header_prefix)
        if reason is None and name.lower() in seen:
            reason = f"{_shown(name)} is given more than once."
        if reason is not None:
            reasons.append(reason)
            continue
        seen.add(name.lower())
        accepted[str(name)] = str(value)
        total += len(name) + len(value)
    if total > MAX_TOTAL_BYTES:
        reasons.append(f"All headers together are {total} bytes; at most {MAX_TOTAL_BYTES} are accepted.")
    if reasons:
        raise _invalid(reasons)
    return accepted


def validate_secret(text: object) -> str:
    """Return the client's signing secret unchanged, if it is valid.

    :param text: untrusted; 1 to 512 bytes in UTF-8. Never trimmed.
    :raises InvalidWebhookError: with the reason under ``details["webhook_secret"]``; the secret is not shown.
    """
    reason = "Expected a string."
    if isinstance(text, str):
        try:
            length = len(text.encode())
            if 1 <= length <= MAX_SECRET_BYTES:
                return text
            reason = f"Expected 1 to {MAX_SECRET_BYTES} bytes, not {length}."
        except UnicodeEncodeError:
            reason = "Expected text that can be written in UTF-8."
    raise InvalidWebhookError(
        f"The webhook secret is not acceptable: {reason}", details={"webhook_secret": [reason]}
    )


def mask_headers(mapping: Mapping[str, str], *, header_prefix: str = "X-Webhook") -> dict[str, str]:
    """Return the headers as they may be stored and shown: all names, but only harmless values of our own.

    :param mapping: headers that were or will be sent.
    :param header_prefix: prefix of our own headers.
    """
    shown = _shown_names(header_prefix)
    return {
        name: value
        if name in shown or name.lower() in shown or (name == TRACEPARENT and checked(value) is not None)
        else MASK
        for name, value in mapping.items()
    }


@lru_cache(maxsize=4)
def _shown_names(header_prefix: str) -> frozenset[str]:
    ours = {f"{header_prefix}-{name}".lower() for name in _SHOWN_OF_FAMILY}
    return _SHOWN | ours


def _refusal(name: Any, value: Any, header_prefix: str) -> str | None:
    """Return why this header is refused, or ``None``."""
    if not isinstance(name, str) or not isinstance(value, str):
        return f"{_shown(name)}: name and value must be strings."
    if not _NAME.fullmatch(name):
        return f"{_shown(name)} is not a header name."
    if len(name) > MAX_NAME_BYTES:
        return f"{_shown(name)} is longer than {MAX_NAME_BYTES} bytes."
    # Servers that map both to one variable (CGI, WSGI) take Content_Length for Content-Length.
    folded = name.lower().replace("_", "-")
    families = (*_REFUSED_FAMILIES, f"{header_prefix.lower()}-")
    if folded in _REFUSED or folded.startswith(families) or folded == header_prefix.lower():
        return f"{_shown(name)} cannot be set by a client."
    if folded in _TRUSTED_INSIDE or folded.startswith(_TRUSTED_INSIDE_FAMILIES):
        return f"{_shown(name)} cannot be set by a client: servers inside a network trust it."
    if _SIGNATURE.fullmatch(folded):
        return f"{_shown(name)} cannot be set by a client: receivers take it for a sender's signature."
    if len(value) > MAX_VALUE_BYTES:
        return f"{_shown(name)}: the value is longer than {MAX_VALUE_BYTES} bytes."
    if not _VALUE.fullmatch(value):
        return f"{_shown(name)}: the value must be printable ASCII without space at its ends."
    return None


def _shown(name: object) -> str:
    return repr(name)[:80] if isinstance(name, str) else f"a name of type {type(name).__name__}"


def _invalid(reasons: list[str]) -> InvalidWebhookError:
    return InvalidWebhookError(
        f"The webhook headers are not acceptable: {reasons[0]}", details={"webhook_headers": reasons}
    )
