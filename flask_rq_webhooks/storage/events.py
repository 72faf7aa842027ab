"""Events: store an occurrence as an event with deliveries, exactly once, at a position in the feed.

Owns the rows of events and the order of the steps within the one transaction: the event, its receivers and
deliveries (:mod:`.subscriptions`), the watches it settles (:mod:`.watches`). Knows nothing of where
occurrences come from; a function passed in renders the bodies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Text, select, text, update

from .._steps import reached
from ..protocol.events import (
    JOB_FAILURE,
    JOB_PROGRESS,
    JOB_SUCCESS,
    RUNNING_TYPES,
    TERMINAL_TYPES,
    Occurrence,
    run_key,
)
from ..protocol.payloads import Rendered, occurrence_from_json, occurrence_to_json
from ..tracing import is_same
from .bulk_insert import chunks_of, insert_new, one_of
from .claims import store_claimed
from .database import Database
from .feed import take_locks
from .models import PENDING, SENDING, Delivery, Event, new_id
from .reported_runs import SETTLE_POSTGRESQL, settle_watches, settlement
from .subscriptions import (
    AdvanceClaim,
    EndpointRow,
    Surroundings,
    canceled_now,
    delivery_values,
    in_order,
    look_around,
    owner_of,
    receivers_of,
    requests_of,
    store_deliveries,
    trace_of,
    warn_of_missing,
)

Render = Callable[[EndpointRow, str, Occurrence], bytes | Rendered]
Scrub = Callable[[dict[str, Any]], dict[str, Any] | None]
#: Called with an event's id, type and job, the trace of its request, and the trace it occurred in if that is
#: another one; returns the trace that its deliveries continue.
Begin = Callable[[str, str, str | None, str | None, str | None], str | None]


@dataclass(frozen=True, slots=True)
class IngestItem:
    """One occurrence, and what is known about its receivers.

    :param endpoint_ids: endpoints that the report names: they count no matter when the run began. Endpoints
        that watch the job, and standing ones, are found here. Unknown ids are ignored.
    :param tenant: tenant whose standing endpoints get it, besides those of operators; the job's by default.
    :param needs_watch: store nothing unless one of these endpoints has a watch on the job. Any Redis client
        with write access can name any endpoint in a report.
    :param trace: trace in which it occurred, see :mod:`~flask_rq_webhooks.tracing`.
    """

    occurrence: Occurrence
    endpoint_ids: tuple[str, ...] = ()
    needs_watch: bool = False
    tenant: str | None = None
    trace: str | None = None


@dataclass(slots=True)
class StoredEvent:
    """An event that is now in SQL, with everything a batch says about it.

    :param created: ``False`` if it already existed.
    :param named: endpoints that the report named.
    :param deliveries: how many deliveries are new.
    :param sent_to: the tenant that the item names.
    :param tenant: the tenant that the event belongs to.
    :param trace: the trace in which it occurred; once stored, the trace that its deliveries continue.
    :param requests: the endpoints of the requests that asked for it, by id.
    """

    id: str
    occurrence: Occurrence
    created: bool
    named: list[str]
    deliveries: int = 0
    sent_to: str | None = None
    tenant: str | None = None
    trace: str | None = None
    requests: Mapping[str, EndpointRow] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IngestedEvent:
    """The result of ingesting one item.

    :param event_id: empty if the item needs a watch and there is none: nothing was stored.
    :param type: type of the stored event; another one, perhaps, if it already existed.
    :param created: ``False`` if the event already existed.
    :param deliveries: how many deliveries are new.
    """

    event_id: str
    type: str
    job_id: str | None
    created: bool
    deliveries: int


@dataclass(frozen=True, slots=True)
class Held:
    """A transaction that has locked some jobs and read what is stored around them; only storing is left.

    :param transaction: leaving it commits, or rolls back on an exception.
    """

    connection: Connection
    there: Surroundings
    transaction: ExitStack


def hold(
    database: Database,
    jobs: Collection[str],
    named: Collection[str],
    tenants: Collection[str] = (),
    *,
    repeated: bool = False,
    optimistic: bool = True,
) -> Held:
    """Begin the transaction of :func:`ingest`, before it is known what will be stored.

    On SQLite it blocks nobody until then, and storing fails if somebody else has written in the meantime.

    :param jobs: jobs whose events may be stored.
    :param named: ids of endpoints that the events may name.
    :param tenants: tenants that the events may name.
    :param repeated: see :meth:`.Database.write`; likewise *optimistic*.
    """
    with ExitStack() as stack:
        write = database.write(repeated=repeated, limits_idle=True, optimistic=optimistic)
        connection = stack.enter_context(write)
        there = _locked(database, connection, jobs, named, tenants)
        return Held(connection, there, stack.pop_all())


def _locked(
    database: Database,
    connection: Connection,
    jobs: Collection[str],
    named: Collection[str],
    tenants: Collection[str],
) -> Surroundings:
    jobs = sorted(jobs)
    least_position = 0 if database.is_sqlite else take_locks(database, connection, jobs)
    there = look_around(database, connection, jobs, named, tenants)
    # The clock may go backwards, for example after a failover.
    clock = (there.now - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
    there.next_position = max(least_position, there.next_position, clock)
    return there


def ingest(
    database: Database,
    items: Sequence[IngestItem],
    *,
    repeated: bool = False,
    held: Held | None = None,
    **options: Any,
) -> list[IngestedEvent]:
    """Store events and their deliveries in one transaction; repeating it changes nothing.

    A run has one terminal event, no matter who reports it or how many do so at once. An endpoint named for an
    event that already exists gets its missing delivery, rendered from what was stored. Standing endpoints get
    deliveries for new events only, and only while enabled: what happens while one is disabled is left to
    :func:`~.deliveries.recover_part`.

    All or nothing: if *render* or *scrub* raises, nothing in the batch is stored. The caller then passes the
    items one by one, so that an item that cannot be stored never holds up the others.

    :param repeated: see :meth:`.Database.write`.
    :param held: transaction held for the jobs and endpoints of *items*; ended here.
    :param options: options of :func:`ingest_within`.
    :returns: one for each item, in their order.
    """
    if not items:
        return []
    held = held or hold(database, *_around(items), repeated=repeated, optimistic=False)
    with held.transaction:
        return ingest_within(database, held.connection, items, there=held.there, **options)


def _around(items: Sequence[IngestItem]) -> tuple[set[str], set[str], set[str]]:
    """Return the jobs, endpoints and tenants that *items* name."""
    return (
        {item.occurrence.job_id for item in items if item.occurrence.job_id is not None},
        {endpoint_id for item in items for endpoint_id in item.endpoint_ids},
        {item.tenant for item in items if item.tenant is not None},
    )


def ingest_within(
    database: Database,
    connection: Connection,
    items: Sequence[IngestItem],
    *,
    render: Render,
    max_attempts: int,
    scrub: Scrub | None = None,
    begin: Begin | None = None,
    claim: AdvanceClaim | None = None,
    there: Surroundings | None = None,
) -> list[IngestedEvent]:
    """Do what :func:`ingest` does, within the caller's transaction.

    :param render: returns the bytes to deliver, given endpoint, event id and occurrence.
    :param max_attempts: used if the endpoint itself sets none.
    :param scrub: the host's function; it gets a dict with ``event``, ``job_id``, ``runid``, ``func``,
        ``queue`` and ``result``, ``error``, ``progress`` or ``data``, and returns it changed (or changes it
        in place). Its changes to ``runid`` and to the last four are stored, sent and shown.
    :param begin: called for each event that may be new.
    :param claim: stores deliveries as claimed by a sender while it has free places; none while sending is
        paused.
    :param there: what is stored around *items*, if this transaction has already read it.
    """
    there = there or _locked(database, connection, *_around(items))
    prepared = [
        item if scrub is None else replace(item, occurrence=_scrubbed(item.occurrence, scrub))
        for item in items
    ]
    now, endpoints = there.now, there.endpoints
    believed = [item for item in prepared if not item.needs_watch or _is_watched(item, there.watches)]
    over = _ended_runs(connection, believed)
    believed = [item for item in believed if _end_key(item.occurrence) not in over]
    warn_of_missing(believed, endpoints)

    def ask(event: StoredEvent) -> dict[str, EndpointRow]:
        watches = there.watches.get(event.occurrence.job_id or "", [])
        event.requests = requests_of(event, watches, endpoints)
        return event.requests

    def complete(event: StoredEvent) -> None:
        asking = ask(event)
        event.tenant = event.sent_to or owner_of(event, asking)
        trace, own = trace_of(event, asking), event.trace
        # A worker may have begun a trace of its own.
        parent, link = (trace, own) if trace is not None and not is_same(trace, own) else (own, None)
        what = event.occurrence
        event.trace = parent if begin is None else begin(event.id, what.type, what.job_id, parent, link)

    by_item, stored, settles = _store_events(database, connection, believed, there, complete=complete)
    rows: list[dict[str, Any]] = []
    for event in stored:
        requests = event.requests if event.created else ask(event)
        for endpoint in receivers_of(event, requests, there.standing):
            rendered = render(endpoint, event.id, event.occurrence)
            row = delivery_values(
                event.id, event.occurrence.type, endpoint, rendered, max_attempts=max_attempts, now=now
            )
            rows.append(row if claim is None or there.paused else claim.applied(row, now))
    if claim is not None and there.paused:
        claim.complete = False
    made = store_deliveries(database, connection, [row for row in rows if row["lease_id"] is None])
    if claim is not None and claim.hosts:
        held = sorted((row for row in rows if row["lease_id"] is not None), key=in_order)
        claim.claimed = store_claimed(database, connection, held, claim.lease_id)
        made.update(one.event_id for one in claim.claimed)
    _cancel_outdated(database, connection, stored)
    for event in stored:
        event.deliveries = made[event.id]
    settled, missing = settlement(stored, there.watches, endpoints, now)
    settle_watches(database, connection, "" if settles else settled, missing, now)
    seen: set[str] = set()
    by_believed = dict(zip(map(id, believed), by_item, strict=True))
    ingested = []
    for item in prepared:
        if id(item) not in by_believed:
            what = item.occurrence
            ingested.append(IngestedEvent("", what.type, what.job_id, created=False, deliveries=0))
            continue
        event = by_believed[id(item)]
        ingested.append(
            IngestedEvent(
                event_id=event.id,
                type=event.occurrence.type,
                job_id=event.occurrence.job_id,
                created=event.created and event.id not in seen,
                deliveries=event.deliveries if event.id not in seen else 0,
            )
        )
        seen.add(event.id)
    return ingested


def _is_watched(item: IngestItem, watches: Mapping[str, Sequence[Any]]) -> bool:
    rows = watches.get(item.occurrence.job_id or "", ())
    return any(watch.endpoint_id in item.endpoint_ids for watch in rows)


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
    if occurrence.progress is not None:
        payload["progress"] = copy.deepcopy(occurrence.progress)
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
        progress=edited.get("progress"),
        data=edited.get("data") or {},
    )


def _store_events(
    database: Database,
    connection: Connection,
    items: Sequence[IngestItem],
    there: Surroundings,
    *,
    complete: Callable[[StoredEvent], None],
) -> tuple[list[StoredEvent], list[StoredEvent], bool]:
    """Insert the new events and load those that already exist.

    :param complete: sets tenant and trace.
    :returns: the event of each item, every event once, and whether the watches are settled.
    """
    by_key: dict[str, StoredEvent] = {}
    by_item: list[StoredEvent] = []
    for item in items:
        key = item.occurrence.run_key
        event = by_key.get(key) if key is not None else None
        if event is None:
            event = StoredEvent(new_id("evt"), item.occurrence, created=True, named=[])
            if key is not None:
                by_key[key] = event
        event.sent_to = event.sent_to or item.tenant
        event.trace = event.trace or item.trace
        event.named += [endpoint_id for endpoint_id in item.endpoint_ids if endpoint_id not in event.named]
        by_item.append(event)
    stored = list({event.id: event for event in by_item}.values())
    place = {event.id: number for number, event in enumerate(stored)}
    for event in stored:
        complete(event)
    _number(stored, dict(there.counts))
    # In key order, so that two dispatchers with the same entries wait for each other without a deadlock.
    stored.sort(key=lambda event: event.occurrence.run_key or "")
    rows = [_event_values(event, there.now, there.next_position + place[event.id]) for event in stored]
    # If no job has an event yet, all of these are new: their endings are known before they are stored.
    settled = ""
    if not database.is_sqlite and not there.counts:
        settled, _missing = settlement(stored, there.watches, there.endpoints, there.now)
    values = {"settled": settled, "now": there.now} if settled else {}
    before = _SETTLE if settled else None
    inserted = insert_new(database, connection, Event, rows, before=before, values=values)
    known = sorted(key for key, event in by_key.items() if event.id not in inserted)
    for keys in chunks_of(known):
        query = (
            select(Event.id, Event.run_key, Event.payload, Event.tenant)
            .where(Event.run_key.in_(keys))
            .with_for_update(read=True, key_share=True)  # as with endpoints, see look_around
        )
        for event_id, key, payload, tenant in connection.execute(query).all():
            event = by_key[str(key)]
            event.id, event.created, event.occurrence = event_id, False, occurrence_from_json(payload)
            if tenant is None and event.tenant is not None:
                # It was stored before the request that the job belongs to was known.
                connection.execute(update(Event).where(Event.id == event_id).values(tenant=event.tenant))
            event.tenant = tenant or event.tenant
    return by_item, stored, bool(settled) and not known


#: Executed together with inserting the events, which saves a round trip.
_SETTLE = text(f"{SETTLE_POSTGRESQL.text} RETURNING w.id").columns(id=Text).cte("settling")


def _end_key(occurrence: Occurrence) -> str | None:
    """Return the key of the ending after which *occurrence* is not stored; ``None`` if it always is."""
    if occurrence.type not in RUNNING_TYPES or occurrence.job_id is None or occurrence.run is None:
        return None
    return run_key(occurrence.job_id, occurrence.run, JOB_SUCCESS)


def _ended_runs(connection: Connection, items: Sequence[IngestItem]) -> set[str]:
    """Return the keys of the endings, stored or about to be, of runs reported as still running."""
    keys = {key for item in items if (key := _end_key(item.occurrence)) is not None}
    ended = {key for item in items if (key := item.occurrence.run_key) is not None and key in keys}
    for chunk in chunks_of(sorted(keys)):
        found = connection.execute(select(Event.run_key).where(Event.run_key.in_(chunk))).scalars()
        ended.update(key for key in found if key is not None)
    return ended


def _cancel_outdated(database: Database, connection: Connection, stored: Sequence[StoredEvent]) -> None:
    """Cancel deliveries about running jobs whose ending is stored, and of progress if newer is stored.

    A delivery that a sender holds may still arrive; it is not retried.
    """
    # Most jobs have one event.
    new = [one.occurrence for one in stored if one.created and (one.occurrence.sequence or 0) > 1]
    progressed = {one.job_id for one in new if one.type == JOB_PROGRESS}
    ended = {f"{one.job_id}|{one.run}|" for one in new if one.type in TERMINAL_TYPES and one.scope == "job"}
    jobs = sorted({one.job_id or "" for one in new if one.type in TERMINAL_TYPES | {JOB_PROGRESS}})
    if not jobs:
        return
    query = (
        select(Delivery.id, Event.id, Event.type, Event.job_id, Event.run_key)
        .join(Event, Event.id == Delivery.event_id)
        .where(
            one_of(Event.job_id, "jobs"),
            Event.type.in_(sorted(RUNNING_TYPES)),
            Delivery.status.in_([PENDING, SENDING]),
        )
        .order_by(Delivery.id)  # the order in which recording locks them
        .with_for_update(of=Delivery)
    )
    latest = {event.id for event in stored}
    outdated = []
    for chunk in chunks_of(jobs):
        for delivery_id, event_id, event_type, job_id, key in connection.execute(query, {"jobs": chunk}):
            is_older = event_type == JOB_PROGRESS and job_id in progressed and event_id not in latest
            run = (key or "").removeprefix(f"{job_id}|").partition("|")[0]
            if is_older or f"{job_id}|{run}|" in ended:
                outdated.append(delivery_id)
    if outdated:
        reached("newer stored")
    for chunk in chunks_of(outdated):
        connection.execute(update(Delivery).where(Delivery.id.in_(chunk)).values(canceled_now(database)))
    if outdated:
        reached("older canceled")


def _number(events: Sequence[StoredEvent], counts: dict[str, int]) -> None:
    """Number each event among those of its job."""
    for event in events:
        job_id = event.occurrence.job_id
        if job_id is not None:
            counts[job_id] = counts.get(job_id, 0) + 1
            event.occurrence.sequence = counts[job_id]


def _event_values(event: StoredEvent, now: datetime, position: int) -> dict[str, Any]:
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
        "position": position,
        "tenant": event.tenant,
        "trace": event.trace,
    }


def _storable(text: str | None) -> str | None:
    """Replace what PostgreSQL's text or UTF-8 cannot hold in *text*; the payload keeps it escaped."""
    if text is None:
        return None
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
