"""Tenants: the customers of the host, and which of them have subscribed once instead of in each request.

This module calls the host's function (``@webhooks.tenant``) and looks for standing endpoints of the caller
before a decorated view runs without ``webhook_url``. It does not deal with permissions.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping

from flask import has_request_context

from ..errors import StorageUnavailableError
from ..state import State
from ..storage.models import MAX_TENANT
from ..storage.subscriptions import job_types_wanted, subscribing_tenants

logger = logging.getLogger(__name__)

#: Seconds for which one look-up is valid: changes by other processes count after this time at the latest.
LOOK_EVERY_S = 5.0
#: Maximum endpoints read by one look-up, and tenants that a process remembers if there are more endpoints.
MAX_REMEMBERED = 50_000


def current_tenant(state: State) -> str | None:
    """Return the tenant of the caller of this request, as named by the host's function.

    If the function fails or returns a value that cannot be a tenant's name, this is logged and means no
    tenant: a request never fails because of it, and what has no tenant is visible to operators only.

    :returns: 1 to 128 printable characters; ``None`` without a function, a request or a tenant.
    """
    function = state.hooks.tenant_function
    if function is None or not has_request_context():
        return None
    try:
        tenant: object = function()
    except Exception:
        logger.exception("The function registered with @webhooks.tenant failed; the caller has no tenant.")
        return None
    if inspect.iscoroutine(tenant):
        tenant.close()
    if tenant is None:
        return None
    if is_tenant(tenant):
        return str(tenant)
    logger.error(
        "The function registered with @webhooks.tenant returned %.150r; it must be a plain function that "
        "returns None or a text of 1 to %d printable characters. The caller has no tenant.",
        tenant,
        MAX_TENANT,
    )
    return None


def is_tenant(value: object) -> bool:
    """Return whether *value* can be a tenant's name; nothing in it can control a terminal or break a line."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TENANT and value.isprintable()


class Subscribers:
    """Which tenants have an enabled standing endpoint that wants events of jobs, and which events.

    One look-up finds all of them. It is valid for :data:`LOOK_EVERY_S`; in the second half of that time, the
    first request starts the next look-up in a thread and does not wait for it. So a request itself waits for
    SQL only after a longer pause, or, on a server that runs no threads, once every ten seconds.
    """

    def __init__(self, state: State) -> None:
        self._database = state.database
        self._lock = threading.Lock()
        self._known: Mapping[str, frozenset[str]] | None = {}
        self._until = 0.0
        self._looking_until = 0.0
        self._version = 0
        self._one_by_one: OrderedDict[str, tuple[float, frozenset[str]]] = OrderedDict()

    def nobody(self) -> bool:
        """Return whether no tenant has such an endpoint, after another look-up if one is due."""
        now = time.monotonic()
        left_s = self._until - now
        if now >= self._looking_until:
            if left_s <= 0:
                self._look()
            elif left_s < LOOK_EVERY_S / 2:
                self._looking_until = now + LOOK_EVERY_S
                threading.Thread(target=self._look, name="rq-webhooks-subscribers", daemon=True).start()
        return self._known == {}

    def wanted(self, tenant: str) -> frozenset[str]:
        """Return the event types of jobs that a tenant's endpoints want; call :meth:`nobody` first.

        :raises StorageUnavailableError: if there are more endpoints than one look-up reads, and SQL is down.
        """
        known = self._known
        if known is not None:
            return known.get(tenant, frozenset())
        until, types = self._one_by_one.get(tenant, (0.0, frozenset()))
        if time.monotonic() < until:
            return types
        version, types = self._version, job_types_wanted(self._database, tenant)
        with self._lock:
            if version == self._version:
                self._one_by_one[tenant] = time.monotonic() + LOOK_EVERY_S, types
                self._one_by_one.move_to_end(tenant)
                while len(self._one_by_one) > MAX_REMEMBERED:
                    self._one_by_one.popitem(last=False)
        return types

    def look_again(self) -> None:
        """Make the next request look again; discard what is known and what a look-up in progress finds."""
        with self._lock:
            self._version += 1
            self._until = self._looking_until = 0.0
            self._one_by_one.clear()

    def _look(self) -> None:
        """Look the endpoints up; if SQL is down, the last result stays valid for the same time again."""
        version, began = self._version, time.monotonic()
        try:
            known: Mapping[str, frozenset[str]] | None
            known = subscribing_tenants(self._database, at_most=MAX_REMEMBERED)
        except StorageUnavailableError as exc:
            logger.error(
                "Which tenants have endpoints cannot be read; a request goes on without, or as was known: %s",
                exc,
            )
            known, began = self._known, time.monotonic()
        with self._lock:
            if version == self._version:
                self._known, self._until, self._looking_until = known, began + LOOK_EVERY_S, 0.0


def _subscribers(state: State) -> Subscribers:
    return state.once("subscribers", lambda: Subscribers(state))


def look_again(state: State) -> None:
    """Make an endpoint that this process has just created or changed count from the next request on."""
    _subscribers(state).look_again()


def subscriber_in_request(state: State) -> tuple[str, frozenset[str]] | None:
    """Return the caller's tenant and the types its endpoints want; ``None`` if its jobs are not reported.

    If SQL fails, they are not reported: a request that asks for nothing never fails because of us.
    """
    if state.hooks.tenant_function is None or not state.settings.enabled:
        return None
    known = _subscribers(state)
    if known.nobody():
        return None
    tenant = current_tenant(state)
    if tenant is None:
        return None
    try:
        wanted = known.wanted(tenant)
    except StorageUnavailableError as exc:
        logger.error(
            "Whether the caller of this request has endpoints is unknown; it goes on without: %s", exc
        )
        return None
    return (tenant, wanted) if wanted else None
