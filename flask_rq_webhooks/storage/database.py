"""Our own engine: a small pool next to the host's; never uses its session, connection or transaction.

Owns how a connection is opened and how a transaction begins on each database, and turns the errors that
:mod:`.sql_errors` explains into :exc:`~flask_rq_webhooks.errors.StorageUnavailableError`. Holds no
statements on our tables other than creating them.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from inspect import getclosurevars, isfunction
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    create_engine,
    event,
    func,
    inspect,
    literal,
    select,
)
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.engine import make_url as make_url
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool, StaticPool

from ..errors import ConfigurationError, StorageUnavailableError
from .models import Base, UTCDateTime
from .sql_errors import sqlstate, why_unavailable

logger = logging.getLogger(__name__)

#: Seconds that a SQLite writer waits for another writer, and the pool for a free connection.
BUSY_TIMEOUT = 5.0

#: Seconds after which PostgreSQL ends an idle transaction of ours: otherwise the locks of a machine that was
#: cut off would block everybody else until TCP gives up, two hours by default.
IDLE_IN_TRANSACTION_S = 30
#: The expression that sets this limit for one transaction: behind a pooler, the host may use the session
#: next.
LIMIT_IDLE = f"set_config('idle_in_transaction_session_timeout', '{IDLE_IN_TRANSACTION_S}s', true)"

#: libpq options to notice within seconds a server that vanished without closing its connections.
LIBPQ_DRIVERS = frozenset({"psycopg", "psycopg2"})
LIBPQ_TIMEOUTS = {
    "connect_timeout": int(BUSY_TIMEOUT),
    "tcp_user_timeout": int(BUSY_TIMEOUT * 1000),
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

#: Idle seconds after which a pooled PostgreSQL connection is checked even if the caller would retry: one
#: that was used a moment ago is hardly ever dead, and a check costs a round trip.
PING_AFTER_S = 1.0

#: Per thread: whether the caller taking a connection from the pool would repeat its transaction.
_checkout = threading.local()

#: The first SQLite with ``RETURNING``, which claiming and ingesting rely on.
MINIMUM_SQLITE = (3, 35, 0)


class Database:
    """Access to our tables in one database, through our own engine.

    :param url: SQLAlchemy URL. In-memory SQLite gets its own database, with the tables created at once.
    :param host: the host's engine for this database. Connections are then opened exactly as it opens them:
        ``connect_args``, ``creator``, listeners for ``do_connect`` and ``connect``.
    :param connect_args: passed to the driver if there is no *host*.
    :param schema: schema of our tables, if not the default one.
    :param own_file: nobody else uses this SQLite file, so it may be switched to WAL; never done with *host*.
    :param pool_size: connections kept open; as many again may be opened temporarily.
    :raises ConfigurationError: when SQLite itself is too old.
    """

    #: Host at which this process's last claim ended; the next one begins after it. A hint, not state.
    claim_after: str = ""

    def __init__(
        self,
        url: str | URL,
        *,
        host: Engine | None = None,
        connect_args: Mapping[str, Any] | None = None,
        schema: str | None = None,
        own_file: bool = True,
        pool_size: int = 5,
    ) -> None:
        self.url = make_url(url)
        self.schema = schema
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.in_memory = self.is_sqlite and self.url.database in (None, "", ":memory:")
        if self.is_sqlite and sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old for flask_rq_webhooks, which needs 3.35; use a "
                "Python built with a newer one, or PostgreSQL."
            )
        self._wal = own_file and host is None
        self._prepares = True
        #: Whether a transaction that has only read does not block writers.
        self.reads_freely = not self.is_sqlite
        # SQLite allows one writer at a time, and waiting writers poll with growing pauses; threads of one
        # process take turns instead. In memory, all share one connection, so readers take turns too.
        self._turn = threading.RLock()
        self._pid = os.getpid()
        self.engine = self._create_engine(host, dict(connect_args or {}), pool_size)
        if self.in_memory:
            self.create_tables()

    def _create_engine(self, host: Engine | None, connect_args: dict[str, Any], pool_size: int) -> Engine:
        options: dict[str, Any] = {"hide_parameters": True}  # errors are logged; parameters are URLs, results
        if self.in_memory:
            connect_args |= {"check_same_thread": False, "timeout": BUSY_TIMEOUT}
            engine = create_engine("sqlite://", connect_args=connect_args, poolclass=StaticPool, **options)
        else:
            options |= {
                "poolclass": QueuePool,
                "pool_size": pool_size,
                "max_overflow": pool_size,
                # The connection used last still has its pages and prepared statements.
                "pool_use_lifo": True,
                "pool_timeout": BUSY_TIMEOUT,
            }
            if not self.is_sqlite:
                # Our statements are written for it, whatever the default of the server or host is.
                options["isolation_level"] = "READ COMMITTED"
            if host is not None:
                options |= {
                    "creator": lambda record: _connect_as(host, record),
                    "pool_recycle": host.pool._recycle,
                }
            else:
                options["connect_args"] = _timeouts(self.url) | connect_args
            engine = create_engine(self.url, **options)
            if host is not None:
                event.listen(engine, "connect", partial(_listeners_of, host))
        if self.is_sqlite:
            event.listen(engine, "connect", partial(_prepare_sqlite, self._wal))
            event.listen(engine, "connect", self._note_journal)
        else:
            event.listen(engine, "connect", self._prepare_postgresql)
            event.listen(engine, "reset", _note_use)
            event.listen(engine, "checkout", partial(_ping_after_rest, engine.dialect))
            event.listen(engine, "handle_error", self._judge_connection)
        if self.schema is not None:
            event.listen(engine, "before_cursor_execute", self._name_schema, retval=True)
        return engine

    def write(
        self,
        *,
        busy_timeout_s: float | None = None,
        single_statement: bool = False,
        durable: bool = True,
        repeated: bool = False,
        limits_idle: bool = False,
        optimistic: bool = False,
        in_order: bool = False,
    ) -> AbstractContextManager[Connection]:
        """Open one write transaction; commit at the end, roll back on an exception.

        :param busy_timeout_s: SQLite: wait no longer than this for another writer.
        :param single_statement: the caller executes exactly one statement. PostgreSQL then runs it as its
            own transaction, which saves the round trips of ``BEGIN`` and ``COMMIT``.
        :param durable: ``False``: the commit need not wait for the disk. The data survives the death of this
            process, but may be lost if the database's machine crashes. PostgreSQL still waits for a
            *single_statement*, unless the statement itself says otherwise.
        :param repeated: the caller retries if the connection turns out to be dead. PostgreSQL connections
            used within :data:`PING_AFTER_S` are then not checked first.
        :param limits_idle: the caller's first statement contains :data:`LIMIT_IDLE`, saving a round trip.
        :param optimistic: SQLite: block no other writer before the caller's first write, which fails if
            another writer has written since the caller's first read.
        :param in_order: PostgreSQL: read an index in order rather than sort. With statistics from a time when
            nothing was due, the planner takes sorting the few rows for cheaper, and each lookup reads them
            all; with statistics from a long backlog, it takes sorting the rows of one host for cheaper.
        :raises StorageUnavailableError: when the database cannot be reached, stays locked, or lacks our
            tables.
        """
        writes = not (optimistic and self.is_sqlite)
        return self._transaction(
            writes=writes,
            single_statement=single_statement,
            busy_timeout_s=busy_timeout_s,
            durable=durable,
            repeated=repeated,
            limits_idle=limits_idle,
            in_order=in_order,
        )

    def read(self) -> AbstractContextManager[Connection]:
        """Open a connection that only reads: one snapshot on SQLite, one per statement on PostgreSQL.

        :raises StorageUnavailableError: when the database cannot be reached or lacks our tables.
        """
        # READ COMMITTED takes a new snapshot per statement anyway, so BEGIN and ROLLBACK are left out.
        return self._transaction(writes=False, single_statement=True)

    @contextmanager
    def _transaction(
        self,
        *,
        writes: bool,
        single_statement: bool,
        busy_timeout_s: float | None = None,
        durable: bool = True,
        repeated: bool = False,
        limits_idle: bool = False,
        in_order: bool = False,
    ) -> Iterator[Connection]:
        if self._pid != os.getpid():
            self._forget_parent()
        turn = self._turn if self.in_memory or (self.is_sqlite and writes) else None
        if turn and not turn.acquire(timeout=BUSY_TIMEOUT if busy_timeout_s is None else busy_timeout_s):
            raise StorageUnavailableError(
                f"The database of flask_rq_webhooks ({self.url!r}) cannot be used now: another thread of "
                "this process has been writing to it all the time."
            )
        try:
            with self._connect(repeated) as connection:
                restore: list[str] = []
                if self.is_sqlite:
                    begin, restore = _sqlite_transaction(connection.info, writes, busy_timeout_s, durable)
                elif single_statement and not connection.info.get("rq_webhooks_isolated"):
                    # Without SQLAlchemy's isolation levels, for which psycopg has to wait repeatedly.
                    cast(Any, connection.connection.dbapi_connection).autocommit = True
                    yield connection
                    return
                else:
                    begin = _begin_postgresql(durable, limits_idle, in_order)
                try:
                    with connection.begin():
                        for sql in begin:
                            execute_by_driver(connection, sql)
                        yield connection
                finally:
                    for sql in restore:
                        execute_by_driver(connection, sql)
        except (DBAPIError, PoolTimeoutError) as exc:
            why = why_unavailable(exc, self.url, self.schema)
            if why is None:
                raise
            raise StorageUnavailableError(why) from exc
        finally:
            if turn:
                turn.release()

    def _connect(self, repeated: bool) -> Connection:
        _checkout.repeated = repeated
        try:
            return self.engine.connect()
        finally:
            _checkout.repeated = False

    def _note_journal(self, _connection: Any, record: ConnectionPoolEntry) -> None:
        self.reads_freely = record.info["rq_webhooks_wal"]

    def _prepare_postgresql(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SELECT pg_backend_pid(), current_setting('default_transaction_isolation')")
        pid, isolation = cursor.fetchone()
        cursor.close()
        dbapi_connection.rollback()
        # If the default is another level, only BEGIN can make a transaction READ COMMITTED.
        record.info["rq_webhooks_isolated"] = isolation != "read committed"
        record.info["rq_webhooks_new"] = True
        record.info["rq_webhooks_read_only"] = _is_read_only(dbapi_connection)
        if getattr(dbapi_connection, "prepare_threshold", None) is not None:  # psycopg 3
            if pid != dbapi_connection.info.backend_pid:
                self._stop_preparing("a connection pooler stands between us and the server")
            if not self._prepares:
                dbapi_connection.prepare_threshold = None

    def _stop_preparing(self, why: str) -> None:
        """Stop using prepared statements: a pooler may run the next transaction on a server without them."""
        if self._prepares:
            self._prepares = False
            logger.warning(
                "%r: %s; flask_rq_webhooks does without prepared statements from now on. The host's engine "
                'wants connect_args={"prepare_threshold": None} there.',
                self.url, why,
            )  # fmt: skip

    def _judge_connection(self, context: ExceptionContext) -> None:
        """Drop connections to a server that cannot write, and those whose prepared statements are lost."""
        state, reason = sqlstate(context.original_exception), str(context.original_exception)
        if 'prepared statement "_pg3_' in reason:
            self._stop_preparing(f"the server says: {reason.splitlines()[0]}")
            context.is_disconnect = True
        elif state.startswith("08") or state in _CONNECTION_IS_USELESS:
            context.is_disconnect = True
        elif state == "0A000":
            context.is_disconnect = "cached plan" in reason  # prepared before a migration

    def _name_schema(
        self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any
    ) -> tuple[str, Any]:
        return in_schema(statement, self.engine.dialect, self.schema), parameters

    def _forget_parent(self) -> None:
        """After a fork, leave the parent's connections to it, and replace a lock its threads may hold.

        Detected by the process id: servers such as uWSGI fork without running Python's hooks.
        """
        self._pid = os.getpid()
        self._turn = threading.RLock()
        self.engine.dispose(close=False)

    def clock(self, offset_s: float = 0.0) -> ColumnElement[datetime]:
        """Return the database's clock as an expression, *offset_s* seconds from now.

        Leases of different machines are compared by this clock only. It advances within a transaction.
        """
        if self.is_sqlite:
            return literal(datetime.now(UTC) + timedelta(seconds=offset_s), UTCDateTime)
        moment: ColumnElement[datetime] = func.clock_timestamp(type_=UTCDateTime)
        if not offset_s:
            return moment
        return moment.op("+", return_type=UTCDateTime())(func.make_interval(0, 0, 0, 0, 0, 0, offset_s))

    def now(self, connection: Connection) -> datetime:
        """Return the database's time: leases of different machines are compared by this clock only.

        SQLite has no clock of its own; this machine's is used, the only one that can be involved.
        """
        if self.is_sqlite:
            return datetime.now(UTC)
        moment: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return moment.astimezone(UTC)

    def create_tables(self) -> None:
        """Create the tables that are missing."""
        with self.write() as connection:
            there = inspect(connection).get_table_names(schema=self.schema)
            for table in Base.metadata.sorted_tables:
                if table.name not in there:
                    table.create(connection)

    def dispose(self) -> None:
        """Close every pooled connection."""
        # The in-memory connection is shared: closing it while a thread executes on it crashes the process.
        with self._turn if self.in_memory else nullcontext():
            self.engine.dispose()


def _connect_as(host: Engine, record: ConnectionPoolEntry) -> Any:
    """Open a connection exactly as the host's engine does, but with our timeouts where it sets none."""
    creator: Any = host.pool._creator
    # A creator from create_engine holds its arguments only in its closure; the host's own creator has none.
    made = getclosurevars(creator).nonlocals if isfunction(creator) else {}
    given = made.get("cargs_tup", made.get("cargs"))  # older versions call them cargs
    if given is None or not {"dialect", "cparams"} <= made.keys():
        return host.pool._invoke_creator(record)
    dialect = made["dialect"]
    arguments, parameters = list(given), _timeouts(host.url) | dict(made["cparams"])
    for listener in dialect.dispatch.do_connect:
        connection = listener(dialect, record, arguments, parameters)
        if connection is not None:
            return connection
    return dialect.connect(*arguments, **parameters)


def _listeners_of(host: Engine, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    """Run the host's listeners for new connections, which may set a role or a search path, for example."""
    for listener in list(getattr(host.pool.dispatch.connect, "listeners", ())):
        listener(dbapi_connection, record)


@lru_cache(maxsize=1000)
def in_schema(statement: str, dialect: Dialect, schema: str | None) -> str:
    """Return *statement* with the schema before each of our tables, even if it was written as text."""
    if schema is None:
        return statement
    quoted = dialect.identifier_preparer.quote(schema)
    return _OUR_TABLES.sub(lambda match: f"{quoted}.{match[0]}", statement)


def execute_by_driver(connection: Connection, sql: str, rows: Sequence[Any] = ((),)) -> tuple[int, Any]:
    """Execute *sql* without SQLAlchemy, except for errors: it takes most of a short statement's time.

    :param rows: parameters of each execution, as the driver takes them.
    :returns: how many rows were written, if *sql* writes; and the rows it returns, if it is executed once.
    """
    cursor = connection.connection.cursor()
    try:
        found: Any = []
        if len(rows) == 1:
            connection.dialect.do_execute(cursor, sql, rows[0])
            found = cursor.fetchall() if cursor.description else []
        else:
            connection.dialect.do_executemany(cursor, sql, rows)
    except BaseException as exc:  # a killed greenlet also leaves an unusable connection
        connection._handle_dbapi_exception(exc, sql, None, cursor, None)
    count: int = cursor.rowcount
    cursor.close()
    return count, found


#: Our table names where no schema precedes them; not the index names that end with a table name.
_OUR_TABLES = re.compile(r"(?<![\w.'\"])(?:" + "|".join(Base.metadata.tables) + r")\b")


def _timeouts(url: URL) -> dict[str, Any]:
    return dict(LIBPQ_TIMEOUTS) if url.get_driver_name() in LIBPQ_DRIVERS else {}


# -- SQLite -------------------------------------------------------------------------------------------------


def _prepare_sqlite(wal: bool, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    dbapi_connection.isolation_level = None  # we issue BEGIN ourselves, see _sqlite_transaction
    cursor = dbapi_connection.cursor()
    if wal:
        cursor.execute("PRAGMA journal_mode=WAL")
    # For this connection, and only in WAL mode: pages written repeatedly are copied to the file once per 16
    # MB of log instead of once per 4, which saves claim and record a fifth.
    cursor.execute("PRAGMA wal_autocheckpoint=4000")
    cursor.execute("PRAGMA foreign_keys=ON")
    # FULL: a registration we have confirmed survives a power failure too. It costs one fsync of the log per
    # commit, measured at 0.3 ms against 0.02 ms for NORMAL, which only survives the death of the process;
    # ingest and record commit per batch and hardly notice. Claims use durable=False: a lost lease is free.
    cursor.execute("PRAGMA synchronous=FULL")
    record.info["rq_webhooks_busy_ms"] = cursor.execute("PRAGMA busy_timeout").fetchone()[0]
    # Without WAL, a power failure may damage a file that is written with less than FULL.
    record.info["rq_webhooks_wal"] = cursor.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    cursor.close()


def _sqlite_transaction(
    info: Mapping[Any, Any], writes: bool, busy_timeout_s: float | None, durable: bool
) -> tuple[list[str], list[str]]:
    """Return the statements that begin a transaction, and those that restore its connection."""
    # A transaction that reads first and writes later cannot wait for another writer (SQLITE_BUSY at once);
    # BEGIN IMMEDIATE waits its turn.
    begin, restore = ["BEGIN IMMEDIATE" if writes else "BEGIN"], []
    if busy_timeout_s is not None:
        begin.insert(0, f"PRAGMA busy_timeout={int(busy_timeout_s * 1000)}")
        restore.append(f"PRAGMA busy_timeout={info['rq_webhooks_busy_ms']}")
    if not durable and info["rq_webhooks_wal"]:
        begin.insert(0, "PRAGMA synchronous=NORMAL")
        restore.append("PRAGMA synchronous=FULL")
    return begin, restore


# -- PostgreSQL ---------------------------------------------------------------------------------------------


#: SQLSTATEs after which a connection is dropped: read-only transaction, shutdown, crash, starting up, idle.
_CONNECTION_IS_USELESS = frozenset({"25006", "57P01", "57P02", "57P03", "57P05"})


def _begin_postgresql(durable: bool, limits_idle: bool, in_order: bool) -> list[str]:
    settings = [] if limits_idle else [LIMIT_IDLE]
    if not durable:
        settings.append("set_config('synchronous_commit', 'off', true)")
    if in_order:
        settings += [f"set_config('enable_{sort}', 'off', true)" for sort in ("sort", "incremental_sort")]
    return [f"SELECT {', '.join(settings)}"] if settings else []


def _note_use(dbapi_connection: Any, record: ConnectionPoolEntry, _state: object) -> None:
    record.info["rq_webhooks_used_at"] = time.monotonic()
    if dbapi_connection.autocommit:
        dbapi_connection.autocommit = False


def _ping_after_rest(
    dialect: Dialect, dbapi_connection: Any, record: ConnectionPoolEntry, _proxy: PoolProxiedConnection
) -> None:
    if record.info.pop("rq_webhooks_new", False):
        return
    rested_s = time.monotonic() - record.info.get("rq_webhooks_used_at", 0.0)
    if getattr(_checkout, "repeated", False) and rested_s < PING_AFTER_S:
        return
    try:
        dialect.do_ping(dbapi_connection)
    except dialect.loaded_dbapi.Error as exc:
        raise InvalidatePoolError from exc  # the pool reconnects, and invalidates its other connections
    if _is_read_only(dbapi_connection) and not record.info.get("rq_webhooks_read_only"):
        raise InvalidatePoolError  # a former primary: the address may point to the new one by now


def _is_read_only(dbapi_connection: Any) -> bool:
    """Return whether the server is read-only now; PostgreSQL 14 and later report this without being asked."""
    status = getattr(getattr(dbapi_connection, "info", None), "parameter_status", None)
    return status is not None and "on" in (status("in_hot_standby"), status("default_transaction_read_only"))
