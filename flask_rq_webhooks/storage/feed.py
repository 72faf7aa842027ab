"""The feed: every event in the order the database gave it, for clients that were down.

Knows nothing of deliveries: an event is in the feed whether or not anything was sent for it.
"""

from __future__ import annotations

import base64
import binascii
import re

from sqlalchemy import BigInteger, String, bindparam, literal, select, text, tuple_

from .database import Database
from .events import LOCK_CLASS, LOCK_EPOCH_S
from .models import Event
from .queries import EVENT_COLUMNS, CursorError, EventView, Page, bounded

#: What is inside a cursor: ``1`` and the id of an event, as given out before there were positions; or ``2``,
#: a position and an id.
_FEED_CURSOR = re.compile(r"1(?P<old>\w+)|2(?P<position>\d{1,18})\.(?P<id>\w+)", re.ASCII)


def events_after(
    database: Database,
    *,
    cursor: str | None = None,
    runid: str | None = None,
    event_type: str | None = None,
    tenant: str | None = None,
    limit: int = 50,
) -> Page[EventView]:
    """Return the events after *cursor*, oldest first: the feed for clients that were down.

    :param cursor: of the last answer; ``None`` for the beginning.
    :param tenant: only events of this tenant.
    :returns: a page whose cursor continues where it ends, also when it is empty.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    wanted = ((Event.type, event_type), (Event.runid, runid), (Event.tenant, tenant))
    query = select(*EVENT_COLUMNS, Event.payload, Event.position).where(
        *(column == value for column, value in wanted if value is not None)
    )
    if cursor is not None:
        position, event_id = _read_feed_cursor(cursor)
        after = tuple_(literal(position, BigInteger), literal(event_id, String))
        query = query.where(tuple_(Event.position, Event.id) > after)
    query = query.order_by(Event.position, Event.id).limit(bounded(limit))
    with database.read() as connection:
        if not database.is_sqlite:
            query = query.where(Event.position < connection.execute(_HORIZON).scalar_one())
        found = connection.execute(query).all()
    items = tuple(EventView(**{name: row._mapping[name] for name in _EVENT_FIELDS}) for row in found)
    return Page(items, _feed_cursor(found[-1].position, found[-1].id) if found else cursor)


_EVENT_FIELDS = [column.key for column in EVENT_COLUMNS] + ["payload"]

# statement_timestamp() is earlier than the look at the locks: a transaction that takes its lock later gets
# a later position.
_HORIZON = (
    text("""
SELECT least(
    greatest(CAST(extract(epoch FROM statement_timestamp()) * 1000000 AS bigint),
             1 + (SELECT max(position) FROM rq_webhooks_event)),
    (SELECT (:epoch + min(CAST(objid AS bigint))) * 1000000 FROM pg_locks
     WHERE locktype = 'advisory' AND classid = CAST(:class AS oid) AND objsubid = 2
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
) AS horizon
""")
    .columns(horizon=BigInteger)
    .bindparams(bindparam("epoch", LOCK_EPOCH_S, BigInteger), bindparam("class", LOCK_CLASS, BigInteger))
)


def _feed_cursor(position: int, event_id: str) -> str:
    return base64.urlsafe_b64encode(f"2{position}.{event_id}".encode()).decode().rstrip("=")


def _read_feed_cursor(cursor: str) -> tuple[int, str]:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        match = _FEED_CURSOR.fullmatch(raw.decode("ascii"))
    except (binascii.Error, ValueError):
        match = None
    if match is None:
        raise CursorError("this cursor did not come from this list")
    if match["old"] is not None:
        return 0, match["old"]
    return int(match["position"]), match["id"]
