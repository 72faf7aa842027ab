"""Keeping the promise around a view: register before it, confirm after it.

Shared by the decorator and by :meth:`~flask_rq_webhooks.RQWebhooks.enqueue_with_webhook`. No SQL of ours
happens in between: it would wait for a transaction the host holds open, or share its pooled connection.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Sequence

from flask import Response
from redis.exceptions import RedisError

from .._steps import reached
from ..errors import InvalidWebhookError, StorageUnavailableError
from ..protocol.events import format_time
from ..queue.job_callbacks import Attachment, SameDatabase, look_at_jobs, make_token
from ..queue.outbox import confirm_entry
from ..state import State
from ..storage.dispatchers import dispatcher_alive
from ..storage.endpoints import NewEndpoint, confirm, register, waiting_for_host
from ..storage.sql_errors import SQLAlchemyError
from .request_schema import WebhookRequest

logger = logging.getLogger(__name__)

#: Seconds that the confirmation waits for another SQLite writer, who may be the host itself, in a
#: transaction that ends only after we answer. The outbox takes the word then.
CONFIRM_BUSY_TIMEOUT_S = 0.05
#: Seconds between two looks for a living dispatcher, and between two warnings that there is none.
LOOK_EVERY_S, WARN_EVERY_S = 60.0, 300.0


#: Says whether the jobs of a request will be reported.
REGISTERED_HEADER = "Webhook-Registered"


class DestinationBusyError(InvalidWebhookError):
    """Too many deliveries wait for the host of this webhook already."""


def register_webhook(
    state: State,
    wanted: WebhookRequest,
    *,
    events: Sequence[str] | None = None,
    scope: str = "job",
    runid: str | None = None,
) -> Attachment:
    """Store where to report, and reserve the id of the first job, before anything is enqueued.

    :param events: types sent where the request names none; ``None`` for all terminal ones.
    :param scope: ``"job"`` or ``"tree"``.
    :param runid: what the host calls the run.
    :raises DestinationBusyError: when ``MAX_WAITING_PER_HOST`` is reached.
    :raises StorageUnavailableError: when it cannot be stored.
    """
    limit = state.settings.max_waiting_per_host
    if limit and waiting_for_host(state.database, wanted.host, at_most=limit) >= limit:
        raise DestinationBusyError(
            details={"webhook_url": ["Too many deliveries wait for this host already; try again later."]}
        )
    reserved_job_id = str(uuid.uuid4())
    endpoint_id = register(
        state.database,
        state.cipher,
        new_endpoint(wanted, events=events, scope=scope, runid=runid),
        namespace=state.namespace,
        reserved_job_id=reserved_job_id,
    )
    reached("registered")
    _warn_if_nobody_delivers(state)
    return Attachment(
        endpoint_id=endpoint_id,
        token=make_token(endpoint_id, state.settings.outbox_maxlen),
        reserved_job_id=reserved_job_id,
        same_database=same_database(state),
    )


def new_endpoint(
    wanted: WebhookRequest,
    *,
    events: Sequence[str] | None = None,
    scope: str = "job",
    runid: str | None = None,
) -> NewEndpoint:
    """Return the job-bound endpoint that a request's fields describe."""
    return NewEndpoint(
        url=wanted.url,
        host=wanted.host,
        headers=wanted.headers,
        secret=wanted.secret,
        events=wanted.events or (None if events is None else tuple(events)),
        scope=scope,
        format=wanted.format,
        sign_payload=wanted.sign_payload,
        reference=wanted.reference,
        runid=runid,
        timeout_s=wanted.timeout_s,
        max_attempts=wanted.max_attempts,
    )


_same_databases: weakref.WeakKeyDictionary[State, SameDatabase] = weakref.WeakKeyDictionary()


def same_database(state: State) -> SameDatabase:
    """Return what tells whether a queue's connection leads to the app's Redis database; it remembers."""
    try:
        return _same_databases[state]
    except KeyError:
        return _same_databases.setdefault(state, SameDatabase(state.redis))


def confirm_webhook(state: State, attachment: Attachment) -> bool:
    """Note which jobs were enqueued, and say whether their endings will be reported.

    Never raises for want of SQL or Redis: this runs after the view, whose jobs are enqueued by now. What
    cannot be noted is repaired by the callbacks and by reconcile.
    """
    assert attachment.endpoint_id is not None  # noqa: S101  (made by register_webhook)
    reached("enqueued")
    job_ids = [job.id for job in attachment.jobs]
    existing: Sequence[str] = ()
    unseen: Sequence[str] = job_ids
    registered = False
    if job_ids:
        try:
            existing, unseen, registered = look_at_jobs(state.redis, attachment.endpoint_id, attachment.jobs)
        except RedisError as exc:
            logger.error("Redis cannot say whether the jobs %r were enqueued: %s", job_ids, exc)
    elif not attachment.refused:
        logger.warning(
            "A webhook was asked for, and nothing was enqueued through an attached queue. Use "
            "flask_rq_webhooks.Queue, or RQWebhooks(instrument_rq=True)."
        )
    try:
        confirm(
            state.database,
            attachment.endpoint_id,
            existing=existing,
            unseen=unseen,
            reserved_job_id=attachment.reserved_job_id,
            runs={job.id: format_time(job.enqueued_at) for job in attachment.jobs if job.enqueued_at},
            busy_timeout_s=CONFIRM_BUSY_TIMEOUT_S,
        )
    except (StorageUnavailableError, SQLAlchemyError) as exc:
        logger.info("Jobs %r are confirmed through the outbox: %s", job_ids, exc)
        _confirm_later(state, attachment.endpoint_id, existing)
    reached("confirmed")
    return registered


def mark_response(response: Response, *, registered: bool) -> Response:
    """Tell the client whether its jobs will be reported."""
    response.headers[REGISTERED_HEADER] = "true" if registered else "false"
    return response


def _confirm_later(state: State, endpoint_id: str, job_ids: Sequence[str]) -> None:
    if not job_ids:
        return  # reconcile closes the reserved watch
    try:
        state.outbox.append(confirm_entry(endpoint_id, job_ids))
    except RedisError as exc:
        logger.error("Jobs %r could not be confirmed, reconcile will find them: %s", job_ids, exc)


class _Pulse:
    """When one app last looked for a living dispatcher, and last complained."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.look_at = 0.0
        self.warn_at = 0.0


_pulses: weakref.WeakKeyDictionary[State, _Pulse] = weakref.WeakKeyDictionary()


def _warn_if_nobody_delivers(state: State) -> None:
    pulse = _pulses.setdefault(state, _Pulse())
    now = time.monotonic()
    with pulse.lock:
        if now < pulse.look_at:
            return
        pulse.look_at = now + LOOK_EVERY_S
    try:
        alive = dispatcher_alive(state.database)
    except StorageUnavailableError:
        return
    if alive or now < pulse.warn_at:
        return
    pulse.warn_at = now + WARN_EVERY_S
    logger.warning(
        "Webhooks are accepted, but no dispatcher is alive to deliver them; start: flask rq-webhooks worker"
    )
