"""Tenants: the customers of the host, and who of them has subscribed once instead of with each request.

Owns the question to the host's function (``@webhooks.tenant``) and the look, before a decorated view without
``webhook_url``, for standing endpoints of its caller. Knows nothing of permissions.
"""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections import OrderedDict

from flask import has_request_context

from ..errors import StorageUnavailableError
from ..state import State
from ..storage.models import MAX_TENANT
from ..storage.subscriptions import any_tenant_subscribes, job_types_wanted

logger = logging.getLogger(__name__)

#: Seconds after which a process looks again: a new endpoint counts after this time at the latest.
LOOK_EVERY_S = 5.0
#: Tenants whose endpoints one process remembers.
MAX_REMEMBERED = 10_000


def current_tenant(state: State) -> str | None:
    """Return the tenant of the caller of this request, as the host's function names it.

    An error of the function, and a value that cannot be a tenant's name, is logged and means no tenant: a
    request never fails for it, and what has no tenant is seen by operators only.

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
    if tenant is None or is_tenant(tenant):
        return None if tenant is None else str(tenant)
    logger.error(
        "The function registered with @webhooks.tenant returned %.150r; it must be a plain function that "
        "returns None or a text of 1 to %d printable characters. The caller has no tenant.",
        tenant,
        MAX_TENANT,
    )
    return None


def is_tenant(value: object) -> bool:
    """Say whether *value* can be a tenant's name; nothing in it steers a terminal or splits a line."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TENANT and value.isprintable()


class Subscribers:
    """Which tenants have an enabled standing endpoint that wants events of jobs.

    Remembers the answers for :data:`LOOK_EVERY_S`; where no tenant has any, one look serves all requests of
    that time.
    """

    def __init__(self, state: State) -> None:
        self._database = state.database
        self._nobody_until = 0.0
        self._anybody_until = 0.0
        self._known: OrderedDict[str, tuple[float, tuple[str, ...] | None]] = OrderedDict()

    def nobody(self) -> bool:
        """Say whether no tenant has an enabled endpoint, whatever it wants."""
        now = time.monotonic()
        if now < self._nobody_until:
            return True
        if now < self._anybody_until:
            return False
        found = any_tenant_subscribes(self._database)
        until = time.monotonic() + LOOK_EVERY_S
        self._nobody_until, self._anybody_until = (0.0, until) if found else (until, 0.0)
        return not found

    def wanted(self, tenant: str) -> tuple[str, ...] | None:
        """Return the event types of jobs that a tenant's endpoints want; ``None`` where it has none."""
        known = self._known.get(tenant)
        if known is not None and time.monotonic() < known[0]:
            return known[1]
        found = job_types_wanted(self._database, tenant)
        self._known[tenant] = time.monotonic() + LOOK_EVERY_S, found
        self._known.move_to_end(tenant)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return found


_subscribers: weakref.WeakKeyDictionary[State, Subscribers] = weakref.WeakKeyDictionary()


def look_again(state: State) -> None:
    """Let what this process just changed about endpoints count at once here; elsewhere it counts in time."""
    _subscribers.pop(state, None)


def subscriber_in_request(state: State) -> tuple[str, tuple[str, ...]] | None:
    """Return the caller's tenant and the types its endpoints want; ``None``: its jobs are not reported.

    Trouble with SQL means that they are not: a request that asks for nothing never fails for us.
    """
    if state.hooks.tenant_function is None or not state.settings.enabled:
        return None
    try:
        known = _subscribers.get(state)
        if known is None:
            known = _subscribers.setdefault(state, Subscribers(state))
        if known.nobody():
            return None
        tenant = current_tenant(state)
        wanted = None if tenant is None else known.wanted(tenant)
    except StorageUnavailableError as exc:
        logger.error(
            "Whether the caller of this request has endpoints is unknown; it goes on without: %s", exc
        )
        return None
    return None if tenant is None or wanted is None else (tenant, wanted)
