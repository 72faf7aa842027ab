"""Create or upgrade our tables, for hosts without migrations (``flask rq-webhooks init-db``).

Owns the comparison of the live database with the models. Between our versions the schema only grows: missing
tables, columns and indexes are created, nothing is changed or dropped. A database kept up to date by
migrations needs nothing from here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Connection, Index, Table, inspect, text
from sqlalchemy.schema import CreateColumn, CreateIndex
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from ..errors import StorageUnavailableError
from .database import Database
from .models import Base
from .sql_errors import DBAPIError, sqlstate, why_unavailable

_INDEXES = {str(index.name): index for table in Base.metadata.sorted_tables for index in table.indexes}

#: Seconds that a change of a table waits for its users, with new users waiting behind it; seconds until it
#: gives up. The first is more than the server's ``deadlock_timeout``, after which an autovacuum is canceled.
LOCK_TIMEOUT_S, LOCKED_S = 1.5, 60
#: SQLSTATE of a statement that waited for ``lock_timeout``.
_LOCK_NOT_AVAILABLE = "55P03"
#: Any number; concurrent init-db processes on PostgreSQL wait for each other on it.
_ADVISORY_LOCK = 0x7271_7768


@dataclass(frozen=True, slots=True)
class SchemaChanges:
    """What is missing in a database, or was created there."""

    tables: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    indexes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tables or self.columns or self.indexes)

    def lines(self) -> list[str]:
        """Return a sentence for each change."""
        return [
            *(f"table {name}" for name in self.tables),
            *(f"column {name}" for name in self.columns),
            *(f"index {name}" for name in self.indexes),
        ]


def missing_schema(database: Database) -> SchemaChanges:
    """Return what the database lacks, without changing anything.

    :raises StorageUnavailableError: when the database cannot be reached.
    """
    with database.read() as connection:
        return _compare(connection, database.schema)


def upgrade_schema(database: Database) -> SchemaChanges:
    """Create the tables, columns and indexes that are missing; return what was created.

    Safe to repeat, after an interruption and by several processes at once, while the app keeps running. Each
    step is its own transaction. PostgreSQL builds indexes without blocking reads or writes
    (``CONCURRENTLY``), and a query on a table that gets columns waits for :data:`LOCK_TIMEOUT_S` at most.
    SQLite has one writer at a time: the others wait while one index is built. A column added to a table with
    rows gets its default there.

    :raises StorageUnavailableError: when the database cannot be reached or stays locked.
    """
    made = SchemaChanges()
    with _alone(database):
        while True:
            step = _next_step(database)
            if not step:
                return made
            made = SchemaChanges(
                made.tables + step.tables, made.columns + step.columns, made.indexes + step.indexes
            )


@contextmanager
def _alone(database: Database) -> Iterator[None]:
    """Keep other processes from upgrading; on SQLite each step does this itself."""
    if database.is_sqlite:
        yield
        return
    while True:
        with database.write() as connection:
            # Polled: a statement waiting for the lock would itself be waited for by CREATE INDEX CONCURRENTLY
            # in the process that holds the lock.
            lock = text("SELECT pg_try_advisory_xact_lock(:key)")
            if connection.execute(lock, {"key": _ADVISORY_LOCK}).scalar_one():
                # It is idle while indexes are built. A session lock would stay behind in a pooler.
                connection.execute(
                    text("SELECT set_config('idle_in_transaction_session_timeout', '0', true)")
                )
                yield
                return
        time.sleep(0.2)


def _next_step(database: Database) -> SchemaChanges:
    """Create all missing tables, or one table's missing columns, or one index; return what was created."""
    deadline = time.monotonic() + LOCKED_S
    while True:
        try:
            with database.write() as connection:
                if not database.is_sqlite:
                    limit = f"SELECT set_config('lock_timeout', '{LOCK_TIMEOUT_S}s', true)"
                    connection.execute(text(limit))
                missing = _compare(connection, database.schema)
                if missing.tables or missing.columns or database.is_sqlite:
                    return _make(connection, missing)
            break
        except StorageUnavailableError as exc:
            if sqlstate(exc.__cause__ or exc) != _LOCK_NOT_AVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(LOCK_TIMEOUT_S)  # let those waiting behind us go first
    return _build_index(database, missing.indexes[0]) if missing.indexes else missing


def _make(connection: Connection, missing: SchemaChanges) -> SchemaChanges:
    tables = Base.metadata.sorted_tables
    for table in tables:
        if table.name in missing.tables:
            table.create(connection)
    if missing.tables:
        return SchemaChanges(tables=missing.tables)
    for table in tables:
        columns = {f"{table.name}.{column.name}": column for column in table.columns}
        absent = tuple(name for name in missing.columns if name in columns)
        for name in absent:
            _add_column(connection, table, columns[name])
        if absent:
            return SchemaChanges(columns=absent)
    for name in missing.indexes[:1]:
        _INDEXES[name].create(connection)
    return SchemaChanges(indexes=missing.indexes[:1])


def _build_index(database: Database, name: str) -> SchemaChanges:
    """Build an index on PostgreSQL outside a transaction, where it blocks nobody."""
    index = _INDEXES[name]
    statement = str(CreateIndex(index).compile(dialect=database.engine.dialect))
    concurrently = statement.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)
    try:
        with database.engine.connect() as pooled:
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT")
            for left in _invalid_indexes(connection, _table_of(index), database.schema):
                # An index left by an interrupted build is updated but never read.
                quoted = database.engine.dialect.identifier_preparer.quote
                schema = "" if database.schema is None else quoted(database.schema) + "."
                connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {schema}{quoted(left)}"))
            connection.execute(text(concurrently))
    except DBAPIError as exc:
        why = why_unavailable(exc, database.url, database.schema)
        if why is None:
            raise
        raise StorageUnavailableError(f"Index {name} is not complete; run init-db again. {why}") from exc
    return SchemaChanges(indexes=(name,))


def _invalid_indexes(connection: Connection, table: Table, schema: str | None) -> set[str]:
    """Return a table's indexes that PostgreSQL did not finish and that take the place of one of ours."""
    if connection.dialect.name == "sqlite":
        return set()
    query = text(
        "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON "
        "t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace "
        "WHERE NOT i.indisvalid AND t.relname = :table AND n.nspname = coalesce(:schema, current_schema())"
    )
    found = connection.execute(query, {"table": table.name, "schema": schema})
    invalid = set(found.scalars())
    if not invalid:
        return invalid
    ours = {_shape(index) for index in table.indexes}
    live = inspect(connection).get_indexes(table.name, schema=schema)
    return {str(one["name"]) for one in live if one["name"] in invalid and _live_shape(one) in ours}


def _compare(connection: Connection, schema: str | None) -> SchemaChanges:
    inspector = inspect(connection)
    live_tables = set(inspector.get_table_names(schema=schema))
    tables: list[str] = []
    columns: list[str] = []
    indexes: list[str] = []
    for table in Base.metadata.sorted_tables:
        if table.name not in live_tables:
            tables.append(table.name)
            continue
        live_columns = {column["name"] for column in inspector.get_columns(table.name, schema=schema)}
        columns += [f"{table.name}.{name}" for name in sorted(set(table.columns.keys()) - live_columns)]
        # Not compared by name: migrations name indexes by the host's convention.
        invalid = _invalid_indexes(connection, table, schema)
        live_indexes = {
            _live_shape(index)
            for index in inspector.get_indexes(table.name, schema=schema)
            if index["name"] not in invalid
        }
        indexes += sorted(str(index.name) for index in table.indexes if _shape(index) not in live_indexes)
    return SchemaChanges(tuple(tables), tuple(columns), tuple(indexes))


def _shape(index: Index) -> tuple[tuple[str, ...], bool]:
    """Return what distinguishes a table's indexes: the columns, and whether the index is partial."""
    return tuple(index.columns.keys()), index.dialect_options["postgresql"]["where"] is not None


def _live_shape(index: Any) -> tuple[tuple[str, ...], bool]:
    """Return the same for an index in the database."""
    partial = any(key.endswith("_where") for key in index.get("dialect_options", ()))
    return tuple(index["column_names"]), partial


def _table_of(index: Index) -> Table:
    assert index.table is not None  # noqa: S101  (declared in a table)
    return index.table


def _add_column(connection: Connection, table: Table, column: Column[Any]) -> None:
    dialect = connection.dialect
    declaration = str(CreateColumn(column).compile(dialect=dialect))
    if not column.nullable and column.server_default is None:
        # Existing rows need a value: the model's own default, or the type's empty value.
        own = column.default.arg if isinstance(column.default, ScalarElementColumnDefault) else None
        declaration += f" DEFAULT {_literal(own if own is not None else _EMPTY[column.type.python_type])}"
    name = dialect.identifier_preparer.format_table(table)
    connection.execute(text(f"ALTER TABLE {name} ADD COLUMN {declaration}"))


_EMPTY: dict[type, Any] = {str: "", bytes: "", int: 0, float: 0, bool: False, datetime: "1970-01-01 00:00:00"}


def _literal(value: str | float | bool) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower()  # SQLite knows true and false, too
