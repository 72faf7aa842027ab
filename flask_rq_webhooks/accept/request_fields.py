"""The webhook fields of a request: finding them, and hiding them from the view.

A request asks for a webhook with ``webhook_url`` in a JSON object, a form, the query string or the header
``X-Webhook-Url``. Only then are the fields hidden, and only from what is *parsed*: ``request.get_json()``,
``form``, ``values`` and ``args``. The bytes of the body stay what they are. Any other request is handed on as
it came: its body may be looked at here, but it is put back, unparsed and unread.

Knows nothing of what the values mean (:mod:`.schemas`) and of what becomes of them.
"""

from __future__ import annotations

import codecs
import io
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from flask import Request, Response, after_this_request
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import HTTPException

from ..errors import InvalidWebhookError

URL = "webhook_url"

#: Everything a request can say about its webhook, and all that is hidden from the view.
FIELDS = frozenset(
    {URL, "webhook_secret", "webhook_headers", "sign_payload", "webhook_events", "webhook_format",
     "webhook_reference", "webhook_timeout", "webhook_retry_count"}
)  # fmt: skip

#: For bodies that have no place for fields, such as a list. Key in the WSGI environment → field.
HEADERS = {
    "HTTP_X_WEBHOOK_URL": URL,
    "HTTP_X_WEBHOOK_SECRET": "webhook_secret",
    "HTTP_X_WEBHOOK_HEADERS": "webhook_headers",
}

#: Bodies up to this size are held in memory, larger ones in a temporary file.
IN_MEMORY = 2**20

_CHUNK = 2**16
_NEEDLE = URL.encode()
_UNDERSCORE = _NEEDLE.index(b"_")
#: Underscores after which a body is searched as a whole.
_FEW = 50
#: A percent-encoded letter or underscore, which no ordinary client writes.
_ENCODED_LETTER = re.compile(rb"%[567]")
#: The longest thing looked for, less one: may be cut in two by the border of two chunks.
_OVERLAP = len(_NEEDLE) - 1
_FORM = "application/x-www-form-urlencoded"
_MULTIPART = "multipart/form-data"


def take_fields(request: Request) -> dict[str, Any] | None:
    """Return the webhook fields of *request* and hide them from the view.

    :returns: raw values by field: of any JSON type from a JSON body, else text; ``null`` left out. ``None``
        when no webhook was asked for: the request is then as if nobody had looked.
    :raises InvalidWebhookError: when a field is given twice, or in the query string where it may not be.
    """
    environ = request.environ
    query = request.query_string
    # Parsed only if there can be something in it; so the usual request costs some substring searches.
    in_query = bool(query) and (_NEEDLE in query or _ENCODED_LETTER.search(query) is not None)
    asked = "HTTP_X_WEBHOOK_URL" in environ or (in_query and URL in request.args)
    found = _in_body(request, thorough=asked)
    if not asked and not any(name == URL and value is not None for name, value in found):
        return None
    in_query_string = [pair for pair in _pairs(request.args) if pair[0] in FIELDS]
    hide_fields(request)
    fields: dict[str, Any] = {}
    details: dict[str, list[str]] = {}
    for name, value in [*found, *_in_headers(environ), *in_query_string]:
        if isinstance(value, bytes):
            details[name] = ["Not valid UTF-8."]
        if name in fields:
            details[name] = ["Given more than once."]
        if value is not None:
            fields[name] = value
    for name, _ in in_query_string:
        if name != URL:
            # Query strings end up in access logs and browser histories.
            details[name] = ["May not be sent in the query string; send it in the body."]
    if details:
        raise InvalidWebhookError("The webhook fields of the request are not acceptable.", details=details)
    return fields


# Hiding


def hide_fields(request: Request) -> None:
    """Make the view find none of :data:`FIELDS` in what it parses, however often and in whatever way."""
    request.json_module = _FieldlessJSON(request.json_module)
    seen = getattr(request, "_cached_json", None)
    if seen is not None:
        # Something that ran before the view has parsed it already.
        request._cached_json = tuple(_without_fields(value) for value in seen)
    if "form" in request.__dict__:
        request.form = _without_pairs(request.form)
    else:
        make_parser = request.make_form_data_parser
        request.__dict__["make_form_data_parser"] = lambda: _FieldlessParser(make_parser())
    request.args = _without_pairs(request.args)
    request.__dict__.pop("values", None)


def _without_fields(value: Any) -> Any:
    if not isinstance(value, dict) or FIELDS.isdisjoint(value):
        return value
    return {name: item for name, item in value.items() if name not in FIELDS}


def _pairs(values: Any) -> Iterable[tuple[str, Any]]:
    # A host may have chosen a storage class of one value per name.
    return values.items(multi=True) if isinstance(values, MultiDict) else values.items()


def _without_pairs(values: Any) -> Any:
    return type(values)([pair for pair in _pairs(values) if pair[0] not in FIELDS])


class _FieldlessJSON:
    """Stands in for ``request.json_module``, through which every way of ``get_json`` goes."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def loads(self, *args: Any, **kwargs: Any) -> Any:
        return _without_fields(self._module.loads(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _FieldlessParser:
    """Stands in for the form parser, through which ``form`` and ``files`` come."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def parse(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        stream, form, files = self._parser.parse(*args, **kwargs)
        return stream, _without_pairs(form), files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


# Reading


def _in_headers(environ: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
    """Give the fields in the headers; as bytes where they are not UTF-8."""
    for key, field in HEADERS.items():
        if key in environ:
            raw: bytes = environ[key].encode("latin-1")  # how WSGI writes bytes
            try:
                yield field, raw.decode()
            except UnicodeDecodeError:
                yield field, raw


def _in_body(request: Request, *, thorough: bool) -> list[tuple[str, Any]]:
    """Return the fields in the body and leave it as if unread.

    :param thorough: parse the body even where no ``webhook_url`` is in sight: it came another way.
    """
    environ = request.environ
    if environ.get("CONTENT_LENGTH") in (None, "", "0") and "wsgi.input_terminated" not in environ:
        return []
    mimetype = request.mimetype
    if mimetype in (_FORM, _MULTIPART) and "form" in request.__dict__:
        return [pair for pair in _pairs(request.form) if pair[0] in FIELDS]
    # Hosts that call get_json(force=True) take JSON under any content type.
    is_json = request.is_json
    cached = getattr(request, "_cached_data", None)
    if cached is not None:
        body: IO[bytes] | None = io.BytesIO(cached)
        suspicious = thorough or _may_hold(cached, mimetype)
    else:
        body, suspicious = _hold(request, mimetype, peek=not is_json and mimetype not in (_FORM, _MULTIPART))
    if body is None or not (suspicious or thorough):
        return []
    found: list[tuple[str, Any]] = []
    if mimetype != _MULTIPART:
        found = _in_json(request, body)
        body.seek(0)
    if not found and mimetype in (_FORM, _MULTIPART):
        found = _in_form(request, body)
        body.seek(0)
    return found


def _in_json(request: Request, body: IO[bytes]) -> list[tuple[str, Any]]:
    if not request.is_json and not _looks_like_object(body.read(_CHUNK)):
        return []
    body.seek(0)
    try:
        value = request.json_module.loads(body.read())
    except (ValueError, RecursionError):
        return []  # what to say about bad JSON is the view's business
    if not isinstance(value, dict):
        return []
    return [(name, item) for name, item in value.items() if name in FIELDS]


def _in_form(request: Request, body: IO[bytes]) -> list[tuple[str, Any]]:
    parser = request.make_form_data_parser()
    parser.stream_factory = _nowhere
    try:
        _, form, _ = parser.parse(body, request.mimetype, request.content_length, request.mimetype_params)
    except (HTTPException, ValueError):
        return []  # too large or malformed: the view meets the same
    return [pair for pair in _pairs(form) if pair[0] in FIELDS]


def _looks_like_object(head: bytes) -> bool:
    # Whitespace, and what UTF-8, UTF-16 and UTF-32 may have before and between the characters.
    return head.lstrip(b" \t\r\n\x00\xef\xbb\xbf\xff\xfe").startswith(b"{")


def _mentions_url(data: bytes) -> bool:
    """Say whether ``webhook_url`` is in *data*, looking from underscore to underscore while there are few.

    A single byte is found fifty times as fast as a longer needle, and most bodies have hardly one.
    """
    start = 0
    for _ in range(_FEW):
        at = data.find(b"_", start)
        if at < 0:
            return False
        if at >= _UNDERSCORE and data.startswith(_NEEDLE, at - _UNDERSCORE):
            return True
        start = at + 1
    return data.find(_NEEDLE, max(start - _OVERLAP, 0)) >= 0


def _may_hold(data: bytes, mimetype: str) -> bool:
    """Say whether ``webhook_url`` can be a name in *data*; cheap, and never wrong in saying no."""
    if _mentions_url(data):
        return True
    if mimetype == _MULTIPART:
        return b"*" in data and b"name*" in data.lower()  # RFC 2231 encodes what follows
    if b"\\" in data and b"\\u00" in data:
        return True
    if mimetype == _FORM and b"%" in data and _ENCODED_LETTER.search(data) is not None:
        return True
    # The JSON module takes UTF-16 and UTF-32 as well.
    return b"\0" in data[:4] or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _hold(request: Request, mimetype: str, *, peek: bool) -> tuple[IO[bytes] | None, bool]:
    """Read the body, and put something in its place that gives the same bytes again.

    :param peek: hold the body only if it begins like a JSON object.
    :returns: the body, to be left at its beginning, or ``None`` when there is none to parse; and whether
        ``webhook_url`` may be in it.
    """
    try:
        stream = request.stream
    except HTTPException:
        return None, False  # too large; the view meets the same if it looks
    source = _Source(stream, request.content_length)
    head = source.read_up_to(_CHUNK if peek else IN_MEMORY)
    if peek:
        if not _looks_like_object(head):
            _put_back(request, _Chained(io.BytesIO(head), stream))
            return None, False
        head += source.read_up_to(IN_MEMORY - len(head))
    if source.state == "ended":
        body: IO[bytes] = io.BytesIO(head)
        _put_back(request, body)
        return body, _may_hold(head, mimetype)
    if source.state == "broken":
        _put_back(request, _Chained(io.BytesIO(head), stream))
        return None, False
    body = cast("IO[bytes]", tempfile.TemporaryFile())  # noqa: SIM115  (closed with the response)
    _close_later(request, body)
    suspicious, tail = False, b""
    while head:
        body.write(head)
        suspicious = suspicious or _may_hold(tail + head, mimetype)
        tail = head[-_OVERLAP:]
        head = source.read_up_to(_CHUNK)
    body.seek(0)
    if source.state == "broken":
        _put_back(request, _Chained(body, stream))
        return None, False
    _put_back(request, body)
    return body, suspicious


def _put_back(request: Request, body: IO[bytes] | _Chained) -> None:
    request.stream = cast("IO[bytes]", body)
    request.environ["wsgi.input"] = body


def _close_later(request: Request, spool: IO[bytes]) -> None:
    # With the response, since it may be made from the body while it is sent; where an exception leaves the
    # app there is no response, and the file goes with the request.
    weakref.finalize(request, spool.close)

    @after_this_request
    def close(response: Response) -> Response:
        response.call_on_close(spool.close)
        return response


class _Source:
    """A stream that remembers how it ended instead of raising.

    ``state`` is ``"open"``, ``"ended"``, or ``"broken"``: the client went away, or the body is as large as
    allowed and perhaps larger.

    :param length: the body's length, where the client said it.
    """

    def __init__(self, stream: IO[bytes], length: int | None) -> None:
        self._stream = stream
        self._missing = length
        self.state = "open"

    def read_up_to(self, limit: int) -> bytes:
        """Return *limit* bytes, or fewer at the end."""
        parts: list[bytes] = []
        while limit > 0 and self.state == "open":
            # Streams allocate what they are asked for, so never ask for more than there is.
            size = min(limit, _CHUNK if self._missing is None else self._missing)
            try:
                part = self._stream.read(size)
            except (HTTPException, OSError):
                self.state = "broken"
                break
            parts.append(part)
            limit -= len(part)
            if self._missing is not None:
                self._missing -= len(part)
            if not part or self._missing == 0:
                self.state = "ended"
            elif self._missing is None and _is_exhausted(self._stream):
                self.state = "broken"
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_exhausted(stream: Any) -> bool:
    # werkzeug's LimitedStream: raises, depending on how it is asked, when read beyond the largest size.
    return getattr(stream, "is_exhausted", False) is True


class _Chained(io.RawIOBase):
    """What was read of a stream, then the stream itself, with the errors it may raise."""

    def __init__(self, head: IO[bytes], rest: IO[bytes]) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        data = self._head.read()
        return data if data and _is_exhausted(self._rest) else data + self._rest.read()


class _Nowhere(io.RawIOBase):
    """Takes the content of files while only fields are looked for."""

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return 0


def _nowhere(*_args: Any, **_kwargs: Any) -> IO[bytes]:
    return cast("IO[bytes]", _Nowhere())
