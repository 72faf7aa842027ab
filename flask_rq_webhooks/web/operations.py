"""The actions of operators: one function per action, and the limits of its input.

The API, the pages and the commands translate their input into the API's shape, check it with
:func:`checked`, and call one of these functions. How a response looks is not known here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from marshmallow import Schema, ValidationError

from ..accept.request_schema import flat_details
from ..accept.tenants import look_again
from ..errors import DecryptionError, RQWebhooksError
from ..observe.publisher import Publisher, safe_render
from ..protocol.events import SOURCE_APPLICATION, WEBHOOK_PING, Occurrence
from ..protocol.payloads import job_payload, occurrence_from_json
from ..protocol.signatures import generate_secret
from ..state import State
from ..storage import deliveries, dispatchers, endpoints, queries, retention, standing_endpoints
from ..storage.attempts import coarse_code
from ..storage.endpoints import NewEndpoint
from ..storage.events import IngestedEvent, IngestItem
from ..storage.filters import DeliveryFilter
from ..storage.queries import DeliveryDetail, DeliveryView, EndpointView, EventView, Page
from ..storage.retention import Erasure
from ..storage.standing_endpoints import ROTATION_GRACE_S
from ..storage.standing_endpoints import TenantLimitError as TenantLimitError
from .api_schemas import endpoint_schema as endpoint_schema

#: Maximum number of deliveries that one call changes, and that one transaction changes.
AT_MOST, PER_PART = 1000, 500
#: Seconds after which a call starts no further transaction.
ENOUGH_S = 2.0

#: Attempts of a ping if the endpoint sets no number: the operator who waits for it sees the first result.
PING_ATTEMPTS = 1


class UnknownItemError(RQWebhooksError):
    """There is no item of this kind with this id.

    :param what: ``"delivery"`` or ``"standing endpoint"``.
    """

    def __init__(self, what: str, item_id: str) -> None:
        super().__init__(f"There is no {what} {item_id!r}.")
        self.what = what


class InvalidInputError(RQWebhooksError):
    """The input of an action is not acceptable; nothing was changed.

    :param details: field → reasons, none of which repeats a secret.
    """

    def __init__(self, details: Mapping[str, list[str]]) -> None:
        reasons = [f"{name}: {' '.join(why)}" for name, why in details.items()]
        super().__init__("\n".join(reasons) or "The input is not acceptable.")
        self.details = dict(details)


class BusyHostError(RQWebhooksError):
    """Too many deliveries wait for this host already; try again later."""


class ReusedKeyError(RQWebhooksError):
    """This Idempotency-Key was used for another endpoint."""


def checked(schema: Schema, raw: Mapping[str, Any], *, partial: bool | None = None) -> dict[str, Any]:
    """Return the values of *raw*, checked and converted by *schema*.

    :param raw: in the API's shape.
    :param partial: whether required fields may be missing.
    :raises InvalidInputError: with every reason.
    """
    try:
        values: dict[str, Any] = schema.load(raw, partial=partial)
    except ValidationError as exc:
        # Without the cause: it contains the values, and one may be a secret.
        raise InvalidInputError(flat_details(exc)) from None
    return values


# -- deliveries -------------------------------------------------------------------------------------------


def scoped(values: Mapping[str, Any], tenant: str | None) -> str | None:
    """Return the tenant that a caller's input asks for, within what the caller may see.

    :param values: may contain ``tenant``, the filter of operators.
    :param tenant: the tenant the caller is restricted to; ``None`` for no restriction.
    :raises UnknownItemError: for any other tenant than that, whether it exists or not.
    """
    wanted: str | None = values.get("tenant")
    if tenant is not None and wanted not in (None, tenant):
        raise UnknownItemError("tenant", str(wanted))
    return tenant or wanted


def delivery_filter(values: Mapping[str, Any], tenant: str | None = None) -> DeliveryFilter:
    """Return the filter that checked values of a :class:`~.api_schemas.FilterInput` describe.

    :param tenant: see :func:`scoped`.
    """
    status = values.get("status")
    names = ("since", "until", "endpoint_id", "host", "event_id", "job_id", "runid")
    return DeliveryFilter(
        statuses=tuple(status) if status else None,
        event_type=values.get("event"),
        tenant=scoped(values, tenant),
        **{name: values[name] for name in names if name in values},
    )


def delivery(state: State, delivery_id: str, *, tenant: str | None = None) -> DeliveryDetail:
    """Return one delivery; for a tenant, without what clients may not see.

    :raises UnknownItemError: when there is no such delivery, or it is not *tenant*'s.
    """
    found = queries.delivery_detail(state.database, delivery_id, tenant=tenant)
    if found is None:
        raise UnknownItemError("delivery", delivery_id)
    if tenant is None:
        return found
    # The receiver is the tenant's own, and public unless the settings open private networks: then a response
    # could be that of an internal host that the tenant cannot reach itself.
    answers = found.delivery.endpoint_kind == "standing" and not state.settings.allow_networks
    return replace(
        found,
        delivery=_for_tenant(found.delivery),
        event=found.event if found.event.tenant == tenant else replace(found.event, runid=None, payload=None),
        attempts=tuple(
            replace(
                attempt, error_code=coarse_code(attempt.error_code), error_detail=None, request_headers={},
                response_headers={}, response_body=attempt.response_body if answers else b"",
                dispatcher_id=None,
            )
            for attempt in found.attempts
        ),
    )  # fmt: skip


def list_deliveries(
    state: State,
    where: DeliveryFilter,
    *,
    tenant: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[DeliveryView]:
    """Return a page of deliveries, newest first; for a tenant, without what clients may not see.

    :raises CursorError: when *cursor* is not one of ours.
    """
    where = replace(where, tenant=tenant or where.tenant)
    page = queries.list_deliveries(state.database, where, cursor=cursor, limit=limit)
    return page if tenant is None else replace(page, items=tuple(map(_for_tenant, page.items)))


def _for_tenant(delivery: DeliveryView) -> DeliveryView:
    """Return a delivery as its tenant may see it: the reason of a failure only as in the status route.

    Requests of two tenants may have chosen the same job id; the run belongs to the event's tenant.
    """
    runid = delivery.runid if delivery.event_tenant == delivery.tenant else None
    return replace(delivery, error_code=coarse_code(delivery.error_code), runid=runid)


def event_payload(state: State, event: EventView) -> dict[str, Any] | None:
    """Return an event's payload as the format ``job`` renders it; ``None`` if it is erased or not read."""
    if event.erased_at is not None or event.payload is None:
        return None
    context = state.render_context(event.id, event.runid)
    return job_payload(occurrence_from_json(event.payload), context)


def resend(state: State, delivery_id: str, *, tenant: str | None = None) -> str:
    """Make one delivery due now, whatever its status: same event id, same bytes.

    :param tenant: only a delivery of this tenant; the same holds for everything below.
    :returns: its status: ``"pending"``, or ``"sending"`` if an attempt is in progress.
    :raises UnknownItemError: when there is no such delivery.
    :raises ErasedError: when its body was erased.
    """
    status = deliveries.resend(state.database, delivery_id, tenant=tenant)
    if status is None:
        raise UnknownItemError("delivery", delivery_id)
    return status


@dataclass(frozen=True, slots=True)
class Progress:
    """What one call of :func:`recover` or :func:`cancel` did.

    :param done: number of deliveries changed.
    :param cursor: where the next call continues; ``None`` when everything is done.
    :param remaining: deliveries that are left, counted up to ``COUNT_CAP`` and one more; ``None`` if it is
        not known because they do not exist yet.
    """

    done: int
    cursor: str | None = None
    remaining: int | None = 0


def recover(state: State, where: DeliveryFilter, cursor: str | None = None) -> Progress:
    """Make deliveries due now, as many as :data:`AT_MOST` and :data:`ENOUGH_S` allow.

    Which ones: see :func:`~flask_rq_webhooks.storage.deliveries.recover_part`.

    :param cursor: returned by the previous call.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    most = state.settings.max_attempts
    step = partial(
        deliveries.recover_part, state.database, where, render=safe_render(state), max_attempts=most
    )
    return _some(step, cursor, partial(deliveries.left_to_recover, state.database, where))


def cancel(state: State, where: DeliveryFilter, cursor: str | None = None) -> Progress:
    """Cancel unfinished deliveries, as many as :data:`AT_MOST` and :data:`ENOUGH_S` allow.

    :param cursor: returned by the previous call.
    :raises CursorError: when *cursor* is malformed or from elsewhere.
    """
    step = partial(deliveries.cancel_part, state.database, where)
    return _some(step, cursor, partial(deliveries.left_to_cancel, state.database, where))


def _some(step: deliveries.Step, cursor: str | None, count_left: Callable[[str], int | None]) -> Progress:
    began = time.monotonic()
    part = step(cursor=cursor, at_most=PER_PART)
    done = part.done
    while part.cursor is not None and done < AT_MOST and time.monotonic() - began < ENOUGH_S:
        part = step(cursor=part.cursor, at_most=min(PER_PART, AT_MOST - done))
        done += part.done
    return Progress(done) if part.cursor is None else Progress(done, part.cursor, count_left(part.cursor))


def erase(state: State, values: Mapping[str, Any]) -> Erasure:
    """Erase what is stored about a job, a run or a reference, and keep the skeleton of the log.

    :param values: checked values of an :class:`~.api_schemas.EraseInput`.
    """
    return retention.erase(state.database, **values)


def pause(state: State) -> None:
    """Stop all sending, on every dispatcher. Webhooks are still accepted and jobs still watched."""
    dispatchers.pause(state.database)


def resume(state: State) -> None:
    """Resume sending."""
    dispatchers.resume(state.database)


# -- standing endpoints -----------------------------------------------------------------------------------


def standing(state: State, endpoint_id: str, *, tenant: str | None = None) -> EndpointView:
    """Return a standing endpoint.

    :raises UnknownItemError: when no standing endpoint has this id.
    """
    found = queries.endpoint_detail(state.database, endpoint_id, tenant=tenant)
    if found is None or found.kind != "standing":
        raise UnknownItemError("standing endpoint", endpoint_id)
    return found


#: Fields that :func:`change` refuses, and why.
FIXED = {"secret": "Use rotate for a new secret.", "scope": "Cannot be changed."}


@dataclass(frozen=True, slots=True)
class Created:
    """A standing endpoint as it was created.

    :param secret: ``None`` for an endpoint without one, and if *replayed*.
    :param generated: whether the secret was generated here, so that it has to be shown once.
    :param replayed: whether an earlier request with the same key had created it.
    """

    endpoint_id: str
    secret: str | None
    generated: bool = False
    replayed: bool = False


def create(
    state: State, values: Mapping[str, Any], *, idempotency_key: str | None = None, tenant: str | None = None
) -> Created:
    """Create a standing endpoint, of *tenant* or of operators.

    :param values: checked by :func:`endpoint_schema`. Without ``secret``, one is generated; with ``None``,
        the endpoint gets none of its own; an endpoint of a tenant always gets one.
    :raises TenantLimitError: when the tenant already has as many as it may have.
    :raises ReusedKeyError: when the key was used for an endpoint with another URL.
    """
    stored = _stored(values)
    stored.setdefault("format", state.settings.format)
    generated = "secret" not in stored or (tenant is not None and stored["secret"] is None)
    if generated:
        stored["secret"] = generate_secret()
    endpoint = NewEndpoint(kind="standing", tenant=tenant, **stored)
    at_most = state.settings.max_endpoints_per_tenant
    try:
        endpoint_id = standing_endpoints.create_standing(
            state.database, state.cipher, endpoint, namespace=state.namespace,
            idempotency_key=idempotency_key, at_most=at_most,
        )  # fmt: skip
    except standing_endpoints.ExistsError as exc:
        found = queries.endpoint_detail(state.database, exc.endpoint_id)
        if found is None or found.url != endpoint.url:
            raise ReusedKeyError from None
        return Created(exc.endpoint_id, None, replayed=True)
    look_again(state)
    return Created(endpoint_id, endpoint.secret, generated)


def change(state: State, endpoint_id: str, values: Mapping[str, Any], *, tenant: str | None = None) -> None:
    """Change a standing endpoint.

    :param values: checked by :func:`endpoint_schema`, with ``partial``: only what is to be changed.
    :raises InvalidInputError: for what cannot be changed.
    :raises UnknownItemError: when there is no such endpoint.
    """
    refused = {name: [why] for name, why in FIXED.items() if name in values}
    if refused:
        raise InvalidInputError(refused)
    stored = _stored(values)
    if not standing_endpoints.update_standing(
        state.database, state.cipher, endpoint_id, stored, tenant=tenant
    ):
        raise UnknownItemError("standing endpoint", endpoint_id)
    look_again(state)


def _stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the schema accepted, in the form that storage expects."""
    found = dict(values)
    if "url" in found:
        found["url"], found["host"] = found["url"].url, found["url"].host_key
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def rotate(
    state: State,
    endpoint_id: str,
    *,
    secret: str | None = None,
    grace_s: float = ROTATION_GRACE_S,
    tenant: str | None = None,
) -> str:
    """Give a standing endpoint a new secret; the old ones also sign for *grace_s* seconds.

    Arguments are checked by :class:`~.api_schemas.RotateInput`.

    :param secret: generated if omitted.
    :returns: the new secret.
    :raises UnknownItemError: when there is no such endpoint.
    """
    secret = secret or generate_secret()
    if not standing_endpoints.rotate_secret(
        state.database, state.cipher, endpoint_id, secret, grace_s=grace_s, tenant=tenant
    ):
        raise UnknownItemError("standing endpoint", endpoint_id)
    return secret


def ping(state: State, endpoint_id: str, *, tenant: str | None = None) -> IngestedEvent:
    """Send a ``webhook.ping`` to a standing endpoint, through the same pipeline as every event.

    :raises UnknownItemError: when there is no such endpoint.
    :raises BusyHostError: for a tenant, when ``MAX_WAITING_PER_HOST`` is reached, as for a request.
    """
    endpoint = standing(state, endpoint_id, tenant=tenant)
    limit = state.settings.max_waiting_per_host if tenant is not None else 0
    if limit and endpoints.waiting_for_host(state.database, endpoint.host, at_most=limit) >= limit:
        raise BusyHostError
    occurrence = Occurrence(type=WEBHOOK_PING, occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION)
    item = IngestItem(occurrence, endpoint_ids=(endpoint_id,))
    (event,) = Publisher(state).publish([item], max_attempts=PING_ATTEMPTS)
    return event


def enable(state: State, endpoint_id: str, *, tenant: str | None = None) -> EndpointView:
    """Let a standing endpoint receive deliveries again.

    :returns: the endpoint as it was before, for :func:`missed_since`.
    :raises UnknownItemError: when there is no such endpoint.
    """
    before = standing(state, endpoint_id, tenant=tenant)
    standing_endpoints.enable_standing(state.database, endpoint_id, tenant=tenant)
    look_again(state)
    return before


def missed_since(state: State, before: EndpointView) -> datetime:
    """Return the time since which an endpoint that was enabled may have missed deliveries.

    :param before: what :func:`enable` returned.
    """
    if before.failing_since is not None:
        # The delivery that failed first is older than that, by at most the length of the retry schedule.
        schedule = before.retry_schedule or state.settings.retry_schedule
        return before.failing_since - timedelta(seconds=sum(schedule))
    return before.disabled_at or before.created_at


def disable(state: State, endpoint_id: str, *, tenant: str | None = None) -> None:
    """Stop a standing endpoint from receiving new deliveries; those that are waiting are still sent.

    :raises UnknownItemError: when there is no such endpoint.
    """
    reason = "operator" if tenant is None else "customer"
    if not standing_endpoints.disable_standing(state.database, endpoint_id, reason=reason, tenant=tenant):
        raise UnknownItemError("standing endpoint", endpoint_id)
    look_again(state)


def disable_tenant(state: State, tenant: str) -> int:
    """Disable all standing endpoints of a tenant; return how many were enabled."""
    disabled = standing_endpoints.disable_tenant(state.database, tenant)
    look_again(state)
    return disabled


def delete(state: State, endpoint_id: str, *, tenant: str | None = None) -> bool:
    """Delete a standing endpoint, or as many of its deliveries as :data:`ENOUGH_S` allows.

    :returns: whether it is deleted; otherwise it is disabled, and another call continues.
    :raises UnknownItemError: when there is no such endpoint.
    """
    began = time.monotonic()
    deleted = standing_endpoints.delete_standing_part(state.database, endpoint_id, tenant=tenant)
    while deleted is False and time.monotonic() - began < ENOUGH_S:
        deleted = standing_endpoints.delete_standing_part(state.database, endpoint_id, tenant=tenant)
    if deleted is None:
        raise UnknownItemError("standing endpoint", endpoint_id)
    look_again(state)
    return deleted


def own_headers(state: State, endpoint: EndpointView) -> dict[str, str] | None:
    """Return an endpoint's own headers, unmasked; ``None`` if no configured key decrypts them."""
    if endpoint.headers is None:
        return {}
    try:
        found: dict[str, str] = json.loads(state.cipher.decrypt(endpoint.headers))
    except DecryptionError:
        return None
    return found
