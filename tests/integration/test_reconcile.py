"""Reconcile against a real server: RQ's own functions make the states, nobody runs our callbacks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
import rq
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry

from flask_rq_webhooks.observe import reconcile
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.queue.outbox_entry import OutboxEntry
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import NewEndpoint, confirm, register
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.storage.models import Event, Watch
from flask_rq_webhooks.storage.reported_runs import ParkedReport, park_reports
from flask_rq_webhooks.storage.standing_endpoints import create_standing
from tests.jobs import Callbacks
from tests.pipeline import SECRET, add_endpoint, deliveries, events, open_state, rows, work

URL = "http://127.0.0.1:9/hook"

#: RQ 1.16 warns of its own functions inside jobs, which would make them fail.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Clock:
    """Aware UTC now, and as much later as a test wants."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


def publisher(state: State) -> Callable[[Sequence[IngestItem]], object]:
    return lambda items: ingest(
        state.database, items, render=state.render, max_attempts=state.settings.max_attempts
    )


@pytest.fixture
def reconciler(state: State, clock: Clock) -> Reconciler:
    return new_reconciler(state, clock)


def new_reconciler(state: State, clock: Clock) -> Reconciler:
    return Reconciler(
        state.database,
        state.redis,
        publish=publisher(state),
        settings=state.settings,
        outbox_key=state.outbox.key,
        clock=clock,
    )


def queue(state: State, **options: Any) -> rq.Queue:
    return rq.Queue(connection=state.redis, **options)


def promise(
    state: State, function: str, *args: Any, endpoint: dict[str, Any] | None = None, **options: Any
) -> Job:
    """Enqueue a job without callbacks, as if the callbacks were lost, and watch it."""
    endpoint_id = add_endpoint(state, URL, **(endpoint or {}))
    job = queue(state).enqueue_call(function, args, job_id=str(uuid.uuid4()), **options)
    confirm(state.database, endpoint_id, existing=[job.id], unseen=[], reserved_job_id=None)
    return job


def published(state: State) -> list[tuple[str, str | None]]:
    return [(event.type, event.job_id) for event in events(state)]


def statuses(state: State) -> list[str]:
    return [watch.status for watch in rows(state, Watch)]


def payload(state: State, number: int = -1) -> Any:
    return json.loads(deliveries(state)[number].body)


# -- endings ----------------------------------------------------------------------------------------------


def test_waiting_job_is_left_alone_and_its_run_is_noted(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)

    report = reconciler.run_once()

    assert report.looked_at == 1
    assert published(state) == []
    (watch,) = rows(state, Watch)
    assert (watch.status, watch.run) == ("open", format_time(Job.fetch(job.id, state.redis).enqueued_at))


def test_success_is_reported_with_the_result_rq_kept(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.run", "basin-7")
    work(state.redis)

    reconciler.run_once()

    assert published(state) == [("job.success", job.id)]
    assert statuses(state) == ["settled"]
    body = payload(state)
    assert body["result"] == {"runid": "basin-7"}
    assert body["runid"] == "basin-7"
    assert body["source"] == "reconciled"
    assert body["func"] == "tests.jobs.run"
    assert body["queue"] == "default"


def test_failure_is_reported_with_its_error(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.fail", "no rain")
    work(state.redis)

    reconciler.run_once()

    assert published(state) == [("job.failure", job.id)]
    body = payload(state)
    assert (body["error"]["type"], body["error"]["message"]) == ("ValueError", "no rain")
    assert "jobs.py" in body["error"]["traceback"]


def test_passes_report_once(state: State, reconciler: Reconciler) -> None:
    promise(state, "tests.jobs.add", 1, 2)
    work(state.redis)

    for _ in range(3):
        reconciler.run_once()

    assert len(events(state)) == 1
    assert len(deliveries(state)) == 1


def test_canceled_job_is_reported(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    job.cancel()

    reconciler.run_once()

    assert published(state) == [("job.canceled", job.id)]


def test_deferred_job_that_is_canceled_is_reported_under_its_creation(
    state: State, reconciler: Reconciler
) -> None:
    parent = queue(state).enqueue("tests.jobs.add", 1, 2)
    job = promise(state, "tests.jobs.add", 1, 2, depends_on=parent)
    reconciler.run_once()
    job.cancel()

    reconciler.run_once()

    assert published(state) == [("job.canceled", job.id)]
    assert events(state)[0].run_key == f"{job.id}|created:{format_time(job.created_at)}|end"
    assert statuses(state) == ["settled"]


def test_deleted_job_is_lost_after_two_passes(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    run = format_time(Job.fetch(job.id, state.redis).enqueued_at)
    reconciler.run_once()
    job.delete()

    reconciler.run_once()
    assert published(state) == []
    reconciler.run_once()

    assert published(state) == [("job.lost", job.id)]
    assert events(state)[0].run_key == f"{job.id}|{run}|end"
    assert statuses(state) == ["settled"]


def test_job_that_is_back_before_the_second_pass_is_not_lost(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    saved = state.redis.hgetall(job.key)
    state.redis.delete(job.key)
    reconciler.run_once()
    state.redis.hset(job.key, mapping=saved)
    reconciler.run_once()
    state.redis.delete(job.key)

    reconciler.run_once()

    assert published(state) == []
    assert rows(state, Watch)[0].missing_passes == 1


def test_nothing_is_lost_while_callbacks_words_wait(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    job.delete()
    old = int((time.time() - 60) * 1000)
    state.redis.xadd(state.outbox.key, {"entry": "waits"}, id=f"{old}-0")

    for _ in range(3):
        reconciler.run_once()
    assert published(state) == []
    state.redis.delete(state.outbox.key)
    for _ in range(2):
        reconciler.run_once()

    assert published(state) == [("job.lost", job.id)]


def test_lost_job_with_two_endpoints_is_one_event(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    reconciler.run_once()  # this watch knows the run
    other = add_endpoint(state, URL)
    confirm(state.database, other, existing=[job.id], unseen=[], reserved_job_id=None)
    job.delete()

    for _ in range(2):
        reconciler.run_once()

    assert published(state) == [("job.lost", job.id)]
    assert len(deliveries(state)) == 2


def test_late_report_of_a_lost_job_corrects_it(state: State, reconciler: Reconciler) -> None:
    endpoint_id = add_endpoint(state, URL)
    job = queue(state).enqueue("tests.jobs.add", 1, 2)
    run = format_time(job.enqueued_at)
    confirm(
        state.database, endpoint_id, existing=[job.id], unseen=[], reserved_job_id=None, runs={job.id: run}
    )
    job.delete()
    for _ in range(2):
        reconciler.run_once()

    entry = OutboxEntry(kind="success", endpoint=endpoint_id, job_id=job.id, run=run, at=time.time())
    for _ in range(2):
        park_reports(state.database, [ParkedReport(endpoint_id, job.id, entry.to_json())])
        reconciler.run_once()

    lost, correction = events(state)
    assert (lost.type, lost.run_key) == ("job.lost", f"{job.id}|{run}|end")
    assert (correction.type, correction.supersedes) == ("job.success", lost.id)
    assert statuses(state) == ["settled"]


def test_heartbeat_ghost_counts_as_absent(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    job.delete()
    state.redis.hset(job.key, "last_heartbeat", "2026-01-01T00:00:00.000000Z")

    for _ in range(2):
        reconciler.run_once()

    assert published(state) == [("job.lost", job.id)]


def test_redis_wiped_with_200_jobs_waiting(state: State, reconciler: Reconciler) -> None:
    jobs = {promise(state, "tests.jobs.add", 1, number).id for number in range(200)}
    reconciler.run_once()
    state.redis.flushdb()

    for _ in range(3):
        reconciler.run_once()

    assert {event.job_id for event in events(state)} == jobs
    assert {event.type for event in events(state)} == {"job.lost"}
    assert len(deliveries(state)) == 200


# -- reserved ids -----------------------------------------------------------------------------------------


def reserve(state: State) -> tuple[str, str]:
    job_id = str(uuid.uuid4())
    checked = state.url_policy.check_url(URL)
    endpoint_id = register(
        state.database,
        state.cipher,
        NewEndpoint(url=checked.url, host=checked.host_key, secret=SECRET),
        namespace=state.namespace,
        reserved_job_id=job_id,
    )
    return endpoint_id, job_id


def test_reserved_id_whose_job_never_came_is_closed(
    state: State, reconciler: Reconciler, clock: Clock
) -> None:
    reserve(state)
    reconciler.run_once()
    assert statuses(state) == ["reserved"]
    clock.ahead = timedelta(minutes=20)

    reconciler.run_once()

    assert statuses(state) == ["closed"]
    assert published(state) == []


def test_reserved_watch_whose_job_exists_is_adopted(state: State, reconciler: Reconciler) -> None:
    _endpoint_id, job_id = reserve(state)
    queue(state).enqueue_call("tests.jobs.add", (1, 2), job_id=job_id)

    report = reconciler.run_once()

    assert report.adopted == 1
    assert statuses(state) == ["open"]
    work(state.redis)
    reconciler.run_once()
    assert published(state) == [("job.success", job_id)]


def test_reserved_watch_whose_job_has_ended_is_reported_at_once(state: State, reconciler: Reconciler) -> None:
    _endpoint_id, job_id = reserve(state)
    queue(state).enqueue_call("tests.jobs.add", (1, 2), job_id=job_id)
    work(state.redis)

    reconciler.run_once()

    assert published(state) == [("job.success", job_id)]
    assert statuses(state) == ["settled"]


def test_run_before_registration_does_not_count_the_next_one_does(
    state: State, reconciler: Reconciler
) -> None:
    job = queue(state).enqueue("tests.jobs.add", 1, 2)
    work(state.redis)
    past = format_time(datetime.now(UTC) - timedelta(seconds=30))
    state.redis.hset(job.key, mapping={"enqueued_at": past, "created_at": past})
    endpoint_id = add_endpoint(state, URL)
    confirm(state.database, endpoint_id, existing=[job.id], unseen=[], reserved_job_id=None)

    reconciler.run_once()
    assert published(state) == []
    queue(state).enqueue_job(Job.fetch(job.id, state.redis))
    work(state.redis)
    reconciler.run_once()

    assert published(state) == [("job.success", job.id)]


# -- runs -------------------------------------------------------------------------------------------------


def requeue(job: Job) -> None:
    FailedJobRegistry(job.origin, job.connection).requeue(job.id)


def test_requeued_job_is_a_new_run_with_a_new_event(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.fail")
    work(state.redis)
    reconciler.run_once()
    requeue(job)
    work(state.redis)

    reconciler.run_once()

    assert published(state) == [("job.failure", job.id)] * 2
    keys = [event.run_key for event in events(state)]
    assert len(set(keys)) == 2
    assert keys[1] == f"{job.id}|{format_time(Job.fetch(job.id, state.redis).enqueued_at)}|end"


def test_run_that_failed_and_was_requeued_between_two_passes_is_reported(
    state: State, reconciler: Reconciler
) -> None:
    job = promise(state, "tests.jobs.fail")
    first_run = format_time(Job.fetch(job.id, state.redis).enqueued_at)
    reconciler.run_once()
    work(state.redis)
    requeue(job)

    reconciler.run_once()
    assert [event.run_key for event in events(state)] == [f"{job.id}|{first_run}|end"]
    work(state.redis)
    reconciler.run_once()

    assert published(state) == [("job.failure", job.id)] * 2


def test_retry_is_no_ending_and_is_reported_to_those_who_asked(state: State, reconciler: Reconciler) -> None:
    wants = {"endpoint": {"events": ("job.retrying", "job.failure")}}
    job = promise(state, "tests.jobs.fail", retry=rq.Retry(max=1), **wants)
    reconciler.run_once()
    work(state.redis, 1)

    reconciler.run_once()
    assert published(state) == [("job.retrying", job.id)]
    work(state.redis)
    reconciler.run_once()

    assert published(state) == [("job.retrying", job.id), ("job.failure", job.id)]
    assert len(deliveries(state)) == 2


def test_every_run_of_a_repeated_job_is_reported(state: State, reconciler: Reconciler) -> None:
    repeat = pytest.importorskip("rq.repeat").Repeat
    endpoint_id = add_endpoint(state, URL)
    job = queue(state).enqueue("tests.jobs.add", 1, 2, repeat=repeat(times=1, interval=3600))
    confirm(state.database, endpoint_id, existing=[job.id], unseen=[], reserved_job_id=None)
    work(state.redis)
    reconciler.run_once()
    reconciler.run_once()
    assert statuses(state) == ["open"]
    queue(state).enqueue_job(Job.fetch(job.id, state.redis))  # what the scheduler does an hour later
    work(state.redis)

    reconciler.run_once()
    assert published(state) == [("job.success", job.id)] * 2
    job.delete()
    for _ in range(4):
        reconciler.run_once()

    assert published(state) == [("job.success", job.id)] * 2
    assert statuses(state) == ["settled"]


# -- corrections ------------------------------------------------------------------------------------------


def test_orphan_that_finishes_is_corrected_once(state: State, reconciler: Reconciler, clock: Clock) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    work(state.redis)
    state.redis.hset(job.key, "status", "failed")
    reconciler.run_once()
    assert published(state) == [("job.failure", job.id)]
    state.redis.hset(job.key, "status", "finished")
    clock.ahead = timedelta(hours=5)

    reconciler.run_once()

    first, correction = events(state)
    assert (correction.type, correction.supersedes) == ("job.success", first.id)
    assert payload(state)["supersedes"] == first.id
    state.redis.hset(job.key, "status", "failed")
    for _ in range(2):
        reconciler.run_once()
    assert len(events(state)) == 2


def test_verdict_is_final_after_a_day(state: State, reconciler: Reconciler, clock: Clock) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    job.cancel()
    reconciler.run_once()
    state.redis.hset(job.key, "status", "finished")
    clock.ahead = timedelta(hours=25)

    reconciler.run_once()

    assert published(state) == [("job.canceled", job.id)]


def test_lost_job_that_comes_back_is_corrected(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    saved = state.redis.hgetall(job.key)
    state.redis.delete(job.key)
    for _ in range(2):
        reconciler.run_once()
    state.redis.hset(job.key, mapping=saved)
    work(state.redis)

    reconciler.run_once()

    assert [(event.type, event.supersedes) for event in events(state)] == [
        ("job.lost", None),
        ("job.success", events(state)[0].id),
    ]


def test_new_reconciler_knows_of_corrections_made(state: State, reconciler: Reconciler, clock: Clock) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    job.cancel()
    reconciler.run_once()
    state.redis.hset(job.key, "status", "finished")
    reconciler.run_once()

    new_reconciler(state, clock).run_once()

    assert published(state) == [("job.canceled", job.id), ("job.success", job.id)]


# -- callbacks' words -------------------------------------------------------------------------------------


def word(state: State, job: Job, kind: str = "success", **values: Any) -> OutboxEntry:
    (watch,) = rows(state, Watch)
    run = format_time(Job.fetch(job.id, state.redis).enqueued_at)
    entry = OutboxEntry(
        kind=kind,
        endpoint=watch.endpoint_id,
        job_id=job.id,
        run=run,
        at=time.time(),
        enqueued_at=run,
        **values,
    )
    park_reports(state.database, [ParkedReport(entry.endpoint, job.id, entry.to_json())])
    return entry


def test_parked_word_waits_for_the_commit(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    word(state, job, result={"big": "result"})

    reconciler.run_once()
    assert published(state) == []
    state.redis.hset(job.key, "status", "finished")
    reconciler.run_once()

    assert published(state) == [("job.success", job.id)]
    assert payload(state)["result"] == {"big": "result"}
    assert rows(state, Watch)[0].evidence is None


def test_parked_word_stands_where_the_job_is_gone(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    word(state, job, result=7)
    job.delete()

    reconciler.run_once()

    assert published(state) == [("job.success", job.id)]
    assert payload(state)["result"] == 7


def test_parked_word_of_an_earlier_run_is_judged_by_rqs_results(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.fail")
    entry = word(state, job, result=7)
    work(state.redis)
    requeue(job)

    reconciler.run_once()

    (event,) = events(state)
    assert (event.type, event.run_key) == ("job.failure", f"{job.id}|{entry.run}|end")


# -- blocked ----------------------------------------------------------------------------------------------

BLOCKED = {"endpoint": {"events": ("job.blocked", "job.success", "job.failure")}}


def test_job_behind_a_failed_one_is_blocked_once(state: State, reconciler: Reconciler) -> None:
    parent = queue(state).enqueue("tests.jobs.fail")
    job = promise(state, "tests.jobs.add", 1, 2, depends_on=parent, **BLOCKED)
    reconciler.run_once()
    assert published(state) == []
    work(state.redis)

    for _ in range(3):
        reconciler.run_once()

    assert published(state) == [("job.blocked", job.id)]
    assert len(deliveries(state)) == 1
    queue(state)._enqueue_job(Job.fetch(job.id, state.redis))  # as when its parent is requeued and finishes
    work(state.redis)
    reconciler.run_once()
    assert published(state)[-1] == ("job.success", job.id)


def test_job_behind_a_failed_one_it_may_ignore_is_not_blocked(state: State, reconciler: Reconciler) -> None:
    parent = queue(state).enqueue("tests.jobs.fail")
    dependency = rq.job.Dependency(jobs=[parent], allow_failure=True)
    job = promise(state, "tests.jobs.add", 1, 2, depends_on=dependency, **BLOCKED)
    work(state.redis)

    reconciler.run_once()

    assert published(state) == [("job.success", job.id)]


def test_job_behind_a_deleted_one_is_blocked_after_two_passes(state: State, reconciler: Reconciler) -> None:
    parent = queue(state).enqueue("tests.jobs.add", 1, 2)
    job = promise(state, "tests.jobs.add", 1, 2, depends_on=parent, **BLOCKED)
    parent.delete()

    reconciler.run_once()
    assert published(state) == []
    reconciler.run_once()

    assert published(state) == [("job.blocked", job.id)]


def test_nobody_who_did_not_ask_hears_of_a_blocked_job(state: State, reconciler: Reconciler) -> None:
    parent = queue(state).enqueue("tests.jobs.fail")
    promise(state, "tests.jobs.add", 1, 2, depends_on=parent)
    work(state.redis)

    reconciler.run_once()
    assert published(state) == []
    endpoint = NewEndpoint(url=URL, host="127.0.0.1:9", kind="standing", events=("job.blocked",))
    create_standing(state.database, state.cipher, endpoint, namespace=state.namespace)
    reconciler.run_once()

    assert [event.type for event in events(state)] == ["job.blocked"]
    assert len(deliveries(state)) == 1


# -- abandoned --------------------------------------------------------------------------------------------


def abandon(state: State, job: Job) -> None:
    """Leave *job* as a worker does that was killed long ago."""
    state.redis.lrem("rq:queue:default", 0, job.id)
    state.redis.hset(job.key, mapping={"status": "started", "started_at": format_time(datetime.now(UTC))})
    registry = StartedJobRegistry("default", connection=state.redis)
    entry = f"{job.id}:execution" if hasattr(registry, "remove_executions") else job.id
    state.redis.zadd(registry.key, {entry: time.time() - 10})


def test_abandoned_job_waits_for_rq(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    abandon(state, job)

    for _ in range(2):
        reconciler.run_once()

    assert published(state) == []
    assert state.redis.hget(job.key, "status") == b"started"


def test_clean_abandoned_lets_rq_end_it(database_url: str, redis_url: str, clock: Clock) -> None:
    with open_state(database_url, redis_url, clean_abandoned=True) as state:
        reconciler = new_reconciler(state, clock)
        job = promise(state, "tests.jobs.add", 1, 2, on_failure=rq.Callback("tests.jobs.note_failure"))
        abandon(state, job)
        reconciler.run_once()  # sees that it runs

        report = reconciler.run_once()
        assert report.cleaned_queues == 1
        reconciler.run_once()

        assert published(state) == [("job.failure", job.id)]
        assert payload(state)["error"]["type"] == "AbandonedJobError"
        assert state.redis.lrange("noted", 0, -1)[0].startswith(b"failure " + job.id.encode())


# -- watch() ----------------------------------------------------------------------------------------------


def watch(state: State, job: Job, **options: Any) -> str:
    checked = state.url_policy.check_url(URL)
    return register(
        state.database,
        state.cipher,
        NewEndpoint(url=checked.url, host=checked.host_key, secret=SECRET),
        namespace=state.namespace,
        watched_job_id=job.id,
        **options,
    )


@pytest.mark.parametrize("ended", [False, True], ids=["queued", "already ended"])
def test_watched_job_made_elsewhere(state: State, reconciler: Reconciler, ended: bool) -> None:
    job = queue(state).enqueue("tests.jobs.add", 1, 2)
    past = datetime.now(UTC) - timedelta(minutes=5)
    state.redis.hset(job.key, "enqueued_at", format_time(past))
    if ended:
        work(state.redis)
    watch(state, job, counts_from=past)
    if not ended:
        work(state.redis)
    state.redis.hset(job.key, "enqueued_at", format_time(past))

    reconciler.run_once()

    assert published(state) == [("job.success", job.id)]
    assert len(deliveries(state)) == 1


def test_watch_without_a_bound_counts_from_now_on(state: State, reconciler: Reconciler) -> None:
    job = queue(state).enqueue("tests.jobs.fail")
    work(state.redis)
    past = format_time(datetime.now(UTC) - timedelta(minutes=5))
    state.redis.hset(job.key, mapping={"enqueued_at": past, "created_at": past})
    watch(state, job)

    reconciler.run_once()
    assert published(state) == []
    requeue(job)
    work(state.redis)
    reconciler.run_once()

    assert published(state) == [("job.failure", job.id)]


# -- robustness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        pytest.param("tests.jobs.same", (Callbacks(),), id="pickle of a foreign class"),
        pytest.param("tests.jobs.own_job", (), id="RQ could not pickle it"),
    ],
)
def test_result_that_cannot_be_read_is_left_out_and_marked(
    state: State, reconciler: Reconciler, function: str, arguments: tuple[Any, ...]
) -> None:
    promise(state, function, *arguments)
    work(state.redis)

    reconciler.run_once()

    body = payload(state)
    assert body["event"] == "job.success"
    assert body["result"] is None
    assert body["result_truncated"] is True


def test_meta_with_foreign_objects_still_gives_the_run_id(state: State, reconciler: Reconciler) -> None:
    job = promise(state, "tests.jobs.add", 1, 2)
    job.meta = {"runid": "from-meta", "exotic": rq.Queue}
    job.save_meta()
    work(state.redis)

    reconciler.run_once()

    assert payload(state)["runid"] == "from-meta"


def test_more_watches_than_a_page(
    state: State, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_rq_webhooks.observe.reconcile.PAGE", 7)
    jobs = [promise(state, "tests.jobs.add", 1, number).id for number in range(20)]
    reconciler.run_once()
    work(state.redis)

    reconciler.run_once()

    assert sorted(event.job_id for event in events(state)) == sorted(jobs)
    report = reconciler.run_once()
    assert report.looked_at == 20  # the settled ones
    assert not report.reported


def test_settled_watches_are_kept_as_long_as_rq_keeps_the_job(
    state: State, reconciler: Reconciler, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [promise(state, "tests.jobs.add", number, 1) for number in range(9)]
    work(state.redis)
    reconciler.run_once()
    for job in jobs[2:]:
        job.delete()
    clock.ahead = timedelta(minutes=20)
    monkeypatch.setattr(reconcile, "PAGE", 2)

    assert reconciler.run_once().looked_at == 9
    kept = {watch.job_id for watch in rows(state, Watch) if watch.recheck_at is not None}
    assert kept == {job.id for job in jobs[:2]}
    assert reconciler.run_once().looked_at == 2


def test_forgotten_job_that_is_back_under_its_id_is_found_by_the_sweep(
    state: State, reconciler: Reconciler, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "PAGE", 2)
    monkeypatch.setattr(reconcile, "FORGOTTEN_AT_ONCE", 2)
    jobs = [promise(state, "tests.jobs.add", number, 1) for number in range(6)]
    work(state.redis)
    reconciler.run_once()
    for job in jobs:
        job.delete()
    clock.ahead = timedelta(days=9)
    reconciler.run_once()
    queue(state).enqueue_call("tests.jobs.add", (1, 2), job_id=jobs[4].id)
    work(state.redis)

    for _ in range(4):
        reconciler.run_once()

    assert published(state)[6:] == [("job.success", jobs[4].id)]


def test_pass_that_dies_before_noting_repeats_without_harm(
    state: State, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    promise(state, "tests.jobs.fail")
    reconciler.run_once()
    work(state.redis)

    def die(*_arguments: object, **_keywords: object) -> None:
        raise redis.ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("flask_rq_webhooks.storage.watches.write_updates", die)
        with pytest.raises(redis.ConnectionError):
            reconciler.run_once()
    reconciler.run_once()

    assert len(events(state)) == 1
    assert rows(state, Event)[0].type == "job.failure"
