"""``job.progress``: what receivers that ask for it by name get while a job writes into its meta."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rq.job import Job

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher, reconcile_now
from flask_rq_webhooks.observe.publisher import Publisher
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.protocol.events import Occurrence
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.deliveries import left_to_recover, recover_part
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.storage.filters import DeliveryFilter
from tests.integration.test_running_jobs import start
from tests.pipeline import (
    add_endpoint,
    attempts,
    deliveries,
    enqueue,
    events,
    open_state,
    running_dispatcher,
    work,
)
from tests.servers import Receiver, rq_worker, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PROGRESS = ("job.progress", "job.success", "job.failure")


@pytest.fixture
def state(database_url: str, redis_url: str) -> Iterator[State]:
    with open_state(database_url, redis_url, progress_interval=10) as opened:
        yield opened


def running(state: State, url: str = "http://127.0.0.1:9/hook", **options: Any) -> Job:
    """Return a job that a worker is executing, for an endpoint that wants its progress."""
    endpoint_id = add_endpoint(state, url, **{"events": PROGRESS, **options})
    return start(state, enqueue(state, endpoint_id, "tests.jobs.sleep", 9, is_async=True))


def say(job: Job, value: Any) -> None:
    job.meta["progress"] = value
    job.save_meta()


class Passes:
    """Passes of one dispatcher, so and so many seconds apart."""

    def __init__(self, state: State) -> None:
        self._now = datetime.now(UTC)
        self._reconciler = Reconciler(
            state.database, state.redis, publish=Publisher(state).publish, settings=state.settings,
            clock=lambda: self._now,
        )  # fmt: skip

    def after(self, seconds: float) -> dict[str, int]:
        self._now += timedelta(seconds=seconds)
        return dict(self._reconciler.run_once().reported)


def values(state: State) -> list[Any]:
    found = [json.loads(event.payload) for event in events(state)]
    return [one["progress"] for one in found if one["type"] == "job.progress"]


def of_progress(state: State) -> list[Any]:
    return [row for row in deliveries(state) if row.event_type == "job.progress"]


def test_each_change_is_reported_at_most_once_in_an_interval(state: State) -> None:
    job, passes = running(state), Passes(state)
    assert passes.after(0) == {}
    say(job, 1)
    assert passes.after(1) == {"job.progress": 1}
    say(job, 2)
    assert passes.after(5) == {}
    say(job, 3)
    assert passes.after(5) == {"job.progress": 1}
    assert passes.after(20) == {}  # nothing new
    say(job, {"step": 4, "of": 9})
    assert passes.after(1) == {"job.progress": 1}
    assert values(state) == [1, 3, {"step": 4, "of": 9}]


def test_another_dispatcher_goes_on_where_the_first_one_stopped(state: State) -> None:
    job = running(state)
    say(job, 1)
    assert Passes(state).after(0) == {"job.progress": 1}
    assert Passes(state).after(20) == {}
    say(job, 2)
    assert Passes(state).after(1) == {}  # an interval has not passed
    assert Passes(state).after(20) == {"job.progress": 1}


def test_newer_progress_replaces_what_waits(state: State) -> None:
    job, passes = running(state), Passes(state)
    other = running(state)
    say(other, "other")
    for value in (1, 2, 3):
        say(job, value)
        passes.after(15)
    mine = [row for row in of_progress(state) if b'"other"' not in row.body]
    assert [row.status for row in mine] == ["canceled", "canceled", "pending"]
    assert [json.loads(row.body)["progress"] for row in mine] == [1, 2, 3]
    assert {row.max_attempts for row in mine} == {3}
    assert [row.status for row in of_progress(state) if row not in mine] == ["pending"]


def test_nothing_waits_after_the_end_and_the_end_has_the_last_value(state: State, receiver: Receiver) -> None:
    endpoint_id = add_endpoint(
        state, receiver.url, events=("job.started", "job.progress", "job.stalled", "job.success")
    )
    job_id = enqueue(state, endpoint_id, "tests.jobs.count_up", 3, 0.0, is_async=True)
    job = start(state, job_id, expires_in_s=-10)
    say(job, "early")
    reconcile_now(state)
    assert sorted(row.event_type for row in deliveries(state)) == [
        "job.progress", "job.stalled", "job.started",
    ]  # fmt: skip
    run = events(state)[0].run_key.split("|")[1]
    state.redis.rpush("rq:queue:default", job_id)
    work(state.redis)
    Dispatcher(state).run(burst=True)

    statuses = {row.event_type: row.status for row in deliveries(state)}
    ending = [one for one in receiver.received if one.json["event"] == "job.success"]
    assert [one.json["progress"] for one in ending] == [3]
    assert statuses.pop("job.success") == "succeeded"
    assert set(statuses.values()) <= {"canceled", "succeeded"}  # one that was being sent may have arrived
    assert len(receiver.received) == 1 + list(statuses.values()).count("succeeded")
    late = Occurrence(
        type="job.progress", occurred_at=datetime.now(UTC), source="reconciled", job_id=job_id, run=run,
        progress=4,
    )  # fmt: skip
    (answer,) = ingest(state.database, [IngestItem(late)], render=state.render, max_attempts=1)
    assert (answer.created, answer.event_id) == (False, "")


def test_the_ending_is_sent_and_what_waited_is_not(state: State, receiver: Receiver) -> None:
    """As with a receiver that was away: all wait when the ending is stored."""
    endpoint_id = add_endpoint(state, receiver.url, events=("job.started", *PROGRESS))
    job_id = enqueue(state, endpoint_id, "tests.jobs.add", 1, 2, is_async=True)
    say(start(state, job_id), 50)
    reconcile_now(state)
    with state.database.read() as connection:
        assert len(connection.exec_driver_sql("SELECT id FROM rq_webhooks_delivery").all()) == 2
    run = events(state)[0].run_key.split("|")[1]
    end = Occurrence(
        type="job.success", occurred_at=datetime.now(UTC), source="reconciled", job_id=job_id, run=run
    )
    ingest(state.database, [IngestItem(end)], render=state.render, max_attempts=1)
    assert {row.event_type: row.status for row in deliveries(state)} == {
        "job.started": "canceled", "job.progress": "canceled", "job.success": "pending",
    }  # fmt: skip
    assert left_to_recover(state.database, DeliveryFilter(), None) == 0
    assert recover_part(state.database, DeliveryFilter(), render=state.render, max_attempts=1).done == 0
    Dispatcher(state).run(burst=True)
    assert [one.json["event"] for one in receiver.received] == ["job.success"]


def test_receiver_that_is_away_gets_three_attempts_within_seconds(state: State, receiver: Receiver) -> None:
    receiver.respond = lambda _received: (503, {"Retry-After": "86400"}, b"")
    say(running(state, receiver.url), 1)
    reconcile_now(state)
    with running_dispatcher(state):
        wait_until(lambda: of_progress(state)[0].status == "exhausted", timeout=30)
    assert len(attempts(state)) == len(receiver.received) == 3


@pytest.mark.parametrize(
    "meta",
    [
        {"progress": "x" * 5000},
        {"progress": float("nan")},
        {"progress": None},
        {"progress": {"deep": [[[[[["x" * 5000]]]]]]}},
        {"progress": subprocess.Popen},
        b"\x80\x05progress is no pickle",
        b"\x80\x04cos\nsystem\n\x8c\x08progress\x85R.",
        b"",
    ],
    ids=["huge", "nan", "none", "deep", "class", "broken", "call", "empty"],
)  # fmt: skip
def test_odd_progress_is_left_out_and_keeps_nobody_waiting(state: State, meta: Any) -> None:
    odd, good = running(state), running(state)
    state.redis.hset(odd.key, "meta", meta if isinstance(meta, bytes) else pickle.dumps(meta))
    say(good, 7)
    reconcile_now(state)
    assert values(state) == [7]


@pytest.mark.parametrize(
    ("value", "reported"),
    [(b"\xff\x00", None), ((1, {2}), [1, [2]]), (0, 0), (False, False), ("½\ud800", None),
     (float("inf"), None), ({"n": float("nan"), 3: datetime(2026, 1, 1, tzinfo=UTC)}, None)],
)  # fmt: skip
def test_values_are_made_json(state: State, value: Any, reported: Any) -> None:
    job = running(state)
    try:
        say(job, value)
    except UnicodeEncodeError:
        return
    reconcile_now(state)
    found = values(state)
    if reported is not None:
        assert found == [reported]
    json.dumps(found, allow_nan=False).encode()


def test_only_by_name(state: State) -> None:
    endpoint_id = add_endpoint(state, "http://127.0.0.1:9/hook", kind="standing", events=("*",))
    assert endpoint_id
    job_id = enqueue(
        state, add_endpoint(state, "http://127.0.0.1:9/hook"), "tests.jobs.sleep", 9, is_async=True
    )
    say(start(state, job_id), 1)
    reconcile_now(state)
    assert values(state) == []
    add_endpoint(state, "http://127.0.0.1:9/hook", kind="standing", events=("job.progress",))
    reconcile_now(state)
    assert values(state) == [1]
    (delivery,) = of_progress(state)
    assert delivery.endpoint_id != endpoint_id


_KILLED = """
import os, signal, sys
from flask_rq_webhooks import _steps
from flask_rq_webhooks.dispatch.dispatcher import reconcile_now
from tests.pipeline import open_state, running_dispatcher
_steps.install(lambda step: step == sys.argv[3] and os.kill(os.getpid(), signal.SIGKILL))
with open_state(sys.argv[1], sys.argv[2], progress_interval=0.01) as state:
    reconcile_now(state)
"""


@pytest.mark.parametrize("step", ["newer stored", "older canceled"])
def test_killed_between_the_parts_of_a_replacement(database_url: str, redis_url: str, step: str) -> None:
    with open_state(database_url, redis_url, progress_interval=0.01) as state:
        job = running(state)
        say(job, 1)
        reconcile_now(state)
        before = deliveries(state)
        say(job, 2)
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, database_url, redis_url, step], timeout=60, check=False
        )
        assert killed.returncode == -signal.SIGKILL
        wait_until(lambda: len(deliveries(state)) == 1, timeout=10)
        assert deliveries(state) == before
        assert values(state) == [1]
        with state.database.write() as connection:  # the killed one held it
            connection.exec_driver_sql(
                "UPDATE rq_webhooks_dispatcher SET lease_owner = NULL, lease_until = NULL"
            )
        reconcile_now(state)
        assert [row.status for row in of_progress(state)] == ["canceled", "pending"]
        assert values(state) == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_hundred_jobs(database_url: str, redis_url: str, receiver: Receiver) -> None:
    """Real workers write every 50 ms; the interval is shorter than that of reconcile."""
    jobs, workers, interval_s, steps = 200, 10, 0.4, 20
    settings = {"reconcile_interval": 2, "progress_interval": interval_s}
    with open_state(database_url, redis_url, **settings) as state:
        endpoint_id = add_endpoint(state, receiver.url, events=PROGRESS)
        ids = [
            enqueue(state, endpoint_id, "tests.jobs.count_up", steps, 0.05, is_async=True)
            for _ in range(jobs)
        ]
        with ExitStack() as started:
            processes = [
                started.enter_context(rq_worker(redis_url, burst=True, worker_class="rq.SimpleWorker"))
                for _ in range(workers)
            ]
            with running_dispatcher(state):
                for process in processes:
                    process.wait(150)
                wait_until(lambda: endings(receiver) >= jobs, timeout=30, what="every ending")
                time.sleep(1)
        stored = defaultdict(list)
        for event in events(state):
            stored[event.job_id].append(json.loads(event.payload))
        waiting = [row for row in of_progress(state) if row.status not in ("succeeded", "canceled")]

    got = defaultdict(list)
    for one in receiver.received:
        got[one.json["job_id"]].append(one.json)
    assert set(got) == set(ids)
    assert waiting == []
    assert sum(len(some) for some in got.values()) > jobs  # progress was reported
    for job_id in ids:
        in_order = sorted(got[job_id], key=lambda one: one["sequence"])
        assert [one["event"] for one in in_order] == ["job.progress"] * (len(in_order) - 1) + ["job.success"]
        assert in_order[-1]["progress"] == steps
        assert [one["type"] for one in stored[job_id]].index("job.success") == len(stored[job_id]) - 1
        times = [one["timestamp"] for one in in_order[:-1]]
        assert all(
            later - sooner >= 0.9 * interval_s for sooner, later in zip(times, times[1:], strict=False)
        )
        said = [one["progress"] for one in in_order]
        assert said == sorted(said)


def endings(receiver: Receiver) -> int:
    return sum(one.json["event"] == "job.success" for one in list(receiver.received))
