"""HTTP/1.1 on the wire: write a request, read a response, and keep a bounded part of it.

Connection headers are set here, regardless of the request's own. Responses are parsed strictly by RFC 9112,
within limits; of :mod:`http.client`, which takes four times the CPU, only the exceptions are used. Bodies
are never decoded, and are read only up to the cap (SECURITY 8).

:class:`Exchange` writes and reads over a connection of the pool, as far as possible without waiting.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

from urllib3.util.ssltransport import SSLTransport

from ...protocol.urls import CheckedURL
from .contract import NETWORK_ERRORS, AttemptRequest, Failure, failure_of
from .deadline import RunningAttempt
from .pool import ConnectionPool, PinnedConnection

#: Headers of the connection layer; a request's own are dropped.
_TRANSPORT_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "transfer-encoding"}
)
#: RFC 9110, 5.1 and 5.5, without the bytes above ASCII.
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")

#: Maximum bytes of a response body that are kept.
BODY_CAP = 16 * 1024
#: Maximum bytes of a response's status lines and headers, including those of interim responses (100, 103).
MAX_HEADER_BYTES = 64 * 1024

#: Response headers worth keeping; everything else a receiver sends is dropped.
KEPT_HEADERS = (
    "content-type",
    "content-length",
    "content-encoding",
    "date",
    "server",
    "retry-after",
    "location",
    "allow",
    "www-authenticate",
    "x-request-id",
    "x-correlation-id",
)
_KEPT = frozenset(KEPT_HEADERS)
_MAX_KEPT_VALUE = 256
_LENGTH = re.compile(r"[0-9]{1,18}")
#: The end of a line, and the end of the headers: the first empty line.
_LINE = re.compile(rb"\n")
_HEAD = re.compile(rb"(?:\A|\n)\r?\n")
_STATUS_LINE = re.compile(r"HTTP/(0\.9|1\.\S+)\s+([1-9][0-9]{2})\s")
_FIELD = re.compile(r"^([!-9;-~]+):([^\r\n]*)\r?\n", re.MULTILINE)
#: Maximum lines of a response's headers, including the empty one.
_MAX_LINES = 100
_SWITCHING_PROTOCOLS = 101
_WITHOUT_BODY = frozenset({204, 304})
#: RFC 9112, 7.1. Python's own ``int`` would also accept ``-1``, for which http.client reads without end.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n")
#: The maximum size of a TLS record.
_READ_BYTES = 16 * 1024
#: Maximum bytes of a response that are read while other requests wait; hardly any response has more.
_READ_AT_ONCE = 32 * 1024
#: Raised by a connection that would have to wait to write; TLS may have to read first.
_WOULD_WAIT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def request_bytes(
    checked: CheckedURL,
    headers: Iterable[tuple[str, str]],
    body: bytes,
    proxy_headers: Mapping[str, str] | None = None,
) -> bytes:
    """Return head and body of a request, for a single write.

    :param headers: names and values of all headers except ``Host``.
    :param proxy_headers: headers for the proxy, if one has to forward the request; the request line then
        contains the whole URL.
    """
    netloc = checked.url[len(checked.scheme) + 3 :].partition("/")[0]
    target = checked.target if proxy_headers is None else checked.url
    head = [f"POST {target} HTTP/1.1\r\nHost: {netloc}\r\n"]
    head += [f"{name}: {value}\r\n" for name, value in headers]
    if proxy_headers:
        head += [f"{name}: {value}\r\n" for name, value in proxy_headers.items()]
    head.append("\r\n")
    return "".join(head).encode("ascii") + body


def wire_headers(request: AttemptRequest) -> dict[str, tuple[str, str]]:
    """Return name and value of all headers except ``Host``, in order, keyed by the name in lower case.

    If names differ only in case, the last one wins.

    :raises Failure: ``internal``, for a name or value that must not be sent; both were validated long before.
    """
    headers: dict[str, tuple[str, str]] = {}
    for name, value in request.headers.items():
        lower = _lower(name)
        if lower in _TRANSPORT_HEADERS:
            continue
        if lower in headers:
            del headers[lower]
        headers[lower] = name, value
    together = "".join(request.headers.values())
    if not (together.isascii() and together.isprintable()):
        for name, value in headers.values():
            if not _VALUE.fullmatch(value):
                raise Failure("internal", f"the header {name!r} has characters that must not be sent")
    headers["accept-encoding"] = "Accept-Encoding", "identity"
    headers["content-length"] = "Content-Length", str(len(request.body))
    return headers


@lru_cache(maxsize=1024)
def _lower(name: str) -> str:
    """Return the name of a header in lower case.

    :raises Failure: ``internal``, if it cannot be the name of a header.
    """
    if not _NAME.fullmatch(name):
        raise Failure("internal", f"{name!r} cannot be the name of a header")
    return name.lower()


class _Stream:
    """Read lines and blocks from a connection, and keep track of what has not been read yet.

    :param sock: the connection.
    :param attempt: marked as answered at the first byte.
    :param begun: the part of the response that was read before.
    :param at_once: whether to read no more than :data:`_READ_AT_ONCE`, and keep it in :attr:`parts`.
    """

    def __init__(self, sock: socket.socket, attempt: RunningAttempt, begun: bytes, at_once: bool) -> None:
        self._sock = sock
        self._attempt = attempt
        self._data = bytearray(begun)
        #: Bytes of lines that may still be read.
        self.left = MAX_HEADER_BYTES
        #: Bytes received so far.
        self.received = len(begun)
        self.parts: list[bytes] | None = [] if at_once else None

    def read_to(self, end: re.Pattern[bytes]) -> bytes:
        """Return data up to and including *end*; nothing if the connection ended before the first byte."""
        looked_at = 0
        while not (match := end.search(self._data, max(0, looked_at - 2))):  # an end has three bytes at most
            looked_at = len(self._data)
            if looked_at > self.left:
                break
            if not self._receive():
                if self._attempt.answered:
                    raise http.client.IncompleteRead(b"")
                return b""
        size = match.end() if match else looked_at
        self.left -= size
        if self.left < 0:
            raise http.client.LineTooLong("headers")
        return self._take(size)

    def read_up_to(self, size: int) -> bytes:
        """Return *size* bytes, or fewer if the connection ends first."""
        while len(self._data) < size and self._receive():
            pass
        return self._take(size)

    def read_exactly(self, size: int) -> bytes:
        """Return *size* bytes.

        :raises http.client.IncompleteRead: when the connection ends first.
        """
        data = self.read_up_to(size)
        if len(data) < size:
            raise http.client.IncompleteRead(data, size - len(data))
        return data

    @property
    def has_more(self) -> bool:
        """Return whether unread data has arrived, here or in the TLS layers."""
        if self._data:
            return True
        sock: Any = self._sock
        if isinstance(sock, ssl.SSLSocket):
            return sock.pending() > 0
        if isinstance(sock, SSLTransport):  # TLS within the proxy's TLS
            return bool(sock.incoming.pending or sock.sslobj.pending())
        return False

    def _receive(self) -> bool:
        if self.parts is not None and self.received >= _READ_AT_ONCE:
            raise BlockingIOError("there is more than is read at once")
        left = _READ_BYTES if self.parts is None else min(_READ_BYTES, _READ_AT_ONCE - self.received)
        data = self._sock.recv(left)
        if not data:
            return False
        self._attempt.answered = True
        self._data += data
        self.received += len(data)
        if self.parts is not None:
            self.parts.append(data)
        return True

    def _take(self, size: int) -> bytes:
        data = bytes(self._data[:size])
        del self._data[:size]
        return data


class BoundedResponse:
    """A response with bounded headers, after any interim responses.

    :param sock: the connection.
    :param attempt: marked as answered at the first byte.
    :param begun: the part of it that was read before.
    :param at_once: raise :exc:`BlockingIOError` rather than read more than :data:`_READ_AT_ONCE`.
    """

    def __init__(
        self, sock: socket.socket, attempt: RunningAttempt, begun: bytes = b"", *, at_once: bool = False
    ) -> None:
        self._stream = _Stream(sock, attempt, begun, at_once)
        self.status = 0
        #: By name in lower case; values of the same name are joined.
        self.headers: dict[str, str] = {}
        self._is_doubtful = self._is_chunked = self._was_read = self._will_close = False
        self._length: int | None = None

    def read_head(self) -> None:
        """Read status line and headers.

        :raises http.client.HTTPException: when they are malformed, too long or incomplete.
        """
        version = head = ""
        while self.status < 200 and self.status != _SWITCHING_PROTOCOLS:
            if not (line := self._stream.read_to(_LINE).decode("latin-1")):
                raise http.client.RemoteDisconnected("the connection was closed without a response")
            if not (match := _STATUS_LINE.match(line)):
                raise http.client.BadStatusLine(line)
            version, self.status = match[1], int(match[2])
            head = self._stream.read_to(_HEAD).decode("latin-1")
            if head.count("\n") > _MAX_LINES:
                raise http.client.HTTPException(f"more than {_MAX_LINES} lines of headers")
        self._judge_framing(version in ("0.9", "1.0"), head)

    def read_body(self, limit: int) -> bytes:
        """Return the body undecoded, at most its first *limit* bytes; nothing if its end is in doubt.

        :raises http.client.HTTPException: when the connection ended before the body did, and for malformed
            chunks.
        """
        if self._is_doubtful:
            return b""
        if self._is_chunked:
            return self._read_chunks(limit)
        if self._length is None:
            return self._stream.read_up_to(limit)
        self._was_read = self._length <= limit
        return self._stream.read_exactly(min(self._length, limit))

    @property
    def may_be_followed(self) -> bool:
        """Return whether it was read to its end, nothing followed it, and the connection stays open."""
        return self._was_read and not self._will_close and not self._stream.has_more

    @property
    def received(self) -> int:
        """Return how many bytes of it were read."""
        return self._stream.received

    @property
    def so_far(self) -> bytes:
        """Return the part of it that was read with *at_once*."""
        return b"".join(self._stream.parts or ())

    def _judge_framing(self, is_old: bool, head: str) -> None:
        """Keep only the status if other parsers might see the end of the body elsewhere (RFC 9112, 6.3)."""
        headers, fields = self.headers, _FIELD.findall(head)
        for name, value in fields:
            name, value = name.lower(), value.strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        self._is_chunked = coding is not None and coding.lower() == "chunked"
        self._is_doubtful = (
            len(fields) + 1 < head.count("\n")  # a line that is not a header, or continues one
            or not (length is None or _LENGTH.fullmatch(length))
            or not (coding is None or self._is_chunked)
        )
        connection = headers.get("connection", "").lower()
        self._will_close = (
            self._is_doubtful
            or (length is not None and coding is not None)
            or self.status == _SWITCHING_PROTOCOLS
            or ("keep-alive" not in connection if is_old else "close" in connection)
        )
        if self.status < 200 or self.status in _WITHOUT_BODY:
            self._is_chunked, self._length = False, 0  # whatever the headers say
        elif length is not None and not self._is_doubtful:
            self._length = int(length)

    def _read_chunks(self, limit: int) -> bytes:
        body = bytearray()
        while len(body) < limit:
            self._stream.left = MAX_HEADER_BYTES
            line = self._stream.read_to(_LINE)
            if not (match := _CHUNK_SIZE.fullmatch(line)):
                raise http.client.HTTPException(f"{line[:40]!r} is not the size of a chunk")
            size = int(match[1], 16)
            if size == 0:
                while self._stream.read_to(_LINE) not in (b"\r\n", b"\n"):
                    pass  # trailers
                self._was_read = True
                break
            body += self._stream.read_exactly(min(size, limit - len(body)))
            if len(body) < limit and self._stream.read_exactly(2) != b"\r\n":
                raise http.client.HTTPException("a chunk does not end where it should")
        return bytes(body)


class Exchange:
    """One request and its response over one connection; in rare cases over a second one.

    :meth:`urlopen` and :meth:`resume` go as far as they can without waiting. :meth:`finish` does the rest in
    a thread that may wait: new connections, requests not written at once, responses over TLS or in parts.

    :param headers: names and values of all headers except ``Host``.
    :param body_cap: maximum bytes of a response body that are kept.
    """

    def __init__(
        self,
        attempt: RunningAttempt,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        connections: ConnectionPool,
        body_cap: int,
    ) -> None:
        self._attempt = attempt
        self._headers = headers
        self._body = body
        self._connections = connections
        self._body_cap = body_cap
        self._connection: PinnedConnection | None = None
        self._may_be_kept = self._has_come = False
        #: The part of the request not written yet, and the part of the response read so far.
        self._unsent = self._begun = b""

    @property
    def waits_for(self) -> socket.socket | None:
        """Return the socket to become readable before :meth:`resume`; if ``None``, :meth:`finish` is next."""
        if self._connection is None or self._unsent or self._has_come:
            return None
        return self._connection.sock

    def urlopen(self, **_options: Any) -> dict[str, Any]:
        """Write the request to a kept connection, if there is one; called by :meth:`HTTPAdapter.send`.

        :returns: an empty mapping; the response comes later.
        :raises Failure: when there can be no response.
        """
        self._try(self._write_at_once)
        return {}

    def resume(self) -> dict[str, Any] | None:
        """Read what arrived, and return what :meth:`finish` would; ``None`` if there is more to do."""
        return self._try(self._read_at_once)

    def finish(self) -> dict[str, Any]:
        """Do everything that is left, waiting where necessary.

        :returns: fields of :class:`.AttemptResult`.
        :raises Failure: when there is no response.
        """
        while (outcome := self._try(self._write_and_read)) is None:
            pass  # repeated at most once: see `may_repeat`
        return outcome

    def _try(self, step: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Return what *step* returns; ``None`` if the request is to be made again.

        Translates all errors on the way. Once there is a result, the connection is given back.
        """
        try:
            try:
                outcome = step()
            except NETWORK_ERRORS as exc:
                self._attempt.raise_if_aborted(exc)
                raise failure_of(exc) from exc
            if outcome is not None:
                self._give_back()
                self._attempt.raise_if_aborted()  # a socket shut down mid-body can look like its end
            return outcome
        except BaseException as exc:
            self._give_back()
            if isinstance(exc, Failure) and self._attempt.may_repeat(exc):
                return None
            raise

    def _give_back(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._connections.give_back(connection, self._attempt, keep=self._may_be_kept)

    def _write_at_once(self) -> None:
        connection = self._connection = self._connections.take_kept(self._attempt)
        if connection is None:
            return
        self._unsent = self._request_bytes(connection)
        if connection.waits:
            return
        try:
            self._unsent = self._unsent[connection.sock.send(self._unsent) :]
        except _WOULD_WAIT:
            return
        except (BrokenPipeError, ConnectionResetError):  # the receiver may have answered already
            self._unsent = b""

    def _read_at_once(self) -> dict[str, Any] | None:
        connection = cast(PinnedConnection, self._connection)
        if isinstance(connection.sock, ssl.SSLSocket):
            self._has_come = True  # one read would last as long as records without data arrive
            return None
        response = BoundedResponse(connection.sock, self._attempt, at_once=True)
        try:
            return self._read(connection, response)
        except BlockingIOError:
            self._begun = response.so_far
            self._has_come = bool(self._begun)
            return None

    def _write_and_read(self) -> dict[str, Any]:
        if self._connection is None:
            self._connection = self._connections.take(self._attempt)
            self._unsent = self._request_bytes(self._connection)
        connection = self._connection
        connection.let_wait(True)
        if self._unsent:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered already
                connection.sock.sendall(self._unsent)
        return self._read(connection, BoundedResponse(connection.sock, self._attempt, self._begun))

    def _request_bytes(self, connection: PinnedConnection) -> bytes:
        for_proxy = self._connections.forwarding_headers if connection.proxy_is_forwarding else None
        return request_bytes(self._attempt.checked, self._headers, self._body, for_proxy)

    def _read(self, connection: PinnedConnection, response: BoundedResponse) -> dict[str, Any]:
        response.read_head()
        outcome = head_of(response.status, response.headers.items())
        if "error_code" in outcome:
            return outcome
        # One byte more than is kept, to notice that a body of exactly that size has ended.
        body = response.read_body(self._body_cap + 1)
        outcome["response_body"] = body[: self._body_cap]
        connection.received += response.received
        self._may_be_kept = response.may_be_followed
        return outcome


def head_of(status: int, raw_headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of :class:`.AttemptResult` that come from status line and headers.

    If the ``error_code`` is ``redirect``, the body must not be read.

    :param raw_headers: names and values as received; values of the same name are joined.
    """
    headers: dict[str, str] = {}
    for raw_name, value in raw_headers:
        name = raw_name.lower()
        if name in _KEPT:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    for name, value in headers.items():
        headers[name] = clean(value, _MAX_KEPT_VALUE)
    if "location" in headers:
        headers["location"] = headers["location"].partition("?")[0]
    outcome: dict[str, Any] = {
        "status_code": status,
        "response_headers": headers,
        "retry_after": headers.get("retry-after"),
    }
    if 300 <= status < 400:
        outcome["error_code"] = "redirect"
        outcome["error_detail"] = f"redirects are not followed ({status})"
    return outcome


def clean(text: str, limit: int) -> str:
    """Return untrusted text cut to *limit*, without characters that databases and pages cannot show."""
    text = text[:limit]
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
