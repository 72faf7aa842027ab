"""Events about deliveries: ``webhook.delivery_exhausted`` and ``webhook.endpoint_disabled``.

Owns which recorded attempts become such events, and what is in them. They are stored in the transaction that
records the attempt, so that a crash loses neither or both, and only where a standing endpoint subscribes.
Those about a tenant's endpoint are the tenant's events, with no more than a client may know.
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
from ..protocol.retry import coarse_code
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
    tenants = {record.delivery.tenant for record in records if record.delivery.tenant is not None}
    wanted = wanted_by_standing(publisher.database, connection, OPERATOR_TYPES, tenants)

    def is_wanted(event_type: str, tenant: str | None) -> bool:
        return event_type in wanted.get(None, ()) or event_type in wanted.get(tenant, ())

    found = [
        IngestItem(_occurrence(DELIVERY_EXHAUSTED, _of_delivery(record)), tenant=record.delivery.tenant)
        for record in exhausted
        if is_wanted(DELIVERY_EXHAUSTED, record.delivery.tenant)
    ]
    of_endpoint = {record.delivery.endpoint_id: record.delivery for record in records}
    for endpoint_id, reason in sorted(result.disabled.items()):
        delivery = of_endpoint[endpoint_id]
        if is_wanted(ENDPOINT_DISABLED, delivery.tenant):
            data = {"endpoint_id": endpoint_id, "url": redact_url(delivery.url), "reason": reason}
            found.append(IngestItem(_occurrence(ENDPOINT_DISABLED, data), tenant=delivery.tenant))
    return publisher.publish_within(connection, found) if found else []


def _occurrence(event_type: str, data: dict[str, Any]) -> Occurrence:
    return Occurrence(type=event_type, occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION, data=data)


def _of_delivery(record: AttemptRecord) -> dict[str, Any]:
    delivery, code = record.delivery, record.decision.error_code
    return {
        "delivery_id": delivery.id,
        "event_id": delivery.event_id,
        "event": delivery.event_type,
        "job_id": delivery.job_id,
        "endpoint_id": delivery.endpoint_id,
        "url": redact_url(delivery.url),
        "attempts": delivery.number,
        "error_code": code if delivery.tenant is None else coarse_code(code),
        "status_code": record.status_code,
    }
