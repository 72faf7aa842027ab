"""What goes out beside the dispatcher's own headers: those that are the connection's business."""

from __future__ import annotations

from .contract import AttemptRequest

#: The connection layer's own; a request's headers cannot set them.
_TRANSPORT_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "transfer-encoding"}
)


def wire_headers(request: AttemptRequest) -> dict[str, str]:
    """Return all headers but ``Host``, in order; of names that differ in case only, the last one."""
    by_name = {name.lower(): (name, value) for name, value in request.headers.items()}
    headers = dict(pair for name, pair in by_name.items() if name not in _TRANSPORT_HEADERS)
    headers["Accept-Encoding"] = "identity"
    headers["Content-Length"] = str(len(request.body))
    return headers
