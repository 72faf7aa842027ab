"""Values as pages show them: times, spans, numbers, and text that strangers wrote.

Every function returns plain text, which templates escape. Knows nothing of requests and of storage.
"""

from __future__ import annotations

import re
import shlex
from base64 import b64encode
from collections.abc import Mapping
from datetime import datetime, timedelta

#: What could deceive a terminal, an editor or a reader: control characters, and those that change the
#: direction of text.
_DECEPTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)

#: Bytes of a body that a page shows.
BODY_SHOWN = 64 * 1024

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def readable(value: object) -> str:
    """Return text of a stranger with every deceptive character written as ``\\u202e``."""
    text = str(value).replace("\r\n", "\n")
    return _DECEPTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def body_text(body: bytes, *, limit: int = BODY_SHOWN) -> str:
    """Return the beginning of a body as text."""
    text = readable(body[:limit].decode("utf-8", "replace"))
    return text if len(body) <= limit else f"{text}\n… {len(body) - limit} more bytes"


def moment(value: datetime | None) -> str:
    """Return a time in UTC, to the second."""
    return "–" if value is None else value.strftime("%Y-%m-%d %H:%M:%S")


def span(seconds: float) -> str:
    """Return a span of time in its two largest units: ``3 h 12 min``."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for size, name in _UNITS:
        if left >= size or (size == 1 and not parts):
            parts.append(f"{left // size} {name}")
            left %= size
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts)


def distance(value: datetime, now: datetime) -> str:
    """Return how far *value* is from *now*: ``3 min ago``, ``in 2 h``."""
    seconds = (value - now).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"in {span(seconds)}" if seconds > 0 else f"{span(-seconds)} ago"


def milliseconds(value: float | None) -> str:
    """Return a duration in its usual unit."""
    if value is None:
        return "–"
    if value < 1000:
        return f"{value:.0f} ms"
    return span(value / 1000) if value >= 60_000 else f"{timedelta(milliseconds=value).total_seconds():.1f} s"


def number(value: int, cap: int | None = None) -> str:
    """Return a count with thousands separated; above *cap*, the cap and a plus."""
    if cap is not None and value > cap:
        return f"{cap:,}+"
    return f"{value:,}"


def as_curl(url: str, headers: Mapping[str, str], body: bytes) -> str:
    """Return the request as a command for a POSIX shell.

    Everything is quoted, so that nothing in it can become a command of its own.

    :param url: what may be shown of it.
    :param headers: masked.
    """
    lines = [f"curl {shlex.quote(readable(url))}", "--request POST"]
    lines += [f"--header {shlex.quote(readable(f'{name}: {value}'))}" for name, value in headers.items()]
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = None
    if text is None or _DECEPTIVE.search(text):
        # No terminal takes this as typed.
        encoded = shlex.quote(b64encode(body).decode())
        return f"printf %s {encoded} | base64 -d | " + " \\\n  ".join([*lines, "--data-binary @-"])
    return " \\\n  ".join([*lines, f"--data-raw {shlex.quote(text)}"])
