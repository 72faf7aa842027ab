"""Endpoints and watches: what was promised to whom.

Owns the rows that a request's webhook fields become (register, before the view), the confirmation of the
jobs the view enqueued (after it), and the standing endpoints operators make. Knows nothing of requests
and of Redis: its callers say which jobs exist.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from hashlib import blake2b
from typing import Any

from sqlalchemy import ColumnElement, Executable, bindparam, delete, func, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from ..protocol.events import parse_time
from .bulk_insert import insert_into
from .crypto import Cipher
from .database import Database
from .models import (
    ALPHABET,
    CLOSED,
    OPEN,
    RESERVED,
    Attempt,
    Base,
    Delivery,
    Endpoint,
    EndpointFields,
    Secret,
    Watch,
    encoded,
    new_id,
)
from .watches import unbound_watch_id

logger = logging.getLogger(__name__)

#: Seconds that a replaced secret keeps signing beside its successor.
ROTATION_GRACE_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEndpoint(EndpointFields):
    """An endpoint before it is stored; everything was validated.

    :param headers: custom headers, in the clear.
    :param secret: signs every delivery; ``None`` for none of its own.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secret: str | None = field(default=None, repr=False)


def register(
    database: Database,
    cipher: Cipher,
    endpoint: NewEndpoint,
    *,
    namespace: str,
    reserved_job_id: str | None = None,
    watched_job_id: str | None = None,
    counts_from: datetime | None = None,
    endpoint_id: str | None = None,
    now: datetime | None = None,
) -> str:
    """Store an endpoint, its secret, and the watch of its first job, in one short transaction.

    :param namespace: see :func:`~.dispatchers.shared_namespace`; becomes part of the id.
    :param reserved_job_id: id that the first job of the view will get; ``None`` where no job is expected,
        as for a standing endpoint.
    :param watched_job_id: instead, id of a job that exists already; reconcile reports it.
    :param counts_from: when the current run of that job began to wait, or the job was created: that run
        counts, even if it has ended by now. Without it, only runs from now on count.
    :param endpoint_id: a new one by default.
    :returns: the endpoint's id.
    :raises StorageUnavailableError: when the database cannot be reached or stays locked.
    """
    now = now or datetime.now(UTC)
    own_id = endpoint_id is None
    endpoint_id = endpoint_id or new_id("ep" + namespace)
    rows = {Endpoint.__tablename__: _endpoint_values(cipher, endpoint, endpoint_id, now)}
    if endpoint.secret is not None:
        rows[Secret.__tablename__] = _secret_values(cipher, endpoint.secret, endpoint_id, now)
    if reserved_job_id is not None or watched_job_id is not None:
        rows[Watch.__tablename__] = {
            "id": new_id("wat"),
            "endpoint_id": endpoint_id,
            "job_id": reserved_job_id or watched_job_id,
            "status": RESERVED if reserved_job_id else OPEN,
            "missing_passes": 0,
            "created_at": min(now, counts_from or now),
            "confirmed_at": None if reserved_job_id else now,
            "tenant": endpoint.tenant,
        }
    if database.is_sqlite:
        database.execute([(_insert(table), row) for table, row in rows.items()])
    else:
        columns = tuple((table, tuple(row)) for table, row in rows.items())
        values = {f"{table}_{name}": value for table, row in rows.items() for name, value in row.items()}
        try:
            database.execute([(_insert_at_once(columns), values)])
        except IntegrityError:
            # An id made here is there already only where the first of two tries was committed after all.
            if not own_id or not endpoint_exists(database, endpoint_id):
                raise
    return endpoint_id


def confirm(
    database: Database,
    endpoint_id: str,
    *,
    existing: Sequence[str],
    unseen: Sequence[str],
    reserved_job_id: str | None,
    runs: Mapping[str, str] | None = None,
    busy_timeout_s: float | None = None,
) -> None:
    """Note which jobs the view really enqueued. May be repeated; no watch ever goes backwards.

    :param existing: ids of jobs that are in Redis: their watches are ``open`` now.
    :param unseen: ids of jobs created but not in Redis, such as those of a pipeline not yet executed:
        ``reserved``, until reconcile meets them.
    :param reserved_job_id: the id given to :func:`register`. Used by no job, its watch is ``closed``.
    :param runs: the run each job was enqueued for, where it is known: it was handed to RQ. A job that is lost
        is then reported under it, and a callback's late report corrects that.
    :param busy_timeout_s: SQLite: wait no longer than this for another writer, which may be the host
        itself, in a transaction that ends only after we answer.
    :raises StorageUnavailableError: when the database cannot be written now; the caller then leaves the
        confirmation in the outbox.
    """
    now = datetime.now(UTC)
    # The run that is confirmed counts, also that of a watched job which began before the request.
    since = {job_id: min(now, _began(run)) for job_id, run in (runs or {}).items()}
    existing = list(dict.fromkeys(existing))
    unseen = [job_id for job_id in dict.fromkeys(unseen) if job_id not in existing]
    statements: list[tuple[Executable, Any]] = []
    if existing:
        rows = [
            {"id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": job_id, "status": "open",
             "run": (runs or {}).get(job_id), "missing_passes": 0,
             "of_endpoint": endpoint_id, "created_at": since.get(job_id, now),
             "confirmed_at": now}
            for job_id in existing
        ]  # fmt: skip
        statements.append((_INSERT_OPEN[database.is_sqlite], rows[0] if len(rows) == 1 else rows))
    if unseen:
        rows = [
            {"id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": job_id, "status": "reserved",
             "run": (runs or {}).get(job_id), "missing_passes": 0,
             "of_endpoint": endpoint_id, "created_at": since.get(job_id, now)}
            for job_id in unseen
        ]  # fmt: skip
        statements.append((_INSERT_RESERVED[database.is_sqlite], rows))
    if reserved_job_id is not None and reserved_job_id not in existing and reserved_job_id not in unseen:
        close = (
            update(Watch)
            .where(
                Watch.endpoint_id == endpoint_id, Watch.job_id == reserved_job_id, Watch.status == "reserved"
            )
            .values(status="closed", settled_at=now)
        )
        statements.append((close, None))
    try:
        # Durable: of all jobs but the one whose id was reserved, this is the only record there is.
        database.execute(statements, busy_timeout_s=busy_timeout_s)
    except IntegrityError:
        # A confirmation that waited in the outbox while its endpoint was pruned, or another app's.
        if endpoint_exists(database, endpoint_id):
            raise
        logger.warning("Jobs of the endpoint %r cannot be confirmed: it does not exist here.", endpoint_id)


def watch_for_standing(
    database: Database, existing: Sequence[str], unseen: Sequence[str], runs: Mapping[str, str | None]
) -> None:
    """Watch jobs that only standing endpoints get events of. May be repeated; no watch goes backwards.

    :param existing: ids of jobs that RQ took.
    :param unseen: ids of jobs that were created; reconcile finds out about them.
    :param runs: the run of each job, or when it was created.
    """
    now = datetime.now(UTC)
    rows = [
        {"id": unbound_watch_id(job_id), "endpoint_id": None, "job_id": job_id, "status": status,
         "run": runs.get(job_id) if status == OPEN else None, "missing_passes": 0,
         "created_at": now if (run := runs.get(job_id)) is None else min(now, _began(run)),
         "confirmed_at": now if status == OPEN else None, "settled_at": None}
        for status, job_ids in ((OPEN, existing), (RESERVED, unseen))
        for job_id in job_ids
    ]  # fmt: skip
    if not rows:
        return
    statement = insert_into(database, Watch)
    again = {name: statement.excluded[name] for name in rows[0] if name not in ("id", "job_id")}
    upsert = statement.on_conflict_do_update(
        index_elements=["id"], set_=again, where=Watch.status.in_([RESERVED, CLOSED])
    )
    with database.write() as connection:
        connection.execute(upsert, sorted(rows, key=lambda row: str(row["id"])))


def endpoint_exists(database: Database, endpoint_id: str) -> bool:
    """Say whether *endpoint_id* is ours; callbacks may name one that is pruned or foreign."""
    with database.read() as connection:
        return connection.execute(select(Endpoint.id).where(Endpoint.id == endpoint_id)).first() is not None


def waiting_for_host(database: Database, host: str, *, at_most: int | None = None) -> int:
    """Return how many unfinished deliveries go to *host*.

    :param at_most: stop counting there; the answer is then never larger.
    """
    unfinished = select(Delivery.id).where(Delivery.host == host, Delivery.status.in_(["pending", "sending"]))
    with database.read() as connection:
        return connection.execute(
            select(func.count()).select_from(unfinished.limit(at_most).subquery())
        ).scalar_one()


# Standing endpoints


class ExistsError(Exception):
    """An endpoint was made before with the same idempotency key.

    :param endpoint_id: its id.
    """

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(f"The endpoint {endpoint_id} was made with this key.")
        self.endpoint_id = endpoint_id


def create_standing(
    database: Database,
    cipher: Cipher,
    endpoint: NewEndpoint,
    *,
    namespace: str,
    idempotency_key: str | None = None,
    at_most: int = 0,
    now: datetime | None = None,
) -> str:
    """Store a standing endpoint and return its id.

    :param at_most: standing endpoints that its tenant may have with this one; 0 for any number.
    :param idempotency_key: the endpoint's id is made of it, so that the primary key lets only one be made,
        however many requests with it come at once. Such ids do not sort by time.
    :raises ExistsError: when there is one with this key.
    :raises TooManyError: when the tenant has *at_most* endpoints already.
    """
    if endpoint.kind != "standing":
        raise ValueError(f"expected kind 'standing', got {endpoint.kind!r}")
    endpoint_id = None
    if idempotency_key is not None:
        # A key contains no NUL. Two tenants may use the same key.
        owner = "" if endpoint.tenant is None else f"{endpoint.tenant}\0"
        endpoint_id = _id_of_key(namespace, owner + idempotency_key)
    if endpoint.tenant is not None and at_most:
        return _create_counted(
            database, cipher, endpoint, endpoint_id or new_id("ep" + namespace), at_most, now
        )
    try:
        return register(
            database,
            cipher,
            endpoint,
            namespace=namespace,
            reserved_job_id=None,
            endpoint_id=endpoint_id,
            now=now,
        )
    except IntegrityError:
        if endpoint_id is None or not endpoint_exists(database, endpoint_id):
            raise
        raise ExistsError(endpoint_id) from None


class TooManyError(Exception):
    """The tenant has as many standing endpoints as it may have."""


def _create_counted(
    database: Database, cipher: Cipher, endpoint: NewEndpoint, endpoint_id: str, at_most: int,
    now: datetime | None,
) -> str:  # fmt: skip
    """Store a tenant's endpoint unless it has too many; two at once wait for each other."""
    now = now or datetime.now(UTC)
    with database.write() as connection:
        if not database.is_sqlite:  # SQLite has one writer at a time
            key = text("SELECT pg_advisory_xact_lock(:class, hashtext(:tenant))")
            connection.execute(key, {"class": TENANT_LOCK_CLASS, "tenant": endpoint.tenant})
        if connection.execute(select(Endpoint.id).where(Endpoint.id == endpoint_id)).first() is not None:
            raise ExistsError(endpoint_id)
        theirs = select(func.count()).where(Endpoint.tenant == endpoint.tenant, Endpoint.kind == "standing")
        if connection.execute(theirs).scalar_one() >= at_most:
            raise TooManyError
        connection.execute(insert(Endpoint).values(_endpoint_values(cipher, endpoint, endpoint_id, now)))
        if endpoint.secret is not None:
            connection.execute(
                insert(Secret).values(_secret_values(cipher, endpoint.secret, endpoint_id, now))
            )
    return endpoint_id


#: First key of the advisory lock under which a tenant's endpoints are counted; any number nobody else uses.
TENANT_LOCK_CLASS = 0x7271_7771


def _id_of_key(namespace: str, idempotency_key: str) -> str:
    number = int.from_bytes(blake2b(idempotency_key.encode(), digest_size=17).digest())
    return f"ep{namespace}_" + "".join(ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))


#: What :func:`update_standing` may change; the rest has functions of its own, or is fixed.
CHANGEABLE = frozenset(one.name for one in fields(NewEndpoint)) - {"secret", "kind", "scope", "tenant"}


def update_standing(
    database: Database,
    cipher: Cipher,
    endpoint_id: str,
    changes: Mapping[str, Any],
    *,
    tenant: str | None = None,
) -> bool:
    """Change a standing endpoint. Waiting deliveries go to the new URL; their bytes stay what they are.

    :param changes: attributes of :class:`NewEndpoint`, those in :data:`CHANGEABLE`. ``url`` and ``host``
        go together.
    :param tenant: only an endpoint of this tenant, as in the functions below.
    :returns: whether there is such an endpoint.
    """
    unknown = set(changes) - CHANGEABLE
    if unknown:
        raise ValueError(f"cannot change {sorted(unknown)}")
    if ("url" in changes) != ("host" in changes):
        raise ValueError("url and host go together")
    values = encoded(changes)
    if "headers" in values:
        values["headers"] = _encrypted_headers(cipher, values["headers"])
    with database.write() as connection:
        changed = connection.execute(
            update(Endpoint)
            .where(*_this_standing(endpoint_id, tenant))
            .values(**values, updated_at=database.clock())
        ).rowcount
        if changed and "host" in changes:
            connection.execute(
                update(Delivery)
                .where(
                    Delivery.endpoint_id == endpoint_id,
                    Delivery.status == "pending",
                    Delivery.host != changes["host"],
                )
                .values(host=changes["host"])
            )
    return changed == 1


def rotate_secret(
    database: Database,
    cipher: Cipher,
    endpoint_id: str,
    secret: str,
    *,
    grace_s: float = ROTATION_GRACE_S,
    tenant: str | None = None,
    now: datetime | None = None,
) -> bool:
    """Give a standing endpoint a new secret; the old ones go on signing beside it for *grace_s* seconds.

    :returns: whether there is such an endpoint.
    """
    now = now or datetime.now(UTC)
    with database.write() as connection:
        # The update also makes two rotations at once wait for each other.
        found = connection.execute(
            update(Endpoint).where(*_this_standing(endpoint_id, tenant)).values(updated_at=now)
        ).rowcount
        if not found:
            return False
        connection.execute(
            delete(Secret).where(Secret.endpoint_id == endpoint_id, Secret.expires_at <= database.clock())
        )
        connection.execute(
            update(Secret)
            .where(Secret.endpoint_id == endpoint_id, Secret.expires_at.is_(None))
            .values(expires_at=database.clock(grace_s))
        )
        connection.execute(insert(Secret).values(_secret_values(cipher, secret, endpoint_id, now)))
    return True


def enable_standing(database: Database, endpoint_id: str, *, tenant: str | None = None) -> bool:
    """Let a standing endpoint get deliveries again, with a clean record.

    What happened meanwhile is delivered by :func:`~.deliveries.recover_part`.

    :returns: whether there is such an endpoint.
    """
    return _set_enabled(database, _this_standing(endpoint_id, tenant), enabled=True, reason=None) == 1


def disable_standing(
    database: Database, endpoint_id: str, *, reason: str = "operator", tenant: str | None = None
) -> bool:
    """Stop a standing endpoint from getting new deliveries. Those that wait go on; cancel them apart.

    :returns: whether there is such an endpoint.
    """
    return _set_enabled(database, _this_standing(endpoint_id, tenant), enabled=False, reason=reason) == 1


def disable_tenant(database: Database, tenant: str) -> int:
    """Disable every standing endpoint of a tenant; return how many were enabled."""
    theirs: list[ColumnElement[bool]] = [
        Endpoint.tenant == tenant,
        Endpoint.kind == "standing",
        Endpoint.enabled.is_(True),
    ]
    return _set_enabled(database, theirs, enabled=False, reason="operator")


def delete_standing_part(
    database: Database, endpoint_id: str, *, at_most: int = 1000, tenant: str | None = None
) -> bool | None:
    """Disable a standing endpoint and delete some of its deliveries; with the last of them, itself.

    :param at_most: deliveries, in one transaction.
    :returns: whether it is deleted now; otherwise call again. ``None``: there is no such endpoint.
    """
    if not disable_standing(database, endpoint_id, reason="deleted", tenant=tenant):
        return None
    some = select(Delivery.id).where(Delivery.endpoint_id == endpoint_id).limit(at_most)
    with database.write() as connection:
        ids = connection.execute(some).scalars().all()
        if ids:
            connection.execute(delete(Attempt).where(Attempt.delivery_id.in_(ids)))
            connection.execute(delete(Delivery).where(Delivery.id.in_(ids)))
        if len(ids) == at_most:
            return False
        # In the transaction that saw no further delivery; one made meanwhile goes by cascade.
        connection.execute(delete(Endpoint).where(Endpoint.id == endpoint_id))
    return True


def _this_standing(endpoint_id: str, tenant: str | None) -> list[ColumnElement[bool]]:
    this: list[ColumnElement[bool]] = [Endpoint.id == endpoint_id, Endpoint.kind == "standing"]
    return this if tenant is None else [*this, Endpoint.tenant == tenant]


def _set_enabled(
    database: Database, which: Sequence[ColumnElement[bool]], *, enabled: bool, reason: str | None
) -> int:
    with database.write(single_statement=True) as connection:
        changed = connection.execute(
            update(Endpoint)
            .where(*which)
            .values(
                enabled=enabled,
                disabled_reason=reason,
                disabled_at=None if enabled else func.coalesce(Endpoint.disabled_at, database.clock()),
                failures=0,
                failing_since=None,
                updated_at=database.clock(),
            )
        )
    return changed.rowcount


def _endpoint_values(
    cipher: Cipher, endpoint: NewEndpoint, endpoint_id: str, now: datetime
) -> dict[str, Any]:
    given = {one.name: getattr(endpoint, one.name) for one in fields(NewEndpoint) if one.name != "secret"}
    return encoded(given) | {
        "id": endpoint_id,
        "headers": _encrypted_headers(cipher, endpoint.headers),
        "enabled": True,
        "failures": 0,
        "created_at": now,
        "updated_at": now,
    }


def _secret_values(cipher: Cipher, secret: str, endpoint_id: str, now: datetime) -> dict[str, Any]:
    return {
        "id": new_id("sec"),
        "endpoint_id": endpoint_id,
        "secret": cipher.encrypt(secret),
        "created_at": now,
    }


def _encrypted_headers(cipher: Cipher, headers: Mapping[str, str]) -> str | None:
    return cipher.encrypt(json.dumps(dict(headers))) if headers else None


def _began(run: str) -> datetime:
    return parse_time(run.removeprefix("created:"))


# The statements of every request are built once: building them takes longer than running them.


@cache
def _insert(table: str) -> Executable:
    return insert(Base.metadata.tables[table])


@cache
def _insert_at_once(columns: tuple[tuple[str, tuple[str, ...]], ...]) -> Executable:
    """Return one statement, which is one round trip, that inserts a row into each of some tables.

    What the rows refer to is checked when all of them are there.

    :param columns: tables with the columns that are given. The parameters are named
        ``<table>_<column>``.
    """
    statements = [
        insert(Base.metadata.tables[table]).values({name: bindparam(f"{table}_{name}") for name in names})
        for table, names in columns
    ]
    last = statements.pop()
    for number, statement in enumerate(statements):
        last = last.add_cte(statement.cte(f"new_{number}"))
    return last


_WATCHES = Base.metadata.tables[Watch.__tablename__]


def _insert_watch(statement: Any, *changed: str) -> Executable:
    changes = {name: statement.excluded[name] for name in changed}
    tenant = select(Endpoint.tenant).where(Endpoint.id == bindparam("of_endpoint")).scalar_subquery()
    statement = statement.values(tenant=tenant)
    insert: Executable = statement.on_conflict_do_update(
        index_elements=["job_id", "endpoint_id"], set_=changes, where=Watch.status == "reserved"
    )
    return insert


#: Whether on SQLite → the statement that opens a watch, or notes the run on one that is only reserved.
_INSERT_OPEN, _INSERT_RESERVED = (
    {True: _insert_watch(sqlite.insert(_WATCHES), *changed),
     False: _insert_watch(postgresql.insert(_WATCHES), *changed)}
    for changed in (("status", "confirmed_at", "run"), ("run",))
)  # fmt: skip
