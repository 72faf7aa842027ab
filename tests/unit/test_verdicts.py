"""What a callback's word is worth, for every committed state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from flask_rq_webhooks.observe.verdicts import Open, Verdict, judge, occurrence_of
from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.queue.job_reader import JobRecord, JobResult
from flask_rq_webhooks.queue.outbox_entry import OutboxEntry

TOLD_AT = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)
RUN = format_time(TOLD_AT - timedelta(seconds=10))
NEWER_RUN = format_time(TOLD_AT + timedelta(seconds=1))
OLDER_RUN = format_time(TOLD_AT - timedelta(seconds=60))
EXC = 'Traceback (most recent call last):\n  File "jobs.py", line 1, in run\nmodels.DryError: no rain\n'


def entry(kind: str, **fields: Any) -> OutboxEntry:
    error = {"type": "ValueError", "message": "told", "traceback": ""} if kind == "failure" else None
    values = {"endpoint": "epx_all", "job_id": "j", "run": RUN, "at": TOLD_AT.timestamp(), "error": error}
    return OutboxEntry(kind=kind, **{**values, **fields})


def job(status: str | None, run: str = RUN, **fields: Any) -> JobRecord:
    return JobRecord(job_id="j", status=status, run=run, created_at=TOLD_AT, **fields)


def result(kind: str, after_s: float, **fields: Any) -> JobResult:
    return JobResult(type=kind, at=TOLD_AT + timedelta(seconds=after_s), **fields)


@pytest.mark.parametrize(
    ("kind", "status", "expected"),
    [
        pytest.param("success", "finished", "job.success", id="as-told"),
        pytest.param("failure", "failed", "job.failure", id="failure-as-told"),
        pytest.param("stopped", "stopped", "job.stopped", id="stopped-as-told"),
        pytest.param("stopped", "canceled", "job.canceled", id="stopped-then-canceled"),
        pytest.param("failure", "finished", "job.success", id="committed-success-wins"),
        pytest.param("failure", "stopped", "job.stopped", id="committed-stop-wins"),
    ],
)
def test_committed_state_of_the_same_run_wins(kind: str, status: str, expected: str) -> None:
    assert judge(entry(kind), job(status)) == Verdict(type=expected)


@pytest.mark.parametrize("status", ["started", "queued", "deferred", "created"])
def test_uncommitted_run_stays_open(status: str) -> None:
    assert judge(entry("success"), job(status)) is Open.UNCOMMITTED


def test_success_that_rq_calls_failed_needs_rqs_own_reason() -> None:
    assert judge(entry("success"), job("failed")) is Open.NEEDS_RESULTS
    verdict = judge(entry("success"), job("failed"), [result("failure", 1, exc=EXC)])
    assert verdict == Verdict(type="job.failure", exc=EXC)
    occurrence = occurrence_of(entry("success"), verdict, include_result=True, max_payload_bytes=4096)
    assert occurrence.error is not None
    assert (occurrence.error["type"], occurrence.error["message"]) == ("DryError", "no rain")
    assert occurrence.result is None


def test_job_canceled_while_running_is_waited_for_then_believed() -> None:
    assert judge(entry("success"), job("canceled")) is Open.UNCOMMITTED
    assert judge(entry("success"), job("canceled"), patient=False) == Verdict(type="job.canceled")


@pytest.mark.parametrize("status", ["scheduled", "queued", "rate_limited"])
def test_failure_with_retries_left_is_a_retry_once_the_run_is_over(status: str) -> None:
    assert judge(entry("failure", retries_left=2), job("started")) is Open.UNCOMMITTED
    assert judge(entry("failure", retries_left=2), job(status)) == Verdict(type="job.retrying")
    assert judge(entry("failure", retries_left=2), job("started", NEWER_RUN)) == Verdict(type="job.retrying")
    assert judge(entry("failure", retries_left=2), job("stopped")) == Verdict(type="job.stopped")


def test_superseded_run_is_judged_by_the_first_result_after_the_callback() -> None:
    superseded = job("started", NEWER_RUN)
    assert judge(entry("success"), superseded) is Open.NEEDS_RESULTS
    results = [result("success", -30), result("failure", 0.01, exc=EXC), result("success", 5)]
    assert judge(entry("success"), superseded, results) == Verdict(
        type="job.failure", ended_at=results[1].at, exc=EXC
    )
    assert judge(entry("failure"), superseded, []) == Verdict(type="job.failure")


def test_run_begun_again_after_on_success_is_a_retry() -> None:
    superseded = job("queued", NEWER_RUN, retries_left=1)
    assert judge(entry("success", retries_left=2), superseded, []) == Verdict(type="job.retrying")


def test_job_waiting_for_its_repetition_succeeded() -> None:
    assert judge(entry("success"), job("scheduled")) is Open.NEEDS_RESULTS
    ended = result("success", 0.002)
    assert judge(entry("success"), job("scheduled"), [ended]) == Verdict(
        type="job.success", ended_at=ended.at
    )


def test_stop_of_a_superseded_run_is_not_the_failure_rq_records() -> None:
    results = [result("failure", 0.01, exc="Job stopped by user, work-horse terminated.")]
    assert judge(entry("stopped"), job("started", NEWER_RUN), results) == Verdict(type="job.stopped")


def test_word_stands_where_the_hash_is_gone() -> None:
    gone = None
    assert judge(entry("success"), gone) == Verdict(type="job.success")
    assert judge(entry("failure"), gone) == Verdict(type="job.failure")
    assert judge(entry("failure", retries_left=1), gone) == Verdict(type="job.retrying")


def test_hash_that_has_not_caught_up_is_waited_for() -> None:
    assert judge(entry("success"), job("finished", OLDER_RUN)) is Open.UNCOMMITTED


@pytest.mark.parametrize(
    ("size", "include", "kept", "truncated"),
    [
        pytest.param(10, True, "x" * 10, False, id="fits"),
        pytest.param(5000, True, None, True, id="too-large"),
        pytest.param(10, False, None, False, id="switched-off"),
    ],
)
def test_result_is_capped(size: int, include: bool, kept: str | None, truncated: bool) -> None:
    occurrence = occurrence_of(
        entry("success", result="x" * size),
        Verdict(type="job.success"),
        include_result=include,
        max_payload_bytes=4096,
    )
    assert (occurrence.result, occurrence.result_truncated) == (kept, truncated)
    assert occurrence.occurred_at == TOLD_AT
