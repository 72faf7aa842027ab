"""Answers as :mod:`http.client` reads them, with bounds and without its surprises."""

from __future__ import annotations

import http.client
import socket
from typing import Any, cast

from .answers import MAX_HEADER_BYTES
from .attempt import Attempt


class _BoundedHeaders:
    """A response's stream while its headers are read: counts bytes, and tells an end from an empty line."""

    def __init__(self, stream: Any, attempt: Attempt) -> None:
        self._stream = stream
        self._attempt = attempt
        self._left = MAX_HEADER_BYTES

    def readline(self, limit: int = -1) -> bytes:
        line: bytes = self._stream.readline(min(limit, self._left + 1) if limit >= 0 else self._left + 1)
        if line:
            self._attempt.answered = True
        elif self._attempt.answered:
            raise http.client.IncompleteRead(b"")  # http.client takes this for the end of the headers
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("headers")
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Answer(http.client.HTTPResponse):
    """An answer whose headers are bounded, and which skips every interim response.

    :param sock: the connection; no more is read from it than one answer, but maybe buffered.
    :param attempt: is told when something came.
    """

    def __init__(self, sock: socket.socket, attempt: Attempt) -> None:
        super().__init__(sock, method="POST")
        self._attempt = attempt

    def begin(self) -> None:
        """Read status line and headers."""
        stream = self.fp
        self.fp = cast(Any, _BoundedHeaders(stream, self._attempt))
        try:
            super().begin()
            while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
                self.headers = cast(
                    Any, None
                )  # http.client skips 100 by itself, but takes 103 for the answer
                super().begin()
        finally:
            if self.fp is not None:
                self.fp = stream
        if self.msg.defects or self.msg.get_payload() or self._is_ambiguous():
            self.will_close = True  # believe the status, not the framing

    def read_up_to(self, limit: int) -> bytes:
        """Return the body as it came, or its first *limit* bytes.

        :raises http.client.IncompleteRead: when the connection ended before the body did.
        """
        body = b""
        while len(body) < limit and (chunk := self.read(limit - len(body))):
            body += chunk
            if self.isclosed():
                break
        if len(body) < limit and self.length:
            raise http.client.IncompleteRead(body, self.length)
        return body

    @property
    def has_ended(self) -> bool:
        """Say whether it was read to its end, and another request may follow on the connection."""
        return self.isclosed() and not self.will_close

    def _is_ambiguous(self) -> bool:
        """Say whether the end of the body is where others may not see it (RFC 9112, 6.3)."""
        lengths = self.headers.get_all("content-length", [])
        return bool(lengths) and (len(lengths) > 1 or bool(self.chunked))
