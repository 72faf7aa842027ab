"""Attempts: decide what follows from each one, and record it with its consequences in one transaction.

:class:`RetryPolicy` makes the decision and is pure. Owns a delivery's status after an attempt, and the
failure counts of standing endpoints. Knows nothing of how requests are sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from sqlalchemy import Connection, String, bindparam, select, text, update

from .bulk_insert import insert_new
from .claims import ClaimedDelivery
from .database import Database
from .models import SUCCEEDED, Attempt, Delivery, Endpoint, UTCDateTime, new_id

#: A standing endpoint is disabled for failures only after failing this long, however many attempts failed.
FAILING_FOR = timedelta(hours=24)

#: Why a standing endpoint was disabled: it answered 410 Gone, or it failed too often.
GONE = "gone"
FAILING = "failing"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """A completed attempt, and the decision that follows from it.

    :param request_headers: as sent, secrets masked.
    :param response_body: truncated to the maximum that is stored.
    """

    delivery: ClaimedDelivery
    started_at: datetime
    duration_ms: float
    status_code: int | None
    error_code: str | None
    error_detail: str | None
    request_headers: Mapping[str, str] = field(repr=False)
    response_headers: Mapping[str, str] = field(repr=False)
    response_body: bytes = field(repr=False)
    decision: Decision


@dataclass(frozen=True, slots=True)
class RecordResult:
    """The result of recording a batch.

    :param recorded: delivery id → its new status.
    :param stale: deliveries that the sender no longer held because its lease had ended. Nothing was recorded
        for them; they will be sent again, or already were, with the same event id.
    :param disabled: standing endpoint id → reason, for the endpoints that this batch disabled.
    """

    recorded: Mapping[str, str]
    stale: tuple[str, ...]
    disabled: Mapping[str, str]


def latest_outcomes(database: Database, limit: int) -> dict[str, bool]:
    """Map hosts to whether their latest attempt succeeded; leave out hosts where none ever did.

    :param limit: how many of the latest attempts are examined.
    """
    latest = (
        select(Attempt.delivery_id, Attempt.status, Attempt.started_at)
        .order_by(Attempt.started_at.desc())
        .limit(limit)
        .subquery()
    )
    query = (
        select(Delivery.host, latest.c.status)
        .join(latest, latest.c.delivery_id == Delivery.id)
        .order_by(latest.c.started_at)
    )
    outcomes: dict[str, bool] = {}
    with database.read() as connection:
        for host, status in connection.execute(query):
            if status == SUCCEEDED or host in outcomes:
                outcomes[host] = status == SUCCEEDED
    return outcomes


def record_attempts(
    database: Database,
    records: Sequence[AttemptRecord],
    *,
    dispatcher_id: str,
    disable_after: int,
    in_transaction: Callable[[Connection, RecordResult], object] = lambda connection, result: None,
) -> RecordResult:
    """Store attempts, set the deliveries' status and next attempt, and free leases, in one transaction.

    Only deliveries whose lease the sender still holds are changed. If an operator canceled a delivery while
    it was being sent, the attempt is stored and the delivery stays canceled, unless the attempt succeeded:
    then it did arrive. Safe to call again with the same records: those already recorded are then stale.

    :param disable_after: number of consecutive failed attempts that disables a standing endpoint, once it
        has been failing for :data:`FAILING_FOR`.
    :param in_transaction: called before the commit with the result that is about to be committed.
    """
    if not records:
        return RecordResult({}, (), {})
    # If a batch holds two attempts of one delivery, the earlier one's lease had expired.
    newest: dict[str, AttemptRecord] = {}
    for record in sorted(records, key=lambda record: record.delivery.lease_id):
        newest[record.delivery.id] = record
    kept: list[AttemptRecord] = []
    stale: list[str] = []
    with database.write(repeated=True) as connection:
        statuses = _update_deliveries(database, connection, newest)
        for record in records:
            delivery_id = record.delivery.id
            if delivery_id in statuses and newest[delivery_id] is record:
                kept.append(record)
            else:
                stale.append(delivery_id)
        if kept:
            attempts = [_attempt_values(record, dispatcher_id) for record in kept]
            insert_new(database, connection, Attempt, attempts)
        disabled = _judge_standing(database, connection, kept, disable_after)
        recorded = {record.delivery.id: statuses[record.delivery.id] for record in kept}
        result = RecordResult(recorded, tuple(stale), disabled)
        in_transaction(connection, result)
    return result


def _update_deliveries(
    database: Database, connection: Connection, records: Mapping[str, AttemptRecord]
) -> dict[str, str]:
    """Update the deliveries that are still held, in one statement; return their new status by id."""
    now = datetime.now(UTC)
    made = [
        {
            "id": delivery_id,
            "lease": record.delivery.lease_id,
            "number": record.delivery.number,
            "status": record.decision.status,
            "delay_s": record.decision.delay_s or 0.0,
            "due": _as_sqlite_stores(now + timedelta(seconds=record.decision.delay_s or 0.0)),
            "code": record.status_code,
            "error": _error_code(record),
        }
        for delivery_id, record in records.items()
    ]
    statement = _UPDATE_SQLITE if database.is_sqlite else _UPDATE_POSTGRESQL
    parameters: dict[str, Any] = {"made": json.dumps(made)} | ({"now": now} if database.is_sqlite else {})
    return {row.id: row.status for row in connection.execute(statement, parameters)}


def _as_sqlite_stores(moment: datetime) -> str:
    return moment.replace(tzinfo=None).isoformat(" ", "microseconds")


# One statement per batch: a statement per row costs more than everything else. Every batch locks rows in the
# order of their ids, so that batches cannot deadlock. The clock is read after taking the locks, because
# waiting for them takes time. "+" and "||" keep the databases from scanning all rows with that status;
# PostgreSQL would scan all rows that had it since the last vacuum.

_UPDATE_POSTGRESQL = text("""
WITH made AS MATERIALIZED (
    SELECT * FROM json_to_recordset(CAST(:made AS json))
    AS (id text, lease text, number integer, status text, delay_s double precision, code integer, error text)
),
held AS MATERIALIZED (
    SELECT id FROM rq_webhooks_delivery
    WHERE id = ANY (ARRAY(SELECT id FROM made)) AND status || '' IN ('sending', 'canceled')
    ORDER BY id FOR UPDATE
)
UPDATE rq_webhooks_delivery AS d
SET status = CASE WHEN d.status = 'canceled' AND m.status <> 'succeeded' THEN 'canceled' ELSE m.status END,
    attempts = m.number,
    next_attempt_at = CASE WHEN m.status = 'pending' AND d.status <> 'canceled'
        THEN clock_timestamp() + make_interval(secs => m.delay_s) END,
    finished_at = CASE WHEN m.status <> 'pending' OR d.status = 'canceled' THEN clock_timestamp() END,
    status_code = m.code, error_code = m.error, trigger = 'scheduled', lease_id = NULL, lease_until = NULL
FROM made m JOIN held h ON h.id = m.id
WHERE d.id = m.id AND d.lease_id = m.lease AND d.attempts + 1 = m.number
  AND d.status || '' IN ('sending', 'canceled')
RETURNING d.id, d.status
""").bindparams(bindparam("made", type_=String))

_UPDATE_SQLITE = text("""
UPDATE rq_webhooks_delivery AS d
SET status = CASE WHEN d.status = 'canceled' AND m.status <> 'succeeded' THEN 'canceled' ELSE m.status END,
    attempts = m.number,
    next_attempt_at = CASE WHEN m.status = 'pending' AND d.status <> 'canceled' THEN m.due END,
    finished_at = CASE WHEN m.status <> 'pending' OR d.status = 'canceled' THEN :now END,
    status_code = m.code, error_code = m.error, trigger = 'scheduled', lease_id = NULL, lease_until = NULL
FROM (
    SELECT json_extract(value, '$.id') AS id, json_extract(value, '$.lease') AS lease,
           json_extract(value, '$.number') AS number, json_extract(value, '$.status') AS status,
           json_extract(value, '$.due') AS due, json_extract(value, '$.code') AS code,
           json_extract(value, '$.error') AS error
    FROM json_each(:made)
) m
WHERE d.id = m.id AND d.lease_id = m.lease AND d.attempts + 1 = m.number
  AND +d.status IN ('sending', 'canceled')
RETURNING id, status
""").bindparams(bindparam("now", type_=UTCDateTime))


def _attempt_values(record: AttemptRecord, dispatcher_id: str) -> dict[str, Any]:
    return {
        "id": new_id("att"),
        "delivery_id": record.delivery.id,
        "number": record.delivery.number,
        "trigger": record.delivery.trigger,
        "status": "succeeded" if record.decision.status == SUCCEEDED else "failed",
        "status_code": record.status_code,
        "error_code": _error_code(record),
        "error_detail": record.error_detail,
        "started_at": record.started_at,
        "duration_ms": record.duration_ms,
        "request_headers": json.dumps(dict(record.request_headers)),
        "response_headers": json.dumps(dict(record.response_headers)),
        "response_body": record.response_body,
        "dispatcher_id": dispatcher_id,
    }


def _error_code(record: AttemptRecord) -> str | None:
    return record.error_code or record.decision.error_code


def _judge_standing(
    database: Database, connection: Connection, records: Sequence[AttemptRecord], disable_after: int
) -> dict[str, str]:
    """Count failures of standing endpoints and disable those that failed too often; return those."""
    by_endpoint: dict[str, list[AttemptRecord]] = {}
    for record in records:
        if record.delivery.endpoint_kind == "standing":
            by_endpoint.setdefault(record.delivery.endpoint_id, []).append(record)
    if not by_endpoint:
        return {}
    columns = (Endpoint.id, Endpoint.enabled, Endpoint.failures, Endpoint.failing_since)
    query = select(*columns).where(Endpoint.id.in_(sorted(by_endpoint))).order_by(Endpoint.id)
    touched = [
        row.id
        for row in connection.execute(query)
        if row.failures or any(record.decision.status != SUCCEEDED for record in by_endpoint[row.id])
    ]
    if not touched:
        return {}  # no failures, now or before: nothing to write, no row to wait for
    disabled: dict[str, str] = {}
    locked = query.where(Endpoint.id.in_(touched)).with_for_update(key_share=True)
    held = connection.execute(locked).all()
    now = database.now(connection)  # after the locks: waiting for them takes time
    for row in held:
        failures, failing_since, gone = row.failures, row.failing_since, False
        for record in by_endpoint[row.id]:
            if record.decision.status == SUCCEEDED:
                failures, failing_since = 0, None
            else:
                failures, failing_since = failures + 1, failing_since or now
                gone = gone or record.decision.disable_endpoint
        values: dict[str, Any] = {"failures": failures, "failing_since": failing_since}
        failed_long = failing_since is not None and now - failing_since >= FAILING_FOR
        if row.enabled and (gone or (failures >= disable_after and failed_long)):
            disabled[row.id] = GONE if gone else FAILING
            values |= {"enabled": False, "disabled_at": now, "disabled_reason": disabled[row.id]}
        connection.execute(update(Endpoint).where(Endpoint.id == row.id).values(values))
    return disabled


# -- retry: deciding what follows an attempt ---------------------------------------------------------------

#: Longest delay a receiver can ask for, in seconds.
MAX_RETRY_AFTER_S = 86_400.0
#: Statuses that often go away within minutes: we delivered before the client stored the job's id, or it is
#: rotating its keys. They use the first delays of the schedule, for this many attempts in all.
SHORT_LIVED_STATUSES = frozenset({401, 403, 404})
SHORT_LIVED_ATTEMPTS = 5

#: Attempts for a ``job.progress`` event, and the seconds between them: a newer one follows soon.
PROGRESS_ATTEMPTS = 3
PROGRESS_SCHEDULE = (1.0, 4.0)

#: Error codes after which another attempt cannot help.
_FINAL_CODES = frozenset({"blocked", "rate_limited", "redirect", "http_4xx"})
#: Error codes that restate an HTTP status; if the status is known, it decides.
_STATUS_CODES = frozenset({"redirect", "http_4xx", "http_5xx"})

_GONE = 410
_SECONDS = re.compile(r"[0-9]{1,10}")
_TIME = "[0-9]{2}:[0-9]{2}:[0-9]{2}"
_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
# The three forms of RFC 9110, section 5.6.7; the standard library accepts far more than these.
_HTTP_DATE = re.compile(
    rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), [0-9]{{2}} (?:{_MONTHS}) [0-9]{{4}} {_TIME} GMT"
    r"|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day,"
    rf" [0-9]{{2}}-(?:{_MONTHS})-[0-9]{{2}} {_TIME} GMT"
    rf"|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) (?:{_MONTHS}) [ 0-9][0-9] {_TIME} [0-9]{{4}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What happens to a delivery after an attempt.

    :param status: ``"succeeded"``, ``"pending"`` (retried after *delay_s*) or ``"exhausted"``.
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

    :param schedule: seconds before the second, third, … attempt; the last value repeats if an endpoint
        allows more attempts than the schedule covers.
    :param statuses: HTTP statuses that are retried.
    :param short_lived: HTTP statuses that are retried, up to :data:`SHORT_LIVED_ATTEMPTS` attempts in all.
    :param max_retry_after_s: longest delay a receiver can ask for.
    :param jitter: fraction by which a delay varies, so that many deliveries are not retried at the same
        moment after an outage.
    """

    schedule: tuple[float, ...]
    statuses: frozenset[int]
    jitter: float = 0.1
    max_retry_after_s: float = MAX_RETRY_AFTER_S
    short_lived: frozenset[int] = SHORT_LIVED_STATUSES

    def for_endpoint(self, schedule: str | None, statuses: str | None) -> RetryPolicy:
        """Return the policy for an endpoint, which may set its own schedule and statuses.

        :param schedule: JSON list of seconds; ``None`` keeps this policy's.
        :param statuses: JSON list as in :class:`~.models.EndpointFields`: no other status is retried.
        """
        policy = self
        if schedule is not None:
            policy = replace(policy, schedule=tuple(json.loads(schedule)))
        if statuses is not None:
            chosen = {code for text in json.loads(statuses) for code in _codes(text)}
            policy = replace(policy, statuses=frozenset(chosen), short_lived=frozenset())
        return policy

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
        """Decide what happens after an attempt.

        :param status_code: the receiver's status, ``None`` without a response.
        :param error_code: error found by the transport; it takes precedence over the status, which may be
            left over from a connection shut down at its deadline.
        :param number: number of the attempt just made, from 1.
        :param max_attempts: total number of attempts allowed for this delivery.
        :param retry_after: the ``Retry-After`` header of the response, as received.
        :param now: time of the response, timezone-aware.
        :param random: returns a number from 0 to 1.
        :param retry_4xx: whether a 4xx may be retried. ``False`` for ``format="task"``, whose contract is
            that every 4xx is final, unless the endpoint sets its own statuses.
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
            # Not a final status: "as if it had a 5xx (Server Error) status code", RFC 9110, section 15.
            status_code = 500
        if status_code in self.statuses:
            return True
        return status_code in self.short_lived and number < SHORT_LIVED_ATTEMPTS

    def _delay_s(
        self, number: int, retry_after: str | None, now: datetime, random: Callable[[], float]
    ) -> float:
        scheduled = self.schedule[min(max(number, 1), len(self.schedule)) - 1]
        delay = scheduled * (1 + self.jitter * (2 * random() - 1))
        asked = None if retry_after is None else parse_retry_after(retry_after, now)
        if asked is None:
            return delay
        return max(delay, scheduled, min(asked, self.max_retry_after_s))


def _codes(text: str) -> range:
    """Return the statuses that ``"429"`` or ``"5xx"`` stands for."""
    return range(int(text.replace("x", "0")), int(text.replace("x", "9")) + 1)


def error_code_for_status(status: int) -> str | None:
    """Return the error code of an HTTP status, ``None`` for 2xx.

    An invalid final status (below 200, above 599) counts as ``http_5xx`` (RFC 9110, section 15).
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
    than ten digits give ``None``, as does a date that is in none of HTTP's formats.

    :param now: timezone-aware.
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


#: Error codes as shown to clients: they do not reveal whether a name exists or an address is private.
_COARSE = {"blocked": "unreachable", "dns": "unreachable", "connect": "unreachable"}


def coarse_code(code: str | None) -> str | None:
    """Return an error code in the form that clients may see."""
    return None if code is None else _COARSE.get(code, code)
