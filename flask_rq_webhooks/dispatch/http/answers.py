"""What may come back: how much of a response is read, and what of it is kept.

Owns the caps, the list of headers worth keeping and the cleaning of what a stranger wrote. Every transport
keeps to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .transport_errors import Failure

#: Bytes of a response body that are kept.
BODY_CAP = 16 * 1024
#: Bytes of an answer's status lines and headers, those of interim responses (100, 103) included.
MAX_HEADER_BYTES = 64 * 1024
#: Headers of one response.
MAX_HEADERS = 100

#: Response headers worth keeping; everything else a receiver sends is dropped.
KEPT_HEADERS = (
    "content-type",
    "content-length",
    "content-encoding",
    "date",
    "server",
    "retry-after",
    "location",
    "allow",
    "www-authenticate",
    "x-request-id",
    "x-correlation-id",
)
_KEPT = {name.encode(): name for name in KEPT_HEADERS}
_MAX_KEPT_VALUE = 256
_MAX_DETAIL = 300


def head_of(status: int, raw_headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Return the fields of :class:`.AttemptResult` that status line and headers tell.

    With ``error_code`` ``redirect`` the body is not to be read.

    :param raw_headers: names and values as they came; values of one name are joined.
    """
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw_headers:
        name = _KEPT.get(raw_name) or _KEPT.get(raw_name.lower())
        if name is not None:
            value = raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    for name, value in headers.items():
        headers[name] = clean(value, _MAX_KEPT_VALUE)
    if "location" in headers:
        headers["location"] = headers["location"].partition("?")[0]
    outcome: dict[str, Any] = {
        "status_code": status,
        "response_headers": headers,
        "retry_after": headers.get("retry-after"),
    }
    if 300 <= status < 400:
        outcome["error_code"] = "redirect"
        outcome["error_detail"] = f"redirects are not followed ({status})"
    return outcome


def failed(failure: Failure) -> dict[str, Any]:
    """Return the fields of :class:`.AttemptResult` for an attempt without an answer."""
    return {"error_code": failure.code, "error_detail": clean(failure.detail, _MAX_DETAIL)}


def broken() -> dict[str, Any]:
    """Return the fields of :class:`.AttemptResult` for a fault of ours, which is in the log."""
    return {"error_code": "internal", "error_detail": "an error of the sender; see its log"}


def clean(text: str, limit: int) -> str:
    """Return untrusted text fit for a database column and a page."""
    text = text[:limit]
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
