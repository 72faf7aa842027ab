"""Every transport there is; the hostile suite runs over all of them."""

from __future__ import annotations

from collections.abc import Callable

from flask_rq_webhooks.delivery.transport import RequestsTransport
from flask_rq_webhooks.delivery.transport.through_aiohttp import AiohttpTransport

AnyTransport = RequestsTransport | AiohttpTransport

CLASSES: dict[str, Callable[..., AnyTransport]] = {
    "requests": RequestsTransport,
    "aiohttp": AiohttpTransport,
}
