"""The pages about deliveries: the overview, tenants, the list, one delivery, one event.

They need no JavaScript; our script refreshes what is in flight. Changes are made in :mod:`.operations`. What
all pages have in common is in :mod:`.page_frame`, the pages about endpoints are in :mod:`.endpoint_pages`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from flask import Response, abort, make_response, redirect, request, url_for
from redis.exceptions import RedisError
from werkzeug.datastructures import MultiDict

from ..protocol.events import OPERATOR_TYPES, OPTIONAL_TYPES, TERMINAL_TYPES
from ..protocol.urls import redact_url
from ..queue.job_reader import read_jobs
from ..state import State
from ..storage import queries
from ..storage.filters import DeliveryFilter
from ..storage.models import PENDING, SENDING
from ..storage.queries import DeliveryView
from ..storage.statistics import FINISHED_WINDOW, statistics, tenant_numbers
from . import formatting, operations
from .api_schemas import STATUSES, ManyInput, TenantInput
from .blueprint import is_possible_id
from .formatting import OUTCOMES, RANGES, endings
from .forms import FilterForm, read_filter
from .monitoring import everywhere, of_numbers
from .page_frame import Pages, done, page

logger = logging.getLogger(__name__)

#: Deliveries per page of the list.
PAGE_ITEMS = 50

#: Seconds after which a page is refreshed: one that shows something in flight; the overview while nothing is
#: delivered, because a repair is expected; and at rest.
REFRESH_S, REFRESH_ALARM_S, REFRESH_IDLE_S = 2, 5, 15


def add_pages(pages: Pages) -> None:
    """Serve these pages."""
    _add_overview(pages, pages.state)
    _add_tenants(pages, pages.state)
    _add_deliveries(pages, pages.state)


# -- overview -----------------------------------------------------------------------------------------------


def _add_overview(pages: Pages, state: State) -> None:
    @pages.get("/", "overview")
    def overview(tenant: str | None) -> Any:
        back = request.args.get("hours", 24, type=int)
        if back not in RANGES:
            abort(404)
        now = datetime.now(UTC)
        numbers = statistics(state.database, hours=back, tenant=tenant)
        alarms = [*(everywhere(state) if tenant is None else ()), *of_numbers(numbers, now)]
        idle_s = REFRESH_ALARM_S if any(alarm.severe for alarm in alarms) else REFRESH_IDLE_S
        moving = numbers.counts[SENDING] or numbers.oldest_due_s is not None
        return page(
            "overview.html",
            now=now,
            numbers=numbers,
            chart=endings(numbers.hours, now=now, back=back),
            outcomes=OUTCOMES,
            back=back,
            ranges={hours: name for hours, (name, *_bars) in RANGES.items()},
            window=FINISHED_WINDOW,
            alarms=alarms,
            refresh_s=REFRESH_S if moving else idle_s,
        )

    @pages.post("/pause", "pause", own=False)
    def pause_all(tenant: None) -> Any:
        operations.pause(state)
        return done("paused", ".page_overview")

    @pages.post("/resume", "resume", own=False)
    def resume_all(tenant: None) -> Any:
        operations.resume(state)
        return done("resumed", ".page_overview")


# -- tenants ------------------------------------------------------------------------------------------------


def _add_tenants(pages: Pages, state: State) -> None:
    @pages.get("/tenants", "tenants", own=False)
    def tenants(tenant: None) -> Any:
        return page("tenants.html", listed=tenant_numbers(state.database)[:PAGE_ITEMS])

    @pages.post("/tenants/disable", "disable_tenant", own=False)
    def disable_tenant(tenant: None) -> Any:
        values = operations.checked(TenantInput(), {"tenant": request.form.get("tenant", "")})
        count = operations.disable_tenant(state, **values)
        return done("tenant_disabled", ".page_endpoints", count, **values)


# -- deliveries and events ----------------------------------------------------------------------------------


def _add_deliveries(pages: Pages, state: State) -> None:
    @pages.get("/deliveries", "deliveries")
    def deliveries(tenant: str | None) -> Any:
        wanted = read_filter(request.args, tenant)
        text = request.args.get("q", "").strip()
        if text and "\0" not in text and len(text) <= 2048:
            found = _search(state, text, tenant)
            if found is not None:
                return found
        listed = operations.list_deliveries(
            state,
            wanted.where,
            tenant=tenant,
            cursor=request.args.get("cursor") or None,
            limit=PAGE_ITEMS,
        )
        return page(
            "deliveries.html",
            filter=wanted,
            listed=listed,
            page_items=PAGE_ITEMS,
            statuses=STATUSES,
            event_types=sorted(TERMINAL_TYPES | OPTIONAL_TYPES | OPERATOR_TYPES),
            q=text,
            next_part=request.args.get("next", ""),
            left=request.args.get("left", type=int),
            at_most=operations.AT_MOST,
            not_first="cursor" in request.args,
            refresh_s=refresh_s(listed.items),
        )

    @pages.post("/deliveries/recover", "recover")
    def recover_many(tenant: str | None) -> Any:
        wanted, cursor = _many(tenant)
        return done_some("recovered", wanted, operations.recover(state, wanted.where, cursor))

    @pages.post("/deliveries/cancel", "cancel", own=False)
    def cancel_many(tenant: None) -> Any:
        wanted, cursor = _many(None)
        return done_some("canceled", wanted, operations.cancel(state, wanted.where, cursor))

    @pages.get("/deliveries/<delivery_id>", "delivery")
    def delivery(delivery_id: str, tenant: str | None) -> Any:
        found = operations.delivery(state, delivery_id, tenant=tenant)
        last = found.attempts[-1] if found.attempts else None
        return page(
            "delivery.html",
            found=found,
            delivery=found.delivery,
            job_status=_job_status(state, found.delivery.job_id) if tenant is None else None,
            curl=formatting.as_curl(
                redact_url(found.delivery.url),
                last.request_headers if last else {"Content-Type": "application/json"},
                found.body,
            ),
            target=urlsplit(redact_url(found.delivery.url)).path or "/",
            refresh_s=refresh_s([found.delivery]),
        )

    @pages.post("/deliveries/<delivery_id>/resend", "resend")
    def resend_one(delivery_id: str, tenant: str | None) -> Any:
        status = operations.resend(state, delivery_id, tenant=tenant)
        return done("resent" if status == PENDING else "in_flight", ".page_delivery", delivery_id=delivery_id)

    @pages.get("/events/<event_id>", "event")
    def event(event_id: str, tenant: str | None) -> Any:
        found = queries.event_detail(state.database, event_id, tenant=tenant)
        if found is None:
            abort(404)
        where = DeliveryFilter(event_id=event_id)
        listed = operations.list_deliveries(state, where, tenant=tenant, limit=PAGE_ITEMS)
        stored = None if found.payload is None else json.loads(found.payload)
        return page(
            "event.html",
            event=found,
            listed=listed,
            payload=_indented(stored if tenant is None else operations.event_payload(state, found)),
            job_status=_job_status(state, found.job_id) if tenant is None else None,
            refresh_s=refresh_s(listed.items),
        )


def refresh_s(deliveries: Sequence[DeliveryView]) -> int | None:
    """Return after how many seconds a page is refreshed; ``None`` when nothing on it is in flight."""
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


def done_some(what: str, wanted: FilterForm, did: operations.Progress) -> Response:
    """Redirect to the list that was acted on, which says what is left and offers to continue."""
    count = did.done + max(0, request.form.get("n", 0, type=int))
    if did.cursor is None:
        # Without the status, which the deliveries no longer have.
        fields = {name: value for name, value in wanted.fields.items() if name != "status"}
        return done(what, ".page_deliveries", count, **fields)
    rest = {} if did.remaining is None else {"left": did.remaining}
    return done(what, ".page_deliveries", count, next=did.cursor, **rest, **wanted.fields)


def _many(tenant: str | None) -> tuple[FilterForm, str | None]:
    """Return the filter of a form that changes many deliveries, and the cursor at which it continues."""
    wanted = read_filter(request.form, tenant)
    if wanted.errors:
        raise operations.InvalidInputError({name: [why] for name, why in wanted.errors.items()})
    all_meant = {"all": True} if request.form.get("all") == "yes" else {}
    chosen = {} if wanted.is_empty else {"host": "any condition"}
    operations.checked(ManyInput(), all_meant | chosen)
    return wanted, request.form.get("cursor") or None


def _search(state: State, text: str, tenant: str | None) -> Response | None:
    """Return a redirect to what *text* names: an id, a job, a run, a host or a URL; ``None`` if nothing."""
    views = {"dlv_": "delivery", "evt_": "event", "ep": "endpoint"}
    for prefix, name in views.items():
        find = getattr(queries, f"{name}_detail")
        if text.startswith(prefix) and is_possible_id(text) and find(state.database, text, tenant=tenant):
            values: dict[str, Any] = {f"{name}_id": text}
            return make_response(redirect(url_for(f".page_{name}", **values)))
    fields = {"job_id": text, "runid": text, "host": _host(text), "event": text}
    for name, value in fields.items():
        wanted = read_filter(MultiDict([(name, value)]), tenant)
        if not wanted.is_empty and queries.list_deliveries(state.database, wanted.where, limit=1).items:
            return make_response(redirect(url_for(".page_deliveries", **wanted.fields)))
    return None


def _host(text: str) -> str:
    try:
        parts = urlsplit(text if "//" in text else f"//{text}")
        return (parts.netloc or text).rpartition("@")[2].lower().removesuffix(".")
    except ValueError:
        return text


def _job_status(state: State, job_id: str | None) -> str:
    """Return RQ's status of a job, in words."""
    try:
        found = None if job_id is None else read_jobs(state.redis, [job_id]).get(job_id)
    except RedisError as exc:
        logger.warning("The status of job %r is unknown: %s", job_id, exc)
        return "unknown"
    if found is None:
        return "no longer in Redis"
    return f"{found.status or 'unknown'} in queue {found.queue}" if found.queue else found.status or "unknown"


def _indented(payload: object) -> str:
    return "" if payload is None else json.dumps(payload, indent=2, ensure_ascii=False)
