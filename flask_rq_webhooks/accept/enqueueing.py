"""Enqueuing with a webhook from the host's own code, without the decorator's help.

Behind :meth:`~flask_rq_webhooks.RQWebhooks.enqueue_with_webhook` and ``RQ_WEBHOOKS_ATTACH="all"``. Knows
nothing of responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flask import current_app, has_app_context
from rq import Queue
from rq.job import Job

from ..errors import InvalidWebhookError
from ..protocol.events import format_time, parse_time
from ..queue.job_callbacks import Attachment, attached, current_attachment, make_token
from ..state import EXTENSION_NAME, State, get_state
from ..storage.watches import watch_job
from .register import confirm_webhook, new_endpoint, register_webhook, same_database
from .request_fields import FIELDS, URL
from .request_schema import load_webhook


def enqueue_with_webhook(
    state: State,
    queue: Queue,
    func: Any,
    args: Sequence[Any] = (),
    *,
    runid: str | None = None,
    payload: Mapping[str, Any] | None = None,
    **options: Any,
) -> Job:
    """Enqueue one job through any queue, with the webhook that *payload* or the request asks for.

    :param func: a function or its dotted name.
    :param runid: goes into ``job.meta["runid"]``, where callbacks find it, and to the endpoint.
    :param options: further arguments of ``rq.Queue.enqueue_call``.
    :raises InvalidWebhookError: for bad fields in *payload*.
    :raises StorageUnavailableError: when the webhook cannot be registered.
    """
    fields = {name: value for name, value in (payload or {}).items() if name in FIELDS and value is not None}
    if runid is not None:
        options["meta"] = {"runid": runid, **(options.get("meta") or {})}
    enqueue = attached(queue).enqueue_call
    if URL not in fields or not state.settings.enabled:
        return enqueue(func, tuple(args), **options)
    wanted = load_webhook(
        fields, settings=state.settings, url_policy=state.url_policy, formats=state.formats.keys()
    )
    attachment = register_webhook(state, wanted, runid=runid)
    token = current_attachment.set(attachment)
    try:
        return enqueue(func, tuple(args), **options)
    finally:
        current_attachment.reset(token)
        confirm_webhook(state, attachment)


def watch(state: State, job: Job, values: Mapping[str, Any], *, runid: str | None) -> str:
    """Promise to report *job*, which was made elsewhere.

    :param values: request fields without the prefix ``webhook_``.
    :returns: the endpoint's id.
    :raises InvalidWebhookError: for an unknown field or a bad value.
    :raises StorageUnavailableError: when the promise cannot be stored.
    """
    fields = {name if name == "sign_payload" else f"webhook_{name}": value for name, value in values.items()}
    unknown = sorted(fields.keys() - FIELDS)
    if unknown:
        raise InvalidWebhookError(details={name: ["There is no such field."] for name in unknown})
    wanted = load_webhook(
        fields, settings=state.settings, url_policy=state.url_policy, formats=state.formats.keys()
    )
    began = job.enqueued_at or job.created_at
    return watch_job(
        state.database,
        state.cipher,
        new_endpoint(wanted, runid=runid),
        namespace=state.namespace,
        job_id=job.id,
        counts_from=None if began is None else parse_time(format_time(began)),
    )


def attachment_for_current_app() -> Attachment | None:
    """Return what every job of an app with ``RQ_WEBHOOKS_ATTACH="all"`` is attached to: no endpoint."""
    if not has_app_context() or EXTENSION_NAME not in current_app.extensions:
        return None
    state = get_state()
    if state.settings.attach != "all" or not state.settings.enabled:
        return None
    return Attachment(
        endpoint_id=None,
        token=make_token(f"ep{state.namespace}_all", state.settings.outbox_maxlen),
        same_database=same_database(state),
    )
