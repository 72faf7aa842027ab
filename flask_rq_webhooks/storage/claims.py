"""Claim: lease due deliveries to one sender, fairly across hosts.

Owns the two claim statements and every change to a lease until its attempt is recorded. Knows nothing of
senders.

How a claim stays fast and fair with a million deliveries due:

1. *oldest*: read the first :data:`WINDOW` due rows of the index on ``next_attempt_at``. If there are fewer,
   they are all that is due, and their hosts are the candidates.
2. Otherwise take hosts *in turn*. A recursive walk jumps from host to host in the index on
   ``(host, next_attempt_at)``, starting after the host this process claimed last, and stops at as many due
   hosts as rows are wanted. So neither the alphabet nor an old backlog decides who is served, and the
   cost depends on the rows wanted, not on the rows due.
3. *slots*: for each candidate, take the rows it has room for, ranked by how many requests the host would
   then have in flight; the lowest ranks win, and among equals the longest due.
4. PostgreSQL locks exactly those rows with ``SKIP LOCKED``, so that concurrent dispatchers share a host's
   backlog instead of waiting for each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    Connection,
    Float,
    Integer,
    String,
    TextClause,
    bindparam,
    select,
    text,
    update,
)

from ..protocol.payloads import JSON
from .bulk_insert import documents_of, fetch_rows, insert_new
from .database import Database
from .models import CANCELED, PENDING, SENDING, SHARED, Delivery, Dispatcher, UTCDateTime, new_id

#: If this many rows are due, or more, hosts are taken in turn.
WINDOW = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedDelivery:
    """A delivery held by one sender until it is recorded, deferred, or released, or its lease ends.

    :param lease_id: proves that the row is still held.
    :param number: number of the attempt to make, from 1.
    :param runid: the host's name for the run; the endpoint's takes precedence over the event's.
    :param headers: the endpoint's custom headers, an encrypted JSON object.
    :param secrets: the live secrets, encrypted, newest first.
    :param trace: trace that the request continues: the event's, or that of the endpoint's own request if it
        is a different trace.
    :param retry_schedule: the endpoint's own schedule, a JSON list; likewise *retry_statuses*.
    """

    id: str
    lease_id: str
    number: int
    trigger: str
    max_attempts: int
    body: bytes = field(repr=False)
    content_type: str
    host: str
    event_id: str
    event_type: str
    job_id: str | None
    runid: str | None
    endpoint_id: str
    endpoint_kind: str
    url: str = field(repr=False)
    headers: str | None = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    sign_payload: bool
    format: str
    timeout_s: float | None
    retry_schedule: str | None
    retry_statuses: str | None
    tenant: str | None
    trace: str | None = field(repr=False)


def claim_due(
    database: Database,
    *,
    limit: int,
    per_host: int,
    in_flight: Mapping[str, int],
    lease_s: float,
    lease_id: str | None = None,
) -> list[ClaimedDelivery]:
    """Lease due deliveries to the caller; none while sending is paused.

    May return fewer than are due if another dispatcher is claiming them at the same time.

    :param limit: maximum number of deliveries: the caller's free slots.
    :param per_host: requests the caller may have in flight per host.
    :param in_flight: how many requests the caller has in flight, by host.
    :param lease_s: seconds after which the deliveries are free again, on the database's clock.
    :param lease_id: a new one by default. A caller that provides its own can free what was claimed even if
        the answer was lost (:func:`free_leases`).
    """
    if limit < 1:
        return []
    lease_id = lease_id or new_id("lea")
    after = database.claim_after
    parameters: dict[str, Any] = {
        "limit": limit,
        "per_host": per_host,
        "in_flight": json.dumps({host: count for host, count in in_flight.items() if count > 0}),
        "window": WINDOW,
        "after": after,
        "lease_id": lease_id,
    }
    if database.is_sqlite:
        with database.write(durable=False) as connection:
            now = database.now(connection)
            parameters |= {"now": now, "lease_until": now + timedelta(seconds=lease_s)}
            ids = list(connection.execute(_CLAIM_SQLITE, parameters).scalars())
            rows: Sequence[Any] = _loaded(database, connection, ids, lease_id) if ids else []
            turns = [(row[_HOST] <= after, row[_HOST]) for row in rows]
    else:
        with database.write(durable=False, repeated=True, in_order=True) as connection:
            rows = connection.execute(_CLAIM_POSTGRESQL, parameters | {"lease_s": lease_s}).all()
            # Do not compare host names here: the database's collation may differ.
            turns = [(False, row[-1]) for row in rows]
    if rows:
        # The last host of the walk; hosts found after it started over come after all others.
        database.claim_after = rows[max(range(len(rows)), key=turns.__getitem__)][_HOST]
    return _claimed(rows, lease_id)


def store_claimed(
    database: Database, connection: Connection, rows: Sequence[Mapping[str, Any]], lease_id: str
) -> list[ClaimedDelivery]:
    """Insert deliveries that are leased to one sender from the start; return those that were new.

    :param rows: at least one, all with the same keys.
    """
    if database.is_sqlite:
        new = sorted(insert_new(database, connection, Delivery, rows))
        return _claimed(_loaded(database, connection, new, lease_id), lease_id)
    statement = _store_postgresql(tuple(rows[0]))
    parts = (fetch_rows(database, connection, statement, {"rows": some}) for some in documents_of(rows))
    return _claimed([row for part in parts for row in part], lease_id)


def _loaded(database: Database, connection: Connection, ids: Sequence[str], lease_id: str) -> list[Any]:
    these = {"lease_id": lease_id, "ids": json.dumps(ids), "now": database.now(connection)}
    return fetch_rows(database, connection, _LOAD_SQLITE, these)


def defer(database: Database, claimed: Sequence[ClaimedDelivery], *, delay_s: float) -> int:
    """Postpone claimed deliveries without using up an attempt, for example for a rate limit.

    :returns: how many were still held.
    """
    return _let_go(database, claimed, _FREE | {"next_attempt_at": database.clock(delay_s)})


def release(database: Database, claimed: Sequence[ClaimedDelivery]) -> int:
    """Release claimed deliveries, so that they are due at once; return how many were still held."""
    return _let_go(database, claimed, _FREE)


def _let_go(database: Database, claimed: Sequence[ClaimedDelivery], values: Mapping[str, Any]) -> int:
    by_lease: dict[str, list[str]] = {}
    for delivery in claimed:
        by_lease.setdefault(delivery.lease_id, []).append(delivery.id)
    if not by_lease:
        return 0
    held = 0
    with database.write(durable=False) as connection:
        for lease_id, ids in sorted(by_lease.items()):
            of_this = (Delivery.id.in_(ids), Delivery.lease_id == lease_id)
            freed = connection.execute(
                update(Delivery).where(*of_this, Delivery.status == SENDING).values(values)
            ).rowcount
            if freed < len(ids):  # those canceled in the meantime can be resent and recovered again
                connection.execute(
                    update(Delivery)
                    .where(*of_this, Delivery.status == CANCELED)
                    .values(lease_id=None, lease_until=None)
                )
            held += freed
    return held


def free_leases(database: Database, lease_ids: Sequence[str]) -> int:
    """Make the deliveries held under these leases due again; return how many."""
    with database.write(durable=False) as connection:
        return connection.execute(
            update(Delivery)
            .where(Delivery.status == text("'sending'"), Delivery.lease_id.in_(lease_ids))
            .values(_FREE)
        ).rowcount


def free_expired_leases(database: Database) -> int:
    """Make deliveries whose lease expired due again; return how many."""
    with database.write(single_statement=True, durable=False) as connection:
        return connection.execute(
            update(Delivery)
            .where(Delivery.status == text("'sending'"), Delivery.lease_until < database.clock())
            .values(_FREE)
        ).rowcount


def next_due_in(database: Database) -> float | None:
    """Return the seconds until the next delivery is due, 0 if one is due now; ``None`` if none is waiting.

    Also ``None`` while sending is paused, since nothing is due then.
    """
    paused = select(Dispatcher.paused_at).where(Dispatcher.id == SHARED)
    with database.read() as connection:
        now, paused_at = connection.execute(select(database.clock(), paused.scalar_subquery())).one()
        due = earliest_due(database, connection)
    if due is None or paused_at is not None:
        return None
    return max(0.0, (due - now).total_seconds())


def earliest_due(database: Database, connection: Connection) -> datetime | None:
    """Return when the first pending delivery is, or was, due; ``None`` if none is waiting."""
    statement = _EARLIEST_SQLITE if database.is_sqlite else _EARLIEST_POSTGRESQL
    return connection.execute(statement).scalar_one_or_none()


_FREE: dict[str, Any] = {"status": PENDING, "lease_id": None, "lease_until": None}


def _claimed(rows: Sequence[Sequence[Any]], lease_id: str) -> list[ClaimedDelivery]:
    """Build deliveries from *rows* of :data:`_SELECTED`; each delivery has one row per live secret."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        columns = dict(zip(_COLUMNS, row, strict=False))
        by_id.setdefault(columns["id"], []).append(columns)
    return [
        ClaimedDelivery(
            **several[0]
            | {
                "lease_id": lease_id,
                "body": bytes(several[0]["body"]),  # PostgreSQL drivers use their own types
                "secrets": tuple(one["secrets"] for one in several if one["secrets"] is not None),
                "sign_payload": bool(several[0]["sign_payload"]),
            }
        )
        for several in by_id.values()
    ]


# The statements. A lease need not survive a crash of the machine, so no commit waits for the disk. 'pending'
# is a literal, not a parameter: only then do the statements match the partial indexes. In a walk, ``found``
# counts the due hosts before the row, and ``wrapped`` says that it has started over. For SQLite the index is
# named: it prefers (status, id), and then sorts a million rows. An endpoint's live secrets come newest
# first: the one that does not expire, then the one that expires last. PostgreSQL looks up what belongs to a
# claimed row in subqueries it cannot flatten (OFFSET 0): it does not know how few rows are claimed, and
# would read whole tables instead. A host's rows are selected by a range: for an equality PostgreSQL may
# choose the index without the host, because of its order.

#: Fields of a :class:`ClaimedDelivery`: from delivery ``c``, event ``v``, endpoint ``e`` and secret ``s``.
_OWN = "id trigger max_attempts body host event_id event_type endpoint_id tenant"
_OF_ENDPOINT = "url headers sign_payload format timeout_s retry_schedule retry_statuses"
_COLUMNS = {
    **{name: f"c.{name}" for name in _OWN.split()},
    **{name: f"e.{name}" for name in _OF_ENDPOINT.split()},
    "number": "c.attempts + 1",
    "content_type": f"coalesce(c.content_type, '{JSON}')",
    "job_id": "v.job_id",
    "runid": "coalesce(e.runid, v.runid)",
    "endpoint_kind": "e.kind",
    "trace": """CASE WHEN e.trace IS NULL OR substr(e.trace, 4, 32) = substr(v.trace, 4, 32) THEN v.trace
        ELSE e.trace END""",
    "secrets": "s.secret",
}
_SELECTED = ", ".join(_COLUMNS.values())
_HOST = list(_COLUMNS).index("host")
_BY_DUE_TIME = """
ORDER BY c.next_attempt_at, c.id, s.expires_at IS NOT NULL, s.expires_at DESC, s.id DESC
"""

_EARLIEST_POSTGRESQL = text("""
SELECT next_attempt_at FROM rq_webhooks_delivery
WHERE status = 'pending' ORDER BY next_attempt_at LIMIT 1
""").columns(next_attempt_at=UTCDateTime)

_EARLIEST_SQLITE = text("""
SELECT next_attempt_at FROM rq_webhooks_delivery INDEXED BY ix_rq_webhooks_delivery_next
WHERE status = 'pending' ORDER BY next_attempt_at LIMIT 1
""").columns(next_attempt_at=UTCDateTime)

_SELECT_CLAIMED = f"""
SELECT {_SELECTED}, c.turn
FROM claimed c
CROSS JOIN LATERAL (
    SELECT job_id, runid, trace FROM rq_webhooks_event WHERE id = c.event_id OFFSET 0
) v
CROSS JOIN LATERAL (
    SELECT runid, kind, url, headers, sign_payload, format, timeout_s, retry_schedule, retry_statuses, trace
    FROM rq_webhooks_endpoint WHERE id = c.endpoint_id OFFSET 0
) e
LEFT JOIN LATERAL (
    SELECT id, secret, expires_at FROM rq_webhooks_secret
    WHERE endpoint_id = c.endpoint_id AND (expires_at IS NULL OR expires_at > clock_timestamp()) OFFSET 0
) s ON true
{_BY_DUE_TIME}"""  # noqa: S608  (no value in it)


@cache
def _store_postgresql(names: tuple[str, ...]) -> TextClause:
    values = ["decode(convert_from(body, 'UTF8'), 'base64')" if name == "body" else name for name in names]
    return text(f"""
WITH claimed AS (
    INSERT INTO rq_webhooks_delivery ({", ".join(names)})
    SELECT {", ".join(values)}
    FROM json_populate_recordset(CAST(NULL AS rq_webhooks_delivery), CAST(:rows AS json))
    ON CONFLICT DO NOTHING RETURNING *, 0 AS turn
)
{_SELECT_CLAIMED}""")  # noqa: S608  (names of columns)


_CLAIM_POSTGRESQL = text(f"""
WITH RECURSIVE
busy AS MATERIALIZED (
    SELECT key AS host, value::integer AS requests FROM json_each_text(CAST(:in_flight AS json))
),
oldest AS MATERIALIZED (
    SELECT d.host FROM rq_webhooks_delivery d
    WHERE d.status = 'pending' AND d.next_attempt_at <= statement_timestamp()
      AND NOT EXISTS (
          SELECT FROM rq_webhooks_dispatcher s WHERE s.id = 'shared' AND s.paused_at IS NOT NULL)
    ORDER BY d.next_attempt_at LIMIT :window
),
many AS MATERIALIZED (
    SELECT count(*) = :window AS yes FROM oldest
),
walk(host, due, found, turn, wrapped) AS (
    SELECT CAST(:after AS text), false, 0, 0, false FROM many WHERE yes
    UNION ALL
    SELECT n.host, n.due, w.found + w.due::integer, w.turn + 1, n.wrapped
    FROM walk w CROSS JOIN LATERAL (
        SELECT h.host, h.wrapped,
               (SELECT true FROM rq_webhooks_delivery d
                WHERE d.status = 'pending' AND d.host >= h.host
                  AND (d.host, d.next_attempt_at) <= (h.host, statement_timestamp())
                ORDER BY d.host, d.next_attempt_at LIMIT 1) IS NOT NULL
               AND NOT EXISTS (SELECT FROM busy b WHERE b.host = h.host AND b.requests >= :per_host) AS due
        FROM (
            SELECT f.host, w.wrapped FROM (
                SELECT d.host FROM rq_webhooks_delivery d
                WHERE d.status = 'pending' AND d.host > w.host ORDER BY d.host LIMIT 1
            ) f WHERE NOT w.wrapped OR f.host <= :after
            UNION ALL
            SELECT f.host, true FROM (
                SELECT d.host FROM rq_webhooks_delivery d
                WHERE d.status = 'pending' AND NOT w.wrapped ORDER BY d.host LIMIT 1
            ) f WHERE f.host <= :after LIMIT 1
        ) h
    ) n
    WHERE w.found + w.due::integer < :limit
),
candidates(host, turn) AS (
    SELECT DISTINCT o.host::text, 0 FROM oldest o, many WHERE NOT many.yes
    UNION ALL SELECT host, turn FROM walk WHERE due
),
slots AS (
    SELECT c.host, c.turn, r.next_attempt_at, coalesce(b.requests, 0)
           + row_number() OVER (PARTITION BY c.host ORDER BY r.next_attempt_at) AS rank
    FROM candidates c LEFT JOIN busy b ON b.host = c.host
    CROSS JOIN LATERAL (
        SELECT d.next_attempt_at FROM rq_webhooks_delivery d
        WHERE d.status = 'pending' AND d.host >= c.host
          AND (d.host, d.next_attempt_at) <= (c.host, statement_timestamp())
        ORDER BY d.host, d.next_attempt_at
        LIMIT greatest(0, least(CAST(:limit AS integer), :per_host - coalesce(b.requests, 0)))
    ) r
),
quotas AS (
    SELECT s.host, s.turn, count(*) AS rows
    FROM (SELECT * FROM slots ORDER BY rank, next_attempt_at LIMIT :limit) s GROUP BY s.host, s.turn
),
picked AS (
    SELECT r.id, q.turn
    FROM quotas q CROSS JOIN LATERAL (
        SELECT d.id FROM rq_webhooks_delivery d
        WHERE d.status = 'pending' AND d.host >= q.host
          AND (d.host, d.next_attempt_at) <= (q.host, statement_timestamp())
        ORDER BY d.host, d.next_attempt_at LIMIT q.rows
        FOR UPDATE SKIP LOCKED
    ) r
),
claimed AS (
    UPDATE rq_webhooks_delivery AS delivery
    SET status = 'sending', lease_id = :lease_id,
        lease_until = clock_timestamp() + make_interval(secs => :lease_s)
    FROM picked WHERE delivery.id = picked.id AND delivery.status || '' = 'pending'
      AND delivery.id = ANY (ARRAY(SELECT id FROM picked))
    RETURNING delivery.*, picked.turn
)
{_SELECT_CLAIMED}""").bindparams(  # noqa: S608  (no value in it)
    bindparam("limit", type_=Integer),
    bindparam("per_host", type_=Integer),
    bindparam("window", type_=Integer),
    bindparam("after", type_=String),
    bindparam("in_flight", type_=String),
    bindparam("lease_id", type_=String),
    bindparam("lease_s", type_=Float),
)

_CLAIM_SQLITE = text("""
WITH RECURSIVE
busy(host, requests) AS MATERIALIZED (SELECT key, value FROM json_each(:in_flight)),
oldest(host) AS MATERIALIZED (
    SELECT d.host FROM rq_webhooks_delivery d INDEXED BY ix_rq_webhooks_delivery_next
    WHERE d.status = 'pending' AND d.next_attempt_at <= :now
      AND NOT EXISTS (
          SELECT 1 FROM rq_webhooks_dispatcher s WHERE s.id = 'shared' AND s.paused_at IS NOT NULL)
    ORDER BY d.next_attempt_at LIMIT :window
),
many(yes) AS MATERIALIZED (SELECT count(*) = :window FROM oldest),
walk(host, due, found, wrapped) AS (
    SELECT :after, 0, 0, 0 FROM many WHERE yes
    UNION ALL
    SELECT n.host,
           EXISTS (SELECT 1 FROM rq_webhooks_delivery d INDEXED BY ix_rq_webhooks_delivery_due
                   WHERE d.status = 'pending' AND d.host = n.host AND d.next_attempt_at <= :now)
           AND NOT EXISTS (SELECT 1 FROM busy b WHERE b.host = n.host AND b.requests >= :per_host),
           w.found + w.due,
           w.wrapped OR n.host <= w.host
    FROM walk w CROSS JOIN rq_webhooks_delivery n ON n.rowid = coalesce(
        (SELECT d.rowid FROM rq_webhooks_delivery d INDEXED BY ix_rq_webhooks_delivery_due
         WHERE d.status = 'pending' AND d.host > w.host ORDER BY d.host LIMIT 1),
        (SELECT d.rowid FROM rq_webhooks_delivery d INDEXED BY ix_rq_webhooks_delivery_due
         WHERE d.status = 'pending' AND NOT w.wrapped ORDER BY d.host LIMIT 1))
    WHERE w.found + w.due < :limit AND NOT ((w.wrapped OR n.host <= w.host) AND n.host > :after)
),
candidates(host) AS (
    SELECT DISTINCT o.host FROM oldest o, many WHERE NOT many.yes
    UNION ALL SELECT host FROM walk WHERE due
),
slots(row, rank, next_attempt_at) AS (
    SELECT r.rowid,
           coalesce(b.requests, 0) + row_number() OVER (PARTITION BY c.host ORDER BY r.next_attempt_at),
           r.next_attempt_at
    FROM candidates c
    LEFT JOIN busy b ON b.host = c.host
    CROSS JOIN rq_webhooks_delivery r ON r.rowid IN (
        SELECT d.rowid FROM rq_webhooks_delivery d INDEXED BY ix_rq_webhooks_delivery_due
        WHERE d.status = 'pending' AND d.host = c.host AND d.next_attempt_at <= :now
        ORDER BY d.next_attempt_at LIMIT :per_host)
)
UPDATE rq_webhooks_delivery
SET status = 'sending', lease_id = :lease_id, lease_until = :lease_until
WHERE rowid IN (
    SELECT row FROM slots WHERE rank <= :per_host ORDER BY rank, next_attempt_at LIMIT :limit)
RETURNING id
""").bindparams(bindparam("now", type_=UTCDateTime), bindparam("lease_until", type_=UTCDateTime))

_LOAD_SQLITE = text(f"""
SELECT {_SELECTED}
FROM json_each(:ids) one
CROSS JOIN rq_webhooks_delivery c ON c.id = one.value
CROSS JOIN rq_webhooks_event v ON v.id = c.event_id
CROSS JOIN rq_webhooks_endpoint e ON e.id = c.endpoint_id
LEFT JOIN rq_webhooks_secret s
    ON s.endpoint_id = c.endpoint_id AND (s.expires_at IS NULL OR s.expires_at > :now)
WHERE c.status = 'sending' AND c.lease_id = :lease_id
{_BY_DUE_TIME}""").bindparams(bindparam("now", type_=UTCDateTime))  # noqa: S608  (no value in it)
