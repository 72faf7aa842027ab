"""Turn an occurrence into the bytes that are stored, signed and sent.

Defines the wire contracts (``job``, ``task``, ``standard``, ``cloudevents``), how payloads are made to fit
``MAX_PAYLOAD_BYTES``, and the canonical JSON kept of every event. Does not know about endpoints, headers or
signatures.

A body is serialised once, ASCII and compact; the stored bytes are sent unchanged on every attempt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from .events import (
    JOB_BLOCKED,
    JOB_CANCELED,
    JOB_FAILURE,
    JOB_LOST,
    JOB_PROGRESS,
    JOB_RETRYING,
    JOB_STALLED,
    JOB_STARTED,
    JOB_STOPPED,
    JOB_SUCCESS,
    JOB_TYPES,
    Occurrence,
    format_time,
    parse_time,
)
from .json_safe import to_json_safe


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderContext:
    """What a payload contains besides the occurrence, and how much of it.

    :param event_id: the event's id, also its ``webhook-id``.
    :param runid: the endpoint's own run id, which takes precedence over the occurrence's; or ``None``.
    :param reference: what the client sent as ``webhook_reference``.
    :param traceback: ``"full"``, ``"last"`` (the innermost frame and the exception) or ``"none"``.
    :param include_result: whether a result is sent; ``False`` sends ``null`` in its place.
    :param max_bytes: larger payloads are cut, see :func:`fit`.
    """

    event_id: str
    runid: str | None
    reference: str | None
    traceback: str
    include_result: bool
    max_bytes: int


JSON = "application/json"


class Rendered(NamedTuple):
    """The body of a delivery and its media type: stored, signed and sent unchanged."""

    body: bytes
    content_type: str = JSON


#: Plain bytes mean a JSON body.
PayloadFormat = Callable[[Occurrence, RenderContext], bytes | Rendered]

#: RFC 9110, "Media Type", printable and on one line.
_MEDIA_TYPE = re.compile(
    r"[\w!#$&^.+-]+/[\w!#$&^.+-]+(?:; ?[\w!#$&^.+-]+=(?:[\w!#$&^.+-]+|\"[ !#-\[\]-~]*\"))*", re.ASCII
)
MAX_CONTENT_TYPE_CHARS = 128

#: ``task`` format: event type → (event_type, status). The statuses are Celery's states.
_TASK_WORDS = MappingProxyType(
    {
        JOB_SUCCESS: ("task.completed", "SUCCESS"),
        JOB_FAILURE: ("task.failed", "FAILURE"),
        JOB_LOST: ("task.failed", "FAILURE"),
        JOB_STOPPED: ("task.cancelled", "REVOKED"),
        JOB_CANCELED: ("task.cancelled", "REVOKED"),
        JOB_RETRYING: ("task.retrying", "RETRY"),
        JOB_BLOCKED: ("task.blocked", "PENDING"),
        JOB_STARTED: ("task.started", "STARTED"),
        JOB_PROGRESS: ("task.progress", "STARTED"),
        JOB_STALLED: ("task.stalled", "STARTED"),
    }
)

#: Messages used if RQ has left none of its own.
_MESSAGES = MappingProxyType(
    {
        JOB_FAILURE: "The job failed; RQ has kept no error.",
        JOB_LOST: "The job is gone from Redis without a recorded ending; its outcome is unknown.",
        JOB_STOPPED: "The job was stopped.",
        JOB_CANCELED: "The job was canceled.",
        JOB_RETRYING: "The job failed and will be tried again.",
        JOB_BLOCKED: "The job waits for a job that did not succeed.",
        JOB_STALLED: "The worker of the job gives no sign of life.",
    }
)

_CUT = "[cut]\n"


def job_payload(occurrence: Occurrence, context: RenderContext) -> dict[str, Any]:
    """Return the ``job`` payload, with its keys in the order of the contract, small enough for *context*.

    ``event``, ``job_id``, ``runid``, ``timestamp`` (unix seconds); ``result`` for a success, ``error`` for a
    failure and wherever else one is known, ``data`` for application events; then ``id``, ``func``,
    ``queue``, ``enqueued_at``, ``started_at``, ``ended_at``, ``source``, ``reference``, for a correction
    ``supersedes``, for a tree ``scope`` and ``jobs``. Application events and pings lack the keys that concern
    only jobs, but always have ``job_id``.
    """
    return fit(_job, occurrence, context)[0]


def render_job(occurrence: Occurrence, context: RenderContext) -> bytes:
    """Return the body of ``format="job"``, see :func:`job_payload`."""
    return fit(_job, occurrence, context)[1]


def render_task(occurrence: Occurrence, context: RenderContext) -> bytes:
    """Return the body of ``format="task"``: sorted keys, compact, ASCII.

    ``event_type``, ``timestamp`` (ISO 8601, UTC), ``task`` with ``id``, ``name`` (last component of the
    function) and ``status``; then ``result`` for a success, otherwise ``error``, a message. A stopped or
    canceled job is ``task.cancelled``, a lost one ``task.failed`` with a message that says that the outcome
    is unknown; ``task.retrying`` (``RETRY``), ``task.blocked`` (``PENDING``), ``task.started``,
    ``task.progress`` and ``task.stalled`` (``STARTED``) are sent only to those who subscribe to them.
    Application events and pings have ``event_type``, ``timestamp`` and ``data``. ``reference``,
    ``supersedes`` and ``progress`` are added if they have a value.
    """
    return fit(_task, occurrence, context, sort_keys=True)[1]


def render_standard(occurrence: Occurrence, context: RenderContext) -> bytes:
    """Return the body of ``format="standard"``: ``type``, ``timestamp`` (ISO 8601, UTC) and ``data``.

    ``data`` is the ``job`` payload without ``event`` and ``timestamp``; for an application event or a ping
    it is the application's own object, unchanged.

    Source: Standard Webhooks, "Payload structure".
    """
    return fit(_standard, occurrence, context)[1]


def render_cloudevents(occurrence: Occurrence, context: RenderContext) -> Rendered:
    """Return the body of ``format="cloudevents"``: one event in the structured JSON mode.

    ``id`` is the event's id, ``type`` and ``time`` come from the occurrence, ``subject`` is the job's id, and
    ``source`` names the queue. ``data`` is the same as in ``format="standard"``.

    Source: CloudEvents 1.0.2, "Required Attributes"; JSON Event Format 1.0.2, "Envelope".
    """
    return Rendered(fit(_cloudevent, occurrence, context)[1], "application/cloudevents+json")


#: The formats that come with the package, by name.
FORMATS: Mapping[str, PayloadFormat] = MappingProxyType(
    {"job": render_job, "task": render_task, "standard": render_standard, "cloudevents": render_cloudevents}
)


def as_rendered(made: bytes | Rendered) -> Rendered:
    """Return what a format returned, as body and media type."""
    return made if isinstance(made, Rendered) else Rendered(made)


CustomFormat = Callable[[dict[str, Any]], Mapping[str, Any] | bytes | tuple[bytes, str]]


def custom_format(function: CustomFormat) -> PayloadFormat:
    """Return a format that passes the ``job`` payload to *function* and sends what it returns.

    :param function: receives its own dict with the payload; returns a dict, sent as compact JSON, the bytes
        of a JSON body, or ``(bytes, content type)``. Its exceptions reach the caller; the size of what it
        returns is not limited here.
    """
    name = getattr(function, "__name__", function)

    def render(occurrence: Occurrence, context: RenderContext) -> Rendered:
        made = function(job_payload(occurrence, context))
        if isinstance(made, Mapping):
            return Rendered(_serialise(dict(made)))
        if isinstance(made, bytes):
            return Rendered(made)
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], bytes):
            return Rendered(made[0], _checked_content_type(made[1], name))
        raise TypeError(
            f"The payload format {name!r} returned {type(made).__name__}; "
            "return a dict, bytes or (bytes, content type)."
        )

    return render


def _checked_content_type(value: Any, name: Any) -> str:
    if isinstance(value, str) and len(value) <= MAX_CONTENT_TYPE_CHARS and _MEDIA_TYPE.fullmatch(value):
        return value
    raise ValueError(
        f"The payload format {name!r} returned the content type {value!r}; return one such as "
        f"'application/xml; charset=utf-8', at most {MAX_CONTENT_TYPE_CHARS} characters."
    )


def fit(
    build: Callable[[Occurrence, RenderContext], dict[str, Any]],
    occurrence: Occurrence,
    context: RenderContext,
    *,
    sort_keys: bool = False,
) -> tuple[dict[str, Any], bytes]:
    """Return the payload that *build* makes of *occurrence*, and its bytes, at most ``context.max_bytes``.

    Large and least important parts go first: the progress, the whole result or data (``null``, and
    ``result_truncated`` or ``data_truncated`` says so), the beginning of the traceback, the end of the error
    message, then of other texts. The job's id is never cut.
    """
    payload = build(occurrence, context)
    body = _serialise(payload, sort_keys=sort_keys)
    if len(body) <= context.max_bytes:
        return payload, body
    excess = len(body) - context.max_bytes
    for smaller in _smaller(occurrence, context, excess):
        payload = build(*smaller)
        body = _serialise(payload, sort_keys=sort_keys)
        if len(body) <= context.max_bytes:
            break
    return payload, body


def _smaller(
    occurrence: Occurrence, context: RenderContext, excess: int
) -> Iterator[tuple[Occurrence, RenderContext]]:
    """Yield ever smaller versions of a payload that is *excess* bytes too large."""
    error = occurrence.error
    if error is None:
        # Only the result, an application's data or absurdly long names can be large.
        occurrence = replace(occurrence, result=None, data={}, result_truncated=True, progress=None)
        yield occurrence, context
    else:
        occurrence = replace(occurrence, progress=None)
        traceback = error.get("traceback") or ""
        # One character takes at least one byte of JSON, so cutting the excess may be enough.
        enough = len(traceback) - excess - len(_CUT) - 1
        for keep in (enough, context.max_bytes // 2, context.max_bytes // 8, context.max_bytes // 16):
            if 0 < keep < len(traceback):
                error = {**error, "traceback": _CUT + traceback[-keep:]}
                occurrence = replace(occurrence, error=error)
                yield occurrence, context
    for most in (1024, 256, 64, 16):
        occurrence = replace(
            occurrence,
            runid=_cut(occurrence.runid, most),
            func=_cut(occurrence.func, most, keep_end=True),
            queue=_cut(occurrence.queue, most),
            error=None
            if occurrence.error is None
            else {
                **occurrence.error,
                "type": _cut(occurrence.error.get("type"), most) or "",
                "message": _cut(occurrence.error.get("message"), most) or "",
            },
        )
        context = replace(
            context, runid=_cut(context.runid, most), reference=_cut(context.reference, max(most, 256))
        )
        yield occurrence, context
    if occurrence.error is not None:
        yield replace(occurrence, error={**occurrence.error, "traceback": ""}), context


def _cut(text: str | None, most: int, *, keep_end: bool = False) -> str | None:
    if text is None or len(text) <= most:
        return text
    return "..." + text[3 - most :] if keep_end else text[: most - 3] + "..."


def _serialise(payload: dict[str, Any], *, sort_keys: bool = False) -> bytes:
    encode = _SORTED.encode if sort_keys else _ENCODER.encode
    try:
        text = encode(payload)
    except (ValueError, TypeError, RecursionError):
        # For example NaN in an outbox entry or an object in a scrubbed payload: convert it, lose nothing.
        text = encode(to_json_safe(payload))
    return text.encode("ascii")


_ENCODER, _SORTED = (
    json.JSONEncoder(sort_keys=sort_keys, separators=(",", ":"), allow_nan=False)
    for sort_keys in (False, True)
)


def _job(occurrence: Occurrence, context: RenderContext) -> dict[str, Any]:
    return {
        "event": occurrence.type,
        "job_id": occurrence.job_id,
        "runid": _runid(occurrence, context),
        "timestamp": occurrence.occurred_at.timestamp(),
        **_outcome(occurrence, context),
        **_particulars(occurrence, context),
    }


def _standard(occurrence: Occurrence, context: RenderContext) -> dict[str, Any]:
    data: dict[str, Any]
    if occurrence.type in JOB_TYPES:
        data = {
            "job_id": occurrence.job_id,
            "runid": _runid(occurrence, context),
            **_outcome(occurrence, context),
            **_particulars(occurrence, context),
        }
    elif occurrence.result_truncated:
        data = {"data_truncated": True}
    else:
        data = dict(occurrence.data)
    return {"type": occurrence.type, "timestamp": format_time(occurrence.occurred_at), "data": data}


def _cloudevent(occurrence: Occurrence, context: RenderContext) -> dict[str, Any]:
    standard = _standard(occurrence, context)
    source = "application"
    if occurrence.queue:
        source = "queue:" + quote(occurrence.queue, safe="", errors="replace")
    payload = {
        "specversion": "1.0",
        "id": context.event_id,
        "source": f"urn:rq-webhooks:{source}",
        "type": standard["type"],
        "time": standard["timestamp"],
        "datacontenttype": JSON,
        "data": standard["data"],
    }
    if occurrence.job_id:
        payload["subject"] = occurrence.job_id
    return payload


def _task(occurrence: Occurrence, context: RenderContext) -> dict[str, Any]:
    payload: dict[str, Any] = {"timestamp": format_time(occurrence.occurred_at)}
    if occurrence.type in _TASK_WORDS:
        event_type, status = _TASK_WORDS[occurrence.type]
        name = None if occurrence.func is None else occurrence.func.rpartition(".")[2]
        payload["event_type"] = event_type
        payload["task"] = {"id": occurrence.job_id, "name": name, "status": status}
        if occurrence.type == JOB_SUCCESS:
            payload.update(_outcome(occurrence, context))
        elif occurrence.type not in (JOB_STARTED, JOB_PROGRESS):
            payload["error"] = (occurrence.error or {}).get("message") or _MESSAGES[occurrence.type]
    else:
        payload["event_type"] = occurrence.type
        payload.update(_outcome(occurrence, context))
    if context.reference is not None:
        payload["reference"] = context.reference
    if occurrence.supersedes is not None:
        payload["supersedes"] = occurrence.supersedes
    if occurrence.progress is not None:
        payload["progress"] = occurrence.progress
    return payload


def _runid(occurrence: Occurrence, context: RenderContext) -> str | None:
    return occurrence.runid if context.runid is None else context.runid


def _outcome(occurrence: Occurrence, context: RenderContext) -> dict[str, Any]:
    """Return the outcome: ``result``, ``error`` or ``data``."""
    if occurrence.type == JOB_SUCCESS:
        if occurrence.result_truncated:
            return {"result": None, "result_truncated": True}
        return {"result": occurrence.result if context.include_result else None}
    if occurrence.type == JOB_FAILURE or occurrence.error is not None:
        return {"error": _error(occurrence, context)}
    if occurrence.type in JOB_TYPES:
        return {}
    if occurrence.result_truncated:
        return {"data": None, "data_truncated": True}
    return {"data": dict(occurrence.data)}


def _error(occurrence: Occurrence, context: RenderContext) -> dict[str, str | None]:
    error = occurrence.error or {}
    traceback: str | None = error.get("traceback") or ""
    if context.traceback == "none":
        traceback = None
    elif context.traceback == "last":
        traceback = _last_frame(traceback or "")
    message = error.get("message")
    if message is None:
        message = _MESSAGES.get(occurrence.type, "")
    return {"type": error.get("type") or "Unknown", "message": message, "traceback": traceback}


def _last_frame(traceback: str) -> str:
    """Return the end of a traceback: the innermost frame and the exception."""
    start = traceback.rfind('\n  File "')
    if start >= 0:
        return traceback[start + 1 :]
    return traceback.rstrip("\n").rpartition("\n")[2]


def _particulars(occurrence: Occurrence, context: RenderContext) -> dict[str, Any]:
    """Return the keys that were added to the contract; these always come last."""
    payload: dict[str, Any] = {"id": context.event_id}
    if occurrence.type in JOB_TYPES:
        payload["func"] = occurrence.func
        payload["queue"] = occurrence.queue
        for name in ("enqueued_at", "started_at", "ended_at"):
            payload[name] = _time(getattr(occurrence, name))
    payload["source"] = occurrence.source
    payload["reference"] = context.reference
    if occurrence.supersedes is not None:
        payload["supersedes"] = occurrence.supersedes
    if occurrence.scope == "tree":
        payload["scope"] = occurrence.scope
        payload["jobs"] = dict(occurrence.jobs or {})
    if occurrence.sequence is not None:
        payload["sequence"] = occurrence.sequence
    if occurrence.progress is not None:
        payload["progress"] = occurrence.progress
    return payload


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)


_FIELDS = tuple(field.name for field in fields(Occurrence))
_all_of = attrgetter(*_FIELDS)
_TIMES = ("occurred_at", "enqueued_at", "started_at", "ended_at")
_OBJECTS = ("error", "jobs", "data")


def occurrence_to_json(occurrence: Occurrence) -> str:
    """Return the canonical JSON of *occurrence*, as it is stored for an event; ASCII."""
    values = dict(zip(_FIELDS, _all_of(occurrence), strict=True))
    for name in _TIMES:
        values[name] = _time(values[name])
    for name in _OBJECTS:
        values[name] = None if values[name] is None else dict(values[name])
    return _serialise(values).decode("ascii")


def occurrence_from_json(text: str) -> Occurrence:
    """Return the occurrence that :func:`occurrence_to_json` wrote.

    Fields added by a newer version are left out; fields that an older version did not know get their
    default.

    :raises ValueError: when *text* is not such JSON.
    """
    stored = json.loads(text)
    if not isinstance(stored, dict):
        raise ValueError(f"a stored event is not a JSON object but {type(stored).__name__}")
    values = {name: stored[name] for name in _FIELDS if name in stored}
    for name in ("type", "source", "occurred_at"):
        if not isinstance(values.get(name), str):
            raise ValueError(f"a stored event has no {name!r}")
    for name in _TIMES:
        if values.get(name) is not None:
            values[name] = parse_time(values[name])
    return Occurrence(**values)
