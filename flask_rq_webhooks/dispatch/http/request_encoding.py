"""What goes out beside the dispatcher's own headers: those that are the connection's business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from ...protocol.urls import CheckedURL
from .contract import AttemptRequest
from .transport_errors import Failure

#: The connection layer's own; a request's headers cannot set them.
_TRANSPORT_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "transfer-encoding"}
)
#: RFC 9110, 5.1 and 5.5, without the bytes above ASCII.
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")


def request_bytes(
    checked: CheckedURL, request: AttemptRequest, proxy_headers: Mapping[str, str] | None = None
) -> bytes:
    """Return the whole request as it goes over the wire, head and body, for one write.

    :param proxy_headers: given when the request goes to a proxy that has to pass it on: the request line then
        names the whole URL, and these headers are the proxy's.
    :raises Failure: ``internal``, for what may not stand in a header; it was checked long before.
    """
    netloc = checked.url[len(checked.scheme) + 3 :].partition("/")[0]
    target = checked.target if proxy_headers is None else checked.url
    head = [f"POST {target} HTTP/1.1\r\nHost: {netloc}\r\n"]
    head += [f"{name}: {value}\r\n" for name, value in wire_headers(request).items()]
    head += [f"{name}: {value}\r\n" for name, value in (proxy_headers or {}).items()]
    head.append("\r\n")
    return "".join(head).encode("ascii") + request.body


def wire_headers(request: AttemptRequest) -> dict[str, str]:
    """Return all headers but ``Host``, in order; of names that differ in case only, the last one.

    :raises Failure: ``internal``, for what may not stand in a header; it was checked long before.
    """
    by_key = {_key(name): (name, value) for name, value in request.headers.items()}
    by_key.pop(None, None)
    headers = dict(by_key.values())
    together = "".join(headers.values())
    if not (together.isascii() and together.isprintable()):
        for name, value in headers.items():
            if not _VALUE.fullmatch(value):
                raise Failure("internal", f"the header {name!r} has characters that may not be sent")
    headers["Accept-Encoding"] = "identity"
    headers["Content-Length"] = str(len(request.body))
    return headers


@lru_cache(maxsize=1024)
def _key(name: str) -> str | None:
    """Return what makes a header's name unique; ``None`` for one that is not the request's to set."""
    if not _NAME.fullmatch(name):
        raise Failure("internal", f"{name!r} cannot be the name of a header")
    key = name.lower()
    return None if key in _TRANSPORT_HEADERS else key
