"""The blueprint of our routes, and which requests it allows: by permission, and by a token against forgery.

If the app chooses routes by host, it is mounted under every host name. The host's own function decides about
permissions; until there is one, everything is refused:

``status``
    see the state of the webhook of one job or run (``job_id``, ``runid``)
``read``
    see everything about every webhook, details of failures included
``manage``
    change, resend, cancel, pause
``own``
    see and change what belongs to one tenant (``tenant``), the caller's own; asked only if ``read`` or
    ``manage`` was refused

A browser adds cookies to requests that other sites make it send. So a change requested with cookies, or
from another site, must carry a token that only our own pages contain; a caller that sends credentials in a
header is judged by the permission function alone. This works with and without Flask-WTF's ``CSRFProtect``,
whose check is replaced by this one for our routes.
"""

from __future__ import annotations

import hmac
import inspect
import logging
import secrets
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

from flask import Blueprint, current_app, request, session
from flask.blueprints import BlueprintSetupState
from flask.sansio.app import App
from itsdangerous import BadSignature, URLSafeSerializer
from werkzeug.wrappers import Response

from ..accept.tenants import current_tenant
from ..state import State

logger = logging.getLogger(__name__)

#: Part of each rule in an app with ``host_matching=True``, which has no rules without a host.
HOST_PART = "rqw_host"


class WebhookBlueprint(Blueprint):
    """A blueprint whose routes answer under any host name, also with ``host_matching=True``."""

    def register(self, app: App, options: dict[str, Any]) -> None:
        """Add everything to *app*."""
        if app.url_map.host_matching:
            self.url_value_preprocessor(lambda _endpoint, parts: (parts or {}).pop(HOST_PART, None))
            self.url_defaults(lambda _endpoint, parts: parts.setdefault(HOST_PART, request.host))
        super().register(app, options)

    def make_setup_state(
        self, app: App, options: dict[str, Any], first_registration: bool = False
    ) -> BlueprintSetupState:
        """Return the object that adds the rules to *app*."""
        setup = _AnyHostSetup if app.url_map.host_matching else BlueprintSetupState
        return setup(self, app, options, first_registration)


class _AnyHostSetup(BlueprintSetupState):
    def add_url_rule(
        self,
        rule: str,
        endpoint: str | None = None,
        view_func: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        super().add_url_rule(rule, endpoint, view_func, host=f"<{HOST_PART}>", **options)


# -- permissions ------------------------------------------------------------------------------------------

Permission = Literal["status", "read", "manage", "own"]


def is_allowed(state: State, permission: Permission, **what: Any) -> bool:
    """Ask the host whether the caller of this request has *permission*.

    An answer that is neither yes nor no, such as a redirect to a login page or the coroutine of an async
    function, counts as no.

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
        # Each of these is truthy, but none means yes.
        if inspect.iscoroutine(answer):
            answer.close()
        logger.error(
            "%r was refused: the function registered with @webhooks.authorize returned a %s; it must be a "
            "plain function that returns True or False.", permission, type(answer).__name__,
        )  # fmt: skip
        return False
    return bool(answer)


def own_tenant(state: State) -> str | None:
    """Return the tenant whose rows the caller of this request may see and change, or ``None``."""
    tenant = current_tenant(state)
    return tenant if tenant is not None and is_allowed(state, "own", tenant=tenant) else None


#: Maximum characters of an id in a path; RQ's job ids are the longest.
MAX_ID = 512


def is_possible_id(text: str) -> bool:
    """Return whether *text*, from a path, can be searched for: databases handle other text differently."""
    return "\0" not in text and len(text) <= MAX_ID


# -- forged requests --------------------------------------------------------------------------------------

HEADERS = ("X-CSRFToken", "X-CSRF-Token")
FORM_FIELD = "csrf_token"

_SESSION_KEY = "_rq_webhooks_csrf"
_SALT = "rq-webhooks-csrf"


def csrf_token() -> str:
    """Return the token that changes from this session must carry; empty if the app has no sessions."""
    if not current_app.secret_key:
        return ""
    if _SESSION_KEY not in session:
        session[_SESSION_KEY] = secrets.token_urlsafe(16)
    return str(_serializer().dumps(session[_SESSION_KEY]))


def is_forgeable() -> bool:
    """Return whether another site may have made this request, as it carries no valid token."""
    return (bool(request.cookies) or _is_from_another_site()) and not _is_token_valid()


def replace_csrf_protect(blueprint: Blueprint) -> None:
    """Let this module, not a ``CSRFProtect`` of the host, check the requests to *blueprint*.

    This is repeated with each request to us, since the host may initialise its ``CSRFProtect`` after us.
    """

    def exempt(app: App) -> None:
        protect: Any = app.extensions.get("csrf")
        if protect is not None and hasattr(protect, "exempt"):
            protect.exempt(blueprint)

    # Called before every before_request function, including that of a later CSRFProtect.
    @blueprint.url_value_preprocessor
    def exempt_late(_view: str | None, _parts: dict[str, Any] | None) -> None:
        exempt(current_app)

    blueprint.record(lambda setup: exempt(setup.app))


def _is_from_another_site() -> bool:
    fetch_site = request.headers.get("Sec-Fetch-Site")
    if fetch_site is not None:
        return fetch_site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc != request.host
    except ValueError:  # no browser sends such a value
        return True


def _is_token_valid() -> bool:
    expected = session.get(_SESSION_KEY) if current_app.secret_key else None
    shown = next((request.headers[name] for name in HEADERS if name in request.headers), None)
    shown = shown or request.form.get(FORM_FIELD)
    if expected is None or not shown:
        return False
    try:
        value = _serializer().loads(shown)
    except BadSignature:
        return False
    return isinstance(value, str) and hmac.compare_digest(value.encode(), str(expected).encode())


def _serializer() -> URLSafeSerializer:
    assert current_app.secret_key is not None  # noqa: S101  (both callers have checked)
    return URLSafeSerializer(current_app.secret_key, salt=_SALT)
