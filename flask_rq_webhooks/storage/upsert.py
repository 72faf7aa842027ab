"""``INSERT … ON CONFLICT`` on both databases, and how much one statement takes.

Owns the one place where the two dialects' insert constructs are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.dialects import postgresql, sqlite

from .database import Database
from .models import Base

Insert = postgresql.Insert | sqlite.Insert

#: Rows per statement; SQLite takes 32766 parameters in one.
_CHUNK = 1000


def chunks_of(rows: Sequence[Any]) -> Iterator[list[Any]]:
    """Give *rows* in lists that one statement can take."""
    for start in range(0, len(rows), _CHUNK):
        yield list(rows[start : start + _CHUNK])


def insert_into(database: Database, model: type[Base]) -> Insert:
    """Return the insert construct that knows ``ON CONFLICT`` on this database."""
    return sqlite.insert(model) if database.is_sqlite else postgresql.insert(model)


def insert_or_ignore(database: Database, model: type[Base]) -> Insert:
    """Return an insert that leaves rows out which would violate any unique constraint."""
    return insert_into(database, model).on_conflict_do_nothing()


def insert_or_update(
    database: Database,
    model: type[Base],
    values: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    index: Sequence[str],
    changes: Mapping[str, Any],
    where: ColumnElement[bool] | None = None,
) -> Insert:
    """Return an insert that changes the row which is already there.

    :param values: the row, or rows, to insert.
    :param index: columns of the unique constraint that decides.
    :param changes: what the existing row gets.
    :param where: change the existing row only where this holds.
    """
    return (
        insert_into(database, model)
        .values(values)
        .on_conflict_do_update(index_elements=list(index), set_=dict(changes), where=where)
    )
