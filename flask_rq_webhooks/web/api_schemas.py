"""The shapes of the API's answers, as marshmallow schemas.

Decides what an answer may contain: URLs are redacted, headers that were sent are masked, secrets have no
field. Names that begin with ``Status`` are for clients and therefore coarse; the rest is for callers with the
permission ``read``. Every field of an answer is always there, but those a schema lists in ``sometimes``.
"""

from __future__ import annotations

from typing import Any

from marshmallow import Schema, fields

from ..protocol.urls import redact_url

#: Error codes as clients see them: not whether a name exists or an address is private.
_COARSE = {"blocked": "unreachable", "dns": "unreachable", "connect": "unreachable"}


class RedactedURL(fields.String):
    """A URL without its query and the parts of its path that look secret."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else redact_url(value)


class BodyText(fields.Field):  # type: ignore[type-arg]
    """Bytes of a request or response body, as text."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else bytes(value).decode("utf-8", "replace")


class CoarseCode(fields.String):
    """An error code as far as clients may know it."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else _COARSE.get(value, value)


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
    erased_at = fields.DateTime(allow_none=True)


class EventWithPayloadSchema(EventSchema):
    """An event with its payload, as the payload format ``job`` renders it; ``null`` once it is erased."""

    payload = fields.Dict(keys=fields.String(), allow_none=True)


class FeedSchema(Schema):
    """A part of the feed of events; the next request continues at its cursor."""

    items = fields.List(fields.Nested(EventWithPayloadSchema))
    cursor = fields.String(allow_none=True)


class StatusDeliveryWithAttemptsSchema(StatusDeliverySchema):
    """A delivery with its attempts, for the client who asked for the webhook."""

    attempts = fields.List(fields.Nested(StatusAttemptSchema))


class StatusSchema(Schema):
    """The state of a job's webhook; only the first two fields where none is known."""

    sometimes = frozenset({"url", "delivery_status", "job_status", "events", "deliveries"})

    job_id = fields.String()
    webhook_configured = fields.Boolean()
    url = RedactedURL()
    delivery_status = fields.String()
    job_status = fields.String(allow_none=True)
    events = fields.List(fields.Nested(EventSchema))
    deliveries = fields.List(fields.Nested(StatusDeliveryWithAttemptsSchema))


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
    erased_at = fields.DateTime(allow_none=True)


class AttemptSchema(Schema):
    """An attempt with everything that is stored."""

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
    """An endpoint; header values are masked, and all of it null where no key opens them.

    ``secrets`` is the number of secrets that sign now.
    """

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
    headers = fields.Dict(keys=fields.String(), values=fields.String(), allow_none=True)


class NewEndpointSchema(EndpointSchema):
    """A new endpoint. Its secret is in this answer and in no other; absent in an answer that is repeated."""

    sometimes = frozenset({"secret"})

    secret = fields.String(allow_none=True)


class HourSchema(Schema):
    """The deliveries that finished within one hour."""

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


class DeliveryDetailSchema(Schema):
    """One delivery with its attempts, event, endpoint and body."""

    delivery = fields.Nested(DeliverySchema)
    attempts = fields.List(fields.Nested(AttemptSchema))
    event = fields.Nested(EventSchema)
    endpoint = fields.Nested(EndpointSchema)
    body = BodyText()


class DeliveriesSchema(Schema):
    """A page of deliveries."""

    items = fields.List(fields.Nested(DeliverySchema))
    cursor = fields.String(allow_none=True)


class EndpointsSchema(Schema):
    """A page of endpoints."""

    items = fields.List(fields.Nested(EndpointSchema))
    cursor = fields.String(allow_none=True)


class ResentSchema(Schema):
    """A delivery that is due now, or being sent."""

    id = fields.String()
    status = fields.String()


class _LeftSchema(Schema):
    """What a change of many deliveries leaves for the next request.

    ``cursor`` is sent with it, and null when everything is done. ``remaining`` is counted up to 10,001, and
    null where it is not known, because the deliveries are still to be made.
    """

    remaining = fields.Integer(allow_none=True)
    cursor = fields.String(allow_none=True)


class RecoveredSchema(_LeftSchema):
    """How many deliveries are due now."""

    recovered = fields.Integer(attribute="done")


class CanceledSchema(_LeftSchema):
    """How many deliveries were canceled."""

    canceled = fields.Integer(attribute="done")


class PausedSchema(Schema):
    """Whether all sending is paused."""

    paused = fields.Boolean()


class RotatedSchema(Schema):
    """The new secret, in this answer and in no other."""

    id = fields.String()
    secret = fields.String()
    grace_s = fields.Float()


class PingedSchema(Schema):
    """The event of the test message."""

    event_id = fields.String()
    deliveries = fields.Integer()


class HealthSchema(Schema):
    """Whether a dispatcher is alive."""

    ok = fields.Boolean()


class CSRFSchema(Schema):
    """The token that callers known by cookie send with every change, as ``X-CSRFToken``."""

    csrf_token = fields.String()


class _ReasonsSchema(Schema):
    """Why a request was refused."""

    code = fields.String()
    message = fields.String()
    details = fields.Dict(keys=fields.String())


class ErrorSchema(Schema):
    """The body of every refusal."""

    error = fields.Nested(_ReasonsSchema)


class ErasedSchema(Schema):
    """What was erased, and what is left: send the request again until ``in_flight`` and ``running`` are 0."""

    events = fields.Integer()
    canceled = fields.Integer()
    in_flight = fields.Integer()
    running = fields.Integer()


class PublicKeySchema(Schema):
    """A public key of this server; of several, the one that signs now is marked."""

    key = fields.String()
    algorithm = fields.String()
    signs = fields.Boolean()


class KeysSchema(Schema):
    """The public keys of this server."""

    keys = fields.List(fields.Nested(PublicKeySchema))
