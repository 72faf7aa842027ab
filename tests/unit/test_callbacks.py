"""The callbacks alone: names, the user's own part, the entry, and that nothing comes out of ours."""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from rq.job import Job
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty
from rq.utils import import_attribute

from flask_rq_webhooks import callbacks
from flask_rq_webhooks.protocol import job_errors
from flask_rq_webhooks.protocol.json_safe import dumps_capped
from flask_rq_webhooks.queue.outbox_entry import parse_entry

ENDPOINT = "ep" + "n" * 8 + "_" + "0" * 26
SUCCESS = f"flask_rq_webhooks.callbacks.success.{ENDPOINT}"
FAILURE = f"flask_rq_webhooks.callbacks.failure.{ENDPOINT}"
STOPPED = f"flask_rq_webhooks.callbacks.stopped.{ENDPOINT}"
HERE = "tests.unit.test_callbacks"
REFUSES_COROUTINES = int(import_attribute("rq.version.VERSION").split(".")[0]) >= 3

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)


class Stream:
    """Stands for a Redis client: keeps what is appended."""

    def __init__(self, on_append: Callable[[], Any] = lambda: None) -> None:
        self.appended: list[tuple[str, str, dict[str, Any]]] = []
        self._on_append = on_append

    def xadd(self, key: str, fields: dict[str, str], **options: Any) -> bytes:
        self._on_append()
        assert list(fields) == ["entry"]
        self.appended.append((key, fields["entry"], options))
        return b"1-0"

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(text) for _key, text, _options in self.appended]


def a_job(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "id": "job-1",
        "func_name": "tests.jobs.run",
        "args": ("basin-7", 2),
        "kwargs": {},
        "meta": {},
        "origin": "default",
        "description": "tests.jobs.run('basin-7', 2)",
        "created_at": MOMENT.replace(second=1),
        "enqueued_at": MOMENT,
        "started_at": MOMENT.replace(second=6),
        "retries_left": None,
    }
    return SimpleNamespace(**(values | changes))


def exc_info_of(function: Callable[[], Any]) -> tuple[Any, Any, Any]:
    try:
        function()
    except BaseException:
        return sys.exc_info()
    raise AssertionError("nothing raised")


def raise_value_error() -> None:
    raise ValueError("no such basin")


calls: list[tuple[Any, ...]] = []


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    calls.clear()
    yield
    calls.clear()


def note(*args: Any) -> None:
    calls.append(args)


def raise_lookup_error(*args: Any) -> None:
    calls.append(args)
    raise LookupError("the user's own")


async def coroutine(*args: Any) -> None:
    raise AssertionError("nobody awaits this")


# -- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["success", "failure", "stopped"])
@pytest.mark.parametrize("user", ["", f".{HERE}.note", ".builtins.print", ".print"])
def test_rq_resolves_the_names(kind: str, user: str) -> None:
    callback = import_attribute(f"flask_rq_webhooks.callbacks.{kind}.{ENDPOINT}{user}")

    assert callable(callback)
    assert not inspect.iscoroutinefunction(callback)


@pytest.mark.parametrize(
    "name",
    [
        "success",
        "success.",
        "success.nothing",
        "finished." + ENDPOINT,
        f"success.{ENDPOINT.upper()}",
        f"success.{ENDPOINT}~",
        f"success.{ENDPOINT}~1e5",
        "__path__",
        "__wrapped__",
    ],
)
def test_other_names_are_not_there(name: str) -> None:
    assert not hasattr(callbacks, name)
    with pytest.raises(ValueError, match="Invalid attribute name"):
        import_attribute(f"flask_rq_webhooks.callbacks.{name}")


def test_one_name_built_for_hasattr_serves_getattr_and_no_other() -> None:
    assert hasattr(callbacks, f"success.{ENDPOINT}.builtins.print")
    other = getattr(callbacks, f"success.{ENDPOINT}.{HERE}.note")
    other(a_job(), Stream(), 1)

    assert len(calls) == 1
    assert callbacks._just_built is not None  # only the name that was asked for last is kept
    assert callbacks._just_built[0].endswith(".note")


# -- the user's own callback --------------------------------------------------------------------------------


def test_user_callback_gets_what_rq_hands_in_and_runs_first() -> None:
    job = a_job()
    stream = Stream(on_append=lambda: calls.append(("appended",)))
    exc_info = exc_info_of(raise_value_error)

    import_attribute(f"{SUCCESS}.{HERE}.note")(job, stream, "result")
    import_attribute(f"{FAILURE}.{HERE}.note")(job, stream, *exc_info)
    import_attribute(f"{STOPPED}.{HERE}.note")(job, stream)

    assert calls == [
        (job, stream, "result"),
        ("appended",),
        (job, stream, *exc_info),
        ("appended",),
        (job, stream),
        ("appended",),
    ]


def test_success_is_not_reported_when_the_users_callback_raises() -> None:
    stream = Stream()

    with pytest.raises(LookupError, match="the user's own"):
        import_attribute(f"{SUCCESS}.{HERE}.raise_lookup_error")(a_job(), stream, 1)

    assert stream.appended == []


@pytest.mark.parametrize(("name", "outcome"), [(FAILURE, (ValueError, ValueError("x"), None)), (STOPPED, ())])
def test_other_endings_are_reported_even_when_the_users_callback_raises(
    name: str, outcome: tuple[Any, ...]
) -> None:
    stream = Stream()

    with pytest.raises(LookupError, match="the user's own"):
        import_attribute(f"{name}.{HERE}.raise_lookup_error")(a_job(), stream, *outcome)

    assert [entry["kind"] for entry in stream.entries] == [name.split(".")[2]]


BROKEN_MODULES = {
    "broken_attribute": "import os\nos.no_such_thing",
    "broken_syntax": "def",
    "broken_runtime": "raise RuntimeError('at import')",
    "broken_exit": "raise SystemExit(4)",
}


@pytest.fixture
def _broken_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in BROKEN_MODULES.items():
        tmp_path.joinpath(f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_broken_modules")
@pytest.mark.parametrize(
    "path",
    [
        "no_such_module.callback",
        "no_such_builtin",
        f"{HERE}.no_such_callback",
        f"{HERE}.<lambda>",
        f"{HERE}.test_x.<locals>.callback",
        "__main__.no_such_callback",
        *(f"{name}.callback" for name in BROKEN_MODULES),
    ],
)
def test_unimportable_user_callback_fails_as_rq_fails_and_endings_are_reported(path: str) -> None:
    rq_kind, rq_value, _tb = exc_info_of(lambda: import_attribute(path))
    stream = Stream()

    for name, outcome in [(SUCCESS, (1,)), (FAILURE, exc_info_of(raise_value_error)), (STOPPED, ())]:
        callback = import_attribute(f"{name}.{path}")
        kind, value, _tb = exc_info_of(lambda call=callback, args=outcome: call(a_job(), stream, *args))
        assert (kind, str(value)) == (rq_kind, str(rq_value))

    assert [entry["kind"] for entry in stream.entries] == ["failure", "stopped"]


@pytest.mark.parametrize("kind", ["success", "failure", "stopped"])
def test_coroutine_callback_means_what_it_means_to_this_rq(kind: str) -> None:
    stream = Stream()
    outcome = {"success": (1,), "failure": exc_info_of(raise_value_error), "stopped": ()}[kind]
    callback = import_attribute(f"flask_rq_webhooks.callbacks.{kind}.{ENDPOINT}.{HERE}.coroutine")

    if REFUSES_COROUTINES:
        with pytest.raises(TypeError, match=f"^Coroutine {kind} callbacks are not supported$"):
            callback(a_job(), stream, *outcome)
        assert len(stream.appended) == (0 if kind == "success" else 1)
    else:  # called and never awaited
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            callback(a_job(), stream, *outcome)
        assert len(stream.appended) == 1


@pytest.mark.skipif(not REFUSES_COROUTINES, reason="older RQ refuses no coroutine functions")
def test_rq_still_refuses_coroutines_in_the_words_used_here() -> None:
    from rq import callbacks as rq_callbacks

    job = SimpleNamespace(success_callback=coroutine)
    with pytest.raises(TypeError, match="^Coroutine success callbacks are not supported$"):
        rq_callbacks.execute_success_callback(job, UnixSignalDeathPenalty, 1)


# -- the entry ----------------------------------------------------------------------------------------------


def test_entry_of_a_success() -> None:
    stream = Stream()
    before = time.time()

    import_attribute(SUCCESS)(a_job(), stream, {"peak": 12.5, "at": MOMENT})

    (entry,) = stream.entries
    assert before <= entry.pop("at") <= time.time()
    assert entry == {
        "v": 1,
        "kind": "success",
        "endpoint": ENDPOINT,
        "job_id": "job-1",
        "run": "2026-01-02T03:04:05.678900Z",
        "func": "tests.jobs.run",
        "queue": "default",
        "created_at": "2026-01-02T03:04:01.678900Z",
        "enqueued_at": "2026-01-02T03:04:05.678900Z",
        "started_at": "2026-01-02T03:04:06.678900Z",
        "runid": "basin-7",
        "retries_left": None,
        "result": {"peak": 12.5, "at": "2026-01-02T03:04:05.678900+00:00"},
        "result_truncated": False,
        "error": None,
    }
    assert parse_entry(stream.appended[0][1].encode()).result == entry["result"]


def test_entry_of_a_failure() -> None:
    stream = Stream()
    exc_info = exc_info_of(raise_value_error)

    import_attribute(FAILURE)(a_job(retries_left=2), stream, *exc_info)

    (entry,) = stream.entries
    assert entry["retries_left"] == 2
    assert entry["error"] == {
        "type": "ValueError",
        "message": "no such basin",
        "traceback": "".join(traceback.format_exception(*exc_info)),
    }
    assert parse_entry(stream.appended[0][1].encode()).error == entry["error"]


@pytest.mark.parametrize("tb", [None, traceback.extract_stack()[:1]], ids=["RQ 2 and 3", "RQ 1"])
def test_entry_of_an_abandoned_job(tb: Any) -> None:
    from rq.exceptions import AbandonedJobError

    stream = Stream()
    import_attribute(FAILURE)(a_job(), stream, AbandonedJobError, AbandonedJobError(), tb)

    (entry,) = stream.entries
    assert entry["error"] == {
        "type": "AbandonedJobError",
        "message": "",
        "traceback": "rq.exceptions.AbandonedJobError\n",
    }
    assert parse_entry(stream.appended[0][1].encode()).kind == "failure"


def test_stream_key_and_length_come_from_the_name() -> None:
    stream = Stream()

    import_attribute(SUCCESS)(a_job(), stream, 1)
    import_attribute(f"{SUCCESS}~250")(a_job(), stream, 1)
    import_attribute(f"flask_rq_webhooks.callbacks.success.epabc_all.{HERE}.note")(a_job(), stream, 1)

    assert [(key, options) for key, _text, options in stream.appended] == [
        ("rq_webhooks:outbox:ep" + "n" * 8, {"maxlen": 100_000, "approximate": True}),
        ("rq_webhooks:outbox:ep" + "n" * 8, {"maxlen": 250, "approximate": True}),
        ("rq_webhooks:outbox:epabc", {"maxlen": 100_000, "approximate": True}),
    ]
    assert [entry["endpoint"] for entry in stream.entries] == [ENDPOINT, ENDPOINT, "epabc_all"]


@pytest.mark.parametrize(
    ("enqueued_at", "run"),
    [
        (MOMENT, "2026-01-02T03:04:05.678900Z"),
        (MOMENT.replace(tzinfo=None), "2026-01-02T03:04:05.678900Z"),  # RQ before 2.0
        (MOMENT.replace(microsecond=0), "2026-01-02T03:04:05.000000Z"),
        (None, "created:2026-01-02T03:04:01.678900Z"),
    ],
)
def test_run_identity(enqueued_at: datetime | None, run: str) -> None:
    stream = Stream()
    import_attribute(SUCCESS)(a_job(enqueued_at=enqueued_at), stream, 1)
    assert [entry["run"] for entry in stream.entries] == [run]


@pytest.mark.parametrize(
    ("meta", "args", "runid"),
    [
        ({"runid": "from-meta"}, ("first",), "from-meta"),
        ({"runid": 42}, ("first",), "42"),
        ({"runid": None}, ("first",), "first"),
        ({"runid": True}, ("first",), "first"),
        ({}, (7, "second"), None),
        ({}, (), None),
        (None, None, None),
        ({}, ("a\0b",), "ab"),
        ({"runid": "r" * 600}, (), "r" * 509 + "..."),
        ({}, ("r" * 600,), None),
        ({}, ("select 1",), None),
        ({}, ("\ud800",), "\\ud800"),
    ],
)
def test_runid(meta: Any, args: Any, runid: str | None) -> None:
    stream = Stream()
    import_attribute(SUCCESS)(a_job(meta=meta, args=args), stream, 1)

    assert [entry["runid"] for entry in stream.entries] == [runid]
    assert parse_entry(stream.appended[0][1].encode()).runid == runid


def test_huge_result_is_left_out() -> None:
    stream = Stream()
    import_attribute(SUCCESS)(a_job(), stream, "x" * (callbacks.MAX_RESULT_BYTES - 1))
    import_attribute(SUCCESS)(a_job(), stream, "x" * (callbacks.MAX_RESULT_BYTES - 2))

    first, second = stream.entries
    assert (first["result"], first["result_truncated"]) == (None, True)
    assert (len(second["result"]), second["result_truncated"]) == (callbacks.MAX_RESULT_BYTES - 2, False)
    assert parse_entry(stream.appended[1][1].encode()).result == second["result"]


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


inside_itself: list[Any] = []
inside_itself.append(inside_itself)


class Text(str):
    """A text of the user's own kind."""


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, True), (True, True), (7, True), (-(2**63), True), (12.5, True), ("basin", True),
        ("a\0b\"", True), ([], True), ({}, True), ((1, [2, {"a": (None,)}]), True), (nested(9), True),
        ({"a": {"b": [1, "x" * 1000]}}, True), ("x" * 19_000, True), (list(range(19_000)), True),
        (2**70, False), (float("nan"), False), ([float("-inf")], False), ("caf\u00e9", False),
        (["\ud800"], False), ({"\u00e9": 1}, False), ({1: 2}, False), (b"x", False), ({1, 2}, False),
        (MOMENT, False), (Text("x"), False), (nested(10), False), (nested(60), False),
        (inside_itself, False), ("x" * 20_001, False), ([0] * 20_001, False),
        ({str(n): n for n in range(20_001)}, False), (Path("/data"), False), (ValueError("x"), False),
    ],
    ids=lambda value: repr(value)[:40] if type(value) is not bool else str(value),
)  # fmt: skip
def test_result_reported_unchanged_is_what_it_would_be_converted_to(value: Any, plain: bool) -> None:
    stream = Stream()
    import_attribute(SUCCESS)(a_job(), stream, value)

    assert callbacks._is_plain(value) is plain
    (entry,) = stream.entries
    converted, truncated = dumps_capped(value, callbacks.MAX_RESULT_BYTES)
    assert (entry["result"], entry["result_truncated"]) == (json.loads(json.dumps(converted)), truncated)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
        ),
    )
)
def test_plain_results_are_those_that_conversion_leaves_alone(value: Any) -> None:
    if callbacks._is_plain(value):
        reported = json.loads(json.dumps(value, allow_nan=False))
        assert (reported, False) == dumps_capped(reported, callbacks.MAX_RESULT_BYTES)
        converted, truncated = dumps_capped(value, callbacks.MAX_RESULT_BYTES)
        assert (json.dumps(converted), truncated) == (json.dumps(value), False)


def test_long_error_is_cut() -> None:
    stream = Stream()
    message = "first " + "\u00e9" * 500_000 + " last"

    import_attribute(FAILURE)(a_job(), stream, ValueError, ValueError(message), None)

    error = parse_entry(stream.appended[0][1].encode()).error
    assert error is not None
    assert error["message"] == message[: job_errors.MAX_MESSAGE_CHARS - 3] + "..."
    assert error["traceback"].startswith("ValueError: first")
    assert error["traceback"].endswith(" last\n")
    assert "characters left out" in error["traceback"]
    assert len(error["traceback"]) < job_errors.MAX_TRACEBACK_CHARS + 100


# -- jobs that did not run in this process ------------------------------------------------------------------


class OfTheUsersProgram:
    """Unpickling this is noticed."""

    def __reduce__(self) -> Any:
        return (note, ("unpickled",))


def stopped_job(args: tuple[Any, ...], description: str | None = None) -> Job:
    """Return a job as the parent worker has it: its data not read yet."""
    job = Job(id="job-1", connection=redis.Redis())
    job.data = pickle.dumps(("tests.jobs.run", None, args, {}))
    job.created_at = job.enqueued_at = MOMENT
    job.origin = "default"
    job.description = description
    return job


def test_stopped_job_is_read_as_far_as_it_is_plain() -> None:
    stream = Stream()
    import_attribute(STOPPED)(stopped_job(("basin-7", {"a": [1, None]})), stream)

    (entry,) = stream.entries
    assert (entry["func"], entry["runid"]) == ("tests.jobs.run", "basin-7")


def test_stopped_job_never_imports_the_users_program() -> None:
    stream = Stream()
    import_attribute(STOPPED)(
        stopped_job(("basin-7", OfTheUsersProgram()), "tests.jobs.run('basin-7')"), stream
    )

    (entry,) = stream.entries
    assert calls == []
    assert (entry["func"], entry["runid"]) == ("tests.jobs.run", "basin-7")


def test_stopped_job_whose_call_cannot_be_read() -> None:
    job = stopped_job(("basin-7",), "tests.jobs.run('basin-7')")
    job.data = b"\x80\x04broken"
    stream = Stream()
    import_attribute(STOPPED)(job, stream)
    assert (stream.entries[0]["func"], stream.entries[0]["runid"]) == ("tests.jobs.run", None)

    job.description = "Build the land use map (again)"
    import_attribute(STOPPED)(job, stream)
    assert stream.entries[1]["func"] is None


# -- nothing comes out of our part --------------------------------------------------------------------------


class Broken:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __str__(self) -> str:
        raise RuntimeError("no text")


class BrokenButNamed(Broken):
    id = "job-1"
    created_at = enqueued_at = MOMENT


@pytest.mark.parametrize(
    "failure",
    [
        redis.ConnectionError("refused"),
        redis.ResponseError("OOM command not allowed"),
        UnicodeDecodeError("utf-8", b"", 0, 1, "decode_responses"),
        AttributeError("'NoneType' object has no attribute 'xadd'"),
        JobTimeoutException("in the very moment"),
    ],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize(
    ("name", "outcome"), [(SUCCESS, (1,)), (FAILURE, (ValueError, ValueError("x"), None)), (STOPPED, ())]
)
def test_redis_that_fails_is_logged_with_the_job_id(
    failure: Exception, name: str, outcome: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise failure

    import_attribute(name)(a_job(), Stream(on_append=fail), *outcome)

    (record,) = caplog.records
    assert (record.name, record.levelno) == ("flask_rq_webhooks.callbacks", logging.WARNING)
    assert record.getMessage().startswith("Job 'job-1': its ")
    assert type(failure).__name__ in record.getMessage()


def test_job_that_reports_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    stream = Stream()
    import_attribute(SUCCESS)(Broken(), stream, 1)
    import_attribute(FAILURE)(Broken(), stream, Broken(), Broken(), Broken())

    assert stream.appended == []
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Job None", "Job None"]


def test_job_of_which_only_the_identity_is_known_is_reported() -> None:
    stream = Stream()
    import_attribute(SUCCESS)(BrokenButNamed(), stream, Broken())
    import_attribute(FAILURE)(BrokenButNamed(), stream, Broken(), Broken(), Broken())

    success, failure = (parse_entry(text.encode()) for _key, text, _options in stream.appended)
    assert success.result == "<unprintable Broken: RuntimeError>"
    assert failure.error is not None
    assert failure.error["message"] == "<unprintable Broken: RuntimeError>"
    assert (success.func, success.queue, success.runid) == (None, None, None)


def test_tracing_that_fails_is_logged_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("of an instrumentation")

    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace(get_current_span=broken))
    assert callbacks._trace() is None
    assert "of an instrumentation" in caplog.text


def test_logging_that_fails_is_no_reason_to_fail(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken_filter(record: logging.LogRecord) -> bool:
        raise RuntimeError("the host's own filter")

    logger = logging.getLogger("flask_rq_webhooks.callbacks")
    logger.addFilter(broken_filter)
    try:
        import_attribute(SUCCESS)(a_job(), None, 1)
    finally:
        logger.removeFilter(broken_filter)

    assert "the host's own filter" in capsys.readouterr().err


# -- time ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _alarm() -> Iterator[None]:
    """Put the alarm of the test runner aside."""
    previous = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    left_s, _interval = signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.signal(signal.SIGALRM, previous)
    signal.setitimer(signal.ITIMER_REAL, left_s)


@pytest.mark.usefixtures("_alarm")
@pytest.mark.parametrize("own_retries", [False, True])
def test_silent_redis_is_given_up(
    own_retries: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(callbacks, "APPEND_LIMIT_S", 0.2)

    def wait() -> None:
        for _attempt in range(20):
            try:
                time.sleep(0.2 if own_retries else 4)
            except Exception as exc:  # redis-py tries again after errors it knows
                raise AssertionError("our deadline looks like an error of Redis") from exc

    started = time.monotonic()
    import_attribute(SUCCESS)(a_job(), Stream(on_append=wait), 1)

    assert 0.19 < time.monotonic() - started < 1
    assert "not done within 0.2 s" in caplog.text
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.usefixtures("_alarm")
def test_slow_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __str__(self) -> str:
            time.sleep(4)
            return "slow"

    monkeypatch.setattr(callbacks, "RENDER_LIMIT_S", 0.2)
    stream = Stream()
    started = time.monotonic()

    import_attribute(SUCCESS)(a_job(), stream, Slow())

    assert time.monotonic() - started < 1
    assert [(entry["result"], entry["result_truncated"]) for entry in stream.entries] == [(None, True)]


@pytest.mark.usefixtures("_alarm")
def test_rqs_alarm_does_not_ring_in_our_part() -> None:
    stream = Stream(on_append=lambda: time.sleep(0.5))

    with UnixSignalDeathPenalty(1, JobTimeoutException):
        time.sleep(0.8)
        import_attribute(SUCCESS)(a_job(), stream, 1)

    assert len(stream.appended) == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.usefixtures("_alarm")
def test_rqs_alarm_still_rings_for_what_comes_after_us() -> None:
    def report_and_wait() -> None:
        with UnixSignalDeathPenalty(1, JobTimeoutException):
            import_attribute(SUCCESS)(a_job(), Stream(), 1)
            time.sleep(3)

    started = time.monotonic()
    with pytest.raises(JobTimeoutException):
        report_and_wait()

    assert 0.9 < time.monotonic() - started < 1.5


def sleep_long(*args: Any) -> None:
    time.sleep(5)


@pytest.mark.usefixtures("_alarm")
@pytest.mark.parametrize(("name", "reported"), [(SUCCESS, 0), (FAILURE, 1)])
def test_users_callback_keeps_its_timeout(name: str, reported: int) -> None:
    stream = Stream()
    outcome = (1,) if name == SUCCESS else (ValueError, ValueError("x"), None)
    callback = import_attribute(f"{name}.{HERE}.sleep_long")

    with pytest.raises(JobTimeoutException), UnixSignalDeathPenalty(1, JobTimeoutException):
        callback(a_job(), stream, *outcome)

    assert len(stream.appended) == reported


def test_other_threads_have_no_alarms_and_need_none() -> None:
    stream = Stream()
    thread = threading.Thread(target=import_attribute(SUCCESS), args=(a_job(), stream, 1))
    thread.start()
    thread.join()

    assert len(stream.appended) == 1


# -- imports ------------------------------------------------------------------------------------------------


def in_a_worker(code: str) -> str:
    """Run *code* in an interpreter that has imported what ``rq worker`` imports; return what it prints."""
    prelude = "import sys, rq.cli.cli, rq.worker, rq.job, rq.queue, rq.results, rq.scheduler\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_import_brings_in_nothing_but_our_own() -> None:
    printed = in_a_worker(
        """
        before = set(sys.modules)
        import flask_rq_webhooks.callbacks
        print(*sorted(set(sys.modules) - before), sep="\\n")
        """
    )
    assert printed.split() == ["flask_rq_webhooks", "flask_rq_webhooks.callbacks"]


@pytest.mark.parametrize(
    ("result", "more"),
    [("None", []), ("{'peak': [1.5, (2, True)]}", []), ("{1: 2}", ["protocol", "protocol.json_safe"])],
)
def test_success_with_a_plain_result_brings_in_nothing_more(result: str, more: list[str]) -> None:
    printed = in_a_worker(
        f"""
        import redis
        from rq.utils import import_attribute
        class Stream:
            def xadd(self, *args, **kwargs):
                assert "at" in args[1]["entry"]
        job = rq.job.Job(id="job-1", connection=redis.Redis())
        job.func_name, job.args, job.origin = "tests.jobs.run", ("basin-7",), "default"
        before = set(sys.modules)
        import_attribute("flask_rq_webhooks.callbacks.success.{ENDPOINT}")(job, Stream(), {result})
        print(*sorted(set(sys.modules) - before))
        """
    )
    assert printed.split() == [
        "flask_rq_webhooks",
        "flask_rq_webhooks.callbacks",
        *(f"flask_rq_webhooks.{module}" for module in more),
    ]


@pytest.mark.parametrize(
    ("outcomes", "more"),
    [
        pytest.param(
            '{"success": (1.5,), "failure": (ValueError, ValueError("x"), traceback)}', set(), id="work-horse"
        ),
        # Read in the parent worker, or where an abandoned job is ended: once, and not in every fork.
        pytest.param(
            '{"stopped": (), "failure": (ValueError, ValueError("x"), None)}',
            {"pickletools", "decimal", "_decimal"},
            id="elsewhere",
        ),
    ],
)
def test_a_whole_callback_brings_in_nothing_either(outcomes: str, more: set[str]) -> None:
    printed = in_a_worker(
        f"""
        import redis
        from rq.utils import import_attribute
        class Stream:
            def xadd(self, *args, **kwargs):
                print(args[0])
        job = rq.job.Job(id="job-1", connection=redis.Redis())
        job.data = b"\\x80\\x04(X\\x01\\x00\\x00\\x00fNK\\x01}}t."
        job.origin = "default"
        before = set(sys.modules)
        try:
            raise ValueError("x")
        except ValueError as exc:
            traceback = exc.__traceback__
        outcomes = {outcomes}
        for kind, outcome in outcomes.items():
            import_attribute(f"flask_rq_webhooks.callbacks.{{kind}}.{ENDPOINT}")(job, Stream(), *outcome)
        print(*sorted(name for name in set(sys.modules) - before if not name.startswith("flask_rq_webhooks")))
        """
    )
    assert printed.split()[:2] == ["rq_webhooks:outbox:epnnnnnnnn"] * 2
    assert set(printed.split()[2:]) <= more
