"""The callbacks that RQ calls in users' workers when a job ends; they write evidence to the outbox stream.

A job with a webhook carries three dotted names::

    flask_rq_webhooks.callbacks.<kind>.<endpoint id>[~<outbox length>[n]][.<the user's own callback>]

``kind`` is ``success``, ``failure`` or ``stopped``; ``n`` says that no argument of the job names its run. RQ
resolves them through :func:`__getattr__`, so nothing else needs to be stored with the job and nothing is lost
when its meta is overwritten. The names are stored in users' Redis, so their form must not change.

The user's own callback runs first, with the arguments that RQ passes, and has the same effect on RQ as
before: RQ gets what it raises. Our part appends one JSON entry with one command on the job's own connection.
It never raises, never sleeps, and gives up after :data:`RENDER_LIMIT_S` and :data:`APPEND_LIMIT_S`.

RQ imports this module inside every forked work-horse, so every job pays for every line of it. Therefore it
imports only what RQ has already loaded, builds nothing at import, and leaves what a job with a plain
successful result does not need to modules that are imported on demand. It does not know about Flask, SQL or
HTTP, or what happens to an entry.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from datetime import UTC
from types import TracebackType
from typing import TYPE_CHECKING

from rq.utils import import_attribute

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

    from redis import Redis
    from rq.job import Job

#: First part of the stream's key; the rest is the first part of the endpoint id.
OUTBOX_KEY_PREFIX = "rq_webhooks:outbox:"
#: Entries kept in the stream when the dotted name does not say otherwise.
DEFAULT_MAXLEN = 100_000
#: Version of the entries written here.
ENTRY_VERSION = 1
#: Maximum bytes of JSON of a result; a larger one is left out and marked.
MAX_RESULT_BYTES = 2**20
#: Maximum characters kept of a function name, a queue name and a run id.
MAX_NAME_CHARS = 512
#: Maximum characters of a first argument that may name a run; a longer one is content.
MAX_ARGUMENT_CHARS = 128
#: Seconds our part may take to turn the outcome into JSON, and to pass it to Redis. redis-py's own retries
#: block the caller for 4.4 s if Redis refuses connections, and a silent server blocks it forever.
RENDER_LIMIT_S, APPEND_LIMIT_S = 2.0, 3.0

_KINDS = ("success", "failure", "stopped")
#: Maximum number of values and characters, and maximum nesting, of a result that is reported unconverted.
_PLAIN_SIZE, _PLAIN_DEPTH = 20_000, 10

#: The callback that ``hasattr`` has just built; RQ calls ``getattr`` for the same name right after.
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
    """Return whether *token* is ``ep<letters and digits>_<letters and digits>``, optionally with
    ``~<number>`` and an ``n``."""
    endpoint, tilde, maxlen = token.partition("~")
    namespace, _, rest = endpoint.partition("_")
    return (
        namespace[:2] == "ep"
        and namespace[2:].isalnum()
        and rest.isalnum()
        and token.isascii()
        and token == token.lower()
        and (not tilde or (maxlen.removesuffix("n").isdigit() and len(maxlen) <= 10))
    )


def _build(kind: str, token: str, user_path: str) -> Callable[..., None]:
    """Return the callback for one dotted name; errors in the user's callback are raised when it runs."""
    user: Callable[..., Any] | None = None
    problem: BaseException | None = None
    if user_path:
        try:
            user = import_attribute(user_path)
        except (Exception, SystemExit) as exc:  # the user's module may do anything when imported
            problem = exc
        else:
            problem = _refusal(kind, user)

    def run_user_callback(job: Job, connection: Redis, outcome: tuple[Any, ...]) -> None:
        if problem is not None:
            raise problem
        if user is not None:
            user(job, connection, *outcome)

    def report_success(job: Job, connection: Redis, *outcome: Any) -> None:
        run_user_callback(job, connection, outcome)
        # Append only now: if the user's callback raises, RQ marks the job failed and runs on_failure.
        _append(kind, token, job, connection, outcome)

    def report(job: Job, connection: Redis, *outcome: Any) -> None:
        try:
            run_user_callback(job, connection, outcome)
        finally:
            _append(kind, token, job, connection, outcome)

    return report_success if kind == "success" else report


def _refusal(kind: str, user: Any) -> TypeError | None:
    """Return the error with which RQ 3 refuses a coroutine function: behind our callback RQ cannot see it."""
    import inspect

    refuses = hasattr(sys.modules.get("rq.callbacks"), "execute_success_callback")
    if refuses and inspect.iscoroutinefunction(user):
        return TypeError(f"Coroutine {kind} callbacks are not supported")
    return None


# -- our own part -------------------------------------------------------------------------------------------


def _append(kind: str, token: str, job: Job, connection: Redis, outcome: tuple[Any, ...]) -> None:
    """Append what is known about the job's end to the outbox stream. Never raises, except for a signal."""
    endpoint, _, options = token.partition("~")
    maxlen = int(options.removesuffix("n") or DEFAULT_MAXLEN)
    key = OUTBOX_KEY_PREFIX + endpoint.partition("_")[0]
    try:
        _in_turn(
            (RENDER_LIMIT_S, lambda _none: _entry(kind, endpoint, job, outcome, options.endswith("n"))),
            (
                APPEND_LIMIT_S,
                lambda text: connection.xadd(key, {"entry": text}, maxlen=maxlen, approximate=True),
            ),
        )
    except (Exception, _OutOfTime) as exc:
        _log(kind, job, exc)


def _log(kind: str, job: Job, exc: BaseException) -> None:
    import logging
    import traceback

    try:
        from .protocol.json_safe import safe_text

        job_id = _get(job, "id")
        logging.getLogger(__name__).warning(
            "Job %r: its %s callback could not append to the webhook outbox (%s: %s); "
            "the dispatcher's reconcile will report the job's end.",
            job_id and safe_text(job_id), kind, type(exc).__name__, safe_text(exc),
        )  # fmt: skip
    except Exception:  # a host's logging filter may raise; the job must not pay for it
        traceback.print_exc()


def _entry(kind: str, endpoint: str, job: Job, outcome: tuple[Any, ...], ignores_argument: bool) -> str:
    """Return the entry as JSON."""
    func, argument = _call_of(kind, job, outcome)
    created_at, enqueued_at = _time(job, "created_at"), _time(job, "enqueued_at")
    retries_left = _get(job, "retries_left")
    result, truncated = _result(outcome[0]) if kind == "success" else (None, False)
    entry = {
        "v": ENTRY_VERSION,
        "kind": kind,
        "endpoint": endpoint,
        "job_id": job.id,
        "run": enqueued_at or f"created:{created_at}",
        "at": time.time(),
        "func": _name(func),
        "queue": _name(_get(job, "origin")),
        "created_at": created_at,
        "enqueued_at": enqueued_at,
        "started_at": _time(job, "started_at"),
        "runid": _name(run_name(_item(_get(job, "meta"), "runid"), None if ignores_argument else argument)),
        "retries_left": retries_left if isinstance(retries_left, int) else None,
        "result": result,
        "result_truncated": truncated,
        "error": _error(outcome) if kind == "failure" else None,
    }
    if "opentelemetry.trace" in sys.modules and (trace := _trace()):
        entry["trace"] = trace
    return json.dumps(entry, separators=(",", ":"), allow_nan=False)


def _trace() -> str | None:
    """Return the trace of the span in which RQ calls us, if the worker is instrumented."""
    try:
        span = sys.modules["opentelemetry.trace"].get_current_span()
        if not span.get_span_context().is_valid:
            return None
        from .tracing import trace_of

        trace: str | None = trace_of(span)
        return trace
    except Exception:
        try:
            import logging

            logging.getLogger(__name__).warning("The trace of a job's worker is unknown.", exc_info=True)
        except Exception:  # noqa: S110  (a host's logging filter may raise; the job must not pay for it)
            pass
        return None


def _call_of(kind: str, job: Job, outcome: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the job's function name and its first positional argument, as far as they may be read.

    A stopped or abandoned job did not run in this process: this is a worker that must not import the user's
    modules, so it reads only plain values from the job's data.
    """
    if kind == "success" or (kind == "failure" and isinstance(outcome[-1], TracebackType)):
        return _get(job, "func_name"), _item(_get(job, "args"), 0)
    from .queue.safe_pickle import plain_call

    return plain_call(_get(job, "data") or b"", _get(job, "description"))


def _error(outcome: tuple[Any, ...]) -> dict[str, str]:
    from .protocol.job_errors import error_texts

    return error_texts(*outcome)


def _result(value: Any) -> tuple[Any, bool]:
    """Return *value* in a form that JSON can hold, and whether it was left out because it is too large."""
    if _is_plain(value):
        return value, False
    from .protocol.json_safe import dumps_capped

    return dumps_capped(value, MAX_RESULT_BYTES)


def _is_plain(value: Any) -> bool:
    """Return whether *value* is small and valid JSON already, so that converting it would change nothing."""
    left = _PLAIN_SIZE
    level = [value]
    for _ in range(_PLAIN_DEPTH):
        deeper: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str or kind is dict or kind is list or kind is tuple:
                left -= len(item)
                if left < 0:
                    return False
            if kind is dict:
                if any(type(key) is not str for key in item):
                    return False
                deeper += item
                deeper += item.values()
            elif kind is list or kind is tuple:
                deeper += item
            elif kind is str:
                if not item.isascii():
                    return False
            elif kind is int:
                if item.bit_length() > 64:
                    return False
            elif kind is float:
                if item - item != 0:  # NaN and infinities
                    return False
            elif item is not None and kind is not bool:
                return False
        if not deeper:
            return True
        level = deeper
    return False


def run_name(runid: Any, argument: Any) -> str | None:
    """Return the host's name for a run; the same rule for callbacks, reconcile and requests.

    :param runid: ``job.meta["runid"]``, a string or an integer.
    :param argument: the job's first positional argument: used if there is no *runid* and it is a string that
        looks like a name and not like content (SQL, the subject of an e-mail).
    """
    if isinstance(runid, int) and not isinstance(runid, bool):
        return str(runid)
    if isinstance(runid, str):
        return runid
    if isinstance(argument, str) and len(argument) <= MAX_ARGUMENT_CHARS and argument.split() == [argument]:
        return argument
    return None


def _time(job: Job, name: str) -> str | None:
    """Return one of the job's times as RQ writes it; RQ before 2.0 returns naive UTC."""
    moment = _get(job, name)
    try:
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
        return f"{moment.isoformat(timespec='microseconds')}Z"
    except Exception:
        return None


def _name(value: Any) -> str | None:
    """Return a string that SQL can store unchanged; ``None`` if there is no string."""
    if not isinstance(value, str):
        return None
    text = value.replace("\0", "")
    if type(text) is not str or len(text) > MAX_NAME_CHARS or not text.isascii():
        from .protocol.json_safe import safe_text

        text = safe_text(text, MAX_NAME_CHARS)
    return text or None


def _get(job: Job, name: str) -> Any:
    """Return an attribute of *job*, or ``None`` if it cannot be read."""
    try:
        return getattr(job, name)
    except Exception:
        return None


def _item(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except Exception:
        return None


class _OutOfTime(BaseException):
    """Our part takes too long. Not an :exc:`Exception`, so that the code we call does not catch it as one."""


def _in_turn(*steps: tuple[float, Callable[[Any], Any]]) -> None:
    """Run steps, each with the previous one's result, and end each with :exc:`_OutOfTime` after its time.

    RQ's alarm limits the user's callback, which has returned by now. If the alarm rang in here, a good job
    would be marked failed. So it is suspended and then set again for the rest of its time. Signals reach only
    the main thread; in other threads, and where there are no alarms, the steps have no time limit.

    :param steps: pairs of a limit in seconds and the function to call within it.
    """
    value = None
    previous = None
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        previous = signal.getsignal(signal.SIGALRM)
    if previous is None:  # or the handler was not set from Python and could not be restored
        for _limit_s, step in steps:
            value = step(value)
        return
    limit_s = 0.0
    watching = False

    def ring(_number: int, _frame: FrameType | None) -> None:
        nonlocal watching
        if watching:
            watching = False
            raise _OutOfTime(f"not done within {limit_s:g} s")

    started = time.monotonic()
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, ring)
    try:
        for limit_s, step in steps:
            watching = True
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            value = step(value)
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left_s:
            # If it came due while we were busy, let it ring only after RQ has had time to cancel it.
            left_s = max(left_s - (time.monotonic() - started), 0.05)
            signal.setitimer(signal.ITIMER_REAL, left_s, interval_s)
