"""The ways hosts put something of their own between a view and RQ's queue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
import rq
from rq.decorators import job
from rq.job import Job

from tests.hosts import jobs

#: Whoever calls these views replaces it. Doctor asks it, as it asks the queues of all modules: it tries once.
connection = redis.Redis(port=1, retry=None)


def get_queue(name: str = "default") -> rq.Queue:
    return rq.Queue(name, connection=connection)


@contextmanager
def open_queue() -> Iterator[rq.Queue]:
    yield get_queue()


def untyped_queue():  # type: ignore[no-untyped-def]
    return get_queue()


def enqueue_build(runid: str, **options: Any) -> rq.job.Job:
    """Stand for a queue wrapper that many views import."""
    return _push(jobs.build, runid, **options)


def _push(function: Callable[..., Any], *args: Any, **options: Any) -> rq.job.Job:
    return get_queue().enqueue(function, *args, **options)


def enqueue_job_made_by_hand(runid: str) -> rq.job.Job:
    queue = get_queue()
    made = Job.create(jobs.build, (runid,), connection=queue.connection, origin=queue.name)
    return queue.enqueue_job(made)


class Runner:
    """Stand for a host's own layer around its runs."""

    def __init__(self, runid: str) -> None:
        self.runid = runid
        self.queue = get_queue()

    def start(self) -> rq.job.Job:
        return self.queue.enqueue_call(jobs.build, (self.runid,))

    @classmethod
    def for_run(cls, runid: str):  # type: ignore[no-untyped-def]
        return cls(runid)

    def describe(self) -> str:
        return self.runid


class Mailer:
    """Stand for something else that has a method ``enqueue``."""

    def enqueue(self, text: str) -> str:
        return text.upper()


mailer = Mailer()


@job("default", connection=connection)
def delayed(runid: str) -> str:
    return runid


def logged(view: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate as it should be done."""

    @functools.wraps(view)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    return wrapper


def careless(view: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate without ``functools.wraps``."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    wrapper.__name__ = view.__name__  # Flask asks for this much
    return wrapper
