"""Jobs of the storm, one function for every way a job ends; and what their successes return, as JSON.

A job notes in Redis what the auditor could not know otherwise: the jobs it enqueued itself.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import psutil
import rq
from rq.job import Job, get_current_job

#: Results that are no plain JSON, and the JSON they are reported as.
ODD: list[tuple[Any, Any]] = [
    (None, None),
    (False, False),
    ((1, "two", (3,)), [1, "two", [3]]),
    ({"peak": 12.5, "unit": "m³/s", 7: None}, {"peak": 12.5, "unit": "m³/s", "7": None}),
    ({"only"}, ["only"]),
    (PurePosixPath("/runs/7/rain.csv"), "/runs/7/rain.csv"),
    (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    (Decimal("1.10"), "1.10"),
    (Fraction(1, 3), "1/3"),
    (b"\x00\xff", "<bytes length=2>"),
    (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
    (date(2026, 1, 2), "2026-01-02"),
    (timedelta(minutes=1), 60.0),
    (OrderedDict(a=[[], {}, ""]), {"a": [[], {}, ""]}),
    (float("inf"), None),
    ("line\u2028 \\ \" '", "line\u2028 \\ \" '"),
    ("x" * 300_000, None),
]


def _job() -> Job:
    job = get_current_job()
    assert job is not None
    return job


def _first_run() -> bool:
    job = _job()
    return int(job.connection.incr(f"storm:runs:{job.id}")) == 1


def succeed(number: int) -> int:
    return number


def odd(number: int) -> Any:
    return ODD[number % len(ODD)][0]


def rest(number: int, seconds: float = 0.4) -> int:
    time.sleep(seconds)
    return number


def progress(number: int, seconds: float) -> int:
    job = _job()
    job.meta["progress"] = number
    job.save_meta()
    time.sleep(seconds)
    return number


def fail(number: int) -> None:
    raise ValueError(f"number {number}")


def run_out_of_memory(number: int) -> None:
    """Meet the limit of the process's memory, as in a container without swap."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, limits[1]))
    try:
        bytearray(1 << 31)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def be_killed(number: int) -> None:
    """Die as the kernel's killer of processes that take all memory makes them."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave(number: int, code: int) -> None:
    os._exit(code)


def first_then(number: int, first: str, then: str, *arguments: Any) -> Any:
    """End one way in the first run and another way in later ones."""
    return globals()[first if _first_run() else then](number, *arguments)


def return_retry(number: int) -> Any:
    """Ask for another run by returning so, where RQ can."""
    return rq.Retry(max=1) if _first_run() else number


class DeadlyToStore:
    """A result that kills when RQ stores it: the callback has run, nothing is committed.

    :param worker: kill the worker, too.
    """

    def __init__(self, worker: bool) -> None:
        self.worker = worker

    def __reduce__(self) -> Any:
        parent = psutil.Process().parent()
        if self.worker and parent is not None and parent.pid > 1 and "rq" in " ".join(parent.cmdline()):
            parent.kill()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")


def die_before_commit(number: int) -> Any:
    return DeadlyToStore(worker=False)


def die_with_worker_before_commit(number: int) -> Any:
    return DeadlyToStore(worker=True)


def plant(number: int, functions: list[str]) -> int:
    """Enqueue children, and note them in meta as hosts do; one more waits for all of them."""
    job = _job()
    queue = rq.Queue(job.origin, connection=job.connection)
    children = [queue.enqueue(f"{__name__}.{function}", number) for function in functions]
    children.append(queue.enqueue(f"{__name__}.succeed", number, depends_on=children))
    for order, child in enumerate(children):
        job.meta[f"jobs:{order},func:{child.func_name}"] = child.id
    job.save_meta()
    job.connection.sadd(f"storm:children:{job.id}", *[child.id for child in children])
    return number
