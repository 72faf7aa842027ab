"""Answers: heads as :mod:`http.client` reads them, with bounds and without its surprises; bodies strictly."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from typing import Any, cast

from urllib3.util.ssltransport import SSLTransport

from .answers import MAX_HEADER_BYTES
from .attempt import Attempt

_LENGTH = re.compile(r"[ \t]*[0-9]{1,18}[ \t]*")
#: RFC 9112, 7.1. Python's own ``int`` would have ``-1`` as well, which http.client reads without end.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n")
#: As much as a TLS record holds.
_READ_BYTES = 16 * 1024


class _Stream:
    """What comes over a connection, in lines and pieces; knows what of it nobody has read.

    :param sock: the connection.
    :param attempt: is told when something came.
    """

    def __init__(self, sock: socket.socket, attempt: Attempt) -> None:
        self._sock = sock
        self._attempt = attempt
        self._data = bytearray()
        #: Bytes of lines that may still come.
        self.left = MAX_HEADER_BYTES

    def makefile(self, _mode: str) -> _Stream:
        """Return what http.client reads from."""
        return self

    def readline(self, _limit: int = -1) -> bytes:
        """Return the next line; empty if the connection ended before the first byte of all."""
        looked_at = 0
        while not (end := self._data.find(b"\n", looked_at) + 1):
            looked_at = len(self._data)
            if looked_at > self.left:
                break
            if not self._receive():
                if self._attempt.answered:
                    raise http.client.IncompleteRead(b"")  # http.client takes it for the end of the headers
                return b""
        self.left -= end or looked_at
        if self.left < 0:
            raise http.client.LineTooLong("headers")
        return self._take(end)

    def read_up_to(self, size: int) -> bytes:
        """Return *size* bytes, or all there are until the connection ends."""
        while len(self._data) < size and self._receive():
            pass
        return self._take(size)

    def read_exactly(self, size: int) -> bytes:
        """Return *size* bytes.

        :raises http.client.IncompleteRead: when the connection ends before.
        """
        data = self.read_up_to(size)
        if len(data) < size:
            raise http.client.IncompleteRead(data, size - len(data))
        return data

    @property
    def has_more(self) -> bool:
        """Say whether more came than was read, here or in the layers of TLS."""
        if self._data:
            return True
        sock: Any = self._sock
        if isinstance(sock, ssl.SSLSocket):
            return sock.pending() > 0
        if isinstance(sock, SSLTransport):  # within a proxy's own
            return bool(sock.incoming.pending or sock.sslobj.pending())
        return False

    def flush(self) -> None:
        """Nothing is written here."""

    def close(self) -> None:
        """Nothing to close: the socket is its connection's."""

    def _receive(self) -> bool:
        data = self._sock.recv(_READ_BYTES)
        if not data:
            return False
        self._attempt.answered = True
        self._data += data
        return True

    def _take(self, size: int) -> bytes:
        data = bytes(self._data[:size])
        del self._data[:size]
        return data


class Answer(http.client.HTTPResponse):
    """An answer whose headers are bounded, and which skips every interim response.

    :param sock: the connection.
    :param attempt: is told when something came.
    """

    def __init__(self, sock: socket.socket, attempt: Attempt) -> None:
        self._stream = _Stream(sock, attempt)
        super().__init__(cast(socket.socket, self._stream), method="POST")
        self._is_doubtful = False
        self._was_read = False

    def begin(self) -> None:
        """Read status line and headers."""
        super().begin()
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers = cast(Any, None)  # http.client skips 100 by itself, but takes 103 for the answer
            super().begin()
        self._judge_framing()
        if self.status < 200 or self.status in (http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED):
            self.chunked, self.length = False, 0  # whatever the headers say

    def read_body(self, limit: int) -> bytes:
        """Return the body as it came, or its first *limit* bytes; nothing if its end is in doubt.

        :raises http.client.HTTPException: when the connection ended before the body did, and for chunks that
            are none.
        """
        if self._is_doubtful:
            return b""
        if self.chunked:
            return self._read_chunks(limit)
        if self.length is None:
            return self._stream.read_up_to(limit)
        self._was_read = self.length <= limit
        return self._stream.read_exactly(min(self.length, limit))

    @property
    def may_be_followed(self) -> bool:
        """Say whether it was read to its end, nothing came after it, and the connection stays open."""
        return self._was_read and not self.will_close and not self._stream.has_more

    def _judge_framing(self) -> None:
        """Believe only the status where others may see the body's end elsewhere (RFC 9112, 6.3)."""
        lengths = self.headers.get_all("content-length", [])
        codings = [coding.strip().lower() for coding in self.headers.get_all("transfer-encoding", [])]
        self.chunked = codings == ["chunked"]
        self._is_doubtful = bool(
            self.msg.defects
            or self.msg.get_payload()
            or len(lengths) > 1
            or (lengths and not _LENGTH.fullmatch(lengths[0]))
            or (codings and not self.chunked)
        )
        if self._is_doubtful or (lengths and codings) or self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.will_close = True

    def _read_chunks(self, limit: int) -> bytes:
        body = bytearray()
        while len(body) < limit:
            self._stream.left = MAX_HEADER_BYTES
            line = self._stream.readline()
            if not (match := _CHUNK_SIZE.fullmatch(line)):
                raise http.client.HTTPException(f"{line[:40]!r} is not the size of a chunk")
            size = int(match[1], 16)
            if size == 0:
                while self._stream.readline() not in (b"\r\n", b"\n"):
                    pass  # trailers
                self._was_read = True
                break
            body += self._stream.read_exactly(min(size, limit - len(body)))
            if len(body) < limit and self._stream.read_exactly(2) != b"\r\n":
                raise http.client.HTTPException("a chunk does not end where it should")
        return bytes(body)
