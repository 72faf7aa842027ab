"""Job functions and user callbacks that real workers run in the integration tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from rq.job import get_current_job


def add(first: int, second: int) -> int:
    return first + second


def run(runid: str, *_more: Any) -> dict[str, str]:
    return {"runid": runid}


def fail(message: str = "no such basin") -> None:
    raise ValueError(message)


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "woke up"


def sleep_after_note(runid: str, seconds: float) -> None:
    """Tell the work-horse's process id, so that a test can wait for the start and kill it."""
    job = get_current_job()
    assert job is not None
    job.connection.rpush("pids", os.getpid())
    time.sleep(seconds)


def process_id() -> int:
    return os.getpid()


def import_module(name: str) -> str:
    return str(__import__(name).__name__)


def system_exit() -> None:
    sys.exit(3)


def kill_work_horse() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def same(value: Any) -> Any:
    return value


class Unprintable:
    """Has no text and cannot be pickled."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


def unprintable() -> Unprintable:
    return Unprintable()


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def unprintable_error() -> None:
    raise UnprintableError


def huge() -> str:
    return "x" * (2 * 2**20)


def own_job() -> Any:
    return get_current_job()


def overwrite_meta() -> str:
    """Do what hosts do: save a job object whose meta knows nothing of what was there."""
    job = get_current_job()
    assert job is not None
    job.meta = {"jobs:0,func:build": "child-1"}
    job.save_meta()
    job.save()
    return "saved"


# -- user callbacks -----------------------------------------------------------------------------------------


def note_success(job: Any, connection: Any, result: Any) -> None:
    connection.rpush("noted", f"success {job.id} {os.getpid()} {result!r}")


def note_failure(job: Any, connection: Any, kind: Any, value: Any, traceback: Any) -> None:
    connection.rpush("noted", f"failure {job.id} {kind.__name__} {value} {type(traceback).__name__}")


def note_stopped(job: Any, connection: Any) -> None:
    connection.rpush("noted", f"stopped {job.id} {os.getpid()}")


class Callbacks:
    """A static method is a function of a module to RQ, too."""

    @staticmethod
    def note_success(job: Any, connection: Any, result: Any) -> None:
        connection.rpush("noted", f"static {job.id} {result!r}")


def raise_on_success(job: Any, connection: Any, result: Any) -> None:
    raise LookupError("the user's on_success")


def raise_on_failure(job: Any, connection: Any, *exc_info: Any) -> None:
    raise LookupError("the user's on_failure")


def raise_on_stopped(job: Any, connection: Any) -> None:
    raise LookupError("the user's on_stopped")


def slow_on_success(job: Any, connection: Any, result: Any) -> None:
    time.sleep(0.8)


def too_slow_on_success(job: Any, connection: Any, result: Any) -> None:
    time.sleep(10)


def freeze_redis_on_success(job: Any, connection: Any, result: Any) -> None:
    """Stop the server: what comes after this callback finds a Redis that does not answer."""
    pid = int(connection.info("server")["process_id"])
    os.kill(pid, signal.SIGSTOP)
    if os.fork() == 0:
        time.sleep(5)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)


async def coroutine_on_success(job: Any, connection: Any, result: Any) -> None:
    raise AssertionError("nobody awaits this")


async def coroutine_on_failure(job: Any, connection: Any, *exc_info: Any) -> None:
    raise AssertionError("nobody awaits this")


def count_up(steps: int, pause_s: float) -> str:
    """Write each step into the meta as hosts do that show progress."""
    job = get_current_job()
    assert job is not None
    for step in range(1, steps + 1):
        job.meta["progress"] = step
        job.save_meta()
        time.sleep(pause_s)
    return "counted"


def exit_at_once(status: int) -> None:
    os._exit(status)
