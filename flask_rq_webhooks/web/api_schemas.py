"""The shapes of the API's inputs and answers, as marshmallow schemas.

What an answer may contain is decided here and nowhere else: URLs are redacted, headers that were sent are
masked, secrets have no field. What begins with ``Status`` is for clients and therefore coarse;
the rest is for callers with the permission ``read``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from ..accept.request_schema import (
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
from ..protocol.events import JOB_TYPES, is_application_type
from ..protocol.urls import UrlPolicy, redact_url
from ..storage.models import CANCELED, EXHAUSTED, PENDING, SENDING, SUCCEEDED
from ..storage.subscriptions import EVERY_TYPE

STATUSES = (PENDING, SENDING, SUCCEEDED, EXHAUSTED, CANCELED)

#: Why an attempt failed, for clients: whether a name exists or an address is private is not their business.
_COARSE = {"blocked": "unreachable", "dns": "unreachable", "connect": "unreachable"}


class RedactedURL(fields.String):
    """A URL without its query and whatever in its path looks secret."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else redact_url(value)


class BodyText(fields.Field):  # type: ignore[type-arg]
    """Bytes that somebody else wrote, as text."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else bytes(value).decode("utf-8", "replace")


class CoarseCode(fields.String):
    """An error code as far as clients may know it."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else _COARSE.get(value, value)


# Answers


class StatusAttemptSchema(Schema):
    """An attempt, as the client who asked for the webhook may see it."""

    number = fields.Integer()
    status = fields.String()
    status_code = fields.Integer(allow_none=True)
    error_code = CoarseCode(allow_none=True)
    started_at = fields.DateTime()
    duration_ms = fields.Float()


class StatusDeliverySchema(Schema):
    """A delivery, as the client who asked for the webhook may see it."""

    id = fields.String()
    event_id = fields.String()
    event = fields.String(attribute="event_type")
    url = RedactedURL()
    status = fields.String()
    max_attempts = fields.Integer()
    next_attempt_at = fields.DateTime(allow_none=True)
    status_code = fields.Integer(allow_none=True)
    error_code = CoarseCode(allow_none=True)
    created_at = fields.DateTime()
    finished_at = fields.DateTime(allow_none=True)


class EventSchema(Schema):
    """An event without its payload."""

    id = fields.String()
    type = fields.String()
    job_id = fields.String(allow_none=True)
    runid = fields.String(allow_none=True)
    source = fields.String()
    supersedes = fields.String(allow_none=True)
    occurred_at = fields.DateTime()
    created_at = fields.DateTime()


class DeliverySchema(Schema):
    """A delivery in a list."""

    id = fields.String()
    event_id = fields.String()
    event = fields.String(attribute="event_type")
    job_id = fields.String(allow_none=True)
    runid = fields.String(allow_none=True)
    endpoint_id = fields.String()
    endpoint_kind = fields.String()
    url = RedactedURL()
    host = fields.String()
    status = fields.String()
    trigger = fields.String()
    attempts = fields.Integer()
    max_attempts = fields.Integer()
    next_attempt_at = fields.DateTime(allow_none=True)
    status_code = fields.Integer(allow_none=True)
    error_code = fields.String(allow_none=True)
    created_at = fields.DateTime()
    finished_at = fields.DateTime(allow_none=True)


class AttemptSchema(Schema):
    """An attempt with everything that is kept of it."""

    id = fields.String()
    number = fields.Integer()
    trigger = fields.String()
    status = fields.String()
    status_code = fields.Integer(allow_none=True)
    error_code = fields.String(allow_none=True)
    error_detail = fields.String(allow_none=True)
    started_at = fields.DateTime()
    duration_ms = fields.Float()
    request_headers = fields.Dict(keys=fields.String(), values=fields.String())
    response_headers = fields.Dict(keys=fields.String(), values=fields.String())
    response_body = BodyText()
    dispatcher_id = fields.String(allow_none=True)


class EndpointSchema(Schema):
    """An endpoint. Of its secrets, how many are live. Headers are opened and masked by whoever shows it."""

    id = fields.String()
    kind = fields.String()
    url = RedactedURL()
    host = fields.String()
    events = fields.List(fields.String(), allow_none=True)
    scope = fields.String()
    format = fields.String()
    sign_payload = fields.Boolean()
    reference = fields.String(allow_none=True)
    runid = fields.String(allow_none=True)
    timeout_s = fields.Float(allow_none=True)
    max_attempts = fields.Integer(allow_none=True)
    description = fields.String(allow_none=True)
    enabled = fields.Boolean()
    disabled_at = fields.DateTime(allow_none=True)
    disabled_reason = fields.String(allow_none=True)
    failures = fields.Integer()
    failing_since = fields.DateTime(allow_none=True)
    created_at = fields.DateTime()
    updated_at = fields.DateTime()
    secrets = fields.Integer()


class HourSchema(Schema):
    """What ended within one hour."""

    start = fields.DateTime()
    succeeded = fields.Integer()
    exhausted = fields.Integer()
    canceled = fields.Integer()


class HostSchema(Schema):
    """Recent attempts to one host."""

    host = fields.String()
    attempts = fields.Integer()
    failed = fields.Integer()


class StatisticsSchema(Schema):
    """The numbers of the overview; see :class:`~flask_rq_webhooks.storage.statistics.Statistics`."""

    counts = fields.Dict(keys=fields.String(), values=fields.Integer())
    oldest_due_s = fields.Float(allow_none=True)
    hours = fields.List(fields.Nested(HourSchema))
    hours_complete = fields.Boolean()
    success_rate = fields.Float(allow_none=True)
    p50_ms = fields.Float(allow_none=True)
    p95_ms = fields.Float(allow_none=True)
    worst_hosts = fields.List(fields.Nested(HostSchema))
    watches = fields.Dict(keys=fields.String(), values=fields.Integer())
    oldest_watch = fields.DateTime(allow_none=True)
    endpoints_disabled = fields.Integer()
    dispatchers = fields.Integer()
    paused_since = fields.DateTime(allow_none=True)


# Inputs


class _Input(Schema):
    class Meta:
        unknown = RAISE


class NoInput(_Input):
    """Nothing: the route says it all."""


class PageInput(_Input):
    """Which page of a list."""

    cursor = fields.String()
    limit = WholeNumber(validate=validate.Range(min=1))


class FilterInput(_Input):
    """Which deliveries; in a query string ``status`` is a list with commas."""

    since = fields.AwareDateTime()
    until = fields.AwareDateTime()
    endpoint_id = Text()
    status = TextList(validate=[validate.Length(min=1), validate.ContainsOnly(STATUSES)])
    host = Text()
    event = Text()
    event_id = Text()
    job_id = Text()
    runid = Text()


class DeliveriesInput(PageInput, FilterInput):
    """Which page of which deliveries."""


class ManyInput(FilterInput):
    """Which deliveries to change. All of them only where that is said.

    ``cursor`` goes on where the answer to the same request, without it, stopped.
    """

    all = fields.Boolean()
    cursor = fields.String()

    @validates_schema
    def _check(self, data: Mapping[str, Any], **_kwargs: Any) -> None:
        if not data.get("all") and data.keys() <= {"all", "cursor"}:
            raise ValidationError('Name at least one condition, or send "all": true.', "all")


class FeedInput(_Input):
    """Which part of the feed of events."""

    after = fields.String()
    runid = Text()
    type = Text()
    limit = WholeNumber(validate=validate.Range(min=1))


class EndpointsInput(PageInput):
    """Which page of which endpoints."""

    kind = fields.String(validate=validate.OneOf(("standing", "job")))


class StatsInput(_Input):
    """How far back the numbers go."""

    hours = WholeNumber(validate=validate.Range(min=1, max=24 * 30))


class RotateInput(_Input):
    """The new secret, made here unless given, and how long the old one goes on signing."""

    secret = SecretText()
    grace_s = fields.Float(validate=validate.Range(min=0, max=30 * 86400))


@lru_cache(maxsize=32)
def endpoint_input(settings: Settings, url_policy: UrlPolicy, formats: frozenset[str]) -> Schema:
    """Return the schema of a standing endpoint, as it is created."""
    schema = _Input.from_dict(
        {
            "url": TargetURL(url_policy, required=True),
            "secret": SecretText(allow_none=True),
            "headers": HeaderObject(settings.header_prefix),
            "events": TextList(allow_none=True, validate=[validate.Length(min=1, max=100), _event_types]),
            "scope": fields.String(validate=validate.OneOf(("job", "tree"))),
            "format": Text(validate=one_of(formats, "format")),
            "sign_payload": fields.Boolean(validate=_signable(settings)),
            "description": Text(allow_none=True, validate=validate.Length(max=1000)),
            "reference": Text(allow_none=True, validate=validate.Length(max=256)),
            "runid": Text(allow_none=True, validate=validate.Length(max=1000)),
            "timeout_s": fields.Float(allow_none=True, validate=timeout_range(settings)),
            "max_attempts": WholeNumber(
                allow_none=True, validate=validate.Range(min=1, max=settings.max_attempts)
            ),
        },
        name="EndpointInput",
    )
    return schema()


def _signable(settings: Settings) -> Callable[[bool], None]:
    def check(wanted: bool) -> None:
        if wanted and settings.signing_secret is None:
            raise ValidationError("This server has no secret of its own to sign with.")

    return check


def _event_types(values: Collection[str]) -> None:
    for value in values:
        if value not in JOB_TYPES and value != EVERY_TYPE and not is_application_type(value):
            raise ValidationError(
                f"Unknown event type {value[:100]!r}: expected one of {', '.join(sorted(JOB_TYPES))}, an "
                "application's own type such as 'model.published', or '*' for every type."
            )
