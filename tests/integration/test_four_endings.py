"""The four endings that a storm of kills got wrong, each in its smallest form.

RQ's own functions make every state. Where two reads have to see different moments, a client that acts between
them takes the place of the other process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
import redis
import rq
from rq.job import Job

from benchmarks.settled_watches import fill
from flask_rq_webhooks.observe.ingest import PATIENCE_S, Ingest
from flask_rq_webhooks.observe.publisher import Publisher
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.queue.outbox import Outbox
from flask_rq_webhooks.queue.outbox_entry import confirm_entry
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import confirm
from tests.pipeline import add_endpoint, callbacks, deliveries, events, work

URL = "http://127.0.0.1:9/hook"

#: RQ 1.16 warns of its own functions inside jobs, which would make them fail.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Interrupted(redis.Redis):
    """A client in whose pipelines something happens after a number of round trips."""

    after: int = 0
    happens: Callable[[], object] = staticmethod(lambda: None)
    done: int = 0

    def pipeline(self, *args: Any, **kwargs: Any) -> Any:
        made = super().pipeline(*args, **kwargs)
        execute = made.execute

        def interrupted(*arguments: Any, **keywords: Any) -> Any:
            answer = execute(*arguments, **keywords)
            self.done += 1
            if self.done == self.after:
                self.happens()
            return answer

        made.execute = interrupted
        return made


def reconciler(state: State, client: redis.Redis | None = None) -> Reconciler:
    return Reconciler(
        state.database,
        client or state.redis,
        publish=Publisher(state).publish,
        settings=state.settings,
        outbox_key=state.outbox.key,
    )


def ingest_all(state: State, consumer: str = "reader", **options: Any) -> None:
    ingest = Ingest(state, consumer=consumer, publisher=Publisher(state), **options)
    until = time.monotonic() + PATIENCE_S + 2  # long enough for a report to be parked
    while not ingest.is_idle() and time.monotonic() < until:
        ingest.run_once(block_ms=10)


def enqueue(state: State, function: str, *args: Any, attached: bool = True, **options: Any) -> Job:
    """Enqueue a job that reports to an endpoint of its own, and confirm it."""
    endpoint_id = add_endpoint(state, URL, events=options.pop("events", None))
    ours = {name: rq.Callback(path) for name, path in callbacks(endpoint_id).items()} if attached else {}
    job = rq.Queue(connection=state.redis).enqueue(function, *args, **ours, **options)
    runs = {job.id: format_time(job.enqueued_at)}
    confirm(state.database, endpoint_id, existing=[job.id], unseen=[], reserved_job_id=None, runs=runs)
    return job


def reported(state: State) -> list[tuple[str, bool]]:
    """Return the type of each final event, and whether it corrects another."""
    return [
        (event.type, event.supersedes is not None) for event in events(state) if event.type != "job.retrying"
    ]


# -- 1. Lost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserved", [True, False], ids=["the first job", "a further job of the request"])
def test_job_that_the_web_process_saw_and_that_is_gone_is_reported_lost(state: State, reserved: bool) -> None:
    """SQL was away at the confirmation, which waits in the outbox; then the job is deleted."""
    endpoint_id = add_endpoint(state, URL)
    job = rq.Queue(connection=state.redis).enqueue("tests.jobs.add", 1, 2)
    if reserved:
        confirm(state.database, endpoint_id, existing=[], unseen=[job.id], reserved_job_id=job.id)
    run = format_time(job.enqueued_at)
    seal = state.cipher.encrypt(json.dumps([endpoint_id, {job.id: run}, []]))
    state.outbox.append(confirm_entry(endpoint_id, [job.id], seal=seal))
    job.delete()

    ingest_all(state)
    passes = reconciler(state)
    for _ in range(3):
        passes.run_once()

    assert reported(state) == [("job.lost", False)]
    assert [delivery.endpoint_id for delivery in deliveries(state)] == [endpoint_id]


# -- 2. Doubled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_trips", [1, 2, 3, 4])
def test_run_that_ends_between_two_reads_of_a_pass_is_reported_once(
    state: State, redis_url: str, round_trips: int
) -> None:
    """Run 1 was retried. Run 2 is queued when the pass begins, and over before it has read everything."""
    job = enqueue(state, "tests.jobs.fail", "dry", attached=False, retry=rq.Retry(max=1))
    passes = reconciler(state)
    passes.run_once()
    work(state.redis, 1)

    client = Interrupted.from_url(redis_url)
    client.after, client.happens = round_trips, lambda: work(state.redis, 1)
    reconciler(state, client).run_once()
    client.close()
    work(state.redis, 1)  # where the pass made fewer round trips
    for _ in range(3):
        passes.run_once()

    assert reported(state) == [("job.failure", False)]
    run = format_time(Job.fetch(job.id, state.redis).enqueued_at)
    assert f"{job.id}|{run}|end" in {event.run_key for event in events(state)}


def test_runs_shorter_than_clocks_differ_are_distinguished(state: State) -> None:
    """Run 1 fails and is requeued, run 2 and 3 follow within milliseconds; nobody's callbacks report them."""
    job = enqueue(state, "tests.jobs.fail", "dry", attached=False)
    passes = reconciler(state)
    passes.run_once()
    for _ in range(3):
        work(state.redis, 1)
        passes.run_once()
        Job.fetch(job.id, state.redis).requeue()
    passes.run_once()

    assert reported(state) == [("job.failure", False)] * 3
    assert len({event.run_key for event in events(state)}) == 3


def test_unseen_runs_between_two_passes_are_each_reported_once(state: State) -> None:
    job = enqueue(state, "tests.jobs.fail", "dry", attached=False)
    passes = reconciler(state)
    passes.run_once()
    for _ in range(3):
        work(state.redis, 1)
        Job.fetch(job.id, state.redis).requeue()

    for _ in range(4):
        passes.run_once()

    assert reported(state) == [("job.failure", False)] * 3


@pytest.mark.parametrize("gone", [False, True], ids=["kept", "gone"])
def test_run_that_no_callback_reported_before_the_next_one_did(state: State, gone: bool) -> None:
    """Found by the storm: run 1 dies, an operator requeues it at once, and the callback reports run 2."""
    job = enqueue(state, "tests.jobs.fail", "dry")
    first = format_time(job.enqueued_at)
    work(state.redis, 1)
    state.redis.delete(state.outbox.key)  # as where the work-horse was killed: no report
    Job.fetch(job.id, state.redis).requeue()
    work(state.redis, 1)
    ingest_all(state)
    if gone:
        state.redis.delete(f"rq:job:{job.id}", f"rq:results:{job.id}")
    passes = reconciler(state)
    for _ in range(4):
        passes.run_once()

    published = [("job.failure", False)] * (1 if gone else 2)  # nobody knows any more how run 1 ended
    assert reported(state) == published
    assert (f"{job.id}|{first}|end" in {event.run_key for event in events(state)}) is not gone


def test_report_of_a_retry_leaves_the_run_before_it_retried(state: State) -> None:
    job = enqueue(state, "tests.jobs.fail", "dry", retry=rq.Retry(max=1))
    work(state.redis, 1)
    state.redis.delete(state.outbox.key)
    work(state.redis, 1)
    ingest_all(state)
    passes = reconciler(state)
    for _ in range(4):
        passes.run_once()

    assert reported(state) == [("job.failure", False)]
    run = format_time(Job.fetch(job.id, state.redis).enqueued_at)
    assert f"{job.id}|{run}|end" in {event.run_key for event in events(state)}


# -- 3. Untruthful job.lost -------------------------------------------------------------------------------


def read_and_die(state: State) -> None:
    """Take the entries as a dispatcher does that is killed before it has stored anything."""
    assert Outbox(state.redis, state.namespace).read("killed", count=10, block_ms=1)


@pytest.mark.parametrize("reader", ["nobody", "a dead one"])
def test_job_is_not_lost_while_its_report_waits(state: State, reader: str) -> None:
    """RQ committed, ``result_ttl`` ran out, and the report is younger than any lag one could think of."""
    passes = reconciler(state)
    job = enqueue(state, "tests.jobs.add", 1, 2)
    passes.run_once()
    work(state.redis)
    if reader == "a dead one":
        read_and_die(state)
    job.delete()

    for _ in range(3):
        passes.run_once()
        reconciler(state).run_once()  # of another dispatcher
    assert reported(state) == []
    ingest_all(state, consumer="killed")
    for _ in range(3):
        passes.run_once()

    assert reported(state) == [("job.success", False)]


def test_job_is_lost_although_other_reports_keep_coming(state: State) -> None:
    """Only what may speak of the job holds the loss back."""
    passes = reconciler(state)
    job = enqueue(state, "tests.jobs.add", 1, 2)
    job.delete()
    for _ in range(4):
        time.sleep(0.005)  # later than the pass before by more than the precision of ids
        state.redis.delete(state.outbox.key)
        state.redis.xadd(state.outbox.key, {"entry": "of another job"})
        passes.run_once()

    assert reported(state) == [("job.lost", False)]


@pytest.mark.parametrize("run_is_known", [True, False])
def test_report_that_is_read_after_the_loss_corrects_it_once(state: State, run_is_known: bool) -> None:
    """The job was deleted while it ran, and its work-horse went on."""
    endpoint_id = add_endpoint(state, URL)
    ours = {name: rq.Callback(path) for name, path in callbacks(endpoint_id).items()}
    job = rq.Queue(connection=state.redis).enqueue("tests.jobs.add", 1, 2, **ours)
    runs = {job.id: format_time(job.enqueued_at)} if run_is_known else None
    confirm(state.database, endpoint_id, existing=[job.id], unseen=[], reserved_job_id=None, runs=runs)
    saved = state.redis.hgetall(job.key)
    state.redis.delete(job.key)
    passes = reconciler(state)
    for _ in range(2):
        passes.run_once()
    assert reported(state) == [("job.lost", False)]
    state.redis.hset(job.key, mapping=saved)
    work(state.redis)
    ((_id, fields),) = state.redis.xrange(state.outbox.key)
    job.delete()

    for _ in range(3):
        ingest_all(state)
        state.redis.xadd(state.outbox.key, fields)  # a callback that reports twice
    ingest_all(state)
    passes.run_once()

    assert reported(state) == [("job.lost", False), ("job.success", True)]
    lost, correction = events(state)
    assert correction.supersedes == lost.id
    assert len(deliveries(state)) == 2


# -- 4. Early, and doubled --------------------------------------------------------------------------------


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def test_parked_report_of_a_run_that_rq_began_again_ends_nothing(state: State) -> None:
    """Worker and work-horse die behind on_success; RQ gives the run up and, with Retry, queues it again."""
    clock = Clock()
    job = enqueue(state, "tests.jobs.add", 1, 2, retry=rq.Retry(max=1))
    before = state.redis.hgetall(job.key)
    work(state.redis)
    # As it was before the commit, which never came.
    state.redis.delete(f"rq:results:{job.id}")
    started = {**before, b"status": b"started"}
    state.redis.delete(job.key)
    state.redis.hset(job.key, mapping=started)
    ingest = Ingest(state, consumer="reader", publisher=Publisher(state), clock=clock)
    ingest.run_once(block_ms=1)
    clock.now += PATIENCE_S + 0.1
    ingest.run_once(block_ms=1)
    assert ingest.is_idle()
    abandoned = Job.fetch(job.id, state.redis)
    with state.redis.pipeline() as pipeline:
        abandoned.retry(rq.Queue(connection=state.redis), pipeline)
        pipeline.execute()

    passes = reconciler(state)
    for _ in range(2):
        passes.run_once()
    assert Job.fetch(job.id, state.redis).get_status() == "queued"
    assert reported(state) == []
    work(state.redis)
    ingest_all(state)
    for _ in range(2):
        passes.run_once()

    assert reported(state) == [("job.success", False)]


def test_late_reports_of_a_run_and_its_retry_that_left_nothing_are_one_ending(state: State) -> None:
    """The same while no dispatcher ran, and RQ has forgotten the job by the time one does."""
    job = enqueue(state, "tests.jobs.add", 1, 2, retry=rq.Retry(max=1))
    before = state.redis.hgetall(job.key)
    work(state.redis)
    state.redis.delete(f"rq:results:{job.id}", job.key)
    again = {**before, b"enqueued_at": format_time(datetime.now(UTC) + timedelta(seconds=1)).encode()}
    state.redis.hset(job.key, mapping={**again, b"retries_left": b"0"})
    state.redis.rpush("rq:queue:default", job.id)
    work(state.redis)
    assert state.outbox.length() == 2
    state.redis.delete(f"rq:results:{job.id}", job.key)

    ingest_all(state)
    passes = reconciler(state)
    for _ in range(3):
        passes.run_once()

    assert reported(state) == [("job.success", False)]


# -- Clocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [True, False], ids=["callbacks", "reconcile alone"])
@pytest.mark.parametrize("web_s", [-60, 60])
@pytest.mark.parametrize("dispatcher_s", [-60, 60])
def test_clocks_a_minute_apart_lose_and_double_nothing(
    state: State, attached: bool, web_s: int, dispatcher_s: int
) -> None:
    """Web and dispatcher are a minute off; worker, Redis and SQL are not. The job fails and is requeued."""
    endpoint_id = add_endpoint(state, URL)
    ours = {name: rq.Callback(path) for name, path in callbacks(endpoint_id).items()} if attached else {}
    job = rq.Queue(connection=state.redis).enqueue("tests.jobs.fail", "dry", **ours)
    run = format_time(job.enqueued_at + timedelta(seconds=web_s))
    state.redis.hset(job.key, mapping={"enqueued_at": run, "created_at": run})
    confirm(
        state.database, endpoint_id, existing=[job.id], unseen=[], reserved_job_id=None, runs={job.id: run}
    )
    passes = Reconciler(
        state.database,
        state.redis,
        publish=Publisher(state).publish,
        settings=state.settings,
        outbox_key=state.outbox.key,
        clock=lambda: datetime.now(UTC) + timedelta(seconds=dispatcher_s),
    )
    passes.run_once()
    work(state.redis, 1)
    Job.fetch(job.id, state.redis).requeue()
    for _ in range(2):
        passes.run_once()
        ingest_all(state)
    work(state.redis, 1)
    for _ in range(3):
        passes.run_once()
        ingest_all(state)

    assert reported(state) == [("job.failure", False)] * 2
    assert len(deliveries(state)) == 2


def test_memory_is_flat_and_a_new_run_of_an_old_job_is_found_in_a_pass(state: State) -> None:
    """20,000 settled runs whose jobs RQ keeps, over a restart. ``benchmarks/settled_watches.py``: 200,000."""
    fill(state.database, state.redis, 20_000)
    process = psutil.Process()
    reconciler(state).run_once()
    before = process.memory_info().rss

    passes = reconciler(state)
    for _ in range(2):
        passes.run_once()
    grown = process.memory_info().rss - before
    again = {"enqueued_at": format_time(datetime.now(UTC)), "status": "failed"}
    state.redis.hset("rq:job:job-19999", mapping=again)
    passes.run_once()

    assert grown < 4 * 2**20
    assert reported(state) == [("job.failure", False)]
