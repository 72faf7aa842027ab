"""Which deliveries: the filter that lists, recover and cancel share.

Owns the translation into indexed conditions. Holds no statements.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, select

from .models import Delivery, Event, first_id_at


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFilter:
    """Deliveries that meet every condition given.

    :param since: made at this time or later (aware).
    :param until: made before this time (aware).
    :param statuses: one of these.
    :param job_id: of the event.
    :param runid: of the event.
    """

    since: datetime | None = None
    until: datetime | None = None
    endpoint_id: str | None = None
    statuses: tuple[str, ...] | None = None
    host: str | None = None
    event_type: str | None = None
    event_id: str | None = None
    job_id: str | None = None
    runid: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions on :class:`~.models.Delivery`.

        Times become bounds of the id, which begins with the time it was made: so every list walks one
        index and needs no other for times.
        """
        found: list[ColumnElement[bool]] = []
        if self.since is not None:
            found.append(Delivery.id >= first_id_at("dlv", self.since))
        if self.until is not None:
            found.append(Delivery.id < first_id_at("dlv", self.until))
        if self.endpoint_id is not None:
            found.append(Delivery.endpoint_id == self.endpoint_id)
        if self.statuses is not None:
            found.append(
                Delivery.status == self.statuses[0]
                if len(self.statuses) == 1
                else Delivery.status.in_(self.statuses)
            )
        if self.host is not None:
            found.append(Delivery.host == self.host)
        if self.event_type is not None:
            found.append(Delivery.event_type == self.event_type)
        if self.event_id is not None:
            found.append(Delivery.event_id == self.event_id)
        if self.job_id is not None:
            found.append(Delivery.event_id.in_(select(Event.id).where(Event.job_id == self.job_id)))
        if self.runid is not None:
            found.append(Delivery.event_id.in_(select(Event.id).where(Event.runid == self.runid)))
        return found
