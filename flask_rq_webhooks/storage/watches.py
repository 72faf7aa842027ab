"""Watches: what ingest and reconcile read of them, and write to them.

Those of trees are in :mod:`~flask_rq_webhooks.storage.tree_members`. Knows nothing of Redis: callers hand
in what RQ says. Events and deliveries are stored by :mod:`~flask_rq_webhooks.storage.events` alone.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Executable, String, bindparam, func, or_, select, text, update

from ..protocol.events import OPTIONAL_TYPES, TERMINAL_TYPES, is_wanted
from .bulk_insert import chunks_of, insert_into, insert_or_ignore, one_of
from .database import Database
from .models import CLOSED, OPEN, RESERVED, SETTLED, Endpoint, Event, UTCDateTime, Watch, new_id
from .subscriptions import EndpointRow, existing_endpoints, is_endpoint, wanted_by_standing

if TYPE_CHECKING:
    from .events import IngestItem, StoredEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WatchProbe:
    """As little of an open or reserved watch as a pass over many of them needs.

    :param needs_full_read: it holds a report, or a run of its job was reported before.
    :param wants: optional types that somebody asks for.
    """

    id: str
    job_id: str
    run: str | None
    missing_passes: int
    needs_full_read: bool
    wants: frozenset[str]


@dataclass(frozen=True, slots=True)
class SettledProbe:
    """As little of a settled watch.

    :param outcome: event type its run was reported with; ``None`` for a tree.
    """

    id: str
    job_id: str
    run: str
    outcome: str | None
    settled_at: datetime


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """How one run of a job was reported: its event, and the correction of it if there is one.

    :param type: what was said last.
    :param types: what was said, in order.
    :param event_id: of the first event, which a correction supersedes.
    :param ended_at: when the run ended, according to each event.
    :param stored_at: when the first event was stored.
    """

    run: str
    types: tuple[str, ...]
    event_id: str
    ended_at: tuple[datetime, ...]
    stored_at: datetime

    @property
    def type(self) -> str:
        return self.types[-1]

    @property
    def corrected(self) -> bool:
        return len(self.types) > 1


@dataclass(slots=True)
class WatchUpdates:
    """What a pass found out about watches, written in one transaction by :func:`write_updates`.

    :param began: watch → the run it had noted, and the one that is open now.
    :param caught_up: watch → the run it had noted, the one that was reported since, and how.
    :param kept: RQ has the jobs of these settled watches again; the opposite of *forgotten*.
    """

    adopted: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    decided: set[str] = field(default_factory=set)
    began: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    caught_up: dict[str, tuple[str | None, str, str]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


def probe_waiting(
    database: Database, status: str, *, after: str, limit: int,
    standing_want: Mapping[str | None, frozenset[str]], wanting: str | None = None,
) -> list[WatchProbe]:  # fmt: skip
    """Return one page of the watches with *status* (``open`` or ``reserved``), by id.

    :param after: id of the last one of the page before; empty for the first page.
    :param standing_want: see :func:`optional_types_of_standing`.
    :param wanting: only those for which somebody names this optional type.
    """
    by_operators = standing_want.get(None, frozenset())
    query = (
        select(
            Watch.id, Watch.job_id, Watch.run, Watch.missing_passes,
            or_(Watch.evidence.is_not(None), Watch.settled_at.is_not(None)), Endpoint.events, Watch.tenant,
        )
        .outerjoin(Endpoint, Endpoint.id == Watch.endpoint_id)
        .where(Watch.status == status, Watch.id > after)
        .order_by(Watch.id)
        .limit(limit)
    )  # fmt: skip
    if wanting is not None and wanting not in by_operators:
        theirs = [tenant for tenant, types in standing_want.items() if tenant and wanting in types]
        named = Endpoint.events.contains(f'"{wanting}"')
        query = query.where(or_(named, Watch.tenant.in_(theirs)) if theirs else named)
    with database.read() as connection:
        return [
            WatchProbe(
                id_, job_id, run, missing, bool(full),
                by_operators | _optional_types(events)
                | (frozenset() if tenant is None else standing_want.get(tenant, frozenset())),
            )
            for id_, job_id, run, missing, full, events, tenant in connection.execute(query)
        ]  # fmt: skip


@lru_cache(maxsize=256)
def _optional_types(events: str | None) -> frozenset[str]:
    named = frozenset(json.loads(events or "[]"))
    return frozenset(one for one in OPTIONAL_TYPES if is_wanted(one, named))


def probe_settled(database: Database, *, kept: bool, after: str, limit: int) -> list[SettledProbe]:
    """Return one page of the settled watches, by id.

    :param kept: those whose jobs RQ keeps, or those whose jobs it had forgotten at the last look.
    :param after: id of the last one of the page before; empty for the first page.
    """
    query = (
        select(Watch.id, Watch.job_id, Watch.run, Watch.outcome, Watch.settled_at)
        .where(
            Watch.status == SETTLED,
            text("recheck_at IS NOT NULL" if kept else "recheck_at IS NULL"),
            Watch.id > after,
        )
        .order_by(Watch.id)
        .limit(limit)
    )
    with database.read() as connection:
        return [
            SettledProbe(id_, job_id, run or "", outcome, settled_at)
            for id_, job_id, run, outcome, settled_at in connection.execute(query)
            if settled_at is not None
        ]


def load_watches(database: Database, ids: Sequence[str]) -> list[WatchRow]:
    """Return the reserved, open and settled watches with these ids, with their endpoints' settings."""
    if not ids:
        return []
    rows: list[WatchRow] = []
    query = (
        select(
            Watch.id, Watch.endpoint_id, Watch.job_id, Watch.status, Watch.run, Watch.evidence,
            Watch.missing_passes, Watch.created_at, Watch.settled_at,
            Endpoint.created_at.label("endpoint_created_at"), Endpoint.scope,
        )
        .outerjoin(Endpoint, Endpoint.id == Watch.endpoint_id)
        .where(one_of(database, Watch.id, "ids"), Watch.status.in_([RESERVED, OPEN, SETTLED]))
    )  # fmt: skip
    with database.read() as connection:
        for chunk in chunks_of(ids):
            rows += [_watch_row(row) for row in connection.execute(query, {"ids": chunk})]
    return rows


def known_keys(database: Database, keys: Iterable[str]) -> set[str]:
    """Return those of *keys* under which an event is stored."""
    found: set[str] = set()
    query = select(Event.run_key).where(one_of(database, Event.run_key, "keys"))
    with database.read() as connection:
        for chunk in chunks_of(sorted(set(keys))):
            found.update(key for key in connection.execute(query, {"keys": chunk}).scalars() if key)
    return found


def reported_endings(database: Database, job_ids: Iterable[str]) -> dict[str, list[Reported]]:
    """Return how the runs of each job were reported, oldest first; trees apart."""
    events: dict[str, dict[str, list[Any]]] = {}
    query = (
        select(
            Event.job_id, Event.run_key, Event.id, Event.type, Event.supersedes, Event.occurred_at,
            Event.created_at,
        )
        .where(one_of(database, Event.job_id, "jobs"), Event.type.in_(sorted(TERMINAL_TYPES)))
        .order_by(Event.created_at, Event.id)
    )  # fmt: skip
    with database.read() as connection:
        for chunk in chunks_of(sorted(set(job_ids))):
            for row in connection.execute(query, {"jobs": chunk}):
                head = f"{row.job_id}|"
                if row.run_key is not None and row.run_key.startswith(head):
                    run = row.run_key.removeprefix(head).rpartition("|")[0]
                    events.setdefault(row.job_id, {}).setdefault(run, []).append(row)
    return {
        job_id: [_reported(run, sorted(rows, key=lambda row: row.supersedes is not None))
                 for run, rows in runs.items()]
        for job_id, runs in events.items()
    }  # fmt: skip


def _reported(run: str, rows: Sequence[Any]) -> Reported:
    return Reported(
        run=run,
        types=tuple(row.type for row in rows),
        event_id=rows[0].supersedes or rows[0].id,
        ended_at=tuple(row.occurred_at for row in rows),
        stored_at=rows[0].created_at,
    )


def optional_types_of_standing(database: Database) -> dict[str | None, frozenset[str]]:
    """Return the optional types that enabled standing endpoints subscribe to, by tenant."""
    with database.read() as connection:
        return wanted_by_standing(database, connection, OPTIONAL_TYPES)


def write_updates(database: Database, updates: WatchUpdates, *, now: datetime | None = None) -> None:
    """Write what a pass found out. A watch that others changed meanwhile stays as it is."""
    if not updates:
        return
    now = now or datetime.now(UTC)
    waiting = or_(Watch.status == RESERVED, Watch.status == OPEN)  # executemany takes no IN
    this = update(Watch).where(Watch.id == bindparam("watch"))
    same_run = Watch.run.is_not_distinct_from(bindparam("before"))
    with database.write() as connection:
        adopt = this.where(Watch.status == RESERVED).values(status=OPEN, confirmed_at=now)
        _each(connection, adopt, updates.adopted)
        _each(
            connection, this.where(waiting).values(missing_passes=Watch.missing_passes + 1), updates.missing
        )
        _each(connection, this.where(waiting).values(missing_passes=0), updates.present)
        close = this.where(waiting).values(status=CLOSED, settled_at=now, recheck_at=None)
        _each(connection, close, updates.closed)
        # A report that settled nothing leaves a watch as settled as it was.
        _each(connection, this.values(evidence=None), updates.decided)
        settled_before = this.where(Watch.status == OPEN, Watch.settled_at.is_not(None))
        _each(connection, settled_before.values(status=SETTLED), updates.decided)
        began = this.where(or_(waiting, Watch.status == SETTLED), same_run).values(
            status=OPEN, run=bindparam("began"), settled_at=None, outcome=None, recheck_at=None,
            missing_passes=0,
        )  # fmt: skip
        _each(connection, began, updates.began, "before", "began")
        caught_up = this.where(or_(waiting, Watch.status == SETTLED), same_run).values(
            status=SETTLED, run=bindparam("reached"), outcome=bindparam("reported_as"), missing_passes=0,
            settled_at=func.coalesce(Watch.settled_at, now), recheck_at=func.coalesce(Watch.recheck_at, now),
        )  # fmt: skip
        _each(connection, caught_up, updates.caught_up, "before", "reached", "reported_as")
        settled = this.where(Watch.status == SETTLED)
        _each(connection, settled.values(recheck_at=now), updates.kept)
        _each(connection, settled.values(recheck_at=None), updates.forgotten)


# -- parts ------------------------------------------------------------------------------------------------


def _watch_row(row: Any) -> WatchRow:
    values = dict(row._mapping)
    registered_at = values.pop("endpoint_created_at") or row.created_at
    values |= {"counts_from": min(registered_at, row.created_at), "scope": row.scope or "job"}
    return WatchRow(**values)


def _each(
    connection: Connection,
    statement: Executable,
    what: Mapping[str, tuple[Any, ...]] | set[str],
    *parameters: str,
) -> None:
    """Execute *statement* for each watch, in the order of ids: two dispatchers never wait in a circle."""
    rows = []
    for watch_id in sorted(what):
        values = what[watch_id] if isinstance(what, Mapping) else ()
        rows.append({"watch": watch_id, **dict(zip(parameters, values, strict=True))})
    if rows:
        connection.execute(statement, rows)


# -- what ingest writes -----------------------------------------------------------------------------------


def watches_of(
    database: Database, connection: Connection, items: Iterable[IngestItem]
) -> dict[str, list[Any]]:
    """Return the watches on the items' jobs, by job id."""
    jobs = sorted({item.occurrence.job_id for item in items if item.occurrence.job_id is not None})
    columns = (Watch.id, Watch.endpoint_id, Watch.job_id, Watch.status, Watch.run)
    query = select(*columns).where(one_of(database, Watch.job_id, "jobs"))
    watches: dict[str, list[Any]] = defaultdict(list)
    for chunk in chunks_of(jobs):
        for row in connection.execute(query, {"jobs": chunk}):
            watches[row.job_id].append(row)
    return watches


def settle_watches(
    database: Database,
    connection: Connection,
    stored: Sequence[StoredEvent],
    watches: Mapping[str, Sequence[Any]],
    endpoints: Mapping[str, EndpointRow],
    now: datetime,
) -> None:
    """Note on the watches which run was reported and how; make those that a callback proves to be missing."""
    settled: dict[str, tuple[str, str | None]] = {}
    missing: dict[str, dict[str, Any]] = {}
    for event in stored:
        occurrence = event.occurrence
        job_id, run = occurrence.job_id, occurrence.run
        if job_id is None or run is None or occurrence.type not in TERMINAL_TYPES:
            continue
        named = {endpoint_id if is_endpoint(endpoint_id) else None for endpoint_id in event.named}
        for watch in watches.get(job_id, ()):
            named.discard(watch.endpoint_id)
            if _scope_of(watch.endpoint_id, endpoints) != occurrence.scope:
                continue
            only_named = watch.status == CLOSED or occurrence.scope == "tree"
            if only_named and watch.endpoint_id not in event.named:
                continue
            noted = settled[watch.id][0] if watch.id in settled else watch.run
            if watch.status == OPEN and watch.id not in settled and _is_of_a_later_run(run, noted):
                continue  # the noted run has no event yet: reconcile finds its ending and settles the watch
            if noted is None or _is_as_late(run, noted):
                # A root's own run may have ended otherwise than its tree.
                settled[watch.id] = (run, occurrence.type if occurrence.scope == "job" else None)
        for endpoint_id in named:
            owner = endpoints.get(endpoint_id or "")
            if _scope_of(endpoint_id, endpoints) != occurrence.scope:
                continue
            watch_id = unbound_watch_id(job_id) if endpoint_id is None else new_id("wat")
            missing[f"{job_id} {endpoint_id}"] = {
                "id": watch_id, "endpoint_id": endpoint_id, "job_id": job_id, "status": SETTLED, "run": run,
                "outcome": occurrence.type, "missing_passes": 0, "created_at": now, "confirmed_at": now,
                "settled_at": now, "recheck_at": now,
                "tenant": owner and owner.tenant,
            }  # fmt: skip
    if settled:
        statement = _SETTLE_SQLITE if database.is_sqlite else _SETTLE_POSTGRESQL
        rows = [{"id": key, "run": run, "outcome": outcome} for key, (run, outcome) in settled.items()]
        connection.execute(statement, {"settled": json.dumps(rows), "now": now})
    for chunk in chunks_of([missing[key] for key in sorted(missing)]):
        connection.execute(insert_or_ignore(database, Watch), chunk)


def _is_of_a_later_run(run: str, noted: str | None) -> bool:
    """Say whether *run* is certainly another one than the noted run, and began after it."""
    return noted is not None and not noted.startswith("created:") and run != noted and _is_as_late(run, noted)


def _is_as_late(run: str, noted: str) -> bool:
    """Say whether *run* is the one that was noted, or a later one by the clocks of those who enqueued them.

    The late report of an earlier run does not hide a newer one. Where clocks differ by more than the time
    between two runs, a pass over the settled watches finds the newer run all the same.
    """
    if run == noted or noted.startswith("created:"):
        return True
    return not run.startswith("created:") and run > noted


# One statement for a batch, as in recording; PostgreSQL locks in the order of ids.

_SETTLE_POSTGRESQL = text("""
WITH settled AS MATERIALIZED (
    SELECT * FROM json_to_recordset(CAST(:settled AS json)) AS (id text, run text, outcome text)
),
held AS MATERIALIZED (
    SELECT id FROM rq_webhooks_watch WHERE id IN (SELECT id FROM settled) ORDER BY id FOR UPDATE
)
UPDATE rq_webhooks_watch AS w
SET status = 'settled', run = t.run, outcome = t.outcome, evidence = NULL, missing_passes = 0,
    settled_at = :now, recheck_at = :now, confirmed_at = coalesce(w.confirmed_at, :now)
FROM settled t JOIN held h ON h.id = t.id
WHERE w.id = t.id
""").bindparams(bindparam("settled", type_=String), bindparam("now", type_=UTCDateTime))

_SETTLE_SQLITE = text("""
UPDATE rq_webhooks_watch AS w
SET status = 'settled', run = t.run, outcome = t.outcome, evidence = NULL, missing_passes = 0,
    settled_at = :now, recheck_at = :now, confirmed_at = coalesce(w.confirmed_at, :now)
FROM (
    SELECT json_extract(value, '$.id') AS id, json_extract(value, '$.run') AS run,
        json_extract(value, '$.outcome') AS outcome
    FROM json_each(:settled)
) t
WHERE w.id = t.id
""").bindparams(bindparam("now", type_=UTCDateTime))


def _scope_of(endpoint_id: str | None, endpoints: Mapping[str, EndpointRow]) -> str | None:
    if endpoint_id is None:
        return "job"
    endpoint = endpoints.get(endpoint_id)
    return None if endpoint is None or endpoint.kind == "standing" else endpoint.scope


@dataclass(frozen=True, slots=True)
class ParkedReport:
    """A callback's report that RQ has not committed.

    :param endpoint_id: ``None``, or one that ends in ``_all``: no endpoint.
    :param entry: outbox entry as JSON.
    :param needs_watch: ignore it where no watch of the endpoint on the job stands.
    """

    endpoint_id: str | None
    job_id: str
    entry: str
    needs_watch: bool = False


def park_reports(database: Database, reports: Sequence[ParkedReport], *, now: datetime | None = None) -> None:
    """Keep reports for reconcile; their watches are open (again) then.

    Reports for endpoints that do not exist are ignored.
    """
    if not reports:
        return
    with database.write() as connection:
        now = now or database.now(connection)
        existing = existing_endpoints(
            connection, {report.endpoint_id for report in reports if is_endpoint(report.endpoint_id)}
        )
        # In one order everywhere, so that two dispatchers never wait in a circle.
        for report in sorted(reports, key=_order):
            bound = is_endpoint(report.endpoint_id)
            if bound and report.endpoint_id not in existing:
                logger.warning(
                    "The endpoint %r of job %r does not exist here; its report is ignored.",
                    report.endpoint_id, report.job_id,
                )  # fmt: skip
                continue
            changes = {"status": OPEN, "evidence": report.entry, "missing_passes": 0}
            if report.needs_watch:
                this = (Watch.job_id == report.job_id, Watch.endpoint_id == report.endpoint_id)
                connection.execute(update(Watch).where(*this).values(changes))
                continue
            statement = insert_into(database, Watch).values(
                id=new_id("wat") if bound else unbound_watch_id(report.job_id),
                endpoint_id=report.endpoint_id if bound else None,
                job_id=report.job_id,
                tenant=select(Endpoint.tenant).where(Endpoint.id == report.endpoint_id).scalar_subquery(),
                created_at=now,
                confirmed_at=now,
                **changes,
            )
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["job_id", "endpoint_id"] if bound else ["id"], set_=changes
                )
            )


def _order(report: ParkedReport) -> tuple[str, str]:
    return report.job_id, (report.endpoint_id or "") if is_endpoint(report.endpoint_id) else ""


def unbound_watch_id(job_id: str) -> str:
    """Return the id of the one watch on *job_id* that has no endpoint; a unique index sees no NULLs."""
    return "wat_" + blake2b(job_id.encode("utf-8", "surrogatepass"), digest_size=18).hexdigest()
