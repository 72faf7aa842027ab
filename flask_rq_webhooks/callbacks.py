"""What RQ calls in users' workers when a job ends: the evidence goes to the outbox stream.

A job with a webhook carries three dotted names::

    flask_rq_webhooks.callbacks.<kind>.<endpoint id>[~<outbox length>][.<the user's own callback>]

``kind`` is ``success``, ``failure`` or ``stopped``. RQ resolves them through :func:`__getattr__`, so nothing
else needs to be stored with the job and nothing is lost when its meta is overwritten. The names live in
users' Redis: they are a promise.

The user's own callback comes first, with the arguments RQ hands in, and means to RQ what it meant before:
what it raises, RQ gets. Our own part appends one JSON entry with one command on the job's own connection.
It never raises, never sleeps, and gives up after :data:`RENDER_LIMIT_S` and :data:`APPEND_LIMIT_S`.

RQ imports this module inside every forked work-horse, so it imports only what RQ has loaded already. It
knows nothing of Flask, SQL or HTTP, nor of what becomes of an entry.
"""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from rq.utils import import_attribute

from .protocol.jsonsafe import dumps_capped, safe_text

if TYPE_CHECKING:
    from redis import Redis
    from rq.job import Job

logger = logging.getLogger(__name__)

#: First part of the stream's key; the rest is the first part of the endpoint id.
OUTBOX_KEY_PREFIX = "rq_webhooks:outbox:"
#: Entries kept in the stream when the dotted name does not say otherwise.
DEFAULT_MAXLEN = 100_000
#: Version of the entries written here.
ENTRY_VERSION = 1
#: Bytes of JSON of a result; a larger one is left out and marked.
MAX_RESULT_BYTES = 2**20
#: Characters kept of an exception's message and of its traceback.
MAX_MESSAGE_CHARS, MAX_TRACEBACK_CHARS = 10_000, 65_536
#: Characters kept of a function name, a queue name and a run id.
MAX_NAME_CHARS = 512
#: Seconds our part may take to turn the outcome into JSON, and to hand it to Redis. redis-py's own retries
#: hold a caller for 4.4 s when Redis refuses connections, and a silent server for ever.
RENDER_LIMIT_S, APPEND_LIMIT_S = 2.0, 3.0

_KINDS = ("success", "failure", "stopped")
# Compiling a pattern costs every job a fifth of a millisecond; this one is for those that were stopped.
_CALL = r"[A-Za-z_]\w*(?:\.\w+)+(?=\()"

#: The callback ``hasattr`` has just built; RQ asks for the same name with ``getattr`` right after.
_just_built: tuple[str, Callable[..., None]] | None = None


def __getattr__(name: str) -> Callable[..., None]:
    global _just_built
    kind, _, rest = name.partition(".")
    token, _, user_path = rest.partition(".")
    if kind not in _KINDS or not _is_token(token):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    known, _just_built = _just_built, None
    if known is not None and known[0] == name:
        return known[1]
    callback = _build(kind, token, user_path)
    _just_built = (name, callback)
    return callback


def _is_token(token: str) -> bool:
    """Say whether *token* is ``ep<letters and digits>_<letters and digits>``, perhaps with ``~<number>``."""
    endpoint, tilde, maxlen = token.partition("~")
    namespace, _, rest = endpoint.partition("_")
    return (
        namespace[:2] == "ep"
        and namespace[2:].isalnum()
        and rest.isalnum()
        and token.isascii()
        and token == token.lower()
        and (not tilde or (maxlen.isdigit() and len(maxlen) < 10))
    )


def _build(kind: str, token: str, user_path: str) -> Callable[..., None]:
    """Return the callback for one dotted name; what is wrong with the user's own is raised when it runs."""
    user: Callable[..., Any] | None = None
    problem: BaseException | None = None
    if user_path:
        try:
            user = import_attribute(user_path)
        except (Exception, SystemExit) as exc:  # whatever the user's module does when imported
            problem = exc
        else:
            problem = _refusal(kind, user)

    def run_user_callback(job: Job, connection: Redis, outcome: tuple[Any, ...]) -> None:
        if problem is not None:
            raise problem
        if user is not None:
            user(job, connection, *outcome)

    def tell_success(job: Job, connection: Redis, *outcome: Any) -> None:
        run_user_callback(job, connection, outcome)
        # Only now: when the user's callback raises, RQ calls the job failed and runs on_failure.
        _append(kind, token, job, connection, outcome)

    def tell(job: Job, connection: Redis, *outcome: Any) -> None:
        try:
            run_user_callback(job, connection, outcome)
        finally:
            _append(kind, token, job, connection, outcome)

    return tell_success if kind == "success" else tell


def _refusal(kind: str, user: Any) -> TypeError | None:
    """Return the error with which RQ 3 refuses a coroutine function; it cannot see through to it any more."""
    refuses = hasattr(sys.modules.get("rq.callbacks"), "execute_success_callback")
    if refuses and inspect.iscoroutinefunction(user):
        return TypeError(f"Coroutine {kind} callbacks are not supported")
    return None


# -- our own part -------------------------------------------------------------------------------------------


def _append(kind: str, token: str, job: Job, connection: Redis, outcome: tuple[Any, ...]) -> None:
    """Append what is known of the job's end to the outbox stream. Never raises for anything but a signal."""
    endpoint, _, maxlen = token.partition("~")
    key = OUTBOX_KEY_PREFIX + endpoint.partition("_")[0]
    try:
        with _Deadline(RENDER_LIMIT_S):
            text = json.dumps(_entry(kind, endpoint, job, outcome), separators=(",", ":"), allow_nan=False)
        with _Deadline(APPEND_LIMIT_S):
            connection.xadd(key, {"entry": text}, maxlen=int(maxlen or DEFAULT_MAXLEN), approximate=True)
    except (Exception, _OutOfTime) as exc:
        _log(kind, job, exc)


def _log(kind: str, job: Job, exc: BaseException) -> None:
    try:
        logger.warning(
            "Job %r: its %s callback could not append to the webhook outbox (%s: %s); "
            "the dispatcher's reconcile will report the job's end.",
            _get(lambda: safe_text(job.id)), kind, type(exc).__name__, safe_text(exc),
        )  # fmt: skip
    except Exception:  # a host's logging filter may raise; the job must not pay for it
        traceback.print_exc()


def _entry(kind: str, endpoint: str, job: Job, outcome: tuple[Any, ...]) -> dict[str, Any]:
    func, args = _call_of(kind, job, outcome)
    created_at = _get(lambda: _time(job.created_at))
    enqueued_at = _get(lambda: _time(job.enqueued_at))
    result, truncated = dumps_capped(outcome[0], MAX_RESULT_BYTES) if kind == "success" else (None, False)
    return {
        "v": ENTRY_VERSION,
        "kind": kind,
        "endpoint": endpoint,
        "job_id": job.id,
        "run": enqueued_at or f"created:{created_at}",
        "at": time.time(),
        "func": _name(func),
        "queue": _name(_get(lambda: job.origin)),
        "created_at": created_at,
        "enqueued_at": enqueued_at,
        "started_at": _get(lambda: _time(job.started_at)),
        "runid": _runid(job, args),
        "retries_left": _get(lambda: job.retries_left if isinstance(job.retries_left, int) else None),
        "result": result,
        "result_truncated": truncated,
        "error": _error(*outcome) if kind == "failure" else None,
    }


def _call_of(kind: str, job: Job, outcome: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the job's function name and positional arguments, as far as they may be looked at.

    A stopped or abandoned job did not run in this process: it is a worker that must not import the user's
    modules, so there the job's data is read only as far as plain values go.
    """
    if kind == "success" or (kind == "failure" and isinstance(outcome[-1], TracebackType)):
        return _get(lambda: job.func_name), _get(lambda: job.args)
    call = _get(lambda: _plain(job.data))
    if isinstance(call, list | tuple) and len(call) == 4:
        return call[0], call[2]
    # RQ's own description begins with the call; a user's own is not likely to look like one.
    match = re.match(_CALL, _get(lambda: job.description) or "")
    return match and match[0], None


def _plain(data: bytes) -> Any:
    if data[:1] == b"\x80":
        import io

        return _PlainUnpickler(io.BytesIO(data)).load()
    return json.loads(data)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and containers of them; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def _runid(job: Job, args: Any) -> str | None:
    runid = _get(lambda: job.meta["runid"])
    if isinstance(runid, int) and not isinstance(runid, bool):
        runid = str(runid)
    if not isinstance(runid, str):
        first = _get(lambda: args[0])
        runid = first if isinstance(first, str) else None
    return _name(runid)


def _error(kind: Any = None, value: Any = None, tb: Any = None) -> dict[str, str]:
    """Return what RQ hands to on_failure as texts; *tb* is a traceback only where the job ran here."""
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
        "type": safe_text(_get(lambda: kind.__name__) or kind, MAX_NAME_CHARS),
        "message": safe_text(value, MAX_MESSAGE_CHARS),
        "traceback": text,
    }


def _time(moment: datetime | None) -> str | None:
    """Return *moment* as RQ writes it; RQ before 2.0 hands out naive UTC."""
    if moment is None:
        return None
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _name(value: Any) -> str | None:
    """Return a text that SQL can hold as it is; ``None`` where there is none."""
    return safe_text(value.replace("\0", ""), MAX_NAME_CHARS) or None if isinstance(value, str) else None


def _get(read: Callable[[], Any]) -> Any:
    """Return ``read()``, or ``None`` where the job cannot tell."""
    try:
        return read()
    except Exception:
        return None


class _OutOfTime(BaseException):
    """Our part takes too long. No :exc:`Exception`: what we call must not take it for its own."""


class _Deadline:
    """Ends the block with :exc:`_OutOfTime` after some seconds, and keeps RQ's own alarm away from it.

    RQ's alarm limits the user's callback, which has returned by now. If it rang in here, a job that is good
    would be called failed. So it is put aside and set again for what is left of it. Signals reach the main
    thread only; in other threads, and where there are no alarms, the block takes the time it takes.

    :param limit_s: seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._watching = False
        self._previous: Any = None

    def __enter__(self) -> None:
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            return
        self._previous = signal.getsignal(signal.SIGALRM)
        if self._previous is None:  # not set from Python, so it could not be set again
            return
        self._started = time.monotonic()
        self._left_s, self._interval_s = signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._ring)
        self._watching = True
        signal.setitimer(signal.ITIMER_REAL, self._limit_s)

    def __exit__(self, *exc: object) -> None:
        self._watching = False
        if self._previous is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous)
        if self._left_s:
            # Due while we were busy: let it ring when RQ has had the time to take it back.
            left_s = max(self._left_s - (time.monotonic() - self._started), 0.05)
            signal.setitimer(signal.ITIMER_REAL, left_s, self._interval_s)

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        if self._watching:
            self._watching = False
            raise _OutOfTime(f"not done within {self._limit_s:g} s")
