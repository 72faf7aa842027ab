"""Which deliveries: the filter that lists, recover and cancel share, and how a filtered list is read.

One condition is one index read backwards. With several, a database reads the index of one and discards what
the others refuse: for two frequent values that never meet, the whole index. Here the rarest condition leads,
in windows of bounded size, and after :data:`ENOUGH_S` the walk stops where it is: a page may be short, and
its cursor continues from there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from .models import Delivery, Event, first_id_at

#: Rows read by the first statement and by later ones; also how far conditions are compared.
FIRST_WINDOW, WINDOW = 1000, 5000
#: Seconds after which no further window is begun.
ENOUGH_S = 0.06

#: Conditions on columns of the delivery itself, each with an index of its own; the selective ones first.
_COLUMNS = {
    "tenant": Delivery.tenant,
    "endpoint_id": Delivery.endpoint_id,
    "host": Delivery.host,
    "statuses": Delivery.status,
    "event_type": Delivery.event_type,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFilter:
    """Deliveries that meet every condition given.

    :param since: made at this time or later (aware).
    :param until: made before this time (aware).
    :param statuses: one of these.
    :param job_id: of the event.
    :param runid: of the event.
    :param tenant: whose the endpoint is.
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

        Times become bounds of the id, which begins with the time it was made: so every list walks one
        index and needs no other for times.
        """
        found: list[ColumnElement[bool]] = []
        if self.since is not None:
            found.append(Delivery.id >= first_id_at("dlv", self.since))
        if self.until is not None:
            found.append(Delivery.id < first_id_at("dlv", self.until))
        if self.statuses is not None:
            (first, *others) = self.statuses
            found.append(Delivery.status.in_(self.statuses) if others else Delivery.status == first)
        for column, value in (
            (Delivery.tenant, self.tenant), (Delivery.endpoint_id, self.endpoint_id),
            (Delivery.host, self.host), (Delivery.event_type, self.event_type),
            (Delivery.event_id, self.event_id),
        ):  # fmt: skip
            if value is not None:
                found.append(column == value)
        if self.job_id is not None:
            found.append(Delivery.event_id.in_(select(Event.id).where(Event.job_id == self.job_id)))
        if self.runid is not None:
            found.append(Delivery.event_id.in_(select(Event.id).where(Event.runid == self.runid)))
        return found


@dataclass(frozen=True, slots=True)
class Walked:
    """What a walk found.

    :param ids: newest first.
    :param reached: nothing that matches is left out down to this id; ``None`` when the walk came to the end.
    """

    ids: tuple[str, ...]
    reached: str | None


def walk(connection: Connection, where: DeliveryFilter, *, before: str | None, limit: int) -> Walked:
    """Return the ids of the newest deliveries that meet *where*.

    :param before: only ids below this one.
    :param limit: how many at most.
    """
    statuses = where.statuses or ()
    if len(statuses) < 2:
        return _walk(connection, where, before, limit)
    # Each status from its own index: together they would be read and sorted as a whole.
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
        # The events of one job or run are few: they lead.
        query = select(Delivery.id).where(*where.conditions())
        if before is not None:
            query = query.where(Delivery.id < before)
        ids = tuple(connection.execute(query.order_by(Delivery.id.desc()).limit(limit)).scalars())
        return Walked(ids, ids[-1] if len(ids) == limit else None)
    bounds = DeliveryFilter(since=where.since, until=where.until).conditions()
    leader = min(wanted, key=lambda name: _count(connection, _is(name, wanted[name]), bounds, before))
    return _windows(connection, leader, wanted, bounds, before, limit)


def _windows(
    connection: Connection,
    leader: str,
    wanted: dict[str, Any],
    bounds: list[ColumnElement[bool]],
    before: str | None,
    limit: int,
) -> Walked:
    ids: list[str] = []
    size = FIRST_WINDOW
    began = time.monotonic()
    while True:
        rows = select(Delivery.id, *_COLUMNS.values()).where(_is(leader, wanted[leader]), *bounds)
        if before is not None:
            rows = rows.where(Delivery.id < before)
        # Its own limit keeps the database from looking further for what the others refuse.
        window = rows.order_by(Delivery.id.desc()).limit(size).subquery()
        others = [window.c[_COLUMNS[name].key] == value for name, value in wanted.items() if name != leader]
        query = select(window.c.id).where(*others).order_by(window.c.id.desc()).limit(limit - len(ids))
        ids += connection.execute(query).scalars()
        if len(ids) == limit:
            return Walked(tuple(ids), ids[-1])
        count, before = connection.execute(select(func.count(), func.min(window.c.id))).one()
        if count < size:
            return Walked(tuple(ids), None)
        if time.monotonic() - began > ENOUGH_S:
            return Walked(tuple(ids), before)
        size = WINDOW


def _is(name: str, value: Any) -> ColumnElement[bool]:
    condition: ColumnElement[bool] = _COLUMNS[name] == value
    return condition


def _count(
    connection: Connection,
    condition: ColumnElement[bool],
    bounds: list[ColumnElement[bool]],
    before: str | None,
) -> int:
    query = select(Delivery.id).where(condition, *bounds)
    if before is not None:
        query = query.where(Delivery.id < before)
    capped = query.limit(WINDOW + 1).subquery()
    number: int = connection.execute(select(func.count()).select_from(capped)).scalar_one()
    return number
