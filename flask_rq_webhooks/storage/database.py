"""Our own engine: a small pool beside the host's; never the host's session, connection or transaction.

Owns how a connection is opened and how a transaction begins on each database, and turns the errors that
:mod:`.sql_errors` explains into :exc:`~flask_rq_webhooks.errors.StorageUnavailableError`. Holds no statements
about our tables beyond creating them.
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

#: Seconds a SQLite writer waits for another one, and a pool for a free connection.
BUSY_TIMEOUT = 5.0

#: Seconds after which PostgreSQL ends a transaction of ours that has stopped: the locks of a machine that was
#: cut off would otherwise hold up all others for as long as TCP waits, two hours by default.
IDLE_IN_TRANSACTION_S = 30
#: The expression that says so, for one transaction: behind a pooler the session is the host's in the next
#: moment.
LIMIT_IDLE = f"set_config('idle_in_transaction_session_timeout', '{IDLE_IN_TRANSACTION_S}s', true)"

#: Options of libpq: a server that vanished without closing its connections is noticed within seconds, too.
LIBPQ_DRIVERS = frozenset({"psycopg", "psycopg2"})
LIBPQ_TIMEOUTS = {
    "connect_timeout": int(BUSY_TIMEOUT),
    "tcp_user_timeout": int(BUSY_TIMEOUT * 1000),
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

#: Seconds of rest after which a pooled connection to PostgreSQL is checked even where the caller would try
#: again: one that was used a moment ago is hardly ever dead, and a check costs a round trip.
PING_AFTER_S = 1.0

#: What the thread that takes a connection from the pool says about itself.
_checkout = threading.local()

#: The first SQLite with ``RETURNING``, which claiming and ingesting are built on.
MINIMUM_SQLITE = (3, 35, 0)


class Database:
    """Our tables on one database, through our own engine.

    :param url: SQLAlchemy URL. An in-memory SQLite gets a database of its own, created at once.
    :param host: the host's engine for this database. Connections are then opened exactly as it opens them:
        ``connect_args``, ``creator``, listeners for ``do_connect`` and ``connect``.
    :param connect_args: passed to the driver, without *host*.
    :param schema: where our tables are, when it is not the default schema.
    :param own_file: nobody else uses this SQLite file, so that it may be switched to WAL; never with *host*.
    :param pool_size: connections kept; as many again may be opened for a moment.
    :raises ConfigurationError: when SQLite itself is too old.
    """

    #: Host the last claim of this process ended with; the next one begins behind it. A hint, not state.
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
        #: Whether a transaction that has only read keeps no writer waiting.
        self.reads_freely = not self.is_sqlite
        # SQLite has one writer at a time, and those who wait ask again after growing pauses; threads of one
        # process take turns instead. In memory one connection is shared by all, so readers do as well.
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
                # The one used last has its pages and prepared statements at hand.
                "pool_use_lifo": True,
                "pool_timeout": BUSY_TIMEOUT,
            }
            if not self.is_sqlite:
                # The statements are written for it, whatever the server's or the host's default is.
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
        """Open one transaction that writes; commit at the end, roll back on an exception.

        :param busy_timeout_s: SQLite: wait no longer than this for another writer.
        :param single_statement: the caller executes exactly one statement. PostgreSQL then runs it as a
            transaction of its own, which saves the round trips of ``BEGIN`` and ``COMMIT``.
        :param durable: ``False``: the database need not wait for the disk. What is written survives the death
            of this process, and may be undone by that of the machine the database is on. PostgreSQL waits
            all the same for a *single_statement*, unless that says otherwise itself.
        :param repeated: the caller does it again if the connection turns out to be dead. PostgreSQL is then
            not asked whether one is alive that was used within :data:`PING_AFTER_S`.
        :param limits_idle: the caller's first statement contains :data:`LIMIT_IDLE`: one round trip less.
        :param optimistic: SQLite: keep no other writer waiting before the caller's first write, which fails
            if another one has written since the caller's first read.
        :param in_order: PostgreSQL: walk an index in its order rather than sort. With statistics of a time
            when nothing was due, sorting what little there is seems cheaper, and each look reads it all; with
            those of a long backlog, sorting the rows of one host does.
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
        # READ COMMITTED takes a new snapshot per statement anyway; so BEGIN and ROLLBACK are saved.
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
                    # Not by SQLAlchemy's isolation levels, for which psycopg has to wait again and again.
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
        # Only BEGIN can say that a transaction is READ COMMITTED where the default is another level.
        record.info["rq_webhooks_isolated"] = isolation != "read committed"
        record.info["rq_webhooks_new"] = True
        record.info["rq_webhooks_read_only"] = _is_read_only(dbapi_connection)
        if getattr(dbapi_connection, "prepare_threshold", None) is not None:  # psycopg 3
            if pid != dbapi_connection.info.backend_pid:
                self._stop_preparing("a connection pooler stands between us and the server")
            if not self._prepares:
                dbapi_connection.prepare_threshold = None

    def _stop_preparing(self, why: str) -> None:
        """Use no prepared statements: in the next transaction a pooler may lead to a server without them."""
        if self._prepares:
            self._prepares = False
            logger.warning(
                "%r: %s; flask_rq_webhooks does without prepared statements from now on. The host's engine "
                'wants connect_args={"prepare_threshold": None} there.',
                self.url, why,
            )  # fmt: skip

    def _judge_connection(self, context: ExceptionContext) -> None:
        """Drop connections that lead to a server which cannot write, and those with lost statements."""
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
        """After a fork, leave the parent its connections, and the turn that one of its threads may have.

        Decided by the process id: servers such as uWSGI fork without Python's hooks.
        """
        self._pid = os.getpid()
        self._turn = threading.RLock()
        self.engine.dispose(close=False)

    def clock(self, offset_s: float = 0.0) -> ColumnElement[datetime]:
        """Return the database's clock as an expression, *offset_s* seconds from now.

        Leases of several machines are compared by it alone. It advances inside a transaction.
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
            there = inspect(connection).get_table_names(schema=self.schema)
            for table in Base.metadata.sorted_tables:
                if table.name not in there:
                    table.create(connection)

    def dispose(self) -> None:
        """Close every pooled connection."""
        # The one in memory is shared: closed while a thread executes on it, it takes the process down.
        with self._turn if self.in_memory else nullcontext():
            self.engine.dispose()


def _connect_as(host: Engine, record: ConnectionPoolEntry) -> Any:
    """Open a connection exactly as the host's engine does, but with our time limits where it sets none."""
    creator: Any = host.pool._creator
    # What create_engine made has no other way to its arguments; a creator of the host's own has none of them.
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
    """Do what the host does with each connection it opens, such as setting a role or a search path."""
    for listener in list(getattr(host.pool.dispatch.connect, "listeners", ())):
        listener(dbapi_connection, record)


@lru_cache(maxsize=1000)
def in_schema(statement: str, dialect: Dialect, schema: str | None) -> str:
    """Return *statement* with the schema before each of our tables, in those written as text, too."""
    if schema is None:
        return statement
    quoted = dialect.identifier_preparer.quote(schema)
    return _OUR_TABLES.sub(lambda match: f"{quoted}.{match[0]}", statement)


def execute_by_driver(connection: Connection, sql: str, rows: Sequence[Any] = ((),)) -> tuple[int, Any]:
    """Execute *sql* without SQLAlchemy, whose part of a short statement is the longer one, but for errors.

    :param rows: parameters of each execution, as the driver takes them.
    :returns: how many rows were written, where *sql* writes; and those it returns, where it is executed once.
    """
    cursor = connection.connection.cursor()
    try:
        found: Any = []
        if len(rows) == 1:
            connection.dialect.do_execute(cursor, sql, rows[0])
            found = cursor.fetchall() if cursor.description else []
        else:
            connection.dialect.do_executemany(cursor, sql, rows)
    except BaseException as exc:  # the end of a greenlet, too, leaves a connection that is good for nothing
        connection._handle_dbapi_exception(exc, sql, None, cursor, None)
    count: int = cursor.rowcount
    cursor.close()
    return count, found


#: The names of our tables where no schema stands before them; not the indexes, whose names end with them.
_OUR_TABLES = re.compile(r"(?<![\w.'\"])(?:" + "|".join(Base.metadata.tables) + r")\b")


def _timeouts(url: URL) -> dict[str, Any]:
    return dict(LIBPQ_TIMEOUTS) if url.get_driver_name() in LIBPQ_DRIVERS else {}


# -- SQLite -------------------------------------------------------------------------------------------------


def _prepare_sqlite(wal: bool, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    dbapi_connection.isolation_level = None  # we say BEGIN ourselves, see _sqlite_transaction
    cursor = dbapi_connection.cursor()
    if wal:
        cursor.execute("PRAGMA journal_mode=WAL")
    # Of this connection, and where the file is in WAL mode: pages written again and again travel to the file
    # once per 16 MB of log instead of once per 4, a fifth of what claiming and recording cost.
    cursor.execute("PRAGMA wal_autocheckpoint=4000")
    cursor.execute("PRAGMA foreign_keys=ON")
    # FULL: a registration we answered for survives a power failure too. One fsync of the log per commit,
    # measured 0.3 ms against 0.02 ms for NORMAL, which only survives the death of the process; ingest and
    # record commit per batch and do not feel it. Claims say durable=False: a lease that is undone is free.
    cursor.execute("PRAGMA synchronous=FULL")
    record.info["rq_webhooks_busy_ms"] = cursor.execute("PRAGMA busy_timeout").fetchone()[0]
    # Without WAL a power failure may damage a file that is written with less than FULL.
    record.info["rq_webhooks_wal"] = cursor.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    cursor.close()


def _sqlite_transaction(
    info: Mapping[Any, Any], writes: bool, busy_timeout_s: float | None, durable: bool
) -> tuple[list[str], list[str]]:
    """Return what begins a transaction, and what leaves its connection as it was."""
    # A transaction that reads first and writes later cannot wait for another writer (SQLITE_BUSY at
    # once); one that says IMMEDIATE waits its turn.
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
        raise InvalidatePoolError from exc  # the pool connects anew, and trusts none of its others
    if _is_read_only(dbapi_connection) and not record.info.get("rq_webhooks_read_only"):
        raise InvalidatePoolError  # a former primary: the address may lead to the new one by now


def _is_read_only(dbapi_connection: Any) -> bool:
    """Return whether the server takes no writes now; it reports that unasked, from PostgreSQL 14 on."""
    status = getattr(getattr(dbapi_connection, "info", None), "parameter_status", None)
    return status is not None and "on" in (status("in_hot_standby"), status("default_transaction_read_only"))
