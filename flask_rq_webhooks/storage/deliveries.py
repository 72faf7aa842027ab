"""The pipeline's SQL under one name, in the order the data flows.

:mod:`~.ingesting` (an occurrence becomes an event and its deliveries) → :mod:`~.claiming` (due deliveries
are leased to a sender) → :mod:`~.recording` (an attempt and what follows from it) and, beside them,
:mod:`~.operating` and :mod:`~.recovering` (what people do with one delivery, and with many). Holds nothing of
its own.
"""

from __future__ import annotations

from .attempts import AttemptRecord, RecordResult, record_attempts
from .bulk import cancel, recover
from .claims import (
    ClaimedDelivery,
    claim_due,
    defer,
    free_expired_leases,
    free_leases,
    next_due_in,
    release,
)
from .filters import DeliveryFilter
from .ingesting import IngestedEvent, IngestItem, ingest, park_evidence
from .retention import hasten, prune, resend
from .subscriptions import EndpointRow

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
    "free_leases",
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
