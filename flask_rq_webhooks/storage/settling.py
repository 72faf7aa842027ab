"""Watches, once an ending is known: settled with the run that was told, or open with a word to be proved.

Owns what ingest writes to watches. Knows nothing of deliveries.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, String, bindparam, select, text

from ..protocol.events import TERMINAL_TYPES
from .bulk_insert import chunks_of, insert_into, insert_or_ignore, one_of
from .database import Database
from .models import CLOSED, OPEN, SETTLED, UTCDateTime, Watch, new_id
from .subscriptions import EndpointRow, existing_endpoints, is_endpoint

if TYPE_CHECKING:
    from .events import StoredEvent

logger = logging.getLogger(__name__)


def watches_of(
    database: Database, connection: Connection, stored: Sequence[StoredEvent]
) -> dict[str, list[Any]]:
    """Return the watches on the events' jobs, by job id."""
    jobs = sorted({event.occurrence.job_id for event in stored if event.occurrence.job_id is not None})
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
    """Note on the watches which run was told; make those that a callback proves to be missing."""
    told: dict[str, str] = {}
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
            # Runs sort by time; the word of an older one, brought late, does not hide a newer one.
            if (told.get(watch.id) or watch.run or "") <= run or run.startswith("created:"):
                told[watch.id] = run
        for endpoint_id in named:
            if _scope_of(endpoint_id, endpoints) != occurrence.scope:
                continue
            watch_id = unbound_watch_id(job_id) if endpoint_id is None else new_id("wat")
            missing[f"{job_id} {endpoint_id}"] = {
                "id": watch_id, "endpoint_id": endpoint_id, "job_id": job_id, "status": SETTLED, "run": run,
                "missing_passes": 0, "created_at": now, "confirmed_at": now, "settled_at": now,
            }  # fmt: skip
    if told:
        statement = _SETTLE_SQLITE if database.is_sqlite else _SETTLE_POSTGRESQL
        rows = [{"id": watch_id, "run": run} for watch_id, run in told.items()]
        connection.execute(statement, {"told": json.dumps(rows), "now": now})
    for chunk in chunks_of([missing[key] for key in sorted(missing)]):
        connection.execute(insert_or_ignore(database, Watch), chunk)


# One statement for a batch, as in recording; PostgreSQL locks in the order of ids.

_SETTLE_POSTGRESQL = text("""
WITH told AS MATERIALIZED (
    SELECT * FROM json_to_recordset(CAST(:told AS json)) AS (id text, run text)
),
held AS MATERIALIZED (
    SELECT id FROM rq_webhooks_watch WHERE id IN (SELECT id FROM told) ORDER BY id FOR UPDATE
)
UPDATE rq_webhooks_watch AS w
SET status = 'settled', run = t.run, evidence = NULL, missing_passes = 0, settled_at = :now,
    confirmed_at = coalesce(w.confirmed_at, :now)
FROM told t JOIN held h ON h.id = t.id
WHERE w.id = t.id
""").bindparams(bindparam("told", type_=String), bindparam("now", type_=UTCDateTime))

_SETTLE_SQLITE = text("""
UPDATE rq_webhooks_watch AS w
SET status = 'settled', run = t.run, evidence = NULL, missing_passes = 0, settled_at = :now,
    confirmed_at = coalesce(w.confirmed_at, :now)
FROM (
    SELECT json_extract(value, '$.id') AS id, json_extract(value, '$.run') AS run FROM json_each(:told)
) t
WHERE w.id = t.id
""").bindparams(bindparam("now", type_=UTCDateTime))


def _scope_of(endpoint_id: str | None, endpoints: Mapping[str, EndpointRow]) -> str | None:
    if endpoint_id is None:
        return "job"
    endpoint = endpoints.get(endpoint_id)
    return None if endpoint is None or endpoint.kind != "job" else endpoint.scope


def park_evidence(
    database: Database, items: Sequence[tuple[str | None, str, str]], *, now: datetime | None = None
) -> None:
    """Keep a callback's word that RQ has not committed, for reconcile; the watch is open (again) then.

    :param items: endpoint id (``None`` or one that ends in ``_all``: no endpoint), job id, outbox entry as
        JSON. Endpoints that do not exist are ignored.
    """
    if not items:
        return
    with database.write() as connection:
        now = now or database.now(connection)
        words = [
            (endpoint_id if is_endpoint(endpoint_id) else None, job_id, entry)
            for endpoint_id, job_id, entry in items
        ]
        existing = existing_endpoints(connection, {endpoint_id for endpoint_id, _job_id, _entry in words})
        # In one order everywhere, so that two dispatchers never wait in a circle.
        for endpoint_id, job_id, entry in sorted(words, key=lambda word: (word[1], word[0] or "")):
            bound = endpoint_id is not None
            if bound and endpoint_id not in existing:
                logger.warning("The endpoint %r of job %r does not exist here; ignored.", endpoint_id, job_id)
                continue
            statement = insert_into(database, Watch).values(
                id=new_id("wat") if bound else unbound_watch_id(job_id),
                endpoint_id=endpoint_id if bound else None,
                job_id=job_id,
                status=OPEN,
                evidence=entry,
                missing_passes=0,
                created_at=now,
                confirmed_at=now,
            )
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["job_id", "endpoint_id"] if bound else ["id"],
                    set_={"status": OPEN, "evidence": entry, "missing_passes": 0},
                )
            )


def unbound_watch_id(job_id: str) -> str:
    """Return the id of the one watch on *job_id* that has no endpoint; a unique index sees no NULLs."""
    return "wat_" + blake2b(job_id.encode("utf-8", "surrogatepass"), digest_size=18).hexdigest()
