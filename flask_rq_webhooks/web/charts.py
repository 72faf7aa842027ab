"""The geometry of the overview's chart: numbers in, rectangles out.

A template draws it as inline SVG beside a table of the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ..storage.statistics import Hour

#: What is drawn, from the bottom of a bar to its top.
OUTCOMES = ("succeeded", "exhausted", "canceled")

#: Size of the drawing, in its own units; the page stretches it.
WIDTH, HEIGHT = 1000.0, 200.0

#: Hours looked back → hours per bar.
RANGES = {24: 1, 168: 6, 720: 24}


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

    :param top: what the upper edge of the drawing stands for.
    :param ticks: labels of the time axis: position in percent, and text.
    """

    bars: tuple[Bar, ...]
    top: int
    total: int
    ticks: tuple[tuple[float, str], ...]


def endings(hours: Sequence[Hour], *, now: datetime, back: int = 24) -> Chart:
    """Return the chart of finished deliveries over time.

    :param hours: hours in which any finished.
    :param back: one of :data:`RANGES`.
    """
    size_s = RANGES[back] * 3600
    count = back // RANGES[back]
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
        label = began.strftime("%H:%M" if back == 24 else "%d %b %H:%M" if back == 168 else "%d %b")
        bars.append(Bar(began, label, sums[start], _stack(sums[start], index * slot, slot, top)))
    step = max(1, count // 6)
    ticks = tuple((100 * (i + 0.5) / count, bars[i].label) for i in range(step // 2, count, step))
    return Chart(tuple(bars), top, sum(sum(numbers.values()) for numbers in sums.values()), ticks)


def nice_top(most: int) -> int:
    """Return the smallest of 4, 6, 8, 10, 16, 20, 30, 40, 60, 80, 100, … that is not below *most*.

    All even, so that the line in the middle also stands for a whole number.
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
