"""Ingest: an occurrence becomes an event and its deliveries, exactly once.

Owns who hears of what, and the settling of watches. Knows nothing of where occurrences come from, and
leaves rendering to a function it is given.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any

from sqlalchemy import Connection, bindparam, case, select, update

from ..protocol.events import JOB_FAILURE, JOB_SUCCESS, TERMINAL_TYPES, WEBHOOK_PING, Occurrence, parse_time
from ..protocol.payloads import occurrence_from_json, occurrence_to_json
from .database import Database
from .models import (
    CLOSED,
    OPEN,
    PENDING,
    SCHEDULED,
    SETTLED,
    Delivery,
    Endpoint,
    Event,
    Watch,
    new_id,
)
from .upsert import insert_into, insert_or_ignore

logger = logging.getLogger(__name__)

#: A run may seem to begin this long before the registration that caused it: clocks of two machines.
CLOCK_SKEW = timedelta(seconds=1)

#: In the event list of an endpoint: every type there is, application types and optional ones included.
EVERY_TYPE = "*"

#: Ends the token of jobs that only standing endpoints hear of (``ATTACH="all"``).
NO_ENDPOINT_SUFFIX = "_all"

#: Rows per statement; SQLite takes 32766 parameters in one.
_CHUNK = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRow:
    """What rendering may know of an endpoint: no URL, no secret, no header."""

    id: str
    kind: str
    host: str
    events: tuple[str, ...] | None
    scope: str
    format: str
    reference: str | None
    runid: str | None
    max_attempts: int | None
    created_at: datetime

    def wants(self, event_type: str) -> bool:
        """Say whether the endpoint hears of *event_type*.

        Without a list: of every terminal type. With one: of what it names; ``"*"`` names everything.
        """
        if self.events is None:
            return event_type in TERMINAL_TYPES
        return event_type in self.events or EVERY_TYPE in self.events


Render = Callable[[EndpointRow, str, Occurrence], bytes]
Scrub = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class IngestItem:
    """One occurrence and who is known to want it.

    :param endpoint_ids: endpoints named by whoever brings the word: they count whenever the run began.
        Endpoints that watch the job, and standing ones, are found here. Ids that do not exist are ignored.
    """

    occurrence: Occurrence
    endpoint_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IngestedEvent:
    """What became of an item.

    :param created: ``False`` when the event was there already.
    :param deliveries: how many deliveries are new.
    """

    event_id: str
    type: str
    job_id: str | None
    created: bool
    deliveries: int


@dataclass(slots=True)
class _Stored:
    """An event that is in SQL now, with all that this batch says about it."""

    id: str
    occurrence: Occurrence
    created: bool
    named: list[str]
    deliveries: int = 0


def ingest(
    database: Database,
    items: Sequence[IngestItem],
    *,
    render: Render,
    max_attempts: int,
    scrub: Scrub | None = None,
) -> list[IngestedEvent]:
    """Store events and their deliveries in one transaction; doing it again changes nothing.

    A run has one terminal event, whoever tells of it and however many do so at once; an endpoint named for
    an event that is already there gets its missing delivery, rendered from what was stored. Standing
    endpoints get a delivery of new events only, and only while enabled: what happens while one is disabled
    is left to :func:`~.operating.recover`.

    All or nothing: where *render* or *scrub* raises, nothing of the batch is stored. The caller then
    brings the items one by one, so that one that cannot be told never holds up the others.

    :param render: the bytes to deliver, from endpoint, event id and occurrence.
    :param max_attempts: where the endpoint itself sets none.
    :param scrub: the host's function; it gets a dict with ``event``, ``job_id``, ``runid``, ``func``,
        ``queue`` and ``result``, ``error`` or ``data``, and returns it changed (or changes it in place).
        What it does to ``runid``, ``result``, ``error`` and ``data`` is stored, sent and shown.
    :returns: one for each item, in their order.
    """
    if not items:
        return []
    prepared = [
        item if scrub is None else replace(item, occurrence=_scrubbed(item.occurrence, scrub))
        for item in items
    ]
    with database.write() as connection:
        now = database.now(connection)
        by_item, stored = _store_events(database, connection, prepared, now)
        watches = _watches_of(connection, stored)
        endpoints = _endpoints_of(connection, stored, watches)
        standing = _standing_endpoints(connection) if any(event.created for event in stored) else []
        rows: list[dict[str, Any]] = []
        for event in stored:
            receivers = _receivers(event, watches.get(event.occurrence.job_id or "", []), endpoints, standing)
            for endpoint in receivers:
                body = render(endpoint, event.id, event.occurrence)
                rows.append(
                    delivery_values(
                        event.id, event.occurrence.type, endpoint, body, max_attempts=max_attempts, now=now
                    )
                )
        made = store_deliveries(database, connection, rows)
        for event in stored:
            event.deliveries = made.get(event.id, 0)
        _settle_watches(database, connection, stored, watches, endpoints, now)
    first_seen: set[str] = set()
    told = []
    for event in by_item:
        told.append(
            IngestedEvent(
                event_id=event.id,
                type=event.occurrence.type,
                job_id=event.occurrence.job_id,
                created=event.created and event.id not in first_seen,
                deliveries=event.deliveries if event.id not in first_seen else 0,
            )
        )
        first_seen.add(event.id)
    return told


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
            (endpoint_id if _is_endpoint(endpoint_id) else None, job_id, entry)
            for endpoint_id, job_id, entry in items
        ]
        existing = _existing_endpoints(connection, {endpoint_id for endpoint_id, _job_id, _entry in words})
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


def delivery_values(
    event_id: str,
    event_type: str,
    endpoint: EndpointRow,
    body: bytes,
    *,
    max_attempts: int,
    now: datetime,
    trigger: str = SCHEDULED,
) -> dict[str, Any]:
    """Return the row of a new delivery, due at once."""
    return {
        "id": new_id("dlv"),
        "event_id": event_id,
        "endpoint_id": endpoint.id,
        "host": endpoint.host,
        "event_type": event_type,
        "status": PENDING,
        "trigger": trigger,
        "body": body,
        "attempts": 0,
        "max_attempts": endpoint.max_attempts or max_attempts,
        "next_attempt_at": now,
        "created_at": now,
    }


def store_deliveries(
    database: Database, connection: Connection, rows: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Insert those of *rows* whose event and endpoint have no delivery yet; return how many by event id."""
    made: dict[str, int] = defaultdict(int)
    statement = insert_or_ignore(database, Delivery).returning(Delivery.event_id)
    for chunk in _chunks(sorted(rows, key=lambda row: (row["event_id"], row["endpoint_id"]))):
        for event_id in connection.execute(statement, chunk).scalars():
            made[event_id] += 1
    return made


def endpoint_row(row: Any) -> EndpointRow:
    """Return what rendering may know, from a row of :data:`ENDPOINT_COLUMNS`."""
    events = None if row.events is None else tuple(json.loads(row.events))
    return EndpointRow(
        id=row.id,
        kind=row.kind,
        host=row.host,
        events=events,
        scope=row.scope,
        format=row.format,
        reference=row.reference,
        runid=row.runid,
        max_attempts=row.max_attempts,
        created_at=row.created_at,
    )


ENDPOINT_COLUMNS = (
    Endpoint.id, Endpoint.kind, Endpoint.host, Endpoint.events, Endpoint.scope, Endpoint.format,
    Endpoint.reference, Endpoint.runid, Endpoint.max_attempts, Endpoint.created_at,
)  # fmt: skip


def _store_events(
    database: Database, connection: Connection, items: Sequence[IngestItem], now: datetime
) -> tuple[list[_Stored], list[_Stored]]:
    """Insert what is new and load what is not; return the event of each item, and each event once."""
    by_key: dict[str, _Stored] = {}
    by_item: list[_Stored] = []
    for item in items:
        key = item.occurrence.run_key
        event = by_key.get(key) if key is not None else None
        if event is None:
            event = _Stored(new_id("evt"), item.occurrence, created=True, named=[])
            if key is not None:
                by_key[key] = event
        event.named += [endpoint_id for endpoint_id in item.endpoint_ids if endpoint_id not in event.named]
        by_item.append(event)
    stored = list({event.id: event for event in by_item}.values())
    # In the order of their keys: two dispatchers with the same entries wait for each other, not in a circle.
    stored.sort(key=lambda event: event.occurrence.run_key or "")
    rows = [_event_values(event, now) for event in stored]
    statement = insert_or_ignore(database, Event).returning(Event.id)
    inserted: set[str] = set()
    for chunk in _chunks(rows):
        inserted.update(connection.execute(statement, chunk).scalars())
    there = sorted(key for key, event in by_key.items() if event.id not in inserted)
    for keys in _chunks(there):
        query = (
            select(Event.id, Event.run_key, Event.payload)
            .where(Event.run_key.in_(keys))
            .with_for_update(read=True, key_share=True)  # as with endpoints, see _endpoints_of
        )
        for event_id, key, payload in connection.execute(query):
            event = by_key[str(key)]
            event.id, event.created, event.occurrence = event_id, False, occurrence_from_json(payload)
    return by_item, stored


def _event_values(event: _Stored, now: datetime) -> dict[str, Any]:
    occurrence = event.occurrence
    return {
        "id": event.id,
        "type": occurrence.type,
        "run_key": occurrence.run_key,
        "job_id": occurrence.job_id,
        "runid": _storable(occurrence.runid),
        "source": occurrence.source,
        "supersedes": occurrence.supersedes,
        "payload": occurrence_to_json(occurrence),
        "occurred_at": occurrence.occurred_at,
        "created_at": now,
    }


def _watches_of(connection: Connection, stored: Sequence[_Stored]) -> dict[str, list[Any]]:
    jobs = sorted({event.occurrence.job_id for event in stored if event.occurrence.job_id is not None})
    watches: dict[str, list[Any]] = defaultdict(list)
    columns = (Watch.id, Watch.endpoint_id, Watch.job_id, Watch.status, Watch.run)
    for chunk in _chunks(jobs):
        for row in connection.execute(select(*columns).where(Watch.job_id.in_(chunk))):
            watches[row.job_id].append(row)
    return watches


def _endpoints_of(
    connection: Connection, stored: Sequence[_Stored], watches: Mapping[str, Sequence[Any]]
) -> dict[str, EndpointRow]:
    ids = {endpoint_id for event in stored for endpoint_id in event.named if _is_endpoint(endpoint_id)}
    ids |= {row.endpoint_id for rows in watches.values() for row in rows if row.endpoint_id is not None}
    endpoints: dict[str, EndpointRow] = {}
    for chunk in _chunks(sorted(ids)):
        # Locked so that pruning cannot take an endpoint away before its delivery is there.
        query = (
            select(*ENDPOINT_COLUMNS)
            .where(Endpoint.id.in_(chunk))
            .order_by(Endpoint.id)
            .with_for_update(read=True, key_share=True)
        )
        endpoints.update((row.id, endpoint_row(row)) for row in connection.execute(query))
    for event in stored:
        for endpoint_id in event.named:
            if endpoint_id not in endpoints and _is_endpoint(endpoint_id):
                logger.warning(
                    "The endpoint %r of job %r does not exist here (pruned, or another app's); ignored.",
                    endpoint_id,
                    event.occurrence.job_id,
                )
    return endpoints


def _standing_endpoints(connection: Connection) -> list[EndpointRow]:
    query = (
        select(*ENDPOINT_COLUMNS)
        .where(Endpoint.kind == "standing", Endpoint.enabled)
        .order_by(Endpoint.id)
        .with_for_update(read=True, key_share=True)
    )
    return [endpoint_row(row) for row in connection.execute(query)]


def _receivers(
    event: _Stored,
    watches: Sequence[Any],
    endpoints: Mapping[str, EndpointRow],
    standing: Sequence[EndpointRow],
) -> list[EndpointRow]:
    """Return every endpoint that hears of *event*, each once."""
    occurrence = event.occurrence
    if occurrence.type == WEBHOOK_PING:  # a test of the named endpoint, whatever it listens for
        return [endpoints[endpoint_id] for endpoint_id in event.named if endpoint_id in endpoints]
    chosen = {endpoint_id: endpoints[endpoint_id] for endpoint_id in event.named if endpoint_id in endpoints}
    began = _began_at(occurrence)
    for watch in watches:
        endpoint = endpoints.get(watch.endpoint_id)
        if endpoint is None or watch.status == CLOSED or occurrence.scope == "tree":
            continue  # a tree is told to the one endpoint it was evaluated for
        if began is None or began >= endpoint.created_at - CLOCK_SKEW:
            chosen[endpoint.id] = endpoint
    if event.created:
        chosen.update((endpoint.id, endpoint) for endpoint in standing)
    return [
        endpoint
        for endpoint in chosen.values()
        if endpoint.scope == occurrence.scope and endpoint.wants(occurrence.type)
    ]


def _settle_watches(
    database: Database,
    connection: Connection,
    stored: Sequence[_Stored],
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
        named = {endpoint_id if _is_endpoint(endpoint_id) else None for endpoint_id in event.named}
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
        connection.execute(
            update(Watch)
            .where(Watch.id == bindparam("watch"))
            .values(
                status=SETTLED,
                run=bindparam("told"),
                evidence=None,
                missing_passes=0,
                settled_at=now,
                confirmed_at=case((Watch.confirmed_at.is_(None), now), else_=Watch.confirmed_at),
            ),
            [{"watch": watch_id, "told": run} for watch_id, run in sorted(told.items())],
        )
    for chunk in _chunks([missing[key] for key in sorted(missing)]):
        connection.execute(insert_or_ignore(database, Watch), chunk)


def _scope_of(endpoint_id: str | None, endpoints: Mapping[str, EndpointRow]) -> str | None:
    if endpoint_id is None:
        return "job"
    endpoint = endpoints.get(endpoint_id)
    return None if endpoint is None or endpoint.kind != "job" else endpoint.scope


def _existing_endpoints(connection: Connection, ids: Iterable[str | None]) -> set[str]:
    found: set[str] = set()
    for chunk in _chunks(sorted(endpoint_id for endpoint_id in ids if endpoint_id is not None)):
        query = select(Endpoint.id).where(Endpoint.id.in_(chunk)).with_for_update(read=True, key_share=True)
        found.update(connection.execute(query).scalars())
    return found


def _is_endpoint(endpoint_id: str | None) -> bool:
    return endpoint_id is not None and not endpoint_id.endswith(NO_ENDPOINT_SUFFIX)


def _began_at(occurrence: Occurrence) -> datetime | None:
    if occurrence.enqueued_at is not None:
        return occurrence.enqueued_at
    try:
        return parse_time((occurrence.run or "").removeprefix("created:"))
    except ValueError:
        return None


def _scrubbed(occurrence: Occurrence, scrub: Scrub) -> Occurrence:
    payload: dict[str, Any] = {
        "event": occurrence.type,
        "job_id": occurrence.job_id,
        "runid": occurrence.runid,
        "func": occurrence.func,
        "queue": occurrence.queue,
    }
    if occurrence.type == JOB_SUCCESS:
        payload["result"] = copy.deepcopy(occurrence.result)
    if occurrence.type == JOB_FAILURE:
        payload["error"] = copy.deepcopy(dict(occurrence.error)) if occurrence.error is not None else None
    if occurrence.data:
        payload["data"] = copy.deepcopy(dict(occurrence.data))
    edited = scrub(payload)
    if edited is None:
        edited = payload
    return replace(
        occurrence,
        runid=edited.get("runid"),
        result=edited.get("result"),
        error=edited.get("error"),
        data=edited.get("data") or {},
    )


def _storable(text: str | None) -> str | None:
    """Return *text* without what PostgreSQL's text or UTF-8 cannot hold; the payload keeps it escaped."""
    if text is None:
        return None
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _chunks(rows: Sequence[Any]) -> Iterable[Any]:
    for start in range(0, len(rows), _CHUNK):
        yield list(rows[start : start + _CHUNK])
