"""The webhook fields of a request: find them, hide them from the view, and report the result in the response.

A body that begins with ``{`` is read as JSON, an urlencoded one as a form, a multipart one by Flask's own
form parser; headers and the query string are read as well. Any other body is left alone.

If a request asks for a webhook, its body is rewritten without our fields, so that raw bytes, length and
parsed values agree. A request that asks for none is passed on unchanged.

:class:`Asked` holds the fields during the request and writes the response headers. This module knows neither
what the values mean (:mod:`.request_schema`) nor how a webhook is stored (:mod:`.register`).
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import parse_qsl

from flask import Request, Response, after_this_request, has_request_context, request
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from ..errors import InvalidWebhookError
from ..queue.job_callbacks import Attachment

logger = logging.getLogger(__name__)

URL = "webhook_url"

#: Every field with which a request can describe its webhook; all of them are hidden from the view.
FIELDS = frozenset(
    {URL, "webhook_secret", "webhook_headers", "sign_payload", "webhook_events", "webhook_format",
     "webhook_reference", "webhook_timeout", "webhook_retry_count"}
)  # fmt: skip

#: For bodies that cannot contain fields, such as a list. Key in the WSGI environment → field.
HEADERS = {
    "HTTP_X_WEBHOOK_URL": URL,
    "HTTP_X_WEBHOOK_SECRET": "webhook_secret",
    "HTTP_X_WEBHOOK_HEADERS": "webhook_headers",
}

#: Maximum bytes of a body held in memory, unless its type says that it is JSON or an urlencoded form.
IN_MEMORY = 2**20

#: Response headers: whether the jobs of a request will be reported, and which they are (the first 20).
REGISTERED_HEADER, JOB_ID_HEADER, MAX_JOB_IDS = "Webhook-Registered", "Webhook-Job-Id", 20

FORM, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data"

_Pairs = list[tuple[str, Any]]

#: What may precede a JSON object: white space, and the byte order marks of UTF-8, UTF-16 and UTF-32.
_BEFORE_JSON = b" \t\r\n\0\xef\xbb\xbf\xff\xfe"
_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def take_fields(request: Request, *, body: bool = True, hide: str = "all") -> dict[str, Any] | None:
    """Return the webhook fields of *request* and hide them from the view.

    :param body: whether to look at the body; without it, only headers and the query string count.
    :param hide: ``"all"``, or ``"parsed"`` to leave the raw bytes of the body as they are.
    :returns: raw values by field: of any JSON type from a JSON body, else text; without ``null``. ``None``
        if no webhook was asked for.
    :raises InvalidWebhookError: if a field is given twice, or is in the query string but not allowed there.
    :raises werkzeug.exceptions.RequestEntityTooLarge: for a chunked body beyond ``MAX_CONTENT_LENGTH``.
    """
    in_query: _Pairs = []
    if b"webhook" in request.query_string or b"%" in request.query_string:
        in_query = [pair for pair in _pairs(request.args) if pair[0] in FIELDS]
    elsewhere = [*_in_headers(request.environ), *in_query]
    asked = any(name == URL for name, _ in elsewhere)
    found = _look(request, asked=asked) if body else _Body()
    if not asked and not any(name == URL and value is not None for name, value in found.fields):
        return None
    if found.fields:
        found.hide(hide == "all")
    if in_query:
        request.args = _without_pairs(request.args)
    request.__dict__.pop("values", None)
    fields: dict[str, Any] = {}
    details: dict[str, list[str]] = {}
    for name, value in [*found.fields, *elsewhere]:
        if isinstance(value, bytes):
            details[name] = ["Not valid UTF-8."]
        if name in fields:
            details[name] = ["Given more than once."]
        if value is not None:
            fields[name] = value
    for name, _ in in_query:
        if name != URL:
            # Query strings end up in access logs and browser histories.
            details[name] = ["May not be sent in the query string; send it in the body."]
    if details:
        raise InvalidWebhookError("The webhook fields of the request are not acceptable.", details=details)
    return fields


@dataclass(slots=True)
class _Body:
    """The fields found in the body.

    :param hide: removes the fields; its argument says whether to remove them from the raw bytes, too.
    """

    fields: _Pairs = field(default_factory=list)
    hide: Callable[[bool], None] = lambda raw: None


def _look(request: Request, *, asked: bool) -> _Body:
    """Return the fields in the body, and leave the body as if it had not been read."""
    environ = request.environ
    if environ.get("CONTENT_LENGTH") in (None, "", "0") and "wsgi.input_terminated" not in environ:
        return _Body()
    mimetype = request.mimetype
    is_form = mimetype in (FORM, MULTIPART)
    data = _read(request, mimetype)
    if is_form and "form" in request.__dict__ and data is None:
        pass  # parsed before us, for example by a CSRF check
    elif mimetype == MULTIPART:
        return _in_multipart(request, data)
    elif data is None or not (asked or _may_name_url(data)):
        return _Body()
    else:
        splits = [_split_json]
        if mimetype == FORM and len(data) <= (request.max_form_memory_size or len(data)):
            splits.append(_split_form)
        for split in splits:
            fields, rest = split(data)
            if fields:
                return _Body(fields, partial(_hide, request, data, rest, split))
        return _Body()
    return _Body(
        [pair for pair in _pairs(request.form) if pair[0] in FIELDS], lambda raw: _hide_form(request)
    )


def _read(request: Request, mimetype: str) -> bytes | None:
    """Return the body and put it back; ``None`` if we should not or cannot read it."""
    cached: bytes | None = getattr(request, "_cached_data", None)
    if cached is not None:
        return cached
    if mimetype in (FORM, MULTIPART) and "form" in request.__dict__:
        return None
    length = request.content_length
    if not request.is_json and mimetype != FORM and (length is None or length > IN_MEMORY):
        return None
    try:
        stream = request.stream
        # In one piece: when reading to the end, werkzeug reads many pieces and copies them again and again.
        data = stream.read(min(length, IN_MEMORY)) if length else b""
        if length is None or len(data) < length:
            data += stream.read()
    except (HTTPException, OSError):
        return None  # too large, or the client is gone: if the view reads, it gets the same error
    if length is None and getattr(request.stream, "is_exhausted", False):
        raise RequestEntityTooLarge  # a chunked body, cut at MAX_CONTENT_LENGTH
    _put_back(request, data)
    return data


def _put_back(request: Request, data: bytes) -> None:
    request.stream = request.environ["wsgi.input"] = io.BytesIO(data)


# -- what one request asks for ------------------------------------------------------------------------------


class Asked:
    """What one request asks for, and what its response says about it.

    :ivar has_fields: whether the request asks for a webhook explicitly.
    :ivar decorated: whether a decorated function has run.
    :ivar attachment: of the request's own webhook, once it is registered.
    :ivar watched: ids of the jobs passed to ``watch``, whether or not a webhook was asked for.
    """

    def __init__(self, asking: Request) -> None:
        self._request = asking
        self._taken: dict[str, Any] | InvalidWebhookError | None = None
        self._is_taken = False
        self._response: Response | None = None
        self._job_ids: dict[str, None] = {}
        self._registered = False
        self._why_not: str | None = None
        self.has_fields = False
        self.decorated = False
        self.attachment: Attachment | None = None
        self.watched: set[str] = set()

    def fields(self, *, body: bool, hide: str) -> Mapping[str, Any] | None:
        """Return the request's webhook fields, taken from it at the first call; ``None`` if it has none.

        :raises InvalidWebhookError: at every call, if the fields cannot be taken.
        """
        if not self._is_taken:
            self._is_taken = True
            try:
                self._taken = take_fields(self._request, body=body, hide=hide)
            except InvalidWebhookError as exc:
                self._taken = exc
            if self._taken is not None:
                self.mark_response()
        if isinstance(self._taken, InvalidWebhookError):
            raise self._taken
        return self._taken

    def mark_response(self) -> None:
        """Let the response say whether a webhook was registered."""
        if not self.has_fields:
            self.has_fields = True
            after_this_request(self._mark)

    def note(self, job_ids: Sequence[str], why_not: str | None = None) -> None:
        """Note which jobs will be reported, or why none will be.

        :param why_not: for the log; ``None`` if the log says it already.
        """
        self._job_ids.update(dict.fromkeys(job_ids))
        self._registered = self._registered or bool(job_ids)
        self._why_not = why_not or self._why_not
        if self._response is not None:  # after_request functions of the app run later than ours
            self._write(self._response)

    def _mark(self, response: Response) -> Response:
        self._response = response
        self._write(response)
        if self._why_not and not self._registered and response.status_code < 400:
            logger.warning(
                "A webhook was asked for, and nothing will be reported: view %r of %s: %s.",
                self._request.endpoint, self._request.url_rule, self._why_not,
            )  # fmt: skip
        return response

    def _write(self, response: Response) -> None:
        response.headers[REGISTERED_HEADER] = "true" if self._registered else "false"
        # Ids that would not survive in a header are left out.
        ids = [job_id for job_id in self._job_ids if job_id.isascii() and job_id.isprintable()]
        ids = [job_id for job_id in ids if "," not in job_id][:MAX_JOB_IDS]
        if ids:
            response.headers[JOB_ID_HEADER] = ", ".join(ids)


def asked_in_request() -> Asked | None:
    """Return what the current request asks for; ``None`` outside of a request."""
    if not has_request_context():
        return None
    # The request object itself: an attribute set on its proxy does not last.
    this_request = cast(Request, request._get_current_object())  # type: ignore[attr-defined]
    asked = this_request.__dict__.get("_rq_webhooks_asked")
    if asked is None:
        asked = this_request.__dict__["_rq_webhooks_asked"] = Asked(this_request)
    return cast(Asked, asked)


# -- finding ------------------------------------------------------------------------------------------------


def _in_headers(environ: dict[str, Any]) -> Iterable[tuple[str, str | bytes]]:
    """Yield the fields in the headers; as bytes if they are not UTF-8."""
    for key, name in HEADERS.items():
        if key in environ:
            raw: bytes = environ[key].encode("latin-1")  # how WSGI writes bytes
            try:
                yield name, raw.decode()
            except UnicodeDecodeError:
                yield name, raw


def _may_name_url(data: bytes) -> bool:
    """Return whether ``webhook_url`` may be a name in *data*, perhaps escaped; cheaper than parsing it."""
    # Searching one byte is ten times as fast as searching several: most bodies have neither of these two.
    is_escaped = b"%" in data or (b"\\" in data and b"\\u00" in data)
    return is_escaped or URL.encode() in data or b"\0" in data[:4]


def _split_json(data: bytes) -> tuple[_Pairs, bytes]:
    """Return the webhook fields of a JSON object, and the object without them; all else stays as written.

    Anything but a JSON object has none: responding to bad JSON is left to the view.
    """
    fields: _Pairs = []
    if not data.lstrip(_BEFORE_JSON).startswith(b"{"):
        return fields, data
    try:
        encoding = json.detect_encoding(data)
        text = data.decode(encoding, "surrogatepass")
        kept: list[str] = []
        at = _after_space(text, 0)
        if text[at] != "{":
            return fields, data
        at = _after_space(text, at + 1)
        while text[at] != "}" or kept or fields:  # a comma needs a member after it
            start = at
            name, at = _decode(text, at)
            at = _after_space(text, at)
            if not isinstance(name, str) or text[at] != ":":
                return [], data
            value, at = _decode(text, _after_space(text, at + 1))
            if name in FIELDS:
                fields.append((name, value))
            else:
                kept.append(text[start:at])
            at = _after_space(text, at)
            if text[at] == "}":
                break
            if text[at] != ",":
                return [], data
            at = _after_space(text, at + 1)
        if _after_space(text, at + 1) != len(text):
            return [], data
    except (ValueError, IndexError, RecursionError):
        return [], data
    return fields, f"{{{', '.join(kept)}}}".encode(encoding, "surrogatepass")


def _after_space(text: str, at: int) -> int:
    if text[at : at + 1] not in " \t\n\r":  # the usual case; a search takes longer
        return at
    match = _SPACE.match(text, at)
    assert match is not None  # noqa: S101  (also matches the empty string)
    return match.end()


def _split_form(data: bytes) -> tuple[_Pairs, bytes]:
    """Return the webhook fields of an urlencoded form, and the form without them, otherwise unchanged."""
    fields: _Pairs = []
    kept = []
    for piece in data.split(b"&"):
        pairs = parse_qsl(piece.decode("utf-8", "replace"), keep_blank_values=True)
        if pairs and pairs[0][0] in FIELDS:
            fields += pairs
        else:
            kept.append(piece)
    return fields, b"&".join(kept)


def _in_multipart(request: Request, data: bytes | None) -> _Body:
    """Read a multipart form with Flask's own parser; files of a large one go where Flask puts them."""
    try:
        request.stream  # noqa: B018  (raises if the body is larger than allowed: the view gets the same)
    except HTTPException:
        return _Body()
    try:
        fields = [pair for pair in _pairs(request.form) if pair[0] in FIELDS]
    except HTTPException:
        if data is None:
            raise  # cannot be read again: Flask's own error response
        fields = []

    def hide(raw: bool) -> None:
        _hide_form(request)
        if data is not None:
            _put_back(request, data)

    if data is not None:
        request.close()  # files are parsed again for the view
        _unparse(request)
        _put_back(request, data)
    return _Body(fields, hide)


# -- hiding -------------------------------------------------------------------------------------------------


def _hide(
    request: Request, data: bytes, rest: bytes, split: Callable[[bytes], tuple[_Pairs, bytes]], raw: bool
) -> None:
    _unparse(request)
    if raw:
        if getattr(request, "_cached_data", None) is not None:
            request._cached_data = rest
        _put_back(request, rest)
        if request.environ.get("CONTENT_LENGTH"):
            request.environ["CONTENT_LENGTH"] = str(len(rest))
    elif split is _split_json:
        request.json_module = _JSONWithoutFields(request.json_module)
    else:
        _hide_form(request)
        _put_back(request, data)


def _hide_form(request: Request) -> None:
    request.form = _without_pairs(request.form)


def _unparse(request: Request) -> None:
    """Forget what was parsed of the body, so that it is parsed again."""
    for name in ("data", "form", "files", "_cached_json", "content_length"):
        request.__dict__.pop(name, None)


class _JSONWithoutFields:
    """Replaces ``request.json_module``, through which every call of ``get_json`` goes."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def loads(self, data: bytes, **kwargs: Any) -> Any:
        return self._module.loads(_split_json(data)[1], **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _pairs(values: Any) -> Iterable[tuple[str, Any]]:
    # A host may have chosen a storage class with one value per name.
    return values.items(multi=True) if isinstance(values, MultiDict) else values.items()


def _without_pairs(values: Any) -> Any:
    return type(values)([pair for pair in _pairs(values) if pair[0] not in FIELDS])
