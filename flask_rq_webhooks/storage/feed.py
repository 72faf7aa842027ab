"""The feed: all events in the order assigned by the database, for clients that were down.

Knows nothing of deliveries: an event is in the feed whether or not anything was sent for it.

The database orders the feed, because event ids begin with the clock of the dispatcher that made them. Every
event has a ``position``: microseconds of the database's clock, at least one more than the previous event's. A
cursor is a position; a reader never gets one before which an event may still appear:

- SQLite has one writer at a time, so positions are committed in order.
- On PostgreSQL transactions end in any order. Before choosing positions, a writer takes a shared advisory
  lock whose key is the second it began in. A reader first notes the clock, then looks at these locks, and
  reads no further than the first second that is still locked. No reader or writer waits for another, and long
  transactions of the host do not hold up the feed.

Events stored before positions existed have position 0 and are ordered by id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy import BigInteger, Connection, String, bindparam, literal, select, text, tuple_

from .bulk_insert import fetch_rows
from .database import LIMIT_IDLE, Database
from .models import Event
from .queries import EVENT_COLUMNS, EventView, Page, bounded, read_cursor, write_cursor

#: First key of the advisory locks; any number that nobody else uses.
LOCK_CLASS = 0x7271_7769
#: The second key is a 32-bit number: seconds since this Unix time.
LOCK_EPOCH_S = 1_500_000_000
#: The same for the advisory locks of jobs.
JOB_LOCK_CLASS = 0x7271_7770


def take_locks(database: Database, connection: Connection, jobs: Sequence[str]) -> int:
    """Return the lowest position that an event of this transaction may get.

    A transaction that stores events of these jobs waits here for others that do, always in the same order.
    The feed's lock is already held when the next statement reads the clock for the position.
    """
    least: int = fetch_rows(database, connection, _LOCK, {"jobs": list(jobs)})[0][0]
    return least


_LOCK = text(f"""
SELECT (:epoch + s.second) * 1000000 AS least, {LIMIT_IDLE},
       (SELECT count(pg_advisory_xact_lock(:job_class, key)::text) FROM (
           SELECT DISTINCT hashtext(job) AS key FROM unnest(CAST(:jobs AS text[])) AS job ORDER BY key
       ) AS keys) AS locked
FROM (
    SELECT second, pg_advisory_xact_lock_shared(:class, CAST(second AS integer)) FROM (
        SELECT CAST(floor(extract(epoch FROM clock_timestamp())) AS bigint) - :epoch AS second OFFSET 0
    ) began OFFSET 0
) s
""").bindparams(  # noqa: S608  (no value in it)
    bindparam("epoch", LOCK_EPOCH_S, BigInteger),
    bindparam("class", LOCK_CLASS),
    bindparam("job_class", JOB_LOCK_CLASS),
)

#: The content of a cursor: ``1`` and an event id, as issued before positions existed; or ``2``, a position
#: and an id.
_CURSOR = re.compile(r"(?:1|2(?P<position>\d{1,18})\.)(?P<id>\w+)", re.ASCII)


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

    :param cursor: from the last answer; ``None`` for the beginning.
    :param tenant: only events of this tenant.
    :returns: a page whose cursor continues where it ends, even if the page is empty.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    wanted = ((Event.type, event_type), (Event.runid, runid), (Event.tenant, tenant))
    query = select(*EVENT_COLUMNS, Event.payload, Event.position).where(
        *(column == value for column, value in wanted if value is not None)
    )
    if cursor is not None:
        match = read_cursor(cursor, _CURSOR)
        after = tuple_(literal(int(match["position"] or 0), BigInteger), literal(match["id"], String))
        query = query.where(tuple_(Event.position, Event.id) > after)
    query = query.order_by(Event.position, Event.id).limit(bounded(limit))
    with database.read() as connection:
        if not database.is_sqlite:
            query = query.where(Event.position < connection.execute(_HORIZON).scalar_one())
        found = connection.execute(query).all()
    items = tuple(EventView(**{name: row._mapping[name] for name in _EVENT_FIELDS}) for row in found)
    return Page(items, write_cursor(f"2{found[-1].position}.{found[-1].id}") if found else cursor)


_EVENT_FIELDS = [column.key for column in EVENT_COLUMNS] + ["payload"]

# statement_timestamp() is earlier than reading the locks: a transaction that takes its lock later gets a
# later position.
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
