"""The API's inputs and responses, as marshmallow schemas.

This module decides what a response may contain: URLs are redacted, sent headers are masked, secrets have no
field. Schemas that begin with ``Status`` are for clients and therefore coarse; the rest is for callers with
the permission ``read``. A response always has all its fields, except those its schema lists in ``sometimes``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from ..accept.request_schema import (
    MAX_RETRY_COUNT,
    HeaderObject,
    SecretText,
    TargetURL,
    Text,
    TextList,
    WholeNumber,
    one_of,
    timeout_range,
)
from ..config import Settings
from ..protocol.events import EVERY_TYPE, JOB_TYPES, OPERATOR_TYPES, is_application_type
from ..protocol.urls import UrlPolicy, redact_url
from ..state import State
from ..storage.attempts import coarse_code
from ..storage.models import CANCELED, EXHAUSTED, MAX_TENANT, PENDING, SENDING, SUCCEEDED


class RedactedURL(fields.String):
    """A URL without its query and the parts of its path that look secret."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else redact_url(value)


class BodyText(fields.Field):  # type: ignore[type-arg]
    """Bytes of a request or response body, as text."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else bytes(value).decode("utf-8", "replace")


class CoarseCode(fields.String):
    """An error code, as coarse as clients may see it."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return coarse_code(value)


class ItemList(fields.List):  # type: ignore[type-arg]
    """A list, or one text with the items separated by commas or spaces."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[Any]:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        return super()._deserialize(value, attr, data, **kwargs)


class RetryStatus(fields.Field):  # type: ignore[type-arg]
    """An HTTP status that may be retried, or ``4xx`` or ``5xx`` for all of these; as text."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = str(value).lower() if type(value) in (int, str) else ""
        if text == "410":
            raise ValidationError("410 cannot be retried: it says that the receiver is gone for good.")
        if not re.fullmatch("[45]([0-9][0-9]|xx)", text, re.ASCII):
            raise ValidationError(
                f"{str(value)[:20]!r} cannot be retried: expected statuses from 400 to 599, '4xx' or '5xx'. "
                "2xx is success, and redirects are never followed."
            )
        return text


class AnswerSchema(Schema):
    """The base of all response schemas below."""

    sometimes: ClassVar[frozenset[str]] = frozenset()


def _shape(
    name: str,
    base: type[AnswerSchema] = AnswerSchema,
    *,
    sometimes: str = "",
    text: str = "",
    whole: str = "",
    number: str = "",
    yes_no: str = "",
    time: str = "",
    url: str = "",
    **others: fields.Field[Any],
) -> type[AnswerSchema]:
    """Return a schema.

    :param base: schema whose fields it also has.
    :param sometimes: names of the fields that may be absent.
    :param text: names of the fields of this kind, likewise for the kinds that follow; ``?`` marks one that
        may be null.
    :param others: further fields.
    """
    kinds: tuple[tuple[str, type[fields.Field[Any]]], ...] = (
        (text, fields.String), (whole, fields.Integer), (number, fields.Float), (yes_no, fields.Boolean),
        (time, fields.DateTime), (url, RedactedURL),
    )  # fmt: skip
    for names, kind in kinds:
        for field in names.split():
            others[field.rstrip("?")] = kind(allow_none=field.endswith("?"))
    made: Any = base.from_dict(others, name=name)
    made.sometimes = frozenset(sometimes.split())
    return made  # type: ignore[no-any-return]


def _items(schema: type[AnswerSchema]) -> fields.Field[Any]:
    return fields.List(fields.Nested(schema))


def _object(values: type[fields.Field[Any]] | None = None, *, allow_none: bool = False) -> fields.Field[Any]:
    return fields.Dict(keys=fields.String(), values=values and values(), allow_none=allow_none)


#: An event without its payload.
EventSchema = _shape(
    "EventSchema",
    text="id type job_id? runid? source supersedes? tenant?",
    time="occurred_at created_at erased_at?",
)
#: An event with its payload, as the payload format ``job`` renders it; ``null`` once it is erased.
EventWithPayloadSchema = _shape("EventWithPayloadSchema", EventSchema, payload=_object(allow_none=True))
#: A part of the feed of events; the next request continues at its cursor.
FeedSchema = _shape("FeedSchema", text="cursor?", items=_items(EventWithPayloadSchema))

#: An attempt, as the client who asked for the webhook may see it.
StatusAttemptSchema = _shape(
    "StatusAttemptSchema", text="status", whole="number status_code?", number="duration_ms",
    time="started_at", error_code=CoarseCode(allow_none=True),
)  # fmt: skip
#: A delivery, as the client who asked for the webhook may see it.
StatusDeliverySchema = _shape(
    "StatusDeliverySchema", text="id event_id status", whole="max_attempts status_code?",
    time="next_attempt_at? created_at finished_at?", url="url", event=fields.String(attribute="event_type"),
    error_code=CoarseCode(allow_none=True),
)  # fmt: skip
#: The same with its attempts.
StatusDeliveryWithAttemptsSchema = _shape(
    "StatusDeliveryWithAttemptsSchema", StatusDeliverySchema, attempts=_items(StatusAttemptSchema)
)
#: The state of a job's webhook; only ``job_id`` and ``webhook_configured`` if none is known.
StatusSchema = _shape(
    "StatusSchema", sometimes="url delivery_status job_status events deliveries",
    text="job_id delivery_status job_status?", yes_no="webhook_configured", url="url",
    events=_items(EventSchema), deliveries=_items(StatusDeliveryWithAttemptsSchema),
)  # fmt: skip

#: A delivery in a list.
DeliverySchema = _shape(
    "DeliverySchema",
    text="id event_id job_id? runid? endpoint_id endpoint_kind host status trigger error_code? tenant?",
    whole="attempts max_attempts status_code?", time="next_attempt_at? created_at finished_at? erased_at?",
    url="url", event=fields.String(attribute="event_type"),
)  # fmt: skip
#: A page of deliveries.
DeliveriesSchema = _shape("DeliveriesSchema", text="cursor?", items=_items(DeliverySchema))
#: An attempt with everything that is stored.
AttemptSchema = _shape(
    "AttemptSchema", text="id trigger status error_code? error_detail? dispatcher_id?",
    whole="number status_code?", number="duration_ms", time="started_at",
    request_headers=_object(fields.String), response_headers=_object(fields.String),
    response_body=BodyText(),
)  # fmt: skip

#: An endpoint. Header values are masked, and ``headers`` is null if no key decrypts them. ``secrets`` is the
#: number of secrets that sign now.
EndpointSchema = _shape(
    "EndpointSchema", text="id kind host scope format reference? runid? description? disabled_reason? "
    "tenant? only_tenant?",
    whole="max_attempts? failures secrets", number="timeout_s?", yes_no="sign_payload enabled",
    time="disabled_at? failing_since? created_at updated_at", url="url",
    retry_schedule=fields.List(fields.Float(), allow_none=True),
    retry_statuses=fields.List(fields.String(), allow_none=True),
    events=fields.List(fields.String(), allow_none=True), headers=_object(fields.String, allow_none=True),
)  # fmt: skip
#: A page of endpoints.
EndpointsSchema = _shape("EndpointsSchema", text="cursor?", items=_items(EndpointSchema))
#: A new endpoint. Its secret is in this response and in no other; it is absent if the response is repeated.
NewEndpointSchema = _shape("NewEndpointSchema", EndpointSchema, sometimes="secret", text="secret?")
#: The new secret, in this response and in no other.
RotatedSchema = _shape("RotatedSchema", text="id secret", number="grace_s")
#: The event of the test message.
PingedSchema = _shape("PingedSchema", text="event_id", whole="deliveries")

#: One delivery with its attempts, event, endpoint and body.
DeliveryDetailSchema = _shape(
    "DeliveryDetailSchema", delivery=fields.Nested(DeliverySchema), attempts=_items(AttemptSchema),
    event=fields.Nested(EventSchema), endpoint=fields.Nested(EndpointSchema), body=BodyText(),
)  # fmt: skip
#: A delivery that is due now, or being sent.
ResentSchema = _shape("ResentSchema", text="id status")

#: What a change of many deliveries leaves for the next request. ``cursor`` is sent with that request, and is
#: null when everything is done. ``remaining`` is counted up to 10,001, and is null if it is not known because
#: the deliveries do not exist yet.
_LeftSchema = _shape("_LeftSchema", text="cursor?", whole="remaining?")
#: How many deliveries are due now.
RecoveredSchema = _shape("RecoveredSchema", _LeftSchema, recovered=fields.Integer(attribute="done"))
#: How many deliveries were canceled.
CanceledSchema = _shape("CanceledSchema", _LeftSchema, canceled=fields.Integer(attribute="done"))
#: What was erased, and what is left: send the request again until ``in_flight`` and ``running`` are 0.
ErasedSchema = _shape("ErasedSchema", whole="events canceled in_flight running")
#: How many endpoints were disabled.
TenantDisabledSchema = _shape("TenantDisabledSchema", text="tenant", whole="disabled")
#: Recent failures and backlog of one tenant.
TenantSchema = _shape("TenantSchema", text="tenant", whole="failures backlog")
#: The tenants with recent failures or a backlog, most failures first.
TenantsSchema = _shape("TenantsSchema", items=_items(TenantSchema))
#: Whether all sending is paused.
PausedSchema = _shape("PausedSchema", yes_no="paused")

#: The deliveries that finished within one hour.
HourSchema = _shape("HourSchema", whole="succeeded exhausted canceled", time="start")
#: Recent attempts to one host.
HostSchema = _shape("HostSchema", text="host", whole="attempts failed")
#: The numbers of the overview; see :class:`~flask_rq_webhooks.storage.statistics.Statistics`.
StatisticsSchema = _shape(
    "StatisticsSchema", whole="endpoints_disabled dispatchers",
    number="oldest_due_s? success_rate? p50_ms? p95_ms?", yes_no="hours_complete",
    time="oldest_watch? paused_since?", hours=_items(HourSchema), worst_hosts=_items(HostSchema),
    counts=_object(fields.Integer), watches=_object(fields.Integer),
)  # fmt: skip
#: Whether a dispatcher is alive.
HealthSchema = _shape("HealthSchema", yes_no="ok")

#: The token that callers known by cookie send with every change, as ``X-CSRFToken``.
CSRFSchema = _shape("CSRFSchema", text="csrf_token")
#: A public key of this server; of several, the one that signs now is marked.
PublicKeySchema = _shape("PublicKeySchema", text="key algorithm", yes_no="signs")
#: The public keys of this server.
KeysSchema = _shape("KeysSchema", keys=_items(PublicKeySchema))
#: Why a request was refused.
_ReasonsSchema = _shape("_ReasonsSchema", text="code message", details=_object())
#: The body of every error response.
ErrorSchema = _shape("ErrorSchema", error=fields.Nested(_ReasonsSchema))


# -- inputs: the bounds of what operators ask for ---------------------------------------------------------

STATUSES = (PENDING, SENDING, SUCCEEDED, EXHAUSTED, CANCELED)

#: Maximum characters of a text that a filter compares with; no stored text is longer.
MAX_FILTER_TEXT = 512
#: Seconds for which a rotated secret may still sign.
MAX_GRACE_S = 30 * 86400


_SHORT = validate.Length(max=MAX_FILTER_TEXT)
_TENANT = validate.Length(min=1, max=MAX_TENANT)


class _Input(Schema):
    class Meta:
        unknown = RAISE


class NoInput(_Input):
    """No input."""


class PageInput(_Input):
    """Which page of a list."""

    cursor = fields.String()
    limit = WholeNumber(validate=validate.Range(min=1))


class FilterInput(_Input):
    """Which deliveries; in a query string, ``status`` is a comma-separated list."""

    since = fields.AwareDateTime()
    until = fields.AwareDateTime()
    endpoint_id = Text(validate=_SHORT)
    status = TextList(
        validate=[
            validate.Length(min=1),
            validate.ContainsOnly(STATUSES, error="Unknown status; known are {choices}."),
        ]
    )
    host = Text(validate=_SHORT)
    event = Text(validate=_SHORT)
    event_id = Text(validate=_SHORT)
    job_id = Text(validate=_SHORT)
    runid = Text(validate=_SHORT)
    tenant = Text(validate=_TENANT)


class DeliveriesInput(PageInput, FilterInput):
    """Which page of which deliveries."""


class ManyInput(FilterInput):
    """Which deliveries to change; all of them only with ``all``.

    ``cursor`` continues where the previous request stopped, according to its response.
    """

    all = fields.Boolean()
    cursor = fields.String()

    @validates_schema
    def _check(self, data: Mapping[str, Any], **_kwargs: Any) -> None:
        if not data.get("all") and data.keys() <= {"all", "cursor"}:
            raise ValidationError('Name at least one condition, or send "all": true.', "all")


class EraseInput(_Input):
    """Whose content to erase: exactly one of the fields."""

    job_id = Text(validate=validate.Length(min=1, max=512))
    runid = Text(validate=validate.Length(min=1, max=512))
    reference = Text(validate=validate.Length(min=1, max=512))
    tenant = Text(validate=_TENANT)

    @validates_schema
    def _check(self, data: Mapping[str, Any], **_kwargs: Any) -> None:
        if len(data) != 1:
            raise ValidationError("Name exactly one of job_id, runid, reference and tenant.")


class FeedInput(_Input):
    """Which part of the feed of events."""

    after = fields.String(attribute="cursor")
    runid = Text()
    type = Text(attribute="event_type")
    tenant = Text(validate=_TENANT)
    limit = WholeNumber(validate=validate.Range(min=1))


class EndpointsInput(PageInput):
    """Which page of which endpoints."""

    kind = fields.String(validate=validate.OneOf(("standing", "job")))
    tenant = Text(validate=_TENANT)


class TenantInput(_Input):
    """Which tenant."""

    tenant = Text(required=True, validate=_TENANT)


class StatsInput(_Input):
    """How far back the numbers go."""

    hours = WholeNumber(validate=validate.Range(min=1, max=24 * 30))


class RotateInput(_Input):
    """The new secret, generated if omitted, and how long the old one also signs."""

    secret = SecretText()
    grace_s = fields.Float(
        validate=validate.Range(
            min=0, max=MAX_GRACE_S, error="The old secret can sign for 0 s to 30 days (720 hours, 2592000 s)."
        )
    )


def endpoint_schema(state: State, tenant: str | None = None) -> Schema:
    """Return the schema of a standing endpoint's input, with this app's bounds.

    :param tenant: the tenant that creates it for itself; it may choose only what a request can choose.
    """
    return _endpoint_input(state.settings, state.url_policy, frozenset(state.formats), tenant is not None)


@lru_cache(maxsize=32)
def _endpoint_input(settings: Settings, url_policy: UrlPolicy, formats: frozenset[str], own: bool) -> Schema:
    most = min(MAX_RETRY_COUNT, settings.max_attempts) if own else settings.max_attempts
    for_operators: dict[str, fields.Field[Any]] = {
        "scope": fields.String(validate=validate.OneOf(("job", "tree"))),
        "runid": Text(allow_none=True, validate=validate.Length(max=1000)),
        "only_tenant": Text(allow_none=True, validate=_TENANT),
    }
    schema = _Input.from_dict(
        {
            **({} if own else for_operators),
            "url": TargetURL(url_policy, required=True),
            "secret": SecretText(allow_none=True),
            "headers": HeaderObject(settings.header_prefix),
            "events": TextList(allow_none=True, validate=[validate.Length(min=1, max=100), _event_types]),
            "format": Text(validate=one_of(formats, "format")),
            "sign_payload": fields.Boolean(validate=None if settings.signing_secret else _UNSIGNED),
            "description": Text(allow_none=True, validate=validate.Length(max=1000)),
            "reference": Text(allow_none=True, validate=validate.Length(max=256)),
            "timeout_s": fields.Float(allow_none=True, validate=timeout_range(settings)),
            "max_attempts": WholeNumber(allow_none=True, validate=validate.Range(min=1, max=most)),
            "retry_schedule": ItemList(
                fields.Float(), allow_none=True, validate=_delays(most if own else MAX_OWN_ATTEMPTS)
            ),
            "retry_statuses": ItemList(
                RetryStatus(), allow_none=True, validate=validate.Length(min=1, max=100)
            ),
        },
        name="EndpointInput",
    )
    return schema()


#: Maximum attempts that an operator's own retry schedule can make.
MAX_OWN_ATTEMPTS = 100
#: Shortest and longest delay of an endpoint's own schedule, and the maximum of all delays together, seconds.
MIN_DELAY_S, MAX_DELAY_S, MAX_DELAYS_S = 1, 86_400, 7 * 86_400


def _delays(most: int) -> Callable[[list[float]], None]:
    """Return the validator for a retry schedule that makes at most *most* attempts."""

    def check(delays: list[float]) -> None:
        if not 1 <= len(delays) < most:
            raise ValidationError(
                f"Expected one delay or more, and at most {most - 1}: {most} attempts with the first."
            )
        if not all(MIN_DELAY_S <= delay <= MAX_DELAY_S for delay in delays):
            raise ValidationError(f"Expected delays of {MIN_DELAY_S} to {MAX_DELAY_S} seconds (one day).")
        if sum(delays) > MAX_DELAYS_S:
            raise ValidationError(
                f"The delays add up to {sum(delays):g} seconds; at most {MAX_DELAYS_S} (7 days) are possible."
            )

    return check


_UNSIGNED = validate.Equal(False, error="This server has no server-wide secret to sign with.")
_KNOWN_TYPES = JOB_TYPES | OPERATOR_TYPES | {EVERY_TYPE}


def _event_types(values: Collection[str]) -> None:
    for value in values:
        if value not in _KNOWN_TYPES and not is_application_type(value):
            known = ", ".join(sorted(_KNOWN_TYPES - {EVERY_TYPE}))
            raise ValidationError(
                f"Unknown event type {value[:100]!r}: expected one of {known}, an "
                "application's own type such as 'model.published', or '*' for every type."
            )
