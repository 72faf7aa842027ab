"""The delivery filter that lists, recover and cancel share, and how a filtered list is read.

One condition is one index read backwards. With several, a database reads the index of one and discards rows
that the others exclude: for two frequent values that never occur together, it reads the whole index. Here the
rarest condition leads, in windows of bounded size, and after :data:`ENOUGH_S` the walk stops: a page may be
short, and its cursor continues from there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, literal, select

from .models import Delivery, Event, first_id_at

#: Rows read by the first statement and by later ones; conditions are compared by counts up to the latter.
FIRST_WINDOW, WINDOW = 1000, 5000
#: Seconds after which no further window is started.
ENOUGH_S = 0.06

#: Conditions on columns of the delivery itself, each with an index of its own; the selective ones first.
_COLUMNS: dict[str, Any] = {
    "tenant": Delivery.tenant,
    "endpoint_id": Delivery.endpoint_id,
    "host": Delivery.host,
    "statuses": Delivery.status,
    "event_type": Delivery.event_type,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFilter:
    """Deliveries that meet every condition given.

    :param since: created at this time or later (timezone-aware).
    :param until: created before this time (timezone-aware).
    :param statuses: with one of these statuses.
    :param job_id: job id of the event.
    :param runid: run id of the event.
    :param tenant: tenant that owns the endpoint.
    """

    since: datetime | None = None
    until: datetime | None = None
    endpoint_id: str | None = None
    statuses: tuple[str, ...] | None = None
    host: str | None = None
    event_type: str | None = None
    event_id: str | None = None
    job_id: str | None = None
    runid: str | None = None
    tenant: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions on :class:`~.models.Delivery`.

        Times become bounds on the id, which begins with its creation time: so every list walks one index and
        needs no other for times.
        """
        found: list[ColumnElement[bool]] = []
        if self.since is not None:
            found.append(Delivery.id >= first_id_at("dlv", self.since))
        if self.until is not None:
            found.append(Delivery.id < first_id_at("dlv", self.until))
        for name, column in {**_COLUMNS, "event_id": Delivery.event_id}.items():
            value = getattr(self, name)
            if name == "statuses" and value is not None and len(value) > 1:
                found.append(column.in_(value))
            elif value is not None:
                found.append(column == (value[0] if name == "statuses" else value))
        for column, value in ((Event.job_id, self.job_id), (Event.runid, self.runid)):
            if value is not None:
                found.append(Delivery.event_id.in_(select(Event.id).where(column == value)))
        return found


@dataclass(frozen=True, slots=True)
class Walked:
    """The result of a walk.

    :param ids: newest first.
    :param reached: all matches down to this id were considered; ``None`` if the walk reached the end.
    """

    ids: tuple[str, ...]
    reached: str | None


def walk(connection: Connection, where: DeliveryFilter, *, before: str | None, limit: int) -> Walked:
    """Return the ids of the newest deliveries that meet *where*.

    :param before: only ids below this one.
    :param limit: maximum number of ids.
    """
    statuses = where.statuses or ()
    if len(statuses) < 2:
        return _walk(connection, where, before, limit)
    # Read each status from its own index: together, all of their rows would be read and sorted.
    parts = [
        _walk(connection, replace(where, statuses=(status,)), before, limit)
        for status in dict.fromkeys(statuses)
    ]
    reached = max((part.reached for part in parts if part.reached is not None), default=None)
    ids = sorted((found for part in parts for found in part.ids), reverse=True)
    if reached is not None:
        ids = [found for found in ids if found >= reached]
    if len(ids) > limit:
        ids = ids[:limit]
        reached = ids[-1]
    return Walked(tuple(ids), reached)


def _walk(connection: Connection, where: DeliveryFilter, before: str | None, limit: int) -> Walked:
    wanted = {
        name: value[0] if name == "statuses" else value
        for name in _COLUMNS
        if (value := getattr(where, name)) is not None
    }
    by_event = where.event_id or where.job_id or where.runid
    if len(wanted) < 2 or by_event is not None:
        # One job or run has few events: they lead.
        query = select(Delivery.id).where(*where.conditions())
        if before is not None:
            query = query.where(Delivery.id < before)
        ids = tuple(connection.execute(query.order_by(Delivery.id.desc()).limit(limit)).scalars())
        return Walked(ids, ids[-1] if len(ids) == limit else None)
    bounds = DeliveryFilter(since=where.since, until=where.until).conditions()
    if before is not None:
        bounds.append(Delivery.id < before)
    leader = min(
        wanted, key=lambda name: count_up_to(WINDOW, connection, _COLUMNS[name] == wanted[name], *bounds)
    )
    return _windows(connection, leader, wanted, bounds, limit)


def _windows(
    connection: Connection,
    leader: str,
    wanted: dict[str, Any],
    bounds: list[ColumnElement[bool]],
    limit: int,
) -> Walked:
    ids: list[str] = []
    size = FIRST_WINDOW
    began = time.monotonic()
    while True:
        rows = select(Delivery.id, *_COLUMNS.values()).where(_COLUMNS[leader] == wanted[leader], *bounds)
        # Its own limit keeps the database from reading on where the other conditions do not match.
        window = rows.order_by(Delivery.id.desc()).limit(size).subquery()
        others = [window.c[_COLUMNS[name].key] == value for name, value in wanted.items() if name != leader]
        query = select(window.c.id).where(*others).order_by(window.c.id.desc()).limit(limit - len(ids))
        ids += connection.execute(query).scalars()
        if len(ids) == limit:
            return Walked(tuple(ids), ids[-1])
        count, reached = connection.execute(select(func.count(), func.min(window.c.id))).one()
        if count < size:
            return Walked(tuple(ids), None)
        if time.monotonic() - began > ENOUGH_S:
            return Walked(tuple(ids), reached)
        size = WINDOW
        bounds = [*bounds, Delivery.id < reached]


def count_up_to(cap: int, connection: Connection, *conditions: ColumnElement[bool]) -> int:
    """Return how many rows meet the conditions, all on one table; ``cap + 1`` means more than *cap*."""
    capped = select(literal(1)).where(*conditions).limit(cap + 1).subquery()
    return connection.execute(select(func.count()).select_from(capped)).scalar_one()
