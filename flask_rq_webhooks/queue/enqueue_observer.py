"""Observe every job that a piece of code enqueues, by whatever means; for tests.

While the code runs, wraps the three methods of a queue through which RQ creates and enqueues jobs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rq
from rq.job import Job

from .job_callbacks import Queue, is_attached, is_instrumented


@dataclass(slots=True)
class SeenJob:
    """One job that was enqueued.

    :param attachable: whether its queue attaches a webhook when one is requested.
    :param made_elsewhere: whether it was made without a queue (``Job.create``), so none can be attached.
    :param by_helper: whether ``enqueue_with_webhook`` enqueued it.
    """

    job_id: str
    func: str
    attachable: bool
    made_elsewhere: bool = False
    by_helper: bool = False


@contextmanager
def observe(note: Callable[[SeenJob], None]) -> Iterator[None]:
    """Call *note* for every job that any queue of this process enqueues, in the enqueuing thread."""
    watcher = _Watcher(note)
    originals = {name: getattr(rq.Queue, name) for name in _METHODS}
    wrappers = {name: watcher.wrap(name, original) for name, original in originals.items()}
    for name, wrapper in wrappers.items():
        setattr(rq.Queue, name, wrapper)
    try:
        yield
    finally:
        watcher.active = False
        for name, wrapper in wrappers.items():
            # If someone has wrapped our wrapper, it stays inside and has no effect.
            if rq.Queue.__dict__.get(name) is wrapper:
                setattr(rq.Queue, name, originals[name])


_METHODS = ("create_job", "enqueue_job", "schedule_job")


class _Watcher:
    def __init__(self, note: Callable[[SeenJob], None]) -> None:
        self.active = True
        self._note = note
        self._lock = threading.Lock()
        self._seen: dict[str, SeenJob] = {}

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return *original*, the method *name* of a queue, wrapped so that it notes the job."""

        @functools.wraps(original)
        def wrapper(queue: rq.Queue, *args: Any, **kwargs: Any) -> Any:
            result = original(queue, *args, **kwargs)
            if self.active:
                if name == "create_job":
                    self._made(queue, result)
                else:
                    self._enqueued(queue, args[0] if args else kwargs["job"])
            return result

        return wrapper

    def _made(self, queue: rq.Queue, job: Job) -> None:
        seen = SeenJob(job.id, job.func_name or "", attachable=isinstance(queue, Queue) or is_instrumented())
        with self._lock:
            self._seen[job.id] = seen
        self._note(seen)

    def _enqueued(self, queue: rq.Queue, job: Job) -> None:
        with self._lock:
            seen = self._seen.get(job.id)
        if seen is None:
            self._note(SeenJob(job.id, job.func_name or "", attachable=False, made_elsewhere=True))
        else:
            seen.by_helper = is_attached(queue)
