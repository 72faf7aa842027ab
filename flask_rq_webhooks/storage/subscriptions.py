"""Which endpoints get an event, and the deliveries that makes.

Owns the rows of endpoints as ingest sees them, the choice among them, and the rows of new deliveries. Knows
nothing of how bodies are rendered, and nothing of watches but which endpoint they belong to.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select

from ..protocol.events import (
    CLOCK_SKEW,
    JOB_PROGRESS,
    OPERATOR_TYPES,
    WEBHOOK_PING,
    Occurrence,
    is_wanted,
    parse_time,
)
from ..protocol.payloads import JSON, Rendered, as_rendered
from .attempts import PROGRESS_ATTEMPTS
from .bulk_insert import chunks_of, insert_new, one_of
from .database import Database
from .models import CANCELED, CLOSED, PENDING, SCHEDULED, Delivery, Endpoint, new_id

if TYPE_CHECKING:
    from .events import StoredEvent

logger = logging.getLogger(__name__)

#: Ends the token of jobs that only standing endpoints get events of (``ATTACH="all"``).
NO_ENDPOINT_SUFFIX = "_all"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRow:
    """What rendering may know of an endpoint: no URL, no secret, no header."""

    id: str
    kind: str
    host: str
    events: tuple[str, ...] | None
    scope: str
    format: str
    reference: str | None
    runid: str | None
    max_attempts: int | None
    created_at: datetime

    def wants(self, event_type: str) -> bool:
        """Say whether the endpoint gets events of *event_type*."""
        return is_wanted(event_type, self.events)


def is_endpoint(endpoint_id: str | None) -> bool:
    """Say whether a callback's token names an endpoint, or only that standing ones may get its events."""
    return endpoint_id is not None and not endpoint_id.endswith(NO_ENDPOINT_SUFFIX)


def endpoint_row(row: Any) -> EndpointRow:
    """Return what rendering may know, from a row of :data:`ENDPOINT_COLUMNS`."""
    events = None if row.events is None else tuple(json.loads(row.events))
    return EndpointRow(**{**row._mapping, "events": events})


ENDPOINT_COLUMNS = tuple(getattr(Endpoint, one.name) for one in fields(EndpointRow))


def endpoints_of(
    database: Database,
    connection: Connection,
    stored: Sequence[StoredEvent],
    watches: Mapping[str, Sequence[Any]],
) -> dict[str, EndpointRow]:
    """Return, by id, the endpoints that are named with the events or watch their jobs."""
    ids = {endpoint_id for event in stored for endpoint_id in event.named if is_endpoint(endpoint_id)}
    ids |= {row.endpoint_id for rows in watches.values() for row in rows if row.endpoint_id is not None}
    query = (
        select(*ENDPOINT_COLUMNS)
        .where(one_of(database, Endpoint.id, "ids"))
        .order_by(Endpoint.id)
        .with_for_update(read=True, key_share=True)  # pruning must not take one before its delivery is there
    )
    endpoints: dict[str, EndpointRow] = {}
    for chunk in chunks_of(sorted(ids)):
        endpoints.update((row.id, endpoint_row(row)) for row in connection.execute(query, {"ids": chunk}))
    for event in stored:
        for endpoint_id in event.named:
            if endpoint_id not in endpoints and is_endpoint(endpoint_id):
                logger.warning(
                    "The endpoint %r of job %r does not exist here (pruned, or another app's); ignored.",
                    endpoint_id,
                    event.occurrence.job_id,
                )
    return endpoints


def standing_endpoints(connection: Connection) -> list[EndpointRow]:
    """Return the standing endpoints that are enabled."""
    query = (
        select(*ENDPOINT_COLUMNS)
        .where(Endpoint.kind == "standing", Endpoint.enabled)
        .order_by(Endpoint.id)
        .with_for_update(read=True, key_share=True)
    )
    return [endpoint_row(row) for row in connection.execute(query)]


def wanted_by_standing(connection: Connection, event_types: Iterable[str]) -> frozenset[str]:
    """Return those of *event_types* to which enabled standing endpoints subscribe by name or by ``"*"``."""
    named: set[str] = set()
    query = select(Endpoint.events).where(Endpoint.kind == "standing", Endpoint.enabled)
    for events in connection.execute(query).scalars():
        named |= set(json.loads(events or "[]"))
    return frozenset(one for one in event_types if is_wanted(one, named))


def existing_endpoints(connection: Connection, ids: Iterable[str | None]) -> set[str]:
    """Return those of *ids* that are there, locked against pruning."""
    found: set[str] = set()
    for chunk in chunks_of(sorted(endpoint_id for endpoint_id in ids if endpoint_id is not None)):
        query = select(Endpoint.id).where(Endpoint.id.in_(chunk)).with_for_update(read=True, key_share=True)
        found.update(connection.execute(query).scalars())
    return found


def receivers_of(
    event: StoredEvent,
    watches: Sequence[Any],
    endpoints: Mapping[str, EndpointRow],
    standing: Sequence[EndpointRow],
) -> list[EndpointRow]:
    """Return every endpoint that gets *event*, each once."""
    occurrence = event.occurrence
    if occurrence.type == WEBHOOK_PING:  # a test of the named endpoint, whatever it listens for
        return [endpoints[endpoint_id] for endpoint_id in event.named if endpoint_id in endpoints]
    chosen = {endpoint_id: endpoints[endpoint_id] for endpoint_id in event.named if endpoint_id in endpoints}
    began = _began_at(occurrence)
    for watch in watches:
        endpoint = endpoints.get(watch.endpoint_id)
        if endpoint is None or watch.status == CLOSED or occurrence.scope == "tree":
            continue  # a tree is reported to the one endpoint it was evaluated for
        counts = began is None or began >= endpoint.created_at - CLOCK_SKEW
        if counts or watch.run == occurrence.run:  # it was noted as one that counts, whatever the clocks say
            chosen[endpoint.id] = endpoint
    if event.created:
        chosen.update((endpoint.id, endpoint) for endpoint in standing)
    return [
        endpoint
        for endpoint in chosen.values()
        if (endpoint.scope == occurrence.scope or occurrence.type in OPERATOR_TYPES)
        and endpoint.wants(occurrence.type)
    ]


def _began_at(occurrence: Occurrence) -> datetime | None:
    if occurrence.enqueued_at is not None:
        return occurrence.enqueued_at
    try:
        return parse_time((occurrence.run or "").removeprefix("created:"))
    except ValueError:
        return None


def delivery_values(
    event_id: str,
    event_type: str,
    endpoint: EndpointRow,
    made: bytes | Rendered,
    *,
    max_attempts: int,
    now: datetime,
    trigger: str = SCHEDULED,
) -> dict[str, Any]:
    """Return the row of a new delivery, due at once."""
    body, content_type = as_rendered(made)
    allowed = endpoint.max_attempts or max_attempts
    return {
        "id": new_id("dlv"),
        "event_id": event_id,
        "endpoint_id": endpoint.id,
        "host": endpoint.host,
        "event_type": event_type,
        "status": PENDING,
        "trigger": trigger,
        "body": body,
        "content_type": None if content_type == JSON else content_type,
        "attempts": 0,
        "max_attempts": min(allowed, PROGRESS_ATTEMPTS) if event_type == JOB_PROGRESS else allowed,
        "next_attempt_at": now,
        "created_at": now,
    }


def store_deliveries(
    database: Database, connection: Connection, rows: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Insert those of *rows* whose event and endpoint have no delivery yet; return how many by event id."""
    in_order = sorted(rows, key=lambda row: (row["event_id"], row["endpoint_id"]))
    new = insert_new(database, connection, Delivery, in_order)
    return Counter(row["event_id"] for row in in_order if row["id"] in new)


def canceled_now(database: Database) -> dict[str, Any]:
    """Return the values that cancel a delivery. The lease stays: its sender may still record the attempt."""
    return {"status": CANCELED, "next_attempt_at": None, "finished_at": database.clock()}
