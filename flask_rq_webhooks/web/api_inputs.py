"""The shapes of the API's inputs, as marshmallow schemas: the bounds of what operators ask for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

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
from ..protocol.urls import UrlPolicy
from ..storage.models import CANCELED, EXHAUSTED, MAX_TENANT, PENDING, SENDING, SUCCEEDED

STATUSES = (PENDING, SENDING, SUCCEEDED, EXHAUSTED, CANCELED)

#: Characters of a text that a filter compares with; no stored one is longer.
MAX_FILTER_TEXT = 512
#: Seconds for which a rotated secret may sign beside its successor.
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
    """Which deliveries; in a query string ``status`` is a list with commas."""

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
    """Which deliveries to change. All of them only with ``all``.

    ``cursor`` continues where the answer to the request before stopped.
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

    after = fields.String()
    runid = Text()
    type = Text()
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
    """The new secret, generated if omitted, and how long the old one signs beside it."""

    secret = SecretText()
    grace_s = fields.Float(
        validate=validate.Range(
            min=0, max=MAX_GRACE_S, error="The old secret can sign for 0 s to 30 days (720 hours, 2592000 s)."
        )
    )


@lru_cache(maxsize=32)
def endpoint_input(
    settings: Settings, url_policy: UrlPolicy, formats: frozenset[str], *, own: bool = False
) -> Schema:
    """Return the schema of a standing endpoint, as it is created.

    :param own: without what only operators choose: a request has no field for it either.
    """
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
            "sign_payload": fields.Boolean(validate=_signable(settings)),
            "description": Text(allow_none=True, validate=validate.Length(max=1000)),
            "reference": Text(allow_none=True, validate=validate.Length(max=256)),
            "timeout_s": fields.Float(allow_none=True, validate=timeout_range(settings)),
            "max_attempts": WholeNumber(
                allow_none=True,
                validate=validate.Range(
                    min=1, max=min(MAX_RETRY_COUNT, settings.max_attempts) if own else settings.max_attempts
                ),
            ),
        },
        name="EndpointInput",
    )
    return schema()


def _signable(settings: Settings) -> Callable[[bool], None]:
    def check(wanted: bool) -> None:
        if wanted and settings.signing_secret is None:
            raise ValidationError("This server has no server-wide secret to sign with.")

    return check


_KNOWN_TYPES = JOB_TYPES | OPERATOR_TYPES | {EVERY_TYPE}


def _event_types(values: Collection[str]) -> None:
    for value in values:
        if value not in _KNOWN_TYPES and not is_application_type(value):
            known = ", ".join(sorted(_KNOWN_TYPES - {EVERY_TYPE}))
            raise ValidationError(
                f"Unknown event type {value[:100]!r}: expected one of {known}, an "
                "application's own type such as 'model.published', or '*' for every type."
            )
