"""``INSERT … ON CONFLICT`` for both databases, size limits of one statement, and passing rows to the driver.

The only place that chooses between the two dialects' insert constructs.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    CTE,
    Boolean,
    ColumnElement,
    Connection,
    Dialect,
    LargeBinary,
    Select,
    String,
    Text,
    TypeDecorator,
    bindparam,
    cast,
    column,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from ..protocol.events import format_time
from .database import Database, execute_by_driver, in_schema
from .models import Base, UTCDateTime

Insert = postgresql.Insert | sqlite.Insert
_Column = ColumnElement[Any] | InstrumentedAttribute[Any]

#: Rows per statement; SQLite allows 32766 parameters in one.
_CHUNK = 1000
#: Characters per statement of rows sent as JSON, unless a single row has more.
_MAX_CHARACTERS = 8_000_000


def chunks_of(rows: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield *rows* in lists that fit into one statement."""
    for start in range(0, len(rows), _CHUNK):
        yield list(rows[start : start + _CHUNK])


class Texts(TypeDecorator[list[str]]):
    """Any number of strings as one parameter: an array, or JSON where the database has no arrays."""

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind: TypeEngine[Any] = String() if dialect.name == "sqlite" else postgresql.ARRAY(String)
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: list[str] | None, dialect: Dialect) -> Any:
        return json.dumps(value) if dialect.name == "sqlite" else value


class _OneOf(FunctionElement[bool]):
    """A condition that works on both databases, so that statements can be built once, at import time."""

    inherit_cache = True
    name = "one_of"
    type = Boolean()


@compiles(_OneOf)
def _one_of_array(element: _OneOf, compiler: SQLCompiler, **options: Any) -> str:
    value, texts = (compiler.process(one, **options) for one in element.clauses)
    return f"{value} = ANY ({texts})"


@compiles(_OneOf, "sqlite")
def _one_of_json(element: _OneOf, compiler: SQLCompiler, **options: Any) -> str:
    value, texts = (compiler.process(one, **options) for one in element.clauses)
    return f"{value} IN (SELECT value FROM json_each({texts}))"  # noqa: S608  (two compiled expressions)


def one_of(column: _Column, name: str) -> ColumnElement[bool]:
    """Return the condition that *column* is one of the strings passed in the single parameter *name*."""
    return _OneOf(column, bindparam(name, type_=Texts))


def insert_into(database: Database, model: type[Base]) -> Insert:
    """Return the insert construct that supports ``ON CONFLICT`` on this database."""
    return sqlite.insert(model) if database.is_sqlite else postgresql.insert(model)


def insert_or_ignore(database: Database, model: type[Base]) -> Insert:
    """Return an insert that skips rows that would violate a unique constraint."""
    return _INSERT_OR_IGNORE[database.is_sqlite](model)


# Built once: building a statement costs as much as executing it.
_INSERT_OR_IGNORE: dict[bool, Callable[[type[Base]], Insert]] = {
    False: lru_cache(lambda model: postgresql.insert(model).on_conflict_do_nothing()),
    True: lru_cache(lambda model: sqlite.insert(model).on_conflict_do_nothing()),
}


def insert_new(
    database: Database,
    connection: Connection,
    model: type[Base],
    rows: Sequence[Mapping[str, Any]],
    *,
    before: CTE | None = None,
    values: Mapping[str, Any] | None = None,
) -> set[str]:
    """Insert those of *rows* that violate no unique constraint; return their ids.

    The statement is the same for any number of rows. One with a list of values per row would differ for
    every number of rows: drivers and PostgreSQL would parse it anew, taking four times as long
    (``benchmarks/stages.py``), and SQLite's driver would cache a hundred of them, some dozens of megabytes.

    :param rows: all with the same keys; column defaults are not applied.
    :param before: PostgreSQL: executed in the same round trip, once for each part that *rows* is split into.
    :param values: parameters of *before*.
    """
    if not rows:
        return set()
    if database.is_sqlite:
        insertion = insert_or_ignore(database, model)
        count = sum(execute_rows(database, connection, insertion, some) for some in chunks_of(rows))
    else:
        statement = _insert_from_json(model, tuple(rows[0]), before)
        given = dict(values or {})
        documents = ({"rows": document} | given for document in documents_of(rows))
        count = sum(execute_rows(database, connection, statement, [document]) for document in documents)
    ids = [row["id"] for row in rows]
    if count == len(ids):
        return set(ids)
    there = _select_ids(model)
    return {found for some in chunks_of(ids) for found in connection.execute(there, {"ids": some}).scalars()}


def execute_rows(
    database: Database, connection: Connection, statement: Any, rows: Sequence[Mapping[str, Any]]
) -> int:
    """Execute *statement* through the driver, compiled only once; return how many rows were written.

    :param rows: parameters of each execution, at least one, all with the same keys.
    """
    sql, bind = _for_driver(statement, tuple(rows[0]), connection.dialect, database.schema)
    return execute_by_driver(connection, sql, [bind(row) for row in rows])[0]


def fetch_rows(
    database: Database, connection: Connection, statement: Any, values: Mapping[str, Any]
) -> list[Any]:
    """Execute *statement* as :func:`execute_rows` does, and return its rows as the driver returns them."""
    sql, bind = _for_driver(statement, tuple(values), connection.dialect, database.schema)
    rows: list[Any] = execute_by_driver(connection, sql, [bind(values)])[1]
    return rows


@lru_cache(maxsize=100)
def _for_driver(
    statement: Any, names: tuple[str, ...], dialect: Dialect, schema: str | None
) -> tuple[str, Callable[[Mapping[str, Any]], Any]]:
    """Return the driver's SQL for *statement*, and a function that converts a row of parameters *names*."""
    compiled = statement.compile(dialect=dialect, column_keys=list(names))
    fixed = {name: bind.value for name, bind in compiled.binds.items()}
    converters = [
        (name, lru_cache(_CHUNK)(convert) if isinstance(bind.type, UTCDateTime) else convert)
        for name, bind in compiled.binds.items()
        if (convert := bind.type.dialect_impl(dialect).bind_processor(dialect))
    ]

    def bind(row: Mapping[str, Any]) -> Any:
        values = {**fixed, **row}
        for name, convert in converters:
            values[name] = convert(values[name])
        return [values[name] for name in compiled.positiontup] if compiled.positional else values

    return in_schema(compiled.string, dialect, schema), bind


def _id_of(model: type[Base]) -> ColumnElement[str]:
    return model.__table__.c["id"]


@lru_cache
def _select_ids(model: type[Base]) -> Select[Any]:
    return select(_id_of(model)).where(one_of(_id_of(model), "ids"))


@lru_cache
def _insert_from_json(model: type[Base], names: tuple[str, ...], before: CTE | None) -> Insert:
    table = model.__table__
    binary = {name for name in names if isinstance(table.c[name].type, LargeBinary)}
    columns = [column(name, Text() if name in binary else table.c[name].type) for name in names]
    document = cast(bindparam("rows", type_=String), postgresql.JSON())
    made = func.json_to_recordset(document).table_valued(*columns).render_derived(with_types=True)
    values = [func.decode(made.c[name], "base64") if name in binary else made.c[name] for name in names]
    statement = postgresql.insert(model).from_select(names, select(*values))
    statement = statement.on_conflict_do_nothing()
    return statement if before is None else statement.add_cte(before)


def documents_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield *rows* as JSON arrays that each fit into one statement; bytes are in base64."""
    part: list[str] = []
    characters = 0
    for row in rows:
        text = _ENCODER.encode(row)
        if part and (len(part) == _CHUNK or characters + len(text) > _MAX_CHARACTERS):
            yield f"[{','.join(part)}]"
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    yield f"[{','.join(part)}]"


def _in_json(value: datetime | bytes) -> str:
    return b64encode(value).decode("ascii") if isinstance(value, bytes) else format_time(value)


_ENCODER = json.JSONEncoder(default=_in_json, ensure_ascii=False)
