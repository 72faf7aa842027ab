"""What is told of a job that failed or was stopped: its error as texts, its call as far as it may be read.

Owns the cutting of error texts, and the reading of a job's data without importing anything the data names.
Runs inside users' workers, so it imports only what RQ has loaded already; and apart from
:mod:`flask_rq_webhooks.callbacks`, so that jobs that succeed do not pay for it.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .json_safe import safe_text

#: Characters kept of an exception's class, of its message and of its traceback.
MAX_TYPE_CHARS, MAX_MESSAGE_CHARS, MAX_TRACEBACK_CHARS = 512, 10_000, 65_536

#: How RQ's own description of a job begins. Not compiled here: most that import this never use it.
CALL = r"[A-Za-z_]\w*(?:\.\w+)+(?=\()"


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


def plain_call(job: Any) -> tuple[Any, Any]:
    """Return a job's function name and positional arguments, as far as its data is made of plain values.

    For a process that must not import the user's modules, such as a worker whose work-horse was stopped.

    :param job: an RQ job; whatever it cannot tell is ``None``.
    """
    call = _get(lambda: _plain(job.data))
    if isinstance(call, list | tuple) and len(call) == 4:
        return call[0], call[2]
    # RQ's own description begins with the call; a user's own is not likely to look like one.
    match = re.match(CALL, _get(lambda: job.description) or "")
    return match and match[0], None


def _plain(data: bytes) -> Any:
    return _PlainUnpickler(io.BytesIO(data)).load() if data[:1] == b"\x80" else json.loads(data)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and containers of them; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def _get(read: Callable[[], Any]) -> Any:
    """Return ``read()``, or ``None`` where it fails: objects of other people's programs are read here."""
    try:
        return read()
    except Exception:
        return None
