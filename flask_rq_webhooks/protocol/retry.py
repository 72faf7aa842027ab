"""Decide what follows from one attempt: succeeded, another attempt later, or exhausted.

Owns the rules for statuses and the parsing of ``Retry-After``. Never sleeps; knows nothing of rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

#: Longest delay a receiver can ask for, seconds.
MAX_RETRY_AFTER_S = 86_400.0
#: Statuses that often pass within minutes: we called back before the client stored the job's id, or it is
#: rotating its keys. They get the first delays of the schedule, and no more attempts than these.
SHORT_LIVED_STATUSES = frozenset({401, 403, 404})
SHORT_LIVED_ATTEMPTS = 5

#: Attempts of a ``job.progress``, and the seconds between them: soon there is a newer one.
PROGRESS_ATTEMPTS = 3
PROGRESS_SCHEDULE = (1.0, 4.0)

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
    :param disable_endpoint: the receiver said that it is gone for good (410).
    :param error_code: recorded with the attempt; ``None`` on success.
    """

    status: Literal["succeeded", "pending", "exhausted"]
    delay_s: float | None = None
    disable_endpoint: bool = False
    error_code: str | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to make another attempt.

    :param schedule: seconds before the second, third, … attempt; the last one repeats where an endpoint
        allows more attempts than the schedule has.
    :param statuses: HTTP statuses that are retried; :data:`SHORT_LIVED_STATUSES` are in any case, but not
        as often.
    :param max_retry_after_s: longest delay a receiver can ask for.
    :param jitter: share by which a delay varies, so that many deliveries do not return in one moment after
        an outage.
    """

    schedule: tuple[float, ...]
    statuses: frozenset[int]
    jitter: float = 0.1
    max_retry_after_s: float = MAX_RETRY_AFTER_S

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
        retry_4xx: bool = True,
    ) -> Decision:
        """Decide what follows from an attempt.

        :param status_code: the receiver's status, ``None`` without a response.
        :param error_code: what the transport found; it goes before the status, which may be what is left of
            a connection shut down at its deadline.
        :param number: number of the attempt just made, from 1.
        :param max_attempts: attempts this delivery may make in all.
        :param retry_after: the ``Retry-After`` header of the response, as it came.
        :param now: aware time of the response.
        :param random: returns a number from 0 to 1.
        :param retry_4xx: whether a 4xx may be retried; not so for ``format="task"``, whose contract is that
            every 4xx is final.
        """
        if status_code is not None and (error_code is None or error_code in _STATUS_CODES):
            error_code = error_code_for_status(status_code)
            if error_code is None:
                return Decision(status="succeeded")
            may_retry = retry_4xx or not 400 <= status_code <= 499
            again, gone = may_retry and self._is_retried(status_code, number), status_code == _GONE
        else:
            error_code = error_code or "internal"
            again, gone = error_code not in _FINAL_CODES, False
        if not again or number >= max_attempts or not self.schedule:
            return Decision(status="exhausted", disable_endpoint=gone, error_code=error_code)
        return Decision(
            status="pending", delay_s=self._delay_s(number, retry_after, now, random), error_code=error_code
        )

    def _is_retried(self, status_code: int, number: int) -> bool:
        if status_code == _GONE:
            return False
        if not 200 <= status_code <= 599:
            # No valid final answer: "as if it had a 5xx (Server Error) status code", RFC 9110, section 15.
            status_code = 500
        if status_code in self.statuses:
            return True
        return status_code in SHORT_LIVED_STATUSES and number < SHORT_LIVED_ATTEMPTS

    def _delay_s(
        self, number: int, retry_after: str | None, now: datetime, random: Callable[[], float]
    ) -> float:
        scheduled = self.schedule[min(max(number, 1), len(self.schedule)) - 1]
        delay = scheduled * (1 + self.jitter * (2 * random() - 1))
        asked = None if retry_after is None else parse_retry_after(retry_after, now)
        if asked is None:
            return delay
        return max(delay, scheduled, min(asked, self.max_retry_after_s))


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

    Strict, since receivers are not trusted: ``nan``, signs, fractions, non-ASCII digits and numbers of more
    than ten digits give ``None``, as does a date in none of HTTP's forms.

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


#: Error codes as clients see them: not whether a name exists or an address is private.
_COARSE = {"blocked": "unreachable", "dns": "unreachable", "connect": "unreachable"}


def coarse_code(code: str | None) -> str | None:
    """Return an error code as far as clients may know it."""
    return None if code is None else _COARSE.get(code, code)
