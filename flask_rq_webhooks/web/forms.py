"""HTML forms: convert form fields to the API's shape, and back into links.

The API's schemas decide what is acceptable. Of storage, only the filter that is filled is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from werkzeug.datastructures import MultiDict

from ..protocol.events import JOB_TYPES, OPERATOR_TYPES
from ..state import State
from ..storage.filters import DeliveryFilter
from .api_schemas import FilterInput
from .operations import InvalidInputError, checked, delivery_filter, endpoint_schema

#: Fields of the filter that hold one line of text, in the order of the page.
TEXTS = ("event", "host", "job_id", "runid", "endpoint_id", "event_id", "tenant")
TIMES = ("since", "until")

#: Fields of the endpoint's form that hold one line of text.
_ENDPOINT_TEXTS = (
    "url", "description", "reference", "timeout_s", "max_attempts", "retry_schedule", "retry_statuses",
)  # fmt: skip


# -- the filter above the list of deliveries --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FilterForm:
    """One filter as it was sent.

    :param fields: the values that links and hidden fields pass on; only those that were given.
    :param errors: field → what is wrong with it; such a field does not filter.
    """

    where: DeliveryFilter
    fields: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Return whether every delivery matches."""
        return not self.fields

    @property
    def statuses(self) -> Sequence[str]:
        """Return the chosen statuses; none chosen means all."""
        return self.where.statuses or ()

    def pairs(self) -> list[tuple[str, str]]:
        """Return name and value of each hidden field."""
        return [
            (name, item)
            for name, value in self.fields.items()
            for item in (value if isinstance(value, list) else [value])
        ]


def read_filter(sent: MultiDict[str, str], tenant: str | None) -> FilterForm:
    """Return the filter that a query string or a form describes; unknown fields are ignored.

    :param tenant: the tenant the caller is restricted to; ``None`` for no restriction.
    :raises UnknownItemError: for any other tenant than that.
    """
    fields: dict[str, Any] = {}
    statuses = [status for status in dict.fromkeys(sent.getlist("status")) if status]
    if statuses:
        fields["status"] = statuses
    for name in (*TEXTS, *TIMES):
        text = sent.get(name, "").strip()
        if text:
            fields[name] = text
    errors: dict[str, str] = {}
    try:
        where = _where(fields, tenant)
    except InvalidInputError as exc:
        errors = {name: " ".join(why) for name, why in exc.details.items()}
        fields = {name: value for name, value in fields.items() if name not in errors}
        where = _where(fields, tenant)
    return FilterForm(where, fields, errors)


def _where(fields: Mapping[str, Any], tenant: str | None) -> DeliveryFilter:
    raw = {name: _in_utc(value) if name in TIMES else value for name, value in fields.items()}
    return delivery_filter(checked(FilterInput(), raw), tenant)


def _in_utc(text: str) -> str:
    """Return a time from the form with its offset; it is UTC unless it says otherwise."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{found.isoformat()}+00:00" if found.tzinfo is None else found.isoformat()


# -- the form of an endpoint ------------------------------------------------------------------------------


def endpoint_values(
    state: State, form: MultiDict[str, str], *, creating: bool, tenant: str | None
) -> dict[str, Any]:
    """Return what a form says about an endpoint, checked.

    :param creating: whether the endpoint is new; if not, blank URL and headers stay as they are.
    :raises InvalidInputError: with every reason.
    """
    raw: dict[str, Any] = {}
    for name in _ENDPOINT_TEXTS if tenant is not None else (*_ENDPOINT_TEXTS, "only_tenant"):
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
        if tenant is None:
            raw["scope"] = form.get("scope") or "job"
        if "unsigned" in form:
            raw["secret"] = None
        elif form.get("secret"):
            raw["secret"] = form["secret"]
    errors: dict[str, list[str]] = {}
    lines = form.get("headers", "").strip()
    if lines:
        try:
            raw["headers"] = header_pairs(lines.splitlines())
        except ValueError as exc:
            errors["headers"] = [str(exc)]
    elif "no_headers" in form:
        raw["headers"] = {}
    try:
        values = checked(endpoint_schema(state, tenant), raw, partial=not creating)
    except InvalidInputError as exc:
        raise InvalidInputError({**exc.details, **errors}) from None
    if errors:
        raise InvalidInputError(errors)
    return values


def _events(form: MultiDict[str, str]) -> list[str] | None:
    """Return the chosen types: boxes for ours, a line for the application's; ``None`` for the default."""
    chosen = [name for name in form.getlist("events") if name in JOB_TYPES | OPERATOR_TYPES or name == "*"]
    chosen += [name for name in re.split(r"[,\s]+", form.get("other_events", "")) if name]
    return list(dict.fromkeys(chosen)) or None


def header_pairs(lines: Iterable[str]) -> dict[str, str]:
    """Return headers, each written as ``Name: value``.

    :raises ValueError: saying what is wrong, without a value, which may be a secret.
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
