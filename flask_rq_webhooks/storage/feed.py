"""The feed of events, in an order that the database decides (``GET /api/events?after=``).

Every event has a ``position``: microseconds of the database's clock, made to rise by at least one from event
to event. Ids cannot order the feed, as they begin with the clock of whichever dispatcher made them. A cursor
is a position; a reader never sees one beyond which an event may still appear:

- SQLite has one writer at a time, so positions are committed in their order.
- On PostgreSQL transactions end in any order. A writer holds a shared advisory lock, whose key is the second
  it began in, before it chooses positions. A reader first notes the clock, then looks at these locks, and
  reads no further than the first second somebody still holds. Nobody waits for anybody, and long
  transactions of the host do not hold the feed up.

Events stored before there were positions have 0 and keep the order of their ids.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime

from sqlalchemy import BigInteger, Connection, String, bindparam, func, literal, select, text, tuple_

from .database import Database
from .models import Event, UTCDateTime
from .queries import EVENT_COLUMNS, CursorError, EventView, Page, bounded

#: First key of the advisory locks; any number that nobody else uses.
LOCK_CLASS = 0x7271_7769
#: The second key is a 32-bit number: seconds since this one of the Unix time.
LOCK_EPOCH_S = 1_500_000_000

#: What is inside a cursor: ``1`` and the id of an event, as given out before there were positions; or ``2``,
#: a position and an id.
_CURSOR = re.compile(r"1(?P<old>\w+)|2(?P<position>\d{1,18})\.(?P<id>\w+)", re.ASCII)


def first_position(database: Database, connection: Connection) -> tuple[datetime, int]:
    """Return the database's clock, and the position of the first event this transaction stores.

    The events after it count up by one. Call this in the transaction that stores them.
    """
    if database.is_sqlite:
        now = datetime.now(UTC)
        last = connection.execute(_LAST).scalar_one() or 0
        return now, max(last + 1, int(now.timestamp() * 1_000_000))
    now, position, last = connection.execute(_ENTER).one()
    if last is not None and last >= position:
        # The clock was set back, as by a failover. The lock is held now, so this is the last one there is.
        position = connection.execute(_LAST).scalar_one() + 1
    return now.astimezone(UTC), position


def events_after(
    database: Database,
    *,
    cursor: str | None = None,
    runid: str | None = None,
    event_type: str | None = None,
    limit: int = 50,
) -> Page[EventView]:
    """Return the events after *cursor*, oldest first: the feed for clients that were down.

    :param cursor: of the last answer; ``None`` for the beginning.
    :returns: a page whose cursor continues where it ends, also when it is empty.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    wanted = ((Event.type, event_type), (Event.runid, runid))
    query = select(*EVENT_COLUMNS, Event.payload, Event.position).where(
        *(column == value for column, value in wanted if value is not None)
    )
    if cursor is not None:
        position, event_id = _read(cursor)
        after = tuple_(literal(position, BigInteger), literal(event_id, String))
        query = query.where(tuple_(Event.position, Event.id) > after)
    query = query.order_by(Event.position, Event.id).limit(bounded(limit))
    with database.read() as connection:
        if not database.is_sqlite:
            query = query.where(Event.position < connection.execute(_HORIZON).scalar_one())
        found = connection.execute(query).all()
    items = tuple(EventView(**{name: row._mapping[name] for name in _FIELDS}) for row in found)
    return Page(items, _cursor_of(found[-1].position, found[-1].id) if found else cursor)


_FIELDS = [column.key for column in EVENT_COLUMNS] + ["payload"]

_LAST = select(func.max(Event.position))

# The columns are computed from left to right: the lock is held when the clock is read for the position.
_ENTER = (
    text("""
SELECT clock_timestamp() AS now,
       greatest(
           (:epoch + s.second) * 1000000, CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)
       ) AS position,
       (SELECT max(position) FROM rq_webhooks_event) AS last
FROM (
    SELECT second, pg_advisory_xact_lock_shared(:class, CAST(second AS integer)) FROM (
        SELECT CAST(floor(extract(epoch FROM clock_timestamp())) AS bigint) - :epoch AS second OFFSET 0
    ) began OFFSET 0
) s
""")
    .columns(now=UTCDateTime, position=BigInteger, last=BigInteger)
    .bindparams(bindparam("epoch", LOCK_EPOCH_S, BigInteger), bindparam("class", LOCK_CLASS))
)

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


def _cursor_of(position: int, event_id: str) -> str:
    return base64.urlsafe_b64encode(f"2{position}.{event_id}".encode()).decode().rstrip("=")


def _read(cursor: str) -> tuple[int, str]:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        match = _CURSOR.fullmatch(raw.decode("ascii"))
    except (binascii.Error, ValueError):
        match = None
    if match is None:
        raise CursorError("this cursor did not come from this list")
    if match["old"] is not None:
        return 0, match["old"]
    return int(match["position"]), match["id"]
