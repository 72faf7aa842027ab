"""Publish: occurrences become events and deliveries, each once, and listeners hear a signal.

What ingest, reconcile, ``send`` and the test ping have in common. The host's own functions, scrub and payload
formats, are called so that their errors lose no event. Knows nothing of where occurrences come from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import signals
from ..protocol.events import TERMINAL_TYPES, Occurrence
from ..protocol.json_safe import safe_text, to_json_safe
from ..protocol.payloads import FORMATS, RenderContext, Rendered
from ..storage.events import IngestedEvent, IngestItem, ingest, ingest_within

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..state import State
    from ..storage.subscriptions import EndpointRow

logger = logging.getLogger(__name__)

#: Characters of a run's name.
MAX_RUN_NAME = 512

#: What a scrub function may change.
_EDITABLE = ("runid", "result", "error", "progress", "data")


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
        self.announce(events)
        return events

    def publish_within(self, connection: Connection, items: Sequence[IngestItem]) -> list[IngestedEvent]:
        """Store *items* as a part of the caller's transaction.

        :returns: what to hand to :meth:`announce` after the commit.
        """
        state = self._state
        with state.app.app_context():
            return ingest_within(
                state.database,
                connection,
                items,
                render=self._render,
                max_attempts=state.settings.max_attempts,
                scrub=self._scrub,
            )

    def announce(self, events: Sequence[IngestedEvent]) -> None:
        """Wake the sender and emit ``event_recorded`` for what is stored."""
        state = self._state
        with state.app.app_context():
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


# -- the host's own functions -----------------------------------------------------------------------------


def safe_scrub(state: State) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return the host's scrub function, which then never raises and always returns JSON; or ``None``.

    Where it fails, result, error, progress and data are left out: better too little than what it was to remove.
    """
    scrub = state.hooks.scrub_function
    if scrub is None:
        return None

    def scrubbed(payload: dict[str, Any]) -> dict[str, Any]:
        try:
            edited = scrub(payload)
            edited = payload if edited is None else edited
            kept = {name: to_json_safe(edited.get(name)) for name in _EDITABLE}
            if kept["runid"] is not None:
                # What an index of PostgreSQL can hold.
                kept["runid"] = safe_text(kept["runid"], MAX_RUN_NAME).replace("\0", "")
            return kept
        except Exception:
            logger.exception(
                "The scrub function failed for %s of job %r; it is published without result, error, progress and data.",
                payload.get("event"), payload.get("job_id"),
            )  # fmt: skip
            return {"runid": payload.get("runid")}

    return scrubbed


def safe_render(state: State) -> Callable[[EndpointRow, str, Occurrence], bytes | Rendered]:
    """Return :meth:`State.render`, which then never raises.

    Where the host's format fails or is not registered here, the event is rendered in the format ``job``
    without result, error and progress.
    """

    def render(endpoint: EndpointRow, event_id: str, occurrence: Occurrence) -> bytes | Rendered:
        try:
            return state.render(endpoint, event_id, occurrence)
        except Exception:
            logger.exception(
                "Format %r cannot render %s of job %r for endpoint %s; it is sent in the format 'job', "
                "without result, error and progress.", endpoint.format, occurrence.type, occurrence.job_id, endpoint.id,
            )  # fmt: skip
        return FORMATS["job"](
            replace(occurrence, result=None, error=None, progress=None),
            RenderContext(
                event_id=event_id,
                runid=endpoint.runid or occurrence.runid,
                reference=endpoint.reference,
                traceback="none",
                include_result=False,
                max_bytes=state.settings.max_payload_bytes,
            ),
        )

    return render
