"""What is being sent, and how much of it to each host.

Owns the counts the sender claims by. Used from the sender's thread and from the transport's.
"""

from __future__ import annotations

import threading
from collections import Counter

from ..storage.claims import ClaimedDelivery


class InFlight:
    """Deliveries given to the transport whose answers are still to come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: dict[tuple[str, str], ClaimedDelivery] = {}
        self._per_host: Counter[str] = Counter()
        #: Answers that have come since the beginning.
        self.answered = 0

    def __len__(self) -> int:
        return len(self._deliveries)

    def per_host(self) -> dict[str, int]:
        """Return how many there are by host, hosts without any left out."""
        with self._lock:
            return dict(self._per_host)

    def deliveries(self) -> list[ClaimedDelivery]:
        """Return all of them."""
        with self._lock:
            return list(self._deliveries.values())

    def add(self, delivery: ClaimedDelivery) -> None:
        """Count *delivery*."""
        with self._lock:
            self._deliveries[delivery.id, delivery.lease_id] = delivery
            self._per_host[delivery.host] += 1

    def remove(self, delivery: ClaimedDelivery, *, answered: bool) -> None:
        """Forget *delivery*.

        :param answered: its answer has come; otherwise it was taken back.
        """
        with self._lock:
            del self._deliveries[delivery.id, delivery.lease_id]
            self.answered += answered
            left = self._per_host[delivery.host] - 1
            if left:
                self._per_host[delivery.host] = left
            else:
                del self._per_host[delivery.host]
