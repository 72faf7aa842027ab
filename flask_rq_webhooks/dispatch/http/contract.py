"""What a transport promises to the dispatcher: the request, the result, and the object between them.

Knows nothing of how bytes travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRequest:
    """One HTTP request to be made.

    :param url: as stored; judged again before it is used.
    :param headers: final, in order.
    :param timeout_s: total deadline, from the look-up to the last byte read.
    :param connect_timeout_s: deadline for the look-up and opening a connection.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    timeout_s: float
    connect_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptResult:
    """What came of one request.

    :param started_at: aware UTC.
    :param status_code: the response's, if one arrived whole and in time.
    :param error_code: ``None`` where the status says everything, else one of ``blocked``, ``dns``,
        ``connect``, ``tls``, ``timeout``, ``reset``, ``redirect``, ``internal``.
    :param error_detail: for people; never shown to the client.
    :param response_headers: those of :data:`~.wire_format.KEPT_HEADERS` that came, in lower case, shortened.
    :param response_body: as it came over the wire, at most the transport's cap.
    :param retry_after: the header as it came; see :mod:`flask_rq_webhooks.storage.attempts`.
    """

    started_at: datetime
    duration_ms: float
    status_code: int | None = None
    error_code: str | None = None
    error_detail: str | None = None
    response_headers: Mapping[str, str] = field(default_factory=dict)
    response_body: bytes = b""
    retry_after: str | None = None


class Transport(Protocol):
    """What sends requests."""

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        """Send *request* as soon as a slot is free.

        :returns: a future that never raises: what went wrong is in the result.
        :raises RuntimeError: after :meth:`close`.
        """
        ...

    def close(self, *, wait: bool) -> None:
        """Take no more requests.

        :param wait: let those under way end by themselves, which their deadlines bound, instead of breaking
            them off.
        """
        ...
