"""What people do with one delivery: resend; with all that wait: make_all_due; and what time does: prune.

Owns the changes that come from outside the pipeline, but for those to many deliveries by a filter, which are
in :mod:`~.bulk`. Everything long is done in bounded transactions, so that it never holds the pipeline
up, and may be stopped and started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, delete, exists, or_, select, text, update

from ..errors import ErasedError
from .database import Database
from .dispatchers import forget_dead
from .models import (
    CANCELED,
    CLOSED,
    EXHAUSTED,
    MANUAL,
    PENDING,
    SENDING,
    SETTLED,
    SHARED,
    SUCCEEDED,
    Attempt,
    Delivery,
    Dispatcher,
    Endpoint,
    Event,
    Watch,
    first_id_at,
)

Progress = Callable[[int], None]

#: Rows per transaction of everything that may touch many.
BATCH = 500


def resend(database: Database, delivery_id: str, *, tenant: str | None = None) -> str | None:
    """Make a delivery due now, for one more attempt, whatever became of it before.

    Same event id, same bytes. The attempt decides the status anew: a delivery that had succeeded and now
    fails for the last time is exhausted.

    :param tenant: only one of this tenant's.
    :returns: its status now: ``"pending"``; ``"sending"``, unchanged, where an attempt is under way; ``None``
        where there is no such delivery.
    :raises ErasedError: when its body was erased.
    """
    with database.write() as connection:
        row = connection.execute(
            select(Delivery.status, Delivery.erased_at, in_flight(database).label("in_flight"))
            .where(Delivery.id == delivery_id, *([] if tenant is None else [Delivery.tenant == tenant]))
            .with_for_update()
        ).one_or_none()
        if row is None:
            return None
        if row.erased_at is not None:
            raise ErasedError(f"The body of delivery {delivery_id} was erased; it cannot be sent again.")
        if row.in_flight:
            return SENDING
        connection.execute(update(Delivery).where(Delivery.id == delivery_id).values(due_again(database)))
    return PENDING


def make_all_due(database: Database) -> int:
    """Make every delivery due that waits for its next attempt; return how many.

    Unlike :func:`recover` it changes nothing else: same trigger, same number of attempts left.
    """
    with database.write(single_statement=True) as connection:
        return connection.execute(
            update(Delivery)
            .where(Delivery.status == text("'pending'"), Delivery.next_attempt_at > database.clock())
            .values(next_attempt_at=database.clock())
        ).rowcount


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows pruning deleted."""

    deliveries: int = 0
    events: int = 0
    watches: int = 0
    endpoints: int = 0
    dispatchers: int = 0


def prune(
    database: Database, older_than: datetime, *, batch: int = BATCH, progress: Progress | None = None
) -> Pruned:
    """Delete what ended before *older_than*; never anything unfinished.

    Deliveries with their attempts; events all of whose deliveries are gone; watches that are settled or
    closed; then job-bound endpoints that nothing points to any more, with their secrets. Standing endpoints
    stay.

    :param older_than: aware.
    :param progress: called with the number of rows deleted so far, after each transaction.
    """
    deleted: dict[str, int] = {}

    def counted(what: str, rows: int) -> None:
        deleted[what] = deleted.get(what, 0) + rows
        if progress is not None and rows:
            progress(sum(deleted.values()))

    finished = [
        Delivery.finished_at < older_than,
        Delivery.status.in_([SUCCEEDED, EXHAUSTED, CANCELED]),
        ~in_flight(database),
    ]
    for connection, ids in _batches(database, Delivery.finished_at, finished, batch, key=Delivery.id):
        connection.execute(delete(Attempt).where(Attempt.delivery_id.in_(ids)))
        gone = connection.execute(delete(Delivery).where(Delivery.id.in_(ids), *finished))
        counted("deliveries", gone.rowcount)
    has_delivery = exists().where(Delivery.event_id == Event.id)
    for connection, ids in _batches(
        database, Event.created_at, [Event.created_at < older_than, ~has_delivery], batch, key=Event.id
    ):
        # Asked again now that the rows are locked: a delivery may have been made while we waited.
        gone = connection.execute(delete(Event).where(Event.id.in_(ids), ~has_delivery))
        counted("events", gone.rowcount)
    ended = [Watch.settled_at < older_than, Watch.status.in_([SETTLED, CLOSED])]
    for connection, ids in _batches(database, Watch.settled_at, ended, batch, key=Watch.id):
        gone = connection.execute(delete(Watch).where(Watch.id.in_(ids), *ended))
        counted("watches", gone.rowcount)
    with database.read() as connection:
        namespace = connection.execute(
            select(Dispatcher.namespace).where(Dispatcher.id == SHARED)
        ).scalar_one_or_none()
    unused = [
        Endpoint.kind != "standing",
        Endpoint.created_at < older_than,
        ~exists().where(Watch.endpoint_id == Endpoint.id),
        ~exists().where(Delivery.endpoint_id == Endpoint.id),
    ]
    if namespace is not None:
        unused.append(Endpoint.id < first_id_at("ep" + namespace, older_than))
    for connection, ids in _batches(database, Endpoint.id, unused, batch):
        gone = connection.execute(delete(Endpoint).where(Endpoint.id.in_(ids), *unused))
        counted("endpoints", gone.rowcount)
    counted("dispatchers", forget_dead(database))
    return Pruned(**deleted)


def due_again(database: Database) -> dict[str, Any]:
    """Return the values that make a delivery due now, for one more attempt by hand."""
    one_more = Delivery.attempts + 1
    return {
        "status": PENDING,
        "trigger": MANUAL,
        "next_attempt_at": database.clock(),
        "max_attempts": case((Delivery.max_attempts < one_more, one_more), else_=Delivery.max_attempts),
        "finished_at": None,
        "lease_id": None,
        "lease_until": None,
    }


def canceled_now(database: Database) -> dict[str, Any]:
    """Return the values that cancel a delivery. The lease stays: its sender may still record the attempt."""
    return {"status": CANCELED, "next_attempt_at": None, "finished_at": database.clock()}


def in_flight(database: Database) -> ColumnElement[bool]:
    """Return the condition that a sender holds the delivery; a canceled one may still be under way."""
    held = or_(Delivery.status == SENDING, Delivery.status == CANCELED)
    return held & Delivery.lease_until.is_not(None) & (Delivery.lease_until > database.clock())


def _batches(
    database: Database,
    order: Any,
    conditions: list[ColumnElement[bool]],
    batch: int,
    *,
    key: Any = None,
) -> Iterator[tuple[Connection, list[str]]]:
    """Walk rows in the order of an index, each batch locked in a transaction of its own.

    Rows that another transaction has locked are left out.

    :param order: the indexed column to walk.
    :param key: the id, where *order* is not the id itself.
    """
    columns = (order,) if key is None else (order, key)
    last: Any = None
    while True:
        query = select(*columns).where(*conditions).order_by(*columns).limit(batch)
        if last is not None and key is None:
            query = query.where(order > last[0])
        elif last is not None:
            query = query.where(order >= last[0], or_(order > last[0], key > last[1]))
        with database.write() as connection:
            rows = connection.execute(query.with_for_update(skip_locked=True)).all()
            if rows:
                yield connection, [row[-1] for row in rows]
                last = rows[-1]
        if len(rows) < batch:
            return
