"""Format values for pages: times, spans, numbers, text from untrusted sources, and the bars of the chart.

Functions return plain text, which templates escape; or rectangles, which a template draws as inline SVG
next to a table of the same numbers. None of them depends on the request.
"""

from __future__ import annotations

import re
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ..storage.statistics import Hour

#: Characters that could deceive a terminal, an editor or a reader: control characters, and those that change
#: the direction of text.
_DECEPTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)

#: Maximum bytes of a body that a page shows.
BODY_SHOWN = 64 * 1024

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def readable(value: object) -> str:
    """Return untrusted text with every deceptive character written as an escape such as ``\\u202e``."""
    text = str(value).replace("\r\n", "\n")
    return _DECEPTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def body_text(body: bytes) -> str:
    """Return the beginning of a body as text."""
    text = readable(body[:BODY_SHOWN].decode("utf-8", "replace"))
    return text if len(body) <= BODY_SHOWN else f"{text}\n… {len(body) - BODY_SHOWN} more bytes"


def moment(value: datetime | None) -> str:
    """Return a time in UTC, to the second."""
    return "–" if value is None else value.strftime("%Y-%m-%d %H:%M:%S")


def span(seconds: float) -> str:
    """Return a span of time in its two largest units: ``3 h 12 min``."""
    left = max(0, round(seconds))
    parts: list[tuple[int, str]] = []
    for size, name in _UNITS:
        count, left = divmod(left, size)
        if count or parts or size == 1:
            parts.append((count, name))
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count or len(parts) == 1)


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

    :param url: the part of the URL that may be shown.
    :param headers: the masked headers.
    """
    lines = [f"curl {shlex.quote(readable(url))}", "--request POST"]
    lines += [f"--header {shlex.quote(readable(f'{name}: {value}'))}" for name, value in headers.items()]
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = None
    if text is None or _DECEPTIVE.search(text):
        # No terminal accepts this as typed text.
        encoded = shlex.quote(b64encode(body).decode())
        return f"printf %s {encoded} | base64 -d | " + " \\\n  ".join([*lines, "--data-binary @-"])
    return " \\\n  ".join([*lines, f"--data-raw {shlex.quote(text)}"])


# -- the chart of the overview ----------------------------------------------------------------------------

#: The parts of a bar, from bottom to top.
OUTCOMES = ("succeeded", "exhausted", "canceled")

#: Size of the drawing, in its own units; the page stretches it.
WIDTH, HEIGHT = 1000.0, 200.0

#: Hours looked back → name, hours per bar, and how a bar's time is written.
RANGES = {
    24: ("24 hours", 1, "%H:%M"),
    168: ("7 days", 6, "%d %b %H:%M"),
    720: ("30 days", 24, "%d %b"),
}


@dataclass(frozen=True, slots=True)
class Rectangle:
    """One part of a bar."""

    outcome: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """The deliveries that finished within one slice of time."""

    start: datetime
    label: str
    numbers: dict[str, int]
    parts: tuple[Rectangle, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars from left to right.

    :param top: the value that the upper edge of the drawing represents.
    :param ticks: labels of the time axis: position in percent, and text.
    """

    bars: tuple[Bar, ...]
    top: int
    total: int
    ticks: tuple[tuple[float, str], ...]


def endings(hours: Sequence[Hour], *, now: datetime, back: int = 24) -> Chart:
    """Return the chart of finished deliveries over time.

    :param hours: hours in which any delivery finished.
    :param back: one of :data:`RANGES`.
    """
    _name, size_h, written = RANGES[back]
    size_s, count = size_h * 3600, back // size_h
    last = int(now.timestamp()) // size_s
    starts = range(last - count + 1, last + 1)
    sums: dict[int, dict[str, int]] = {start: dict.fromkeys(OUTCOMES, 0) for start in starts}
    for hour in hours:
        found = sums.get(int(hour.start.timestamp()) // size_s)
        if found is not None:
            for outcome in OUTCOMES:
                found[outcome] += getattr(hour, outcome)
    top = nice_top(max(sum(numbers.values()) for numbers in sums.values()))
    slot = WIDTH / count
    bars = []
    for index, start in enumerate(starts):
        began = datetime.fromtimestamp(start * size_s, UTC)
        label = began.strftime(written)
        bars.append(Bar(began, label, sums[start], _stack(sums[start], index * slot, slot, top)))
    step = max(1, count // 6)
    ticks = tuple((100 * (i + 0.5) / count, bars[i].label) for i in range(step // 2, count, step))
    return Chart(tuple(bars), top, sum(sum(numbers.values()) for numbers in sums.values()), ticks)


def nice_top(most: int) -> int:
    """Return the smallest of 4, 6, 8, 10, 16, 20, 30, 40, 60, 80, 100, … that is not below *most*.

    All are even, so that the line in the middle also represents a whole number.
    """
    scale = 1
    while True:
        for step in (4, 6, 8, 10, 16, 20, 30):
            if most <= step * scale:
                return step * scale
        scale *= 10


def _stack(numbers: dict[str, int], x: float, slot: float, top: int) -> tuple[Rectangle, ...]:
    parts = []
    base = HEIGHT
    for outcome in OUTCOMES:
        if numbers[outcome]:
            # A single failure among thousands stays visible.
            height = max(2.0, HEIGHT * numbers[outcome] / top)
            base -= height
            left, width = round(x + slot * 0.12, 2), round(slot * 0.76, 2)
            parts.append(Rectangle(outcome, left, round(base, 2), width, round(height, 2)))
    return tuple(parts)
