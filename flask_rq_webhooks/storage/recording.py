"""Record: an attempt and everything that follows from it, in one transaction.

Owns the status of a delivery after an attempt, and the record of standing endpoints. Knows nothing of
HTTP: what to do next was decided before (:mod:`~flask_rq_webhooks.protocol.retry`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from ..protocol.retry import Decision
from .claiming import ClaimedDelivery
from .database import Database
from .models import CANCELED, PENDING, SCHEDULED, SENDING, SUCCEEDED, Attempt, Delivery, Endpoint, new_id
from .upsert import insert_or_ignore

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


def record_attempts(
    database: Database, records: Sequence[AttemptRecord], *, dispatcher_id: str, disable_after: int
) -> RecordResult:
    """Store attempts, set their deliveries' status and next attempt, and free the leases; one transaction.

    Only where the lease is still the sender's own. A delivery that an operator canceled while it was being
    sent keeps the attempt and stays canceled, unless the attempt succeeded: what arrived has arrived. May
    be repeated with the same records: those recorded before are stale then.

    :param disable_after: consecutive failed attempts that disable a standing endpoint which has been
        failing for :data:`FAILING_FOR`.
    """
    if not records:
        return RecordResult({}, (), {})
    with database.write() as connection:
        held = _held(connection, records)
        # After the locks: waiting for them takes time.
        now = database.now(connection)
        recorded: dict[str, str] = {}
        stale: list[str] = []
        kept: list[AttemptRecord] = []
        changes: list[dict[str, Any]] = []
        attempts: list[dict[str, Any]] = []
        for record in records:
            delivery = record.delivery
            row = held.pop(delivery.id, None)
            if row is None or row.lease_id != delivery.lease_id or row.attempts + 1 != delivery.number:
                stale.append(delivery.id)
                continue
            status: str = record.decision.status
            if row.status == CANCELED and status != SUCCEEDED:
                status = CANCELED
            recorded[delivery.id] = status
            kept.append(record)
            changes.append(_delivery_values(record, status, now))
            attempts.append(_attempt_values(record, dispatcher_id))
        if kept:
            connection.execute(_UPDATE_DELIVERY, changes)
            connection.execute(insert_or_ignore(database, Attempt), attempts)
        disabled = _judge_standing(connection, kept, disable_after, now)
    return RecordResult(recorded, tuple(stale), disabled)


def _held(connection: Connection, records: Sequence[AttemptRecord]) -> dict[str, Any]:
    ids = [record.delivery.id for record in records]
    return {row.id: row for row in connection.execute(_HELD, {"ids": ids})}


# Built once: building them costs more than running them.

_HELD = (
    select(Delivery.id, Delivery.lease_id, Delivery.status, Delivery.attempts)
    .where(Delivery.id.in_(bindparam("ids", expanding=True)), Delivery.status.in_([SENDING, CANCELED]))
    .order_by(Delivery.id)  # every batch locks in this order, so that none wait in a circle
    .with_for_update()
)

_UPDATE_DELIVERY = (
    update(Delivery)
    .where(Delivery.id == bindparam("delivery"))
    .values(
        status=bindparam("new_status"),
        attempts=bindparam("made"),
        next_attempt_at=bindparam("due"),
        status_code=bindparam("code"),
        error_code=bindparam("error"),
        finished_at=bindparam("finished"),
        trigger=SCHEDULED,
        lease_id=None,
        lease_until=None,
    )
)


def _delivery_values(record: AttemptRecord, status: str, now: datetime) -> dict[str, Any]:
    waits = status == PENDING
    return {
        "delivery": record.delivery.id,
        "new_status": status,
        "made": record.delivery.number,
        "due": now + timedelta(seconds=record.decision.delay_s or 0.0) if waits else None,
        "code": record.status_code,
        "error": _error_code(record),
        "finished": None if waits else now,
    }


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
    connection: Connection, records: Sequence[AttemptRecord], disable_after: int, now: datetime
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
    for row in connection.execute(locked).all():
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
