"""Dispatchers: which of them are alive, and the one row of state they share.

Owns heartbeats, the pause switch, the reconcile lease and the namespace of our keys in Redis. Knows
nothing of deliveries.
"""

from __future__ import annotations

import os
import secrets
import socket
from datetime import datetime
from typing import cast

from sqlalchemy import ColumnElement, delete, exists, or_, select, update

from ..version import __version__
from .bulk_insert import insert_into, insert_or_ignore
from .database import Database
from .models import ALPHABET, SHARED, Dispatcher

#: A dispatcher counts as alive for this many seconds after its last heartbeat.
ALIVE_S = 30.0


def shared_namespace(database: Database) -> str:
    """Return the namespace of our keys in Redis, generated once per SQL database.

    So two apps with two SQL databases on one Redis never touch each other's entries. Safe when several
    processes call it for the first time at once.
    """
    query = select(Dispatcher.namespace).where(Dispatcher.id == SHARED)
    with database.read() as connection:
        namespace = connection.execute(query).scalar_one_or_none()
    if namespace is not None:
        return namespace
    with database.write() as connection:
        made_up = "".join(secrets.choice(ALPHABET) for _ in range(8))
        connection.execute(insert_or_ignore(database, Dispatcher).values(id=SHARED, namespace=made_up))
        unnamed = update(Dispatcher).where(Dispatcher.id == SHARED, Dispatcher.namespace.is_(None))
        connection.execute(unnamed.values(namespace=made_up))
        return cast(str, connection.execute(query).scalar_one())


def heartbeat(database: Database, dispatcher_id: str, *, started: bool) -> None:
    """Record the heartbeat of a dispatcher.

    :param started: ``True`` with the first heartbeat of a process.
    """
    with database.write(single_statement=True) as connection:
        values = {
            "hostname": socket.gethostname()[:255],
            "pid": os.getpid(),
            "version": __version__,
            "heartbeat_at": database.clock(),
        }
        if started:
            values["started_at"] = database.clock()
        new = insert_into(database, Dispatcher).values(id=dispatcher_id, **values)
        connection.execute(new.on_conflict_do_update(index_elements=["id"], set_=values))


def sign_off(database: Database, dispatcher_id: str) -> None:
    """Delete the row of a dispatcher that shut down gracefully, and release its reconcile lease."""
    drop_reconcile_lease(database, dispatcher_id)
    with database.write(single_statement=True) as connection:
        connection.execute(delete(Dispatcher).where(Dispatcher.id == dispatcher_id, Dispatcher.id != SHARED))


def forget_dead(database: Database) -> int:
    """Delete the rows of dispatchers without a heartbeat for a day; return how many."""
    with database.write(single_statement=True) as connection:
        return connection.execute(
            delete(Dispatcher).where(
                Dispatcher.id != SHARED, Dispatcher.heartbeat_at < database.clock(-86400.0)
            )
        ).rowcount


def alive(database: Database) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for a live :class:`~.models.Dispatcher`: a heartbeat within 30 s."""
    return Dispatcher.id != SHARED, Dispatcher.heartbeat_at >= database.clock(-ALIVE_S)


def dispatcher_alive(database: Database) -> bool:
    """Return whether any dispatcher is alive."""
    with database.read() as connection:
        return bool(connection.execute(select(exists().where(*alive(database)))).scalar_one())


def pause(database: Database) -> None:
    """Stop all claiming until :func:`resume`; deliveries already claimed are still sent, within seconds."""
    shared_namespace(database)  # makes sure that the shared row exists
    with database.write(single_statement=True) as connection:
        connection.execute(
            update(Dispatcher)
            .where(Dispatcher.id == SHARED, Dispatcher.paused_at.is_(None))
            .values(paused_at=database.clock())
        )


def resume(database: Database) -> None:
    """Resume sending."""
    with database.write(single_statement=True) as connection:
        connection.execute(update(Dispatcher).where(Dispatcher.id == SHARED).values(paused_at=None))


def paused_since(database: Database) -> datetime | None:
    """Return when all sending was paused; ``None`` if it is not paused."""
    with database.read() as connection:
        return connection.execute(
            select(Dispatcher.paused_at).where(Dispatcher.id == SHARED)
        ).scalar_one_or_none()


def take_reconcile_lease(database: Database, owner: str, seconds: float) -> bool:
    """Take or extend the reconcile lease; one dispatcher at a time holds it.

    :param owner: id of the dispatcher.
    :param seconds: how long it lasts, on the database's clock.
    :returns: whether *owner* holds it now.
    """
    shared_namespace(database)  # makes sure that the shared row exists
    with database.write(single_statement=True) as connection:
        taken = connection.execute(
            update(Dispatcher)
            .where(
                Dispatcher.id == SHARED,
                or_(
                    Dispatcher.lease_owner.is_(None),
                    Dispatcher.lease_owner == owner,
                    Dispatcher.lease_until < database.clock(),
                ),
            )
            .values(lease_owner=owner, lease_until=database.clock(seconds))
        )
    return taken.rowcount == 1


def drop_reconcile_lease(database: Database, owner: str) -> None:
    """Release the reconcile lease, if *owner* holds it."""
    with database.write(single_statement=True) as connection:
        connection.execute(
            update(Dispatcher)
            .where(Dispatcher.id == SHARED, Dispatcher.lease_owner == owner)
            .values(lease_owner=None, lease_until=None)
        )
