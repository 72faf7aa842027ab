"""Schemas of the webhook fields that a request may carry, and field types shared with the API's inputs.

This module defines the meaning of these fields (:func:`load_webhook`). It knows neither where the values came
from nor how they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

from ..config import Settings
from ..errors import BlockedURLError, InvalidWebhookError
from ..protocol.events import JOB_TYPES
from ..protocol.headers import validate_headers, validate_secret
from ..protocol.urls import CheckedURL, UrlPolicy

NOT_ACCEPTABLE = "The webhook fields of the request are not acceptable."

#: Maximum attempts a request may ask for, whatever the settings allow.
MAX_RETRY_COUNT = 12

#: Limits of an error response: fields, characters of a field's name, reasons per field.
MAX_BAD_FIELDS, MAX_FIELD_NAME, MAX_REASONS = 40, 100, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookRequest:
    """The checked webhook fields of a request.

    :param url: normalised; see :class:`~flask_rq_webhooks.protocol.urls.CheckedURL`.
    :param host: the unit of fairness and limits.
    :param secret: exactly as sent.
    :param events: ``None`` if the request names none.
    :param format: name of a registered format.
    :param sign_payload: whether to sign with the server-wide secret if the request has no secret of its own.
    :param timeout_s: deadline of one attempt; ``None`` for the configured one.
    :param max_attempts: total number of attempts; ``None`` for the configured number.
    """

    url: str
    host: str
    format: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secret: str | None = field(default=None, repr=False)
    events: tuple[str, ...] | None = None
    sign_payload: bool = False
    reference: str | None = None
    timeout_s: float | None = None
    max_attempts: int | None = None


def load_webhook(
    values: Mapping[str, Any], *, settings: Settings, url_policy: UrlPolicy, formats: Collection[str]
) -> WebhookRequest:
    """Check the webhook fields of a request.

    :param values: raw values by field name, from JSON or a form; other names are ignored, and ``None`` counts
        as absent.
    :param formats: names of the registered payload formats.
    :raises InvalidWebhookError: with all reasons for all fields.
    """
    schema = webhook_schema(settings, url_policy, frozenset(formats))
    try:
        given = {name: value for name, value in values.items() if value is not None}
        # If all required fields are present, the schema need not look at each absent field.
        data = schema.load(given, partial="webhook_url" in given)
    except ValidationError as exc:
        # Without the cause: it contains the values, including the secret.
        raise InvalidWebhookError(NOT_ACCEPTABLE, details=flat_details(exc)) from None
    if data.get("sign_payload") and "webhook_secret" not in data and settings.signing_secret is None:
        why = "This server has no secret of its own to sign with; send webhook_secret."
        raise InvalidWebhookError(NOT_ACCEPTABLE, details={"sign_payload": [why]})
    checked: CheckedURL = data["webhook_url"]
    events = data.get("webhook_events")
    return WebhookRequest(
        url=checked.url, host=checked.host_key, format=data.get("webhook_format", settings.format),
        headers=data.get("webhook_headers", {}), secret=data.get("webhook_secret"),
        events=None if events is None else tuple(events), sign_payload=data.get("sign_payload", False),
        reference=data.get("webhook_reference"), timeout_s=data.get("webhook_timeout"),
        max_attempts=data.get("webhook_retry_count"),
    )  # fmt: skip


def flat_details(exc: ValidationError) -> dict[str, list[str]]:
    """Return the reasons of a failed load as field name → sentences, however deeply they are nested.

    Only the first ones are returned: a response must not be larger than the request that it refuses.
    """
    messages = exc.messages
    if isinstance(messages, list):
        messages = {"": messages}
    return {
        str(name)[:MAX_FIELD_NAME]: list(islice(_sentences(value), MAX_REASONS))
        for name, value in islice(messages.items(), MAX_BAD_FIELDS)
    }


def _sentences(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _sentences(item)
    elif isinstance(value, list):
        for item in value:
            yield from _sentences(item)
    else:
        yield str(value)


# Fields


class Text(fields.String):
    """Text that every database can hold: no NUL, no lone surrogate."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ValidationError("Expected text without NUL characters and lone surrogates.")
        return text


class WholeNumber(fields.Integer):
    """A whole number, also as text; 2.5 is refused, not truncated."""

    def _validated(self, value: Any) -> Any:
        if isinstance(value, float) and not value.is_integer():
            raise ValidationError("Not a whole number.")
        return super()._validated(value)


# The bases of these classes have no type parameters: in marshmallow 3 they cannot be subscripted.


class TextList(fields.List):  # type: ignore[type-arg]
    """A list of text; in forms a JSON array, or items separated by commas."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(fields.String(), **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[Any]:
        if isinstance(value, str):
            value = _from_json(value) if value.lstrip().startswith("[") else value.split(",")
            if isinstance(value, list):
                value = [item.strip() if isinstance(item, str) else item for item in value]
        items = super()._deserialize(value, attr, data, **kwargs)
        return list(dict.fromkeys(items))


class HeaderObject(fields.Field):  # type: ignore[type-arg]
    """Custom headers: an object, or the same as a JSON string."""

    def __init__(self, header_prefix: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._header_prefix = header_prefix

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, str]:
        if isinstance(value, str):
            value = _from_json(value)
        try:
            return validate_headers(value, header_prefix=self._header_prefix)
        except InvalidWebhookError as exc:
            raise ValidationError(exc.details["webhook_headers"]) from None


class SecretText(fields.Field):  # type: ignore[type-arg]
    """A signing secret, never trimmed."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        try:
            return validate_secret(value)
        except InvalidWebhookError as exc:
            raise ValidationError(exc.details["webhook_secret"]) from None


class TargetURL(fields.Field):  # type: ignore[type-arg]
    """A URL that the policy allows as a destination, as far as can be told without asking DNS."""

    def __init__(self, policy: UrlPolicy, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Clients send the same URL again and again, and the result depends on nothing else.
        self._check_url = lru_cache(maxsize=256)(policy.check_url)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> CheckedURL:
        if not isinstance(value, str):
            raise ValidationError("Not a valid string.")
        try:
            return self._check_url(value)
        except BlockedURLError as exc:
            raise ValidationError(str(exc)) from None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValidationError("Not valid JSON.") from None


# Schemas


@lru_cache(maxsize=32)
def webhook_schema(settings: Settings, url_policy: UrlPolicy, formats: frozenset[str]) -> Schema:
    """Return the schema of a request's webhook fields; anything else in the request is ignored."""
    most = min(MAX_RETRY_COUNT, settings.max_attempts)
    schema = Schema.from_dict(
        {
            "webhook_url": TargetURL(url_policy, required=True),
            "webhook_secret": SecretText(),
            "webhook_headers": HeaderObject(settings.header_prefix),
            "sign_payload": fields.Boolean(),
            "webhook_events": TextList(
                validate=[
                    validate.Length(min=1, max=50, error="Expected at least one event type."),
                    _each(one_of(JOB_TYPES, "event type")),
                ]
            ),
            "webhook_format": Text(validate=one_of(formats, "format")),
            "webhook_reference": Text(validate=validate.Length(max=256)),
            "webhook_timeout": fields.Float(validate=timeout_range(settings)),
            "webhook_retry_count": WholeNumber(
                validate=validate.Range(
                    min=1, max=most, error=f"Expected the number of all attempts, from 1 to {most}."
                )
            ),
        },
        name="WebhookFields",
    )
    return schema(unknown=EXCLUDE)


def timeout_range(settings: Settings) -> validate.Range:
    """Return the validator for the deadline of one attempt; the configured deadline is the maximum."""
    return validate.Range(
        min=0,
        min_inclusive=False,
        max=settings.timeout,
        error=f"Expected seconds, more than 0 and at most {settings.timeout:g}.",
    )


def one_of(known: Collection[str], what: str) -> Callable[[str], None]:
    """Return the validator for a name that must be in *known*; its message lists them."""

    def check(value: str) -> None:
        if value not in known:
            raise ValidationError(f"Unknown {what} {value[:100]!r}; known: {', '.join(sorted(known))}.")

    return check


def _each(check: Callable[[str], None]) -> Callable[[list[str]], None]:
    def check_all(values: list[str]) -> None:
        for value in values:
            check(value)

    return check_all
