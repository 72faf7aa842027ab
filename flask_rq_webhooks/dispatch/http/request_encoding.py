"""The bytes of a request: headers that belong to the connection are set here, whatever the request says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from requests.structures import CaseInsensitiveDict

from ...protocol.urls import CheckedURL
from .contract import AttemptRequest
from .transport_errors import Failure

#: Headers of the connection layer; a request's own are dropped.
_TRANSPORT_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "transfer-encoding"}
)
#: RFC 9110, 5.1 and 5.5, without the bytes above ASCII.
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")


def request_bytes(
    checked: CheckedURL,
    headers: Mapping[str, str],
    body: bytes,
    proxy_headers: Mapping[str, str] | None = None,
) -> bytes:
    """Return head and body of a request, for one write.

    :param headers: all headers but ``Host``, as :func:`wire_headers` returns them.
    :param proxy_headers: for a request that a proxy has to forward: the request line then holds the whole
        URL, and these headers are for the proxy.
    """
    netloc = checked.url[len(checked.scheme) + 3 :].partition("/")[0]
    target = checked.target if proxy_headers is None else checked.url
    head = [f"POST {target} HTTP/1.1\r\nHost: {netloc}\r\n"]
    head += [f"{name}: {value}\r\n" for name, value in headers.items()]
    head += [f"{name}: {value}\r\n" for name, value in (proxy_headers or {}).items()]
    head.append("\r\n")
    return "".join(head).encode("ascii") + body


def wire_headers(request: AttemptRequest) -> CaseInsensitiveDict[str]:
    """Return all headers but ``Host``, in order; of names that differ in case only, the last one.

    :raises Failure: ``internal``, for a name or value that must not be sent; both were validated long before.
    """
    headers: CaseInsensitiveDict[str] = CaseInsensitiveDict()
    for name, value in request.headers.items():
        if not _is_transports(name):
            headers[name] = value
    together = "".join(request.headers.values())
    if not (together.isascii() and together.isprintable()):
        for name, value in headers.items():
            if not _VALUE.fullmatch(value):
                raise Failure("internal", f"the header {name!r} has characters that must not be sent")
    headers["Accept-Encoding"] = "identity"
    headers["Content-Length"] = str(len(request.body))
    return headers


@lru_cache(maxsize=1024)
def _is_transports(name: str) -> bool:
    """Say whether the connection layer alone sets this header.

    :raises Failure: ``internal``, for what cannot be a name.
    """
    if not _NAME.fullmatch(name):
        raise Failure("internal", f"{name!r} cannot be the name of a header")
    return name.lower() in _TRANSPORT_HEADERS
