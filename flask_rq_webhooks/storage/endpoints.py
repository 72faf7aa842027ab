"""Endpoints and the watches of their jobs: which reports were promised to whom.

Owns the rows created from a request's webhook fields (:func:`register`, before the view) and the confirmation
of the jobs the view enqueued (:func:`confirm`, after it). Knows nothing of requests or Redis: its callers say
which jobs exist.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import Executable, bindparam, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from ..errors import StorageUnavailableError
from ..protocol.events import parse_time
from .bulk_insert import execute_rows, insert_into
from .crypto import Cipher
from .database import Database
from .models import (
    CLOSED,
    OPEN,
    RESERVED,
    Base,
    Delivery,
    Endpoint,
    EndpointFields,
    Secret,
    Watch,
    encoded,
    new_id,
)
from .reported_runs import unbound_watch_id
from .sql_errors import may_try_again

logger = logging.getLogger(__name__)

#: How many times a transaction is tried, and the first pause in seconds, which then doubles.
TRIES, RETRY_PAUSE_S = 4, 0.02

#: A statement, and the parameters of each of its executions.
Statement = tuple[Executable, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEndpoint(EndpointFields):
    """An endpoint before it is stored; all fields are validated.

    :param headers: custom headers, unencrypted.
    :param secret: signs every delivery; ``None`` if the endpoint has none of its own.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secret: str | None = field(default=None, repr=False)


_COLUMNS = tuple(one.name for one in fields(NewEndpoint) if one.name != "secret")


def register(
    database: Database,
    cipher: Cipher,
    endpoint: NewEndpoint,
    *,
    namespace: str,
    reserved_job_id: str | None = None,
    watched_job_id: str | None = None,
    counts_from: datetime | None = None,
    now: datetime | None = None,
) -> str:
    """Store an endpoint, its secret, and the watch of its first job, in one short transaction.

    :param namespace: see :func:`~.dispatchers.shared_namespace`; becomes part of the id.
    :param reserved_job_id: id that the first job of the view will get.
    :param watched_job_id: instead, id of an existing job; reconcile reports it.
    :param counts_from: when the current run of that job was enqueued, or the job was created: that run
        counts, even if it has already ended. Without it, only runs from now on count.
    :returns: the endpoint's id.
    :raises StorageUnavailableError: when the database cannot be reached or stays locked.
    """
    now = now or datetime.now(UTC)
    endpoint_id = new_id("ep" + namespace)
    rows = rows_of(cipher, endpoint, endpoint_id, now)
    if reserved_job_id is not None or watched_job_id is not None:
        rows[Watch.__tablename__] = {
            "id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": reserved_job_id or watched_job_id,
            "status": RESERVED if reserved_job_id else OPEN, "missing_passes": 0,
            "created_at": min(now, counts_from or now), "confirmed_at": None if reserved_job_id else now,
            "tenant": endpoint.tenant,
        }  # fmt: skip
    try:
        _execute(database, insertion(database, rows))
    except IntegrityError:
        # The id is new, so the row exists only if the first of two tries was committed after all.
        if not endpoint_exists(database, endpoint_id):
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
    """Record which jobs the view actually enqueued. Safe to repeat: no watch ever moves backwards.

    :param existing: ids of jobs that are in Redis: their watches become ``open``.
    :param unseen: ids of jobs created but not in Redis, such as those of a pipeline not yet executed:
        ``reserved``, until reconcile finds them.
    :param reserved_job_id: the id given to :func:`register`. If no job used it, its watch becomes ``closed``.
    :param runs: the run each job was enqueued for, if known: the job was handed to RQ. A lost job is then
        reported under it, and a callback's late report corrects that.
    :param busy_timeout_s: SQLite: wait no longer than this for another writer, which may be the host
        itself, in a transaction that ends only after we answer.
    :raises StorageUnavailableError: when the database cannot be written now; the caller then leaves the
        confirmation in the outbox.
    """
    now = datetime.now(UTC)
    # The confirmed run counts, even that of a watched job that began before the request.
    since = {job_id: min(now, _began(run)) for job_id, run in (runs or {}).items()}
    existing = list(dict.fromkeys(existing))
    unseen = [job_id for job_id in dict.fromkeys(unseen) if job_id not in existing]
    statements: list[Statement] = []
    for status, job_ids in ((OPEN, existing), (RESERVED, unseen)):
        rows = [
            {"id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": job_id, "status": status,
             "run": (runs or {}).get(job_id), "missing_passes": 0, "of_endpoint": endpoint_id,
             "created_at": since.get(job_id, now), "confirmed_at": now if status == OPEN else None}
            for job_id in job_ids
        ]  # fmt: skip
        if rows:
            statements.append((_INSERT_WATCH[status, database.is_sqlite], rows))
    if reserved_job_id is not None and reserved_job_id not in existing and reserved_job_id not in unseen:
        unused = {"of_endpoint": endpoint_id, "reserved": reserved_job_id, "now": now}
        statements.append((_CLOSE_UNUSED, [unused]))
    try:
        # Durable: for all jobs except the one whose id was reserved, this is the only record.
        _execute(database, statements, busy_timeout_s)
    except IntegrityError:
        # The confirmation waited in the outbox while its endpoint was pruned, or it is another app's.
        if endpoint_exists(database, endpoint_id):
            raise
        logger.warning("Jobs of the endpoint %r cannot be confirmed: it does not exist here.", endpoint_id)


def watch_for_standing(
    database: Database, existing: Sequence[str], unseen: Sequence[str], runs: Mapping[str, str | None]
) -> None:
    """Watch jobs whose events go to standing endpoints only. Safe to repeat: no watch moves backwards.

    :param existing: ids of jobs that RQ accepted.
    :param unseen: ids of jobs that were only created; reconcile finds out about them.
    :param runs: the run of each job, or its creation time.
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
    """Return whether *endpoint_id* is ours; callbacks may name one that was pruned or is another app's."""
    with database.read() as connection:
        return connection.execute(select(Endpoint.id).where(Endpoint.id == endpoint_id)).first() is not None


def waiting_for_host(database: Database, host: str, *, at_most: int | None = None) -> int:
    """Return how many unfinished deliveries go to *host*.

    :param at_most: stop counting at this number; the result is then never larger.
    """
    unfinished = select(Delivery.id).where(Delivery.host == host, Delivery.status.in_(["pending", "sending"]))
    with database.read() as connection:
        return connection.execute(
            select(func.count()).select_from(unfinished.limit(at_most).subquery())
        ).scalar_one()


def rows_of(cipher: Cipher, endpoint: NewEndpoint, endpoint_id: str, now: datetime) -> dict[str, Any]:
    """Return the rows of an endpoint that has no jobs yet, by table."""
    given = {name: getattr(endpoint, name) for name in _COLUMNS}
    row = encoded(given) | {
        "id": endpoint_id, "headers": encrypted_headers(cipher, endpoint.headers), "enabled": True,
        "failures": 0, "created_at": now, "updated_at": now,
    }  # fmt: skip
    rows = {Endpoint.__tablename__: row}
    if endpoint.secret is not None:
        rows[Secret.__tablename__] = secret_row(cipher, endpoint.secret, endpoint_id, now)
    return rows


def secret_row(cipher: Cipher, secret: str, endpoint_id: str, now: datetime) -> dict[str, Any]:
    """Return the row of a secret that signs from now on."""
    encrypted = cipher.encrypt(secret)
    return {"id": new_id("sec"), "endpoint_id": endpoint_id, "secret": encrypted, "created_at": now}


def insertion(database: Database, rows: Mapping[str, Mapping[str, Any]]) -> list[Statement]:
    """Return the statements, with their parameters, that insert one row into each of the given tables."""
    if database.is_sqlite:
        return [(_insert(table), [row]) for table, row in rows.items()]
    columns = tuple((table, tuple(row)) for table, row in rows.items())
    values = {f"{table}_{name}": value for table, row in rows.items() for name, value in row.items()}
    return [(_insert_at_once(columns), [values])]


def encrypted_headers(cipher: Cipher, headers: Mapping[str, str]) -> str | None:
    """Return custom headers as they are stored."""
    return cipher.encrypt(json.dumps(dict(headers))) if headers else None


def _began(run: str) -> datetime:
    return parse_time(run.removeprefix("created:"))


# The statements that run for every request are built and compiled once, and executed by the driver:
# SQLAlchemy would take longer than the database.


def _execute(
    database: Database, statements: Sequence[Statement], busy_timeout_s: float | None = None
) -> None:
    """Execute statements in one transaction, and retry when that may help.

    It helps after a lost connection, or when PostgreSQL aborted the transaction in favour of another one.

    :param statements: executing all of them twice must have the same effect as once. Column defaults are not
        applied.
    :raises StorageUnavailableError: as :meth:`~.database.Database.write`.
    """
    single = len(statements) == 1 and len(statements[0][1]) == 1
    for left in reversed(range(TRIES if statements else 0)):
        try:
            with database.write(
                single_statement=single, repeated=True, busy_timeout_s=busy_timeout_s
            ) as connection:
                for statement, rows in statements:
                    execute_rows(database, connection, statement, rows)
            return
        except StorageUnavailableError as exc:
            if not left or not may_try_again(exc):
                raise
            time.sleep(RETRY_PAUSE_S * 2 ** (TRIES - 2 - left) if left < TRIES - 1 else 0)


@cache
def _insert(table: str) -> Executable:
    return insert(Base.metadata.tables[table])


@cache
def _insert_at_once(columns: tuple[tuple[str, tuple[str, ...]], ...]) -> Executable:
    """Return one statement (one round trip) that inserts a row into each of the given tables.

    Foreign keys are checked when all rows are there.

    :param columns: tables with the columns that get values. The parameters are named ``<table>_<column>``.
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


#: Statements that open a watch, or note the run on a reserved one: by its status, and whether on SQLite.
_INSERT_WATCH = {
    (status, dialect is sqlite): _insert_watch(dialect.insert(_WATCHES), *changed)
    for status, changed in ((OPEN, ("status", "confirmed_at", "run")), (RESERVED, ("run",)))
    for dialect in (sqlite, postgresql)
}

_CLOSE_UNUSED = (
    update(Watch)
    .where(Watch.endpoint_id == bindparam("of_endpoint"), Watch.job_id == bindparam("reserved"))
    .where(Watch.status == RESERVED)
    .values(status=CLOSED, settled_at=bindparam("now"))
)
