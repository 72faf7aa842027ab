"""Delete rows that ended long ago (prune), and erase the content of rows that stay.

Erased: results, errors and data of events; the bytes of deliveries; receivers' responses and the headers of
requests; a client's own headers, reference and trace; callback reports kept as evidence. Kept: ids, types,
times, statuses, URLs and signing secrets. ``erased_at`` of event and delivery marks them. Uses bounded
transactions, so that it never blocks the pipeline and can be stopped and started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, exists, false, or_, select, text, update

from ..protocol.payloads import occurrence_from_json, occurrence_to_json
from .database import Database
from .deliveries import BATCH, in_flight
from .dispatchers import forget_dead
from .models import (
    CANCELED,
    CLOSED,
    EXHAUSTED,
    OPEN,
    PENDING,
    RESERVED,
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
from .subscriptions import canceled_now

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows pruning deleted."""

    deliveries: int = 0
    events: int = 0
    watches: int = 0
    endpoints: int = 0
    dispatchers: int = 0


def prune(
    database: Database,
    older_than: datetime,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Pruned:
    """Delete what ended before *older_than*; never anything unfinished.

    First deliveries with their attempts; then events whose deliveries are all gone, watches that are settled
    or closed, and job-bound endpoints that nothing refers to any more, with their secrets. Standing endpoints
    stay.

    :param older_than: aware.
    :param progress: called with the number of rows deleted so far, after each transaction.
    :param should_stop: called after each transaction; another call continues where this one stopped.
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
    undelivered = [Event.created_at < older_than, ~exists().where(Delivery.event_id == Event.id)]
    ended = [Watch.settled_at < older_than, Watch.status.in_([SETTLED, CLOSED])]
    order: Any
    model: Any
    for what, model, order, conditions in (
        ("deliveries", Delivery, Delivery.finished_at, finished),
        ("events", Event, Event.created_at, undelivered),
        ("watches", Watch, Watch.settled_at, ended),
        ("endpoints", Endpoint, Endpoint.id, unused),
    ):
        for connection, ids in _batches(database, order, model.id, conditions, batch, should_stop):
            if model is Delivery:
                connection.execute(delete(Attempt).where(Attempt.delivery_id.in_(ids)))
            # Checked again now that the rows are locked: a delivery may have been made while we waited.
            gone = connection.execute(delete(model).where(model.id.in_(ids), *conditions))
            counted(what, gone.rowcount)
    counted("dispatchers", forget_dead(database))
    return Pruned(**deleted)


def _batches(
    database: Database,
    order: Any,
    key: Any,
    conditions: list[ColumnElement[bool]],
    batch: int,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Connection, list[str]]]:
    """Walk rows in the order of an index; each batch is locked in its own transaction.

    Rows that another transaction has locked are skipped.

    :param order: the indexed column to walk.
    :param key: the id; it may be the same column.
    """
    last: Any = None
    while not should_stop():
        query = select(order, key).where(*conditions).order_by(order, key).limit(batch)
        if last is not None:
            query = query.where(order >= last[0], or_(order > last[0], key > last[1]))
        with database.write() as connection:
            rows = connection.execute(query.with_for_update(skip_locked=True)).all()
            if rows:
                yield connection, [row[-1] for row in rows]
                last = rows[-1]
        if len(rows) < batch:
            return


# -- erasing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """What one call of :func:`erase` did.

    :param events: erased, with their deliveries and attempts.
    :param canceled: deliveries that were unfinished.
    :param in_flight: events with a delivery that is being sent right now. It is canceled; another call erases
        the events once its attempt is recorded or given up.
    :param running: jobs that have not ended; their endings will be reported, and another call erases these.
    """

    events: int = 0
    canceled: int = 0
    in_flight: int = 0
    running: int = 0


def erase(
    database: Database,
    *,
    job_id: str | None = None,
    runid: str | None = None,
    reference: str | None = None,
    tenant: str | None = None,
) -> Erasure:
    """Erase the content of every event of a job, a run, a reference or a tenant.

    Can be stopped and called again.

    Each transaction erases whole events, so a crash leaves nothing half erased.

    On SQLite the freed space is overwritten and the log of a database in WAL mode is emptied as soon as no
    reader needs it. PostgreSQL overwrites freed space when it reuses it after a vacuum.

    Pass exactly one of *job_id*, *runid*, *reference* and *tenant*.
    """
    endpoints, chosen = _meant(job_id, runid, reference, tenant)
    erased = canceled = 0
    after = ""
    while True:
        with database.write() as connection:
            _overwrite_freed_space(database, connection)
            ids = _next(connection, [chosen, Event.erased_at.is_(None)], after)
            canceled += _cancel(database, connection, ids)
            free = _not_in_flight(database, connection, ids)
            _erase_events(database, connection, free)
        erased += len(free)
        if len(ids) < BATCH:
            break
        after = ids[-1]
    with database.write() as connection:
        _overwrite_freed_space(database, connection)
        left = len(_next(connection, [chosen, Event.erased_at.is_(None)]))
        running = _forget_requests(connection, job_id, endpoints)
    if database.is_sqlite:
        _empty_log(database)
    return Erasure(events=erased, canceled=canceled, in_flight=left, running=running)


def erase_finished(database: Database, older_than: datetime) -> int:
    """Erase the bodies and responses of deliveries that finished before *older_than*; return how many.

    Then erase the events whose deliveries are all erased.

    :param older_than: aware.
    """
    finished = [
        Delivery.erased_at.is_(None),
        Delivery.finished_at < older_than,
        Delivery.status.in_([SUCCEEDED, EXHAUSTED, CANCELED]),
        ~in_flight(database),
    ]
    done = 0
    while True:
        with database.write() as connection:
            query = select(Delivery.id).where(*finished).order_by(Delivery.finished_at).limit(BATCH)
            ids = connection.execute(query.with_for_update(skip_locked=True)).scalars().all()
            _erase_deliveries(database, connection, Delivery.id.in_(ids))
        done += len(ids)
        if len(ids) < BATCH:
            break
    readable = exists().where(Delivery.event_id == Event.id, Delivery.erased_at.is_(None))
    while True:
        with database.write() as connection:
            conditions = [Event.erased_at.is_(None), Event.created_at < older_than, ~readable]
            ids = _next(connection, conditions)
            _erase_events(database, connection, ids)
        if len(ids) < BATCH:
            return done


def _meant(
    job_id: str | None, runid: str | None, reference: str | None, tenant: str | None
) -> tuple[Select[Any], ColumnElement[bool]]:
    """Return the query for the endpoints of the chosen requests, and the condition on their events."""
    requests = select(Endpoint.id).where(Endpoint.kind != "standing")
    if job_id is not None:
        watched = exists().where(Watch.endpoint_id == Endpoint.id, Watch.job_id == job_id)
        return requests.where(watched), Event.job_id == job_id
    for column, of_event, value in (
        (Endpoint.runid, Event.runid == runid, runid),
        (Endpoint.tenant, Event.tenant == tenant, tenant),
        (Endpoint.reference, false(), reference),
    ):
        if value is not None:
            requests, own = requests.where(column == value), of_event
    return requests, or_(
        own, exists().where(Delivery.event_id == Event.id, Delivery.endpoint_id.in_(requests))
    )


def _next(connection: Connection, conditions: Sequence[ColumnElement[bool]], after: str = "") -> list[str]:
    query = select(Event.id).where(Event.id > after, *conditions).order_by(Event.id).limit(BATCH)
    return list(connection.execute(query.with_for_update()).scalars())


def _cancel(database: Database, connection: Connection, event_ids: Sequence[str]) -> int:
    return connection.execute(
        update(Delivery)
        .where(Delivery.event_id.in_(event_ids), Delivery.status.in_([PENDING, SENDING]))
        .values(canceled_now(database))
    ).rowcount


def _not_in_flight(database: Database, connection: Connection, event_ids: Sequence[str]) -> list[str]:
    """Return the events without a delivery held by a sender, which could still record a response."""
    held = select(Delivery.event_id).where(Delivery.event_id.in_(event_ids), in_flight(database))
    busy = set(connection.execute(held).scalars())
    return [event_id for event_id in event_ids if event_id not in busy]


def _erase_events(database: Database, connection: Connection, event_ids: Sequence[str]) -> None:
    _erase_deliveries(database, connection, Delivery.event_id.in_(event_ids))
    for event_id, payload in connection.execute(
        select(Event.id, Event.payload).where(Event.id.in_(event_ids))
    ).all():
        skeleton = replace(
            occurrence_from_json(payload),
            result=None,
            error=None,
            data={},
            progress=None,
            result_truncated=False,
        )
        connection.execute(
            update(Event)
            .where(Event.id == event_id)
            .values(payload=occurrence_to_json(skeleton), trace=None, erased_at=database.clock())
        )


def _erase_deliveries(database: Database, connection: Connection, chosen: ColumnElement[bool]) -> None:
    connection.execute(
        update(Attempt)
        .where(Attempt.delivery_id.in_(select(Delivery.id).where(chosen)))
        .values(request_headers=None, response_headers=None, response_body=None, error_detail=None)
    )
    connection.execute(
        update(Delivery)
        .where(chosen, Delivery.erased_at.is_(None))
        .values(body=b"", content_type=None, erased_at=database.clock())
    )


def _forget_requests(connection: Connection, job_id: str | None, endpoints: Any) -> int:
    """Erase what came with requests whose jobs have all ended; return how many jobs have not.

    Their watches are closed: a correction would bring the result back.
    """
    ids = list(connection.execute(endpoints).scalars())
    mine = Watch.endpoint_id.in_(ids) if job_id is None else Watch.job_id == job_id
    waiting = Watch.status.in_([OPEN, RESERVED])
    running = connection.execute(select(Watch.job_id).where(mine, waiting).distinct()).scalars().all()
    connection.execute(update(Watch).where(mine, ~waiting).values(evidence=None, status=CLOSED))
    still = exists().where(Watch.endpoint_id == Endpoint.id, waiting)
    connection.execute(
        update(Endpoint).where(Endpoint.id.in_(ids), ~still).values(headers=None, reference=None, trace=None)
    )
    return len(running)


def _overwrite_freed_space(database: Database, connection: Connection) -> None:
    if database.is_sqlite:
        connection.execute(text("PRAGMA secure_delete = ON"))


def _empty_log(database: Database) -> None:
    """Move the log into the database file and truncate it; SQLite leaves it while a reader needs it."""
    with database.read() as connection:
        raw: Any = connection.connection.driver_connection
        raw.rollback()
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
