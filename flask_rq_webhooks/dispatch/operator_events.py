"""Events about deliveries: ``webhook.delivery_exhausted`` and ``webhook.endpoint_disabled``.

Owns which recorded attempts become such events, and what is in them. They are stored in the transaction that
records the attempt, so that a crash loses neither or both, and only where a standing endpoint subscribes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..observe.publisher import Publisher
from ..protocol.events import (
    DELIVERY_EXHAUSTED,
    ENDPOINT_DISABLED,
    OPERATOR_TYPES,
    SOURCE_APPLICATION,
    WEBHOOK_PING,
    Occurrence,
)
from ..protocol.urls import redact_url
from ..storage.attempts import AttemptRecord, RecordResult
from ..storage.events import IngestedEvent, IngestItem
from ..storage.models import EXHAUSTED
from ..storage.subscriptions import wanted_by_standing

if TYPE_CHECKING:
    from sqlalchemy import Connection

#: No events are made about deliveries of these: a failing endpoint of an operator would cause ever more.
_NOT_REPORTED = OPERATOR_TYPES | {WEBHOOK_PING}


def publish_for_operators(
    publisher: Publisher, connection: Connection, records: Sequence[AttemptRecord], result: RecordResult
) -> list[IngestedEvent]:
    """Store the events that *records* cause, in the transaction that records them.

    :returns: what :meth:`Publisher.announce` wants after the commit.
    """
    # Of two attempts of one delivery, the one under the later lease was recorded.
    newest = {one.delivery.id: one for one in sorted(records, key=lambda one: one.delivery.lease_id)}
    exhausted = [
        record
        for record in newest.values()
        if result.recorded.get(record.delivery.id) == EXHAUSTED
        and record.delivery.event_type not in _NOT_REPORTED
    ]
    if not exhausted and not result.disabled:
        return []
    wanted = wanted_by_standing(connection, OPERATOR_TYPES)
    found: list[Occurrence] = []
    if DELIVERY_EXHAUSTED in wanted:
        found += [_occurrence(DELIVERY_EXHAUSTED, _of_delivery(record)) for record in exhausted]
    if ENDPOINT_DISABLED in wanted:
        urls = {record.delivery.endpoint_id: record.delivery.url for record in records}
        found += [
            _occurrence(
                ENDPOINT_DISABLED,
                {"endpoint_id": endpoint_id, "url": redact_url(urls[endpoint_id]), "reason": reason},
            )
            for endpoint_id, reason in sorted(result.disabled.items())
        ]
    if not found:
        return []
    return publisher.publish_within(connection, [IngestItem(occurrence) for occurrence in found])


def _occurrence(event_type: str, data: dict[str, Any]) -> Occurrence:
    return Occurrence(type=event_type, occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION, data=data)


def _of_delivery(record: AttemptRecord) -> dict[str, Any]:
    delivery = record.delivery
    return {
        "delivery_id": delivery.id,
        "event_id": delivery.event_id,
        "event": delivery.event_type,
        "job_id": delivery.job_id,
        "endpoint_id": delivery.endpoint_id,
        "url": redact_url(delivery.url),
        "attempts": delivery.number,
        "error_code": record.decision.error_code,
        "status_code": record.status_code,
    }
