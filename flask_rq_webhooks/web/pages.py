"""The pages: what was delivered, what was not and why, and what an operator can do about it.

Owns the routes of the pages and which permission each needs, and the headers pages are served with. What is
read and changed is in ``storage``, how values are written in :mod:`.shown`; everything else is in the
templates. The pages need no JavaScript; ours refreshes what is in flight.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import Blueprint, Response, abort, make_response, redirect, render_template, request, url_for
from redis.exceptions import RedisError
from werkzeug.datastructures import MultiDict

from ..errors import StorageUnavailableError
from ..protocol.events import OPTIONAL_TYPES, TERMINAL_TYPES
from ..protocol.signatures import generate_secret
from ..protocol.urls import redact_url
from ..queue.job_reader import JobRecord, read_jobs
from ..state import State
from ..storage import endpoints as endpoint_rows
from ..storage import queries
from ..storage.dispatchers import pause, resume
from ..storage.endpoints import ROTATION_GRACE_S, NewEndpoint
from ..storage.filters import DeliveryFilter
from ..storage.models import PENDING, SENDING
from ..storage.queries import CursorError, DeliveryView, EndpointView
from ..storage.retention import resend
from ..storage.statistics import COUNT_CAP, FINISHED_WINDOW, statistics
from ..storage.subscriptions import EVERY_TYPE
from . import formatting, operations
from .api_schemas import STATUSES
from .bulk import AT_MOST, Progress, cancel_some, delete_endpoint_some, recover_some
from .charts import OUTCOMES, RANGES, endings
from .csrf import FORM_FIELD, csrf_token, is_forgeable
from .forms import FilterForm, read_filter
from .health import everywhere, of_numbers
from .permissions import Permission, is_allowed

logger = logging.getLogger(__name__)

View = TypeVar("View", bound=Callable[..., Any])

#: Deliveries on a page of the list, and below an endpoint or event.
PAGE_ITEMS, FEW_ITEMS = 50, 20

#: Seconds after which a page that shows something in flight looks again; the overview while nothing is
#: delivered, which somebody is about to mend; and at rest.
REFRESH_S, REFRESH_ALARM_S, REFRESH_IDLE_S = 2, 5, 15

#: With our own base template nothing but our own files is loaded and nobody else's script runs.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
#: Inside a host's layout the host's own policy says what may be loaded.
POLICY_IN_HOST = "frame-ancestors 'self'"

OWN_BASE = "rq_webhooks/base.html"


def add_pages(blueprint: Blueprint, state: State) -> None:
    """Let *blueprint* serve the pages and their static files."""
    blueprint.static_folder = "static"
    # Not /static: with the prefix "/" that is the host's.
    blueprint.static_url_path = "/assets"
    _add_overview(blueprint, state)
    _add_deliveries(blueprint, state)
    _add_endpoints(blueprint, state)


def page(state: State, permission: Permission = "read") -> Callable[[View], View]:
    """Let a view run only for callers with *permission*, and serve what it returns safely.

    A change needs ``manage`` and a token of ours. Refusals are plain 403s, so that the host's own error
    pages show them.
    """

    def decorate(view: View) -> View:
        @functools.wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Response:
            if not is_allowed(state, permission):
                abort(403, f"This needs the permission {permission!r}.")
            if request.method == "POST" and is_forgeable():
                abort(403, "This form has expired. Go back, load the page again and repeat.")
            try:
                response = make_response(view(*args, **kwargs))
            except CursorError:
                abort(400 if request.method == "POST" else 404)
            except StorageUnavailableError as exc:
                logger.error("%s %r could not be answered: %s", request.method, request.path, exc)
                response = make_response(_render(state, "unavailable.html"), 503)
                response.headers["Retry-After"] = "5"
            own = state.settings.base_template is None
            response.headers["Content-Security-Policy"] = POLICY if own else POLICY_IN_HOST
            response.headers["Referrer-Policy"] = "same-origin"
            response.headers["Cache-Control"] = "no-store"
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        return wrapper  # type: ignore[return-value]

    return decorate


# -- overview -----------------------------------------------------------------------------------------------


def _add_overview(blueprint: Blueprint, state: State) -> None:
    @blueprint.get("/", endpoint="page_overview")
    @page(state)
    def overview() -> Any:
        back = request.args.get("hours", 24, type=int)
        if back not in RANGES:
            abort(404)
        now = datetime.now(UTC)
        numbers = statistics(state.database, hours=back)
        alarms = [*everywhere(state), *of_numbers(numbers, now)]
        idle_s = REFRESH_ALARM_S if any(alarm.severe for alarm in alarms) else REFRESH_IDLE_S
        moving = numbers.counts[SENDING] or numbers.oldest_due_s is not None
        return _render(
            state,
            "overview.html",
            now=now,
            numbers=numbers,
            chart=endings(numbers.hours, now=now, back=back),
            outcomes=OUTCOMES,
            back=back,
            ranges={24: "24 hours", 168: "7 days", 720: "30 days"},
            window=FINISHED_WINDOW,
            alarms=alarms,
            refresh_s=REFRESH_S if moving else idle_s,
        )

    @blueprint.post("/pause", endpoint="page_pause")
    @page(state, "manage")
    def pause_all() -> Any:
        pause(state.database)
        return _done("paused", ".page_overview")

    @blueprint.post("/resume", endpoint="page_resume")
    @page(state, "manage")
    def resume_all() -> Any:
        resume(state.database)
        return _done("resumed", ".page_overview")


# -- deliveries and events ----------------------------------------------------------------------------------


def _add_deliveries(blueprint: Blueprint, state: State) -> None:
    @blueprint.get("/deliveries", endpoint="page_deliveries")
    @page(state)
    def deliveries() -> Any:
        wanted = read_filter(request.args)
        text = request.args.get("q", "").strip()
        if text and "\0" not in text and len(text) <= 2048:
            found = _search(state, text)
            if found is not None:
                return found
        listed = queries.list_deliveries(
            state.database,
            wanted.where,
            cursor=request.args.get("cursor") or None,
            limit=PAGE_ITEMS,
        )
        return _render(
            state,
            "deliveries.html",
            filter=wanted,
            listed=listed,
            page_items=PAGE_ITEMS,
            statuses=STATUSES,
            event_types=sorted(TERMINAL_TYPES | OPTIONAL_TYPES),
            q=text,
            next_part=request.args.get("next", ""),
            left=request.args.get("left", type=int),
            at_most=AT_MOST,
            not_first="cursor" in request.args,
            refresh_s=_refresh_s(listed.items),
        )

    @blueprint.post("/deliveries/recover", endpoint="page_recover")
    @page(state, "manage")
    def recover_many() -> Any:
        wanted = _filter_of_form()
        return _done_some("recovered", wanted, recover_some(state, wanted.where, _cursor_of_form()))

    @blueprint.post("/deliveries/cancel", endpoint="page_cancel")
    @page(state, "manage")
    def cancel_many() -> Any:
        wanted = _filter_of_form()
        return _done_some("canceled", wanted, cancel_some(state, wanted.where, _cursor_of_form()))

    @blueprint.get("/deliveries/<delivery_id>", endpoint="page_delivery")
    @page(state)
    def delivery(delivery_id: str) -> Any:
        found = queries.delivery_detail(state.database, _known(delivery_id))
        if found is None:
            abort(404)
        last = found.attempts[-1] if found.attempts else None
        return _render(
            state,
            "delivery.html",
            found=found,
            delivery=found.delivery,
            job=_job(state, found.delivery.job_id),
            curl=formatting.as_curl(
                redact_url(found.delivery.url),
                last.request_headers if last else {"Content-Type": "application/json"},
                found.body,
            ),
            target=_target(found.delivery.url),
            refresh_s=_refresh_s([found.delivery]),
        )

    @blueprint.post("/deliveries/<delivery_id>/resend", endpoint="page_resend")
    @page(state, "manage")
    def resend_one(delivery_id: str) -> Any:
        status = resend(state.database, _known(delivery_id))
        if status is None:
            abort(404)
        done = "resent" if status == PENDING else "in_flight"
        return _done(done, ".page_delivery", delivery_id=delivery_id)

    @blueprint.get("/events/<event_id>", endpoint="page_event")
    @page(state)
    def event(event_id: str) -> Any:
        found = queries.event_detail(state.database, _known(event_id))
        if found is None:
            abort(404)
        listed = queries.list_deliveries(state.database, DeliveryFilter(event_id=event_id), limit=PAGE_ITEMS)
        return _render(
            state,
            "event.html",
            event=found,
            listed=listed,
            payload=_indented(found.payload),
            job=_job(state, found.job_id),
            refresh_s=_refresh_s(listed.items),
        )


# -- endpoints ----------------------------------------------------------------------------------------------


def _add_endpoints(blueprint: Blueprint, state: State) -> None:
    @blueprint.get("/endpoints", endpoint="page_endpoints")
    @page(state)
    def endpoints() -> Any:
        kind = request.args.get("kind", "standing")
        if kind not in ("standing", "job"):
            abort(404)
        listed: queries.Page[EndpointView] = queries.list_endpoints(
            state.database, kind=kind, cursor=request.args.get("cursor") or None, limit=PAGE_ITEMS
        )
        return _render(state, "endpoints.html", kind=kind, listed=listed, not_first="cursor" in request.args)

    @blueprint.get("/endpoints/new", endpoint="page_new_endpoint")
    @page(state, "manage")
    def new_endpoint() -> Any:
        return _endpoint_form(state, None, {})

    @blueprint.post("/endpoints/new", endpoint="page_create_endpoint")
    @page(state, "manage")
    def create_endpoint() -> Any:
        try:
            values = operations.endpoint_values(state, request.form, creating=True)
        except operations.EndpointFormError as exc:
            return _endpoint_form(state, None, exc.errors), 400
        # Signed unless that is refused by name.
        own = values.pop("secret", None)
        secret = None if "unsigned" in request.form else own or generate_secret()
        endpoint_id = endpoint_rows.create_standing(
            state.database,
            state.cipher,
            NewEndpoint(kind="standing", secret=secret, **values),
            namespace=state.namespace,
        )
        if own is not None or secret is None:
            return _done("created", ".page_endpoint", endpoint_id=endpoint_id)
        # In the answer itself: the only way for a secret to be nowhere afterwards.
        return _secret_page(state, endpoint_id, secret, created=True), 201

    @blueprint.get("/endpoints/<endpoint_id>", endpoint="page_endpoint")
    @page(state)
    def endpoint(endpoint_id: str) -> Any:
        found = _endpoint(state, endpoint_id)
        listed = queries.list_deliveries(
            state.database, DeliveryFilter(endpoint_id=endpoint_id), limit=FEW_ITEMS
        )
        return _render(
            state,
            "endpoint.html",
            endpoint=found,
            header_names=operations.header_names(state, found),
            listed=listed,
            grace_h=round(ROTATION_GRACE_S / 3600),
            every_type=EVERY_TYPE,
            refresh_s=_refresh_s(listed.items),
        )

    @blueprint.get("/endpoints/<endpoint_id>/edit", endpoint="page_edit_endpoint")
    @page(state, "manage")
    def edit_endpoint(endpoint_id: str) -> Any:
        return _endpoint_form(state, _standing(state, endpoint_id), {})

    @blueprint.post("/endpoints/<endpoint_id>/edit", endpoint="page_change_endpoint")
    @page(state, "manage")
    def change_endpoint(endpoint_id: str) -> Any:
        found = _standing(state, endpoint_id)
        try:
            changes = operations.endpoint_values(state, request.form, creating=False)
        except operations.EndpointFormError as exc:
            return _endpoint_form(state, found, exc.errors), 400
        endpoint_rows.update_standing(state.database, state.cipher, endpoint_id, changes)
        return _done("changed", ".page_endpoint", endpoint_id=endpoint_id)

    @blueprint.post("/endpoints/<endpoint_id>/rotate", endpoint="page_rotate")
    @page(state, "manage")
    def rotate(endpoint_id: str) -> Any:
        _standing(state, endpoint_id)
        grace_h = request.form.get("grace_h", type=float)
        if grace_h is None or not 0 <= grace_h <= 720:
            abort(400, "The old secret can go on signing for 0 to 720 hours.")
        secret = generate_secret()
        endpoint_rows.rotate_secret(state.database, state.cipher, endpoint_id, secret, grace_s=grace_h * 3600)
        return _secret_page(state, endpoint_id, secret, created=False, grace_h=grace_h)

    @blueprint.post("/endpoints/<endpoint_id>/test", endpoint="page_test")
    @page(state, "manage")
    def test(endpoint_id: str) -> Any:
        _standing(state, endpoint_id)
        event = operations.ping(state, endpoint_id)
        where = DeliveryFilter(event_id=event.event_id)
        (made,) = queries.list_deliveries(state.database, where, limit=1).items
        return _done("pinged", ".page_delivery", delivery_id=made.id)

    @blueprint.post("/endpoints/<endpoint_id>/enable", endpoint="page_enable")
    @page(state, "manage")
    def enable(endpoint_id: str) -> Any:
        found = _standing(state, endpoint_id)
        endpoint_rows.enable_standing(state.database, endpoint_id)
        if "recover" not in request.form:
            return _done("enabled", ".page_endpoint", endpoint_id=endpoint_id)
        since = found.disabled_at or found.created_at
        if found.failing_since is not None:
            # What failed first was made earlier: at most as long as retries go on.
            since = found.failing_since - timedelta(seconds=sum(state.settings.retry_schedule))
        # As the field of the list has it, which goes on with what is left.
        text = since.replace(tzinfo=None).isoformat(timespec="milliseconds")
        wanted = read_filter(MultiDict([("endpoint_id", endpoint_id), ("since", text)]))
        did = recover_some(state, wanted.where, None)
        if did.cursor is not None:
            return _done_some("recovered", wanted, did)
        return _done("enabled_recovered", ".page_endpoint", did.done, endpoint_id=endpoint_id)

    @blueprint.post("/endpoints/<endpoint_id>/disable", endpoint="page_disable")
    @page(state, "manage")
    def disable(endpoint_id: str) -> Any:
        _standing(state, endpoint_id)
        endpoint_rows.disable_standing(state.database, endpoint_id)
        return _done("disabled", ".page_endpoint", endpoint_id=endpoint_id)

    @blueprint.post("/endpoints/<endpoint_id>/delete", endpoint="page_delete")
    @page(state, "manage")
    def delete(endpoint_id: str) -> Any:
        _standing(state, endpoint_id)
        if delete_endpoint_some(state, endpoint_id) is False:
            return _done("deleted_some", ".page_endpoint", endpoint_id=endpoint_id)
        return _done("deleted", ".page_endpoints")


# -- parts --------------------------------------------------------------------------------------------------


def _render(state: State, template: str, **context: Any) -> str:
    context.setdefault("now", datetime.now(UTC))
    if template == "unavailable.html":
        context["alarms"] = []
    elif "alarms" not in context:
        context["alarms"] = everywhere(state)
    return render_template(
        f"rq_webhooks/{template}",
        rqw_base=state.settings.base_template or OWN_BASE,
        shown=formatting,
        redact_url=redact_url,
        cap=COUNT_CAP,
        csrf_field=FORM_FIELD,
        csrf_token=csrf_token,
        may_manage=is_allowed(state, "manage"),
        done=request.args.get("done", ""),
        done_count=request.args.get("n", 0, type=int),
        **context,
    )


def _done(what: str, view: str, count: int | None = None, **values: Any) -> Response:
    """Return to a page that says what was done, by a word of ours: no session is needed for that."""
    if count is not None:
        values["n"] = count
    return make_response(redirect(url_for(view, done=what, **values), code=303))


def _refresh_s(deliveries: Sequence[DeliveryView]) -> int | None:
    """Return how soon a page should look again; ``None`` when nothing on it is in flight."""
    if any(delivery.status == SENDING for delivery in deliveries):
        return REFRESH_S
    due = [
        delivery.next_attempt_at
        for delivery in deliveries
        if delivery.status == PENDING and delivery.next_attempt_at is not None
    ]
    if not due:
        return None
    left_s = (min(due) - datetime.now(UTC)).total_seconds()
    return min(max(REFRESH_S, round(left_s)), REFRESH_IDLE_S)


def _known(item_id: str) -> str:
    """Return an id from a path if it can be one; databases differ in what else they would make of it."""
    if not (item_id.isascii() and item_id.isprintable() and len(item_id) <= 40):
        abort(404)
    return item_id


def _filter_of_form() -> FilterForm:
    wanted = read_filter(request.form)
    if wanted.errors:
        abort(400, "The filter is not acceptable.")
    if wanted.is_empty and request.form.get("all") != "yes":
        abort(400, "Choose a filter, or say that all deliveries are meant.")
    return wanted


def _cursor_of_form() -> str | None:
    return request.form.get("cursor") or None


def _done_some(what: str, wanted: FilterForm, did: Progress) -> Response:
    """Return to the list that was acted on, which says what is left and goes on with it."""
    count = did.done + max(0, request.form.get("n", 0, type=int))
    if did.cursor is None:
        # Without the status, which the deliveries no longer have.
        fields = {name: value for name, value in wanted.fields.items() if name != "status"}
        return _done(what, ".page_deliveries", count, **fields)
    rest = {} if did.remaining is None else {"left": did.remaining}
    return _done(what, ".page_deliveries", count, next=did.cursor, **rest, **wanted.fields)


def _search(state: State, text: str) -> Response | None:
    """Return the way to what *text* names: an id, a job, a run, a host or a URL; ``None`` if nothing."""
    views = {"dlv_": "delivery", "evt_": "event", "ep": "endpoint"}
    if text.isascii() and text.isprintable() and len(text) <= 40:
        for prefix, name in views.items():
            if text.startswith(prefix) and getattr(queries, f"{name}_detail")(state.database, text):
                values: dict[str, Any] = {f"{name}_id": text}
                return make_response(redirect(url_for(f".page_{name}", **values)))
    fields = {"job_id": text, "runid": text, "host": _host(text), "event": text}
    for name, value in fields.items():
        wanted = read_filter(MultiDict([(name, value)]))
        if wanted.is_empty:
            continue
        if queries.list_deliveries(state.database, wanted.where, limit=1).items:
            return make_response(redirect(url_for(".page_deliveries", **wanted.fields)))
    return None


def _host(text: str) -> str:
    try:
        parts = urlsplit(text if "//" in text else f"//{text}")
        return (parts.netloc or text).rpartition("@")[2].lower().removesuffix(".")
    except ValueError:
        return text


def _job(state: State, job_id: str | None) -> JobRecord | None:
    """Return what RQ says of a job; ``None`` where there is none or Redis cannot be asked."""
    if job_id is None:
        return None
    try:
        return read_jobs(state.redis, [job_id]).get(job_id)
    except RedisError as exc:
        logger.warning("The status of job %r is not known: %s", job_id, exc)
        return None


def _endpoint(state: State, endpoint_id: str) -> EndpointView:
    found = queries.endpoint_detail(state.database, _known(endpoint_id))
    if found is None:
        abort(404)
    return found


def _standing(state: State, endpoint_id: str) -> EndpointView:
    found = _endpoint(state, endpoint_id)
    if found.kind != "standing":
        abort(404)
    return found


def _endpoint_form(state: State, endpoint: EndpointView | None, errors: Any) -> str:
    return _render(
        state,
        "endpoint_form.html",
        endpoint=endpoint,
        errors=errors,
        sent=request.form if request.method == "POST" else None,
        header_names=[] if endpoint is None else operations.header_names(state, endpoint),
        terminal_types=sorted(TERMINAL_TYPES),
        optional_types=sorted(OPTIONAL_TYPES),
        every_type=EVERY_TYPE,
        formats=sorted(state.formats),
        settings=state.settings,
    )


def _secret_page(state: State, endpoint_id: str, secret: str, *, created: bool, grace_h: float = 0) -> str:
    return _render(
        state,
        "secret.html",
        endpoint=_endpoint(state, endpoint_id),
        secret=secret,
        created=created,
        grace_h=grace_h,
    )


def _target(url: str) -> str:
    """Return the request line's target, as far as it may be shown."""
    path = urlsplit(redact_url(url)).path
    return path or "/"


def _indented(payload: str | None) -> str:
    if payload is None:
        return ""
    return json.dumps(json.loads(payload), indent=2, ensure_ascii=False)
