"""Record: an attempt and everything that follows from it, in one transaction.

Owns the status of a delivery after an attempt, and the record of standing endpoints. Knows nothing of
HTTP: what to do next was decided before (:mod:`~flask_rq_webhooks.protocol.retry`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, String, bindparam, select, text, update

from ..protocol.retry import Decision
from .bulk_insert import insert_or_ignore
from .claims import ClaimedDelivery
from .database import Database
from .models import SUCCEEDED, Attempt, Delivery, Endpoint, UTCDateTime, new_id

#: A standing endpoint is disabled only when it has failed for this long, however many attempts that were.
FAILING_FOR = timedelta(hours=24)

#: Why a standing endpoint was disabled: it answered 410 Gone, or it failed too often.
GONE = "gone"
FAILING = "failing"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One attempt that was made, and what it means.

    :param request_headers: as sent, secrets masked.
    :param response_body: cut to the stored cap.
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
    """What became of a batch.

    :param recorded: delivery id → its status now.
    :param stale: deliveries no longer held by the sender: its lease had ended. Nothing was recorded; they
        are sent again, or were, with the same event id.
    :param disabled: standing endpoint id → reason, of those this batch disabled.
    """

    recorded: Mapping[str, str]
    stale: tuple[str, ...]
    disabled: Mapping[str, str]


def latest_outcomes(database: Database, limit: int) -> dict[str, bool]:
    """Return hosts with whether their latest attempt succeeded, as far as one ever did.

    :param limit: latest attempts that are looked at.
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
    """Store attempts, set their deliveries' status and next attempt, and free the leases; one transaction.

    Only where the lease is still the sender's own. A delivery that an operator canceled while it was being
    sent keeps the attempt and stays canceled, unless the attempt succeeded: what arrived has arrived. May
    be repeated with the same records: those recorded before are stale then.

    :param disable_after: consecutive failed attempts that disable a standing endpoint which has been
        failing for :data:`FAILING_FOR`.
    :param in_transaction: called before the commit with what is about to be committed.
    """
    if not records:
        return RecordResult({}, (), {})
    # Of two attempts of one delivery in a batch, the earlier was made under a lease that has run out.
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
            connection.execute(insert_or_ignore(database, Attempt), attempts)
        disabled = _judge_standing(database, connection, kept, disable_after)
        recorded = {record.delivery.id: statuses[record.delivery.id] for record in kept}
        result = RecordResult(recorded, tuple(stale), disabled)
        in_transaction(connection, result)
    return result


def _update_deliveries(
    database: Database, connection: Connection, records: Mapping[str, AttemptRecord]
) -> dict[str, str]:
    """Update what is still held, in one statement; return its status now by id."""
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


# One statement for a batch: a statement per row costs more than all the rest. Every batch locks in the order
# of ids, so that none wait in a circle; and the clock is read after the locks, for which it may have waited.
# "+" keeps SQLite from looking through all rows of that status.

_UPDATE_POSTGRESQL = text("""
WITH made AS MATERIALIZED (
    SELECT * FROM json_to_recordset(CAST(:made AS json))
    AS (id text, lease text, number integer, status text, delay_s double precision, code integer, error text)
),
held AS MATERIALIZED (
    SELECT id FROM rq_webhooks_delivery
    WHERE id IN (SELECT id FROM made) AND status IN ('sending', 'canceled') ORDER BY id FOR UPDATE
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
  AND d.status IN ('sending', 'canceled')
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
        return {}  # all is well, and was: nothing to write, no row to wait for
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
