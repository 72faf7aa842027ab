"""Tell: occurrences become events and deliveries, and whoever listens hears of it.

What ingest and reconcile have in common. Knows nothing of where occurrences come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from .. import signals
from ..protocol.events import TERMINAL_TYPES
from ..storage.events import IngestedEvent, IngestItem, ingest
from .host_hooks import safe_render, safe_scrub

if TYPE_CHECKING:
    from ..state import State


class Publisher:
    """Store occurrences, each once.

    :param state: the app's state.
    :param on_deliveries: called after a commit that made deliveries due.
    :param on_ended: called with the ids of jobs whose endings were stored: their trees may be over now.
    """

    def __init__(
        self,
        state: State,
        *,
        on_deliveries: Callable[[], None] = lambda: None,
        on_ended: Callable[[Iterable[str]], None] = lambda job_ids: None,
    ) -> None:
        self._state = state
        self._on_deliveries = on_deliveries
        self._on_ended = on_ended
        self._render = safe_render(state)
        self._scrub = safe_scrub(state)

    def publish(self, items: Sequence[IngestItem], *, max_attempts: int | None = None) -> list[IngestedEvent]:
        """Store *items* in one transaction, then emit ``event_recorded`` for those that are new.

        :param max_attempts: of a delivery to an endpoint that sets none; ``MAX_ATTEMPTS`` by default.
        :raises StorageUnavailableError: when SQL cannot be reached; nothing of *items* is stored.
        """
        state = self._state
        with state.app.app_context():  # the host's scrub function and formats may want one
            events = ingest(
                state.database,
                items,
                render=self._render,
                max_attempts=max_attempts or state.settings.max_attempts,
                scrub=self._scrub,
            )
            if any(event.deliveries for event in events):
                self._on_deliveries()
            self._on_ended(event.job_id for event in events if event.job_id and event.type in TERMINAL_TYPES)
            if signals.event_recorded.receivers:
                for event in events:
                    if event.created:
                        signals.emit(
                            signals.event_recorded,
                            state.app,
                            event_id=event.event_id,
                            event_type=event.type,
                            job_id=event.job_id,
                        )
        return events
