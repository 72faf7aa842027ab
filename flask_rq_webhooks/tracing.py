"""Traces: the webhooks about a request's jobs continue its W3C trace context.

A trace is stored and passed on as one text: a valid ``traceparent``, followed by a space and the
``tracestate`` if there is one. If the process has loaded OpenTelemetry, registering, storing an event and
every attempt are spans of that trace as well. OpenTelemetry is never imported here: if the host has not
loaded the API, no spans are exported. What a trace belongs to is not known here.
"""

from __future__ import annotations

import functools
import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Headers(Protocol):
    """Header values by name, which may be in any case."""

    def get(self, name: str, /) -> str | None: ...


TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
#: Name of our tracer, the same as that of the package.
_TRACER = "flask_rq_webhooks"
#: Maximum characters and members of a ``tracestate`` that are passed on; the leftmost member is the latest.
_MAX_STATE_CHARS, _MAX_MEMBERS = 512, 32
#: Flags of version 00 that are passed on: sampled, and random trace id.
_FLAGS = 0b11

# https://www.w3.org/TR/trace-context/, sections 3.2 and 3.3. A later version may have more at the end.
_PARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?"
)
_KEY = r"[a-z][_0-9a-z*/-]{0,255}|[a-z0-9][_0-9a-z*/-]{0,240}@[a-z][_0-9a-z*/-]{0,13}"
_MEMBER = re.compile(rf"({_KEY})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")


def checked(parent: str | None, state: str | None = None) -> str | None:
    """Return a trace in the form in which it is stored; ``None`` if *parent* is no valid ``traceparent``.

    A *state* that is not valid is left out.
    """
    found = None if parent is None or len(parent) > 512 else _PARENT.fullmatch(parent)
    if found is None or (found[1] == "00" and found[5] is not None):
        return None
    trace = f"00-{found[2]}-{found[3]}-{int(found[4], 16) & _FLAGS:02x}"
    members = _members(state or "")
    return f"{trace} {members}" if members else trace


def _members(state: str) -> str:
    kept: list[str] = []
    keys: set[str] = set()
    for member in state.split(","):
        member = member.strip(" \t")
        if not member:
            continue
        found = _MEMBER.fullmatch(member)
        if found is None or found[1] in keys:
            return ""
        keys.add(found[1])
        if len(kept) < _MAX_MEMBERS and len(",".join([*kept, member])) <= _MAX_STATE_CHARS:
            kept.append(member)
    return ",".join(kept)


def of_request(headers: Headers) -> str | None:
    """Return the trace that a request's headers continue, if they are valid."""
    parent = headers.get(TRACEPARENT)
    return None if parent is None else checked(parent, headers.get(TRACESTATE))


def is_same(one: str | None, other: str | None) -> bool:
    """Return whether both belong to one trace."""
    return one is not None and other is not None and one[:35] == other[:35]


def headers_of(trace: str | None, span: Any = None) -> dict[str, str]:
    """Return the headers with which an HTTP request continues a trace; no headers without a trace.

    :param span: the request's span, from :func:`start`. Without one, the request gets an id of its own.
    """
    own = None if span is None else trace_of(span)
    if own is None or own[:52] == (trace or "")[:52]:  # a span that is not recorded has the id of its parent
        own = trace and f"{trace[:36]}{secrets.token_hex(8)}{trace[52:]}"
    if own is None:
        return {}
    parent, _, state = own.partition(" ")
    return {TRACEPARENT: parent, TRACESTATE: state} if state else {TRACEPARENT: parent}


# -- OpenTelemetry ----------------------------------------------------------------------------------------


def _api() -> Any:
    """Return OpenTelemetry's API if a provider is set; redis-py imports the API in any case."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None or isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return None
    return api


def _harmless(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep errors of OpenTelemetry, and of what a host plugged into it, out of the pipeline."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            logger.warning("OpenTelemetry failed; a span is missing.", exc_info=True)
            return None

    return call


@_harmless
def start(
    name: str, parent: str | None, kind: str, attributes: Mapping[str, Any], link: str | None = None
) -> Any:
    """Start a span below *parent*, or below the current span; return ``None`` without OpenTelemetry.

    :param kind: name of a ``SpanKind``.
    :param attributes: those that are ``None`` are left out.
    :param link: another trace that led to this span.
    """
    api = _api()
    if api is None:
        return None
    context = None
    if parent is not None:
        context = api.set_span_in_context(api.NonRecordingSpan(_span_context(api, parent)))
    return api.get_tracer(_TRACER).start_span(
        name,
        context=context,
        kind=getattr(api.SpanKind, kind),
        attributes={name: value for name, value in attributes.items() if value is not None},
        links=[] if link is None else [api.Link(_span_context(api, link))],
    )


@_harmless
def end(span: Any, error: str | None = None, **attributes: Any) -> None:
    """End a span of :func:`start`; do nothing for ``None``.

    :param error: what went wrong, a stable code.
    """
    if span is None:
        return
    for name, value in attributes.items():
        span.set_attribute(name.replace("__", "."), value)
    if error is not None:
        span.set_attribute("error.type", error)
        status = sys.modules["opentelemetry.trace"].StatusCode.ERROR
        span.set_status(status)
    span.end()


@_harmless
def trace_of(span: Any) -> str | None:
    """Return the trace that continues from an OpenTelemetry span; ``None`` if the span is not valid."""
    context = span.get_span_context()
    if not context.is_valid:
        return None
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
    return checked(parent, context.trace_state.to_header())


def _span_context(api: Any, trace: str) -> Any:
    parent, _, state = trace.partition(" ")
    _version, trace_id, span_id, flags = parent.split("-")
    return api.SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=api.TraceFlags(int(flags, 16)),
        trace_state=api.TraceState.from_header([state]) if state else None,
    )


@_harmless
def _current() -> str | None:
    api = _api()
    return None if api is None else trace_of(api.get_current_span())


@contextmanager
def registering(headers: Headers | None) -> Iterator[str | None]:
    """Yield the trace that a new webhook continues; with OpenTelemetry, that of the registration's span.

    :param headers: of the current request; ``None`` outside of a request.
    """
    trace = None if headers is None else of_request(headers)
    trace = _current() or trace  # the span of the host's instrumentation
    span = start("rq_webhooks register", trace, "PRODUCER", {})
    try:
        yield trace if span is None else trace_of(span) or trace
    except BaseException as exc:
        end(span, type(exc).__name__)
        raise
    end(span)


class EventSpans:
    """The spans of the events that one transaction stores."""

    def __init__(self) -> None:
        self._begun: dict[str, Any] = {}

    def begin(
        self, event_id: str, event_type: str, job_id: str | None, parent: str | None, link: str | None
    ) -> str | None:
        """Start the span of an event; return the trace that its deliveries continue.

        :param parent: the trace of the request that asked for it.
        :param link: the trace of the job's own span, if that is another trace.
        """
        attributes = {
            "rq_webhooks.event_id": event_id,
            "rq_webhooks.event_type": event_type,
            "rq_webhooks.job_id": job_id,
        }
        span = start("rq_webhooks ingest", parent, "CONSUMER", attributes, link)
        if span is None:
            return parent
        self._begun[event_id] = span
        return trace_of(span) or parent

    def end(self, event_ids: Iterable[str]) -> None:
        """End the spans of the events that are new; what was stored before is not reported again."""
        for event_id in event_ids:
            end(self._begun.pop(event_id, None))
