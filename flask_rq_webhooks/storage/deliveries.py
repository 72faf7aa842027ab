"""Operator actions on deliveries: resend one, make all due, recover or cancel many by a filter.

Owns the order in which bulk actions process deliveries, in small parts: each part returns where the next one
begins. They go up by id, so they end, and a delivery that fails again is not processed twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sqlalchemy import ColumnElement, case, exists, func, or_, select, text, update

from ..errors import ErasedError
from ..protocol.events import RUNNING_TYPES, WEBHOOK_PING, Occurrence
from ..protocol.payloads import occurrence_from_json
from .database import Database
from .events import Render
from .filters import DeliveryFilter
from .models import CANCELED, EXHAUSTED, MANUAL, PENDING, SENDING, Delivery, Endpoint, Event, first_id_at
from .queries import CursorError
from .statistics import COUNT_CAP
from .subscriptions import (
    ENDPOINT_COLUMNS,
    EndpointRow,
    canceled_now,
    delivery_values,
    endpoint_row,
    store_deliveries,
)

#: Rows per transaction of every action that may change many.
BATCH = 500

#: Events that one part examines for those a disabled endpoint missed; most already have their deliveries.
EVENTS_PER_PART = 5_000

#: The last delivery changed; or the endpoint and the last event examined.
_CURSOR = re.compile(r"(dlv_[0-9a-z]{26})|(ep[0-9a-z]{0,20}_[0-9a-z]{26}):(evt_[0-9a-z]{26})")

#: Reports about a run in progress are outdated by the time deliveries are recovered.
_IS_CURRENT = (Delivery.event_type.not_in(sorted(RUNNING_TYPES)),)


def resend(database: Database, delivery_id: str, *, tenant: str | None = None) -> str | None:
    """Make a delivery due now, for one more attempt, whatever its outcome so far.

    The event id and the bytes stay the same. The attempt decides the status again: a delivery that had
    succeeded and whose last attempt now fails is exhausted.

    :param tenant: only a delivery of this tenant.
    :returns: its new status: ``"pending"``; ``"sending"``, unchanged, if an attempt is in progress; ``None``
        if there is no such delivery.
    :raises ErasedError: when its body was erased.
    """
    with database.write() as connection:
        row = connection.execute(
            select(Delivery.status, Delivery.erased_at, in_flight(database).label("in_flight"))
            .where(Delivery.id == delivery_id, *([] if tenant is None else [Delivery.tenant == tenant]))
            .with_for_update()
        ).one_or_none()
        if row is None:
            return None
        if row.erased_at is not None:
            raise ErasedError(f"The body of delivery {delivery_id} was erased; it cannot be sent again.")
        if row.in_flight:
            return SENDING
        connection.execute(update(Delivery).where(Delivery.id == delivery_id).values(due_again(database)))
    return PENDING


def make_all_due(database: Database) -> int:
    """Make every delivery that waits for its next attempt due now; return how many.

    Unlike :func:`recover` it changes nothing else: the trigger and the number of attempts left stay the same.
    """
    with database.write(single_statement=True) as connection:
        return connection.execute(
            update(Delivery)
            .where(Delivery.status == text("'pending'"), Delivery.next_attempt_at > database.clock())
            .values(next_attempt_at=database.clock())
        ).rowcount


@dataclass(frozen=True, slots=True)
class Part:
    """Result of one part of a bulk action.

    :param done: number of deliveries changed or created.
    :param cursor: where the next part begins; ``None`` when everything is done.
    """

    done: int
    cursor: str | None


class Step(Protocol):
    """A function that does one part of a bulk action, from a cursor on."""

    def __call__(self, *, cursor: str | None, at_most: int) -> Part:
        """Process at most ``at_most`` deliveries."""


def recover_part(
    database: Database,
    where: DeliveryFilter,
    *,
    render: Render,
    max_attempts: int,
    cursor: str | None = None,
    at_most: int = BATCH,
) -> Part:
    """Make some deliveries due now, for one more attempt each, in one transaction.

    Never those about a run in progress (``job.started``, ``job.progress``, ``job.stalled``). Without
    ``where.statuses``: exhausted and canceled ones, then those never created because their standing endpoint
    was disabled when the event happened (for events since the endpoint was created, by its current
    subscription). With it: deliveries with these statuses.

    :param render: see :func:`~.events.ingest`; for deliveries that were never created.
    :param max_attempts: also for those, if the endpoint sets none.
    :param cursor: of the part before.
    :param at_most: deliveries.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    after, endpoint_id, after_event = _read(cursor)
    if endpoint_id is None:
        ready = [*_IS_CURRENT, ~in_flight(database), Delivery.erased_at.is_(None)]
        part = _change(database, _recoverable(where), ready, due_again(database), after, at_most)
        if part.cursor is not None or where.statuses is not None:
            return part
        return Part(part.done, _beginning(database, where, after=None))
    return _make_missing(database, where, render, max_attempts, endpoint_id, after_event, at_most)


def cancel_part(
    database: Database, where: DeliveryFilter, *, cursor: str | None = None, at_most: int = BATCH
) -> Part:
    """Cancel some unfinished deliveries, in one transaction.

    A delivery being sent is canceled too: its attempt is still recorded, and no other follows.

    :param where: its ``statuses`` may narrow this to ``pending`` or ``sending``.
    :param cursor: of the part before.
    :param at_most: deliveries.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    after, _endpoint_id, _after_event = _read(cursor)
    chosen = _cancelable(where)
    if not chosen.statuses:
        return Part(0, None)
    return _change(database, chosen, [], canceled_now(database), after, at_most)


def left_to_recover(database: Database, where: DeliveryFilter, cursor: str | None) -> int | None:
    """Return how many deliveries the parts from *cursor* on find, up to ``COUNT_CAP`` and one more.

    :returns: excludes those still to be created; ``None`` when only these are left, since their number is not
        known in advance.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    after, endpoint_id, _after_event = _read(cursor)
    return _left(database, _recoverable(where), after, *_IS_CURRENT) if endpoint_id is None else None


def left_to_cancel(database: Database, where: DeliveryFilter, cursor: str | None) -> int:
    """Return how many deliveries the parts from *cursor* on find, up to ``COUNT_CAP`` and one more.

    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    after, _endpoint_id, _after_event = _read(cursor)
    chosen = _cancelable(where)
    return _left(database, chosen, after) if chosen.statuses else 0


def _recoverable(where: DeliveryFilter) -> DeliveryFilter:
    return replace(where, statuses=where.statuses or (EXHAUSTED, CANCELED))


def _cancelable(where: DeliveryFilter) -> DeliveryFilter:
    """Return the filter for unfinished deliveries; without any status if *where* excludes them all."""
    unfinished = {PENDING, SENDING}
    return replace(where, statuses=tuple(sorted(unfinished.intersection(where.statuses or unfinished))))


def _change(
    database: Database,
    chosen: DeliveryFilter,
    also: list[ColumnElement[bool]],
    values: Mapping[str, Any],
    after: str | None,
    at_most: int,
) -> Part:
    """Change the first deliveries above *after*; wait for those that are being claimed or recorded."""
    query = select(Delivery.id).where(*chosen.conditions(), *also)
    if after is not None:
        query = query.where(Delivery.id > after)
    # Select one more than is changed, to know whether there is a next part.
    query = query.order_by(Delivery.id).limit(at_most + 1).with_for_update()
    with database.write() as connection:
        ids = connection.execute(query).scalars().all()
        if not ids:
            return Part(0, None)
        # Checked again: they may have changed while we waited for them.
        still = DeliveryFilter(statuses=chosen.statuses).conditions()
        done = connection.execute(
            update(Delivery).where(Delivery.id.in_(ids[:at_most]), *still, *also).values(**values)
        ).rowcount
    return Part(done, ids[at_most - 1] if len(ids) > at_most else None)


def _left(database: Database, chosen: DeliveryFilter, after: str | None, *also: ColumnElement[bool]) -> int:
    query = select(Delivery.id).where(*chosen.conditions(), *also)
    if after is not None:
        query = query.where(Delivery.id > after)
    with database.read() as connection:
        capped = query.limit(COUNT_CAP + 1).subquery()
        number: int = connection.execute(select(func.count()).select_from(capped)).scalar_one()
    return number


def due_again(database: Database) -> dict[str, Any]:
    """Return the values that make a delivery due now, for one more manual attempt."""
    one_more = Delivery.attempts + 1
    return {
        "status": PENDING,
        "trigger": MANUAL,
        "next_attempt_at": database.clock(),
        "max_attempts": case((Delivery.max_attempts < one_more, one_more), else_=Delivery.max_attempts),
        "finished_at": None,
        "lease_id": None,
        "lease_until": None,
    }


def in_flight(database: Database) -> ColumnElement[bool]:
    """Return the condition that a sender holds the delivery; a canceled one may still be in flight."""
    held = or_(Delivery.status == SENDING, Delivery.status == CANCELED)
    return held & Delivery.lease_until.is_not(None) & (Delivery.lease_until > database.clock())


# -- deliveries that were never made ----------------------------------------------------------------------


def _make_missing(
    database: Database,
    where: DeliveryFilter,
    render: Render,
    max_attempts: int,
    endpoint_id: str,
    after: str,
    at_most: int,
) -> Part:
    """Create the deliveries that one standing endpoint missed while disabled, for events above *after*."""
    endpoint = _endpoint(database, where, Endpoint.id == endpoint_id)
    if endpoint is None:  # disabled or deleted since the previous part
        return Part(0, _beginning(database, where, after=endpoint_id))
    query = (
        select(Event.id, Event.type, Event.payload)
        .where(
            Event.id > after,
            Event.type.not_in([WEBHOOK_PING, *RUNNING_TYPES]),
            *_heard_by(endpoint),
            Event.erased_at.is_(None),
            ~exists().where(Delivery.event_id == Event.id, Delivery.endpoint_id == endpoint.id),
            *_event_conditions(where),
        )
        .order_by(Event.id)
        .limit(at_most)
    )
    with database.write() as connection:
        now = database.now(connection)
        upto = None
        if where.event_id is None and where.job_id is None and where.runid is None:
            # One job or run has few events; otherwise only some are examined, as most may have their
            # deliveries already.
            upto = connection.execute(
                select(Event.id)
                .where(Event.id > after)
                .order_by(Event.id)
                .offset(EVENTS_PER_PART - 1)
                .limit(1)
            ).scalar_one_or_none()
        if upto is not None:
            query = query.where(Event.id <= upto)
        events = connection.execute(query).all()
        rows = []
        for event in events:
            if not endpoint.wants(event.type):
                continue
            occurrence: Occurrence = occurrence_from_json(event.payload)
            if occurrence.scope != endpoint.scope and endpoint.tenant is None:
                continue
            rendered = render(endpoint, event.id, occurrence)
            rows.append(
                delivery_values(
                    event.id,
                    event.type,
                    endpoint,
                    rendered,
                    max_attempts=max_attempts,
                    now=now,
                    trigger=MANUAL,
                )
            )
        made = store_deliveries(database, connection, rows)
    done = sum(made.values())
    reached = events[-1].id if len(events) == at_most else upto
    if reached is not None:
        return Part(done, f"{endpoint.id}:{reached}")
    return Part(done, _beginning(database, where, after=endpoint.id))


def _heard_by(endpoint: EndpointRow) -> list[ColumnElement[bool]]:
    """Return the condition for the events that an endpoint with a tenant may get."""
    tenant = endpoint.only_tenant if endpoint.tenant is None else endpoint.tenant
    return [] if tenant is None else [Event.tenant == tenant]


def _event_conditions(where: DeliveryFilter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if where.until is not None:
        found.append(Event.id < first_id_at("evt", where.until))
    for column, wanted in (
        (Event.type, where.event_type),
        (Event.id, where.event_id),
        (Event.job_id, where.job_id),
        (Event.runid, where.runid),
    ):
        if wanted is not None:
            found.append(column == wanted)
    return found


def _beginning(database: Database, where: DeliveryFilter, *, after: str | None) -> str | None:
    """Return the cursor where the endpoint after *after* begins; ``None`` after the last one."""
    endpoint = _endpoint(database, where, *([] if after is None else [Endpoint.id > after]))
    if endpoint is None:
        return None
    first = first_id_at("evt", max(endpoint.created_at, where.since or endpoint.created_at))
    return f"{endpoint.id}:{first}"


def _endpoint(
    database: Database, where: DeliveryFilter, *conditions: ColumnElement[bool]
) -> EndpointRow | None:
    """Return the first enabled standing endpoint, by id, that matches the filter and *conditions*."""
    query = select(*ENDPOINT_COLUMNS).where(Endpoint.kind == "standing", Endpoint.enabled, *conditions)
    if where.endpoint_id is not None:
        query = query.where(Endpoint.id == where.endpoint_id)
    if where.tenant is not None:
        query = query.where(Endpoint.tenant == where.tenant)
    if where.host is not None:
        query = query.where(Endpoint.host == where.host)
    with database.read() as connection:
        row = connection.execute(query.order_by(Endpoint.id).limit(1)).one_or_none()
    return None if row is None else endpoint_row(row._mapping)


def _read(cursor: str | None) -> tuple[str | None, str | None, str]:
    """Return the last delivery; or the endpoint to continue with, and its last event."""
    if cursor is None:
        return None, None, ""
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise CursorError("this cursor did not come from this list")
    return match[1], match[2], match[3] or ""
