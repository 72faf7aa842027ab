"""Every transport there is; the hostile suite runs over all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from flask_rq_webhooks.dispatch.http import RequestsTransport
from flask_rq_webhooks.dispatch.http.through_aiohttp import AiohttpTransport

AnyTransport = RequestsTransport | AiohttpTransport

CLASSES: dict[str, Callable[..., AnyTransport]] = {
    "requests": RequestsTransport,
    "aiohttp": AiohttpTransport,  # on uvloop, which comes with the extra `fast`
    "aiohttp-on-asyncio": partial(AiohttpTransport, loop_factory=asyncio.new_event_loop),
}
