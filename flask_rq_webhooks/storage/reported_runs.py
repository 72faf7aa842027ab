"""Which runs were reported, and how: read this, and update watches according to a report.

Knows nothing of Redis: callers hand in what RQ says. Events and deliveries are stored by
:mod:`~flask_rq_webhooks.storage.events` alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, String, bindparam, func, select, text, update

from ..protocol.events import JOB_PROGRESS, TERMINAL_TYPES
from ..protocol.payloads import occurrence_from_json
from .bulk_insert import chunks_of, execute_rows, insert_into, insert_or_ignore, one_of
from .database import Database
from .models import CLOSED, OPEN, SETTLED, Endpoint, Event, UTCDateTime, Watch, new_id
from .subscriptions import EndpointRow, JobWatch, existing_endpoints, is_endpoint

if TYPE_CHECKING:
    from .events import StoredEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """How one run of a job was reported: its event, and the correction of it if there is one.

    :param type: the type reported last.
    :param types: the types reported, in order.
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


def known_keys(database: Database, keys: Iterable[str]) -> set[str]:
    """Return those of *keys* under which an event is stored."""
    found: set[str] = set()
    query = select(Event.run_key).where(one_of(Event.run_key, "keys"))
    with database.read() as connection:
        for chunk in chunks_of(sorted(set(keys))):
            found.update(key for key in connection.execute(query, {"keys": chunk}).scalars() if key)
    return found


def reported_endings(database: Database, job_ids: Iterable[str]) -> dict[str, list[Reported]]:
    """Return how the runs of each job were reported, oldest first; without trees."""
    events: dict[str, dict[str, list[Any]]] = {}
    query = (
        select(
            Event.job_id, Event.run_key, Event.id, Event.type, Event.supersedes, Event.occurred_at,
            Event.created_at,
        )
        .where(one_of(Event.job_id, "jobs"), Event.type.in_(sorted(TERMINAL_TYPES)))
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


def last_progress(database: Database, job_ids: Sequence[str]) -> dict[str, tuple[Any, datetime]]:
    """Return the last stored progress of each job, and when it was seen."""
    query = (
        select(func.max(Event.id))
        .where(one_of(Event.job_id, "jobs"), Event.type == JOB_PROGRESS)
        .group_by(Event.job_id)
    )
    found: dict[str, tuple[Any, datetime]] = {}
    with database.read() as connection:
        for chunk in chunks_of(job_ids):
            newest = connection.execute(query, {"jobs": chunk}).scalars().all()
            rows = select(Event.job_id, Event.payload, Event.occurred_at).where(Event.id.in_(newest))
            for job_id, payload, at in connection.execute(rows) if newest else ():
                found[job_id or ""] = (occurrence_from_json(payload).progress, at)
    return found


def settlement(
    stored: Sequence[StoredEvent],
    watches: Mapping[str, Sequence[JobWatch]],
    endpoints: Mapping[str, EndpointRow],
    now: datetime,
) -> tuple[str, list[dict[str, Any]]]:
    """Return how *stored* changes the watches of its jobs.

    :returns: which run of each watch was reported and how, as JSON, empty if there is none; and rows for
        missing watches that a callback proves should exist.
    """
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
                # A root's own run may have ended differently from its tree.
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
    rows = [{"id": key, "run": run, "outcome": outcome} for key, (run, outcome) in settled.items()]
    return json.dumps(rows) if rows else "", [missing[key] for key in sorted(missing)]


def settle_watches(
    database: Database, connection: Connection, settled: str, missing: Sequence[dict[str, Any]], now: datetime
) -> None:
    """Write a :func:`settlement`."""
    if settled:
        statement = _SETTLE_SQLITE if database.is_sqlite else SETTLE_POSTGRESQL
        execute_rows(database, connection, statement, [{"settled": settled, "now": now}])
    for chunk in chunks_of(missing):
        connection.execute(insert_or_ignore(database, Watch), chunk)


def _is_of_a_later_run(run: str, noted: str | None) -> bool:
    """Return whether *run* is certainly not the noted run, and began after it."""
    return noted is not None and not noted.startswith("created:") and run != noted and _is_as_late(run, noted)


def _is_as_late(run: str, noted: str) -> bool:
    """Return whether *run* is the noted one, or a later one by the clocks of the enqueuing processes.

    The late report of an earlier run does not hide a newer one. If clocks differ by more than the time
    between two runs, a pass over the settled watches still finds the newer run.
    """
    if run == noted or noted.startswith("created:"):
        return True
    return not run.startswith("created:") and run > noted


# One statement per batch, as in recording; PostgreSQL locks in the order of ids.

SETTLE_POSTGRESQL = text("""
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
    """A callback's report that RQ has not yet committed.

    :param endpoint_id: ``None``, or one that ends in ``_all``: no endpoint.
    :param entry: outbox entry as JSON.
    :param needs_watch: ignore it if the endpoint has no watch on the job.
    """

    endpoint_id: str | None
    job_id: str
    entry: str
    needs_watch: bool = False


def park_reports(database: Database, reports: Sequence[ParkedReport]) -> None:
    """Store reports for reconcile; their watches are then open (again).

    Reports for endpoints that do not exist are ignored.
    """
    if not reports:
        return
    with database.write() as connection:
        now = database.now(connection)
        existing = existing_endpoints(
            connection, {report.endpoint_id for report in reports if is_endpoint(report.endpoint_id)}
        )
        # In the same order everywhere, so that two dispatchers never deadlock.
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
    """Return the id of the one watch on *job_id* that has no endpoint; a unique index ignores NULLs."""
    return "wat_" + blake2b(job_id.encode("utf-8", "surrogatepass"), digest_size=18).hexdigest()
