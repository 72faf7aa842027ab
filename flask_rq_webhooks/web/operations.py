"""Standing endpoints as people handle them: from input to what storage takes, own headers, the test ping.

Knows nothing of how answers look.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from marshmallow import ValidationError
from werkzeug.datastructures import MultiDict

from ..accept.request_schema import flat_details
from ..errors import DecryptionError
from ..observe.host_hooks import safe_render
from ..protocol.events import JOB_TYPES, SOURCE_APPLICATION, WEBHOOK_PING, Occurrence
from ..state import State
from ..storage.events import IngestedEvent, IngestItem, ingest
from ..storage.queries import EndpointView
from .api_schemas import endpoint_input

#: Fields of the form that hold one line of text.
TEXT_FIELDS = ("url", "description", "reference", "runid", "timeout_s", "max_attempts")


class EndpointFormError(Exception):
    """The form is not acceptable.

    :param errors: field → reasons.
    """

    def __init__(self, errors: Mapping[str, list[str]]) -> None:
        super().__init__("The form is not acceptable.")
        self.errors = dict(errors)


def endpoint_values(state: State, form: MultiDict[str, str], *, creating: bool) -> dict[str, Any]:
    """Return what a form says of an endpoint, as storage takes it.

    :param creating: a new endpoint; otherwise a blank URL, and blank headers, stay what they are.
    :raises EndpointFormError: with every reason.
    """
    raw: dict[str, Any] = {}
    for name in TEXT_FIELDS:
        text = form.get(name, "").strip()
        if text:
            raw[name] = text
        elif not creating and name != "url":
            raw[name] = None
    raw["events"] = _events(form)
    raw["sign_payload"] = "sign_payload" in form
    if form.get("format"):
        raw["format"] = form["format"]
    if creating:
        raw["scope"] = form.get("scope") or "job"
    errors: dict[str, list[str]] = {}
    lines = form.get("headers", "").strip()
    if lines:
        try:
            raw["headers"] = header_pairs(lines.splitlines())
        except ValueError as exc:
            errors["headers"] = [str(exc)]
    elif "no_headers" in form:
        raw["headers"] = {}
    secret = form.get("secret", "")
    if creating and secret:
        raw["secret"] = secret
    try:
        values = checked_values(state, raw, creating=creating)
    except EndpointFormError as exc:
        raise EndpointFormError({**exc.errors, **errors}) from None
    if errors:
        raise EndpointFormError(errors)
    return values


def checked_values(state: State, raw: Mapping[str, Any], *, creating: bool) -> dict[str, Any]:
    """Return what somebody wants of an endpoint, checked by the API's schema, as storage takes it.

    :param raw: as the API takes it.
    :param creating: a new endpoint; otherwise only what *raw* holds.
    :raises EndpointFormError: with every reason.
    """
    schema = endpoint_input(state.settings, state.url_policy, frozenset(state.formats))
    try:
        values: dict[str, Any] = schema.load(raw, partial=not creating)
    except ValidationError as exc:
        # Without the cause: it holds the values, the secret among them.
        raise EndpointFormError(flat_details(exc)) from None
    return stored_values(state, values, creating=creating)


def stored_values(state: State, values: Mapping[str, Any], *, creating: bool) -> dict[str, Any]:
    """Return what the schema accepted, as storage takes it.

    :param creating: a new endpoint, which gets the configured format where none is named.
    """
    found = dict(values)
    if "url" in found:
        checked = found["url"]
        found["url"], found["host"] = checked.url, checked.host_key
    if found.get("events") is not None:
        found["events"] = tuple(found["events"])
    if creating:
        found.setdefault("format", state.settings.format)
    return found


def own_headers(state: State, endpoint: EndpointView) -> dict[str, str] | None:
    """Return an endpoint's own headers, unmasked; ``None`` where no key opens them."""
    if endpoint.headers is None:
        return {}
    try:
        found: dict[str, str] = json.loads(state.cipher.decrypt(endpoint.headers))
    except DecryptionError:
        return None
    return found


def header_names(state: State, endpoint: EndpointView) -> list[str] | None:
    """Return the names of an endpoint's own headers; ``None`` where no key opens them."""
    headers = own_headers(state, endpoint)
    return None if headers is None else list(headers)


def header_pairs(lines: Iterable[str]) -> dict[str, str]:
    """Return the headers that somebody wrote, each as ``Name: value``.

    :raises ValueError: saying which is none, or comes twice; without its value, which may be a secret.
    """
    found: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not line.strip():
            continue
        if not colon:
            raise ValueError("One of them is not a header; write each as Name: value.")
        if name.strip() in found:
            raise ValueError(f"{name.strip()[:80]!r} is given more than once.")
        found[name.strip()] = value.strip()
    return found


def ping(state: State, endpoint_id: str) -> IngestedEvent:
    """Send a ``webhook.ping`` to an endpoint, through the pipeline like everything else.

    So it is seen where operators look, and takes the way that events take.
    """
    occurrence = Occurrence(type=WEBHOOK_PING, occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION)
    (event,) = ingest(
        state.database,
        [IngestItem(occurrence, endpoint_ids=(endpoint_id,))],
        render=safe_render(state),
        max_attempts=1,
    )
    return event


def _events(form: MultiDict[str, str]) -> list[str] | None:
    """Return the chosen types: boxes for ours, a line for the application's own; none: all terminal ones."""
    chosen = [name for name in form.getlist("events") if name in JOB_TYPES or name == "*"]
    chosen += [name for name in re.split(r"[,\s]+", form.get("other_events", "")) if name]
    return list(dict.fromkeys(chosen)) or None
