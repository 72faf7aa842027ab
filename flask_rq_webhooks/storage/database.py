"""The own engine: a small pool beside the host's, never the host's session, connection or transaction.

Owns how a transaction begins on each database and turns lost connections into
:exc:`~flask_rq_webhooks.errors.StorageUnavailableError`. Holds no statements about our tables beyond
creating them.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeGuard

from sqlalchemy import ColumnElement, Connection, Dialect, Engine, create_engine, event, func, literal, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, StaticPool

from ..errors import ConfigurationError, StorageUnavailableError
from .models import Base, UTCDateTime

#: Seconds a SQLite writer waits for another one, and a pool for a free connection.
BUSY_TIMEOUT = 5.0

#: Seconds after which PostgreSQL ends a transaction of ours nobody goes on with: the locks of a machine that
#: was cut off in the middle of one would hold up all others for as long as TCP waits, two hours by default.
IDLE_IN_TRANSACTION_S = 30

#: Of libpq: a server that vanished, without so much as a refusal, is noticed within seconds as well.
LIBPQ_DRIVERS = frozenset({"psycopg", "psycopg2"})
LIBPQ_TIMEOUTS = {
    "connect_timeout": int(BUSY_TIMEOUT),
    "tcp_user_timeout": int(BUSY_TIMEOUT * 1000),
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

#: Seconds of rest after which a pooled connection to PostgreSQL is asked whether it is still alive even where
#: the caller would try again: one that was used a moment ago is hardly ever dead, and asking costs a round
#: trip.
PING_AFTER_S = 1.0

#: What the thread that takes a connection from the pool says of itself.
_checkout = threading.local()

#: The first SQLite with ``RETURNING``, which claiming and ingesting are built on.
MINIMUM_SQLITE = (3, 35, 0)


class Database:
    """Our tables on one database, through an own engine.

    :param url: SQLAlchemy URL. An in-memory SQLite gets a database of its own, created at once.
    :param connect_args: passed to the driver, as the host's engine does (TLS and the like).
    :param pool_size: connections kept; as many again may be opened for a moment.
    :raises ConfigurationError: when SQLite itself is too old.
    """

    #: Host the last claim of this process ended with; the next one goes on behind it. A hint, not state.
    claim_after: str = ""

    def __init__(
        self, url: str | URL, *, connect_args: dict[str, Any] | None = None, pool_size: int = 5
    ) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.in_memory = self.is_sqlite and self.url.database in (None, "", ":memory:")
        if self.is_sqlite and sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old for flask_rq_webhooks, which needs 3.35; use a "
                "Python built with a newer one, or PostgreSQL."
            )
        # SQLite has one writer at a time, and those who wait ask again after growing pauses; threads of one
        # process take turns instead. In memory one connection is shared by all, so readers do as well.
        self._turn = threading.RLock()
        self.engine = self._create_engine(dict(connect_args or {}), pool_size)
        if hasattr(os, "register_at_fork"):
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _forget_parent(this))
        if self.in_memory:
            self.create_tables()

    def _create_engine(self, connect_args: dict[str, Any], pool_size: int) -> Engine:
        if not self.is_sqlite:
            if self.url.get_driver_name() in LIBPQ_DRIVERS:
                connect_args = LIBPQ_TIMEOUTS | connect_args
            engine = create_engine(
                self.url,
                connect_args=connect_args,
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_timeout=BUSY_TIMEOUT,
                hide_parameters=True,  # errors are logged, and parameters are URLs and results
            )
            event.listen(engine, "begin", _begin_postgresql)
            event.listen(engine, "connect", _note_use)
            event.listen(engine, "checkin", _note_use)
            event.listen(engine, "checkout", partial(_ping_after_rest, engine.dialect))
            return engine
        connect_args.setdefault("timeout", BUSY_TIMEOUT)
        self._busy_timeout_s = float(connect_args["timeout"])
        if self.in_memory:
            connect_args["check_same_thread"] = False
            engine = create_engine(
                "sqlite://", connect_args=connect_args, poolclass=StaticPool, hide_parameters=True
            )
        else:
            engine = create_engine(
                self.url,
                connect_args=connect_args,
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_timeout=BUSY_TIMEOUT,
                hide_parameters=True,
            )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    @contextmanager
    def write(
        self,
        *,
        busy_timeout_s: float | None = None,
        single_statement: bool = False,
        durable: bool = True,
        repeated: bool = False,
    ) -> Iterator[Connection]:
        """Open one transaction that writes; commit at the end, roll back on an exception.

        :param busy_timeout_s: SQLite: wait no longer than this for another writer.
        :param single_statement: the caller executes exactly one statement. PostgreSQL then runs it as a
            transaction of its own, which saves the round trips of ``BEGIN`` and ``COMMIT``.
        :param durable: ``False``: the database need not wait for the disk. What is written survives the death
            of this process, and may be undone by that of the machine the database is on. PostgreSQL waits
            all the same for a *single_statement*, unless that says otherwise itself.
        :param repeated: the caller does it again if the connection turns out to be dead. PostgreSQL is then
            not asked whether one is alive that was used within :data:`PING_AFTER_S`.
        :raises StorageUnavailableError: when the database cannot be reached, stays locked, or lacks our
            tables.
        """
        options: dict[str, Any] = {
            "rq_webhooks_write": True,
            "rq_webhooks_durable": durable,
            "rq_webhooks_repeated": repeated,
        }
        if self.is_sqlite:
            options["rq_webhooks_busy_timeout_s"] = busy_timeout_s
        elif single_statement:
            options["isolation_level"] = "AUTOCOMMIT"
        with self._transaction(options) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a connection that only reads: one snapshot on SQLite, one per statement on PostgreSQL.

        :raises StorageUnavailableError: when the database cannot be reached or lacks our tables.
        """
        options: dict[str, Any] = {"rq_webhooks_write": False}
        if not self.is_sqlite:
            # READ COMMITTED takes a new snapshot per statement anyway; so spare BEGIN and ROLLBACK.
            options["isolation_level"] = "AUTOCOMMIT"
        with self._transaction(options) as connection:
            yield connection

    @contextmanager
    def _transaction(self, options: dict[str, Any]) -> Iterator[Connection]:
        try:
            with self._my_turn(options), self._connect(options) as connection:
                connection = connection.execution_options(**options)
                try:
                    with connection.begin():
                        yield connection
                finally:
                    if options.get("rq_webhooks_busy_timeout_s") is not None:
                        _set_pragma(connection, f"busy_timeout={int(self._busy_timeout_s * 1000)}")
                    if self.is_sqlite and not options.get("rq_webhooks_durable", True):
                        _set_pragma(connection, "synchronous=FULL")
        except (DBAPIError, PoolTimeoutError) as exc:
            if is_missing_schema(exc):
                raise StorageUnavailableError(
                    f"The tables of flask_rq_webhooks in {self.url!r} are missing or older than "
                    f"this version; run `flask rq-webhooks init-db` or your migrations: {exc.orig}"
                ) from exc
            if is_unavailable(exc):
                raise StorageUnavailableError(
                    f"The database of flask_rq_webhooks ({self.url!r}) cannot be used now: "
                    f"{type(exc).__name__}: {getattr(exc, 'orig', exc)}"
                ) from exc
            raise

    def _connect(self, options: Mapping[str, Any]) -> Connection:
        _checkout.repeated = options.get("rq_webhooks_repeated", False)
        try:
            return self.engine.connect()
        finally:
            _checkout.repeated = False

    @contextmanager
    def _my_turn(self, options: Mapping[str, Any]) -> Iterator[None]:
        if not self.in_memory and not (self.is_sqlite and options["rq_webhooks_write"]):
            yield
            return
        timeout_s = options.get("rq_webhooks_busy_timeout_s")
        if not self._turn.acquire(timeout=self._busy_timeout_s if timeout_s is None else timeout_s):
            raise StorageUnavailableError(
                f"The database of flask_rq_webhooks ({self.url!r}) cannot be used now: another thread of "
                "this process has been writing to it all the time."
            )
        try:
            yield
        finally:
            self._turn.release()

    def clock(self, offset_s: float = 0.0) -> ColumnElement[datetime]:
        """Return the database's clock as an expression, *offset_s* seconds from now.

        Leases of several machines are compared by it alone. It goes on inside a transaction.
        """
        if self.is_sqlite:
            return literal(datetime.now(UTC) + timedelta(seconds=offset_s), UTCDateTime)
        moment: ColumnElement[datetime] = func.clock_timestamp(type_=UTCDateTime)
        if not offset_s:
            return moment
        return moment.op("+", return_type=UTCDateTime())(func.make_interval(0, 0, 0, 0, 0, 0, offset_s))

    def now(self, connection: Connection) -> datetime:
        """Return the database's clock: leases of several machines are compared by it alone.

        SQLite has no clock of its own; there it is this machine's, the only one that can be involved.
        """
        if self.is_sqlite:
            return datetime.now(UTC)
        moment: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return moment.astimezone(UTC)

    def create_tables(self) -> None:
        """Create the tables that are missing."""
        with self.write() as connection:
            Base.metadata.create_all(connection)

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def is_missing_schema(exc: SQLAlchemyError) -> TypeGuard[DBAPIError]:
    """Say whether *exc* means that a table or column of ours does not exist."""
    if not isinstance(exc, DBAPIError):
        return False
    if type(exc.orig).__name__ in {"UndefinedTable", "UndefinedColumn"}:
        return "rq_webhooks_" in str(exc.orig) or "rq_webhooks_" in (exc.statement or "")
    missing = ("no such table: rq_webhooks_", "no such column: ", "no such index: ix_rq_webhooks_")
    return (str(exc.orig).startswith(missing) and "rq_webhooks_" in (exc.statement or "")) or (
        " has no column named " in str(exc.orig) and "table rq_webhooks_" in str(exc.orig)
    )


def is_unavailable(exc: SQLAlchemyError) -> bool:
    """Say whether *exc* means that the database cannot be reached or is locked, now."""
    if isinstance(exc, PoolTimeoutError):
        return True
    if not isinstance(exc, DBAPIError):
        return False
    if exc.connection_invalidated:
        return True
    if isinstance(exc.orig, sqlite3.Error):
        return str(exc.orig).lower().startswith(_SQLITE_UNAVAILABLE)
    return type(exc.orig).__name__ in _UNAVAILABLE


def is_disconnected(exc: StorageUnavailableError) -> bool:
    """Say whether *exc* came of a connection that was lost; the next one may be as good as new."""
    return isinstance(exc.__cause__, DBAPIError) and exc.__cause__.connection_invalidated


#: Names of the drivers' errors, as psycopg's class per SQLSTATE, that mean: not now.
_UNAVAILABLE = {
    "OperationalError",
    "InterfaceError",
    "AdminShutdown",
    "CrashShutdown",
    "CannotConnectNow",
    "ConnectionTimeout",
    "TooManyConnections",
    "DeadlockDetected",
    "IdleInTransactionSessionTimeout",
    "LockNotAvailable",
}
_SQLITE_UNAVAILABLE = (
    "database is locked",
    "database table is locked",
    "unable to open database",
    "disk i/o error",
    "attempt to write a readonly database",
    "database or disk is full",
)


def _prepare_sqlite(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # we say BEGIN ourselves, see _begin_sqlite
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    # FULL: a registration we answered for survives a power failure too. One fsync of the log per commit,
    # measured 0.3 ms against 0.02 ms for NORMAL, which only survives the death of the process; ingest and
    # record commit per batch and do not feel it. Claims say durable=False: a lease that is undone is free.
    cursor.execute("PRAGMA synchronous=FULL")
    # Pages written again and again travel to the file once per 16 MB of log instead of once per 4: a fifth
    # of what claiming and recording cost.
    cursor.execute("PRAGMA wal_autocheckpoint=4000")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("rq_webhooks_busy_timeout_s") is not None:
        _set_pragma(connection, f"busy_timeout={int(options['rq_webhooks_busy_timeout_s'] * 1000)}")
    if not options.get("rq_webhooks_durable", True):
        _set_pragma(connection, "synchronous=NORMAL")
    # A transaction that reads first and writes later cannot wait for another writer (SQLITE_BUSY at
    # once); one that says IMMEDIATE waits its turn.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("rq_webhooks_write", True) else "BEGIN")


def _set_pragma(connection: Connection, pragma: str) -> None:
    # On the driver's connection: through SQLAlchemy it would come after BEGIN, where it has no effect.
    raw = connection.connection.driver_connection
    if isinstance(raw, sqlite3.Connection):
        raw.execute(f"PRAGMA {pragma}").close()


def _begin_postgresql(connection: Connection) -> None:
    # For this transaction only: behind a pooler the session is the host's in the next moment.
    options = connection.get_execution_options()
    if options.get("isolation_level") != "AUTOCOMMIT":
        settings = f"set_config('idle_in_transaction_session_timeout', '{IDLE_IN_TRANSACTION_S}s', true)"
        if not options.get("rq_webhooks_durable", True):
            settings += ", set_config('synchronous_commit', 'off', true)"
        connection.exec_driver_sql(f"SELECT {settings}").close()


def _note_use(_dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info["rq_webhooks_used_at"] = time.monotonic()


def _ping_after_rest(
    dialect: Dialect, dbapi_connection: Any, record: ConnectionPoolEntry, _proxy: PoolProxiedConnection
) -> None:
    rested_s = time.monotonic() - record.info.get("rq_webhooks_used_at", 0.0)
    if getattr(_checkout, "repeated", False) and rested_s < PING_AFTER_S:
        return
    try:
        dialect.do_ping(dbapi_connection)
    except dialect.loaded_dbapi.Error as exc:
        raise InvalidatePoolError from exc  # the pool connects anew, and trusts none of its others


def _forget_parent(this: weakref.ref[Database]) -> None:
    """In a forked process, leave the parent its connections, and the turn one of its threads may have."""
    alive = this()
    if alive is not None:
        alive.engine.dispose(close=False)
        alive._turn = threading.RLock()
