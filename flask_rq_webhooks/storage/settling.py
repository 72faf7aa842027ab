"""Watches, once an ending is reported: settled, or open with a report that RQ has yet to commit.

Owns what ingest writes to watches. Knows nothing of deliveries.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, String, bindparam, select, text, update

from ..protocol.events import TERMINAL_TYPES, parse_time
from .bulk_insert import chunks_of, insert_into, insert_or_ignore, one_of
from .database import Database
from .models import CLOSED, OPEN, RESERVED, SETTLED, UTCDateTime, Watch, new_id
from .subscriptions import EndpointRow, existing_endpoints, is_endpoint

if TYPE_CHECKING:
    from .events import IngestItem, StoredEvent

logger = logging.getLogger(__name__)


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
            if _scope_of(endpoint_id, endpoints) != occurrence.scope:
                continue
            watch_id = unbound_watch_id(job_id) if endpoint_id is None else new_id("wat")
            missing[f"{job_id} {endpoint_id}"] = {
                "id": watch_id, "endpoint_id": endpoint_id, "job_id": job_id, "status": SETTLED, "run": run,
                "outcome": occurrence.type, "missing_passes": 0, "created_at": now, "confirmed_at": now,
                "settled_at": now, "recheck_at": now,
            }  # fmt: skip
    if settled:
        statement = _SETTLE_SQLITE if database.is_sqlite else _SETTLE_POSTGRESQL
        rows = [
            {"id": watch_id, "run": run, "outcome": outcome} for watch_id, (run, outcome) in settled.items()
        ]
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
    return None if endpoint is None or endpoint.kind != "job" else endpoint.scope


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
                created_at=now,
                confirmed_at=now,
                **changes,
            )
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["job_id", "endpoint_id"] if bound else ["id"], set_=changes
                )
            )


def watch_for_standing(
    database: Database, existing: Sequence[str], unseen: Sequence[str], runs: Mapping[str, str | None]
) -> None:
    """Watch jobs that only standing endpoints get events of. May be repeated; no watch goes backwards.

    :param existing: ids of jobs that RQ took.
    :param unseen: ids of jobs that were created; reconcile finds out about them.
    :param runs: the run of each job, or when it was created.
    """
    now = datetime.now(UTC)
    rows = [
        {"id": unbound_watch_id(job_id), "endpoint_id": None, "job_id": job_id, "status": status,
         "run": runs.get(job_id) if status == OPEN else None, "missing_passes": 0,
         "created_at": _began(runs.get(job_id), now), "confirmed_at": now if status == OPEN else None,
         "settled_at": None}
        for status, job_ids in ((OPEN, existing), (RESERVED, unseen))
        for job_id in job_ids
    ]  # fmt: skip
    if not rows:
        return
    statement = insert_into(database, Watch)
    again = {name: statement.excluded[name] for name in rows[0] if name not in ("id", "job_id")}
    upsert = statement.on_conflict_do_update(
        index_elements=["id"], set_=again, where=Watch.status.in_([RESERVED, CLOSED])
    )
    with database.write() as connection:
        connection.execute(upsert, sorted(rows, key=lambda row: str(row["id"])))


def _began(run: str | None, now: datetime) -> datetime:
    return now if run is None else min(now, parse_time(run.removeprefix("created:")))


def _order(report: ParkedReport) -> tuple[str, str]:
    return report.job_id, (report.endpoint_id or "") if is_endpoint(report.endpoint_id) else ""


def unbound_watch_id(job_id: str) -> str:
    """Return the id of the one watch on *job_id* that has no endpoint; a unique index sees no NULLs."""
    return "wat_" + blake2b(job_id.encode("utf-8", "surrogatepass"), digest_size=18).hexdigest()
