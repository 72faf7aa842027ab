"""Ingest: an occurrence becomes an event and its deliveries, exactly once.

Owns the order of the steps within the one transaction: the event (:mod:`.events`), who hears of it and the
deliveries that makes (:mod:`.addressing`), the watches that are settled by it (:mod:`.settling`). Knows
nothing of where occurrences come from, and leaves rendering to a function it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..protocol.events import JOB_FAILURE, JOB_SUCCESS, Occurrence
from .database import Database
from .events import IngestItem, store_events
from .settling import park_evidence, settle_watches, watches_of
from .subscriptions import (
    EndpointRow,
    delivery_values,
    endpoints_of,
    receivers_of,
    standing_endpoints,
    store_deliveries,
)

__all__ = ["IngestItem", "IngestedEvent", "Render", "Scrub", "ingest", "park_evidence"]

Render = Callable[[EndpointRow, str, Occurrence], bytes]
Scrub = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class IngestedEvent:
    """What became of an item.

    :param created: ``False`` when the event was there already.
    :param deliveries: how many deliveries are new.
    """

    event_id: str
    type: str
    job_id: str | None
    created: bool
    deliveries: int


def ingest(
    database: Database,
    items: Sequence[IngestItem],
    *,
    render: Render,
    max_attempts: int,
    scrub: Scrub | None = None,
) -> list[IngestedEvent]:
    """Store events and their deliveries in one transaction; doing it again changes nothing.

    A run has one terminal event, whoever tells of it and however many do so at once; an endpoint named for
    an event that is already there gets its missing delivery, rendered from what was stored. Standing
    endpoints get a delivery of new events only, and only while enabled: what happens while one is disabled
    is left to :func:`~.recovering.recover`.

    All or nothing: where *render* or *scrub* raises, nothing of the batch is stored. The caller then
    brings the items one by one, so that one that cannot be told never holds up the others.

    :param render: the bytes to deliver, from endpoint, event id and occurrence.
    :param max_attempts: where the endpoint itself sets none.
    :param scrub: the host's function; it gets a dict with ``event``, ``job_id``, ``runid``, ``func``,
        ``queue`` and ``result``, ``error`` or ``data``, and returns it changed (or changes it in place).
        What it does to ``runid``, ``result``, ``error`` and ``data`` is stored, sent and shown.
    :returns: one for each item, in their order.
    """
    if not items:
        return []
    prepared = [
        item if scrub is None else replace(item, occurrence=_scrubbed(item.occurrence, scrub))
        for item in items
    ]
    with database.write() as connection:
        now = database.now(connection)
        by_item, stored = store_events(database, connection, prepared, now)
        watches = watches_of(database, connection, stored)
        endpoints = endpoints_of(database, connection, stored, watches)
        standing = standing_endpoints(connection) if any(event.created for event in stored) else []
        rows: list[dict[str, Any]] = []
        for event in stored:
            receivers = receivers_of(
                event, watches.get(event.occurrence.job_id or "", []), endpoints, standing
            )
            for endpoint in receivers:
                body = render(endpoint, event.id, event.occurrence)
                rows.append(
                    delivery_values(
                        event.id, event.occurrence.type, endpoint, body, max_attempts=max_attempts, now=now
                    )
                )
        made = store_deliveries(database, connection, rows)
        for event in stored:
            event.deliveries = made.get(event.id, 0)
        settle_watches(database, connection, stored, watches, endpoints, now)
    first_seen: set[str] = set()
    told = []
    for event in by_item:
        told.append(
            IngestedEvent(
                event_id=event.id,
                type=event.occurrence.type,
                job_id=event.occurrence.job_id,
                created=event.created and event.id not in first_seen,
                deliveries=event.deliveries if event.id not in first_seen else 0,
            )
        )
        first_seen.add(event.id)
    return told


def _scrubbed(occurrence: Occurrence, scrub: Scrub) -> Occurrence:
    payload: dict[str, Any] = {
        "event": occurrence.type,
        "job_id": occurrence.job_id,
        "runid": occurrence.runid,
        "func": occurrence.func,
        "queue": occurrence.queue,
    }
    if occurrence.type == JOB_SUCCESS:
        payload["result"] = copy.deepcopy(occurrence.result)
    if occurrence.type == JOB_FAILURE:
        payload["error"] = copy.deepcopy(dict(occurrence.error)) if occurrence.error is not None else None
    if occurrence.data:
        payload["data"] = copy.deepcopy(dict(occurrence.data))
    edited = scrub(payload)
    if edited is None:
        edited = payload
    return replace(
        occurrence,
        runid=edited.get("runid"),
        result=edited.get("result"),
        error=edited.get("error"),
        data=edited.get("data") or {},
    )
