"""Jobs of the kill suite. Each notes in Redis that it ran, so that the auditor knows of it."""

from __future__ import annotations

import os
import signal
import time

from rq.job import get_current_job


def _note(number: int) -> int:
    """Note that the job ran, and return how many times it did."""
    job = get_current_job()
    assert job is not None
    job.connection.hset("chaos:ran", str(number), job.id)
    return int(job.connection.hincrby("chaos:runs", str(number), 1))


def succeed(number: int) -> int:
    _note(number)
    return number


def sleep(number: int) -> int:
    _note(number)
    time.sleep(0.3)
    return number


def fail(number: int) -> None:
    _note(number)
    raise ValueError(f"number {number}")


def fail_first(number: int) -> int:
    if _note(number) == 1:
        raise ValueError("the first time")
    return number


def die(number: int) -> None:
    _note(number)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(number: int) -> None:
    _note(number)
    os._exit(3)
