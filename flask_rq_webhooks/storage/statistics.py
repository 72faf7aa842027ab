"""Numbers for the overview and for metrics.

Owns counts over bounded windows: no number here costs more as history grows. If there is more than a window
holds, the number says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, literal_column, select

from .claims import earliest_due
from .database import Database
from .dispatchers import alive
from .filters import count_up_to
from .models import (
    CANCELED,
    EXHAUSTED,
    OPEN,
    PENDING,
    RESERVED,
    SENDING,
    SHARED,
    SUCCEEDED,
    Attempt,
    Delivery,
    Dispatcher,
    Endpoint,
    Watch,
    first_id_at,
)

#: Rows are counted up to this; one more stands for "more than that".
COUNT_CAP = 10_000
#: How many of the newest finished deliveries are counted by hour.
FINISHED_WINDOW = 50_000
#: How many of the newest attempts are read for latency and hosts.
ATTEMPT_WINDOW = 2_000
#: How many of a tenant's newest deliveries have their attempts read: not adjacent, so each costs a read.
TENANT_WINDOW = 500
#: Maximum number of hosts shown.
WORST_HOSTS = 10


@dataclass(frozen=True, slots=True)
class Hour:
    """What ended within one hour, by delivery status."""

    start: datetime
    succeeded: int = 0
    exhausted: int = 0
    canceled: int = 0


@dataclass(frozen=True, slots=True)
class HostNumbers:
    """Recent attempts to one host."""

    host: str
    attempts: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The overview.

    :param counts: by delivery status, each up to :data:`COUNT_CAP`; one more means "more".
    :param oldest_due_s: how long the longest due delivery has been due; ``None`` if none is due.
    :param hours: oldest first, only those with any ending.
    :param hours_complete: ``False`` if more than :data:`FINISHED_WINDOW` ended, so that the oldest hours are
        incomplete.
    :param success_rate: succeeded ÷ (succeeded + exhausted) over these hours; ``None`` without any.
    :param p50_ms: median duration of recent attempts; ``None`` without any.
    :param worst_hosts: hosts with failures among recent attempts, most failures first.
    :param watches: ``"open"`` and ``"reserved"``, up to :data:`COUNT_CAP`.
    :param oldest_watch: when the oldest of those counted was created.
    :param dispatchers: how many had a recent heartbeat.
    """

    counts: Mapping[str, int]
    oldest_due_s: float | None = None
    hours: Sequence[Hour]
    hours_complete: bool
    success_rate: float | None
    p50_ms: float | None
    p95_ms: float | None
    worst_hosts: Sequence[HostNumbers]
    watches: Mapping[str, int] = field(default_factory=dict)
    oldest_watch: datetime | None = None
    endpoints_disabled: int
    dispatchers: int = 0
    paused_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class TenantNumbers:
    """Recent failures and backlog of one tenant.

    :param failures: exhausted deliveries.
    :param backlog: unfinished ones.
    """

    tenant: str
    failures: int
    backlog: int


def tenant_numbers(database: Database, *, hours: int = 24) -> list[TenantNumbers]:
    """Return the tenants with failures or a backlog, most failures first.

    Counts cover the newest :data:`FINISHED_WINDOW` deliveries of each status.

    :param hours: how far back failed deliveries may have been created.
    """
    found: dict[str, Counter[str]] = {}
    with database.read() as connection:
        since = first_id_at("dlv", database.now(connection) - timedelta(hours=hours))
        for status in (EXHAUSTED, PENDING, SENDING):
            newest = select(Delivery.tenant).where(Delivery.status == status)
            if status == EXHAUSTED:
                newest = newest.where(Delivery.id >= since)
            window = newest.order_by(Delivery.id.desc()).limit(FINISHED_WINDOW).subquery()
            counted = select(window.c.tenant, func.count()).where(window.c.tenant.is_not(None))
            for tenant, number in connection.execute(counted.group_by(window.c.tenant)):
                found.setdefault(tenant, Counter())[status] = number
    numbers = [
        TenantNumbers(tenant, some[EXHAUSTED], some[PENDING] + some[SENDING])
        for tenant, some in found.items()
    ]
    return sorted(numbers, key=lambda one: (-one.failures, -one.backlog, one.tenant))


def statistics(database: Database, *, hours: int = 24, tenant: str | None = None) -> Statistics:
    """Return the numbers of the overview.

    :param hours: how far back endings are counted.
    :param tenant: only this tenant's deliveries and endpoints, without what only operators see: watches,
        dispatchers, pauses, how long deliveries have been due.
    """
    if tenant is not None:
        return _of_tenant(database, tenant, hours)
    with database.read() as connection:
        now = database.now(connection)
        watches, oldest_watch = _unsettled_watches(connection)
        due = earliest_due(database, connection)
        return Statistics(
            **_of_deliveries(database, connection, hours),
            oldest_due_s=(now - due).total_seconds() if due is not None and due <= now else None,
            watches=watches,
            oldest_watch=oldest_watch,
            endpoints_disabled=_count(connection, *_DISABLED),
            dispatchers=_count(connection, *alive(database)),
            paused_since=connection.execute(
                select(Dispatcher.paused_at).where(Dispatcher.id == SHARED)
            ).scalar_one_or_none(),
        )


def _of_tenant(database: Database, tenant: str, hours: int) -> Statistics:
    mine = Delivery.tenant == tenant
    newest = select(Delivery.id).where(mine).order_by(Delivery.id.desc())
    with database.read() as connection:
        recent = Delivery.id.in_(newest.limit(FINISHED_WINDOW))
        few = Attempt.delivery_id.in_(newest.limit(TENANT_WINDOW))
        return Statistics(
            **_of_deliveries(database, connection, hours, counted=[mine], finished=[recent], attempted=[few]),
            endpoints_disabled=_count(connection, Endpoint.tenant == tenant, *_DISABLED),
        )


def _of_deliveries(
    database: Database,
    connection: Connection,
    hours: int,
    *,
    counted: Sequence[ColumnElement[bool]] = (),
    finished: Sequence[ColumnElement[bool]] = (),
    attempted: Sequence[ColumnElement[bool]] = (),
) -> dict[str, Any]:
    """Return the numbers that both operators and tenants see, for the rows that meet the conditions."""
    since = database.now(connection) - timedelta(hours=hours)
    by_hour, complete = _finished_by_hour(database, connection, since, *finished)
    succeeded = sum(hour.succeeded for hour in by_hour)
    ended = succeeded + sum(hour.exhausted for hour in by_hour)
    durations, hosts = _recent_attempts(connection, *attempted)
    return {
        "counts": {
            status: _count(connection, Delivery.status == status, *counted)
            for status in (PENDING, SENDING, SUCCEEDED, EXHAUSTED, CANCELED)
        },
        "hours": by_hour,
        "hours_complete": complete,
        "success_rate": succeeded / ended if ended else None,
        "p50_ms": _percentile(durations, 0.50),
        "p95_ms": _percentile(durations, 0.95),
        "worst_hosts": hosts,
    }


_DISABLED = (Endpoint.kind == "standing", ~Endpoint.enabled)
_count = partial(count_up_to, COUNT_CAP)


def _finished_by_hour(
    database: Database, connection: Connection, since: datetime, *also: ColumnElement[bool]
) -> tuple[list[Hour], bool]:
    window = (
        select(Delivery.finished_at, Delivery.status)
        .where(Delivery.finished_at >= since, *also)
        .order_by(Delivery.finished_at.desc())
        .limit(FINISHED_WINDOW)
        .subquery()
    )
    # In UTC on both databases, whatever the server's own time zone is.
    if database.is_sqlite:
        name = func.strftime("%Y-%m-%d %H", window.c.finished_at)
    else:
        name = func.to_char(func.timezone("UTC", window.c.finished_at), "YYYY-MM-DD HH24")
    grouped = connection.execute(
        select(name.label("hour"), window.c.status, func.count().label("number"))
        .group_by(literal_column("hour"), window.c.status)
        .order_by(literal_column("hour"))
    ).all()
    by_hour: dict[str, dict[str, int]] = defaultdict(dict)
    for row in grouped:
        if row.status in (SUCCEEDED, EXHAUSTED, CANCELED):
            by_hour[row.hour][row.status] = row.number
    hours = [
        Hour(datetime.strptime(start, "%Y-%m-%d %H").replace(tzinfo=UTC), **numbers)
        for start, numbers in by_hour.items()
    ]
    return hours, sum(row.number for row in grouped) < FINISHED_WINDOW


def _recent_attempts(
    connection: Connection, *which: ColumnElement[bool]
) -> tuple[list[float], list[HostNumbers]]:
    recent = (
        select(Attempt.delivery_id, Attempt.duration_ms, Attempt.status)
        .where(*which)
        .order_by(Attempt.started_at.desc())
        .limit(ATTEMPT_WINDOW)
        .subquery()
    )
    durations: list[float] = []
    attempts: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    query = select(Delivery.host, recent.c.duration_ms, recent.c.status).join(
        recent, recent.c.delivery_id == Delivery.id
    )
    for host, duration_ms, status in connection.execute(query):
        durations.append(duration_ms)
        attempts[host] += 1
        failed[host] += status == "failed"
    hosts = [HostNumbers(host, attempts[host], failed[host]) for host in attempts if failed[host]]
    hosts.sort(key=lambda numbers: (-numbers.failed, numbers.host))
    return sorted(durations), hosts[:WORST_HOSTS]


def _unsettled_watches(connection: Connection) -> tuple[dict[str, int], datetime | None]:
    numbers: dict[str, int] = {}
    oldest: datetime | None = None
    for status in (OPEN, RESERVED):
        counted = (
            select(Watch.created_at).where(Watch.status == status).order_by(Watch.id).limit(COUNT_CAP + 1)
        ).subquery()
        number, first = connection.execute(select(func.count(), func.min(counted.c.created_at))).one()
        numbers[status] = number
        if first is not None and (oldest is None or first < oldest):
            oldest = first
    return numbers, oldest


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None
