"""The pages about endpoints: the list, one endpoint, its form, and its actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import abort, request
from werkzeug.datastructures import MultiDict

from ..accept.tenants import is_tenant
from ..protocol.events import EVERY_TYPE, OPERATOR_TYPES, OPTIONAL_TYPES, TERMINAL_TYPES
from ..state import State
from ..storage import queries
from ..storage.filters import DeliveryFilter
from ..storage.queries import EndpointView
from ..storage.standing_endpoints import ROTATION_GRACE_S
from . import operations
from .api_schemas import RotateInput
from .forms import endpoint_values, read_filter
from .page_frame import Pages, Shown, done, environment, page
from .pages import PAGE_ITEMS, done_some, refresh_s

#: Deliveries on the page of one endpoint.
FEW_ITEMS = 20


def add_pages(pages: Pages) -> None:
    """Serve these pages."""
    _add_lists(pages, pages.state)
    _add_forms(pages, pages.state)
    _add_actions(pages, pages.state)


def _add_lists(pages: Pages, state: State) -> None:
    @pages.get("/endpoints", "endpoints")
    def endpoints(tenant: str | None) -> Any:
        kind = request.args.get("kind", "standing")
        if kind not in ("standing", "job"):
            abort(404)
        chosen = operations.scoped(request.args, tenant) or None
        if chosen is not None and not is_tenant(chosen):
            abort(404)
        listed: queries.Page[EndpointView] = queries.list_endpoints(
            state.database,
            kind=kind,
            tenant=chosen,
            cursor=request.args.get("cursor") or None,
            limit=PAGE_ITEMS,
        )
        return page(
            "endpoints.html",
            kind=kind,
            chosen={} if tenant is not None or chosen is None else {"tenant": chosen},
            listed=listed,
            not_first="cursor" in request.args,
        )

    @pages.get("/endpoints/<endpoint_id>", "endpoint")
    def endpoint(endpoint_id: str, tenant: str | None) -> Any:
        found = queries.endpoint_detail(state.database, endpoint_id, tenant=tenant)
        if found is None:
            abort(404)
        where = DeliveryFilter(endpoint_id=endpoint_id)
        listed = operations.list_deliveries(state, where, tenant=tenant, limit=FEW_ITEMS)
        signed = found.kind == "standing" and (found.secrets > 0 or found.sign_payload)
        return page(
            "endpoint.html",
            endpoint=found,
            header_names=_header_names(state, found),
            listed=listed,
            grace_h=round(ROTATION_GRACE_S / 3600),
            every_type=EVERY_TYPE,
            sent_headers=_sent_headers(state, found) if signed else {},
            snippets=_snippets(state, found) if signed else {},
            refresh_s=refresh_s(listed.items),
        )


def _add_forms(pages: Pages, state: State) -> None:
    @pages.get("/endpoints/new", "new_endpoint", "manage")
    def new_endpoint(tenant: str | None) -> Any:
        return _form(state, None)

    @pages.post("/endpoints/new", "create_endpoint")
    def create_endpoint(tenant: str | None) -> Any:
        try:
            values = endpoint_values(state, request.form, creating=True, tenant=tenant)
            created = operations.create(state, values, tenant=tenant)
        except operations.InvalidInputError as exc:
            return _form(state, None, 400, exc.details)
        except operations.TenantLimitError as exc:
            return _form(state, None, 409, {"url": [str(exc)]})
        if not created.generated:
            return done("created", ".page_endpoint", endpoint_id=created.endpoint_id)
        # Shown in this response, not after a redirect, so that it is stored nowhere.
        endpoint = operations.standing(state, created.endpoint_id, tenant=tenant)
        return page("secret.html", 201, endpoint=endpoint, secret=created.secret, grace_h=None)

    @pages.get("/endpoints/<endpoint_id>/edit", "edit_endpoint", "manage")
    def edit_endpoint(endpoint_id: str, tenant: str | None) -> Any:
        return _form(state, operations.standing(state, endpoint_id, tenant=tenant))

    @pages.post("/endpoints/<endpoint_id>/edit", "change_endpoint")
    def change_endpoint(endpoint_id: str, tenant: str | None) -> Any:
        found = operations.standing(state, endpoint_id, tenant=tenant)
        try:
            values = endpoint_values(state, request.form, creating=False, tenant=tenant)
            operations.change(state, endpoint_id, values, tenant=tenant)
        except operations.InvalidInputError as exc:
            return _form(state, found, 400, exc.details)
        return done("changed", ".page_endpoint", endpoint_id=endpoint_id)


def _add_actions(pages: Pages, state: State) -> None:
    @pages.post("/endpoints/<endpoint_id>/rotate", "rotate")
    def rotate(endpoint_id: str, tenant: str | None) -> Any:
        endpoint = operations.standing(state, endpoint_id, tenant=tenant)
        grace_h = request.form.get("grace_h", float("nan"), type=float)
        values = operations.checked(RotateInput(), {"grace_s": grace_h * 3600})
        secret = operations.rotate(state, endpoint_id, **values, tenant=tenant)
        return page("secret.html", endpoint=endpoint, secret=secret, grace_h=grace_h)

    @pages.post("/endpoints/<endpoint_id>/test", "test")
    def test(endpoint_id: str, tenant: str | None) -> Any:
        event = operations.ping(state, endpoint_id, tenant=tenant)
        where = DeliveryFilter(event_id=event.event_id)
        (delivery,) = queries.list_deliveries(state.database, where, limit=1).items
        return done("pinged", ".page_delivery", delivery_id=delivery.id)

    @pages.post("/endpoints/<endpoint_id>/enable", "enable")
    def enable(endpoint_id: str, tenant: str | None) -> Any:
        before = operations.enable(state, endpoint_id, tenant=tenant)
        if "recover" not in request.form:
            return done("enabled", ".page_endpoint", endpoint_id=endpoint_id)
        since = operations.missed_since(state, before)
        # In the format of the list's own field, which continues with what is left.
        text = since.replace(tzinfo=None).isoformat(timespec="milliseconds")
        wanted = read_filter(MultiDict([("endpoint_id", endpoint_id), ("since", text)]), tenant)
        did = operations.recover(state, wanted.where)
        if did.cursor is not None:
            return done_some("recovered", wanted, did)
        return done("enabled_recovered", ".page_endpoint", did.done, endpoint_id=endpoint_id)

    @pages.post("/endpoints/<endpoint_id>/disable", "disable")
    def disable(endpoint_id: str, tenant: str | None) -> Any:
        operations.disable(state, endpoint_id, tenant=tenant)
        return done("disabled", ".page_endpoint", endpoint_id=endpoint_id)

    @pages.post("/endpoints/<endpoint_id>/delete", "delete")
    def delete(endpoint_id: str, tenant: str | None) -> Any:
        if operations.delete(state, endpoint_id, tenant=tenant):
            return done("deleted", ".page_endpoints")
        return done("deleted_some", ".page_endpoint", endpoint_id=endpoint_id)


def _form(
    state: State, endpoint: EndpointView | None, status: int = 200, errors: Mapping[str, Any] | None = None
) -> Shown:
    return page(
        "endpoint_form.html",
        status,
        endpoint=endpoint,
        errors=errors or {},
        sent=request.form if request.method == "POST" else None,
        header_names=[] if endpoint is None else _header_names(state, endpoint),
        terminal_types=sorted(TERMINAL_TYPES),
        optional_types=sorted(OPTIONAL_TYPES | OPERATOR_TYPES),
        every_type=EVERY_TYPE,
        formats=sorted(state.formats),
        settings=state.settings,
    )


#: Language of a receiver → template of its code.
_SNIPPETS = {"Python": "python", "Node.js": "node", "PHP": "php", "Go": "go"}

#: Payload format → the field that holds the event type.
_TYPE_FIELDS = {"job": "event", "task": "event_type", "standard": "type"}


def _snippets(state: State, endpoint: EndpointView) -> dict[str, str]:
    """Return, by language, code that verifies what this endpoint receives."""
    names = {
        "rqw_event_header": f"{state.settings.header_prefix}-Event",
        "rqw_type_field": _TYPE_FIELDS.get(endpoint.format),
    }
    return {
        language: environment().get_template(f"rq_webhooks/verify_{name}.txt").render(names)
        for language, name in _SNIPPETS.items()
    }


def _sent_headers(state: State, endpoint: EndpointView) -> dict[str, str]:
    """Return the headers that come with each webhook to this endpoint, and what they contain."""
    settings = state.settings
    prefix = settings.header_prefix
    time = "ISO 8601" if endpoint.format == "task" else "unix seconds"
    return {
        "webhook-id": "id of the event, the same in every attempt",
        "webhook-timestamp": "unix seconds of the attempt",
        "webhook-signature": "v1,<base64> for each secret that signs now; what the code above verifies",
        f"{prefix}-Event": "event type",
        f"{prefix}-Delivery": "id of the delivery",
        f"{prefix}-Attempt": "number of the attempt, from 1",
        settings.signature_header or f"{prefix}-Signature": "sha256=<hex> over the body alone, newest secret",
        settings.timestamp_header or f"{prefix}-Timestamp": f"time of the attempt, {time}",
    }


def _header_names(state: State, endpoint: EndpointView) -> list[str] | None:
    headers = operations.own_headers(state, endpoint)
    return None if headers is None else list(headers)
