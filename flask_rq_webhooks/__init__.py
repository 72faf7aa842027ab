"""Webhooks for RQ jobs submitted through Flask.

Public names are loaded on first use (:pep:`562`): RQ imports :mod:`flask_rq_webhooks.callbacks` inside
every forked work-horse, and whatever this module imports is paid for once per job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import BlockedURLError as BlockedURLError
    from .errors import ConfigurationError as ConfigurationError
    from .errors import InvalidWebhookError as InvalidWebhookError
    from .errors import RQWebhooksError as RQWebhooksError
    from .errors import SignatureError as SignatureError
    from .errors import StorageUnavailableError as StorageUnavailableError
    from .extension import RQWebhooks as RQWebhooks
    from .queue.job_callbacks import Queue as Queue
    from .version import __version__ as __version__

_EXPORTS = {
    "Queue": "queue.job_callbacks",
    "RQWebhooks": "extension",
    "BlockedURLError": "errors",
    "ConfigurationError": "errors",
    "InvalidWebhookError": "errors",
    "RQWebhooksError": "errors",
    "SignatureError": "errors",
    "StorageUnavailableError": "errors",
    "__version__": "version",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604  (names are known to type checkers above)


def __getattr__(name: str) -> Any:
    module_name = _EXPORTS.get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{module_name}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
