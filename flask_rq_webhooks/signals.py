"""Blinker signals for the host: what the pipeline did, emitted in the process that did it.

The sender is the Flask app. An exception in a receiver is logged and never disturbs the pipeline.

=====================  ===========================================================================
event_recorded         ``event_id``, ``event_type``, ``job_id``
delivery_succeeded     ``delivery_id``, ``event_id``, ``job_id``, ``url`` (redacted), ``attempts``
attempt_failed         the same and ``error_code``, ``status_code``
delivery_exhausted     the same as ``attempt_failed``
endpoint_disabled      ``endpoint_id``, ``reason``
=====================  ===========================================================================
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal, Namespace

logger = logging.getLogger(__name__)

_signals = Namespace()

event_recorded = _signals.signal("event-recorded")
delivery_succeeded = _signals.signal("delivery-succeeded")
attempt_failed = _signals.signal("attempt-failed")
delivery_exhausted = _signals.signal("delivery-exhausted")
endpoint_disabled = _signals.signal("endpoint-disabled")


def emit(signal: NamedSignal, app: Any, **what: Any) -> None:
    """Send *signal* to every receiver; log those that raise."""
    for receiver in signal.receivers_for(app):
        try:
            receiver(app, **what)
        except Exception:
            logger.exception("A receiver of the signal %r raised; the webhook is not affected.", signal.name)
