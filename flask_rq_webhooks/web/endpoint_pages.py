"""The pages about endpoints: the list, one endpoint, its form, and what an operator does with it."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, abort, request
from werkzeug.datastructures import MultiDict

from ..protocol.events import EVERY_TYPE, OPERATOR_TYPES, OPTIONAL_TYPES, TERMINAL_TYPES
from ..state import State
from ..storage import queries
from ..storage.filters import DeliveryFilter
from ..storage.queries import EndpointView
from ..storage.standing_endpoints import ROTATION_GRACE_S
from . import operations
from .api_schemas import RotateInput
from .forms import endpoint_values, read_filter
from .page_frame import Pages, done, possible_id, render
from .pages import PAGE_ITEMS, done_some, refresh_s

#: Deliveries on the page of one endpoint.
FEW_ITEMS = 20


def add_pages(blueprint: Blueprint, state: State) -> None:
    """Let *blueprint* serve these pages."""
    pages = Pages(blueprint, state)
    _add_lists(pages, state)
    _add_forms(pages, state)
    _add_actions(pages, state)


def _add_lists(pages: Pages, state: State) -> None:
    @pages.get("/endpoints", "endpoints")
    def endpoints() -> Any:
        kind = request.args.get("kind", "standing")
        if kind not in ("standing", "job"):
            abort(404)
        listed: queries.Page[EndpointView] = queries.list_endpoints(
            state.database, kind=kind, cursor=request.args.get("cursor") or None, limit=PAGE_ITEMS
        )
        return render(state, "endpoints.html", kind=kind, listed=listed, not_first="cursor" in request.args)

    @pages.get("/endpoints/<endpoint_id>", "endpoint")
    def endpoint(endpoint_id: str) -> Any:
        found = queries.endpoint_detail(state.database, possible_id(endpoint_id))
        if found is None:
            abort(404)
        listed = queries.list_deliveries(
            state.database, DeliveryFilter(endpoint_id=endpoint_id), limit=FEW_ITEMS
        )
        return render(
            state,
            "endpoint.html",
            endpoint=found,
            header_names=_header_names(state, found),
            listed=listed,
            grace_h=round(ROTATION_GRACE_S / 3600),
            every_type=EVERY_TYPE,
            refresh_s=refresh_s(listed.items),
        )


def _add_forms(pages: Pages, state: State) -> None:
    @pages.get("/endpoints/new", "new_endpoint", "manage")
    def new_endpoint() -> Any:
        return _form(state, None, {})

    @pages.post("/endpoints/new", "create_endpoint")
    def create_endpoint() -> Any:
        try:
            created = operations.create(state, endpoint_values(state, request.form, creating=True))
        except operations.InvalidInputError as exc:
            return _form(state, None, exc.details), 400
        if not created.generated:
            return done("created", ".page_endpoint", endpoint_id=created.endpoint_id)
        # In the answer itself: the only way for a secret to be nowhere afterwards.
        return _secret_page(state, created.endpoint_id, created.secret, created=True), 201

    @pages.get("/endpoints/<endpoint_id>/edit", "edit_endpoint", "manage")
    def edit_endpoint(endpoint_id: str) -> Any:
        return _form(state, operations.standing(state, possible_id(endpoint_id)), {})

    @pages.post("/endpoints/<endpoint_id>/edit", "change_endpoint")
    def change_endpoint(endpoint_id: str) -> Any:
        found = operations.standing(state, possible_id(endpoint_id))
        try:
            operations.change(state, endpoint_id, endpoint_values(state, request.form, creating=False))
        except operations.InvalidInputError as exc:
            return _form(state, found, exc.details), 400
        return done("changed", ".page_endpoint", endpoint_id=endpoint_id)


def _add_actions(pages: Pages, state: State) -> None:
    @pages.post("/endpoints/<endpoint_id>/rotate", "rotate")
    def rotate(endpoint_id: str) -> Any:
        operations.standing(state, possible_id(endpoint_id))
        grace_h = request.form.get("grace_h", float("nan"), type=float)
        values = operations.checked(RotateInput(), {"grace_s": grace_h * 3600})
        secret = operations.rotate(state, endpoint_id, **values)
        return _secret_page(state, endpoint_id, secret, created=False, grace_h=grace_h)

    @pages.post("/endpoints/<endpoint_id>/test", "test")
    def test(endpoint_id: str) -> Any:
        event = operations.ping(state, possible_id(endpoint_id))
        where = DeliveryFilter(event_id=event.event_id)
        (delivery,) = queries.list_deliveries(state.database, where, limit=1).items
        return done("pinged", ".page_delivery", delivery_id=delivery.id)

    @pages.post("/endpoints/<endpoint_id>/enable", "enable")
    def enable(endpoint_id: str) -> Any:
        before = operations.enable(state, possible_id(endpoint_id))
        if "recover" not in request.form:
            return done("enabled", ".page_endpoint", endpoint_id=endpoint_id)
        since = operations.missed_since(state, before)
        # In the form of the list's own field, which continues with what is left.
        text = since.replace(tzinfo=None).isoformat(timespec="milliseconds")
        wanted = read_filter(MultiDict([("endpoint_id", endpoint_id), ("since", text)]))
        did = operations.recover(state, wanted.where)
        if did.cursor is not None:
            return done_some("recovered", wanted, did)
        return done("enabled_recovered", ".page_endpoint", did.done, endpoint_id=endpoint_id)

    @pages.post("/endpoints/<endpoint_id>/disable", "disable")
    def disable(endpoint_id: str) -> Any:
        operations.disable(state, possible_id(endpoint_id))
        return done("disabled", ".page_endpoint", endpoint_id=endpoint_id)

    @pages.post("/endpoints/<endpoint_id>/delete", "delete")
    def delete(endpoint_id: str) -> Any:
        if operations.delete(state, possible_id(endpoint_id)):
            return done("deleted", ".page_endpoints")
        return done("deleted_some", ".page_endpoint", endpoint_id=endpoint_id)


def _form(state: State, endpoint: EndpointView | None, errors: Any) -> str:
    return render(
        state,
        "endpoint_form.html",
        endpoint=endpoint,
        errors=errors,
        sent=request.form if request.method == "POST" else None,
        header_names=[] if endpoint is None else _header_names(state, endpoint),
        terminal_types=sorted(TERMINAL_TYPES),
        optional_types=sorted(OPTIONAL_TYPES | OPERATOR_TYPES),
        every_type=EVERY_TYPE,
        formats=sorted(state.formats),
        settings=state.settings,
    )


def _secret_page(
    state: State, endpoint_id: str, secret: str | None, *, created: bool, grace_h: float = 0
) -> str:
    return render(
        state,
        "secret.html",
        endpoint=operations.standing(state, endpoint_id),
        secret=secret,
        created=created,
        grace_h=grace_h,
    )


def _header_names(state: State, endpoint: EndpointView) -> list[str] | None:
    headers = operations.own_headers(state, endpoint)
    return None if headers is None else list(headers)
