"""The JSON API: the status of one job's webhook for clients, and everything for operators.

Owns the blueprint, its routes, and which permission each needs. What is read and changed is in ``storage``,
what an answer may contain in :mod:`.api_schemas`, who may in :mod:`.permissions`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flask import Blueprint, Response, request

from ..errors import ConfigurationError, StorageUnavailableError
from ..protocol.headers import mask_headers
from ..protocol.payloads import RenderContext, job_payload, occurrence_from_json
from ..protocol.signatures import generate_secret
from ..state import State
from ..storage import endpoints, queries
from ..storage.dispatchers import dispatcher_alive, pause, resume
from ..storage.endpoints import ROTATION_GRACE_S, NewEndpoint
from ..storage.feed import events_after
from ..storage.filters import DeliveryFilter
from ..storage.queries import EndpointView, EventView, Page
from ..storage.retention import resend
from ..storage.statistics import statistics
from . import api_schemas as schemas
from . import operations
from .api_responses import (
    ApiError,
    idempotency_key,
    install,
    is_possible_id,
    json_input,
    not_found,
    query_input,
)
from .bulk import cancel_some, delete_endpoint_some, recover_some
from .csrf import csrf_token, is_forgeable, replace_csrf_protect
from .job_status import job_status
from .metrics import CONTENT_TYPE, metrics_text
from .permissions import Permission, is_allowed

View = TypeVar("View", bound=Callable[..., Any])

_DELIVERIES = schemas.DeliverySchema(many=True)
_DELIVERY = schemas.DeliverySchema()
_ATTEMPTS = schemas.AttemptSchema(many=True)
_EVENT = schemas.EventSchema()
_ENDPOINT = schemas.EndpointSchema()
_STATISTICS = schemas.StatisticsSchema()
_NOTHING = schemas.NoInput()


def create_blueprint(state: State) -> Blueprint:
    """Return the blueprint of one app, mounted at ``URL_PREFIX``."""
    blueprint = Blueprint("rq_webhooks", __name__, url_prefix=state.settings.url_prefix)
    install(blueprint)
    replace_csrf_protect(blueprint)
    _add_reads(blueprint, state)
    _add_changes(blueprint, state)
    _add_endpoints(blueprint, state)
    return blueprint


def requires(state: State, permission: Permission) -> Callable[[View], View]:
    """Let a view run only for callers with *permission*; with ``manage``, only requests not forged.

    :raises ApiError: 403.
    """

    def decorate(view: View) -> View:
        @functools.wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not is_allowed(state, permission):
                raise ApiError(403, "forbidden", f"This needs the permission {permission!r}.")
            if permission == "manage" and is_forgeable():
                raise ApiError(
                    403,
                    "csrf",
                    "A caller known by cookie must send the token of GET api/csrf as X-CSRFToken.",
                )
            if not all(is_possible_id(item_id) for item_id in kwargs.values()):
                raise not_found("id")
            return view(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def _add_reads(blueprint: Blueprint, state: State) -> None:
    @blueprint.get("/jobs/<path:job_id>")
    @blueprint.get("/job/<path:job_id>/webhook", endpoint="job_webhook")
    def job(job_id: str) -> Any:
        return job_status(state, job_id)

    @blueprint.get("/health")
    def health() -> Any:
        try:
            ok = dispatcher_alive(state.database)
        except StorageUnavailableError:
            ok = False
        return {"ok": ok}, 200 if ok else 503

    @blueprint.get("/metrics")
    @requires(state, "read")
    def metrics() -> Any:
        try:
            text = metrics_text(state)
        except ConfigurationError as exc:
            raise ApiError(501, "not_installed", str(exc)) from exc
        return Response(text, content_type=CONTENT_TYPE)

    @blueprint.get("/openapi.json")
    @requires(state, "read")
    def openapi() -> Any:
        # Only here: nothing else needs what it imports.
        from .openapi import openapi_document

        return openapi_document(state, root=request.script_root)

    @blueprint.get("/api/csrf")
    @requires(state, "read")
    def csrf() -> Any:
        return {"csrf_token": csrf_token()}

    @blueprint.get("/api/events")
    def events() -> Any:
        wanted = query_input(schemas.FeedInput())
        runid = wanted.get("runid")
        may = runid is not None and is_allowed(state, "status", job_id=None, runid=runid)
        if not may and not is_allowed(state, "read"):
            raise ApiError(403, "forbidden", "This needs the permission 'read', or 'status' for one runid.")
        page = events_after(
            state.database,
            cursor=wanted.get("after") or None,
            runid=runid,
            event_type=wanted.get("type"),
            limit=wanted.get("limit", 50),
        )
        return {"items": [_told_event(state, event) for event in page.items], "cursor": page.cursor}

    @blueprint.get("/api/events/<event_id>")
    @requires(state, "read")
    def event(event_id: str) -> Any:
        found = queries.event_detail(state.database, event_id)
        if found is None:
            raise not_found("event")
        return _told_event(state, found)

    @blueprint.get("/api/deliveries")
    @requires(state, "read")
    def deliveries() -> Any:
        wanted = query_input(schemas.DeliveriesInput())
        page = queries.list_deliveries(
            state.database, _filter(wanted), cursor=wanted.get("cursor"), limit=wanted.get("limit", 50)
        )
        return {"items": _DELIVERIES.dump(page.items), "cursor": page.cursor}

    @blueprint.get("/api/deliveries/<delivery_id>")
    @requires(state, "read")
    def delivery(delivery_id: str) -> Any:
        found = queries.delivery_detail(state.database, delivery_id)
        if found is None:
            raise not_found("delivery")
        return {
            "delivery": _DELIVERY.dump(found.delivery),
            "attempts": _ATTEMPTS.dump(found.attempts),
            "event": _EVENT.dump(found.event),
            "endpoint": _told_endpoint(state, found.endpoint),
            "body": found.body.decode("utf-8", "replace"),
        }

    @blueprint.get("/api/endpoints")
    @requires(state, "read")
    def endpoints() -> Any:
        wanted = query_input(schemas.EndpointsInput())
        page: Page[EndpointView] = queries.list_endpoints(
            state.database,
            kind=wanted.get("kind", "standing"),
            cursor=wanted.get("cursor"),
            limit=wanted.get("limit", 50),
        )
        return {"items": [_told_endpoint(state, item) for item in page.items], "cursor": page.cursor}

    @blueprint.get("/api/endpoints/<endpoint_id>")
    @requires(state, "read")
    def endpoint(endpoint_id: str) -> Any:
        return _endpoint(state, endpoint_id)

    @blueprint.get("/api/stats")
    @requires(state, "read")
    def stats() -> Any:
        wanted = query_input(schemas.StatsInput())
        return _STATISTICS.dump(statistics(state.database, hours=wanted.get("hours", 24)))


def _add_changes(blueprint: Blueprint, state: State) -> None:
    @blueprint.post("/api/deliveries/<delivery_id>/resend")
    @requires(state, "manage")
    def resend_delivery(delivery_id: str) -> Any:
        json_input(_NOTHING)
        status = resend(state.database, delivery_id)
        if status is None:
            raise not_found("delivery")
        return {"id": delivery_id, "status": status}, 202

    @blueprint.post("/api/recover")
    @requires(state, "manage")
    def recover_many() -> Any:
        values = json_input(schemas.ManyInput())
        found = recover_some(state, _filter(values), values.get("cursor"))
        return {"recovered": found.done, "remaining": found.remaining, "cursor": found.cursor}

    @blueprint.post("/api/cancel")
    @requires(state, "manage")
    def cancel_many() -> Any:
        values = json_input(schemas.ManyInput())
        found = cancel_some(state, _filter(values), values.get("cursor"))
        return {"canceled": found.done, "remaining": found.remaining, "cursor": found.cursor}

    @blueprint.post("/api/pause")
    @requires(state, "manage")
    def pause_all() -> Any:
        json_input(_NOTHING)
        pause(state.database)
        return {"paused": True}

    @blueprint.post("/api/resume")
    @requires(state, "manage")
    def resume_all() -> Any:
        json_input(_NOTHING)
        resume(state.database)
        return {"paused": False}


def _add_endpoints(blueprint: Blueprint, state: State) -> None:
    def input_schema() -> Any:
        return schemas.endpoint_input(state.settings, state.url_policy, frozenset(state.formats))

    @blueprint.post("/api/endpoints")
    @requires(state, "manage")
    def create_endpoint() -> Any:
        key = idempotency_key()
        values = json_input(input_schema())
        # Signed unless that is refused by name: "secret": null.
        secret = values.pop("secret", generate_secret())
        endpoint = NewEndpoint(
            kind="standing", secret=secret, **operations.stored_values(state, values, creating=True)
        )
        try:
            endpoint_id = endpoints.create_standing(
                state.database, state.cipher, endpoint, namespace=state.namespace, idempotency_key=key
            )
        except endpoints.ExistsError as exc:
            made = queries.endpoint_detail(state.database, exc.endpoint_id)
            if made is None or made.url != endpoint.url:
                why = "This Idempotency-Key was used for another endpoint."
                raise ApiError(409, "idempotency_key", why) from None
            # Without the secret, which was in the first answer only.
            return _told_endpoint(state, made), 200, {"Idempotent-Replayed": "true"}
        return {**_endpoint(state, endpoint_id), "secret": secret}, 201

    @blueprint.patch("/api/endpoints/<endpoint_id>")
    @requires(state, "manage")
    def change_endpoint(endpoint_id: str) -> Any:
        values = json_input(input_schema(), partial=True)
        for name in ("secret", "scope"):
            if name in values:
                why = "Use rotate for a new secret." if name == "secret" else "Cannot be changed."
                raise ApiError(400, "invalid", "The request is not acceptable.", {name: [why]})
        changes = operations.stored_values(state, values, creating=False)
        if not endpoints.update_standing(state.database, state.cipher, endpoint_id, changes):
            raise not_found("endpoint")
        return _endpoint(state, endpoint_id)

    @blueprint.delete("/api/endpoints/<endpoint_id>")
    @requires(state, "manage")
    def delete_endpoint(endpoint_id: str) -> Any:
        deleted = delete_endpoint_some(state, endpoint_id)
        if deleted is None:
            raise not_found("endpoint")
        if not deleted:
            # Disabled, and with fewer deliveries; the same request again goes on.
            return _endpoint(state, endpoint_id), 202
        return "", 204

    @blueprint.post("/api/endpoints/<endpoint_id>/rotate")
    @requires(state, "manage")
    def rotate_endpoint(endpoint_id: str) -> Any:
        values = json_input(schemas.RotateInput())
        secret = values.get("secret") or generate_secret()
        grace_s = values.get("grace_s", ROTATION_GRACE_S)
        if not endpoints.rotate_secret(state.database, state.cipher, endpoint_id, secret, grace_s=grace_s):
            raise not_found("endpoint")
        return {"id": endpoint_id, "secret": secret, "grace_s": grace_s}

    @blueprint.post("/api/endpoints/<endpoint_id>/test")
    @requires(state, "manage")
    def test_endpoint(endpoint_id: str) -> Any:
        json_input(_NOTHING)
        found = queries.endpoint_detail(state.database, endpoint_id)
        if found is None or found.kind != "standing":
            raise not_found("endpoint")
        event = operations.ping(state, endpoint_id)
        return {"event_id": event.event_id, "deliveries": event.deliveries}, 202

    @blueprint.post("/api/endpoints/<endpoint_id>/enable")
    @requires(state, "manage")
    def enable_endpoint(endpoint_id: str) -> Any:
        json_input(_NOTHING)
        if not endpoints.enable_standing(state.database, endpoint_id):
            raise not_found("endpoint")
        return _endpoint(state, endpoint_id)

    @blueprint.post("/api/endpoints/<endpoint_id>/disable")
    @requires(state, "manage")
    def disable_endpoint(endpoint_id: str) -> Any:
        json_input(_NOTHING)
        if not endpoints.disable_standing(state.database, endpoint_id):
            raise not_found("endpoint")
        return _endpoint(state, endpoint_id)


def _filter(values: Mapping[str, Any]) -> DeliveryFilter:
    status = values.get("status")
    names = ("since", "until", "endpoint_id", "host", "event_id", "job_id", "runid")
    return DeliveryFilter(
        statuses=tuple(status) if status else None,
        event_type=values.get("event"),
        **{name: values[name] for name in names if name in values},
    )


def _endpoint(state: State, endpoint_id: str) -> dict[str, Any]:
    found = queries.endpoint_detail(state.database, endpoint_id)
    if found is None:
        raise not_found("endpoint")
    return _told_endpoint(state, found)


def _told_endpoint(state: State, endpoint: EndpointView) -> dict[str, Any]:
    told: dict[str, Any] = _ENDPOINT.dump(endpoint)
    headers = operations.own_headers(state, endpoint)
    told["headers"] = headers and mask_headers(headers, header_prefix=state.settings.header_prefix)
    return told


def _told_event(state: State, event: EventView) -> dict[str, Any]:
    """Return an event with its payload, as the format ``job`` tells it."""
    told: dict[str, Any] = _EVENT.dump(event)
    if event.payload is not None:
        settings = state.settings
        told["payload"] = job_payload(
            occurrence_from_json(event.payload),
            RenderContext(
                event_id=event.id,
                runid=event.runid,
                reference=None,
                traceback=settings.traceback,
                include_result=settings.include_result,
                max_bytes=settings.max_payload_bytes,
            ),
        )
    return told
