"""What the routes of the API have in common: permission, input, response, errors, and their description.

A route declares these once, where it is defined (see :class:`Api`); its view gets checked input and returns
the content of its response. :func:`openapi_document` describes the same declarations. Of storage, only the
errors are known here.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from flask import Blueprint, Flask, Response, jsonify, request
from marshmallow import Schema

from ..accept.decorator import RETRY_UNAVAILABLE_S
from ..accept.request_schema import HeaderObject, SecretText, TargetURL
from ..errors import ErasedError, RQWebhooksError, StorageUnavailableError
from ..state import State
from ..storage.queries import CursorError
from ..version import __version__
from . import api_schemas as schemas
from . import operations
from .blueprint import Permission, is_allowed, is_forgeable, is_possible_id, own_tenant

if TYPE_CHECKING:
    from apispec import APISpec

logger = logging.getLogger(__name__)

View = TypeVar("View", bound=Callable[..., Any])

#: Maximum bytes of an API request; the largest honest one, an endpoint with all headers, is a tenth of it.
MAX_BODY_BYTES = 256 * 1024

_KEY = re.compile("[!-~]{1,255}")
_PART = re.compile(r"<(?:\w+:)?(\w+)>")

#: Inputs that depend on the app's settings, by the name under which they are described.
EndpointBody = Literal["EndpointInput", "EndpointChangeInput"]
#: The content of a response: a schema, a media type, or nothing.
Answer = type[Schema] | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route of the API.

    :param path: in Flask's notation, without the prefix.
    :param permission: ``None`` for a route that is open.
    :param own: whether the permission ``own`` is enough. The view then gets ``tenant``, the only tenant whose
        rows exist for it; ``None`` for a caller with the permission itself.
    :param asks_itself: whether the view checks the permission itself, because it depends on the input.
    :param answers: status → content and description; the first is the usual one.
    :param query: what the query string may contain.
    :param body: what the JSON object in the body may contain.
    :param idempotent: whether the view gets the ``Idempotency-Key`` as ``key``.
    """

    method: str
    path: str
    summary: str
    permission: Permission | None
    answers: Mapping[int, tuple[Answer, str]]
    own: bool = False
    asks_itself: bool = False
    query: type[Schema] | None = None
    body: type[Schema] | EndpointBody | None = None
    idempotent: bool = False

    @property
    def openapi_path(self) -> str:
        """Return the path in OpenAPI's notation."""
        return _PART.sub(r"{\1}", self.path)


class Api:
    """Adds the routes of the API to a blueprint.

    :param blueprint: the app's.
    :param state: the app's state.
    """

    def __init__(self, blueprint: Blueprint, state: State) -> None:
        self._blueprint = blueprint
        self._state = state
        _install(blueprint)

    def route(
        self,
        method: str,
        path: str,
        permission: Permission | None,
        answer: Answer,
        *,
        status: int = 200,
        also: Mapping[int, tuple[Answer, str]] | None = None,
        **facts: Any,
    ) -> Callable[[View], View]:
        """Serve a view: check the permission, check the input, write the response.

        The view is called with the checked query or body first, unless that has no fields, and with the parts
        of the path by name. It returns the content of the response; or content, status and headers if the
        response is not the usual one; or a whole response. The first line of its docstring is the summary.

        :param status: of the usual response.
        :param also: further responses.
        :param facts: further fields of :class:`Route`.
        """

        def decorate(view: View) -> View:
            summary = (view.__doc__ or "").strip().partition("\n")[0]
            answers = {status: (answer, "Done."), **(also or {})}
            route = Route(
                method=method, path=path, summary=summary, permission=permission, answers=answers, **facts
            )
            served = _served(self._state, route, view)
            self._blueprint.add_url_rule(
                path, view.__name__, served, methods=[method], provide_automatic_options=True
            )
            return view

        return decorate


def routes_of(app: Flask) -> list[Route]:
    """Return the routes of the API that *app* serves, in the order in which they were added."""
    views = (app.view_functions[rule.endpoint] for rule in app.url_map.iter_rules())
    return [view.rqw_route for view in views if hasattr(view, "rqw_route")]


def _served(state: State, route: Route, view: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(view)
    def served(**parts: Any) -> Response:
        tenant = None if route.asks_itself else _ask(state, route, parts)
        if route.own and not route.asks_itself:
            parts["tenant"] = tenant
        if route.idempotent:
            parts["key"] = _idempotency_key()
        found = view(*_input(state, route, tenant), **parts)
        return found if isinstance(found, Response) else _answer(route, found)

    served.rqw_route = route  # type: ignore[attr-defined]
    return served


def _ask(state: State, route: Route, parts: Mapping[str, str]) -> str | None:
    """Check the permission; return the tenant the caller is restricted to, ``None`` for no restriction."""
    tenant = None
    if route.permission is not None and not is_allowed(state, route.permission):
        tenant = own_tenant(state) if route.own else None
        if tenant is None:
            raise ApiError(403, "forbidden", f"This needs the permission {route.permission!r}.")
    if route.permission == "manage" and is_forgeable():
        why = "A caller known by cookie must send the token of GET api/csrf as X-CSRFToken."
        raise ApiError(403, "csrf", why)
    if not all(is_possible_id(item_id) for item_id in parts.values()):
        raise not_found("id")
    return tenant


def _input(state: State, route: Route, tenant: str | None) -> list[Any]:
    """Return the arguments that come from query or body: one, or none."""
    if route.query is not None:
        return [_query_input(route.query())]
    if route.body is None:
        return []
    schema = operations.endpoint_schema(state, tenant) if isinstance(route.body, str) else route.body()
    values = _json_input(schema, partial=route.body == "EndpointChangeInput")
    return [values] if schema.fields else []


def _query_input(schema: Schema) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, items in request.args.lists():
        # A list may be written with commas, or by repeating its field.
        values[name] = ",".join(items) if name == "status" else items[-1]
    return operations.checked(schema, values)


def _json_input(schema: Schema, *, partial: bool) -> dict[str, Any]:
    """Return the JSON object in the body, checked; no body counts as an empty object."""
    values: Any = {}
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise ApiError(413, "too_large", f"At most {MAX_BODY_BYTES} bytes are accepted.")
    if request.get_data():
        if not request.is_json:
            # Another site can send a form without asking, but not JSON.
            raise ApiError(415, "not_json", "Send the body as application/json.")
        try:
            values = request.get_json(silent=True)
        except RecursionError:
            values = None
    if not isinstance(values, dict):
        raise ApiError(400, "invalid", "Expected a JSON object.")
    return operations.checked(schema, values, partial=partial)


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        raise operations.InvalidInputError(
            {"Idempotency-Key": ["Expected 1 to 255 visible ASCII characters."]}
        )
    return key


def _answer(route: Route, found: Any) -> Response:
    usual = next(iter(route.answers))
    body, status, headers = found if isinstance(found, tuple) else (found, usual, {})
    content, _description = route.answers[status]
    if content is None:
        response = Response()
    else:
        response = jsonify(content().dump(body) if isinstance(content, type) else body)
    response.status_code = status
    response.headers.update(headers)
    return response


# -- refusals ---------------------------------------------------------------------------------------------


class ApiError(RQWebhooksError):
    """A request to the API is refused.

    :param code: stable, for programs.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def not_found(what: str) -> ApiError:
    """Return the error for an id that is unknown, or that the caller may not know."""
    return ApiError(404, "not_found", f"There is no such {what}.")


def not_installed(need: str, package: str, extra: str) -> ApiError:
    """Return the error of a route that needs a package of the *extra*."""
    how = f"install it with pip install 'flask-rq-webhooks[{extra}]'"
    return ApiError(501, "not_installed", f"{need} the package {package}; {how}.")


def _refusal(status: int, code: str, message: str, details: Mapping[str, Any] | None = None) -> Response:
    response = jsonify({"error": {"code": code, "message": message, "details": dict(details or {})}})
    response.status_code = status
    return response


_invalid = functools.partial(_refusal, 400, "invalid", "The request is not acceptable.")


def _install(blueprint: Blueprint) -> None:
    """Make *blueprint* return errors as JSON, and add the safe headers to everything it serves."""

    @blueprint.errorhandler(ApiError)
    def refused(exc: ApiError) -> Response:
        return _refusal(exc.status, exc.code, str(exc))

    @blueprint.errorhandler(operations.InvalidInputError)
    def invalid(exc: operations.InvalidInputError) -> Response:
        return _invalid(exc.details)

    @blueprint.errorhandler(operations.UnknownItemError)
    def unknown(exc: operations.UnknownItemError) -> Response:
        # Without the id, and without revealing the kind of an endpoint.
        return refused(not_found(exc.what.rpartition(" ")[2]))

    for kind, status, code in (
        (operations.ReusedKeyError, 409, "idempotency_key"),
        (operations.TenantLimitError, 409, "too_many_endpoints"),
        (operations.BusyHostError, 429, "too_many_waiting"),
        (ErasedError, 409, "erased"),
    ):
        refuse = functools.partial(_refusal, status, code)
        blueprint.register_error_handler(kind, lambda exc, refuse=refuse: refuse(str(exc)))

    @blueprint.errorhandler(CursorError)
    def bad_cursor(exc: CursorError) -> Response:
        return _invalid({"cursor": [str(exc)]})

    @blueprint.errorhandler(StorageUnavailableError)
    def unavailable(exc: StorageUnavailableError) -> Response:
        logger.error("%s %r failed: %s", request.method, request.path, exc)
        response = _refusal(503, "unavailable", "The database cannot be reached now.")
        response.headers["Retry-After"] = str(RETRY_UNAVAILABLE_S)
        return response

    @blueprint.after_request
    def safe(response: Response) -> Response:
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        if response.mimetype != "text/html":  # pages set it themselves; the host's error pages are its own
            response.headers.setdefault(
                "Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"
            )
        return response


# -- the description: OpenAPI 3.1 -------------------------------------------------------------------------


def openapi_document(state: State, routes: Iterable[Route], *, root: str) -> dict[str, Any]:
    """Return the description of one app's API.

    :param root: path under which the app is mounted; usually empty.
    :raises ApiError: without the package ``apispec``.
    """
    try:
        from apispec import APISpec
        from apispec.ext.marshmallow import MarshmallowPlugin
    except ImportError as exc:
        raise not_installed("The API's description needs", "apispec", "openapi") from exc
    plugin: Any = MarshmallowPlugin(schema_name_resolver=_schema_name)  # its methods have no types
    spec = APISpec(
        title="Webhooks",
        version=__version__,
        openapi_version="3.1.0",
        info={
            "description": "The state of webhooks, and what operators do about it. The app decides who may; "
            "each operation names the permission it needs as x-permission, and says as x-own whether own is "
            "enough for what belongs to the caller's tenant."
        },
        servers=[{"url": (root + state.settings.url_prefix).rstrip("/") or "/"}],
        plugins=[plugin],
    )
    for field_class, kind in ((TargetURL, "string"), (SecretText, "string"), (schemas.BodyText, "string")):
        plugin.map_to_openapi_type(field_class, kind, None)
    plugin.map_to_openapi_type(HeaderObject, "object", None)
    _add_endpoint_inputs(spec, state)
    spec.components.schema("Error", schema=schemas.ErrorSchema)
    for route in routes:
        spec.path(route.openapi_path, operations={route.method.lower(): _described(route)})
    document = spec.to_dict()
    _move_enums(document)
    sometimes = {
        _schema_name(kind): kind.sometimes
        for kind in vars(schemas).values()
        if isinstance(kind, type) and issubclass(kind, schemas.AnswerSchema)
    }
    for name, component in document["components"]["schemas"].items():
        if not name.endswith("Input"):
            component["required"] = sorted(set(component["properties"]) - sometimes[name])
    return document


def _schema_name(schema: Any) -> str:
    kind = schema if isinstance(schema, type) else type(schema)
    return kind.__name__.lstrip("_").removesuffix("Schema")


def _move_enums(part: Any) -> None:
    """Move the allowed values of a list to its items; apispec puts them on the list."""
    if isinstance(part, dict):
        if "items" in part and "enum" in part:
            part["items"] = {**part["items"], "enum": part.pop("enum")}
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            _move_enums(item)


def _add_endpoint_inputs(spec: APISpec, state: State) -> None:
    spec.components.schema("EndpointInput", schema=operations.endpoint_schema(state))
    component = {**spec.components.schemas["EndpointInput"]}
    component["properties"] = {
        name: value for name, value in component["properties"].items() if name not in operations.FIXED
    }
    component.pop("required", None)
    spec.components.schema("EndpointChangeInput", component)


def _described(route: Route) -> dict[str, Any]:
    or_own = ", or own: then only what belongs to the caller's tenant exists" if route.own else ""
    found: dict[str, Any] = {
        "summary": route.summary,
        "description": f"Needs the permission {route.permission}{or_own}." if route.permission else "Open.",
        "x-permission": route.permission,
        "x-own": route.own,
        "parameters": list(_parameters(route)),
        "responses": {
            **{str(status): _response(*answer) for status, answer in route.answers.items()},
            "default": {"description": "Refused.", "content": {"application/json": {"schema": "Error"}}},
        },
    }
    if route.body is not None:
        found["requestBody"] = {
            "required": route.body == "EndpointInput",
            "content": {"application/json": {"schema": route.body}},
        }
    return found


def _parameters(route: Route) -> Iterable[dict[str, Any]]:
    for name in _PART.findall(route.path):
        yield {"in": "path", "name": name, "required": True, "schema": {"type": "string"}}
    if route.query is not None:
        yield {"in": "query", "schema": route.query}
    if route.idempotent:
        yield {
            "in": "header",
            "name": "Idempotency-Key",
            "description": "Sent again with the same key, the request creates nothing new.",
            "schema": {"type": "string", "pattern": f"^{_KEY.pattern}$"},
        }


def _response(answer: Answer, description: str) -> dict[str, Any]:
    if answer is None:
        return {"description": description}
    if isinstance(answer, str):
        shape = {"type": "string"} if answer.startswith("text/") else {"type": "object"}
        return {"description": description, "content": {answer: {"schema": shape}}}
    return {"description": description, "content": {"application/json": {"schema": answer}}}
