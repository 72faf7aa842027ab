"""Which transport the settings ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...config import Settings
from ...errors import ConfigurationError
from ...protocol.urls import UrlPolicy
from .client import RequestsTransport

if TYPE_CHECKING:
    from .through_aiohttp import AiohttpTransport


def open_transport(
    settings: Settings, policy: UrlPolicy, *, concurrency: int
) -> RequestsTransport | AiohttpTransport:
    """Return the transport of ``TRANSPORT``, to be closed by the caller.

    :param concurrency: requests in flight at most.
    :raises ConfigurationError: when it needs something that is not installed.
    """
    if settings.transport == "requests":
        return RequestsTransport(policy, concurrency=concurrency, proxy_url=settings.proxy_url)
    try:
        from .through_aiohttp import AiohttpTransport
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"RQ_WEBHOOKS_TRANSPORT is {settings.transport!r}, and {exc.name} is not installed. Install the "
            "extra: pip install 'flask-rq-webhooks[fast]'."
        ) from exc
    return AiohttpTransport(policy, concurrency=concurrency, proxy_url=settings.proxy_url)
