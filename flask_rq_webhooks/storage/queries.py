"""Queries for people: the status of a job's webhook, lists, details, numbers.

Owns what pages, API and command line show, with cursors and bounded cost: no query here reads more rows
than it shows, or than one of the windows below. URLs are returned as stored; callers redact them.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, func, or_, select

from .database import Database
from .filters import DeliveryFilter, walk
from .models import (
    OPEN,
    RESERVED,
    SETTLED,
    SUBSCRIBED,
    Attempt,
    Delivery,
    Endpoint,
    EndpointFields,
    Event,
    Secret,
    Watch,
    decoded,
)

#: Maximum number of items on a page, whatever is requested.
MAX_PAGE = 200

Item = TypeVar("Item")


class CursorError(ValueError):
    """A cursor that we did not issue."""


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some items, and where the next ones begin.

    :param cursor: opaque; ``None`` on the last page. For a feed: where to continue later, never ``None`` once
        anything was read.
    """

    items: tuple[Item, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointView(EndpointFields):
    """An endpoint. ``headers`` is encrypted; ``secrets`` says how many are live."""

    id: str
    headers: str | None = field(repr=False)
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: str | None
    failures: int
    failing_since: datetime | None
    created_at: datetime
    updated_at: datetime
    secrets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventView:
    """An event. ``payload`` is the canonical JSON of the occurrence; only detail queries fill it."""

    id: str
    type: str
    job_id: str | None
    runid: str | None
    source: str
    supersedes: str | None
    occurred_at: datetime
    created_at: datetime
    erased_at: datetime | None
    tenant: str | None
    payload: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryView:
    """A delivery with what is shown of its event and endpoint; ``tenant`` is the endpoint's."""

    id: str
    event_id: str
    event_type: str
    job_id: str | None
    runid: str | None
    endpoint_id: str
    endpoint_kind: str
    url: str = field(repr=False)
    host: str
    status: str
    trigger: str
    attempts: int
    max_attempts: int
    next_attempt_at: datetime | None
    status_code: int | None
    error_code: str | None
    created_at: datetime
    finished_at: datetime | None
    erased_at: datetime | None
    tenant: str | None
    event_tenant: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptView:
    """One recorded attempt; secrets in the request headers were masked when it was stored."""

    id: str
    delivery_id: str
    number: int
    trigger: str
    status: str
    status_code: int | None
    error_code: str | None
    error_detail: str | None
    started_at: datetime
    duration_ms: float
    request_headers: Mapping[str, str] = field(repr=False)
    response_headers: Mapping[str, str] = field(repr=False)
    response_body: bytes = field(repr=False)
    dispatcher_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryDetail:
    """Everything about one delivery."""

    delivery: DeliveryView
    attempts: tuple[AttemptView, ...]
    event: EventView
    endpoint: EndpointView
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWebhook:
    """What the client that submitted a job may see of its webhook.

    :param url: URL of the endpoint registered last for the job.
    :param runid: for the permission function.
    :param delivery_status: ``"waiting"`` while there is nothing to deliver, else that of the newest delivery.
    :param deliveries: to job-bound endpoints only, newest first, with their attempts.
    """

    job_id: str
    url: str = field(repr=False)
    runid: str | None
    delivery_status: str
    events: tuple[EventView, ...]
    deliveries: tuple[tuple[DeliveryView, tuple[AttemptView, ...]], ...]


def job_webhook(
    database: Database, job_id: str, *, cleared: Callable[[str | None], bool] = lambda runid: True
) -> JobWebhook | None:
    """Return the state of a job's webhook; ``None`` if there is none that the caller may see.

    Several requests may have chosen the same job id. The answer covers only the endpoints whose run id is
    *cleared*; a job without any takes as many statements as an unknown one. Standing endpoints are left out:
    they belong to operators.

    :param cleared: returns whether the caller may see what belongs to a run id; called once for each.
    """
    with database.read() as connection:
        endpoints = connection.execute(
            select(Endpoint.id, Endpoint.url, Endpoint.runid)
            .join(Watch, Watch.endpoint_id == Endpoint.id)
            .where(
                Watch.job_id == job_id, Endpoint.kind == "job", Watch.status.in_([RESERVED, OPEN, SETTLED])
            )
            .order_by(Endpoint.id.desc())
            .limit(MAX_PAGE)
        ).all()
        # For an endpoint whose request named no run id, the job's own counts.
        of_job = connection.execute(
            select(Event.runid)
            .where(Event.job_id == job_id, Event.runid.is_not(None))
            .order_by(Event.id.desc())
            .limit(1)
        ).scalar_one_or_none()
    runids = dict.fromkeys(endpoint.runid or of_job for endpoint in endpoints)
    seen = {runid for runid in runids if cleared(runid)}
    chosen = [endpoint for endpoint in endpoints if (endpoint.runid or of_job) in seen]
    if not chosen:
        return None
    with database.read() as connection:
        events = connection.execute(
            select(*EVENT_COLUMNS).where(Event.job_id == job_id).order_by(Event.id.desc()).limit(MAX_PAGE)
        ).all()
        page = select(Delivery.id).where(
            Delivery.event_id.in_([event.id for event in events]),
            Delivery.endpoint_id.in_([endpoint.id for endpoint in chosen]),
        )
        deliveries = _deliveries(connection, page, MAX_PAGE)
        attempts = _attempts(connection, [delivery.id for delivery in deliveries])
    delivered = {delivery.event_id for delivery in deliveries}
    shown = [_event(event) for event in events if event.id in delivered]
    return JobWebhook(
        job_id=job_id,
        url=chosen[0].url,
        runid=chosen[0].runid or of_job,
        delivery_status=deliveries[0].status if deliveries else "waiting",
        # An event carries the job's run id, which may belong to another client's request.
        events=tuple(event if event.runid in seen else replace(event, runid=None) for event in shown),
        deliveries=tuple((delivery, tuple(attempts[delivery.id])) for delivery in deliveries),
    )


def list_deliveries(
    database: Database, where: DeliveryFilter, *, cursor: str | None = None, limit: int = 50
) -> Page[DeliveryView]:
    """Return deliveries, newest first.

    With several conditions that each match many rows, a page may be short or even empty and still have a
    cursor: the search has a time limit. See :mod:`.filters`.

    :param cursor: from the previous page.
    :param limit: items on the page; at most :data:`MAX_PAGE`.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    limit = bounded(limit)
    before = None if cursor is None else _id_of(cursor)
    with database.read() as connection:
        found = walk(connection, where, before=before, limit=limit + 1)
        chosen = select(Delivery.id).where(Delivery.id.in_(found.ids))
        listed = _deliveries(connection, chosen, limit + 1) if found.ids else []
    page: Page[DeliveryView] = _page(listed, limit)
    if page.cursor is None and found.reached is not None:
        return Page(page.items, _cursor_of(found.reached))
    return page


def list_endpoints(
    database: Database,
    *,
    kind: str = "standing",
    tenant: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[EndpointView]:
    """Return endpoints, newest first.

    :param tenant: only those of this tenant.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    query = select(Endpoint).where(Endpoint.kind == kind, *_owned(Endpoint, tenant))
    if cursor is not None:
        query = query.where(Endpoint.id < _id_of(cursor))
    limit = bounded(limit)
    with database.read() as connection:
        return _page(
            _endpoints(database, connection, query.order_by(Endpoint.id.desc()).limit(limit + 1)), limit
        )


def endpoint_detail(
    database: Database, endpoint_id: str, *, tenant: str | None = None
) -> EndpointView | None:
    """Return one endpoint, standing or job-bound.

    :param tenant: only an endpoint of this tenant; likewise in the functions below.
    """
    query = select(Endpoint).where(
        Endpoint.id == endpoint_id, Endpoint.kind != SUBSCRIBED, *_owned(Endpoint, tenant)
    )
    with database.read() as connection:
        found = _endpoints(database, connection, query)
    return found[0] if found else None


def event_detail(database: Database, event_id: str, *, tenant: str | None = None) -> EventView | None:
    """Return one event with its payload; its deliveries are listed by filter."""
    query = select(*EVENT_COLUMNS, Event.payload).where(Event.id == event_id, *_owned(Event, tenant))
    with database.read() as connection:
        row = connection.execute(query).one_or_none()
    return None if row is None else _event(row)


def delivery_detail(
    database: Database, delivery_id: str, *, tenant: str | None = None
) -> DeliveryDetail | None:
    """Return one delivery with its attempts, event and endpoint."""
    this = select(Delivery.id).where(Delivery.id == delivery_id, *_owned(Delivery, tenant))
    with database.read() as connection:
        deliveries = _deliveries(connection, this, 1)
        if not deliveries:
            return None
        (delivery,) = deliveries
        its_event = select(*EVENT_COLUMNS, Event.payload).where(Event.id == delivery.event_id)
        its_endpoint = select(Endpoint).where(Endpoint.id == delivery.endpoint_id)
        return DeliveryDetail(
            delivery=delivery,
            attempts=tuple(_attempts(connection, [delivery_id])[delivery_id]),
            event=_event(connection.execute(its_event).one()),
            endpoint=_endpoints(database, connection, its_endpoint)[0],
            body=connection.execute(select(Delivery.body).where(Delivery.id == delivery_id)).scalar_one(),
        )


def _owned(model: type[Endpoint | Event | Delivery], tenant: str | None) -> list[ColumnElement[bool]]:
    """Return the condition that a row belongs to *tenant*; no condition if *tenant* is ``None``."""
    return [] if tenant is None else [model.tenant == tenant]


#: What lists show of an event.
EVENT_COLUMNS = tuple(getattr(Event, one.name) for one in fields(EventView) if one.name != "payload")


def _event(row: Any) -> EventView:
    return EventView(**row._mapping)


def shallow(view: Any) -> dict[str, Any]:
    """Return the fields of an instance of a class above, by name; nested objects stay as they are."""
    return {one.name: getattr(view, one.name) for one in fields(view)}


def _deliveries(connection: Connection, query: Select[Any], limit: int) -> list[DeliveryView]:
    # Select the page's ids first, then their details: no query plan can join more than the page.
    ids = connection.execute(query.order_by(Delivery.id.desc()).limit(limit)).scalars().all()
    rows = connection.execute(
        select(
            Delivery.id, Delivery.event_id, Delivery.event_type, Event.job_id, Event.runid,
            Delivery.endpoint_id, Endpoint.kind.label("endpoint_kind"), Endpoint.url, Delivery.host,
            Delivery.status, Delivery.trigger, Delivery.attempts, Delivery.max_attempts,
            Delivery.next_attempt_at, Delivery.status_code, Delivery.error_code, Delivery.created_at,
            Delivery.finished_at, Delivery.erased_at, Delivery.tenant, Event.tenant.label("event_tenant"),
        )
        .join(Event, Event.id == Delivery.event_id)
        .join(Endpoint, Endpoint.id == Delivery.endpoint_id)
        .where(Delivery.id.in_(ids))
        .order_by(Delivery.id.desc())
    )  # fmt: skip
    return [DeliveryView(**row._mapping) for row in rows]


def _attempts(connection: Connection, delivery_ids: Sequence[str]) -> dict[str, list[AttemptView]]:
    found: dict[str, list[AttemptView]] = defaultdict(list)
    query = select(Attempt.__table__).where(Attempt.delivery_id.in_(delivery_ids))
    for row in connection.execute(query.order_by(Attempt.delivery_id, Attempt.number)):
        values = dict(row._mapping)
        for name in ("request_headers", "response_headers"):
            values[name] = json.loads(values[name]) if values[name] else {}
        values["response_body"] = values["response_body"] or b""
        found[row.delivery_id].append(AttemptView(**values))
    return found


def _endpoints(database: Database, connection: Connection, query: Select[Any]) -> list[EndpointView]:
    rows = connection.execute(query.with_only_columns(*Endpoint.__table__.columns)).all()
    live = (
        select(Secret.endpoint_id, func.count())
        .where(
            Secret.endpoint_id.in_([row.id for row in rows]),
            or_(Secret.expires_at.is_(None), Secret.expires_at > database.clock()),
        )
        .group_by(Secret.endpoint_id)
    )
    secrets = {endpoint_id: count for endpoint_id, count in connection.execute(live)}
    return [EndpointView(**decoded(row._mapping), secrets=secrets.get(row.id, 0)) for row in rows]


def _page(items: Sequence[Any], limit: int) -> Page[Any]:
    shown = tuple(items[:limit])
    return Page(shown, _cursor_of(shown[-1].id) if len(items) > limit else None)


def bounded(limit: int) -> int:
    """Return the number of items on a page when *limit* are requested."""
    return max(1, min(limit, MAX_PAGE))


_CURSOR = re.compile("1(?P<id>[ -~]*)")


def write_cursor(position: str) -> str:
    """Return *position* as an opaque string that is safe in a URL."""
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def read_cursor(cursor: str, form: re.Pattern[str]) -> re.Match[str]:
    """Return what :func:`write_cursor` was given, matched by *form*.

    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        match = form.fullmatch(raw.decode("ascii"))
    except (binascii.Error, ValueError):
        match = None
    if match is None:
        raise CursorError("this cursor did not come from this list")
    return match


def _cursor_of(item_id: str) -> str:
    return write_cursor(f"1{item_id}")


def _id_of(cursor: str) -> str:
    return str(read_cursor(cursor, _CURSOR)["id"])
