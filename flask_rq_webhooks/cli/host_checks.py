"""The checks of ``doctor`` about the app itself: its permission function, its routes and its layout."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateNotFound, TemplateSyntaxError, nodes
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.routing.exceptions import RequestRedirect

from ..web.blueprint import HOST_PART
from ..web.page_frame import environment, render
from ..web.permissions import is_allowed

if TYPE_CHECKING:
    from ..state import State

#: Blocks of a layout, and what each is for.
BLOCKS = {
    "content": "pages appear in our own layout",
    "head": "their style is loaded from the page's body",
    "title": "pages have no title of their own",
}

#: A part of a path that fits a converter, by its name.
_SAMPLES = {"int": "1", "float": "1.5", "uuid": "12345678-1234-5678-1234-567812345678", "path": "a/b"}
_PART = re.compile(r"<(?:(\w+)(?:\((.*?)\))?:)?\w+>")

_PREFIX = "rq_webhooks."


class WrongError(Exception):
    """A check found something wrong; its text says what, and how to fix it."""


def permission_function(state: State) -> str:
    """Check the function registered with ``@webhooks.authorize``."""
    function = state.hooks.authorize_function
    if function is None:
        raise WrongError(
            "none is registered, so status, API and dashboard answer 403; register one with "
            "@webhooks.authorize."
        )
    if inspect.iscoroutinefunction(function):
        raise WrongError(
            "it is `async def`, which is not awaited, so every request is answered 403; make it a plain "
            "`def` that returns True or False."
        )
    try:
        inspect.signature(function).bind("status", job_id=None, runid=None)
    except TypeError as exc:
        raise WrongError(
            f"it cannot be called as function(permission, job_id=…, runid=…) ({exc}), so requests end with "
            "500; define it as `def may(permission, **what)`."
        ) from None
    except ValueError:  # a built-in without a signature
        pass
    return "registered"


def sessions(state: State) -> str:
    """Check that the forms of the pages can carry a token against forged requests."""
    if not state.settings.dashboard:
        return "the dashboard is off"
    if state.app.secret_key:
        return "forms of the pages carry a token"
    if state.settings.encryption_keys:
        raise WrongError(
            "the app has no SECRET_KEY, so the forms of the pages answer 403; set one, or set "
            "RQ_WEBHOOKS_DASHBOARD to False."
        )
    return "the app has no SECRET_KEY; see `keys`"


# -- routes -----------------------------------------------------------------------------------------------


def routes(state: State) -> str:
    """Check that no route of the app answers in place of one of ours, or lies between them."""
    url_map, prefix = state.app.url_map, state.settings.url_prefix.rstrip("/")
    rules = list(url_map.iter_rules())
    ours = [rule for rule in rules if rule.endpoint.startswith(_PREFIX)]
    # With the prefix "/" every route of the app lies there, and only one that hides another is wrong.
    lying = [
        rule for rule in rules
        if prefix and not rule.endpoint.startswith(_PREFIX) and f"{rule.rule}/".startswith(f"{prefix}/")
    ]  # fmt: skip
    hidden = [
        f"{rule.rule} (ours, answered by {other!r})"
        for rule in ours
        for other in _answering(url_map, rule)
        if not other.startswith(_PREFIX)
    ]
    hidden += [
        f"{rule.rule} (of {rule.endpoint!r}, answered by us)"
        for rule in rules
        if not rule.endpoint.startswith(_PREFIX)
        and any(other.startswith(_PREFIX) for other in _answering(url_map, rule))
    ]
    hidden += [f"{rule.rule} (of {rule.endpoint!r})" for rule in lying if rule.rule not in " ".join(hidden)]
    if hidden:
        shown = ", ".join(dict.fromkeys(hidden[:5])) + (", …" if len(hidden) > 5 else "")
        raise WrongError(
            f"the app has routes of its own where ours are: {shown}; set RQ_WEBHOOKS_URL_PREFIX to a path "
            "that is free, such as /rq-webhooks."
        )
    where = " of every host name (host_matching is on)" if url_map.host_matching else ""
    return f"served under {prefix or '/'}{where}"


def _answering(url_map: Map, rule: Rule) -> Iterator[str]:
    """Give the endpoints that answer a path of *rule*, by each of its methods."""
    path = _PART.sub(lambda part: _sample(part[1], part[2]), rule.rule)
    host = "localhost" if rule.host in (None, "", f"<{HOST_PART}>") else _PART.sub("localhost", rule.host)
    adapter = url_map.bind(host, subdomain=None if url_map.host_matching else rule.subdomain)
    for method in sorted((rule.methods or {"GET"}) - {"HEAD", "OPTIONS"}):
        try:
            yield adapter.match(path, method=method)[0]
        except RequestRedirect:
            continue
        except HTTPException:
            continue  # a converter of the app's own that takes no sample


def _sample(converter: str | None, arguments: str | None) -> str:
    if converter == "any" and arguments:
        return arguments.split(",")[0].strip(" \"'")
    return _SAMPLES.get(converter or "", "sample")


# -- layout -----------------------------------------------------------------------------------------------


def layout(state: State) -> str:
    """Check that the templates of the app and ours find each other."""
    base = state.settings.base_template
    if not state.settings.dashboard:
        return "the dashboard is off"
    try:
        state.app.jinja_env.get_template("rq_webhooks/_macros.html")
    except TemplateNotFound:
        raise WrongError(
            "the app's Jinja loader does not find templates of blueprints, so its own templates cannot "
            "import rq_webhooks/_macros.html (our pages do without); let it be ChoiceLoader([yours, "
            "app.create_global_jinja_loader()])."
        ) from None
    if base is None:
        return "pages appear in our own layout"
    try:
        blocks = _blocks(environment(state), base)
    except TemplateNotFound as exc:
        missing = (
            "there is no such template" if exc.name == base else f"it extends {exc.name!r}, which is missing"
        )
        raise WrongError(
            f"RQ_WEBHOOKS_BASE_TEMPLATE is {base!r}, but {missing}, so pages appear in our own layout; "
            "correct the name, or put the file into the app's templates folder."
        ) from None
    except TemplateSyntaxError as exc:
        raise WrongError(
            f"RQ_WEBHOOKS_BASE_TEMPLATE {base!r} cannot be compiled ({exc.name}, line {exc.lineno}: "
            f"{exc.message}), so pages appear in our own layout; correct it."
        ) from None
    for block, consequence in BLOCKS.items():
        if blocks is not None and block not in blocks:
            raise WrongError(
                f"RQ_WEBHOOKS_BASE_TEMPLATE {base!r} has no block {block!r}, so {consequence}; add "
                f"{{% block {block} %}}{{% endblock %}} to it, or name a template that extends it and has "
                "the blocks title, head and content."
            )
    return _rendered(state, base)


def _rendered(state: State, base: str) -> str:
    """Render a page in the layout as for a visitor who is not logged in."""
    text = f"pages appear in {base!r}"
    with state.app.test_request_context(f"{state.settings.url_prefix.rstrip('/')}/"):
        allowed = False
        try:
            if state.app.preprocess_request() is not None:
                return f"{text}; not rendered here, as the app wants a login first"
            allowed = is_allowed(state, "read")
            render(state, "unavailable.html", strict=True)
        except Exception as exc:  # the host's layout and what it calls may raise anything
            why = f"{type(exc).__name__}: {exc}"
            if allowed:
                raise WrongError(
                    f"RQ_WEBHOOKS_BASE_TEMPLATE {base!r} cannot be rendered ({why}), so pages appear in our "
                    "own layout; correct it."
                ) from None
            # It may depend on a login, and here nobody is logged in.
            return f"{text}, except for visitors who are not logged in ({why})"
    return text


def _blocks(templates: Environment, name: str) -> set[str] | None:
    """Return the names of the blocks of a template and those it extends.

    :returns: ``None`` where it extends a template whose name is only known when it is rendered.
    """
    found: set[str] = set()
    seen: set[str] = set()
    while name not in seen:  # a template that extends itself
        seen.add(name)
        assert templates.loader is not None  # noqa: S101  (see environment)
        source, file_name, _current = templates.loader.get_source(templates, name)
        tree = templates.parse(source, name, file_name)
        found |= {block.name for block in tree.find_all(nodes.Block)}
        parent = tree.find(nodes.Extends)
        if parent is None:
            return found
        if not isinstance(parent.template, nodes.Const):
            return None
        name = parent.template.value
    raise TemplateSyntaxError("the template extends itself", 1, name)
