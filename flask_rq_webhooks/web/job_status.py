"""The state of a job's webhook: for the client who submitted the job, and for the host's own pages.

This module owns the response of the status route. It is coarse on purpose: no response bodies, no headers,
and nothing that reveals hosts the client cannot reach. The Jinja global ``rq_webhooks_job`` gives the same to
templates; the macros are in ``rq_webhooks/_macros.html`` and need none of our styles and no JavaScript.
"""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, jsonify, request, url_for
from redis.exceptions import RedisError

from ..errors import StorageUnavailableError
from ..protocol.urls import redact_url
from ..queue.job_reader import read_statuses
from ..state import State, get_state
from ..storage.models import PENDING, SENDING
from ..storage.queries import JobWebhook, job_webhook
from .api_contract import ApiError
from .api_schemas import EventSchema, StatusAttemptSchema, StatusDeliverySchema
from .blueprint import is_allowed, is_possible_id

logger = logging.getLogger(__name__)

#: Seconds after which to ask again: with nothing to deliver yet, during an attempt, and at most.
WAITING_S, SENDING_S, MOST_S = 5, 2, 300

_EVENTS = EventSchema(many=True)
_DELIVERY = StatusDeliverySchema()
_ATTEMPTS = StatusAttemptSchema(many=True)


def job_status(state: State, job_id: str) -> Response:
    """Return the state of a job's webhook, with an ``ETag``, and ``Retry-After`` while it may change.

    A job of another client looks like one that does not exist, and like one without a webhook; for each of
    them, the same statements run and the host's function is asked as often.

    :raises ApiError: 403 if the host's permission function does not let the caller ask for this job id.
    """
    found = cleared_webhook(state, job_id) if is_possible_id(job_id) else None
    if found is None and not is_allowed(state, "status", job_id=job_id, runid=None):
        raise ApiError(403, "forbidden", "You may not ask for this.")
    if found is None:
        body: dict[str, Any] = {"job_id": job_id, "webhook_configured": False}
    else:
        body = status_body(found, _job_status(state, job_id))
    response = jsonify(body)
    response.add_etag()
    response.make_conditional(request)
    wait_s = None if found is None else _worth_waiting_s(found)
    if wait_s is not None:
        response.headers["Retry-After"] = str(wait_s)
    return response


def cleared_webhook(state: State, job_id: str) -> JobWebhook | None:
    """Return what the caller of this request may know about a job's webhook; ``None`` if nothing."""
    asked: list[str | None] = []

    def cleared(runid: str | None) -> bool:
        asked.append(runid)
        return is_allowed(state, "status", job_id=job_id, runid=runid)

    found = job_webhook(state.database, job_id, cleared=cleared)
    if not asked:
        cleared(None)  # so a host that asks its database takes as long for an unknown as for a foreign job
    return found


def status_body(found: JobWebhook, job_status: str | None) -> dict[str, Any]:
    """Return the state of a job's webhook, as JSON.

    :param job_status: RQ's status of the job; ``None`` if it is unknown.
    """
    return {
        "job_id": found.job_id,
        "webhook_configured": True,
        "url": redact_url(found.url),
        "delivery_status": found.delivery_status,
        "job_status": job_status,
        "events": _EVENTS.dump(found.events),
        "deliveries": [
            {**_DELIVERY.dump(delivery), "attempts": _ATTEMPTS.dump(attempts)}
            for delivery, attempts in found.deliveries
        ],
    }


def _job_status(state: State, job_id: str) -> str | None:
    try:
        return read_statuses(state.redis, [job_id])[job_id]
    except RedisError as exc:
        logger.warning("The status of job %r is unknown: %s", job_id, exc)
        return None


def _worth_waiting_s(found: JobWebhook) -> int | None:
    """Return after how many seconds the state may have changed; ``None`` when no change is expected."""
    if not found.deliveries:
        return WAITING_S
    if found.delivery_status == SENDING:
        return SENDING_S
    if found.delivery_status != PENDING:
        return None
    due = found.deliveries[0][0].next_attempt_at
    left_s = 0.0 if due is None else (due - datetime.now(UTC)).total_seconds()
    return min(max(math.ceil(left_s), 1), MOST_S)


# -- on a host's own pages --------------------------------------------------------------------------------


def add_to(blueprint: Blueprint) -> None:
    """Make the global and the macros available to the templates of *blueprint*'s app."""
    blueprint.template_folder = "templates"
    blueprint.add_app_template_global(rq_webhooks_job)


def rq_webhooks_job(job_id: str) -> dict[str, Any] | None:
    """Return the state of a job's webhook: what ``GET /jobs/<job_id>`` answers, as a dict.

    Each delivery also has a ``page``: the URL of its page, if the caller has the permission ``read``.

    :returns: ``None`` if the job has no webhook, if the caller lacks the permission ``status`` for it, and if
        SQL cannot be reached: a host's page never fails because of that.
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
        page = url_for("rq_webhooks.page_delivery", delivery_id=delivery["id"]) if linked else None
        delivery["page"] = page
    return shown
