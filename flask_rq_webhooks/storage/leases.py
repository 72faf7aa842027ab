"""Leases that end without an attempt: deliveries are put off, given back, or freed.

Claims begin them (:mod:`.claims`), recording ends them (:mod:`.attempts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import text, update

from .claims import ClaimedDelivery
from .database import Database
from .models import CANCELED, PENDING, SENDING, Delivery

_FREE: dict[str, Any] = {"status": PENDING, "lease_id": None, "lease_until": None}


def defer(database: Database, claimed: Sequence[ClaimedDelivery], *, delay_s: float) -> int:
    """Put claimed deliveries off without spending an attempt, as for a rate limit.

    :returns: how many were still held.
    """
    return _let_go(database, claimed, _FREE | {"next_attempt_at": database.clock(delay_s)})


def release(database: Database, claimed: Sequence[ClaimedDelivery]) -> int:
    """Give claimed deliveries back, due at once; return how many were still held."""
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
            if freed < len(ids):  # one that was canceled meanwhile is free for resend and recover again
                connection.execute(
                    update(Delivery)
                    .where(*of_this, Delivery.status == CANCELED)
                    .values(lease_id=None, lease_until=None)
                )
            held += freed
    return held


def free_leases(database: Database, lease_ids: Sequence[str]) -> int:
    """Make due again whatever is held under these leases; return how many."""
    with database.write(durable=False) as connection:
        return connection.execute(
            update(Delivery)
            .where(Delivery.status == text("'sending'"), Delivery.lease_id.in_(lease_ids))
            .values(_FREE)
        ).rowcount


def free_expired_leases(database: Database) -> int:
    """Make deliveries due again whose lease expired; return how many."""
    with database.write(single_statement=True, durable=False) as connection:
        return connection.execute(
            update(Delivery)
            .where(Delivery.status == text("'sending'"), Delivery.lease_until < database.clock())
            .values(_FREE)
        ).rowcount
