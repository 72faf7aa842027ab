"""Events: what happened, each stored once under the key of its run.

Owns the rows of events, new ones and those that are there already. Knows nothing of who hears of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from ..protocol.events import Occurrence
from ..protocol.payloads import occurrence_from_json, occurrence_to_json
from .bulk_insert import chunks_of, insert_new
from .database import Database
from .models import Event, new_id


@dataclass(frozen=True, slots=True)
class IngestItem:
    """One occurrence and who is known to want it.

    :param endpoint_ids: endpoints named by whoever brings the word: they count whenever the run began.
        Endpoints that watch the job, and standing ones, are found here. Ids that do not exist are ignored.
    """

    occurrence: Occurrence
    endpoint_ids: tuple[str, ...] = ()


@dataclass(slots=True)
class StoredEvent:
    """An event that is in SQL now, with all that a batch says about it.

    :param created: ``False`` when it was there already.
    :param named: endpoints that whoever brought the word has named.
    :param deliveries: how many deliveries are new.
    """

    id: str
    occurrence: Occurrence
    created: bool
    named: list[str]
    deliveries: int = 0


def store_events(
    database: Database, connection: Connection, items: Sequence[IngestItem], now: datetime
) -> tuple[list[StoredEvent], list[StoredEvent]]:
    """Insert what is new and load what is not; return the event of each item, and each event once."""
    by_key: dict[str, StoredEvent] = {}
    by_item: list[StoredEvent] = []
    for item in items:
        key = item.occurrence.run_key
        event = by_key.get(key) if key is not None else None
        if event is None:
            event = StoredEvent(new_id("evt"), item.occurrence, created=True, named=[])
            if key is not None:
                by_key[key] = event
        event.named += [endpoint_id for endpoint_id in item.endpoint_ids if endpoint_id not in event.named]
        by_item.append(event)
    stored = list({event.id: event for event in by_item}.values())
    # In the order of their keys: two dispatchers with the same entries wait for each other, not in a circle.
    stored.sort(key=lambda event: event.occurrence.run_key or "")
    rows = [_event_values(event, now) for event in stored]
    inserted = insert_new(database, connection, Event, rows)
    there = sorted(key for key, event in by_key.items() if event.id not in inserted)
    for keys in chunks_of(there):
        query = (
            select(Event.id, Event.run_key, Event.payload)
            .where(Event.run_key.in_(keys))
            .with_for_update(read=True, key_share=True)  # as with endpoints, see endpoints_of
        )
        for event_id, key, payload in connection.execute(query):
            event = by_key[str(key)]
            event.id, event.created, event.occurrence = event_id, False, occurrence_from_json(payload)
    return by_item, stored


def _event_values(event: StoredEvent, now: datetime) -> dict[str, Any]:
    occurrence = event.occurrence
    return {
        "id": event.id,
        "type": occurrence.type,
        "run_key": occurrence.run_key,
        "job_id": occurrence.job_id,
        "runid": _storable(occurrence.runid),
        "source": occurrence.source,
        "supersedes": occurrence.supersedes,
        "payload": occurrence_to_json(occurrence),
        "occurred_at": occurrence.occurred_at,
        "created_at": now,
    }


def _storable(text: str | None) -> str | None:
    """Return *text* without what PostgreSQL's text or UTF-8 cannot hold; the payload keeps it escaped."""
    if text is None:
        return None
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
