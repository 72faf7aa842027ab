"""The JSON API: the state of one job's webhook for clients, and everything for operators.

Each route declares its permission, input and response (see :mod:`.api_contract`). Changes are made in
:mod:`.operations`; :mod:`.api_schemas` decides what a response may contain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Response, current_app, request
from redis.exceptions import RedisError

from ..errors import StorageUnavailableError
from ..protocol.headers import mask_headers
from ..state import State
from ..storage import queries
from ..storage.dispatchers import dispatcher_alive
from ..storage.feed import events_after
from ..storage.queries import EndpointView, EventView, Page, shallow
from ..storage.standing_endpoints import ROTATION_GRACE_S
from ..storage.statistics import statistics, tenant_numbers
from . import api_schemas as schemas
from . import operations
from .api_contract import Api, ApiError, not_found, openapi_document, routes_of
from .blueprint import WebhookBlueprint, csrf_token, is_allowed, own_tenant, replace_csrf_protect
from .job_status import job_status
from .monitoring import CONTENT_TYPE, metrics_text, reports_are_stuck


def create_blueprint(state: State) -> WebhookBlueprint:
    """Return the blueprint of one app, mounted at ``URL_PREFIX``."""
    blueprint = WebhookBlueprint("rq_webhooks", __name__, url_prefix=state.settings.url_prefix)
    api = Api(blueprint, state)
    replace_csrf_protect(blueprint)
    _add_open_routes(api, state)
    _add_reads(api, state)
    _add_changes(api, state)
    _add_endpoint_changes(api, state)
    return blueprint


def _add_open_routes(api: Api, state: State) -> None:
    not_modified = {304: (None, "Unchanged since the ETag in If-None-Match.")}

    @api.route(
        "GET", "/jobs/<path:job_id>", "status", schemas.StatusSchema, also=not_modified, asks_itself=True
    )
    def job(job_id: str) -> Any:
        """Return the state of one job's webhook."""
        return job_status(state, job_id)

    @api.route(
        "GET", "/job/<path:job_id>/webhook", "status", schemas.StatusSchema, also=not_modified,
        asks_itself=True,
    )  # fmt: skip
    def job_webhook(job_id: str) -> Any:
        """Return the same under another name."""
        return job_status(state, job_id)

    @api.route(
        "GET", "/health", None, schemas.HealthSchema,
        also={503: (schemas.HealthSchema, "Nothing is delivered.")},
    )  # fmt: skip
    def health() -> Any:
        """Return whether a dispatcher is alive and keeps up with what callbacks report."""
        try:
            ok = dispatcher_alive(state.database) and not reports_are_stuck(state)
        except (StorageUnavailableError, RedisError):
            ok = False
        return {"ok": ok}, 200 if ok else 503, {}

    @api.route("GET", "/keys", None, schemas.KeysSchema)
    def keys() -> Any:
        """Return the public keys that verify v1a signatures, the one that signs first."""
        found = [
            {"key": key.public, "algorithm": "ed25519", "signs": number == 0}
            for number, key in enumerate(state.signing_keys)
        ]
        return {"keys": found}, 200, {"Cache-Control": "public, max-age=300"}

    @api.route("GET", "/metrics", "read", "text/plain")
    def metrics() -> Any:
        """Return numbers for Prometheus."""
        return Response(metrics_text(state), content_type=CONTENT_TYPE)

    @api.route("GET", "/openapi.json", "read", "application/json")
    def openapi() -> Any:
        """Return this description."""
        return openapi_document(state, routes_of(current_app), root=request.script_root)

    @api.route("GET", "/api/csrf", "read", schemas.CSRFSchema, own=True)
    def csrf(tenant: str | None) -> Any:
        """Return the token that callers known by cookie send with every change."""
        return {"csrf_token": csrf_token()}


def _add_reads(api: Api, state: State) -> None:
    @api.route(
        "GET", "/api/events", "read", schemas.FeedSchema, query=schemas.FeedInput, own=True, asks_itself=True
    )
    def events(wanted: Mapping[str, Any]) -> Any:
        """Return events in the order they were stored; with a runid, the permission status is enough."""
        runid = wanted.get("runid")
        may = runid is not None and is_allowed(state, "status", job_id=None, runid=runid)
        may = may or is_allowed(state, "read")
        tenant = None if may else own_tenant(state)
        if not may and tenant is None:
            raise ApiError(403, "forbidden", "This needs the permission 'read', or 'status' for one runid.")
        chosen = {
            **wanted,
            "cursor": wanted.get("cursor") or None,
            "tenant": operations.scoped(wanted, tenant),
        }
        page = events_after(state.database, **chosen)
        return {"items": [_with_payload(state, event) for event in page.items], "cursor": page.cursor}

    @api.route("GET", "/api/events/<event_id>", "read", schemas.EventWithPayloadSchema, own=True)
    def event(event_id: str, tenant: str | None) -> Any:
        """Return one event."""
        found = queries.event_detail(state.database, event_id, tenant=tenant)
        if found is None:
            raise not_found("event")
        return _with_payload(state, found)

    @api.route(
        "GET", "/api/deliveries", "read", schemas.DeliveriesSchema, query=schemas.DeliveriesInput, own=True
    )
    def deliveries(wanted: Mapping[str, Any], tenant: str | None) -> Any:
        """Return deliveries, newest first."""
        where = operations.delivery_filter(wanted, tenant)
        return operations.list_deliveries(
            state, where, tenant=tenant, cursor=wanted.get("cursor"), limit=wanted.get("limit", 50)
        )

    @api.route("GET", "/api/deliveries/<delivery_id>", "read", schemas.DeliveryDetailSchema, own=True)
    def delivery(delivery_id: str, tenant: str | None) -> Any:
        """Return one delivery with its attempts."""
        found = operations.delivery(state, delivery_id, tenant=tenant)
        return shallow(found) | {"endpoint": _with_headers(state, found.endpoint)}

    @api.route(
        "GET", "/api/endpoints", "read", schemas.EndpointsSchema, query=schemas.EndpointsInput, own=True
    )
    def endpoints(wanted: Mapping[str, Any], tenant: str | None) -> Any:
        """Return endpoints, newest first."""
        chosen = {**wanted, "tenant": operations.scoped(wanted, tenant)}
        page: Page[EndpointView] = queries.list_endpoints(state.database, **chosen)
        return {"items": [_with_headers(state, item) for item in page.items], "cursor": page.cursor}

    @api.route("GET", "/api/endpoints/<endpoint_id>", "read", schemas.EndpointSchema, own=True)
    def endpoint(endpoint_id: str, tenant: str | None) -> Any:
        """Return one endpoint."""
        return _endpoint(state, endpoint_id, tenant)

    @api.route("GET", "/api/stats", "read", schemas.StatisticsSchema, query=schemas.StatsInput, own=True)
    def stats(wanted: Mapping[str, Any], tenant: str | None) -> Any:
        """Return the numbers of the overview."""
        return statistics(state.database, hours=wanted.get("hours", 24), tenant=tenant)

    @api.route("GET", "/api/tenants", "read", schemas.TenantsSchema, query=schemas.StatsInput)
    def tenants(wanted: Mapping[str, Any]) -> Any:
        """Return the tenants with recent failures or a backlog."""
        return {"items": tenant_numbers(state.database, hours=wanted.get("hours", 24))}


def _add_changes(api: Api, state: State) -> None:
    @api.route(
        "POST", "/api/deliveries/<delivery_id>/resend", "manage", schemas.ResentSchema, status=202,
        body=schemas.NoInput, own=True,
    )  # fmt: skip
    def resend_delivery(delivery_id: str, tenant: str | None) -> Any:
        """Make a delivery due now: same event, same bytes."""
        return {"id": delivery_id, "status": operations.resend(state, delivery_id, tenant=tenant)}

    @api.route("POST", "/api/recover", "manage", schemas.RecoveredSchema, body=schemas.ManyInput, own=True)
    def recover_many(values: Mapping[str, Any], tenant: str | None) -> Any:
        """Make many deliveries due now."""
        where = operations.delivery_filter(values, tenant)
        return operations.recover(state, where, values.get("cursor"))

    @api.route("POST", "/api/cancel", "manage", schemas.CanceledSchema, body=schemas.ManyInput)
    def cancel_many(values: Mapping[str, Any]) -> Any:
        """Cancel deliveries that are not finished."""
        return operations.cancel(state, operations.delivery_filter(values), values.get("cursor"))

    @api.route("POST", "/api/erase", "manage", schemas.ErasedSchema, body=schemas.EraseInput)
    def erase(values: Mapping[str, Any]) -> Any:
        """Erase bodies, results, answers and headers of a job, a run or a reference; the log stays."""
        return operations.erase(state, values)

    @api.route(
        "POST", "/api/tenants/disable", "manage", schemas.TenantDisabledSchema, body=schemas.TenantInput
    )
    def disable_tenant(values: Mapping[str, Any]) -> Any:
        """Disable all standing endpoints of a tenant."""
        return {**values, "disabled": operations.disable_tenant(state, values["tenant"])}

    @api.route("POST", "/api/pause", "manage", schemas.PausedSchema, body=schemas.NoInput)
    def pause_all() -> Any:
        """Stop all sending."""
        operations.pause(state)
        return {"paused": True}

    @api.route("POST", "/api/resume", "manage", schemas.PausedSchema, body=schemas.NoInput)
    def resume_all() -> Any:
        """Resume sending."""
        operations.resume(state)
        return {"paused": False}


def _add_endpoint_changes(api: Api, state: State) -> None:
    one = "/api/endpoints/<endpoint_id>"

    @api.route(
        "POST", "/api/endpoints", "manage", schemas.NewEndpointSchema, status=201, body="EndpointInput",
        idempotent=True, own=True,
        also={200: (schemas.NewEndpointSchema, "Created before, with the same Idempotency-Key.")},
    )  # fmt: skip
    def create_endpoint(values: Mapping[str, Any], key: str | None, tenant: str | None) -> Any:
        """Create a standing endpoint."""
        created = operations.create(state, values, idempotency_key=key, tenant=tenant)
        shown = _endpoint(state, created.endpoint_id, tenant)
        if created.replayed:
            # Without the secret, which was in the first response only.
            return shown, 200, {"Idempotent-Replayed": "true"}
        return {**shown, "secret": created.secret}

    @api.route("PATCH", one, "manage", schemas.EndpointSchema, body="EndpointChangeInput", own=True)
    def change_endpoint(values: Mapping[str, Any], endpoint_id: str, tenant: str | None) -> Any:
        """Change a standing endpoint."""
        operations.change(state, endpoint_id, values, tenant=tenant)
        return _endpoint(state, endpoint_id, tenant)

    @api.route(
        "DELETE", one, "manage", None, status=204, own=True,
        also={202: (schemas.EndpointSchema, "Disabled; deliveries are left. Send the request again.")},
    )  # fmt: skip
    def delete_endpoint(endpoint_id: str, tenant: str | None) -> Any:
        """Delete a standing endpoint with its deliveries."""
        if operations.delete(state, endpoint_id, tenant=tenant):
            return None
        return _endpoint(state, endpoint_id, tenant), 202, {}

    @api.route("POST", f"{one}/rotate", "manage", schemas.RotatedSchema, body=schemas.RotateInput, own=True)
    def rotate_endpoint(values: dict[str, Any], endpoint_id: str, tenant: str | None) -> Any:
        """Give it a new secret; the old ones also sign for a while."""
        values.setdefault("grace_s", ROTATION_GRACE_S)
        secret = operations.rotate(state, endpoint_id, **values, tenant=tenant)
        return {"id": endpoint_id, **values, "secret": secret}

    @api.route(
        "POST", f"{one}/test", "manage", schemas.PingedSchema, status=202, body=schemas.NoInput, own=True
    )
    def test_endpoint(endpoint_id: str, tenant: str | None) -> Any:
        """Send it a webhook.ping."""
        return operations.ping(state, endpoint_id, tenant=tenant)

    @api.route("POST", f"{one}/enable", "manage", schemas.EndpointSchema, body=schemas.NoInput, own=True)
    def enable_endpoint(endpoint_id: str, tenant: str | None) -> Any:
        """Let it get deliveries again."""
        operations.enable(state, endpoint_id, tenant=tenant)
        return _endpoint(state, endpoint_id, tenant)

    @api.route("POST", f"{one}/disable", "manage", schemas.EndpointSchema, body=schemas.NoInput, own=True)
    def disable_endpoint(endpoint_id: str, tenant: str | None) -> Any:
        """Stop it from getting new deliveries."""
        operations.disable(state, endpoint_id, tenant=tenant)
        return _endpoint(state, endpoint_id, tenant)


def _endpoint(state: State, endpoint_id: str, tenant: str | None) -> dict[str, Any]:
    found = queries.endpoint_detail(state.database, endpoint_id, tenant=tenant)
    if found is None:
        raise not_found("endpoint")
    return _with_headers(state, found)


def _with_headers(state: State, endpoint: EndpointView) -> dict[str, Any]:
    """Return an endpoint with its headers decrypted and masked."""
    headers = operations.own_headers(state, endpoint)
    masked = headers and mask_headers(headers, header_prefix=state.settings.header_prefix)
    return shallow(endpoint) | {"headers": masked}


def _with_payload(state: State, event: EventView) -> dict[str, Any]:
    """Return an event with its payload, as the format ``job`` renders it."""
    return shallow(event) | {"payload": operations.event_payload(state, event)}
