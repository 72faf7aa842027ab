"""The API's own description, OpenAPI 3.1, made from the schemas that check inputs and write answers.

Owns which route takes and gives which schema, and the shapes that are put together from several of them. A
test holds it against the routes there are and against what they answer. Knows nothing of storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from marshmallow import Schema, fields

from ..accept.request_schema import HeaderObject, SecretText, TargetURL
from ..state import State
from ..version import __version__
from . import api_schemas as schemas
from .permissions import Permission

# Answers put together from others


class Status(Schema):
    """What became of a job's webhook; only the first two where none is known."""

    job_id = fields.String()
    webhook_configured = fields.Boolean()
    url = schemas.RedactedURL()
    delivery_status = fields.String()
    job_status = fields.String(allow_none=True)
    events = fields.List(fields.Nested(schemas.EventSchema))
    deliveries = fields.List(fields.Nested("StatusDeliveryWithAttempts"))


class StatusDeliveryWithAttempts(schemas.StatusDeliverySchema):
    """A delivery with its attempts, for the client who asked for the webhook."""

    attempts = fields.List(fields.Nested(schemas.StatusAttemptSchema))


class EventWithPayload(schemas.EventSchema):
    """An event, with what the payload format ``job`` tells of it."""

    payload = fields.Dict(keys=fields.String())


class EndpointAnswer(schemas.EndpointSchema):
    """An endpoint; header values are masked, and all of it null where no key opens them."""

    headers = fields.Dict(keys=fields.String(), values=fields.String(), allow_none=True)


class NewEndpointAnswer(EndpointAnswer):
    """A new endpoint. Its secret is in this answer and in no other; absent in an answer that is repeated."""

    secret = fields.String(allow_none=True)


class DeliveryDetail(Schema):
    """All there is to know of one delivery."""

    delivery = fields.Nested(schemas.DeliverySchema)
    attempts = fields.List(fields.Nested(schemas.AttemptSchema))
    event = fields.Nested(schemas.EventSchema)
    endpoint = fields.Nested(EndpointAnswer)
    body = fields.String()


class Events(Schema):
    """A part of the feed of events; its cursor goes on where it ends."""

    items = fields.List(fields.Nested(EventWithPayload))
    cursor = fields.String(allow_none=True)


class Deliveries(Schema):
    """A page of deliveries."""

    items = fields.List(fields.Nested(schemas.DeliverySchema))
    cursor = fields.String(allow_none=True)


class Endpoints(Schema):
    """A page of endpoints."""

    items = fields.List(fields.Nested(EndpointAnswer))
    cursor = fields.String(allow_none=True)


class Resent(Schema):
    """A delivery that is due now, or under way."""

    id = fields.String()
    status = fields.String()


class Left(Schema):
    """What a change of many deliveries has left for the next request.

    ``cursor`` is what to send with it, null when everything is done. ``remaining`` is counted up to 10,001,
    and null where it is not known, because the deliveries are still to be made.
    """

    remaining = fields.Integer(allow_none=True)
    cursor = fields.String(allow_none=True)


class Recovered(Left):
    """How many deliveries are due now."""

    recovered = fields.Integer()


class Canceled(Left):
    """How many deliveries were canceled."""

    canceled = fields.Integer()


class Paused(Schema):
    """Whether all sending is paused."""

    paused = fields.Boolean()


class RotatedSecret(Schema):
    """The new secret, in this answer and in no other."""

    id = fields.String()
    secret = fields.String()
    grace_s = fields.Float()


class Pinged(Schema):
    """The event of the test message."""

    event_id = fields.String()
    deliveries = fields.Integer()


class Health(Schema):
    """Whether a dispatcher is alive."""

    ok = fields.Boolean()


class CSRFToken(Schema):
    """What callers known by cookie send with every change, as ``X-CSRFToken``."""

    csrf_token = fields.String()


class Reasons(Schema):
    """Why a request was refused."""

    code = fields.String()
    message = fields.String()
    details = fields.Dict(keys=fields.String())


class Error(Schema):
    """What every refusal looks like."""

    error = fields.Nested(Reasons)


#: Names that an answer may lack; every other one is always there.
_SOMETIMES: Mapping[str, frozenset[str]] = {
    "Status": frozenset({"url", "delivery_status", "job_status", "events", "deliveries"}),
    "NewEndpointAnswer": frozenset({"secret"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route.

    :param path: as OpenAPI writes it, without the prefix.
    :param permission: ``None`` for one that is open.
    :param query: what the query string may say.
    :param body: what the JSON object in the body may say; a name for a schema made from the settings.
    :param answer: ``None`` for an empty one, a text for one that is not JSON.
    :param status: of the usual answer.
    :param repeated: whether an ``Idempotency-Key`` is heard.
    """

    method: str
    path: str
    summary: str
    permission: Permission | None
    answer: type[Schema] | str | None
    query: type[Schema] | None = None
    body: type[Schema] | str | None = None
    status: int = 200
    repeated: bool = False


def _of_endpoint(
    action: str,
    summary: str,
    *,
    answer: type[Schema] = EndpointAnswer,
    body: type[Schema] = schemas.NoInput,
    status: int = 200,
) -> Operation:
    return Operation(
        method="post", path=f"/api/endpoints/{{endpoint_id}}/{action}", permission="manage",
        summary=summary, answer=answer, body=body, status=status,
    )  # fmt: skip


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        method="get", path="/jobs/{job_id}", permission="status", answer=Status,
        summary="What became of one job's webhook.",
    ),
    Operation(
        method="get", path="/job/{job_id}/webhook", permission="status", answer=Status,
        summary="The same under another name.",
    ),
    Operation(
        method="get", path="/health", permission=None, answer=Health, summary="Whether a dispatcher is alive."
    ),
    Operation(
        method="get", path="/metrics", permission="read", answer="text/plain",
        summary="Numbers for Prometheus.",
    ),
    Operation(
        method="get", path="/openapi.json", permission="read", answer="application/json",
        summary="This description.",
    ),
    Operation(
        method="get", path="/api/csrf", permission="read", answer=CSRFToken,
        summary="The token that callers known by cookie send with every change.",
    ),
    Operation(
        method="get", path="/api/events", permission="read", answer=Events, query=schemas.FeedInput,
        summary="Events in the order they were stored; with a runid, the permission status is enough.",
    ),
    Operation(
        method="get", path="/api/events/{event_id}", permission="read", answer=EventWithPayload,
        summary="One event.",
    ),
    Operation(
        method="get", path="/api/deliveries", permission="read", answer=Deliveries,
        query=schemas.DeliveriesInput, summary="Deliveries, newest first.",
    ),
    Operation(
        method="get", path="/api/deliveries/{delivery_id}", permission="read", answer=DeliveryDetail,
        summary="One delivery with its attempts.",
    ),
    Operation(
        method="post", path="/api/deliveries/{delivery_id}/resend", permission="manage", answer=Resent,
        body=schemas.NoInput, status=202, summary="Make a delivery due now: same event, same bytes.",
    ),
    Operation(
        method="post", path="/api/recover", permission="manage", answer=Recovered, body=schemas.ManyInput,
        summary="Make many deliveries due now.",
    ),
    Operation(
        method="post", path="/api/cancel", permission="manage", answer=Canceled, body=schemas.ManyInput,
        summary="Cancel deliveries that are not finished.",
    ),
    Operation(
        method="post", path="/api/pause", permission="manage", answer=Paused, body=schemas.NoInput,
        summary="Stop all sending.",
    ),
    Operation(
        method="post", path="/api/resume", permission="manage", answer=Paused, body=schemas.NoInput,
        summary="Go on sending.",
    ),
    Operation(
        method="get", path="/api/endpoints", permission="read", answer=Endpoints,
        query=schemas.EndpointsInput, summary="Endpoints, newest first.",
    ),
    Operation(
        method="post", path="/api/endpoints", permission="manage", answer=NewEndpointAnswer,
        body="EndpointInput", status=201, repeated=True, summary="Make a standing endpoint.",
    ),
    Operation(
        method="get", path="/api/endpoints/{endpoint_id}", permission="read", answer=EndpointAnswer,
        summary="One endpoint.",
    ),
    Operation(
        method="patch", path="/api/endpoints/{endpoint_id}", permission="manage", answer=EndpointAnswer,
        body="EndpointChangeInput", summary="Change a standing endpoint.",
    ),
    Operation(
        method="delete", path="/api/endpoints/{endpoint_id}", permission="manage", answer=None, status=204,
        summary="Delete a standing endpoint with its deliveries.",
    ),
    _of_endpoint(
        "rotate", "Give it a new secret; the old ones go on signing for a while.",
        answer=RotatedSecret, body=schemas.RotateInput,
    ),
    _of_endpoint("test", "Send it a webhook.ping.", answer=Pinged, status=202),
    _of_endpoint("enable", "Let it get deliveries again."),
    _of_endpoint("disable", "Stop it from getting new deliveries."),
    Operation(
        method="get", path="/api/stats", permission="read", answer=schemas.StatisticsSchema,
        query=schemas.StatsInput, summary="The numbers of the overview.",
    ),
)  # fmt: skip


def openapi_document(state: State, *, root: str) -> dict[str, Any]:
    """Return the description of one app's API.

    :param root: path under which the app is mounted; empty for the usual place.
    """
    plugin: Any = MarshmallowPlugin()  # its methods have no types
    spec = APISpec(
        title="Webhooks",
        version=__version__,
        openapi_version="3.1.0",
        info={
            "description": "What became of webhooks, and what operators do about it. Who may is decided by "
            "the app; each operation names the permission it needs as x-permission."
        },
        servers=[{"url": (root + state.settings.url_prefix).rstrip("/") or "/"}],
        plugins=[plugin],
    )
    for field_class, kind in ((TargetURL, "string"), (SecretText, "string"), (schemas.BodyText, "string")):
        plugin.map_to_openapi_type(field_class, kind, None)
    plugin.map_to_openapi_type(HeaderObject, "object", None)
    _add_endpoint_inputs(spec, state)
    spec.components.schema("Error", schema=Error)
    for operation in OPERATIONS:
        spec.path(operation.path, operations={operation.method: _described(operation)})
    document = spec.to_dict()
    _mend_lists(document)
    for name, component in document["components"]["schemas"].items():
        if not name.endswith("Input"):
            never_missing = set(component["properties"]) - _SOMETIMES.get(name, frozenset())
            component["required"] = sorted(never_missing)
    return document


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
    schema = schemas.endpoint_input(state.settings, state.url_policy, frozenset(state.formats))
    spec.components.schema("EndpointInput", schema=schema)
    component = dict(spec.components.schemas["EndpointInput"])
    changeable = {
        name: value for name, value in component["properties"].items() if name not in ("secret", "scope")
    }
    component = {**component, "properties": changeable}
    component.pop("required", None)
    spec.components.schema("EndpointChangeInput", component)


def _described(operation: Operation) -> dict[str, Any]:
    needs = f"Needs the permission {operation.permission}." if operation.permission else "Open."
    found: dict[str, Any] = {
        "summary": operation.summary,
        "description": needs,
        "x-permission": operation.permission,
        "parameters": list(_parameters(operation)),
        "responses": {
            str(operation.status): _answer(operation.answer),
            "default": {
                "description": "Refused.",
                "content": {"application/json": {"schema": "Error"}},
            },
        },
    }
    if operation.answer is Status:
        found["responses"]["304"] = {"description": "Unchanged since the ETag in If-None-Match."}
    if operation.method == "delete":
        more = "Disabled; more of its deliveries are left than one request deletes. Send it again."
        found["responses"]["202"] = _answer(EndpointAnswer, more)
    if operation.answer is Health:
        found["responses"]["503"] = _answer(Health)
    if operation.repeated:
        found["responses"]["200"] = _answer(operation.answer, "Made before, with the same Idempotency-Key.")
    if operation.body is not None:
        found["requestBody"] = {
            "required": isinstance(operation.body, str) and operation.method == "post",
            "content": {"application/json": {"schema": operation.body}},
        }
    return found


def _parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    for part in operation.path.split("/"):
        if part.startswith("{"):
            yield {"in": "path", "name": part[1:-1], "required": True, "schema": {"type": "string"}}
    if operation.query is not None:
        yield {"in": "query", "schema": operation.query}
    if operation.repeated:
        yield {
            "in": "header",
            "name": "Idempotency-Key",
            "description": "Sent again with the same key, the request makes nothing new.",
            "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
        }


def _answer(answer: type[Schema] | str | None, description: str = "Done.") -> dict[str, Any]:
    if answer is None:
        return {"description": description}
    if isinstance(answer, str):
        shape = {"type": "string"} if answer.startswith("text/") else {"type": "object"}
        return {"description": description, "content": {answer: {"schema": shape}}}
    return {"description": description, "content": {"application/json": {"schema": answer}}}
