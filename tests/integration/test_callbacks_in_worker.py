"""What stock ``rq worker`` processes leave in the outbox, and that they work as they do without us."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from rq.command import send_stop_job_command
from rq.job import Job
from rq.registry import StartedJobRegistry

from flask_rq_webhooks.queue.job_callbacks import Attachment, Queue, current_attachment
from flask_rq_webhooks.queue.job_reader import read_jobs
from flask_rq_webhooks.queue.outbox import Outbox
from flask_rq_webhooks.queue.outbox_entry import OutboxEntry
from tests import jobs
from tests.servers import ROOT, rq_worker, valkey_server, wait_until

NAMESPACE = "nnnnnnnn"
ENDPOINT = f"ep{NAMESPACE}_" + "0" * 26
REFUSES_COROUTINES = hasattr(rq, "callbacks") and hasattr(rq.callbacks, "execute_success_callback")
SURVIVES_RAISING_ON_STOPPED = REFUSES_COROUTINES  # both from RQ 3 on


@contextmanager
def attached() -> Iterator[Attachment]:
    attachment = Attachment(ENDPOINT, ENDPOINT)
    reset = current_attachment.set(attachment)
    try:
        yield attachment
    finally:
        current_attachment.reset(reset)


def enqueue(client: redis.Redis, function: Any, *args: Any, **options: Any) -> Job:
    with attached():
        return Queue("default", connection=client).enqueue(function, *args, **options)


def work(client: redis.Redis, url: str, **options: Any) -> str:
    """Let a stock worker do all there is and return what it printed."""
    with rq_worker(url, burst=True, **options) as worker:
        worker.wait()
        return worker.output


def entries(client: redis.Redis) -> list[OutboxEntry]:
    """Return what is in the outbox; all of it has to be valid."""
    box = Outbox(client, NAMESPACE)
    found = []
    while read := box.read("reader", 100, 0):
        assert [entry.error for entry in read] == [None] * len(read)
        found += [entry.entry for entry in read if entry.entry is not None]
    return found


def status_of(client: redis.Redis, job: Job) -> str | None:
    return read_jobs(client, [job.id])[job.id].status


def noted(client: redis.Redis) -> list[str]:
    return [value.decode() for value in client.lrange("noted", 0, -1)]


# -- endings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker_class", ["rq.Worker", "rq.SimpleWorker"])
def test_success_and_failure(worker_class: str, redis_client: redis.Redis, redis_url: str) -> None:
    good = enqueue(redis_client, jobs.run, "basin-7", 2)
    bad = enqueue(redis_client, jobs.fail, "no such basin")
    before = time.time()
    work(redis_client, redis_url, worker_class=worker_class)

    success, failure = entries(redis_client)
    states = read_jobs(redis_client, [good.id, bad.id])
    for entry, job, kind, status in [
        (success, good, "success", "finished"),
        (failure, bad, "failure", "failed"),
    ]:
        assert (entry.kind, entry.job_id, entry.endpoint) == (kind, job.id, ENDPOINT)
        assert states[job.id].status == status
        assert entry.run == states[job.id].run == entry.enqueued_at
        assert before - 1 < entry.at < time.time()
        assert entry.queue == "default"
        assert entry.func == f"tests.jobs.{'run' if job is good else 'fail'}"
        assert entry.created_at is not None
        assert entry.started_at is not None
        assert entry.created_at <= entry.run <= entry.started_at
    assert (success.runid, success.result) == ("basin-7", {"runid": "basin-7"})
    assert failure.error is not None
    assert (failure.error["type"], failure.error["message"]) == ("ValueError", "no such basin")
    assert failure.error["traceback"].startswith("Traceback (most recent call last):\n")
    assert failure.error["traceback"].endswith("ValueError: no such basin\n")


def test_every_retry_is_reported_as_a_run_of_its_own(redis_client: redis.Redis, redis_url: str) -> None:
    job = enqueue(redis_client, jobs.fail, retry=rq.Retry(2))
    work(redis_client, redis_url)

    found = entries(redis_client)
    assert [(entry.kind, entry.retries_left) for entry in found] == [
        ("failure", 2),
        ("failure", 1),
        ("failure", 0),
    ]
    assert len({entry.run for entry in found}) == 3
    assert read_jobs(redis_client, [job.id])[job.id].run == found[-1].run


def test_requeued_job_is_another_run(redis_client: redis.Redis, redis_url: str) -> None:
    job = enqueue(redis_client, jobs.fail)
    work(redis_client, redis_url)
    Job.fetch(job.id, connection=redis_client).requeue()
    work(redis_client, redis_url)

    first, second = entries(redis_client)
    assert first.job_id == second.job_id == job.id
    assert first.run < second.run


def stop_running_job(client: redis.Redis, url: str, job: Job) -> tuple[int, str]:
    """Start a worker, send the stop command, and return the worker's pid and output."""
    with rq_worker(url) as worker:
        client.blpop(["pids"], timeout=20)
        send_stop_job_command(client, job.id)
        wait_until(lambda: client.xlen(f"rq_webhooks:outbox:ep{NAMESPACE}"))
        wait_until(lambda: status_of(client, job) != "started" or worker.popen.poll() is not None)
        return worker.pid, worker.output


def test_stopped_job_with_the_users_callback_in_the_worker(redis_client: redis.Redis, redis_url: str) -> None:
    job = enqueue(
        redis_client, jobs.sleep_after_note, "basin-7", 60, on_stopped=rq.Callback(jobs.note_stopped)
    )
    pid, _output = stop_running_job(redis_client, redis_url, job)

    assert noted(redis_client) == [f"stopped {job.id} {pid}"]
    (entry,) = entries(redis_client)
    assert (entry.kind, entry.job_id, entry.func, entry.runid) == (
        "stopped", job.id, "tests.jobs.sleep_after_note", "basin-7",
    )  # fmt: skip
    state = read_jobs(redis_client, [job.id])[job.id]
    assert (state.status, state.run) == ("stopped", entry.run)


def test_raising_on_stopped_keeps_its_meaning_and_the_ending_is_reported(
    redis_client: redis.Redis, redis_url: str
) -> None:
    job = enqueue(
        redis_client, jobs.sleep_after_note, "basin-7", 60, on_stopped=rq.Callback(jobs.raise_on_stopped)
    )
    _pid, output = stop_running_job(redis_client, redis_url, job)

    assert [entry.kind for entry in entries(redis_client)] == ["stopped"]
    assert "the user's on_stopped" in output
    assert (status_of(redis_client, job) == "stopped") is SURVIVES_RAISING_ON_STOPPED


def test_other_failures(redis_client: redis.Redis, redis_url: str) -> None:
    made = [
        enqueue(redis_client, jobs.sleep, 30, job_timeout=1),
        enqueue(redis_client, jobs.system_exit),
        enqueue(redis_client, "tests.jobs.no_such_function"),
        enqueue(redis_client, "no_such_module.function"),
        enqueue(redis_client, jobs.unprintable_error),
    ]
    work(redis_client, redis_url)

    found = entries(redis_client)
    assert [entry.job_id for entry in found] == [job.id for job in made]
    assert [entry.error and entry.error["type"] for entry in found] == [
        "JobTimeoutException", "SystemExit", "ValueError", "ValueError", "UnprintableError",
    ]  # fmt: skip
    assert found[-1].error is not None
    assert found[-1].error["message"] == "<unprintable UnprintableError: RuntimeError>"
    assert {state.status for state in read_jobs(redis_client, [job.id for job in made]).values()} == {
        "failed"
    }


def test_killed_work_horse_reports_nothing(redis_client: redis.Redis, redis_url: str) -> None:
    job = enqueue(redis_client, jobs.kill_work_horse)
    work(redis_client, redis_url)

    assert entries(redis_client) == []
    assert status_of(redis_client, job) == "failed"


def test_abandoned_job_is_reported_by_the_cleaner(redis_client: redis.Redis, redis_url: str) -> None:
    job = enqueue(redis_client, jobs.sleep_after_note, "basin-7", 60)
    with rq_worker(redis_url) as worker:
        _key, horse = redis_client.blpop(["pids"], timeout=20)
        worker.kill(signal.SIGKILL)
        os.kill(int(horse), signal.SIGKILL)
        worker.wait()
    registry = StartedJobRegistry("default", connection=redis_client)
    for member in redis_client.zrange(registry.key, 0, -1):
        redis_client.zadd(registry.key, {member: 1})
    registry.cleanup()

    (entry,) = entries(redis_client)
    assert entry.error is not None
    assert (entry.kind, entry.job_id, entry.error["type"], entry.runid) == (
        "failure", job.id, "AbandonedJobError", "basin-7",
    )  # fmt: skip
    state = read_jobs(redis_client, [job.id])[job.id]
    assert (state.status, state.run) == ("failed", entry.run)


# -- results ------------------------------------------------------------------------------------------------


def test_results_of_any_type(redis_client: redis.Redis, redis_url: str) -> None:
    expected = [
        (enqueue(redis_client, jobs.same, None), None),
        (enqueue(redis_client, jobs.same, (1, [2, {"a": {3}}])), [1, [2, {"a": [3]}]]),
        (enqueue(redis_client, jobs.same, Path("/data/basin-7")), "/data/basin-7"),
        (enqueue(redis_client, jobs.same, float("nan")), None),
        (enqueue(redis_client, jobs.same, "h\u00f6lle \ud800"), "h\u00f6lle \\ud800"),
        (enqueue(redis_client, jobs.same, b"\xff"), "<bytes length=1>"),
        (enqueue(redis_client, jobs.unprintable), "<unprintable Unprintable: RuntimeError>"),
        (own := enqueue(redis_client, jobs.own_job), own.id),
        (huge := enqueue(redis_client, jobs.huge), None),
    ]
    work(redis_client, redis_url)

    found = entries(redis_client)
    assert [(entry.kind, entry.job_id, entry.result) for entry in found] == [
        ("success", job.id, result) for job, result in expected
    ]
    assert [entry.job_id for entry in found if entry.result_truncated] == [huge.id]
    states = read_jobs(redis_client, [job.id for job, _result in expected])
    assert {state.status for state in states.values()} == {"finished"}


# -- the user's own callbacks -------------------------------------------------------------------------------


def test_users_success_callback_runs_in_the_work_horse(redis_client: redis.Redis, redis_url: str) -> None:
    callbacks = [rq.Callback(jobs.note_success), rq.Callback("tests.jobs.note_success", timeout=5)]
    made = [enqueue(redis_client, jobs.process_id, on_success=callback) for callback in callbacks]
    work(redis_client, redis_url)

    found = entries(redis_client)
    assert noted(redis_client) == [
        f"success {job.id} {entry.result} {entry.result}" for job, entry in zip(made, found, strict=True)
    ]


def test_users_failure_callback_and_static_methods(redis_client: redis.Redis, redis_url: str) -> None:
    good = enqueue(redis_client, jobs.add, 1, 2, on_success=rq.Callback("tests.jobs.Callbacks.note_success"))
    bad = enqueue(redis_client, jobs.fail, "no", on_failure=rq.Callback(jobs.note_failure))
    work(redis_client, redis_url)

    assert noted(redis_client) == [f"static {good.id} 3", f"failure {bad.id} ValueError no traceback"]
    assert [entry.kind for entry in entries(redis_client)] == ["success", "failure"]


@pytest.mark.parametrize(
    ("callback", "kind", "message"),
    [
        (rq.Callback(jobs.raise_on_success), "LookupError", "the user's on_success"),
        (
            rq.Callback("tests.jobs.no_such_callback"),
            "ValueError",
            "Invalid attribute name: no_such_callback",
        ),
        (
            rq.Callback("no_such_module.callback"),
            "ValueError",
            "Invalid attribute name: no_such_module.callback",
        ),
        (rq.Callback(lambda *args: None), "ValueError", "Invalid attribute name: <lambda>"),
        (
            rq.Callback(jobs.too_slow_on_success, timeout=1),
            "JobTimeoutException",
            "Task exceeded maximum timeout",
        ),
    ],
    ids=["raises", "not there", "no module", "lambda", "too slow"],
)
def test_success_callback_that_fails_makes_the_job_fail_as_before(
    callback: rq.Callback, kind: str, message: str, redis_client: redis.Redis, redis_url: str
) -> None:
    with_us = enqueue(
        redis_client, jobs.add, 1, 2, on_success=callback, on_failure=rq.Callback(jobs.note_failure)
    )
    without = rq.Queue("default", connection=redis_client).enqueue(
        jobs.add, 1, 2, on_success=callback, on_failure=rq.Callback(jobs.note_failure)
    )
    work(redis_client, redis_url)

    (entry,) = entries(redis_client)
    assert entry.error is not None
    assert (entry.kind, entry.job_id, entry.error["type"]) == ("failure", with_us.id, kind)
    assert entry.error["message"].startswith(message)
    assert [status_of(redis_client, job) for job in (with_us, without)] == ["failed", "failed"]
    ours, theirs = noted(redis_client)
    assert ours.replace(with_us.id, "") == theirs.replace(without.id, "")


def test_failure_callback_that_raises_replaces_the_error_as_before(
    redis_client: redis.Redis, redis_url: str
) -> None:
    job = enqueue(redis_client, jobs.fail, "the job's", on_failure=rq.Callback(jobs.raise_on_failure))
    work(redis_client, redis_url)

    (entry,) = entries(redis_client)
    assert entry.error is not None
    assert entry.error["message"] == "the job's"
    latest = Job.fetch(job.id, connection=redis_client).latest_result()
    assert latest is not None
    assert "LookupError: the user's on_failure" in (latest.exc_string or "")


@pytest.mark.parametrize("attach_ours", [True, False])
def test_coroutine_callbacks(attach_ours: bool, redis_client: redis.Redis, redis_url: str) -> None:
    callback = rq.Callback(jobs.coroutine_on_success)
    if attach_ours:
        job = enqueue(redis_client, jobs.add, 1, 2, on_success=callback)
    else:
        job = rq.Queue("default", connection=redis_client).enqueue(jobs.add, 1, 2, on_success=callback)
    work(redis_client, redis_url)

    assert status_of(redis_client, job) == ("failed" if REFUSES_COROUTINES else "finished")
    if attach_ours:
        (entry,) = entries(redis_client)
        assert entry.kind == ("failure" if REFUSES_COROUTINES else "success")
        if REFUSES_COROUTINES:
            assert entry.error is not None
            assert entry.error["message"] == "Coroutine success callbacks are not supported"


# -- hosts --------------------------------------------------------------------------------------------------


def test_meta_may_be_overwritten_by_anyone(redis_client: redis.Redis, redis_url: str) -> None:
    job = enqueue(redis_client, jobs.overwrite_meta)
    job.meta = {}
    job.save_meta()  # the host's hook, after enqueuing
    work(redis_client, redis_url)

    (entry,) = entries(redis_client)
    assert (entry.kind, entry.job_id, entry.result) == ("success", job.id, "saved")
    assert Job.fetch(job.id, connection=redis_client).meta == {"jobs:0,func:build": "child-1"}


def test_redis_holds_nothing_of_ours_but_the_names_and_the_outbox(
    redis_client: redis.Redis, redis_url: str
) -> None:
    with_us = enqueue(redis_client, jobs.run, "basin-7")
    without = rq.Queue("default", connection=redis_client).enqueue(jobs.run, "basin-7")
    ours, theirs = (redis_client.hgetall(f"rq:job:{job.id}") for job in (with_us, without))

    assert {name.decode() for name in ours.keys() ^ theirs.keys()} == {
        f"{kind}_callback_timeout" for kind in ("success", "failure", "stopped")
    }
    assert {name.decode() for name in theirs if ours[name] != theirs[name]} == {
        "created_at", "enqueued_at",
        "success_callback_name", "failure_callback_name", "stopped_callback_name",
    }  # fmt: skip
    assert redis_client.keys("*webhooks*") == []
    work(redis_client, redis_url)
    assert redis_client.keys("*webhooks*") == [b"rq_webhooks:outbox:epnnnnnnnn"]


BLOCKED = (
    "flask",
    "werkzeug",
    "jinja2",
    "sqlalchemy",
    "requests",
    "marshmallow",
    "cryptography",
    "limits",
    "idna",
)
SITECUSTOMIZE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is blocked in this worker", name=name)

sys.meta_path.insert(0, Refuse())
"""


def test_worker_that_has_nothing_but_rq(redis_client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    tmp_path.joinpath("sitecustomize.py").write_text(SITECUSTOMIZE)
    for name in BLOCKED:
        rq.Queue("default", connection=redis_client).enqueue(
            jobs.import_module, name, job_id=f"import-{name}"
        )
    enqueue(redis_client, jobs.add, 1, 2)
    enqueue(redis_client, jobs.fail)
    work(redis_client, redis_url, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})

    assert [entry.kind for entry in entries(redis_client)] == ["success", "failure"]
    states = read_jobs(redis_client, [f"import-{name}" for name in BLOCKED])
    assert {state.status for state in states.values()} == {"failed"}  # the block works


def test_worker_without_this_package_fails_the_job_as_rq_does(
    redis_client: redis.Redis, redis_url: str
) -> None:
    """Documented: workers need the package. Nothing we could run there could help."""
    name = f"flask_rq_webhooks_not_installed.callbacks.success.{ENDPOINT}"
    job = rq.Queue("default", connection=redis_client).enqueue(jobs.add, 1, 2, on_success=rq.Callback(name))
    work(redis_client, redis_url)
    assert status_of(redis_client, job) == "failed"


# -- time ---------------------------------------------------------------------------------------------------


def test_slow_users_callback_within_its_timeout_makes_no_good_job_fail(
    redis_client: redis.Redis, redis_url: str
) -> None:
    """0.8 s of one second are gone when our part begins."""
    made = [
        enqueue(redis_client, jobs.add, 1, 2, on_success=rq.Callback(jobs.slow_on_success, timeout=1))
        for _number in range(3)
    ]
    work(redis_client, redis_url)

    assert [entry.kind for entry in entries(redis_client)] == ["success"] * 3
    assert [status_of(redis_client, job) for job in made] == ["finished"] * 3


def test_redis_that_stops_answering_costs_three_seconds_and_no_job() -> None:
    """The server is silent for 5 seconds right when our part begins."""
    with valkey_server() as server:
        client = redis.Redis.from_url(server.url)
        job = enqueue(client, jobs.add, 1, 2, on_success=rq.Callback(jobs.freeze_redis_on_success))
        after = enqueue(client, jobs.add, 3, 4)
        output = work(client, server.url)

        assert [status_of(client, made) for made in (job, after)] == ["finished", "finished"]
        assert f"Job {job.id!r}: its success callback could not append to the webhook outbox" in output
        assert "(_OutOfTime: not done within 3 s)" in output
        # The server may have got the command before it could answer: then it is reported all the same.
        assert {entry.job_id for entry in entries(client)} - {job.id} == {after.id}
        client.close()
