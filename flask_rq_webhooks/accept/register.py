"""Register a webhook before its job is enqueued, and confirm it afterwards.

The decorator, ``enqueue_with_webhook`` and ``watch`` all go through this module, and only this module knows
what the response says about it. We run no SQL while a view runs: it would wait for a transaction that the
host holds open, or share its pooled connection.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from flask import has_request_context, request
from redis.exceptions import RedisError
from rq import Queue
from rq.job import Job

from .. import tracing
from .._steps import reached
from ..errors import InvalidWebhookError, StorageUnavailableError
from ..protocol.events import format_time, parse_time, run_of
from ..queue.job_callbacks import (
    Attachment,
    SameDatabase,
    attached,
    current_attachment,
    is_instrumented,
    is_unfit,
    look_at_jobs,
    make_token,
    was_handed_over,
    why_unfit,
)
from ..queue.outbox_entry import confirm_entry
from ..state import State
from ..storage import endpoints
from ..storage.dispatchers import dispatcher_alive
from ..storage.models import SUBSCRIBED
from ..storage.sql_errors import SQLAlchemyError
from ..storage.subscriptions import is_endpoint
from .request_fields import FIELDS, MAX_JOB_IDS, URL, Asked, asked_in_request
from .request_schema import WebhookRequest, load_webhook
from .tenants import current_tenant

logger = logging.getLogger(__name__)

#: Seconds that the confirmation waits for another SQLite writer, which may be the host itself, in a
#: transaction that ends only after our response. After that, the confirmation goes to the outbox.
CONFIRM_BUSY_TIMEOUT_S = 0.05
#: A confirmation that neither SQL nor Redis accepted is tried again: seconds between tries, and in total.
CONFIRM_AGAIN_EVERY_S, CONFIRM_AGAIN_FOR_S = 0.5, 600.0
#: Seconds between two checks for a live dispatcher, and between two warnings that no dispatcher runs.
LOOK_EVERY_S, WARN_EVERY_S = 60.0, 300.0

_NOTHING_SEEN = (
    "it enqueued no job through {queue}. A job made by Job.create, in a thread, after the view, or earlier "
    "(a deduplicated one) is reported when the view calls webhooks.watch(job)"
)


class DestinationBusyError(InvalidWebhookError):
    """Too many deliveries wait for the host of this webhook already."""


# -- registration -------------------------------------------------------------------------------------------


def load(state: State, fields: Mapping[str, Any] | None) -> WebhookRequest | None:
    """Check webhook fields.

    :returns: ``None`` if no webhook is asked for, or webhooks are switched off.
    :raises InvalidWebhookError: with all reasons for all fields.
    """
    if not state.settings.enabled or fields is None or fields.get(URL) is None:
        return None
    return load_webhook(
        fields, settings=state.settings, url_policy=state.url_policy, formats=state.formats.keys()
    )


def register(
    state: State,
    wanted: WebhookRequest,
    *,
    events: Sequence[str] | None = None,
    scope: str = "job",
    runid: Any = None,
    ignores_argument: bool = False,
    chosen: Callable[[str], bool] | None = None,
    watched: Job | None = None,
) -> Attachment:
    """Store the endpoint and the watch of the first job in one transaction.

    :param events: event types sent if the request names none; ``None`` for all terminal ones.
    :param scope: ``"job"`` or ``"tree"``.
    :param runid: the host's id of the run.
    :param ignores_argument: whether the first argument of a job is never taken as its run id.
    :param chosen: see :class:`~flask_rq_webhooks.queue.job_callbacks.Attachment`.
    :param watched: a job that exists; without it, an id is reserved for the next job.
    :raises DestinationBusyError: when ``MAX_WAITING_PER_HOST`` is reached.
    :raises StorageUnavailableError: when it cannot be stored.
    """
    limit = state.settings.max_waiting_per_host
    if limit and endpoints.waiting_for_host(state.database, wanted.host, at_most=limit) >= limit:
        raise DestinationBusyError(
            details={"webhook_url": ["Too many deliveries wait for this host already; try again later."]}
        )
    endpoint = endpoints.NewEndpoint(
        url=wanted.url, host=wanted.host, headers=wanted.headers, secret=wanted.secret, format=wanted.format,
        events=wanted.events or (None if events is None else tuple(events)), scope=scope,
        sign_payload=wanted.sign_payload, reference=wanted.reference, runid=runid_text(runid),
        timeout_s=wanted.timeout_s, max_attempts=wanted.max_attempts,
        tenant=None if state.hooks.tenant_function is None else current_tenant(state),
    )  # fmt: skip
    return _store(state, endpoint, ignores_argument, chosen, watched)


def subscribe(
    state: State,
    tenant: str,
    *,
    events: Iterable[str],
    scope: str,
    runid: Any,
    ignores_argument: bool,
    chosen: Callable[[str], bool] | None,
) -> Attachment | None:
    """Do the same for a request without a URL, whose jobs are reported to the endpoints of its tenant.

    :param events: event types that those endpoints want.
    :returns: ``None`` if it cannot be stored; no webhook was asked for, so the request continues without.
    """
    stands_for = endpoints.NewEndpoint(
        url="", host="", kind=SUBSCRIBED, events=tuple(sorted(events)), scope=scope, runid=runid_text(runid),
        tenant=tenant,
    )  # fmt: skip
    try:
        return _store(state, stands_for, ignores_argument, chosen)
    except StorageUnavailableError as exc:
        logger.error("The jobs of a request will not be reported to the endpoints of its tenant: %s", exc)
        return None


def _store(
    state: State,
    endpoint: endpoints.NewEndpoint,
    ignores_argument: bool,
    chosen: Callable[[str], bool] | None,
    watched: Job | None = None,
) -> Attachment:
    reserved_job_id = str(uuid.uuid4()) if watched is None else None
    with tracing.registering(request.headers if has_request_context() else None) as trace:
        endpoint_id = endpoints.register(
            state.database, state.cipher, endpoint if trace is None else replace(endpoint, trace=trace),
            namespace=state.namespace, reserved_job_id=reserved_job_id,
            watched_job_id=None if watched is None else watched.id,
            counts_from=None if watched is None else _began(watched),
        )  # fmt: skip
    reached("registered")
    _warn_if_nobody_delivers(state)
    token = make_token(endpoint_id, state.settings.outbox_maxlen, ignores_argument=ignores_argument)
    return Attachment(
        endpoint_id=endpoint_id,
        token=token,
        reserved_job_id=reserved_job_id,
        same_database=same_database(state),
        chosen=chosen,
    )


@contextmanager
def promise(state: State, attachment: Attachment, asked: Asked | None) -> Iterator[None]:
    """Attach the jobs that are created in this context, and confirm them at its end, even after an error.

    :param asked: notes them for the response; ``None`` outside of requests.
    """
    token = current_attachment.set(attachment)
    try:
        yield
    finally:
        current_attachment.reset(token)
        reached("enqueued")
        attachment.closed = True
        reported = _confirm(state, attachment, attachment.jobs)
        reached("confirmed")
        if asked is not None and (reported or asked.has_fields):
            asked.mark_response()
            asked.note(reported, None if reported else _why_nothing(attachment))


def enqueue_with_webhook(
    state: State,
    queue: Queue,
    func: Any,
    args: Sequence[Any] = (),
    *,
    runid: Any = None,
    payload: Mapping[str, Any] | None = None,
    **options: Any,
) -> Job:
    """Enqueue one job through any queue, with the webhook that *payload* or the request asks for.

    :param func: a function or its dotted name.
    :param runid: stored in ``job.meta["runid"]``, where callbacks find it, and with the endpoint.
    :param options: further arguments of ``rq.Queue.enqueue_call``.
    :raises InvalidWebhookError: for bad fields in *payload*.
    :raises StorageUnavailableError: when the webhook cannot be registered.
    """
    if runid is not None:
        options["meta"] = {"runid": runid, **(options.get("meta") or {})}
    enqueue = attached(queue).enqueue_call
    fields = {name: value for name, value in (payload or {}).items() if name in FIELDS}
    asked = asked_in_request() if fields.get(URL) is not None else None
    if asked is not None:
        asked.mark_response()
    wanted = load(state, fields)
    if wanted is None:
        return enqueue(func, tuple(args), **options)
    _refuse_unfit(options.get("job_id"))
    with promise(state, register(state, wanted, runid=runid), asked):
        return enqueue(func, tuple(args), **options)


def watch(state: State, job: Job, values: Mapping[str, Any], *, runid: Any = None) -> str | None:
    """Watch *job*, which was created elsewhere.

    :param values: request fields without the prefix ``webhook_``; without ``url``, the webhook of the
        current request is used.
    :returns: the endpoint's id; ``None`` if no webhook is asked for.
    :raises InvalidWebhookError: for an unknown field or a bad value.
    :raises StorageUnavailableError: when the watch cannot be stored.
    """
    fields = {name if name == "sign_payload" else f"webhook_{name}": value for name, value in values.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    unknown = sorted(fields.keys() - FIELDS)
    if unknown:
        raise InvalidWebhookError(details={name: ["There is no such field."] for name in unknown})
    asked = asked_in_request()
    if asked is not None:
        asked.watched.add(job.id)
    if URL not in fields:
        if fields:
            raise InvalidWebhookError(details={URL: ["Missing; without it, the request's own fields count."]})
        return _watch_for_request(state, job, asked)
    wanted = load(state, fields)
    if wanted is None:
        return None
    _refuse_unfit(job.id)
    endpoint_id = register(state, wanted, runid=runid, watched=job).endpoint_id
    if asked is not None:
        asked.mark_response()
        asked.note([job.id])
    return endpoint_id


def _watch_for_request(state: State, job: Job, asked: Asked | None) -> str | None:
    attachment = current_attachment.get() or (None if asked is None else asked.attachment)
    if attachment is None:
        return None
    if is_unfit(job.id, attachment):  # if the view enqueued it, the response says that nothing is reported
        return None
    attachment.watched.add(job.id)
    if all(known.id != job.id for known in attachment.jobs):
        attachment.jobs.append(job)
    if attachment.closed:  # the view has ended: called from a thread or an after_request function
        reported = _confirm(state, attachment, [job])
        if asked is not None:
            asked.note(reported)
    return attachment.endpoint_id


def _refuse_unfit(job_id: Any) -> None:
    if why := why_unfit(job_id):
        raise InvalidWebhookError(details={"job_id": [why]})


def runid_text(runid: Any) -> str | None:
    """Return the host's id of a run as text that every database can store."""
    return None if runid is None else str(runid).replace("\0", "\ufffd")


def same_database(state: State) -> SameDatabase:
    """Return the app's check whether a queue's connection leads to its Redis database, with its cache."""
    return state.once("same_database", lambda: SameDatabase(state.redis))


# -- confirmation -------------------------------------------------------------------------------------------


def _confirm(state: State, attachment: Attachment, jobs: Sequence[Job]) -> list[str]:
    """Confirm which jobs were enqueued, and return the ids of those that will be reported.

    Does not raise if SQL or Redis is unavailable: this runs after the view, whose jobs are already enqueued.
    What cannot be confirmed is repaired by the callbacks and by reconcile.
    """
    assert attachment.endpoint_id is not None  # noqa: S101  (made by register)
    job_ids = list(dict.fromkeys(job.id for job in jobs))
    handed_over = [job.id for job in jobs if job.id in attachment.watched or was_handed_over(job)]
    existing: list[str] = []
    unseen: list[str] = []
    if job_ids:
        try:
            existing, unseen = look_at_jobs(state.redis, attachment, jobs)
        except RedisError as exc:
            # RQ accepted them, so a report is due: if Redis comes back without them, they are reported lost.
            logger.error("Redis cannot say whether the jobs %r were enqueued: %s", job_ids, exc)
            existing, unseen = handed_over, [job_id for job_id in job_ids if job_id not in handed_over]
    runs = {job.id: run_of(job.enqueued_at, job.created_at) for job in jobs if job.id in handed_over}
    on_their_way = [job_id for job_id in unseen if job_id in handed_over]
    try:
        endpoints.confirm(
            state.database, attachment.endpoint_id, existing=existing, unseen=unseen, runs=runs,
            reserved_job_id=attachment.reserved_job_id if jobs is attachment.jobs else None,
            busy_timeout_s=CONFIRM_BUSY_TIMEOUT_S,
        )  # fmt: skip
    except (StorageUnavailableError, SQLAlchemyError) as exc:
        logger.info("Jobs %r are confirmed through the outbox: %s", job_ids, exc)
        confirm_later(state, attachment.endpoint_id, existing, on_their_way, runs)
    return [job_id for job_id in job_ids if job_id in existing or job_id in on_their_way]


def confirm_later(
    state: State, endpoint_id: str, existing: Sequence[str], unseen: Sequence[str], runs: Mapping[str, str]
) -> None:
    """Let ingest confirm jobs, through an entry in the outbox.

    :param endpoint_id: or ``ep<namespace>_all`` for jobs that are watched for standing endpoints only.
    :param existing: ids of jobs that RQ accepted.
    :param unseen: ids of jobs that were created.
    """
    job_ids = [*existing, *unseen]
    if not job_ids:
        return  # reconcile closes the reserved watch
    # If a job is gone when the entry is read, what this process saw is the only proof that it existed.
    known = {job_id: runs.get(job_id) for job_id in job_ids}
    seal = state.cipher.encrypt(json.dumps([endpoint_id, known, list(unseen)]))
    try:
        state.outbox.append(confirm_entry(endpoint_id, job_ids, seal=seal))
    except RedisError as exc:
        logger.error("Jobs %r cannot be confirmed, trying again: SQL and Redis are down: %s", job_ids, exc)
    else:
        return

    def try_again() -> None:
        until = time.monotonic() + CONFIRM_AGAIN_FOR_S
        seen: dict[str, Any] = {"existing": existing, "unseen": unseen, "runs": runs}
        while time.monotonic() < until:
            time.sleep(CONFIRM_AGAIN_EVERY_S)
            with suppress(RedisError):
                return state.outbox.append(confirm_entry(endpoint_id, job_ids, seal=seal))
            if is_endpoint(endpoint_id):
                with suppress(StorageUnavailableError, SQLAlchemyError):
                    return endpoints.confirm(state.database, endpoint_id, reserved_job_id=None, **seen)

    # The view has run and the response promises a report. The request cannot wait: what keeps SQLite busy may
    # be the host's own transaction, which ends with the request.
    threading.Thread(target=try_again, name="rq-webhooks-confirm", daemon=True).start()


def _began(job: Job) -> datetime | None:
    """Return when the current run of a job was enqueued, or else when the job was created."""
    began = job.enqueued_at or job.created_at
    return None if began is None else parse_time(format_time(began))


def _why_nothing(attachment: Attachment) -> str | None:
    if attachment.refused:
        return None  # logged as an error, with the reason
    if attachment.jobs:
        ids = ", ".join(job.id for job in attachment.jobs[:MAX_JOB_IDS])
        return f"it made jobs ({ids}) that RQ did not enqueue, such as duplicates"
    if attachment.passed_over:
        names = ", ".join(dict.fromkeys(attachment.passed_over))
        return f"accepts_webhook(jobs=...) chooses none of the jobs it enqueued ({names})"
    queue = "any queue" if is_instrumented() else (
        "flask_rq_webhooks.Queue, the only one that carries webhooks without RQWebhooks(instrument_rq=True)"
    )  # fmt: skip
    return _NOTHING_SEEN.format(queue=queue)


class _Pulse:
    """When one app will next check for a live dispatcher, and next warn that there is none."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.look_at = 0.0
        self.warn_at = 0.0


def _warn_if_nobody_delivers(state: State) -> None:
    pulse = state.once("pulse", _Pulse)
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
