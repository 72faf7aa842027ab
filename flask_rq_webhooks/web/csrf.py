"""Forged requests: a change needs a token where a browser authenticates the caller by itself.

A browser adds cookies to requests that other sites make it send. So a request with cookies, or from another
site, must carry a token that only our own pages contain; a caller that sends credentials in a header is
judged by the permission function alone. Works with and without Flask-WTF's ``CSRFProtect``, whose check is
replaced by this one for our routes.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Any
from urllib.parse import urlsplit

from flask import Blueprint, current_app, request, session
from flask.sansio.app import App
from itsdangerous import BadSignature, URLSafeSerializer

HEADERS = ("X-CSRFToken", "X-CSRF-Token")
FORM_FIELD = "csrf_token"

_SESSION_KEY = "_rq_webhooks_csrf"
_SALT = "rq-webhooks-csrf"


def csrf_token() -> str:
    """Return the token that changes from this session must carry; empty where the app has no sessions."""
    if not current_app.secret_key:
        return ""
    if _SESSION_KEY not in session:
        session[_SESSION_KEY] = secrets.token_urlsafe(16)
    return str(_serializer().dumps(session[_SESSION_KEY]))


def is_forgeable() -> bool:
    """Say whether another site may have made this request; it carries no valid token then."""
    return (bool(request.cookies) or _is_from_another_site()) and not _is_token_valid()


def replace_csrf_protect(blueprint: Blueprint) -> None:
    """Let this module, not a ``CSRFProtect`` of the host, check the requests to *blueprint*.

    Repeated with each request to us, since the host may initialise its ``CSRFProtect`` after us.
    """

    def exempt(app: App) -> None:
        protect: Any = app.extensions.get("csrf")
        if protect is not None and hasattr(protect, "exempt"):
            protect.exempt(blueprint)

    # Registered before a later CSRFProtect's own check, and so run before it.
    @blueprint.before_app_request
    def exempt_late() -> None:
        if request.blueprint == blueprint.name:
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
    except ValueError:  # no browser writes such a thing
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
