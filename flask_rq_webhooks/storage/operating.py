"""What people do with deliveries: resend, recover, cancel; and what time does: prune.

Owns the changes that come from outside the pipeline. Everything long is done in bounded transactions, so
that it never holds the pipeline up, and may be stopped and started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, delete, exists, or_, select, text, update

from ..protocol.events import WEBHOOK_PING, Occurrence
from ..protocol.payloads import occurrence_from_json
from .database import Database
from .dispatchers import forget_dead
from .filters import DeliveryFilter
from .ingesting import (
    ENDPOINT_COLUMNS,
    EndpointRow,
    Render,
    delivery_values,
    endpoint_row,
    store_deliveries,
)
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

__all__ = ["DeliveryFilter", "Pruned", "cancel", "hasten", "prune", "recover", "resend"]

Progress = Callable[[int], None]

#: Rows per transaction of everything that may touch many.
BATCH = 500


def resend(database: Database, delivery_id: str) -> str | None:
    """Make a delivery due now, for one more attempt, whatever became of it before.

    Same event id, same bytes. The attempt decides the status anew: a delivery that had succeeded and now
    fails for the last time is exhausted.

    :returns: its status now: ``"pending"``; ``"sending"``, unchanged, where an attempt is under way; ``None``
        where there is no such delivery.
    """
    with database.write() as connection:
        row = connection.execute(
            select(Delivery.status, _in_flight(database).label("in_flight"))
            .where(Delivery.id == delivery_id)
            .with_for_update()
        ).one_or_none()
        if row is None:
            return None
        if row.in_flight:
            return SENDING
        connection.execute(update(Delivery).where(Delivery.id == delivery_id).values(_again(database)))
    return PENDING


def hasten(database: Database) -> int:
    """Make every delivery due that waits for its next attempt; return how many.

    Unlike :func:`recover` it changes nothing else: same trigger, same number of attempts left.
    """
    with database.write(single_statement=True) as connection:
        return connection.execute(
            update(Delivery)
            .where(Delivery.status == text("'pending'"), Delivery.next_attempt_at > database.clock())
            .values(next_attempt_at=database.clock())
        ).rowcount


def recover(
    database: Database,
    where: DeliveryFilter,
    *,
    render: Render,
    max_attempts: int,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> int:
    """Make many deliveries due now, for one more attempt each; return how many.

    Without ``where.statuses``: those exhausted or canceled, and those that were never made because their
    standing endpoint was disabled when the event happened (since that endpoint was made, by what it listens
    for now). With it: those of these statuses.

    :param render: see :func:`~.ingesting.ingest`; for deliveries that were never made.
    :param max_attempts: for those too, where the endpoint sets none.
    :param progress: called with the number done so far, after each transaction.
    """
    done = 0
    chosen = replace(where, statuses=where.statuses or (EXHAUSTED, CANCELED))
    ready = ~_in_flight(database)
    for connection, ids in _batches(database, Delivery.id, [*chosen.conditions(), ready], batch):
        changed = connection.execute(
            update(Delivery).where(Delivery.id.in_(ids), ready).values(_again(database))
        )
        done += changed.rowcount
        if progress is not None:
            progress(done)
    if where.statuses is None:
        for made in _make_missing(database, where, render, max_attempts, batch):
            done += made
            if progress is not None and made:
                progress(done)
    return done


def cancel(
    database: Database, where: DeliveryFilter, *, batch: int = BATCH, progress: Progress | None = None
) -> int:
    """Cancel unfinished deliveries; return how many.

    One that is being sent is canceled too: its attempt is still recorded, and no other follows.

    :param where: its ``statuses`` may narrow this to ``pending`` or ``sending``.
    :param progress: called with the number done so far, after each transaction.
    """
    unfinished = {PENDING, SENDING}
    statuses = tuple(sorted(unfinished.intersection(where.statuses or unfinished)))
    if not statuses:
        return 0
    chosen = replace(where, statuses=statuses)
    done = 0
    for connection, ids in _batches(database, Delivery.id, chosen.conditions(), batch):
        changed = connection.execute(
            update(Delivery)
            .where(Delivery.id.in_(ids), Delivery.status.in_(statuses))
            # The lease stays: the sender that holds it may still record its attempt.
            .values(status=CANCELED, next_attempt_at=None, finished_at=database.clock())
        )
        done += changed.rowcount
        if progress is not None:
            progress(done)
    return done


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
        ~_in_flight(database),
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
        Endpoint.kind == "job",
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


def _again(database: Database) -> dict[str, Any]:
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


def _in_flight(database: Database) -> ColumnElement[bool]:
    """Return whether a sender holds the delivery; a canceled one may still be under way."""
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


def _make_missing(
    database: Database, where: DeliveryFilter, render: Render, max_attempts: int, batch: int
) -> Iterator[int]:
    """Make the deliveries that standing endpoints missed while disabled; yield how many, by batch."""
    query = select(*ENDPOINT_COLUMNS).where(Endpoint.kind == "standing", Endpoint.enabled)
    if where.endpoint_id is not None:
        query = query.where(Endpoint.id == where.endpoint_id)
    if where.host is not None:
        query = query.where(Endpoint.host == where.host)
    with database.read() as connection:
        endpoints = [endpoint_row(row) for row in connection.execute(query)]
    for endpoint in endpoints:
        last = first_id_at("evt", max(endpoint.created_at, where.since or endpoint.created_at))
        while last:
            made, last = _make_missing_batch(database, endpoint, where, last, render, max_attempts, batch)
            yield made


def _make_missing_batch(
    database: Database,
    endpoint: EndpointRow,
    where: DeliveryFilter,
    after: str,
    render: Render,
    max_attempts: int,
    batch: int,
) -> tuple[int, str]:
    query = (
        select(Event.id, Event.type, Event.payload)
        .where(
            Event.id > after,
            Event.type != WEBHOOK_PING,
            ~exists().where(Delivery.event_id == Event.id, Delivery.endpoint_id == endpoint.id),
        )
        .order_by(Event.id)
        .limit(batch)
    )
    if where.until is not None:
        query = query.where(Event.id < first_id_at("evt", where.until))
    for column, wanted in (
        (Event.type, where.event_type),
        (Event.id, where.event_id),
        (Event.job_id, where.job_id),
        (Event.runid, where.runid),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    with database.write() as connection:
        now = database.now(connection)
        events = connection.execute(query).all()
        rows = []
        for event in events:
            if not endpoint.wants(event.type):
                continue
            occurrence: Occurrence = occurrence_from_json(event.payload)
            if occurrence.scope != endpoint.scope:
                continue
            body = render(endpoint, event.id, occurrence)
            rows.append(
                delivery_values(
                    event.id, event.type, endpoint, body, max_attempts=max_attempts, now=now, trigger=MANUAL
                )
            )
        made = store_deliveries(database, connection, rows)
    return sum(made.values()), events[-1].id if len(events) == batch else ""
