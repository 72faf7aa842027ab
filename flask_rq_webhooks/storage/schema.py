"""Create or upgrade our tables, for hosts without migrations (``flask rq-webhooks init-db``).

Owns the comparison of the live database with the models. Between our own versions a schema only ever
grows: missing tables, columns and indexes are made, nothing is changed or dropped, and a database that
migrations keep up to date needs nothing from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Connection, Index, Table, inspect, text
from sqlalchemy.schema import CreateColumn
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from .database import Database
from .models import Base

#: Any number; init-db processes at once on PostgreSQL wait for each other by it.
_ADVISORY_LOCK = 0x7271_7768


@dataclass(frozen=True, slots=True)
class SchemaChanges:
    """What is missing in a database, or was made there."""

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
    """Return what the database lacks, and change nothing.

    :raises StorageUnavailableError: when the database cannot be reached.
    """
    with database.read() as connection:
        return _compare(connection, database.schema)


def upgrade_schema(database: Database) -> SchemaChanges:
    """Make the tables, columns and indexes that are missing, in one transaction; return what was made.

    May be repeated, also by several processes at once. A column added to a table with rows gets its
    default there.

    :raises StorageUnavailableError: when the database cannot be reached or stays locked.
    """
    with database.write() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        missing = _compare(connection, database.schema)
        for table in Base.metadata.sorted_tables:
            if table.name in missing.tables:
                table.create(connection)
                continue
            for column in table.columns:
                if f"{table.name}.{column.name}" in missing.columns:
                    _add_column(connection, table, column)
            for index in table.indexes:
                if index.name in missing.indexes:
                    index.create(connection)
    return missing


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
        # Not by name: migrations name indexes by the host's convention.
        live_indexes = {
            (
                tuple(index["column_names"]),
                any(key.endswith("_where") for key in index.get("dialect_options", ())),
            )
            for index in inspector.get_indexes(table.name, schema=schema)
        }
        indexes += sorted(str(index.name) for index in table.indexes if _shape(index) not in live_indexes)
    return SchemaChanges(tuple(tables), tuple(columns), tuple(indexes))


def _shape(index: Index) -> tuple[tuple[str, ...], bool]:
    """Return what tells *index* from the others of its table: its columns, and whether it is partial."""
    return tuple(index.columns.keys()), index.dialect_options["postgresql"]["where"] is not None


def _add_column(connection: Connection, table: Table, column: Column[Any]) -> None:
    dialect = connection.dialect
    declaration = str(CreateColumn(column).compile(dialect=dialect))
    if not column.nullable and column.server_default is None:
        # Rows that are already there need a value: the model's own default, or the empty one of the type.
        own = column.default.arg if isinstance(column.default, ScalarElementColumnDefault) else None
        declaration += f" DEFAULT {_literal(own if own is not None else _EMPTY[column.type.python_type])}"
    name = dialect.identifier_preparer.format_table(table)
    connection.execute(text(f"ALTER TABLE {name} ADD COLUMN {declaration}"))


_EMPTY: dict[type, Any] = {str: "", bytes: "", int: 0, float: 0, bool: False, datetime: "1970-01-01 00:00:00"}


def _literal(value: str | float | bool) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower()  # SQLite knows true and false, too
