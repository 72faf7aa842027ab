"""The error of a failed job as texts of bounded length.

Runs inside users' workers, so it imports only what RQ has loaded already. A module of its own, apart from
:mod:`flask_rq_webhooks.callbacks`, so that jobs that succeed do not pay for it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .json_safe import safe_text

#: Characters kept of an exception's class, of its message and of its traceback.
MAX_TYPE_CHARS, MAX_MESSAGE_CHARS, MAX_TRACEBACK_CHARS = 512, 10_000, 65_536


def error_texts(kind: Any = None, value: Any = None, tb: Any = None) -> dict[str, str]:
    """Return what RQ hands to on_failure as ``type``, ``message`` and ``traceback``.

    :param tb: a traceback only where the job ran in this process.
    """
    full = _get(
        lambda: "".join(
            traceback.format_exception(kind, value, tb if isinstance(tb, TracebackType) else None)
        )
    )
    text = safe_text(full or "", sys.maxsize)
    if len(text) > MAX_TRACEBACK_CHARS:
        half = MAX_TRACEBACK_CHARS // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
    return {
        "type": safe_text(_get(lambda: kind.__name__) or kind, MAX_TYPE_CHARS),
        "message": safe_text(value, MAX_MESSAGE_CHARS),
        "traceback": text,
    }


def _get(read: Callable[[], Any]) -> Any:
    """Return ``read()``, or ``None`` where it fails: objects of other people's programs are read here."""
    try:
        return read()
    except Exception:
        return None
