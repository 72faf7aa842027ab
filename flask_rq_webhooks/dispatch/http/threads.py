"""A few daemon threads that run what they are given. Knows nothing of requests."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable


class DaemonThreads:
    """At most *limit* daemon threads that run what they are given, started as needed.

    The standard library's pool is not used: the interpreter waits for its threads at exit, and a look-up
    can hang for half a minute.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._tasks: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting = 0
        self._called = False
        self._ended = False
        self._threads: list[threading.Thread] = []

    def run(self, task: Callable[[], None]) -> None:
        """Run *task* in a thread; tasks are begun in the order in which they came."""
        with self._lock:
            self._tasks.append(task)
            self._call()

    def end(self) -> None:
        """Let every thread end after the work already given."""
        with self._lock:
            self._ended = True
            for _ in range(self._waiting):
                self._calls.put(None)
            self._waiting = 0

    def join(self) -> None:
        """Wait until all threads have ended."""
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        """Call one thread for the next task; the lock is held.

        One at a time: whoever takes a task calls the next before beginning. So tasks that are over in no
        time are run by the few threads that are awake, and waking a thread for each of them, which costs
        more than such a task, is spared. Where tasks take their time, all threads are soon awake.
        """
        if self._called or not self._tasks:
            return
        if self._waiting:
            self._waiting -= 1
            self._calls.put(None)
        elif len(self._threads) < self._limit:
            name = f"{self._name}-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
            self._threads[-1].start()
        else:
            return  # all are busy; the first to be done takes it
        self._called = True

    def _serve(self) -> None:
        was_called = True
        while True:
            task = None
            with self._lock:
                if was_called:
                    self._called = was_called = False
                if self._tasks:
                    task = self._tasks.popleft()
                    self._call()
                elif self._ended:
                    return
                else:
                    self._waiting += 1
            if task is not None:
                task()
            else:
                self._calls.get()
                was_called = True
