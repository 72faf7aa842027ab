"""What RQ's own record of a failure says: type, message and traceback from a text.

Pure. RQ keeps the formatted traceback of an exception, or one sentence of its own where there was none
(the work-horse died, the job was abandoned).
"""

from __future__ import annotations

import re

_EXCEPTION = re.compile(r"(?P<type>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?::\s?(?P<message>.*))?", re.DOTALL)
_TRACEBACK = "Traceback (most recent call last):"

#: How a sentence of RQ's own begins or what it contains → the type we give it. RQ 1.16 to 3.0.
_SENTENCES = (
    ("Work-horse terminated unexpectedly", "WorkHorseTerminated"),
    ("Work-horse process was terminated unexpectedly", "WorkHorseTerminated"),
    ("due to AbandonedJobError", "AbandonedJobError"),
    ("stuck in intermediate queue", "StuckInIntermediateQueue"),
)


def error_from_text(text: str | None) -> dict[str, str]:
    """Return ``{"type", "message", "traceback"}`` from the text RQ keeps of a failure.

    :param text: a formatted traceback, a sentence of RQ's own, or ``None`` where RQ kept nothing, as after a
        job that returned ``Retry`` too often.
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
    """Return type and message: what follows the last frame, where messages may have lines of their own."""
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    start = frames[-1] + 1 if frames else 0
    while start < len(lines) - 1 and lines[start].startswith(" "):
        start += 1
    match = _EXCEPTION.fullmatch("\n".join(lines[start:]))
    if match is None:
        return "UnknownError", lines[-1].strip()
    return match["type"].rpartition(".")[2], match["message"] or ""
