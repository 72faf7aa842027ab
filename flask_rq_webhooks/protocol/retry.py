"""What follows from one attempt: done, again later, or given up.

Owns the status rules and the reading of ``Retry-After``. Decides, never sleeps; knows nothing of rows
and leases.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

#: A receiver can put the next attempt off by this much, seconds.
MAX_RETRY_AFTER_S = 86_400.0

#: Error codes after which another attempt cannot help.
_FINAL_CODES = frozenset({"blocked", "rate_limited", "redirect", "http_4xx"})
#: Error codes that restate an HTTP status; the status decides where it is known.
_STATUS_CODES = frozenset({"redirect", "http_4xx", "http_5xx"})

_GONE = 410
_SECONDS = re.compile(r"[0-9]{1,10}")
_TIME = "[0-9]{2}:[0-9]{2}:[0-9]{2}"
_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
# The three forms of RFC 9110, section 5.6.7; the standard library reads far more than these.
_HTTP_DATE = re.compile(
    rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), [0-9]{{2}} (?:{_MONTHS}) [0-9]{{4}} {_TIME} GMT"
    r"|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day,"
    rf" [0-9]{{2}}-(?:{_MONTHS})-[0-9]{{2}} {_TIME} GMT"
    rf"|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) (?:{_MONTHS}) [ 0-9][0-9] {_TIME} [0-9]{{4}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of a delivery after an attempt.

    :param status: ``"succeeded"``, ``"pending"`` (again after *delay_s*) or ``"exhausted"``.
    :param delay_s: seconds until the next attempt; ``None`` unless pending.
    :param disable_endpoint: the receiver said that it is gone for good.
    :param error_code: what the attempt is recorded with; ``None`` on success.
    """

    status: Literal["succeeded", "pending", "exhausted"]
    delay_s: float | None = None
    disable_endpoint: bool = False
    error_code: str | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    :param schedule: seconds before the second, third, … attempt; the last one repeats where an endpoint
        allows more attempts than the schedule has.
    :param statuses: HTTP statuses worth another attempt.
    :param jitter: share by which a delay is spread, so that a receiver's outage does not end in a
        stampede.
    """

    schedule: tuple[float, ...]
    statuses: frozenset[int]
    jitter: float = 0.1

    def decide(
        self,
        *,
        status_code: int | None,
        error_code: str | None,
        number: int,
        max_attempts: int,
        retry_after: str | None,
        now: datetime,
        random: Callable[[], float],
    ) -> Decision:
        """Decide what follows from an attempt.

        :param status_code: the receiver's answer, ``None`` where there was none.
        :param error_code: what the transport found; it goes before a status, which may be the remains of
            a connection shut down at its deadline.
        :param number: number of the attempt just made, from 1.
        :param max_attempts: attempts this delivery may make in all.
        :param retry_after: the answer's ``Retry-After`` header, as it came.
        :param now: aware time the answer came.
        :param random: returns a number from 0 to 1.
        """
        if status_code is not None and (error_code is None or error_code in _STATUS_CODES):
            error_code = error_code_for_status(status_code)
            if error_code is None:
                return Decision(status="succeeded")
            again, gone = self._is_retried(status_code), status_code == _GONE
        else:
            error_code = error_code or "internal"
            again, gone = error_code not in _FINAL_CODES, False
        if not again or number >= max_attempts or not self.schedule:
            return Decision(status="exhausted", disable_endpoint=gone, error_code=error_code)
        return Decision(
            status="pending", delay_s=self._delay_s(number, retry_after, now, random), error_code=error_code
        )

    def _is_retried(self, status_code: int) -> bool:
        if status_code == _GONE:
            return False
        if not 200 <= status_code <= 599:
            # No valid final answer: "as if it had a 5xx (Server Error) status code", RFC 9110, section 15.
            status_code = 500
        return status_code in self.statuses

    def _delay_s(
        self, number: int, retry_after: str | None, now: datetime, random: Callable[[], float]
    ) -> float:
        scheduled = self.schedule[min(max(number, 1), len(self.schedule)) - 1]
        delay = scheduled * (1 + self.jitter * (2 * random() - 1))
        asked = None if retry_after is None else parse_retry_after(retry_after, now)
        if asked is None:
            return delay
        return max(delay, scheduled, min(asked, MAX_RETRY_AFTER_S))


def error_code_for_status(status: int) -> str | None:
    """Return the error code of an HTTP status, ``None`` for 2xx.

    What is no valid final status (below 200, above 599) counts as ``http_5xx`` (RFC 9110, section 15).
    """
    if 200 <= status <= 299:
        return None
    if 300 <= status <= 399:
        return "redirect"
    if 400 <= status <= 499:
        return "http_4xx"
    return "http_5xx"


def parse_retry_after(value: str, now: datetime) -> float | None:
    """Return the seconds a ``Retry-After`` header asks for, 0 for a date that has passed.

    Strict, since receivers are not trusted: ``nan``, signs, fractions, other digits than ASCII and
    numbers of more than ten digits are ``None``, as is a date that is not one of HTTP's forms.

    :param now: aware.
    """
    text = value.strip(" \t")
    if _SECONDS.fullmatch(text):
        return float(text)
    if not _HTTP_DATE.fullmatch(text):
        return None
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())
