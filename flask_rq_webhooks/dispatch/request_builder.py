"""Build the HTTP request for a claimed delivery: decrypt, sign, and assemble the headers.

This module decides which headers a webhook carries (DESIGN §7). It opens no connections and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..protocol.events import SOURCE_APPLICATION, WEBHOOK_PING, Occurrence
from ..protocol.payloads import as_rendered
from ..protocol.signatures import signature_headers
from ..storage.models import new_id
from ..tracing import TRACESTATE, headers_of
from .http import AttemptRequest, AttemptResult, Transport

if TYPE_CHECKING:
    from ..state import State
    from ..storage.claims import ClaimedDelivery


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """The contents of one request.

    :param headers: the client's own headers, decrypted.
    :param secrets: live secrets, decrypted, newest first; without any, no secret signs the request.
    :param iso_timestamp: whether ``<prefix>-Timestamp`` is ISO 8601 instead of unix seconds.
    :param trace: headers that continue a trace.
    """

    event_id: str
    event_type: str
    delivery_id: str
    number: int
    body: bytes = field(repr=False)
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Sequence[str] = field(default=(), repr=False)
    iso_timestamp: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)


def build_request(
    claimed: ClaimedDelivery, *, state: State, now: datetime, span: Any = None
) -> AttemptRequest:
    """Return the request for this attempt, signed as of *now*.

    There is no unsigned fallback: a request that cannot be signed as promised is not sent.

    :param claimed: a delivery returned by :func:`~flask_rq_webhooks.storage.claims.claim_due`.
    :param now: aware UTC time; it is signed in whole seconds.
    :param span: the span of this attempt, see :func:`~flask_rq_webhooks.tracing.start`.
    :raises DecryptionError: when no configured key decrypts the endpoint's secrets or headers.
    :raises ConfigurationError: when the endpoint needs a server-wide secret that is not set.
    """
    own = json.loads(state.cipher.decrypt(claimed.headers)) if claimed.headers is not None else {}
    message = Message(
        event_id=claimed.event_id,
        event_type=claimed.event_type,
        delivery_id=claimed.id,
        number=claimed.number,
        body=claimed.body,
        content_type=claimed.content_type,
        headers=own,
        secrets=_live_secrets(claimed, state),
        iso_timestamp=claimed.format == "task",
        trace=headers_of(claimed.trace, span),
    )
    return AttemptRequest(
        url=claimed.url,
        headers=request_headers(message, state=state, now=now),
        body=claimed.body,
        **_deadlines(state, claimed.timeout_s),
    )


def request_headers(message: Message, *, state: State, now: datetime) -> dict[str, str]:
    """Return all headers of *message*: the client's own first, then ours, which they cannot override."""
    settings = state.settings
    prefix = settings.header_prefix
    timestamp = int(now.timestamp())
    ours = {
        "Content-Type": message.content_type,
        "User-Agent": settings.user_agent,
        "webhook-id": message.event_id,
        "webhook-timestamp": str(timestamp),
        f"{prefix}-Event": message.event_type,
        f"{prefix}-Delivery": message.delivery_id,
        f"{prefix}-Attempt": str(message.number),
        **message.trace,
    }
    if message.secrets or state.signing_keys:
        ours |= signature_headers(
            message.secrets,
            event_id=message.event_id,
            timestamp=timestamp,
            body=message.body,
            header_prefix=prefix,
            iso_timestamp=message.iso_timestamp,
            signature_header=settings.signature_header,
            timestamp_header=settings.timestamp_header,
            signing_keys=state.signing_keys,
        )
    # Firewalls refuse requests without Accept (OWASP CRS 920300). A client may set another value.
    accept = {} if "accept" in map(str.lower, message.headers) else {"Accept": "*/*"}
    taken = {name.lower() for name in ours}
    if message.trace:
        taken.add(TRACESTATE)  # a tracestate belongs to its traceparent
    own = {name: value for name, value in message.headers.items() if name.lower() not in taken}
    return accept | own | ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """A test message that was sent, and its result."""

    request: AttemptRequest
    result: AttemptResult


def send_ping(
    url: str,
    *,
    state: State,
    transport: Transport,
    secret: str | None = None,
    payload_format: str | None = None,
) -> Ping:
    """Send one ``webhook.ping`` to *url* and wait for the result. Nothing is stored.

    Policy, headers, signatures and deadlines are the same as for every delivery.

    :param secret: signs the ping; by default the server-wide secret, if there is one.
    :param payload_format: name of the format to render it in; by default the app's default format.
    :raises ConfigurationError: when there is no such format.
    """
    now, settings = datetime.now(UTC), state.settings
    name = payload_format or settings.format
    if name not in state.formats:
        raise ConfigurationError(f"There is no payload format {name!r}; known are {sorted(state.formats)}.")
    event_id = new_id("evt")
    occurrence = Occurrence(type=WEBHOOK_PING, occurred_at=now, source=SOURCE_APPLICATION)
    rendered = as_rendered(state.formats[name](occurrence, state.render_context(event_id)))
    chosen = secret or settings.signing_secret
    message = Message(
        event_id=event_id,
        event_type=WEBHOOK_PING,
        delivery_id=new_id("dlv"),
        number=1,
        body=rendered.body,
        content_type=rendered.content_type,
        secrets=(chosen,) if chosen is not None else (),
        iso_timestamp=name == "task",
    )
    request = AttemptRequest(
        url=url,
        headers=request_headers(message, state=state, now=now),
        body=rendered.body,
        **_deadlines(state, None),
    )
    return Ping(request=request, result=transport.submit(request).result())


def _live_secrets(claimed: ClaimedDelivery, state: State) -> tuple[str, ...]:
    if claimed.secrets:
        return tuple(state.cipher.decrypt(secret) for secret in claimed.secrets)
    if not claimed.sign_payload:
        return ()
    if state.settings.signing_secret is None:
        raise ConfigurationError(
            f"Endpoint {claimed.endpoint_id} asked to be signed with the server-wide secret, but "
            "RQ_WEBHOOKS_SIGNING_SECRET is not set in this process; set it. Nothing is sent unsigned instead."
        )
    return (state.settings.signing_secret,)


def _deadlines(state: State, timeout_s: float | None) -> dict[str, float]:
    # Never longer than the setting: the lease is based on it, and it may have been lowered since.
    total = min(state.settings.timeout, timeout_s or state.settings.timeout)
    return {"timeout_s": total, "connect_timeout_s": min(state.settings.connect_timeout, total)}
