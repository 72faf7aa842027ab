"""Our callbacks on the jobs a queue makes. Nothing here is enqueued, so nothing needs a server."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
import rq
from rq.job import Job

from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.queue import job_callbacks
from flask_rq_webhooks.queue.job_callbacks import Attachment, Queue, current_attachment, make_token

ENDPOINT = "epnnnnnnnn_" + "0" * 26
OURS = "flask_rq_webhooks.callbacks"
HERE = "tests.unit.test_attach"


@contextmanager
def attached(attachment: Attachment | None = None, **options: Any) -> Iterator[Attachment]:
    attachment = attachment or Attachment(ENDPOINT, options.pop("token", ENDPOINT), **options)
    reset = current_attachment.set(attachment)
    try:
        yield attachment
    finally:
        current_attachment.reset(reset)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    job_callbacks.uninstrument()  # a host of an earlier test may have left it on
    original = rq.Queue.create_job
    yield
    job_callbacks.set_default_attachment(None)
    job_callbacks.uninstrument()
    assert rq.Queue.create_job is original


def a_queue(queue_class: type[rq.Queue] = Queue) -> rq.Queue:
    return queue_class("default", connection=redis.Redis(port=1))


def names(job: Job) -> tuple[str | None, str | None, str | None]:
    """Return the dotted names as RQ stores them."""
    fields = job.to_dict()
    return tuple(fields[f"{kind}_callback_name"] or None for kind in ("success", "failure", "stopped"))  # type: ignore[return-value]


def timeouts(job: Job) -> list[int | None]:
    return [job.to_dict().get(f"{kind}_callback_timeout") for kind in ("success", "failure", "stopped")]


def ours(user: str = "") -> tuple[str, ...]:
    return tuple(f"{OURS}.{kind}.{ENDPOINT}{user}" for kind in ("success", "failure", "stopped"))


def callback(*args: Any) -> None:
    raise AssertionError("never called here")


# -- what a job carries -------------------------------------------------------------------------------------


def test_job_carries_three_names_and_nothing_else() -> None:
    with attached() as attachment:
        job = a_queue().create_job(
            "tests.jobs.add", (1, 2), meta={"mine": 1}, timeout=7, description="my job"
        )

    assert names(job) == ours()
    assert timeouts(job) == [60, 60, 60]
    assert attachment.jobs == [job]
    assert attachment.refused is False
    assert (job.meta, job.timeout, job.description, job.args) == ({"mine": 1}, 7, "my job", (1, 2))


def test_outside_of_a_request_it_is_an_rq_queue() -> None:
    job = a_queue().create_job("tests.jobs.add", on_success=rq.Callback(callback, timeout=5))

    assert names(job) == (f"{HERE}.callback", None, None)
    assert timeouts(job) == [5, None, None]


@pytest.mark.parametrize(
    ("user", "path", "timeout"),
    [
        (rq.Callback(callback), f".{HERE}.callback", 60),
        (rq.Callback(callback, timeout=5), f".{HERE}.callback", 5),
        (rq.Callback(callback, timeout="2m"), f".{HERE}.callback", 120),
        (
            rq.Callback("tests.jobs.Callbacks.note_success", timeout=9),
            ".tests.jobs.Callbacks.note_success",
            9,
        ),
        (rq.Callback(print), ".builtins.print", 60),
        (rq.Callback(lambda *args: None), f".{HERE}.<lambda>", 60),
        (None, "", 60),
        ("", "", 60),
    ],
)
def test_users_callback_is_in_the_name_and_keeps_its_timeout(user: Any, path: str, timeout: int) -> None:
    with attached():
        job = a_queue().create_job("tests.jobs.add", on_success=user, on_failure=user, on_stopped=user)

    assert names(job) == ours(path)
    assert timeouts(job) == [timeout] * 3


def test_kinds_are_chained_one_by_one() -> None:
    with attached():
        job = a_queue().create_job("tests.jobs.add", on_failure=rq.Callback(callback, timeout=5))

    success, failure, stopped = ours()
    assert names(job) == (success, f"{failure}.{HERE}.callback", stopped)
    assert timeouts(job) == [60, 5, 60]


class Callable_:  # noqa: N801
    def __call__(self, *args: Any) -> None: ...

    def method(self, *args: Any) -> None: ...


def outcome_of(function: Callable[[], Any]) -> tuple[Any, list[tuple[type[Warning], str]]]:
    """Return the error of *function*, if any, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function()
        except Exception as exc:
            error: Any = (type(exc), str(exc))
        else:
            error = None
    return error, [(warning.category, str(warning.message)) for warning in caught]


@pytest.mark.parametrize("option", ["on_success", "on_failure", "on_stopped"])
@pytest.mark.parametrize(
    "user",
    [
        callback,
        f"{HERE}.callback",
        functools.partial(callback, 1),
        Callable_().method,
        Callable_(),
        Callable_,
        7,
        ["a"],
    ],
    ids=["function", "text", "partial", "method", "instance", "class", "number", "list"],
)
def test_what_rq_refuses_or_warns_of_is_refused_and_warned_of(option: str, user: Any) -> None:
    def create() -> None:
        a_queue(rq.Queue).create_job("tests.jobs.add", **{option: user})

    error, seen = outcome_of(create)
    job_callbacks.instrument()
    with attached():
        assert outcome_of(create) == (error, seen)
    assert seen  # this RQ still calls them deprecated


def test_outbox_length_travels_in_the_token() -> None:
    assert make_token(ENDPOINT) == ENDPOINT
    assert make_token(ENDPOINT, 100_000) == ENDPOINT
    with attached(token=make_token(ENDPOINT, 250)):
        job = a_queue().create_job("tests.jobs.add")

    assert names(job)[0] == f"{OURS}.success.{ENDPOINT}~250"


# -- the reserved id ----------------------------------------------------------------------------------------


def test_first_job_without_an_id_takes_the_reserved_one() -> None:
    with attached(reserved_job_id="reserved") as attachment:
        queue = a_queue()
        own = queue.create_job("tests.jobs.add", job_id="own")
        first = queue.create_job("tests.jobs.add")
        second = queue.create_job("tests.jobs.add")

    assert [job.id for job in attachment.jobs] == ["own", "reserved", second.id]
    assert (own.id, first.id) == ("own", "reserved")
    assert second.id != "reserved"


def test_id_given_by_position() -> None:
    positional = ("tests.jobs.add", None, None, None, None, None, None, None, None)
    with attached(reserved_job_id="reserved"):
        queue = a_queue()
        assert queue.create_job(*positional, "own").id == "own"
        assert queue.create_job(*positional, None).id == "reserved"
        assert queue.create_job(*positional, None).id != "reserved"


def test_this_rq_has_the_job_id_where_we_look_for_it() -> None:
    parameters = list(inspect.signature(rq.Queue.create_job).parameters)
    assert parameters.index("job_id") - 1 == job_callbacks._JOB_ID_POSITION


def test_refused_job_gives_the_reserved_id_back() -> None:
    with attached(reserved_job_id="reserved") as attachment:
        queue = a_queue()
        with pytest.raises(ValueError, match="0 timeout"):
            queue.create_job("tests.jobs.add", timeout=0)
        job = queue.create_job("tests.jobs.add")

    assert job.id == "reserved"
    assert attachment.jobs == [job]


def test_threads_of_one_request_do_not_share_the_reserved_id() -> None:
    with attached(reserved_job_id="reserved") as attachment:
        queue = a_queue()
        barrier = threading.Barrier(8)

        def create() -> None:
            barrier.wait()
            queue.create_job("tests.jobs.add")

        # As asyncio.to_thread does; a plain thread does not inherit the request.
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(create,)) for _number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    ids = [job.id for job in attachment.jobs]
    assert len(ids) == len(set(ids)) == 8
    assert ids.count("reserved") == 1


def test_tasks_of_an_async_view_are_reached_and_other_requests_are_not() -> None:
    async def view(endpoint: str) -> Attachment:
        with attached(Attachment(endpoint, endpoint)) as attachment:
            await asyncio.sleep(0)

            async def task() -> None:
                await asyncio.sleep(0)
                a_queue().create_job("tests.jobs.add")
                await asyncio.to_thread(a_queue().create_job, "tests.jobs.add")

            await asyncio.gather(task(), task())
        return attachment

    async def views() -> list[Attachment]:
        return await asyncio.gather(*(view(f"epnnnnnnnn_{number}") for number in range(3)))

    for attachment in asyncio.run(views()):
        assert [names(job)[0] for job in attachment.jobs] == [f"{OURS}.success.{attachment.token}"] * 4


# -- instrumenting ------------------------------------------------------------------------------------------


def test_instrumented_rq_queues_carry_the_webhook() -> None:
    job_callbacks.instrument()
    with attached() as attachment:
        job = a_queue(rq.Queue).create_job("tests.jobs.add")
    after = a_queue(rq.Queue).create_job("tests.jobs.add")

    assert names(job) == ours()
    assert attachment.jobs == [job]
    assert names(after) == (None, None, None)


def test_instrumenting_is_idempotent_and_reversible() -> None:
    original = rq.Queue.create_job
    job_callbacks.instrument()
    once = rq.Queue.create_job
    job_callbacks.instrument()
    assert rq.Queue.create_job is once

    job_callbacks.uninstrument()
    job_callbacks.uninstrument()
    assert rq.Queue.create_job is original
    with attached() as attachment:
        job = a_queue(rq.Queue).create_job("tests.jobs.add")
    assert (names(job), attachment.jobs) == ((None, None, None), [])

    job_callbacks.instrument()
    with attached():
        assert names(a_queue(rq.Queue).create_job("tests.jobs.add")) == ours()


def test_instrumenting_from_many_threads() -> None:
    original = rq.Queue.create_job
    barrier = threading.Barrier(8)

    def instrument() -> None:
        barrier.wait()
        job_callbacks.instrument()

    threads = [threading.Thread(target=instrument) for _number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert rq.Queue.create_job.__wrapped__ is original  # type: ignore[attr-defined]


def test_method_looks_as_before() -> None:
    original = inspect.signature(rq.Queue.create_job)
    job_callbacks.instrument()

    assert rq.Queue.create_job.__name__ == "create_job"
    assert inspect.signature(rq.Queue.create_job) == original


def test_our_queue_on_instrumented_rq_attaches_once() -> None:
    job_callbacks.instrument()
    with attached(reserved_job_id="reserved") as attachment:
        job = a_queue().create_job("tests.jobs.add", on_success=rq.Callback(callback))

    assert attachment.jobs == [job]
    assert names(job)[0] == f"{OURS}.success.{ENDPOINT}.{HERE}.callback"
    assert job.id == "reserved"


def test_hosts_own_subclass_of_an_instrumented_queue() -> None:
    class HostQueue(rq.Queue):
        def create_job(self, *args: Any, **kwargs: Any) -> Job:
            kwargs["meta"] = {"host": True}
            return super().create_job(*args, **kwargs)

    job_callbacks.instrument()
    with attached() as attachment:
        job = a_queue(HostQueue).create_job("tests.jobs.add")

    assert (names(job), job.meta, attachment.jobs) == (ours(), {"host": True}, [job])


@pytest.mark.parametrize("wraps", [True, False])
def test_host_wraps_create_job_around_ours(wraps: bool) -> None:
    seen: list[Job] = []
    original = rq.Queue.create_job
    job_callbacks.instrument()
    inner = rq.Queue.create_job

    def host_wrapper(self: rq.Queue, *args: Any, **kwargs: Any) -> Job:
        job = inner(self, *args, **kwargs)
        seen.append(job)
        return job

    if wraps:
        host_wrapper = functools.wraps(inner)(host_wrapper)
    rq.Queue.create_job = host_wrapper  # type: ignore[method-assign]
    job_callbacks.instrument()
    with attached() as attachment:
        job = a_queue(rq.Queue).create_job("tests.jobs.add")
    assert names(job) == ours()
    assert attachment.jobs == [job]

    job_callbacks.uninstrument()  # the host's wrapper is not ours to remove
    assert rq.Queue.create_job is host_wrapper
    seen.clear()
    with attached() as attachment:
        job = a_queue(rq.Queue).create_job("tests.jobs.add")
    assert (names(job), attachment.jobs, seen) == ((None, None, None), [], [job])

    job_callbacks.instrument()  # ours is still inside and works again
    with attached() as attachment:
        job = a_queue(rq.Queue).create_job("tests.jobs.add")
    assert (names(job), attachment.jobs) == (ours(), [job])
    job_callbacks.uninstrument()
    rq.Queue.create_job = original  # type: ignore[method-assign]


# -- jobs nobody asked a webhook for ------------------------------------------------------------------------


def test_default_attachment() -> None:
    default = Attachment(None, "epnnnnnnnn_all")
    job_callbacks.set_default_attachment(lambda: default)
    job = a_queue().create_job("tests.jobs.add")

    assert names(job)[0] == f"{OURS}.success.epnnnnnnnn_all"
    assert default.jobs == []  # it may live as long as the process


def test_request_goes_before_the_default() -> None:
    job_callbacks.set_default_attachment(lambda: Attachment(None, "epnnnnnnnn_all"))
    with attached() as attachment:
        job = a_queue().create_job("tests.jobs.add")

    assert names(job) == ours()
    assert attachment.jobs == [job]


def test_default_that_cannot_be_had_does_not_stop_the_hosts_job(caplog: pytest.LogCaptureFixture) -> None:
    def unavailable() -> Attachment:
        raise StorageUnavailableError

    job_callbacks.set_default_attachment(unavailable)
    job = a_queue().create_job("tests.jobs.add")

    assert names(job) == (None, None, None)
    assert "RQ_WEBHOOKS_ATTACH is 'all'" in caplog.text


# -- the wrong database -------------------------------------------------------------------------------------


@pytest.fixture
def _nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_callbacks, "_refused_databases", set())


@pytest.mark.usefixtures("_nothing_refused")
def test_queue_on_another_database_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with attached(same_database=lambda connection: False, reserved_job_id="reserved") as attachment:
        queue = Queue("default", connection=redis.Redis(port=1, db=3, username="me", password="secret-word"))
        jobs = [queue.create_job("tests.jobs.add", on_success=rq.Callback(callback)) for _number in range(3)]

    assert attachment.refused is True
    assert attachment.jobs == []
    assert [names(job) for job in jobs] == [(f"{HERE}.callback", None, None)] * 3
    assert "reserved" not in [job.id for job in jobs]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "redis://localhost:1/3" in record.getMessage()
    assert "RQ_WEBHOOKS_REDIS_URL" in record.getMessage()
    assert "secret-word" not in caplog.text


def test_server_that_cannot_be_asked_is_left_to_enqueue() -> None:
    def unreachable(connection: redis.Redis) -> bool:
        raise redis.ConnectionError("refused")

    with attached(same_database=unreachable) as attachment:
        job = a_queue().create_job("tests.jobs.add")

    assert attachment.refused is False
    assert names(job) == ours()
