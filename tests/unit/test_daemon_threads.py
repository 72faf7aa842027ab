"""The threads that send: as many as are needed, no more, and none left behind."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from flask_rq_webhooks.dispatch.http.client import DaemonThreads


@pytest.mark.parametrize("limit", [1, 4, 16])
def test_tasks_that_wait_for_each_other_run_at_once(limit: int) -> None:
    threads = DaemonThreads("test", limit)
    together = threading.Barrier(limit)
    for _ in range(limit):
        threads.run(lambda: print(together.wait(10)))
    threads.end()
    threads.join()
    assert not together.broken


def test_never_more_than_the_limit_and_in_order() -> None:
    threads = DaemonThreads("test", 2)
    begun: list[int] = []
    running, most = 0, 0
    lock = threading.Lock()

    def task(number: int) -> None:
        nonlocal running, most
        with lock:
            begun.append(number)
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    for number in range(40):
        threads.run(partial(task, number))
    threads.end()
    threads.join()
    assert most == 2
    assert sorted(begun) == list(range(40))
    assert all(abs(place - number) <= 1 for place, number in enumerate(begun))


def test_work_given_before_the_end_is_done() -> None:
    threads = DaemonThreads("test", 3)
    gate = threading.Event()
    done: list[int] = []

    def task(number: int) -> None:
        if gate.wait(10):
            done.append(number)

    for number in range(10):
        threads.run(partial(task, number))
    threads.end()
    gate.set()
    threads.join()
    assert sorted(done) == list(range(10))


def test_many_givers_lose_nothing() -> None:
    threads = DaemonThreads("test", 8)
    done: list[int] = []

    def give(start: int) -> None:
        for number in range(start, start + 500):
            threads.run(partial(done.append, number))

    givers = [threading.Thread(target=give, args=(500 * number,)) for number in range(6)]
    for giver in givers:
        giver.start()
    for giver in givers:
        giver.join()
    threads.end()
    threads.join()
    assert sorted(done) == list(range(3000))


def test_nobody_is_started_for_nothing() -> None:
    threads = DaemonThreads("test", 8)
    done = threading.Event()
    threads.run(done.set)
    assert done.wait(10)
    for _ in range(50):
        done.clear()
        threads.run(done.set)
        assert done.wait(10)
    assert len(threads._threads) <= 2
    threads.end()
    threads.join()


def test_where_no_further_thread_can_be_started_those_there_do_it_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = DaemonThreads("test", 8)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _refuse)
        with pytest.raises(RuntimeError):
            threads.run(lambda: None)
    gate = threading.Event()
    done: list[int] = []
    threads.run(lambda: print(gate.wait(10)))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _refuse)
        for number in range(5):
            threads.run(partial(done.append, number))
    together = threading.Barrier(3)
    for _ in range(3):
        threads.run(lambda: print(together.wait(10)))
    gate.set()
    threads.end()
    threads.join()
    assert sorted(done) == list(range(5))
    assert not together.broken


def _refuse(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
