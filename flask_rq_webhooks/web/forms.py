"""The filter above the list of deliveries: from form fields to a filter, and back into links.

Knows nothing of storage beyond the filter it fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from werkzeug.datastructures import MultiDict

from ..storage.filters import DeliveryFilter
from .api_schemas import STATUSES

#: Form field → attribute of the filter; also the order on the page.
TEXTS = {
    "event": "event_type",
    "host": "host",
    "job_id": "job_id",
    "runid": "runid",
    "endpoint_id": "endpoint_id",
    "event_id": "event_id",
}
TIMES = ("since", "until")

_MAX_TEXT = 512


@dataclass(frozen=True, slots=True)
class FilterForm:
    """One filter as it was sent.

    :param fields: what links and hidden fields carry on; only what was given.
    :param errors: field → what is wrong with it; such a field does not filter.
    """

    where: DeliveryFilter
    fields: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Say whether every delivery matches."""
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


def read_filter(sent: MultiDict[str, str]) -> FilterForm:
    """Return the filter that a query string or a form describes; unknown fields are passed over."""
    values: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    errors: dict[str, str] = {}
    statuses = [status for status in dict.fromkeys(sent.getlist("status")) if status]
    unknown = [status for status in statuses if status not in STATUSES]
    if unknown:
        errors["status"] = f"There is no status {unknown[0][:40]!r}."
    elif statuses:
        values["statuses"] = tuple(statuses)
        fields["status"] = statuses
    for name, attribute in TEXTS.items():
        text = sent.get(name, "").strip()
        if "\0" in text or len(text) > _MAX_TEXT:
            errors[name] = f"Expected at most {_MAX_TEXT} characters, without NUL."
        elif text:
            values[attribute] = fields[name] = text
    for name in TIMES:
        text = sent.get(name, "").strip()
        if not text:
            continue
        try:
            found = datetime.fromisoformat(text)
            values[name] = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        except (ValueError, OverflowError):
            errors[name] = "Expected a time such as 2025-01-31T14:30."
        else:
            fields[name] = text
    return FilterForm(DeliveryFilter(**values), fields, errors)
