"""The API's own description, OpenAPI 3.1, made from what each route states.

Knows nothing of storage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..accept.request_schema import HeaderObject, SecretText, TargetURL
from ..errors import ConfigurationError
from ..state import State
from ..version import __version__
from . import api_schemas as schemas
from .api_contract import Answer, Route
from .operations import endpoint_schema

if TYPE_CHECKING:
    from apispec import APISpec


def openapi_document(state: State, routes: Iterable[Route], *, root: str) -> dict[str, Any]:
    """Return the description of one app's API.

    :param root: path under which the app is mounted; empty for the usual place.
    :raises ConfigurationError: without the package ``apispec``.
    """
    try:
        from apispec import APISpec
        from apispec.ext.marshmallow import MarshmallowPlugin
    except ImportError as exc:
        raise ConfigurationError(
            "The API's description needs the package apispec; install it with "
            "pip install 'flask-rq-webhooks[openapi]'."
        ) from exc
    plugin: Any = MarshmallowPlugin(schema_name_resolver=_schema_name)  # its methods have no types
    spec = APISpec(
        title="Webhooks",
        version=__version__,
        openapi_version="3.1.0",
        info={
            "description": "The state of webhooks, and what operators do about it. The app decides who may; "
            "each operation names the permission it needs as x-permission."
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
    _mend_lists(document)
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


def _mend_lists(part: Any) -> None:
    """Say of items, not of their list, which values are allowed; apispec says it of the list."""
    if isinstance(part, dict):
        if "items" in part and "enum" in part:
            part["items"] = {**part["items"], "enum": part.pop("enum")}
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            _mend_lists(item)


def _add_endpoint_inputs(spec: APISpec, state: State) -> None:
    spec.components.schema("EndpointInput", schema=endpoint_schema(state))
    component = dict(spec.components.schemas["EndpointInput"])
    changeable = {
        name: value for name, value in component["properties"].items() if name not in ("secret", "scope")
    }
    component = {**component, "properties": changeable}
    component.pop("required", None)
    spec.components.schema("EndpointChangeInput", component)


def _described(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": route.summary,
        "description": f"Needs the permission {route.permission}." if route.permission else "Open.",
        "x-permission": route.permission,
        "parameters": list(_parameters(route)),
        "responses": {
            **{str(status): _answer(*answer) for status, answer in route.answers.items()},
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
    for name in route.parameters:
        yield {"in": "path", "name": name, "required": True, "schema": {"type": "string"}}
    if route.query is not None:
        yield {"in": "query", "schema": route.query}
    if route.idempotent:
        yield {
            "in": "header",
            "name": "Idempotency-Key",
            "description": "Sent again with the same key, the request creates nothing new.",
            "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
        }


def _answer(answer: Answer, description: str) -> dict[str, Any]:
    if answer is None:
        return {"description": description}
    if isinstance(answer, str):
        shape = {"type": "string"} if answer.startswith("text/") else {"type": "object"}
        return {"description": description, "content": {answer: {"schema": shape}}}
    return {"description": description, "content": {"application/json": {"schema": answer}}}
