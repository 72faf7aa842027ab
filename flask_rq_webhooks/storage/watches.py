"""What reconcile reads and notes of watches.

Owns the statements behind :mod:`~flask_rq_webhooks.observe.reconcile`; those of trees are in
:mod:`~flask_rq_webhooks.storage.tree_members`. Knows nothing of Redis: it is told what RQ says. Events and
deliveries are made in :mod:`~flask_rq_webhooks.storage.events` alone.

A watch's ``run`` is the last run seen; ``settled_at`` says that this run was told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Executable, and_, bindparam, or_, select, update

from ..protocol.events import TERMINAL_TYPES, run_key
from .bulk_insert import chunks_of
from .database import Database
from .models import CLOSED, OPEN, RESERVED, SETTLED, Endpoint, Event, Watch
from .subscriptions import EVERY_TYPE


@dataclass(frozen=True, slots=True)
class Glance:
    """As little of a watch as a pass over many of them needs."""

    id: str
    job_id: str
    run: str | None
    missing_passes: int
    remarkable: bool
    wants_blocked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRow:
    """A watch with what its endpoint says of it.

    :param counts_from: runs that began earlier were not promised.
    :param scope: ``"job"`` or ``"tree"``; ``"job"`` without an endpoint.
    """

    id: str
    endpoint_id: str | None
    job_id: str
    status: str
    run: str | None
    evidence: str | None
    missing_passes: int
    created_at: datetime
    settled_at: datetime | None
    counts_from: datetime
    scope: str
    events: tuple[str, ...] | None

    def wants(self, event_type: str) -> bool:
        """Say whether the endpoint hears of *event_type*."""
        if self.events is None:
            return event_type in TERMINAL_TYPES
        return event_type in self.events or EVERY_TYPE in self.events


@dataclass(frozen=True, slots=True)
class SettledRow:
    """A watch whose run was told."""

    id: str
    endpoint_id: str | None
    job_id: str
    run: str
    settled_at: datetime


@dataclass(frozen=True, slots=True)
class Told:
    """The event a run was told by."""

    event_id: str
    type: str
    created_at: datetime


@dataclass(slots=True)
class Notes:
    """What a pass found out about watches, written in one transaction by :func:`write_notes`."""

    seen: dict[str, str] = field(default_factory=dict)
    adopted: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    over: set[str] = field(default_factory=set)
    spent: set[str] = field(default_factory=set)
    waiting_again: dict[str, str] = field(default_factory=dict)
    repeating: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return any(
            (self.seen, self.adopted, self.missing, self.present, self.closed, self.over, self.spent,
             self.waiting_again, self.repeating)
        )  # fmt: skip


def glance_at_waiting(
    database: Database, status: str, *, after: str, limit: int, all_want_blocked: bool = False
) -> list[Glance]:
    """Return one page of the watches with *status* (``open`` or ``reserved``), by id.

    :param after: id of the last one of the page before; empty for the first page.
    :param all_want_blocked: some standing endpoint hears of blocked jobs.
    """
    blocked = or_(Endpoint.events.like('%"job.blocked"%'), Endpoint.events.like(f'%"{EVERY_TYPE}"%'))
    query = (
        select(
            Watch.id,
            Watch.job_id,
            Watch.run,
            Watch.missing_passes,
            or_(Watch.evidence.is_not(None), Watch.settled_at.is_not(None)),
            and_(Endpoint.events.is_not(None), blocked),
        )
        .outerjoin(Endpoint, Endpoint.id == Watch.endpoint_id)
        .where(Watch.status == status, Watch.id > after)
        .order_by(Watch.id)
        .limit(limit)
    )
    with database.read() as connection:
        return [
            Glance(id_, job_id, run, missing, bool(remarkable), all_want_blocked or bool(wants_blocked))
            for id_, job_id, run, missing, remarkable, wants_blocked in connection.execute(query)
        ]


def load_watches(database: Database, ids: Sequence[str]) -> list[WatchRow]:
    """Return the watches with these ids that still wait, with what their endpoints say."""
    if not ids:
        return []
    rows: list[WatchRow] = []
    with database.read() as connection:
        for chunk in chunks_of(ids):
            query = _watch_query().where(Watch.id.in_(chunk), Watch.status.in_([RESERVED, OPEN]))
            rows += [_watch_row(row) for row in connection.execute(query)]
    return rows


def load_settled(database: Database, *, since: datetime, after: str, limit: int) -> list[SettledRow]:
    """Return one page of the watches that were settled at *since* or later, by id."""
    query = (
        select(Watch.id, Watch.endpoint_id, Watch.job_id, Watch.run, Watch.settled_at)
        .where(Watch.settled_at >= since, Watch.status == SETTLED, Watch.run.is_not(None), Watch.id > after)
        .order_by(Watch.id)
        .limit(limit)
    )
    with database.read() as connection:
        return [
            SettledRow(id_, endpoint_id, job_id, run, settled_at)
            for id_, endpoint_id, job_id, run, settled_at in connection.execute(query)
            if run is not None and settled_at is not None
        ]


def told_endings(database: Database, runs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[Told]]:
    """Return the terminal event of each run, and its correction behind it, where there are any.

    :param runs: job id and run.
    """
    keys: dict[str, tuple[str, str]] = {}
    for job_id, run in runs:
        for correction in (False, True):
            keys[run_key(job_id, run, "job.success", correction=correction)] = (job_id, run)
    told: dict[tuple[str, str], list[Told]] = {}
    with database.read() as connection:
        for chunk in chunks_of(sorted(keys)):
            query = select(Event.run_key, Event.id, Event.type, Event.created_at, Event.supersedes).where(
                Event.run_key.in_(chunk)
            )
            rows = sorted(connection.execute(query), key=lambda row: row.supersedes is not None)
            for row in rows:
                told.setdefault(keys[row.run_key], []).append(Told(row.id, row.type, row.created_at))
    return told


def known_keys(database: Database, keys: Iterable[str]) -> set[str]:
    """Return those of *keys* under which an event is stored."""
    found: set[str] = set()
    with database.read() as connection:
        for chunk in chunks_of(sorted(set(keys))):
            query = select(Event.run_key).where(Event.run_key.in_(chunk))
            found.update(key for key in connection.execute(query).scalars() if key is not None)
    return found


def endings_of_job(database: Database, job_id: str) -> list[tuple[str, str, datetime]]:
    """Return type, run key and time of every terminal event of a job alone, oldest first."""
    query = (
        select(Event.type, Event.run_key, Event.occurred_at)
        .where(Event.job_id == job_id, Event.type.in_(sorted(TERMINAL_TYPES)))
        .order_by(Event.occurred_at)
    )
    with database.read() as connection:
        return [
            (event_type, key, at)
            for event_type, key, at in connection.execute(query)
            if key is not None and not key.startswith("tree|")
        ]


def any_standing_wants(database: Database, event_type: str) -> bool:
    """Say whether an enabled standing endpoint hears of *event_type*, one of the optional types."""
    query = select(Endpoint.events).where(Endpoint.kind == "standing", Endpoint.enabled)
    with database.read() as connection:
        for events in connection.execute(query).scalars():
            if events is not None and {event_type, EVERY_TYPE} & set(json.loads(events)):
                return True
    return False


def write_notes(database: Database, notes: Notes, *, now: datetime | None = None) -> None:
    """Write what a pass found out. A watch that ingest settled meanwhile stays as it is."""
    if not notes:
        return
    now = now or datetime.now(UTC)
    waiting = or_(Watch.status == RESERVED, Watch.status == OPEN)  # executemany takes no IN
    this = Watch.id == bindparam("watch")
    with database.write() as connection:
        _each(
            connection,
            update(Watch).where(this, Watch.status == RESERVED).values(status=OPEN, confirmed_at=now),
            notes.adopted,
        )
        newer = or_(Watch.run.is_(None), Watch.run < bindparam("seen"))
        _each(
            connection,
            update(Watch)
            .where(this, waiting, newer)
            .values(run=bindparam("seen"), settled_at=None, missing_passes=0),
            notes.seen,
            "seen",
        )
        missing = update(Watch).where(this, waiting).values(missing_passes=Watch.missing_passes + 1)
        _each(connection, missing, notes.missing)
        _each(connection, update(Watch).where(this, waiting).values(missing_passes=0), notes.present)
        _each(
            connection,
            update(Watch).where(this, waiting).values(status=CLOSED, settled_at=now),
            notes.closed,
        )
        over = update(Watch).where(this, waiting, Watch.settled_at.is_not(None)).values(status=SETTLED)
        _each(connection, over, notes.over)
        _each(connection, update(Watch).where(this).values(evidence=None), notes.spent)
        again = and_(Watch.status == SETTLED, Watch.run != bindparam("seen"))
        _each(
            connection,
            update(Watch)
            .where(this, again)
            .values(status=OPEN, run=bindparam("seen"), settled_at=None, missing_passes=0),
            notes.waiting_again,
            "seen",
        )
        # Told, and open all the same: another run will come.
        repeating = update(Watch).where(this, Watch.status == SETTLED).values(status=OPEN, missing_passes=0)
        _each(connection, repeating, notes.repeating)


# -- parts ------------------------------------------------------------------------------------------------


def _watch_query() -> Any:
    return select(
        Watch.id, Watch.endpoint_id, Watch.job_id, Watch.status, Watch.run, Watch.evidence,
        Watch.missing_passes, Watch.created_at, Watch.settled_at,
        Endpoint.created_at.label("endpoint_created_at"), Endpoint.scope, Endpoint.events,
    ).outerjoin(Endpoint, Endpoint.id == Watch.endpoint_id)  # fmt: skip


def _watch_row(row: Any) -> WatchRow:
    registered_at = row.endpoint_created_at or row.created_at
    return WatchRow(
        id=row.id,
        endpoint_id=row.endpoint_id,
        job_id=row.job_id,
        status=row.status,
        run=row.run,
        evidence=row.evidence,
        missing_passes=row.missing_passes,
        created_at=row.created_at,
        settled_at=row.settled_at,
        counts_from=min(registered_at, row.created_at),
        scope=row.scope or "job",
        events=None if row.events is None else tuple(json.loads(row.events)),
    )


def _each(
    connection: Connection,
    statement: Executable,
    what: Mapping[str, str] | set[str],
    parameter: str | None = None,
) -> None:
    if not what:
        return
    if parameter is None:
        rows = [{"watch": watch_id} for watch_id in sorted(what)]
    else:
        assert isinstance(what, Mapping)  # noqa: S101  (for the type checker)
        rows = [{"watch": watch_id, parameter: what[watch_id]} for watch_id in sorted(what)]
    connection.execute(statement, rows)
