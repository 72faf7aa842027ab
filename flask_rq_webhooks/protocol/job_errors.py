"""The error of a failed job as ``type``, ``message`` and ``traceback``: from an exception or from RQ's text.

:func:`error_texts` runs inside users' workers, so this module imports only what RQ has already loaded. It is
separate from :mod:`flask_rq_webhooks.callbacks` so that successful jobs need not import it.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .json_safe import safe_text

_EXCEPTION = re.compile(r"(?P<type>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?::\s?(?P<message>.*))?", re.DOTALL)
_TRACEBACK = "Traceback (most recent call last):"

_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)

#: Beginning or part of an RQ message → the error type we give it. RQ 1.16 to 3.0.
_SENTENCES = (
    ("Work-horse terminated unexpectedly", "WorkHorseTerminated"),
    ("Work-horse process was terminated unexpectedly", "WorkHorseTerminated"),
    ("due to AbandonedJobError", "AbandonedJobError"),
    ("stuck in intermediate queue", "StuckInIntermediateQueue"),
)


def error_from_text(text: str | None) -> dict[str, str]:
    """Return ``{"type", "message", "traceback"}`` from the text RQ keeps of a failure.

    :param text: a formatted traceback, a message of RQ's own, or ``None`` if RQ kept nothing, for example
        after a job that returned ``Retry`` too often.
    """
    stripped = (text or "").strip()
    if not stripped:
        return {"type": "UnknownError", "message": "RQ recorded no reason.", "traceback": ""}
    if _TRACEBACK not in stripped:
        for sentence, name in _SENTENCES:
            if sentence in stripped:
                return {"type": name, "message": stripped.rstrip("; "), "traceback": ""}
    name, message = _exception(stripped)
    return {"type": name, "message": message, "traceback": text or ""}


def _exception(text: str) -> tuple[str, str]:
    """Return type and message. A message may have several lines, and so may the notes that follow it."""
    lines = text.splitlines()
    start = 0
    while (ending := _exception_line(lines, start)) is not None:
        start = ending
        # Another exception follows if this one was its cause or was being handled.
        chained = next((number for number in range(start, len(lines)) if lines[number] in _CHAINED), None)
        if chained is None:
            break
        start = chained
    own = _undrawn(lines[start:])
    match = _EXCEPTION.fullmatch("\n".join(own))
    if match is None:
        return "UnknownError", lines[-1].strip()
    return match["type"].rpartition(".")[2], match["message"] or ""


def _exception_line(lines: list[str], start: int) -> int | None:
    """Return the line of the next traceback's exception: the first line that is not indented."""
    header = next((number for number in range(start, len(lines)) if _is_header(lines[number])), None)
    if header is None:
        return None
    bar = "  | " if lines[header].lstrip().startswith("+") else ""
    for number in range(header + 1, len(lines)):
        line = lines[number].removeprefix(bar)
        if line and not line.startswith(" "):
            return number
    return None


def _is_header(line: str) -> bool:
    # The first line of the text was stripped of its indentation. Deeper headers are those of group members.
    return line in (_TRACEBACK, f"+ Exception Group {_TRACEBACK}", f"  + Exception Group {_TRACEBACK}")


def _undrawn(lines: list[str]) -> list[str]:
    """Return the lines of one exception; for a group, those after its bar, without its members."""
    if not lines or not lines[0].startswith("  | "):
        return lines
    own = []
    for line in lines:
        if not line.startswith("  | "):
            break
        own.append(line.removeprefix("  | "))
    return own


# -- from an exception ------------------------------------------------------------------------------------

#: Maximum characters kept of an exception's class, message and traceback.
MAX_TYPE_CHARS, MAX_MESSAGE_CHARS, MAX_TRACEBACK_CHARS = 512, 10_000, 65_536


def error_texts(kind: Any = None, value: Any = None, tb: Any = None) -> dict[str, str]:
    """Return what RQ passes to on_failure as ``type``, ``message`` and ``traceback``.

    :param tb: a traceback only if the job ran in this process.
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
    """Return ``read()``, or ``None`` if it fails: it reads objects of other people's programs."""
    try:
        return read()
    except Exception:
        return None
