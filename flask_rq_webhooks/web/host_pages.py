"""Webhooks on a host's own pages: the Jinja global ``rq_webhooks_job`` and the macros.

The macros are in the template ``rq_webhooks/_macros.html``. They need none of our styles and no JavaScript.
"""

from __future__ import annotations

import logging
from typing import Any

from flask import Blueprint, url_for

from ..errors import StorageUnavailableError
from ..state import get_state
from .job_status import cleared_webhook, status_body
from .permissions import is_allowed

logger = logging.getLogger(__name__)


def add_to(blueprint: Blueprint) -> None:
    """Give the templates of *blueprint*'s app the global and the macros."""
    blueprint.template_folder = "templates"
    blueprint.add_app_template_global(rq_webhooks_job)


def rq_webhooks_job(job_id: str) -> dict[str, Any] | None:
    """Return the state of a job's webhook: what ``GET /jobs/<job_id>`` answers, as a dict.

    Each delivery also has a ``page``: the URL of its page, where the caller has the permission ``read``.

    :returns: ``None`` where the job has no webhook, where the caller lacks the permission ``status`` for it,
        and where SQL cannot be reached: a host's page never fails for it.
    """
    state = get_state()
    try:
        found = cleared_webhook(state, job_id)
    except StorageUnavailableError as exc:
        logger.error("The webhook of job %r is unknown: %s", job_id, exc)
        return None
    if found is None:
        return None
    shown = status_body(found, None)
    del shown["job_status"]  # the host's page knows better
    linked = bool(shown["deliveries"]) and state.settings.dashboard and is_allowed(state, "read")
    for delivery in shown["deliveries"]:
        delivery["page"] = (
            url_for("rq_webhooks.page_delivery", delivery_id=delivery["id"]) if linked else None
        )
    return shown
