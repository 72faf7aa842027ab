"""Every row of RQ's endings, as a decision: what a watch and RQ's committed state mean together."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from flask_rq_webhooks.observe.job_trees import blocked_jobs, verdict_on
from flask_rq_webhooks.observe.outcomes import (
    RESERVED_GRACE,
    Meaning,
    WatchFacts,
    ending_of_superseded,
    is_blocked,
    is_correction,
    meaning_of,
    occurrence_of_job,
    occurrence_of_loss,
    occurrence_of_result,
    occurrence_of_word,
)
from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.protocol.tracebacks import error_from_text
from flask_rq_webhooks.queue.job_reader import JobRecord, JobResult
from flask_rq_webhooks.queue.outbox_entry import OutboxEntry
from flask_rq_webhooks.queue.safe_pickle import UNKNOWN

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ENDPOINT = "eptesttest_" + "0" * 26


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def record(status: str | None = "started", *, enqueued_s_ago: float = 60, **values: object) -> JobRecord:
    enqueued_at = ago(enqueued_s_ago)
    base = JobRecord(
        job_id="job-1",
        status=status,
        run=format_time(enqueued_at),
        created_at=ago(61),
        enqueued_at=enqueued_at,
        started_at=ago(50),
        queue="default",
        func="host.run",
        runid="basin",
    )
    return replace(base, **values)  # type: ignore[arg-type]


def watch(**values: object) -> WatchFacts:
    base = WatchFacts(
        job_id="job-1", endpoint_id=ENDPOINT, status="open", created_at=ago(62), counts_from=ago(62)
    )
    return replace(base, **values)  # type: ignore[arg-type]


def evidence(kind: str = "success", run: str | None = None, **values: object) -> OutboxEntry:
    base = OutboxEntry(
        kind=kind, endpoint=ENDPOINT, job_id="job-1", run=run or format_time(ago(60)), at=ago(10).timestamp()
    )
    return replace(base, **values)  # type: ignore[arg-type]


RUN = format_time(ago(60))


@pytest.mark.parametrize(
    ("facts", "job", "expected"),
    [
        pytest.param(watch(), record("queued"), Meaning.WAIT, id="queued"),
        pytest.param(
            watch(), record("started"), Meaning.WAIT, id="running, or os._exit(0) not yet abandoned"
        ),
        pytest.param(watch(), record("scheduled"), Meaning.WAIT, id="scheduled for a retry"),
        pytest.param(watch(), record("deferred"), Meaning.WAIT, id="deferred"),
        pytest.param(watch(), record("rate_limited"), Meaning.WAIT, id="rate limited"),
        pytest.param(watch(), record("a status of RQ 4"), Meaning.WAIT, id="unknown status"),
        pytest.param(watch(), record(None), Meaning.WAIT, id="created and never enqueued"),
        pytest.param(watch(), record("finished"), Meaning.ENDED, id="returned"),
        pytest.param(watch(), record("failed"), Meaning.ENDED, id="raised, timed out, killed, abandoned"),
        pytest.param(watch(), record("stopped"), Meaning.ENDED, id="stopped"),
        pytest.param(watch(), record("canceled"), Meaning.ENDED, id="canceled"),
        pytest.param(watch(run=RUN, told=True), record("failed"), Meaning.WAIT, id="told"),
        pytest.param(
            watch(run=format_time(ago(90)), told=True), record("failed"), Meaning.ENDED, id="requeued, failed"
        ),
        pytest.param(
            watch(counts_from=ago(5), created_at=ago(5)), record("finished"), Meaning.WAIT, id="ran before"
        ),
        pytest.param(
            watch(counts_from=ago(5), created_at=ago(5)),
            record("finished", tokens=frozenset({ENDPOINT})),
            Meaning.ENDED,
            id="ran before by the clock, but carries the endpoint",
        ),
        pytest.param(
            watch(),
            record("finished", ended_at=ago(0.5), tokens=frozenset({ENDPOINT})),
            Meaning.WAIT,
            id="just ended: its callback is on its way",
        ),
        pytest.param(
            watch(),
            record("finished", ended_at=ago(2), tokens=frozenset({ENDPOINT})),
            Meaning.ENDED,
            id="ended, and no callback came",
        ),
        pytest.param(
            watch(),
            record("finished", ended_at=ago(0.5)),
            Meaning.ENDED,
            id="just ended, carries no callback",
        ),
        pytest.param(
            watch(evidence=evidence()),
            record("finished", ended_at=ago(0.5), tokens=frozenset({ENDPOINT})),
            Meaning.ENDED,
            id="just ended, its callback has spoken",
        ),
        pytest.param(watch(), None, Meaning.MISSING, id="absent once"),
        pytest.param(watch(missing_passes=1), None, Meaning.LOST, id="absent twice"),
        pytest.param(watch(told=True, run=RUN, missing_passes=1), None, Meaning.OVER, id="told and expired"),
        pytest.param(
            watch(evidence=evidence()), None, Meaning.WORD, id="absent, and a callback said how it ended"
        ),
        pytest.param(watch(status="reserved"), None, Meaning.WAIT, id="the view may still run"),
        pytest.param(
            watch(status="reserved", created_at=NOW - RESERVED_GRACE - timedelta(seconds=1)),
            None,
            Meaning.UNUSED,
            id="killed before the job existed",
        ),
        pytest.param(watch(status="reserved"), record("failed"), Meaning.ENDED, id="killed before confirm"),
        pytest.param(
            watch(
                status="reserved",
                created_at=NOW - RESERVED_GRACE - timedelta(seconds=1),
                counts_from=ago(5),
            ),
            record("queued"),
            Meaning.UNUSED,
            id="the id belongs to an older job of somebody else",
        ),
    ],
)
def test_meaning(facts: WatchFacts, job: JobRecord | None, expected: Meaning) -> None:
    assert meaning_of(facts, job, now=NOW) is expected


def test_absence_proves_nothing_while_callbacks_words_wait() -> None:
    assert meaning_of(watch(missing_passes=1), None, now=NOW, outbox_lags=True) is Meaning.WAIT


def test_killed_work_horse_is_told_with_rqs_sentence() -> None:
    sentence = "Work-horse terminated unexpectedly; waitpid returned 9 (signal 9); "
    results = [JobResult(type="failure", at=ago(3), exc=sentence)]

    told = occurrence_of_job(record("failed"), results, now=NOW, max_payload_bytes=4096)

    assert told.type == "job.failure"
    assert told.source == "reconciled"
    assert told.run == RUN
    assert told.error == {
        "type": "WorkHorseTerminated",
        "message": "Work-horse terminated unexpectedly; waitpid returned 9 (signal 9)",
        "traceback": "",
    }
    assert told.ended_at == ago(3)
    assert told.runid == "basin"


def test_ended_at_of_an_earlier_run_is_not_used() -> None:
    told = occurrence_of_job(
        record("finished", ended_at=ago(70)),
        [JobResult(type="success", at=ago(3))],
        value=1,
        now=NOW,
        max_payload_bytes=4096,
    )

    assert told.ended_at == ago(3)


@pytest.mark.parametrize(
    ("value", "word", "expected"),
    [
        pytest.param({"sum": 3}, None, ({"sum": 3}, False), id="RQ has it"),
        pytest.param(UNKNOWN, None, (None, True), id="nobody has it"),
        pytest.param(UNKNOWN, evidence(result=[1]), ([1], False), id="the parked callback has it"),
        pytest.param("x" * 5000, None, (None, True), id="too large"),
    ],
)
def test_result_of_a_success(value: object, word: OutboxEntry | None, expected: tuple[object, bool]) -> None:
    told = occurrence_of_job(
        record("finished"), [], value=value, evidence=word, now=NOW, max_payload_bytes=4096
    )

    assert (told.result, told.result_truncated) == expected


def test_committed_state_wins_over_a_parked_word() -> None:
    told = occurrence_of_job(
        record("failed"), [], evidence=evidence("success", result=1), now=NOW, max_payload_bytes=4096
    )

    assert told.type == "job.failure"
    assert told.result is None
    assert told.error is not None


def test_word_of_a_failure_that_is_retried_ends_nothing() -> None:
    told = occurrence_of_word(
        evidence("failure", retries_left=1, error={"type": "E", "message": "", "traceback": ""}),
        max_payload_bytes=4096,
    )

    assert told.type == "job.retrying"


def test_loss_of_a_job_whose_run_is_known_has_its_run_key() -> None:
    assert occurrence_of_loss(watch(run=RUN), now=NOW).run_key == f"job-1|{RUN}|end"
    assert occurrence_of_loss(watch(), now=NOW).run_key == f"job-1|created:{format_time(ago(62))}|end"


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        pytest.param([], None, id="no result"),
        pytest.param([JobResult(type="failure", at=ago(40))], "failure", id="failed and requeued"),
        pytest.param([JobResult(type="success", at=ago(40))], "success", id="repeated"),
        pytest.param([JobResult(type="retried", at=ago(40))], None, id="returned Retry"),
        pytest.param([JobResult(type="failure", at=ago(80))], None, id="of a run before"),
        pytest.param([JobResult(type="failure", at=ago(10))], None, id="of the current run"),
    ],
)
def test_ending_of_a_superseded_run(results: list[JobResult], expected: str | None) -> None:
    job = record("queued", enqueued_s_ago=30)

    ending = ending_of_superseded(RUN, job, results)

    assert (ending.type if ending else None) == expected


def test_stop_that_rq_records_as_failure_is_a_stop() -> None:
    result = JobResult(type="failure", at=ago(40), exc="Job stopped by user, work-horse terminated.")

    told = occurrence_of_result(record("queued", enqueued_s_ago=30), RUN, result, max_payload_bytes=4096)

    assert told.type == "job.stopped"
    assert told.run == RUN
    assert told.error is None


@pytest.mark.parametrize(
    ("told_type", "told_run", "job", "expected"),
    [
        pytest.param("job.failure", RUN, record("failed"), False, id="as told"),
        pytest.param("job.failure", RUN, record("finished"), True, id="an orphan finished"),
        pytest.param("job.canceled", RUN, record("finished"), True, id="canceled while running"),
        pytest.param("job.success", RUN, record("failed"), True, id="died after on_success"),
        pytest.param("job.lost", RUN, record("finished"), True, id="lost job came back"),
        pytest.param("job.lost", RUN, record("started"), False, id="lost job runs"),
        pytest.param("job.failure", format_time(ago(90)), record("finished"), False, id="a newer run"),
        pytest.param(
            "job.lost", "created:" + format_time(ago(62)), record("failed"), True, id="lost, run not known"
        ),
        pytest.param(
            "job.lost",
            "created:" + format_time(ago(62)),
            record("failed", enqueued_s_ago=5),
            False,
            id="lost, and enqueued anew since",
        ),
    ],
)
def test_correction(told_type: str, told_run: str, job: JobRecord, expected: bool) -> None:
    assert is_correction(told_type, job, told_run=told_run, told_at=ago(20)) is expected


@pytest.mark.parametrize(
    ("status", "allow_failure", "expected"),
    [
        ("finished", False, False),
        ("started", False, False),
        ("failed", False, True),
        ("failed", True, False),
        ("stopped", True, True),
        ("canceled", False, True),
        (None, False, True),
    ],
)
def test_blocked(status: str | None, allow_failure: bool, expected: bool) -> None:
    job = record("deferred", dependency_ids=("parent",), allow_dependency_failures=allow_failure)

    assert is_blocked(job, {"parent": status}) is expected


# -- trees ------------------------------------------------------------------------------------------------


def test_jobs_behind_a_blocked_one_are_blocked() -> None:
    middle = record("deferred", job_id="middle", dependency_ids=("root",))
    last = record("deferred", job_id="last", dependency_ids=("middle", "other"))
    statuses = {"root": "failed", "middle": "deferred", "other": "finished"}

    assert blocked_jobs({"middle": middle, "last": last}, statuses) == {"middle", "last"}


@pytest.mark.parametrize(
    ("statuses", "blocked", "lost", "expected"),
    [
        pytest.param({"a": "finished", "b": "started"}, (), (), None, id="active"),
        pytest.param({"a": "failed", "b": "queued"}, (), (), None, id="failed, but not over"),
        pytest.param({"a": "finished", "b": "deferred"}, (), (), None, id="about to be queued"),
        pytest.param({"a": "finished", "b": "finished"}, (), (), "job.success", id="all finished"),
        pytest.param({"a": "failed", "b": "stopped"}, (), (), "job.failure", id="failed before stopped"),
        pytest.param({"a": "stopped", "b": "canceled"}, (), (), "job.stopped", id="stopped before canceled"),
        pytest.param({"a": "canceled", "b": "finished"}, (), (), "job.canceled", id="canceled"),
        pytest.param({"a": "failed", "b": "deferred"}, ("b",), (), "job.failure", id="blocked by a failure"),
        pytest.param({"b": "deferred"}, ("b",), (), "job.failure", id="blocked by a job that is gone"),
        pytest.param({}, (), ("a",), "job.lost", id="gone"),
        pytest.param({"b": "failed"}, (), ("a",), "job.failure", id="one gone, one failed"),
    ],
)
def test_verdict_on_a_tree(
    statuses: dict[str, str], blocked: tuple[str, ...], lost: tuple[str, ...], expected: str | None
) -> None:
    verdict = verdict_on(statuses, frozenset(blocked), lost=frozenset(lost))

    assert (verdict.type if verdict else None) == expected


def test_counts_of_a_tree() -> None:
    verdict = verdict_on({"a": "finished", "b": "failed", "c": "deferred", "d": "finished"}, frozenset({"c"}))

    assert verdict is not None
    assert dict(verdict.counts) == {"deferred": 1, "failed": 1, "finished": 2}


# -- RQ's own texts of failures ---------------------------------------------------------------------------

CHAINED = """Traceback (most recent call last):
  File "a.py", line 1, in a
    b()
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in a
    raise host.errors.NoData("no rain:
    ^^^^^
host.errors.NoData: no rain:
  station 7: dry
"""


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        pytest.param(CHAINED, "NoData", "no rain:\n  station 7: dry", id="chained, long message"),
        pytest.param("Traceback (most recent call last):\n  File \"a\", line 1\nSystemExit", "SystemExit", "",
                     id="no message"),
        pytest.param("Moved to FailedJobRegistry, due to AbandonedJobError, at 2026-03-01",
                     "AbandonedJobError",
                     "Moved to FailedJobRegistry, due to AbandonedJobError, at 2026-03-01", id="abandoned"),
        pytest.param("Job was stuck in intermediate queue.", "StuckInIntermediateQueue",
                     "Job was stuck in intermediate queue.", id="intermediate queue"),
        pytest.param(None, "UnknownError", "RQ recorded no reason.", id="nothing"),
        pytest.param("!?", "UnknownError", "!?", id="nonsense"),
    ],
)  # fmt: skip
def test_error_from_text(text: str | None, name: str, message: str) -> None:
    error = error_from_text(text)

    assert (error["type"], error["message"]) == (name, message)
