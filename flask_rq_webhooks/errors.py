"""Every error this package raises on purpose.

::

    RQWebhooksError
    ├── ConfigurationError        a setting is missing, contradictory or malformed (at init_app)
    ├── InvalidWebhookError       a client's webhook fields are not acceptable (HTTP 400)
    ├── BlockedURLError           a URL or address is refused by policy; has a stable ``code``
    ├── StorageUnavailableError   our SQL database cannot be reached (HTTP 503)
    ├── ErasedError               the body of a delivery was erased (HTTP 409)
    ├── OutboxEntryError          an outbox entry is malformed; it is set aside
    ├── DecryptionError           no configured key opens a stored secret
    └── SignatureError            a received webhook could not be verified

This module imports nothing, so that the callbacks in users' workers and the receiver helper can use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class RQWebhooksError(Exception):
    """Something in flask_rq_webhooks went wrong."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class ConfigurationError(RQWebhooksError):
    """A setting of flask_rq_webhooks is not usable."""


class InvalidWebhookError(RQWebhooksError):
    """The webhook fields of a request are not acceptable.

    :param details: field name → reasons, shown to the client as they are.
    """

    def __init__(
        self, message: str | None = None, *, details: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__(message)
        self.details: dict[str, list[str]] = {field: list(why) for field, why in (details or {}).items()}


class BlockedURLError(RQWebhooksError):
    """A URL or address is refused by the URL policy.

    :param code: stable machine-readable reason, e.g. ``"userinfo"``, ``"private_address"``.
    """

    def __init__(self, message: str | None = None, *, code: str = "blocked") -> None:
        super().__init__(message)
        self.code = code


class StorageUnavailableError(RQWebhooksError):
    """The SQL database of flask_rq_webhooks cannot be reached."""


class ErasedError(RQWebhooksError):
    """The body of this delivery was erased, so it cannot be sent again."""


class OutboxEntryError(RQWebhooksError):
    """An entry of the outbox stream is malformed."""


class DecryptionError(RQWebhooksError):
    """No configured encryption key opens a stored secret."""


class SignatureError(RQWebhooksError):
    """A received webhook could not be verified."""
