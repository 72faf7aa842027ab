"""The own engine: a small pool beside the host's, never the host's session, connection or transaction.

Owns how a transaction begins on each database and turns lost connections into
:exc:`~flask_rq_webhooks.errors.StorageUnavailableError`. Holds no statements about our tables beyond
creating them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import StaticPool

from ..errors import StorageUnavailableError
from .models import Base

#: Seconds a SQLite writer waits for another one, and a pool for a free connection.
BUSY_TIMEOUT = 5.0


class Database:
    """Our tables on one database, through an own engine.

    :param url: SQLAlchemy URL. An in-memory SQLite gets a database of its own, created at once.
    :param connect_args: passed to the driver, as the host's engine does (TLS and the like).
    :param pool_size: connections kept; as many again may be opened for a moment.
    """

    def __init__(
        self, url: str | URL, *, connect_args: dict[str, Any] | None = None, pool_size: int = 5
    ) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.in_memory = self.is_sqlite and self.url.database in (None, "", ":memory:")
        # One connection is shared by all threads there, so one transaction at a time.
        self._turn = threading.RLock() if self.in_memory else nullcontext()
        self.engine = self._create_engine(dict(connect_args or {}), pool_size)
        if hasattr(os, "register_at_fork"):
            engine = weakref.ref(self.engine)
            os.register_at_fork(after_in_child=lambda: _forget_connections(engine))
        if self.in_memory:
            self.create_tables()

    def _create_engine(self, connect_args: dict[str, Any], pool_size: int) -> Engine:
        if not self.is_sqlite:
            connect_args.setdefault("connect_timeout", int(BUSY_TIMEOUT))
            return create_engine(
                self.url,
                connect_args=connect_args,
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_timeout=BUSY_TIMEOUT,
                pool_pre_ping=True,
            )
        connect_args.setdefault("timeout", BUSY_TIMEOUT)
        if self.in_memory:
            connect_args["check_same_thread"] = False
            engine = create_engine("sqlite://", connect_args=connect_args, poolclass=StaticPool)
        else:
            engine = create_engine(
                self.url,
                connect_args=connect_args,
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_timeout=BUSY_TIMEOUT,
            )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open one transaction that writes; commit at the end, roll back on an exception.

        :raises StorageUnavailableError: when the database cannot be reached or stays locked.
        """
        with self._transaction(write=True) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open one transaction that only reads.

        :raises StorageUnavailableError: when the database cannot be reached.
        """
        with self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Connection]:
        try:
            with self._turn, self.engine.connect() as connection:
                connection = connection.execution_options(rq_webhooks_write=write)
                with connection.begin():
                    yield connection
        except (DBAPIError, PoolTimeoutError) as exc:
            if is_unavailable(exc):
                raise StorageUnavailableError(
                    f"The database of flask_rq_webhooks ({self.url!r}) cannot be used now: "
                    f"{type(exc).__name__}: {getattr(exc, 'orig', exc)}"
                ) from exc
            raise

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
        with self._transaction(write=True) as connection:
            Base.metadata.create_all(connection)

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def is_unavailable(exc: SQLAlchemyError) -> bool:
    """Say whether *exc* means that the database cannot be reached or is locked, now."""
    if isinstance(exc, PoolTimeoutError):
        return True
    if not isinstance(exc, DBAPIError):
        return False
    if exc.connection_invalidated:
        return True
    text = str(exc.orig).lower()
    sqlite_states = ("database is locked", "unable to open database", "disk i/o error", "readonly database")
    return type(exc.orig).__name__ in {
        "OperationalError", "InterfaceError", "AdminShutdown", "CannotConnectNow", "ConnectionTimeout",
    } and (type(exc.orig).__module__.split(".")[0] != "sqlite3" or any(state in text for state in sqlite_states))  # fmt: skip


def _prepare_sqlite(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # we say BEGIN ourselves, see _begin_sqlite
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later cannot wait for another writer (SQLITE_BUSY at
    # once); one that says IMMEDIATE waits its turn.
    write = connection.get_execution_options().get("rq_webhooks_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _forget_connections(engine: weakref.ref[Engine]) -> None:
    alive = engine()
    if alive is not None:
        alive.dispose(close=False)
