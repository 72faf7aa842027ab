"""Job functions and user callbacks run by real workers in the acceptance tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import rq
from rq.job import get_current_job


def add(first: int, second: int) -> dict[str, int]:
    return {"sum": first + second}


def run_model(runid: str) -> dict[str, Any]:
    return {"runid": runid, "outlet": Path("/data") / runid, "peak": 12.5}


def fail(message: str) -> None:
    raise ValueError(message)


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "woke up"


def wait_for(name: str) -> str:
    """Say that the job is there, and end as soon as *name* is let go."""
    job = get_current_job()
    assert job is not None
    job.connection.rpush(f"{name}:there", job.id)
    while not job.connection.exists(f"{name}:go"):
        time.sleep(0.002)
    return "let go"


def plant(name: str, children: int) -> str:
    """Enqueue children that end when *name* is let go, and note them where hosts note them."""
    job = get_current_job()
    assert job is not None
    queue = rq.Queue("default", connection=job.connection)
    for number in range(children):
        child = queue.enqueue_call(wait_for, (name,), timeout=600)
        job.meta[f"jobs:{number},func:wait_for"] = child.id
    job.save_meta()
    return "planted"


def slow_callback(job: Any, connection: Any, result: Any) -> None:
    """Hold the commit back, as a host's own callback may."""
    time.sleep(0.05)


def note_success(job: Any, connection: Any, result: Any) -> None:
    connection.rpush("noted", f"success {job.id} {os.getpid()}")


def note_failure(job: Any, connection: Any, exc_type: Any, value: Any, traceback: Any) -> None:
    connection.rpush("noted", f"failure {job.id} {exc_type.__name__} {value}")


class DeadlyToStore:
    """A result that kills the work-horse when RQ stores it: after on_success, before the commit."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")

    def __str__(self) -> str:
        return "looks fine"


def return_deadly_result() -> DeadlyToStore:
    return DeadlyToStore()
