"""Status lines and headers as :mod:`http.client` reads them, with bounds and without its surprises."""

from __future__ import annotations

import http.client
from typing import Any, cast

from .answers import MAX_HEADER_BYTES
from .attempt import Attempt, attempt_of_this_thread


class _BoundedHeaders:
    """A response's stream while its headers are read: counts bytes, and tells an end from an empty line."""

    def __init__(self, stream: Any, attempt: Attempt | None) -> None:
        self._stream = stream
        self._attempt = attempt
        self._left = MAX_HEADER_BYTES

    def readline(self, limit: int = -1) -> bytes:
        line: bytes = self._stream.readline(min(limit, self._left + 1) if limit >= 0 else self._left + 1)
        if self._attempt is not None:
            self._attempt.answered = self._attempt.answered or bool(line)
            if not line and self._attempt.answered:
                raise http.client.IncompleteRead(b"")  # http.client takes this for the end of the headers
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("headers")
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Response(http.client.HTTPResponse):
    """A response whose headers are bounded, and which skips every interim response."""

    def begin(self, *args: Any, **options: Any) -> None:
        stream = self.fp
        self.fp = cast(Any, _BoundedHeaders(stream, attempt_of_this_thread()))
        try:
            super().begin(*args, **options)
            while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
                self.headers = cast(
                    Any, None
                )  # http.client skips 100 by itself, but takes 103 for the answer
                super().begin(*args, **options)
        finally:
            if self.fp is not None:
                self.fp = stream
        if self.msg.defects or self.msg.get_payload():
            # Lines that are no headers: believe the status, not the framing. urllib3 would log them with
            # the whole URL.
            self.msg.defects.clear()
            self.msg.set_payload("")
            self.will_close = True
