"""Permissions: the host's own function decides, and until there is one everything is refused.

``status``
    see the state of the webhook of one job or run (``job_id``, ``runid``)
``read``
    see everything about every webhook, details of failures included
``manage``
    change, resend, cancel, pause
``own``
    see and change what belongs to one tenant (``tenant``), the caller's own; asked only where ``read`` or
    ``manage`` was refused
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal

from werkzeug.wrappers import Response

from ..accept.tenants import current_tenant
from ..state import State

logger = logging.getLogger(__name__)

Permission = Literal["status", "read", "manage", "own"]


def is_allowed(state: State, permission: Permission, **what: Any) -> bool:
    """Ask the host whether the caller of this request has *permission*.

    An answer that is neither yes nor no, such as a redirect to a login page or the coroutine of an async
    function, is a no.

    :param what: with ``"status"``: ``job_id`` and ``runid``, each a string or ``None``; with ``"own"``:
        ``tenant``.
    """
    function = state.hooks.authorize_function
    if function is None:
        logger.warning(
            "%r was refused: flask_rq_webhooks serves nothing until the app defines who may see it. "
            "Register a function (permission, **what) -> bool with @webhooks.authorize.",
            permission,
        )
        return False
    answer: Any = function(permission, **what)
    if inspect.isawaitable(answer) or isinstance(answer, Response | tuple):
        # Each is true as a condition, and none means yes.
        if inspect.iscoroutine(answer):
            answer.close()
        logger.error(
            "%r was refused: the function registered with @webhooks.authorize returned a %s; it must be a "
            "plain function that returns True or False.", permission, type(answer).__name__,
        )  # fmt: skip
        return False
    return bool(answer)


def own_tenant(state: State) -> str | None:
    """Return the tenant whose rows the caller of this request may see and change; ``None``: of none."""
    tenant = current_tenant(state)
    return tenant if tenant is not None and is_allowed(state, "own", tenant=tenant) else None
