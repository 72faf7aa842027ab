"""What reconcile has found and must tell: each run once, and only what is news to somebody.

Owns how the occurrences of one page of watches become items for those who asked, and what a pass counts.
Knows nothing of how they were found, nor of how they are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .._steps import reached
from ..protocol.events import TERMINAL_TYPES, Occurrence
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.events import IngestItem
from ..storage.watches import SettledRow, WatchRow

#: Stores occurrences as events and deliveries, each once, in one transaction.
Publish = Callable[[Sequence[IngestItem]], object]

#: Occurrences told in one transaction.
_TOLD_AT_ONCE = 200


@dataclass(slots=True)
class ReconcileReport:
    """What one pass did.

    :param looked_at: watches compared with RQ's state.
    :param told: occurrences handed on, by type; some may have been told before.
    :param adopted: reserved watches whose job was found.
    :param cleaned_queues: queues in which RQ ended jobs whose worker was gone.
    """

    looked_at: int = 0
    told: Counter[str] = field(default_factory=Counter)
    adopted: int = 0
    cleaned_queues: int = 0


class Findings:
    """The occurrences of one page of watches."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: dict[str, tuple[Occurrence, dict[str, bool]]] = {}
        self._losses: dict[str, Occurrence] = {}

    def add(self, row: WatchRow | SettledRow, occurrence: Occurrence) -> None:
        """Note that *occurrence* is for the endpoint of *row*."""
        key = occurrence.run_key or ""
        _first, receivers = self._found.setdefault(key, (occurrence, {}))
        # A watch that stays open whatever is told would make us tell it again in every pass.
        stays_open = isinstance(row, WatchRow) and (
            row.scope == "tree" or occurrence.type not in TERMINAL_TYPES
        )
        receivers[row.endpoint_id or ""] = stays_open

    def add_loss(self, row: WatchRow, occurrence: Occurrence) -> None:
        """Note that a job is lost: of one job the same run, whichever watch knows it."""
        self.add(row, self._losses.setdefault(row.job_id, occurrence))

    def publish(self, publish: Publish) -> Counter[str]:
        """Hand on what is news, in batches.

        :returns: how many occurrences were handed on, by type.
        """
        items = self._news()
        for start in range(0, len(items), _TOLD_AT_ONCE):
            reached("reconcile found")
            publish(items[start : start + _TOLD_AT_ONCE])
            reached("reconcile told")
        return Counter(item.occurrence.type for item in items)

    def _news(self) -> list[IngestItem]:
        """Return the items, without those that were told and settle nothing."""
        idle = [key for key, (_, receivers) in self._found.items() if all(receivers.values())]
        known = storage.known_keys(self._database, idle) if idle else set()
        return [
            IngestItem(occurrence, tuple(endpoint_id for endpoint_id in receivers if endpoint_id))
            for key, (occurrence, receivers) in self._found.items()
            if key not in known
        ]
