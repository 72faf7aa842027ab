"""The pipeline's SQL under one name, in the order the data flows.

:mod:`~.ingesting` (an occurrence becomes an event and its deliveries) → :mod:`~.claiming` (due deliveries
are leased to a sender) → :mod:`~.recording` (an attempt and what follows from it) and, beside them,
:mod:`~.operating` (what people do with deliveries). Holds nothing of its own.
"""

from __future__ import annotations

from .claiming import ClaimedDelivery, claim_due, defer, free_expired_leases, next_due_in, release
from .ingesting import EndpointRow, IngestedEvent, IngestItem, ingest, park_evidence
from .operating import DeliveryFilter, cancel, hasten, prune, recover, resend
from .recording import AttemptRecord, RecordResult, record_attempts

__all__ = [
    "AttemptRecord",
    "ClaimedDelivery",
    "DeliveryFilter",
    "EndpointRow",
    "IngestItem",
    "IngestedEvent",
    "RecordResult",
    "cancel",
    "claim_due",
    "defer",
    "free_expired_leases",
    "hasten",
    "ingest",
    "next_due_in",
    "park_evidence",
    "prune",
    "record_attempts",
    "recover",
    "release",
    "resend",
]
