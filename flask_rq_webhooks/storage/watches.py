"""Watches: what ingest and reconcile read from them and write to them.

Which jobs belong to a tree, and their status when last seen, is stored here too. Knows nothing of Redis:
callers pass in what RQ says. Events and deliveries are stored by :mod:`~flask_rq_webhooks.storage.events`
alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Executable, bindparam, func, or_, select, text, update

from ..protocol.events import OPTIONAL_TYPES, is_wanted
from .bulk_insert import chunks_of, insert_into, one_of
from .database import Database
from .models import CLOSED, MEMBER, OPEN, RESERVED, SETTLED, Endpoint, Watch, new_id
from .subscriptions import wanted_by_standing


@dataclass(frozen=True, slots=True)
class WatchProbe:
    """The minimum that a pass over many open or reserved watches needs of each.

    :param needs_full_read: it holds a report, or a run of its job was reported before.
    :param wants: optional types that an endpoint asks for.
    """

    id: str
    job_id: str
    run: str | None
    missing_passes: int
    needs_full_read: bool
    wants: frozenset[str]


@dataclass(frozen=True, slots=True)
class SettledProbe:
    """The same minimum of a settled watch.

    :param outcome: event type its run was reported with; ``None`` for a tree.
    """

    id: str
    job_id: str
    run: str
    outcome: str | None
    settled_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRow:
    """A watch, with the settings of its endpoint that concern it.

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


@dataclass(slots=True)
class WatchUpdates:
    """What a pass found out about watches; :func:`write_updates` writes it in one transaction.

    :param began: watch → the run it had noted, and the run that is open now.
    :param caught_up: watch → the run it had noted, the run reported since, and how it was reported.
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
    :param wanting: only those for which an endpoint names this optional type.
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

    :param kept: those whose jobs RQ keeps, or those whose jobs RQ had forgotten at the last check.
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
        .where(one_of(Watch.id, "ids"), Watch.status.in_([RESERVED, OPEN, SETTLED]))
    )  # fmt: skip
    with database.read() as connection:
        for chunk in chunks_of(ids):
            rows += [_watch_row(row) for row in connection.execute(query, {"ids": chunk})]
    return rows


def optional_types_of_standing(database: Database) -> dict[str | None, frozenset[str]]:
    """Return the optional types that enabled standing endpoints subscribe to, by tenant."""
    with database.read() as connection:
        return wanted_by_standing(connection, OPTIONAL_TYPES)


def write_updates(database: Database, updates: WatchUpdates, *, now: datetime | None = None) -> None:
    """Write what a pass found out. A watch changed by others in the meantime stays as it is."""
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
        # After a report that settled nothing, a watch settled before is settled again.
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
    """Execute *statement* for each watch, in the order of ids, so two dispatchers never deadlock."""
    rows = []
    for watch_id in sorted(what):
        values = what[watch_id] if isinstance(what, Mapping) else ()
        rows.append({"watch": watch_id, **dict(zip(parameters, values, strict=True))})
    if rows:
        connection.execute(statement, rows)


# -- of trees ---------------------------------------------------------------------------------------------

# A member of a tree (a job found below its roots) has a watch with the status MEMBER, which keeps the
# member's last known status as its ``evidence``.


@dataclass(frozen=True, slots=True)
class TreeRow:
    """One job of a tree, as stored in SQL.

    :param evidence: for a member, its status when it was last seen.
    """

    watch_id: str
    job_id: str
    status: str
    run: str | None
    evidence: str | None
    missing_passes: int
    created_at: datetime

    @property
    def root(self) -> bool:
        """Return whether a request enqueued it directly; the others were found below."""
        return self.status != MEMBER


def open_trees(database: Database, *, after: str = "", limit: int = 200) -> list[str]:
    """Return the ids of endpoints with a tree that has not been reported yet, in order of id."""
    query = _OPEN_TREES.where(Watch.endpoint_id > after).order_by(Watch.endpoint_id).limit(limit)
    with database.read() as connection:
        return [endpoint_id for endpoint_id in connection.execute(query).scalars() if endpoint_id is not None]


def open_trees_of(database: Database, job_ids: Collection[str]) -> list[str]:
    """Return the same for the trees that these jobs are known to belong to, in order of id."""
    found: set[str] = set()
    query = _OPEN_TREES.where(one_of(Watch.job_id, "jobs"))
    for chunk in chunks_of(sorted(job_ids)):
        with database.read() as connection:
            found.update(row.endpoint_id for row in connection.execute(query, {"jobs": chunk}))
    return sorted(found)


_OPEN_TREES = (
    select(Watch.endpoint_id)
    .join(Endpoint, Endpoint.id == Watch.endpoint_id)
    .where(
        Watch.status.in_([OPEN, RESERVED, MEMBER]),
        Endpoint.scope == "tree",
        Endpoint.kind != "standing",
    )
    .distinct()
)


def load_trees(database: Database, endpoint_ids: Sequence[str]) -> dict[str, list[TreeRow]]:
    """Return the known jobs of each tree, in the order in which they became known."""
    trees: dict[str, list[TreeRow]] = {endpoint_id: [] for endpoint_id in endpoint_ids}
    for chunk in chunks_of(sorted(trees)):
        query = (
            select(
                Watch.id.label("watch_id"), Watch.endpoint_id, Watch.job_id, Watch.status, Watch.run,
                Watch.evidence, Watch.missing_passes, Watch.created_at,
            )
            .where(Watch.endpoint_id.in_(chunk), Watch.status != CLOSED)
            .order_by(Watch.id)
        )  # fmt: skip
        with database.read() as connection:
            for row in connection.execute(query):
                values: dict[str, Any] = dict(row._mapping)
                trees[values.pop("endpoint_id")].append(TreeRow(**values))
    return trees


def remember_members(
    database: Database,
    endpoint_id: str,
    *,
    found: Mapping[str, str],
    changed: Mapping[str, str],
) -> None:
    """Record jobs found below a root, so that the tree is known when the root's own record is gone.

    :param found: new members: job id → status.
    :param changed: known members that changed: watch id → status.
    """
    if not found and not changed:
        return
    now = datetime.now(UTC)
    with database.write() as connection:
        tenant = select(Endpoint.tenant).where(Endpoint.id == endpoint_id).scalar_subquery()
        rows = [
            {"id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": job_id, "status": MEMBER,
             "evidence": status, "missing_passes": 0, "created_at": now, "tenant": tenant}
            for job_id, status in sorted(found.items())
        ]  # fmt: skip
        for chunk in chunks_of(rows):
            connection.execute(
                # A conflict: a member of a tree that was reported and began again.
                insert_into(database, Watch)
                .values(chunk)
                .on_conflict_do_update(
                    index_elements=["job_id", "endpoint_id"],
                    set_={"status": MEMBER, "settled_at": None},
                    where=Watch.status == CLOSED,
                )
            )
        if changed:
            connection.execute(
                update(Watch)
                .where(Watch.id == bindparam("watch"), Watch.status == MEMBER)
                .values(evidence=bindparam("status_seen")),
                [{"watch": watch_id, "status_seen": status} for watch_id, status in sorted(changed.items())],
            )


def settle_tree(
    database: Database, endpoint_id: str, *, run: str, runs: Mapping[str, str], now: datetime | None = None
) -> None:
    """Record that a tree was reported: its roots are settled, its members are no longer read.

    :param run: the run the tree was reported under, used for roots without a known run.
    :param runs: job id → the run a root was in.
    """
    now = now or datetime.now(UTC)
    of_tree = Watch.endpoint_id == endpoint_id
    with database.write() as connection:
        roots = update(Watch).where(of_tree, Watch.status.in_([OPEN, RESERVED]))
        settled = {"status": SETTLED, "settled_at": now, "missing_passes": 0, "recheck_at": now}
        for job_id, current in sorted(runs.items()):
            connection.execute(roots.where(Watch.job_id == job_id).values(run=current, **settled))
        connection.execute(roots.values(run=func.coalesce(Watch.run, run), **settled))
        connection.execute(
            update(Watch).where(of_tree, Watch.status == MEMBER).values(status=CLOSED, settled_at=now)
        )
