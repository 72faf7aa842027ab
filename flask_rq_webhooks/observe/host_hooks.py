"""The host's own functions, called so that their errors lose no event.

Owns what happens instead when a scrub function or a payload format raises: the event is told all the same,
without what the function was meant to edit. Knows nothing of storage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..protocol.events import Occurrence
from ..protocol.json_safe import safe_text, to_json_safe
from ..protocol.payloads import FORMATS, RenderContext, Rendered

if TYPE_CHECKING:
    from ..state import State
    from ..storage.subscriptions import EndpointRow

logger = logging.getLogger(__name__)

#: Characters of a run's name.
MAX_RUN_NAME = 512

#: What a scrub function may change.
_EDITABLE = ("runid", "result", "error", "data")


def safe_scrub(state: State) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return the host's scrub function, which then never raises and always returns JSON; or ``None``.

    Where it fails, result, error and data are left out: better too little than what it was to remove.
    """
    scrub = state.hooks.scrub_function
    if scrub is None:
        return None

    def scrubbed(payload: dict[str, Any]) -> dict[str, Any]:
        try:
            edited = scrub(payload)
            edited = payload if edited is None else edited
            told = {name: to_json_safe(edited.get(name)) for name in _EDITABLE}
            if told["runid"] is not None:
                # What an index of PostgreSQL can hold.
                told["runid"] = safe_text(told["runid"], MAX_RUN_NAME).replace("\0", "")
            return told
        except Exception:
            logger.exception(
                "The scrub function failed for %s of job %r; it is told without result, error and data.",
                payload.get("event"), payload.get("job_id"),
            )  # fmt: skip
            return {"runid": payload.get("runid")}

    return scrubbed


def safe_render(state: State) -> Callable[[EndpointRow, str, Occurrence], bytes | Rendered]:
    """Return :meth:`State.render`, which then never raises.

    Where the host's format fails or is not registered here, the event is rendered in the format ``job``
    without result and error.
    """

    def render(endpoint: EndpointRow, event_id: str, occurrence: Occurrence) -> bytes | Rendered:
        try:
            return state.render(endpoint, event_id, occurrence)
        except Exception:
            logger.exception(
                "Format %r cannot render %s of job %r for endpoint %s; it is sent in the format 'job', "
                "without result and error.", endpoint.format, occurrence.type, occurrence.job_id, endpoint.id,
            )  # fmt: skip
        return FORMATS["job"](
            replace(occurrence, result=None, error=None),
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
