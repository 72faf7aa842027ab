"""What reconcile found and has to publish: each run once, and only what is new to somebody.

Owns how the occurrences of one page of watches become items for their endpoints, and what a pass counts.
Knows nothing of how they were found, nor of how they are stored.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .._steps import reached
from ..protocol.events import TERMINAL_TYPES, Occurrence
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.events import IngestItem
from ..storage.sql_errors import is_about_a_row
from ..storage.watches import WatchRow

logger = logging.getLogger(__name__)

#: Stores occurrences as events and deliveries, each once, in one transaction.
Publish = Callable[[Sequence[IngestItem]], object]

#: Occurrences published in one transaction.
_AT_ONCE = 200


@dataclass(slots=True)
class ReconcileReport:
    """What one pass did.

    :param looked_at: watches compared with RQ's state.
    :param reported: occurrences published, by type; some may have been published before.
    :param silent_successes: jobs that carry our callbacks and finished, with no report of it in the outbox.
    :param adopted: reserved watches whose job was found.
    :param cleaned_queues: queues in which RQ ended jobs whose worker was gone.
    """

    looked_at: int = 0
    reported: Counter[str] = field(default_factory=Counter)
    silent_successes: int = 0
    adopted: int = 0
    cleaned_queues: int = 0


class PendingEvents:
    """The occurrences of one page of watches."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: dict[str, tuple[Occurrence, dict[str, bool]]] = {}
        self._losses: dict[str, Occurrence] = {}

    def add(self, row: WatchRow, occurrence: Occurrence) -> None:
        """Note that *occurrence* is for the endpoint of *row*."""
        key = occurrence.run_key or ""
        _first, receivers = self._found.setdefault(key, (occurrence, {}))
        # A watch that stays open would make us publish the event again in every pass.
        receivers[row.endpoint_id or ""] = row.scope == "tree" or occurrence.type not in TERMINAL_TYPES

    def add_loss(self, row: WatchRow, occurrence: Occurrence) -> None:
        """Note that a job is lost: of one job the same run, whichever watch knows it."""
        self.add(row, self._losses.setdefault(row.job_id, occurrence))

    def publish(self, publish: Publish) -> Counter[str]:
        """Publish what is new, in batches.

        :returns: how many occurrences were published, by type.
        """
        items = self._new_items()
        published: list[IngestItem] = []
        for start in range(0, len(items), _AT_ONCE):
            reached("reconcile found")
            published += publish_some(publish, items[start : start + _AT_ONCE])
            reached("reconcile told")
        return Counter(item.occurrence.type for item in published)

    def _new_items(self) -> list[IngestItem]:
        """Return the items, without those that are stored and settle nothing."""
        idle = [key for key, (_, receivers) in self._found.items() if all(receivers.values())]
        known = storage.known_keys(self._database, idle) if idle else set()
        return [
            IngestItem(occurrence, tuple(endpoint_id for endpoint_id in receivers if endpoint_id))
            for key, (occurrence, receivers) in self._found.items()
            if key not in known
        ]


def publish_some(publish: Publish, items: Sequence[IngestItem]) -> Sequence[IngestItem]:
    """Publish *items*, and return those that could be: one that cannot be stored holds up no other."""
    try:
        publish(items)
    except Exception as exc:
        if not is_about_a_row(exc):
            raise
        if len(items) > 1:
            middle = len(items) // 2
            return [*publish_some(publish, items[:middle]), *publish_some(publish, items[middle:])]
        logger.exception("The event of job %r cannot be stored; it is left out.", items[0].occurrence.job_id)
        return []
    return items
