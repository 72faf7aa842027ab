"""Short ways to fill our tables through the package's own functions, and to look into them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

from sqlalchemy import select, update

from flask_rq_webhooks.protocol.events import JOB_SUCCESS, Occurrence, format_time
from flask_rq_webhooks.storage.attempts import AttemptRecord, Decision
from flask_rq_webhooks.storage.claims import ClaimedDelivery, claim_due
from flask_rq_webhooks.storage.crypto import Cipher
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from flask_rq_webhooks.storage.events import IngestedEvent, IngestItem, ingest
from flask_rq_webhooks.storage.models import Base, Delivery
from flask_rq_webhooks.storage.subscriptions import EndpointRow

CIPHER = Cipher(["a key for tests"])
NAMESPACE = "testtest"
MAX_ATTEMPTS = 12

SUCCEEDED = Decision(status="succeeded")
EXHAUSTED = Decision(status="exhausted", error_code="http_4xx")


def retry_in(delay_s: float, error_code: str = "http_5xx") -> Decision:
    return Decision(status="pending", delay_s=delay_s, error_code=error_code)


def new_endpoint(database: Database, *, job_id: str | None = None, **values: Any) -> str:
    """Register an endpoint; with *job_id*, and a reserved watch on it."""
    host = values.pop("host", "hooks.example.com")
    endpoint = NewEndpoint(url=values.pop("url", f"https://{host}/x"), host=host, **values)
    return register(database, CIPHER, endpoint, namespace=NAMESPACE, reserved_job_id=job_id)


def occurrence(job_id: str | None = "job-1", *, begun_s_ago: float = 0.0, **values: Any) -> Occurrence:
    """Return the success of a run that began now, unless *values* say otherwise."""
    now = datetime.now(UTC)
    enqueued_at = values.pop("enqueued_at", now - timedelta(seconds=begun_s_ago))
    first = Occurrence(
        type=JOB_SUCCESS,
        occurred_at=now,
        source="callback",
        job_id=job_id,
        run=format_time(enqueued_at or now) if job_id is not None else None,
        enqueued_at=enqueued_at,
        result={"answer": 42},
    )
    return replace(first, **values)


def render(endpoint: EndpointRow, event_id: str, what: Occurrence) -> bytes:
    """Return a body that tells what it was rendered from."""
    return json.dumps([event_id, what.type, what.job_id, endpoint.reference, what.result]).encode()


def publish(database: Database, *items: IngestItem | Occurrence, **options: Any) -> list[IngestedEvent]:
    """Ingest *items* with :func:`render`."""
    whole = [item if isinstance(item, IngestItem) else IngestItem(item) for item in items]
    options = {"render": render, "max_attempts": MAX_ATTEMPTS} | options
    return ingest(database, whole, **options)


def deliver_to(database: Database, host: str, count: int = 1, **values: Any) -> list[str]:
    """Make *count* due deliveries to one host, each of its own job; return their ids."""
    endpoint_id = new_endpoint(database, host=host, **values)
    made = [IngestItem(occurrence(f"{endpoint_id}-{number}"), (endpoint_id,)) for number in range(count)]
    events = [event.event_id for event in publish(database, *made)]
    with database.read() as connection:
        query = select(Delivery.id, Delivery.event_id).where(Delivery.event_id.in_(events))
        by_event = {event_id: delivery_id for delivery_id, event_id in connection.execute(query)}
    return [by_event[event_id] for event_id in events]


def claim(database: Database, **options: Any) -> list[ClaimedDelivery]:
    """Claim as a dispatcher with 64 free places does."""
    return claim_due(database, **({"limit": 64, "per_host": 8, "in_flight": {}, "lease_s": 45.0} | options))


def attempt(delivery: ClaimedDelivery, decision: Decision = SUCCEEDED, **values: Any) -> AttemptRecord:
    """Return the record of one attempt."""
    first = AttemptRecord(
        delivery=delivery,
        started_at=datetime.now(UTC),
        duration_ms=12.5,
        status_code=204 if decision.status == "succeeded" else 500,
        error_code=None,
        error_detail=None,
        request_headers={"X-Webhook-Attempt": str(delivery.number)},
        response_headers={"content-type": "text/plain"},
        response_body=b"ok",
        decision=decision,
    )
    return replace(first, **values)


def rows(database: Database, model: type[Base], *conditions: Any) -> list[Any]:
    """Return whole rows, in the order of their ids."""
    table = model.__table__
    with database.read() as connection:
        return list(connection.execute(select(table).where(*conditions).order_by(table.c.id)))


def row(database: Database, model: type[Base], *conditions: Any) -> Any:
    """Return the one row there is."""
    (found,) = rows(database, model, *conditions)
    return found


def set_values(database: Database, model: type[Base], row_id: str, **values: Any) -> None:
    """Change a row behind the package's back, as time would."""
    with database.write() as connection:
        connection.execute(update(model).where(model.id == row_id).values(**values))  # type: ignore[attr-defined]


@contextmanager
def statements_of(database: Database) -> Iterator[list[str]]:
    """Note every statement that is executed meanwhile."""
    statements: list[str] = []
    dialect = database.engine.dialect
    ways = ("do_execute", "do_executemany", "do_execute_no_params")  # to the driver
    with patch.multiple(
        dialect, **{way: partial(_note_and_execute, statements, getattr(dialect, way)) for way in ways}
    ):
        yield statements


def _note_and_execute(statements: list[str], execute: Any, cursor: Any, statement: str, *rest: Any) -> None:
    statements.append(statement)
    execute(cursor, statement, *rest)
