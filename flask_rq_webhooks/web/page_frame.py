"""What all pages have in common: permission, safe headers, and the layout in which they appear.

The pages exist twice: for operators, and as the portal, where a customer finds its own rows and nothing
else. A page appears inside the host's layout if ``BASE_TEMPLATE`` or ``PORTAL_BASE_TEMPLATE`` names one, and
in our own layout if that one cannot be rendered. Every name that our templates add begins with ``rqw_``, so
that none of the host's names is hidden.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from flask import Response, abort, make_response, redirect, render_template, request, url_for
from jinja2 import Environment, FileSystemLoader, Template, select_autoescape
from markupsafe import Markup

from ..accept.decorator import RETRY_UNAVAILABLE_S
from ..errors import ErasedError, StorageUnavailableError
from ..protocol.urls import redact_url
from ..state import State
from ..storage.queries import CursorError
from ..storage.statistics import COUNT_CAP
from . import formatting
from .blueprint import (
    FORM_FIELD,
    Permission,
    WebhookBlueprint,
    csrf_token,
    is_allowed,
    is_forgeable,
    is_possible_id,
    own_tenant,
    replace_csrf_protect,
)
from .monitoring import everywhere
from .operations import BusyHostError, InvalidInputError, UnknownItemError

logger = logging.getLogger(__name__)

View = TypeVar("View", bound=Callable[..., Any])

#: In our own layout, nothing but our own files is loaded, and no other script runs.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
#: Inside a host's layout, the host's own policy says what may be loaded.
POLICY_IN_HOST = "frame-ancestors 'self'"

#: Our own layout; one that yields title, head and content for the host's layout; and the mark between these,
#: which untrusted text cannot contain because it would be escaped.
OWN_BASE, PARTS_BASE, PARTS_MARK = "rq_webhooks/base.html", "rq_webhooks/_blocks.html", "<!--rqw-part-->"
TEMPLATES = Path(__file__).with_name("templates")

#: What each of our pages contains if its layout has the block ``content``.
CONTENT_MARK = '<div class="rqw">'
#: What it contains if the layout has the block ``head``.
HEAD_MARK = "dashboard.css"

#: Key under which an app's extensions cache the template that fills its layouts.
_CACHE = "rq_webhooks_templates"


@dataclass(frozen=True, slots=True)
class Shown:
    """What a view shows: one of our templates, and its values; it finds these with the prefix ``rqw_``."""

    template: str
    values: Mapping[str, Any]
    status: int = 200


def page(template: str, status: int = 200, /, **values: Any) -> Shown:
    """Return what a view shows; see :func:`render`."""
    return Shown(template, values, status)


class Pages:
    """Adds pages to a blueprint. Views run only for callers with the permission, and get safe headers.

    A view gets ``tenant``: the only customer whose rows exist for it, or ``None`` for an operator. It returns
    a :func:`page` or a response. A change needs ``manage`` and our token. Refusals are plain 403s, so that
    the host's own error pages show them.

    :param portal: whether these are the customers' pages, which need ``own``.
    """

    def __init__(self, blueprint: WebhookBlueprint, state: State, *, portal: bool = False) -> None:
        self._blueprint = blueprint
        self.state = state
        self._portal = portal

    def get(
        self, rule: str, name: str, permission: Permission = "read", *, own: bool = True
    ) -> Callable[[View], View]:
        """Serve a view under *rule*; its view name is ``page_`` followed by *name*.

        :param own: whether customers have it, too.
        """
        return self._added("GET", rule, name, permission, own)

    def post(self, rule: str, name: str, *, own: bool = True) -> Callable[[View], View]:
        """Serve the view of a form, which changes something."""
        return self._added("POST", rule, name, "manage", own)

    def _added(
        self, method: str, rule: str, name: str, permission: Permission, own: bool
    ) -> Callable[[View], View]:
        def decorate(view: View) -> View:
            @functools.wraps(view)
            def served(**parts: Any) -> Response:
                tenant = self._ask(permission)
                if not all(map(is_possible_id, parts.values())):
                    abort(404)
                if method == "POST" and is_forgeable():
                    abort(403, "This form has expired. Go back, load the page again and repeat.")
                return _safe(self.state, tenant, _answered(self.state, view, {**parts, "tenant": tenant}))

            if own or not self._portal:
                self._blueprint.add_url_rule(rule, f"page_{name}", served, methods=[method])
            return view

        return decorate

    def _ask(self, permission: Permission) -> str | None:
        """Check the permission; return the tenant the caller is restricted to, ``None`` for an operator."""
        tenant = own_tenant(self.state) if self._portal else None
        if tenant is None and (self._portal or not is_allowed(self.state, permission)):
            abort(403, f"This needs the permission {'own' if self._portal else permission!r}.")
        return tenant


def dashboard_and_portal(blueprint: WebhookBlueprint, state: State) -> tuple[Pages, Pages]:
    """Return the object that adds pages to *blueprint*, and the one that adds the same below ``/portal``.

    The portal is a blueprint inside the other, with the same view names, so relative links stay inside it.
    """
    blueprint.static_folder = "static"
    # Not /static: with the prefix "/" that is the host's.
    blueprint.static_url_path = "/assets"
    portal = WebhookBlueprint("portal", __name__, url_prefix="/portal")
    replace_csrf_protect(portal)
    blueprint.register_blueprint(portal)
    return Pages(blueprint, state), Pages(portal, state, portal=True)


def _answered(state: State, view: Callable[..., Any], parts: Mapping[str, str | None]) -> Response:
    try:
        found = view(**parts)
    except UnknownItemError:
        abort(404)
    except InvalidInputError as exc:
        abort(400, str(exc))
    except BusyHostError as exc:
        abort(429, str(exc))
    except ErasedError as exc:
        found = page("erased.html", 409, reason=str(exc))
    except CursorError:
        abort(400 if request.method == "POST" else 404)
    except StorageUnavailableError as exc:
        logger.error("%s %r failed: %s", request.method, request.path, exc)
        found = page("unavailable.html", 503)
    if not isinstance(found, Shown):
        return make_response(found)
    html = render(state, found.template, tenant=parts["tenant"], **found.values)
    response = make_response(html, found.status)
    if found.status == 503:
        response.headers["Retry-After"] = str(RETRY_UNAVAILABLE_S)
    return response


def _safe(state: State, tenant: str | None, response: Response) -> Response:
    _setting, base = layout_setting(state, portal=tenant is not None)
    response.headers["Content-Security-Policy"] = POLICY if base is None else POLICY_IN_HOST
    response.headers["Referrer-Policy"] = "same-origin"
    return response


def layout_setting(state: State, *, portal: bool) -> tuple[str, str | None]:
    """Return name and value of the setting that names the layout of the pages."""
    if portal:
        return "RQ_WEBHOOKS_PORTAL_BASE_TEMPLATE", state.settings.portal_base_template
    return "RQ_WEBHOOKS_BASE_TEMPLATE", state.settings.base_template


def render(state: State, template: str, *, tenant: str | None, strict: bool = False, **values: Any) -> str:
    """Return one of our pages, in the host's layout if that is possible.

    :param tenant: the customer who sees it, without what concerns operators only; ``None`` for an operator.
    :param strict: raise what the host's layout raises, instead of using our layout.
    :param values: what the template shows; it finds them under their names with the prefix ``rqw_``.
    """
    values.setdefault("now", datetime.now(UTC))
    if tenant is not None or template == "unavailable.html":
        values.setdefault("alarms", [])
    elif "alarms" not in values:
        values["alarms"] = everywhere(state)
    values |= {
        "shown": formatting,
        "redact_url": redact_url,
        "cap": COUNT_CAP,
        "csrf_field": FORM_FIELD,
        "csrf_token": csrf_token,
        "tenant": tenant,
        "has_tenants": tenant is None and state.hooks.tenant_function is not None,
        "may_manage": tenant is not None or is_allowed(state, "manage"),
        "done": request.args.get("done", ""),
        "done_count": request.args.get("n", 0, type=int),
    }
    context = {f"rqw_{name}": value for name, value in values.items()}
    found = environment().get_template(f"rq_webhooks/{template}")
    setting, base = layout_setting(state, portal=tenant is not None)
    if base is not None:
        parts = found.render(rqw_base=PARTS_BASE, **context).split(PARTS_MARK)
        try:
            return _in_layout(state, base, parts, context)
        # The host's layout may raise anything, and the dashboard is needed most when there is trouble.
        except Exception as exc:
            if strict:
                raise
            logger.error(
                "The pages cannot be shown in %s %r (%s: %s), so our own layout is used; "
                "`flask rq-webhooks doctor` says what to do.", setting, base, type(exc).__name__, exc,
            )  # fmt: skip
    return found.render(rqw_base=OWN_BASE, **context)


@functools.cache
def environment() -> Environment:
    """Return the Jinja environment of our templates."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape())  # noqa: S701  (by name)
    made.globals["url_for"] = url_for
    return made


def _in_layout(state: State, base: str, parts: Sequence[str], context: Mapping[str, Any]) -> str:
    """Return a page in the host's layout, with style and script even if that has no block for them."""
    title, head, content = map(Markup, parts)
    filled = {"rqw_base": base, "rqw_title": title, "rqw_head": head, "rqw_content": content}
    html = render_template(_filling(state), **{**context, **filled})
    if CONTENT_MARK not in html:
        raise LookupError("the layout has no block 'content'")
    return html if HEAD_MARK in html else html.replace(CONTENT_MARK, parts[1] + CONTENT_MARK, 1)


def _filling(state: State) -> Template:
    """Return a template, with the host's delimiters, that extends its layout and fills the three blocks."""
    app = state.app
    if _CACHE not in app.extensions:
        env = app.jinja_env

        def tag(text: str) -> str:
            return f"{env.block_start_string} {text} {env.block_end_string}"

        def shown(name: str) -> str:
            return f"{env.variable_start_string} {name} {env.variable_end_string}"

        source = tag("extends rqw_base")
        source += tag("block title") + shown("rqw_title") + tag("endblock")
        source += tag("block head") + shown("super()") + shown("rqw_head") + tag("endblock")
        source += tag("block content") + shown("rqw_content") + tag("endblock")
        app.extensions[_CACHE] = env.from_string(source)
    found: Template = app.extensions[_CACHE]
    return found


def done(what: str, view: str, count: int | None = None, **values: Any) -> Response:
    """Redirect to a page that says what was done; the URL carries the word, so no session is needed."""
    if count is not None:
        values["n"] = count
    return make_response(redirect(url_for(view, done=what, **values), code=303))
