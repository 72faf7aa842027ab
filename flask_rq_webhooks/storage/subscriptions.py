"""Select the endpoints that get an event, and build its deliveries.

Owns endpoint rows as ingest sees them, the choice among them, and the rows of new deliveries. Knows nothing
of how bodies are rendered, and of watches only which endpoint they belong to.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Text, TextClause, and_, bindparam, cast, func, select, text

from ..protocol.events import (
    CLOCK_SKEW,
    JOB_PROGRESS,
    JOB_TYPES,
    OPERATOR_TYPES,
    WEBHOOK_PING,
    Occurrence,
    is_wanted,
    parse_time,
)
from ..protocol.payloads import JSON, Rendered, as_rendered
from .attempts import PROGRESS_ATTEMPTS
from .bulk_insert import Texts, chunks_of, fetch_rows, insert_new, one_of
from .claims import ClaimedDelivery
from .database import Database
from .models import (
    CANCELED,
    CLOSED,
    PENDING,
    SCHEDULED,
    SENDING,
    SHARED,
    SUBSCRIBED,
    Delivery,
    Endpoint,
    decoded,
    new_id,
)

if TYPE_CHECKING:
    from .events import IngestItem, StoredEvent

logger = logging.getLogger(__name__)

#: Ends the token of jobs whose events go only to standing endpoints (``ATTACH="all"``).
NO_ENDPOINT_SUFFIX = "_all"
#: Written as in the partial indexes: a parameter would hide it from the planner.
_IS_STANDING = text("kind = 'standing'")
_TENANTS_STANDING = and_(_IS_STANDING, Endpoint.enabled, Endpoint.tenant.is_not(None))
#: Locks an endpoint: pruning must not delete it before its delivery is stored.
_SHARED: dict[str, Any] = {"read": True, "key_share": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRow:
    """What rendering may know about an endpoint: no URL, no secret, no header."""

    id: str
    kind: str
    host: str
    events: tuple[str, ...] | None
    scope: str
    format: str
    reference: str | None
    runid: str | None
    max_attempts: int | None
    retry_schedule: tuple[float, ...] | None
    created_at: datetime
    tenant: str | None = None
    only_tenant: str | None = None
    trace: str | None = None

    def wants(self, event_type: str) -> bool:
        """Return whether the endpoint gets events of *event_type*."""
        return is_wanted(event_type, self.events)


def is_endpoint(endpoint_id: str | None) -> bool:
    """Return whether a callback's token names an endpoint; if not, only standing ones may get its events."""
    return endpoint_id is not None and not endpoint_id.endswith(NO_ENDPOINT_SUFFIX)


def endpoint_row(columns: Mapping[Any, Any]) -> EndpointRow:
    """Return what rendering may know, from :data:`ENDPOINT_COLUMNS` by name."""
    return EndpointRow(**decoded(columns))


ENDPOINT_COLUMNS = tuple(getattr(Endpoint, one.name) for one in fields(EndpointRow))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWatch:
    """The part of a watch that matters while events of its job are stored."""

    id: str
    endpoint_id: str | None
    job_id: str
    status: str
    run: str | None


@dataclass(slots=True)
class Surroundings:
    """What is already stored around events that are about to be stored.

    :ivar now: the database's clock.
    :ivar next_position: next position in the feed.
    :ivar paused: whether sending is paused.
    :ivar counts: how many events each job has.
    :ivar watches: the watches on each job.
    :ivar endpoints: those that are named or have a watch on a job, by id.
    :ivar standing: the enabled standing endpoints of operators and of the tenants of those; nobody else's.
    """

    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    next_position: int = 0
    paused: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    watches: dict[str, list[JobWatch]] = field(default_factory=dict)
    endpoints: dict[str, EndpointRow] = field(default_factory=dict)
    standing: list[EndpointRow] = field(default_factory=list)


def look_around(
    database: Database,
    connection: Connection,
    jobs: Collection[str],
    named: Collection[str],
    tenants: Collection[str],
) -> Surroundings:
    """Return what is stored around events, in one statement; the endpoints are locked against pruning.

    :param jobs: of the events.
    :param named: ids of endpoints.
    """
    texts: dict[str, list[str]] = {
        "jobs": list(jobs),
        "named": sorted(filter(is_endpoint, named)),
        "tenants": sorted(tenants),
    }
    found = json.loads(fetch_rows(database, connection, _LOOK[database.is_sqlite], texts)[0][0])
    there = Surroundings(
        next_position=(found["last"] or 0) + 1,
        paused=bool(found["paused"]),
        counts={row["job_id"]: row["count"] for row in found["counts"] or ()},
        standing=[_endpoint_in(row) for row in found["standing"] or ()],
    )
    if found["now"] is not None:
        there.now = parse_time(found["now"])
    for row in found["watches"] or ():
        there.watches.setdefault(row["job_id"], []).append(JobWatch(**row))
    for row in found["endpoints"] or ():
        there.endpoints[row["id"]] = _endpoint_in(row)
    return there


def _endpoint_in(row: dict[str, Any]) -> EndpointRow:
    row["created_at"] = parse_time(row["created_at"])
    return endpoint_row(row)


def warn_of_missing(items: Sequence[IngestItem], endpoints: Collection[str]) -> None:
    """Log the endpoints that items name and that are not among *endpoints*."""
    for item in items:
        for endpoint_id in item.endpoint_ids:
            if is_endpoint(endpoint_id) and endpoint_id not in endpoints:
                logger.warning(
                    "The endpoint %r of job %r does not exist here (pruned, or another app's); ignored.",
                    endpoint_id, item.occurrence.job_id,
                )  # fmt: skip


def _look(*, among: str, also_among: str, as_object: str, as_array: str, clock: str, lock: str) -> TextClause:
    """Return the statement of :func:`look_around`: rows of several tables, in one JSON object.

    :param among: condition to put after a column whose value must be among a parameter's.
    :param also_among: the same, also allowing the values of a table's column.
    """
    columns = [one.name for one in fields(EndpointRow)]
    endpoints = f"SELECT {', '.join(columns)} FROM rq_webhooks_endpoint WHERE"  # noqa: S608
    pairs = ", ".join(f"'{one}', {one}" for one in columns)
    endpoint = f"{as_object}({pairs})"
    jobs = among.format("jobs")
    statement = text(f"""
WITH watch AS MATERIALIZED (
    SELECT id, endpoint_id, job_id, status, run FROM rq_webhooks_watch WHERE job_id {jobs}
),
endpoint AS MATERIALIZED (
    {endpoints} id {also_among.format("endpoint_id", "watch", "named")} ORDER BY id {lock}
),
of_operators AS MATERIALIZED ({endpoints} kind = 'standing' AND enabled AND tenant IS NULL {lock}),
of_tenants AS MATERIALIZED (
    {endpoints} kind = 'standing' AND enabled
    AND tenant {also_among.format("tenant", "endpoint", "tenants")} {lock}
)
SELECT CAST({as_object}(
    'now', {clock},
    'last', (SELECT max(position) FROM rq_webhooks_event),
    'paused', EXISTS (SELECT 1 FROM rq_webhooks_dispatcher WHERE id = '{SHARED}' AND paused_at IS NOT NULL),
    'counts', (SELECT {as_array}({as_object}('job_id', job_id, 'count', several)) FROM (
        SELECT job_id, count(*) AS several FROM rq_webhooks_event WHERE job_id {jobs} GROUP BY job_id
    ) AS c),
    'watches', (SELECT {as_array}({as_object}(
        'id', id, 'endpoint_id', endpoint_id, 'job_id', job_id, 'status', status, 'run', run)) FROM watch),
    'endpoints', (SELECT {as_array}({endpoint}) FROM endpoint),
    'standing', (SELECT {as_array}({endpoint}) FROM (
        SELECT * FROM of_operators UNION ALL SELECT * FROM of_tenants
    ) AS s)
) AS text)
""")  # noqa: S608  (no value in it)
    return statement.bindparams(*(bindparam(name, type_=Texts) for name in ("jobs", "named", "tenants")))


#: Keyed by whether it is for SQLite. Locks are taken in the order of ids, as everywhere.
_LOOK = {
    True: _look(
        among="IN (SELECT value FROM json_each(:{}))",
        also_among="IN (SELECT {} FROM {} UNION ALL SELECT value FROM json_each(:{}))",
        as_object="json_object",
        as_array="json_group_array",
        clock="NULL",
        lock="",
    ),
    # Arrays, because the planner does not know how few rows a query returns, and would read whole tables.
    False: _look(
        among="= ANY(CAST(:{} AS text[]))",
        also_among="= ANY(ARRAY(SELECT {}::text FROM {}) || CAST(:{} AS text[]))",
        as_object="json_build_object",
        as_array="json_agg",
        clock="clock_timestamp()",
        lock="FOR KEY SHARE",
    ),
}


def wanted_by_standing(
    connection: Connection, event_types: Iterable[str], tenants: Collection[str] | None = None
) -> dict[str | None, frozenset[str]]:
    """Return which of *event_types* enabled standing endpoints subscribe to, by name or by ``"*"``.

    :param tenants: tenants whose endpoints count besides those of operators; ``None``: everybody's.
    :returns: types by tenant; under ``None`` what operators subscribe to.
    """
    query = select(Endpoint.tenant, Endpoint.events).distinct()
    query = query.where(_IS_STANDING, Endpoint.enabled, Endpoint.events.is_not(None))
    found: list[Any] = []
    if tenants is None:
        found += connection.execute(query)
    else:
        found += connection.execute(query.where(Endpoint.tenant.is_(None)))
        for chunk in chunks_of(sorted(tenants)):
            theirs = query.where(one_of(Endpoint.tenant, "tenants"))
            found += connection.execute(theirs, {"tenants": chunk})
    named: dict[str | None, set[str]] = {}
    for tenant, events in found:
        named.setdefault(tenant, set()).update(json.loads(events))
    types = list(event_types)
    return {tenant: frozenset(one for one in types if is_wanted(one, some)) for tenant, some in named.items()}


def subscribing_tenants(database: Database, *, at_most: int) -> dict[str, frozenset[str]] | None:
    """Return, by tenant, the event types of jobs that enabled standing endpoints of tenants want.

    The database joins the tenants of each list of types into one string: twenty thousand rows would keep the
    interpreter busy for longer than it takes to find them.

    :param at_most: maximum number of endpoints to read.
    :returns: only tenants that want any; ``None`` if there are more endpoints than *at_most*.
    """
    theirs = select(Endpoint.tenant, Endpoint.events).where(_TENANTS_STANDING).limit(at_most + 1).subquery()
    # Grouped twice instead of json_agg(DISTINCT …), for which PostgreSQL sorts.
    once = select(theirs, func.count().label("count")).group_by(*theirs.c).subquery()
    several = func.json_group_array if database.is_sqlite else func.json_agg
    tenants = cast(several(once.c.tenant), Text)
    query = select(once.c.events, func.sum(once.c.count), tenants).group_by(once.c.events)
    with database.read() as connection:
        rows = connection.execute(query).all()
    if sum(count for _, count, _ in rows) > at_most:
        return None
    found: dict[str, frozenset[str]] = {}
    for events, _, names in rows:
        types = _job_types(events)
        if types:
            named = dict.fromkeys(json.loads(names), types)
            twice = {tenant: found[tenant] | types for tenant in named.keys() & found.keys()}
            found |= named | twice
    return found


def job_types_wanted(database: Database, tenant: str) -> frozenset[str]:
    """Return the event types of jobs that the enabled standing endpoints of a tenant want."""
    query = select(Endpoint.events).where(_TENANTS_STANDING, Endpoint.tenant == tenant).limit(_MAX_LOOK)
    with database.read() as connection:
        lists = connection.execute(query).scalars().all()
    return frozenset[str]().union(*map(_job_types, lists))


def _job_types(events: str | None) -> frozenset[str]:
    named = None if events is None else json.loads(events)
    return frozenset(one for one in JOB_TYPES if is_wanted(one, named))


#: Maximum number of endpoints read for one tenant.
_MAX_LOOK = 1000


def existing_endpoints(connection: Connection, ids: Iterable[str | None]) -> set[str]:
    """Return those of *ids* that exist, locked against pruning."""
    found: set[str] = set()
    for chunk in chunks_of(sorted(endpoint_id for endpoint_id in ids if endpoint_id is not None)):
        query = select(Endpoint.id).where(Endpoint.id.in_(chunk)).with_for_update(**_SHARED)
        found.update(connection.execute(query).scalars())
    return found


def requests_of(
    event: StoredEvent, watches: Sequence[JobWatch], endpoints: Mapping[str, EndpointRow]
) -> dict[str, EndpointRow]:
    """Return, by id, the endpoints of the requests that asked for *event*, whatever they subscribe to."""
    occurrence = event.occurrence
    chosen = {endpoint_id: endpoints[endpoint_id] for endpoint_id in event.named if endpoint_id in endpoints}
    began = _began_at(occurrence)
    for watch in watches:
        endpoint = endpoints.get(watch.endpoint_id or "")
        if endpoint is None or watch.status == CLOSED or occurrence.scope == "tree":
            continue  # a tree is reported to the one endpoint it was evaluated for
        counts = began is None or began >= endpoint.created_at - CLOCK_SKEW
        if counts or watch.run == occurrence.run:  # noted as a run that counts, whatever the clocks say
            chosen[endpoint.id] = endpoint
    return chosen


def owner_of(event: StoredEvent, requests: Mapping[str, EndpointRow]) -> str | None:
    """Return the tenant that owns *event*: of the request its report names, else of the newest request."""
    return _of_request(event, requests, "tenant")


def trace_of(event: StoredEvent, requests: Mapping[str, EndpointRow]) -> str | None:
    """Return the trace of the request that *event*'s report names, else of the newest one."""
    return _of_request(event, requests, "trace")


def _of_request(event: StoredEvent, requests: Mapping[str, EndpointRow], name: str) -> str | None:
    """Return a field of the request the report names, else of the newest; only requests that set it count."""
    having = [row for row in requests.values() if getattr(row, name) is not None]
    if not having:
        return None
    named = [row for row in having if row.id in event.named]
    newest = max(named or having, key=lambda row: (row.created_at, row.id))
    found: str | None = getattr(newest, name)
    return found


def tenants_of(event: StoredEvent, requests: Mapping[str, EndpointRow]) -> set[str]:
    """Return the tenants whose standing endpoints get *event*: their requests would have got it by URL."""
    found = {row.tenant for row in requests.values() if row.scope == event.occurrence.scope}
    if event.sent_to is not None:
        found.add(event.sent_to)
    return {tenant for tenant in found if tenant is not None}


def receivers_of(
    event: StoredEvent, requests: Mapping[str, EndpointRow], standing: Sequence[EndpointRow]
) -> list[EndpointRow]:
    """Return every endpoint that gets *event*, each once.

    :param requests: see :func:`requests_of`.
    :param standing: the endpoints of operators, and of the tenants of this event and of others.
    """
    occurrence = event.occurrence
    if occurrence.type == WEBHOOK_PING:  # a test of the named endpoint, whatever it subscribes to
        return list(requests.values())
    in_scope = [row for row in requests.values() if row.scope == occurrence.scope and row.kind != SUBSCRIBED]
    tenants = tenants_of(event, requests)
    for row in standing:
        if row.tenant is not None:
            # As with a URL, the request's route chose whether it is about a job or a tree.
            if row.tenant in tenants and (event.created or event.named):
                in_scope.append(row)
        elif (
            event.created
            and (row.scope == occurrence.scope or occurrence.type in OPERATOR_TYPES)
            and (row.only_tenant is None or row.only_tenant in tenants or row.only_tenant == event.tenant)
        ):
            in_scope.append(row)
    chosen = {row.id: row for row in in_scope if row.wants(occurrence.type)}
    return list(chosen.values())


def _began_at(occurrence: Occurrence) -> datetime | None:
    if occurrence.enqueued_at is not None:
        return occurrence.enqueued_at
    try:
        return parse_time((occurrence.run or "").removeprefix("created:"))
    except ValueError:
        return None


def delivery_values(
    event_id: str,
    event_type: str,
    endpoint: EndpointRow,
    made: bytes | Rendered,
    *,
    max_attempts: int,
    now: datetime,
    trigger: str = SCHEDULED,
) -> dict[str, Any]:
    """Return the row of a new delivery, due at once."""
    body, content_type = as_rendered(made)
    own = None if endpoint.retry_schedule is None else len(endpoint.retry_schedule) + 1
    allowed = endpoint.max_attempts or own or max_attempts
    return {
        "id": new_id("dlv"),
        "event_id": event_id,
        "endpoint_id": endpoint.id,
        "tenant": endpoint.tenant,
        "host": endpoint.host,
        "event_type": event_type,
        "status": PENDING,
        "trigger": trigger,
        "body": body,
        "content_type": None if content_type == JSON else content_type,
        "attempts": 0,
        "max_attempts": min(allowed, PROGRESS_ATTEMPTS) if event_type == JOB_PROGRESS else allowed,
        "next_attempt_at": now,
        "lease_id": None,
        "lease_until": None,
        "created_at": now,
    }


@dataclass(slots=True, kw_only=True)
class AdvanceClaim:
    """A sender's free places for deliveries about to be stored, which are then stored as claimed by it.

    :param lease_id: as :func:`.claim_due` has it.
    :param lease_s: as :func:`.claim_due` has it.
    :param take_place: reserves a place for one request to a host; ``False`` if there is none.
    :ivar hosts: host of each delivery that got a place, by its id.
    :ivar claimed: those that were stored, as :func:`.claim_due` returns them.
    :ivar complete: whether no other delivery was stored that would still have to be claimed.
    """

    lease_id: str
    lease_s: float
    take_place: Callable[[str], bool]
    began: float = field(default_factory=time.monotonic)
    hosts: dict[str, str] = field(default_factory=dict)
    claimed: list[ClaimedDelivery] = field(default_factory=list)
    complete: bool = True

    def applied(self, row: dict[str, Any], now: datetime) -> dict[str, Any]:
        """Return the row of a new delivery, claimed if there is a place for it.

        :param now: the database's clock.
        """
        if not self.take_place(row["host"]):
            self.complete = False
            return row
        self.hosts[row["id"]] = row["host"]
        until = now + timedelta(seconds=self.lease_s)
        return row | {"status": SENDING, "lease_id": self.lease_id, "lease_until": until}


def store_deliveries(
    database: Database, connection: Connection, rows: Sequence[Mapping[str, Any]]
) -> Counter[str]:
    """Insert those of *rows* whose event and endpoint have no delivery yet; return how many by event id."""
    new = insert_new(database, connection, Delivery, sorted(rows, key=in_order))
    return Counter(row["event_id"] for row in rows if row["id"] in new)


def in_order(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the sort key of new deliveries, so that concurrent inserts never deadlock."""
    return row["event_id"], row["endpoint_id"]


def canceled_now(database: Database) -> dict[str, Any]:
    """Return the values that cancel a delivery. The lease stays: its sender may still record the attempt."""
    return {"status": CANCELED, "next_attempt_at": None, "finished_at": database.clock()}
