"""Trees like a host's: roots that end first, children in meta, chains of dependencies; one event each."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import rq
from rq.job import Job
from rq.registry import FailedJobRegistry
from sqlalchemy import update

from flask_rq_webhooks.observe.conclusions import VIEW_GRACE
from flask_rq_webhooks.observe.job_trees import TreeReporter
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import confirm
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.storage.models import Watch
from tests.pipeline import add_endpoint, deliveries, events, rows, work

URL = "http://127.0.0.1:9/hook"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def publisher(state: State) -> Callable[[Sequence[IngestItem]], object]:
    return lambda items: ingest(
        state.database, items, render=state.render, max_attempts=state.settings.max_attempts
    )


@pytest.fixture
def reconciler(state: State) -> Reconciler:
    return Reconciler(state.database, state.redis, publish=publisher(state), settings=state.settings)


def queue(state: State) -> rq.Queue:
    return rq.Queue(connection=state.redis)


def child(state: State, parent: Job, function: str, *args: Any, order: Any = 0, **options: Any) -> Job:
    """Enqueue a job and note it in its parent's meta, as the host does."""
    job = queue(state).enqueue_call(function, args, job_id=str(uuid.uuid4()), **options)
    parent.meta[f"jobs:{order},func:{function.rpartition('.')[2]}"] = job.id
    parent.save_meta()
    return job


def promise_tree(state: State, *roots: Job) -> str:
    endpoint_id = add_endpoint(state, URL, scope="tree")
    confirm(state.database, endpoint_id, existing=[job.id for job in roots], unseen=[], reserved_job_id=None)
    return endpoint_id


def root(state: State, function: str = "tests.jobs.run", *args: Any) -> Job:
    return queue(state).enqueue_call(function, args or ("basin-7",), job_id=str(uuid.uuid4()))


def tree_events(state: State) -> list[Any]:
    return [event for event in events(state) if json.loads(event.payload)["scope"] == "tree"]


def body(state: State) -> Any:
    (delivery,) = deliveries(state)
    return json.loads(delivery.body)


def test_single_job_is_a_tree_of_one(state: State, reconciler: Reconciler) -> None:
    job = root(state)
    promise_tree(state, job)
    reconciler.run_once()
    assert events(state) == []
    work(state.redis)

    for _ in range(3):
        reconciler.run_once()

    reported = body(state)
    assert reported["event"] == "job.success"
    assert reported["job_id"] == job.id
    assert reported["runid"] == "basin-7"
    assert reported["scope"] == "tree"
    assert reported["jobs"] == {"finished": 1}
    assert reported["result"] == {"runid": "basin-7"}
    assert len(tree_events(state)) == 1


def test_root_that_ends_first_waits_for_its_children(state: State, reconciler: Reconciler) -> None:
    job = root(state)
    promise_tree(state, job)
    child(state, job, "tests.jobs.add", 1, 2)
    work(state.redis, jobs=1)
    reconciler.run_once()
    assert deliveries(state) == []
    work(state.redis)

    reconciler.run_once()

    assert body(state)["jobs"] == {"finished": 2}


def test_three_levels_with_text_orders_unregistered_children_and_a_last_job(
    state: State, reconciler: Reconciler
) -> None:
    top = root(state)
    promise_tree(state, top)
    everything = [top]
    for number in range(4):
        middle = child(state, top, "tests.jobs.add", 1, number, order=f"phase {number}b")
        everything.append(middle)
        everything += [child(state, middle, "tests.jobs.add", 2, leaf, order=leaf) for leaf in range(5)]
    unregistered = queue(state).enqueue("tests.jobs.add", 9, 9)
    last = queue(state).enqueue("tests.jobs.add", 0, 0, depends_on=everything)
    assert len(everything) + 1 == 26
    work(state.redis, jobs=10)
    reconciler.run_once()
    assert deliveries(state) == []
    work(state.redis)

    reconciler.run_once()

    assert body(state)["event"] == "job.success"
    assert body(state)["jobs"] == {"finished": 26}
    assert last.get_status() == "finished"
    assert unregistered.get_status() == "finished"


def test_failed_child_and_the_last_job_that_never_runs(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    good = child(state, top, "tests.jobs.add", 1, 2, order=0)
    bad = child(state, top, "tests.jobs.fail", "no rain", order=1)
    last = queue(state).enqueue("tests.jobs.add", 0, 0, depends_on=[top, good, bad])
    behind = queue(state).enqueue("tests.jobs.add", 0, 0, depends_on=last)
    work(state.redis)

    for _ in range(2):
        reconciler.run_once()

    reported = body(state)
    assert reported["event"] == "job.failure"
    assert reported["job_id"] == top.id
    assert reported["jobs"] == {"deferred": 2, "failed": 1, "finished": 2}
    assert (reported["error"]["type"], reported["error"]["message"]) == ("ValueError", "no rain")
    assert behind.get_status() == "deferred"


def test_last_job_that_allows_failure_runs_and_is_waited_for(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    bad = child(state, top, "tests.jobs.fail", order=1)
    dependency = rq.job.Dependency(jobs=[bad], allow_failure=True)
    last = queue(state).enqueue("tests.jobs.add", 0, 0, depends_on=dependency)
    reconciler.run_once()  # RQ forgets a dependent when it is released
    work(state.redis, jobs=2)
    reconciler.run_once()
    assert deliveries(state) == []
    work(state.redis)
    assert last.get_status() == "finished"

    reconciler.run_once()

    assert body(state)["jobs"] == {"failed": 1, "finished": 2}
    assert body(state)["event"] == "job.failure"


def test_child_that_waits_for_its_retry_is_active(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    bad = child(state, top, "tests.jobs.fail", retry=rq.Retry(max=1, interval=3600))
    work(state.redis)
    reconciler.run_once()
    assert bad.get_status() == "scheduled"
    assert deliveries(state) == []


@pytest.mark.parametrize(("status", "expected"), [("stopped", "job.stopped"), ("canceled", "job.canceled")])
def test_stopped_or_canceled_child(state: State, reconciler: Reconciler, status: str, expected: str) -> None:
    top = root(state)
    promise_tree(state, top)
    other = child(state, top, "tests.jobs.add", 1, 2)
    work(state.redis)
    state.redis.hset(other.key, "status", status)

    reconciler.run_once()

    assert body(state)["event"] == expected
    assert body(state)["jobs"] == {status: 1, "finished": 1}


def test_missing_children_are_ignored_and_cycles_end(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    below = child(state, top, "tests.jobs.add", 1, 2)
    top.meta |= {"jobs:1,func:gone": "never-existed", "jobs:2,func:odd": 17, "other": "not-a-child"}
    top.save_meta()
    below.meta["jobs:0,func:up"] = top.id
    below.meta["jobs:1,func:self"] = below.id
    below.save_meta()
    work(state.redis)

    reconciler.run_once()

    assert body(state)["event"] == "job.success"
    assert body(state)["jobs"] == {"finished": 2}


def test_several_jobs_of_one_request_are_one_tree(state: State, reconciler: Reconciler) -> None:
    first, second = root(state), root(state, "tests.jobs.fail", "dry")
    promise_tree(state, first, second)
    work(state.redis, jobs=1)
    reconciler.run_once()
    assert deliveries(state) == []
    work(state.redis)

    reconciler.run_once()

    assert body(state)["event"] == "job.failure"
    assert body(state)["job_id"] == first.id
    assert body(state)["jobs"] == {"failed": 1, "finished": 1}


def test_children_are_known_after_the_roots_record_expired(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    first = child(state, top, "tests.jobs.add", 1, 2, order=0)
    child(state, top, "tests.jobs.fail", order=1)
    work(state.redis, jobs=2)
    reconciler.run_once()
    state.redis.delete(top.key, first.key)
    reconciler.run_once()
    assert deliveries(state) == []
    work(state.redis)

    reconciler.run_once()

    assert body(state)["event"] == "job.failure"
    assert body(state)["jobs"] == {"failed": 1, "finished": 2}


def test_tree_whose_jobs_are_all_gone_is_lost(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    reconciler.run_once()
    state.redis.flushdb()

    for _ in range(3):
        reconciler.run_once()

    assert body(state)["event"] == "job.lost"
    assert len(tree_events(state)) == 1


def test_reserved_tree_whose_job_has_not_come_is_waited_for(state: State, reconciler: Reconciler) -> None:
    job = root(state)
    endpoint_id = add_endpoint(state, URL, scope="tree")
    confirm(state.database, endpoint_id, existing=[job.id], unseen=["in-a-pipeline"], reserved_job_id=None)
    work(state.redis)

    reconciler.run_once()

    assert deliveries(state) == []


def test_a_tree_is_not_judged_while_the_view_may_still_enqueue(state: State, reconciler: Reconciler) -> None:
    """Its first job ends, and all who look look, before the view has enqueued the second or is done."""
    first = root(state)
    endpoint_id = add_endpoint(state, URL, scope="tree", reserved_job_id=first.id)
    work(state.redis)

    def look() -> None:
        reconciler.run_once()
        reconciler.trees.look_sooner([first.id])
        reconciler.trees.run_hinted()

    look()
    second = root(state)
    look()
    assert tree_events(state) == []

    confirm(state.database, endpoint_id, existing=[first.id, second.id], unseen=[], reserved_job_id=first.id)
    look()
    assert tree_events(state) == []
    work(state.redis)
    look()
    assert body(state)["jobs"] == {"finished": 2}
    assert len(tree_events(state)) == 1


def test_a_tree_whose_view_never_came_to_its_end_is_judged_by_what_is_there(
    state: State, reconciler: Reconciler
) -> None:
    first = root(state)
    add_endpoint(state, URL, scope="tree", reserved_job_id=first.id)
    work(state.redis)
    reconciler.run_once()
    assert tree_events(state) == []
    with state.database.write() as connection:
        connection.execute(update(Watch).values(created_at=datetime.now(UTC) - VIEW_GRACE))

    for _ in range(3):
        reconciler.run_once()

    assert body(state)["jobs"] == {"finished": 1}
    assert len(tree_events(state)) == 1


def test_many_looks_at_once_are_one_event(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    jobs = [child(state, top, "tests.jobs.add", 1, number, order=number) for number in range(8)]
    work(state.redis)
    start = threading.Barrier(4)

    def look() -> None:
        trees = TreeReporter(state.database, state.redis, publish=publisher(state), settings=state.settings)
        trees.look_sooner([top.id, *(job.id for job in jobs)])
        start.wait()
        trees.run_hinted()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reconciler.run_once()

    assert len(tree_events(state)) == 1
    assert body(state)["jobs"] == {"finished": 9}


def test_hint_from_a_member_reports_without_a_pass(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    last = child(state, top, "tests.jobs.add", 1, 2)
    reconciler.run_once()  # finds the member
    work(state.redis)

    reconciler.trees.look_sooner([last.id, "somebody-elses"])
    assert reconciler.trees.run_hinted() == ["job.success"]
    assert reconciler.trees.run_hinted() == []

    assert body(state)["jobs"] == {"finished": 2}


def test_tree_is_reported_to_its_own_endpoint_only(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    below = child(state, top, "tests.jobs.add", 1, 2)
    whole, part = promise_tree(state, top), promise_tree(state, below)
    single = add_endpoint(state, URL)
    confirm(state.database, single, existing=[top.id], unseen=[], reserved_job_id=None)
    work(state.redis)

    for _ in range(2):
        reconciler.run_once()

    bodies = {delivery.endpoint_id: json.loads(delivery.body) for delivery in deliveries(state)}
    assert len(deliveries(state)) == 3
    assert bodies[whole]["jobs"] == {"finished": 2}
    assert bodies[part]["jobs"] == {"finished": 1}
    assert bodies[part]["job_id"] == below.id
    assert "jobs" not in bodies[single]


def test_requeued_root_is_another_tree(state: State, reconciler: Reconciler) -> None:
    top = root(state, "tests.jobs.fail")
    promise_tree(state, top)
    work(state.redis)
    reconciler.run_once()
    FailedJobRegistry("default", state.redis).requeue(top.id)
    reconciler.run_once()
    assert len(tree_events(state)) == 1
    work(state.redis)

    reconciler.run_once()

    assert len(tree_events(state)) == 2
    assert len(deliveries(state)) == 2


def test_reported_tree_needs_no_further_look(state: State, reconciler: Reconciler) -> None:
    top = root(state)
    promise_tree(state, top)
    child(state, top, "tests.jobs.add", 1, 2)
    work(state.redis)
    reconciler.run_once()

    assert sorted(watch.status for watch in rows(state, Watch)) == ["closed", "settled"]
    started = time.perf_counter()
    assert reconciler.trees.run_once() == []
    assert time.perf_counter() - started < 1
