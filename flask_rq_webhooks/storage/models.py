"""The seven tables.

===============  ==============================================================================
endpoint         destination: job-bound (came with a request) or standing (made by an operator)
secret           what an endpoint signs with; several while one is being rotated
watch            the promise to report a job to an endpoint
event            one thing that happened; its id is the ``webhook-id``
delivery         event × endpoint, with the exact bytes that are sent
attempt          one HTTP request of a delivery
dispatcher       one process that delivers, and one row of state they all share
===============  ==============================================================================

Times are timezone-aware UTC on every database. The tables are also copied, with plain column types, into the
metadata of the host's ``db`` so that ``create_all`` and Flask-Migrate see them (:func:`copy_tables`). Holds
no statements.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import conv

from ..protocol.payloads import MAX_CONTENT_TYPE_CHARS

#: Crockford base 32, lower case: no letter that looks like another.
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


#: Maps every byte to a letter in the random part of an id; each letter gets the same share of bytes.
_RANDOM = ALPHABET.encode() * 8
#: Random parts drawn in advance: many are requested from the system at once, because on every request another
#: thread may get the interpreter first. A forked process draws its own.
_drawn: list[str] = []
_DRAWN_AT_ONCE = 64
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drawn.clear)


def new_id(prefix: str) -> str:
    """Return a new id such as ``evt_01hk…``: sorts by creation time, 80 random bits, no dots.

    Source: the ULID layout (48-bit milliseconds, 80-bit random, Crockford base 32), lower case.
    """
    try:
        random = _drawn.pop()
    except IndexError:
        letters = os.urandom(16 * _DRAWN_AT_ONCE).translate(_RANDOM).decode()
        random, *more = [letters[start : start + 16] for start in range(0, len(letters), 16)]
        _drawn.extend(more)
    return f"{prefix}_{_time(time.time_ns() // 1_000_000)}{random}"


def first_id_at(prefix: str, moment: datetime) -> str:
    """Return the lower bound of all ids created at *moment* or later: a time as a bound on ids."""
    return f"{prefix}_{_time(max(0, int(moment.timestamp() * 1000)))}{ALPHABET[0] * 16}"


@lru_cache(maxsize=16)
def _time(milliseconds: int) -> str:
    return "".join(ALPHABET[(milliseconds >> shift) & 31] for shift in range(45, -1, -5))


class UTCDateTime(TypeDecorator[datetime]):
    """A timezone-aware UTC time on every database; SQLite stores it without a zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[datetime]:
        return datetime

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive time {value!r}; pass an aware one")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Our own declarative base: the host's models are untouched."""

    type_annotation_map = {datetime: UTCDateTime, str: Text, float: Float}


Id = String(40)
#: Maximum number of characters in a tenant's name.
MAX_TENANT = 128
Tenant = String(MAX_TENANT)


def _partial(name: str, where: str, *columns: str) -> Index:
    return Index(conv(name), *columns, postgresql_where=text(where), sqlite_where=text(where))


#: Kind of an endpoint that stands for a request without a URL, see :class:`Endpoint`.
SUBSCRIBED = "subscribed"

# Status of a delivery.
PENDING = "pending"
SENDING = "sending"
SUCCEEDED = "succeeded"
EXHAUSTED = "exhausted"
CANCELED = "canceled"

# Status of a watch.
RESERVED = "reserved"
OPEN = "open"
SETTLED = "settled"
CLOSED = "closed"
#: Watch on a job found below the root of a tree.
MEMBER = "member"

# Why an attempt is made.
SCHEDULED = "scheduled"
MANUAL = "manual"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointFields:
    """Endpoint settings that a client or an operator chooses: columns of :class:`Endpoint`, decoded.

    :param url: normalised.
    :param host: see :class:`Endpoint`.
    :param events: event types it gets; ``None`` for all terminal ones. ``"*"`` on a standing endpoint: every
        type.
    :param retry_schedule: seconds before the second, third, … attempt; ``None`` for the configured ones.
    :param retry_statuses: the only HTTP statuses that are retried: ``"429"``, or ``"5xx"`` for the whole
        class; ``None`` for the configured ones.
    :param tenant: see :class:`Endpoint`; likewise *only_tenant*.
    :param trace: trace of its request, see :mod:`~flask_rq_webhooks.tracing`; not chosen by a client.
    """

    url: str = field(repr=False)
    host: str
    kind: str = "job"
    events: tuple[str, ...] | None = None
    scope: str = "job"
    format: str = "job"
    sign_payload: bool = False
    reference: str | None = None
    runid: str | None = None
    timeout_s: float | None = None
    max_attempts: int | None = None
    retry_schedule: tuple[float, ...] | None = None
    retry_statuses: tuple[str, ...] | None = None
    description: str | None = None
    tenant: str | None = None
    only_tenant: str | None = None
    trace: str | None = field(default=None, repr=False)


#: Fields of an endpoint whose columns hold a JSON list.
LISTS = ("events", "retry_schedule", "retry_statuses")


def encoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return endpoint fields in the form in which the columns store them."""
    lists = {name: json.dumps(list(values[name])) for name in LISTS if values.get(name) is not None}
    return {**values, **lists}


def decoded(columns: Mapping[Any, Any]) -> dict[str, Any]:
    """Return endpoint columns in the form of :class:`EndpointFields`."""
    lists = {name: tuple(json.loads(columns[name])) for name in LISTS if columns.get(name) is not None}
    return {**columns, **lists}


class Endpoint(Base):
    """Where events go, and how they are rendered.

    ``kind`` is ``"job"`` (came with a request), ``"standing"``, or ``"subscribed"``: a request without a URL,
    whose jobs are reported to the standing endpoints of its tenant; nothing is sent to its own row.
    ``tenant`` is the customer it belongs to, ``None`` for an operator's; ``only_tenant`` restricts an
    operator's endpoint to the events of one customer, who does not see it. ``headers`` is an encrypted JSON
    object, ``events`` a JSON list of types, or ``None`` for all terminal ones; the other columns in
    :data:`LISTS` are JSON lists, too. ``host`` is the normalised destination host (with the port if it is not
    the default one), the unit of fairness and limits.
    """

    __tablename__ = "rq_webhooks_endpoint"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    url: Mapped[str]
    host: Mapped[str] = mapped_column(String(260))
    headers: Mapped[str | None]
    events: Mapped[str | None]
    scope: Mapped[str] = mapped_column(String(10), default="job")
    format: Mapped[str] = mapped_column(String(64), default="job")
    sign_payload: Mapped[bool] = mapped_column(Boolean, default=False)
    reference: Mapped[str | None] = mapped_column(String(256))
    runid: Mapped[str | None]
    timeout_s: Mapped[float | None]
    max_attempts: Mapped[int | None] = mapped_column(Integer)
    retry_schedule: Mapped[str | None]
    retry_statuses: Mapped[str | None]
    description: Mapped[str | None]
    tenant: Mapped[str | None] = mapped_column(Tenant)
    only_tenant: Mapped[str | None] = mapped_column(Tenant)
    trace: Mapped[str | None]
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None] = mapped_column(String(64))
    failures: Mapped[int] = mapped_column(Integer, default=0)
    failing_since: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]

    __table_args__ = (
        Index(conv("ix_rq_webhooks_endpoint_kind"), "kind", "id"),
        _partial("ix_rq_webhooks_endpoint_tenant", "tenant IS NOT NULL", "tenant", "kind", "id"),
        # The standing endpoints of operators, however many tenants' endpoints there are. SQLite chooses it
        # for its two equalities; with fewer it prefers the index above.
        _partial(
            "ix_rq_webhooks_endpoint_operators",
            "kind = 'standing' AND tenant IS NULL",
            "kind",
            "tenant",
            "id",
        ),
    )


class Secret(Base):
    """One signing secret of an endpoint, encrypted. ``expires_at`` is set when it is being rotated out."""

    __tablename__ = "rq_webhooks_secret"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(
        ForeignKey("rq_webhooks_endpoint.id", ondelete="CASCADE"), index=True
    )
    secret: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]


class Watch(Base):
    """The promise to report a job to an endpoint.

    ``status``: ``reserved`` (id handed out, job not yet seen) → ``open`` (job exists) → ``settled`` (its
    ending is an event) or ``closed`` (nothing to report); ``member`` is a job found below the root of a tree.
    ``run`` is the last run noted; if ``settled_at`` is set, ``outcome`` is the event type it was reported
    with. ``recheck_at`` is set while RQ keeps the job of a settled watch: every pass checks whether it is
    running again. ``evidence`` is a callback's report that RQ has not yet committed (JSON outbox entry), or a
    member's last status. ``endpoint_id`` is ``None`` for a job that only standing endpoints subscribe to.
    """

    __tablename__ = "rq_webhooks_watch"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    endpoint_id: Mapped[str | None] = mapped_column(ForeignKey("rq_webhooks_endpoint.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(String(512))
    status: Mapped[str] = mapped_column(String(10))
    run: Mapped[str | None] = mapped_column(String(64))
    evidence: Mapped[str | None]
    missing_passes: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[datetime]
    confirmed_at: Mapped[datetime | None]
    settled_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(20))
    recheck_at: Mapped[datetime | None]
    tenant: Mapped[str | None] = mapped_column(Tenant)

    __table_args__ = (
        UniqueConstraint("job_id", "endpoint_id", name=conv("uq_rq_webhooks_watch_job_endpoint")),
        Index(conv("ix_rq_webhooks_watch_endpoint"), "endpoint_id"),
        Index(conv("ix_rq_webhooks_watch_status"), "status", "id"),
        Index(conv("ix_rq_webhooks_watch_settled"), "settled_at"),
        _partial("ix_rq_webhooks_watch_recheck", "recheck_at IS NOT NULL", "id"),
    )


class Event(Base):
    """One stored occurrence. ``payload`` is the canonical JSON of everything formats render from.

    ``position`` is its place in the feed, see :mod:`.events`; 0 for events stored before positions existed.
    """

    __tablename__ = "rq_webhooks_event"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    type: Mapped[str] = mapped_column(String(100))
    run_key: Mapped[str | None] = mapped_column(String(700), unique=True)
    job_id: Mapped[str | None] = mapped_column(String(512), index=True)
    runid: Mapped[str | None]
    source: Mapped[str] = mapped_column(String(12))
    supersedes: Mapped[str | None] = mapped_column(Id)
    payload: Mapped[str]
    occurred_at: Mapped[datetime]
    created_at: Mapped[datetime]
    erased_at: Mapped[datetime | None]
    position: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    tenant: Mapped[str | None] = mapped_column(Tenant)
    trace: Mapped[str | None]

    __table_args__ = (
        Index(conv("ix_rq_webhooks_event_position"), "position", "id"),
        Index(conv("ix_rq_webhooks_event_runid_position"), "runid", "position", "id"),
        Index(conv("ix_rq_webhooks_event_type_position"), "type", "position", "id"),
        Index(conv("ix_rq_webhooks_event_created"), "created_at"),
        _partial("ix_rq_webhooks_event_tenant", "tenant IS NOT NULL", "tenant", "position", "id"),
    )


class Delivery(Base):
    """An event on its way to an endpoint.

    ``status``: ``pending``, ``sending``, ``succeeded``, ``exhausted``, ``canceled``. ``body`` is what is
    signed and sent, on every attempt; ``content_type`` is null for JSON. ``host`` and ``event_type`` are
    copies for the indexes of lists and claims; ``tenant`` is a copy of the endpoint's. ``attempts`` counts
    recorded attempts; ``lease_id`` names the claim that holds a ``sending`` row until ``lease_until``.
    ``trigger`` says why the next attempt is made.
    """

    __tablename__ = "rq_webhooks_delivery"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    event_id: Mapped[str] = mapped_column(ForeignKey("rq_webhooks_event.id", ondelete="CASCADE"))
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("rq_webhooks_endpoint.id", ondelete="CASCADE"))
    host: Mapped[str] = mapped_column(String(260))
    event_type: Mapped[str] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(10))
    trigger: Mapped[str] = mapped_column(String(10), default="scheduled")
    body: Mapped[bytes] = mapped_column(LargeBinary)
    content_type: Mapped[str | None] = mapped_column(String(MAX_CONTENT_TYPE_CHARS))
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    max_attempts: Mapped[int] = mapped_column(Integer)
    next_attempt_at: Mapped[datetime | None]
    lease_id: Mapped[str | None] = mapped_column(Id)
    lease_until: Mapped[datetime | None]
    status_code: Mapped[int | None] = mapped_column(Integer)
    error_code: Mapped[str | None] = mapped_column(String(16))
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    erased_at: Mapped[datetime | None]
    tenant: Mapped[str | None] = mapped_column(Tenant)

    __table_args__ = (
        UniqueConstraint("event_id", "endpoint_id", name=conv("uq_rq_webhooks_delivery_event_endpoint")),
        _partial("ix_rq_webhooks_delivery_due", "status = 'pending'", "host", "next_attempt_at"),
        _partial("ix_rq_webhooks_delivery_next", "status = 'pending'", "next_attempt_at"),
        _partial("ix_rq_webhooks_delivery_lease", "status = 'sending'", "lease_until"),
        Index(conv("ix_rq_webhooks_delivery_status"), "status", "id"),
        Index(conv("ix_rq_webhooks_delivery_host"), "host", "id"),
        Index(conv("ix_rq_webhooks_delivery_endpoint"), "endpoint_id", "id"),
        Index(conv("ix_rq_webhooks_delivery_type"), "event_type", "id"),
        Index(conv("ix_rq_webhooks_delivery_finished"), "finished_at", "status"),
        _partial("ix_rq_webhooks_delivery_tenant", "tenant IS NOT NULL", "tenant", "id"),
        _partial("ix_rq_webhooks_delivery_tenant_status", "tenant IS NOT NULL", "tenant", "status", "id"),
    )


class Attempt(Base):
    """One HTTP request. Headers are JSON objects with secrets masked; the body is truncated for storage."""

    __tablename__ = "rq_webhooks_attempt"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    delivery_id: Mapped[str] = mapped_column(ForeignKey("rq_webhooks_delivery.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    trigger: Mapped[str] = mapped_column(String(10))
    status: Mapped[str] = mapped_column(String(10))
    status_code: Mapped[int | None] = mapped_column(Integer)
    error_code: Mapped[str | None] = mapped_column(String(16))
    error_detail: Mapped[str | None]
    started_at: Mapped[datetime]
    duration_ms: Mapped[float]
    request_headers: Mapped[str | None]
    response_headers: Mapped[str | None]
    response_body: Mapped[bytes | None] = mapped_column(LargeBinary)
    dispatcher_id: Mapped[str | None] = mapped_column(Id)

    __table_args__ = (
        UniqueConstraint("delivery_id", "number", name=conv("uq_rq_webhooks_attempt_delivery_number")),
        Index(conv("ix_rq_webhooks_attempt_started"), "started_at"),
    )


class Dispatcher(Base):
    """One dispatcher process; the row with the id :data:`SHARED` holds the state that all of them share.

    On the shared row, ``namespace`` names our keys in Redis, ``paused_at`` stops all sending, and
    ``lease_owner``/``lease_until`` say who reconciles. On the others, ``heartbeat_at`` says who is alive.
    """

    __tablename__ = "rq_webhooks_dispatcher"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    hostname: Mapped[str | None] = mapped_column(String(255))
    pid: Mapped[int | None] = mapped_column(Integer)
    version: Mapped[str | None] = mapped_column(String(40))
    started_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    namespace: Mapped[str | None] = mapped_column(String(16))
    paused_at: Mapped[datetime | None]
    lease_owner: Mapped[str | None] = mapped_column(Id)
    lease_until: Mapped[datetime | None]


#: Id of the row of :class:`Dispatcher` that all dispatchers share.
SHARED = "shared"


def copy_tables(metadatas: dict[str | None, MetaData], bind_key: str | None) -> None:
    """Copy our tables into the metadata that ``db.create_all`` and Flask-Migrate use, in its schema, if any.

    Column types are plain: our own type would make generated migrations depend on this package.
    """
    metadata = metadatas.setdefault(bind_key, MetaData(info={"bind_key": bind_key}))
    for table in Base.metadata.sorted_tables:
        if table.name in {known.name for known in metadata.tables.values()}:
            continue
        copied: Any = table.to_metadata(metadata)
        for column in copied.columns:
            if isinstance(column.type, UTCDateTime):
                column.type = DateTime(timezone=True)
