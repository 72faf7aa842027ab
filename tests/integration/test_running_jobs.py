"""``job.started`` and ``job.stalled``: what receivers that ask for them get while a job runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
from rq.job import Job
from rq.registry import StartedJobRegistry

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher, reconcile_now
from flask_rq_webhooks.protocol.events import Occurrence, format_time
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.events import IngestItem, ingest
from tests.pipeline import add_endpoint, enqueue, events
from tests.servers import Receiver, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NAMES = ("job.started", "job.stalled", "job.success")


def start(state: State, job_id: str, *, expires_in_s: float = 60.0) -> Job:
    """Leave the job as a worker does that is executing it."""
    job = Job.fetch(job_id, state.redis)
    state.redis.lrem("rq:queue:default", 0, job_id)
    state.redis.hset(job.key, mapping={"status": "started", "started_at": format_time(datetime.now(UTC))})
    registry = StartedJobRegistry("default", connection=state.redis)
    entry = f"{job_id}:execution" if hasattr(registry, "remove_executions") else job_id
    state.redis.zadd(registry.key, {entry: time.time() + expires_in_s})
    return job


def reported(state: State) -> list[str]:
    return [json.loads(event.payload)["type"] for event in events(state)]


def test_start_is_reported_once_to_those_who_asked(state: State, receiver: Receiver) -> None:
    asked = enqueue(
        state, add_endpoint(state, receiver.url, events=NAMES), "tests.jobs.sleep", 9, is_async=True
    )
    others = enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.sleep", 9, is_async=True)
    reconcile_now(state)
    assert reported(state) == []
    start(state, asked)
    start(state, others)

    for _ in range(3):
        reconcile_now(state)
        Dispatcher(state).run(burst=True)

    (received,) = receiver.received
    assert (received.json["event"], received.json["job_id"]) == ("job.started", asked)
    assert received.json["started_at"] is not None
    assert received.json["ended_at"] is None


def test_start_is_not_reported_after_the_end(state: State) -> None:
    """Reconcile may have seen the job running just before its ending was stored."""
    endpoint_id = add_endpoint(state, "http://127.0.0.1:9/hook", events=NAMES)
    job_id = enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
    Dispatcher(state).run(burst=True)
    (ending,) = events(state)
    run = ending.run_key.split("|")[1]
    late = Occurrence(
        type="job.started", occurred_at=datetime.now(UTC), source="reconciled", job_id=job_id, run=run
    )
    (answer,) = ingest(state.database, [IngestItem(late)], render=state.render, max_attempts=1)
    assert (answer.created, answer.event_id) == (False, "")
    assert reported(state) == ["job.success"]


def test_job_without_sign_of_life_is_stalled_once(state: State, receiver: Receiver) -> None:
    endpoint_id = add_endpoint(state, receiver.url, events=("job.stalled",))
    job_id = enqueue(state, endpoint_id, "tests.jobs.sleep", 9, is_async=True)
    start(state, job_id)
    reconcile_now(state)
    assert reported(state) == []
    start(state, job_id, expires_in_s=-10)

    for _ in range(3):
        reconcile_now(state)
        Dispatcher(state).run(burst=True)

    (received,) = receiver.received
    assert (received.json["event"], received.json["job_id"]) == ("job.stalled", job_id)


def test_task_format_has_its_words(state: State, receiver: Receiver) -> None:
    endpoint_id = add_endpoint(state, receiver.url, events=NAMES, format="task")
    job_id = enqueue(state, endpoint_id, "tests.jobs.sleep", 9, is_async=True)
    start(state, job_id)
    reconcile_now(state)
    Dispatcher(state).run(burst=True)
    (received,) = receiver.received
    assert received.json["event_type"] == "task.started"
    assert received.json["task"] == {"id": job_id, "name": "sleep", "status": "STARTED"}
    assert "error" not in received.json


def test_real_worker_is_seen_while_the_job_runs(state: State, redis_url: str, receiver: Receiver) -> None:
    job_id = enqueue(
        state, add_endpoint(state, receiver.url, events=NAMES), "tests.jobs.sleep", 4, is_async=True
    )

    worker = subprocess.Popen(
        [sys.executable, "-m", "rq.cli", "worker", "--burst", "--quiet", "--url", redis_url, "default"]
    )
    try:
        wait_until(lambda: state.redis.hget(f"rq:job:{job_id}", "status") == b"started")
        reconcile_now(state)
        Dispatcher(state).run(burst=True)  # what waits at the end is not sent any more
        worker.wait(60)
    finally:
        worker.kill()
        worker.wait()
    Dispatcher(state).run(burst=True)
    assert reported(state) == ["job.started", "job.success"]
    by_number = sorted(receiver.received, key=lambda one: one.json["sequence"])
    assert [one.json["event"] for one in by_number] == ["job.started", "job.success"]
