"""The rule book: every combination through the one function, with what RQ-measured facts say of each."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from flask_rq_webhooks.observe.conclusions import (
    OutboxRead,
    WatchAction,
    WatchFacts,
    conclude,
    counts,
    is_blocked,
    lacks_report,
    outcome_of_loss,
)
from flask_rq_webhooks.observe.job_trees import blocked_jobs, verdict_on
from flask_rq_webhooks.observe.outcomes import (
    Outcome,
    Undecided,
    news,
    outcome_of,
    own_result,
    unreported_outcomes,
)
from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.protocol.job_errors import error_from_text
from flask_rq_webhooks.queue.job_reader import JobRecord, JobResult
from flask_rq_webhooks.queue.outbox_entry import OutboxEntry
from flask_rq_webhooks.storage.reported_runs import Reported

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ENDPOINT = "eptesttest_" + "0" * 26
STOPPED = "Job stopped by user, work-horse terminated."
EXC = 'Traceback (most recent call last):\n  File "jobs.py", line 1, in run\nmodels.DryError: no rain\n'


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


#: The run that was enqueued a minute ago, and whose callback reported ten seconds ago.
RUN = format_time(ago(60))


def record(status: str | None = "started", *, enqueued_s_ago: float = 60, **values: Any) -> JobRecord:
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
        results=(),
    )
    return replace(base, **values)


def report(kind: str = "success", **values: Any) -> OutboxEntry:
    error = {"type": "ValueError", "message": "", "traceback": ""} if kind == "failure" else None
    base = OutboxEntry(
        kind=kind, endpoint=ENDPOINT, job_id="job-1", run=RUN, at=ago(10).timestamp(), error=error
    )
    return replace(base, **values)


def result(kind: str, seconds_ago: float, **values: Any) -> JobResult:
    return JobResult(type=kind, at=ago(seconds_ago), **values)


def reported(*types: str, run: str = RUN, ended_s_ago: float = 9, stored_s_ago: float = 8) -> Reported:
    ended = tuple(ago(ended_s_ago) for _ in types)
    return Reported(run=run, types=types, event_id="evt_1", ended_at=ended, stored_at=ago(stored_s_ago))


# -- every combination ------------------------------------------------------------------------------------

KINDS = ("success", "failure", "stopped")
LEFT = (None, 0, 1)
RESULTS: dict[str, tuple[JobResult, ...]] = {
    "none": (),
    "success": (result("success", 9.98),),
    "failure": (result("failure", 9.98, exc=EXC),),
    "stop": (result("failure", 9.98, exc=STOPPED),),
    "retried": (result("retried", 9.98),),
}
_STATUSES = (
    "queued", "started", "finished", "failed", "stopped", "canceled", "deferred", "scheduled", "created",
    "ready_to_enqueue", "rate_limited", "a status of RQ 4",
)  # fmt: skip
#: Where the job is: gone, in the run of the report (still, or waiting between runs), in a newer run that was
#: enqueued five seconds ago with as many retries left or one less, or in what looks like an older one.
PLACES = (
    "gone",
    *(f"same {status}" for status in _STATUSES),
    *(f"newer {status}" for status in ("queued", "started", "finished", "failed", "stopped", "canceled")),
    *(f"retried {status}" for status in ("queued", "started", "finished", "failed")),
    "older started",
)

_LETTERS = {
    "job.success": "S", "job.failure": "F", "job.stopped": "T", "job.canceled": "C", "job.retrying": "R",
    Undecided.UNCOMMITTED: ".", Undecided.REPORTED: "=", Undecided.NEEDS_RESULTS: "?",
}  # fmt: skip


def letter_of(place: str, kind: str, left: int | None, results: str) -> str:
    where, _, status = place.partition(" ")
    job = None
    if where != "gone":
        enqueued_s_ago = {"same": 60, "newer": 5, "retried": 5, "older": 90}[where]
        now_left = left - 1 if where == "retried" and left else left
        kept = RESULTS[results]
        job = record(status, enqueued_s_ago=enqueued_s_ago, retries_left=now_left, results=kept)
    outcome = outcome_of(RUN, job, report=report(kind, retries_left=left))
    return _LETTERS[outcome.type if isinstance(outcome, Outcome) else outcome]


#: place, kind of the report, retries left then; a letter for each of RESULTS: none, success, failure, stop,
#: returned Retry. S success, F failure, T stopped, C canceled, R retrying, "." not committed yet.
TABLE = """
gone                    success  None  SSSSS
gone                    success  0     SSSSS
gone                    success  1     SSSSS
gone                    failure  None  FFFFF
gone                    failure  0     FFFFF
gone                    failure  1     RRRRR
gone                    stopped  None  TTTTT
gone                    stopped  0     TTTTT
gone                    stopped  1     TTTTT
same queued             success  None  .....
same queued             success  0     .....
same queued             success  1     .....
same queued             failure  None  .....
same queued             failure  0     .....
same queued             failure  1     RRRRR
same queued             stopped  None  .....
same queued             stopped  0     .....
same queued             stopped  1     .....
same started            success  None  .....
same started            success  0     .....
same started            success  1     .....
same started            failure  None  .....
same started            failure  0     .....
same started            failure  1     .....
same started            stopped  None  .....
same started            stopped  0     .....
same started            stopped  1     .....
same finished           success  None  SSSSS
same finished           success  0     SSSSS
same finished           success  1     SSSSS
same finished           failure  None  SSSSS
same finished           failure  0     SSSSS
same finished           failure  1     SSSSS
same finished           stopped  None  SSSSS
same finished           stopped  0     SSSSS
same finished           stopped  1     SSSSS
same failed             success  None  FFFFF
same failed             success  0     FFFFF
same failed             success  1     FFFFF
same failed             failure  None  FFFFF
same failed             failure  0     FFFFF
same failed             failure  1     FFFFF
same failed             stopped  None  FFFFF
same failed             stopped  0     FFFFF
same failed             stopped  1     FFFFF
same stopped            success  None  TTTTT
same stopped            success  0     TTTTT
same stopped            success  1     TTTTT
same stopped            failure  None  TTTTT
same stopped            failure  0     TTTTT
same stopped            failure  1     TTTTT
same stopped            stopped  None  TTTTT
same stopped            stopped  0     TTTTT
same stopped            stopped  1     TTTTT
same canceled           success  None  .....
same canceled           success  0     .....
same canceled           success  1     .....
same canceled           failure  None  .....
same canceled           failure  0     .....
same canceled           failure  1     .....
same canceled           stopped  None  CCCCC
same canceled           stopped  0     CCCCC
same canceled           stopped  1     CCCCC
same deferred           success  None  .....
same deferred           success  0     .....
same deferred           success  1     .....
same deferred           failure  None  .....
same deferred           failure  0     .....
same deferred           failure  1     RRRRR
same deferred           stopped  None  .....
same deferred           stopped  0     .....
same deferred           stopped  1     .....
same scheduled          success  None  SSFTR
same scheduled          success  0     SSFTR
same scheduled          success  1     SSFTR
same scheduled          failure  None  FSFTR
same scheduled          failure  0     FSFTR
same scheduled          failure  1     RRRRR
same scheduled          stopped  None  TTFTT
same scheduled          stopped  0     TTFTT
same scheduled          stopped  1     TTFTT
same created            success  None  .....
same created            success  0     .....
same created            success  1     .....
same created            failure  None  .....
same created            failure  0     .....
same created            failure  1     .....
same created            stopped  None  .....
same created            stopped  0     .....
same created            stopped  1     .....
same ready_to_enqueue   success  None  SSFTR
same ready_to_enqueue   success  0     SSFTR
same ready_to_enqueue   success  1     SSFTR
same ready_to_enqueue   failure  None  FSFTR
same ready_to_enqueue   failure  0     FSFTR
same ready_to_enqueue   failure  1     RRRRR
same ready_to_enqueue   stopped  None  TTFTT
same ready_to_enqueue   stopped  0     TTFTT
same ready_to_enqueue   stopped  1     TTFTT
same rate_limited       success  None  SSFTR
same rate_limited       success  0     SSFTR
same rate_limited       success  1     SSFTR
same rate_limited       failure  None  FSFTR
same rate_limited       failure  0     FSFTR
same rate_limited       failure  1     RRRRR
same rate_limited       stopped  None  TTFTT
same rate_limited       stopped  0     TTFTT
same rate_limited       stopped  1     TTFTT
same a status of RQ 4   success  None  .....
same a status of RQ 4   success  0     .....
same a status of RQ 4   success  1     .....
same a status of RQ 4   failure  None  .....
same a status of RQ 4   failure  0     .....
same a status of RQ 4   failure  1     .....
same a status of RQ 4   stopped  None  .....
same a status of RQ 4   stopped  0     .....
same a status of RQ 4   stopped  1     .....
newer queued            success  None  SSFTR
newer queued            success  0     SSFTR
newer queued            success  1     SSFTR
newer queued            failure  None  FSFTR
newer queued            failure  0     FSFTR
newer queued            failure  1     RRRTR
newer queued            stopped  None  TTFTT
newer queued            stopped  0     TTFTT
newer queued            stopped  1     TTFTT
newer started           success  None  SSFTR
newer started           success  0     SSFTR
newer started           success  1     SSFTR
newer started           failure  None  FSFTR
newer started           failure  0     FSFTR
newer started           failure  1     RRRTR
newer started           stopped  None  TTFTT
newer started           stopped  0     TTFTT
newer started           stopped  1     TTFTT
newer finished          success  None  SSFTR
newer finished          success  0     SSFTR
newer finished          success  1     SSFTR
newer finished          failure  None  FFFTR
newer finished          failure  0     FFFTR
newer finished          failure  1     RRRTR
newer finished          stopped  None  TTFTT
newer finished          stopped  0     TTFTT
newer finished          stopped  1     TTFTT
newer failed            success  None  SSSTR
newer failed            success  0     SSSTR
newer failed            success  1     SSSTR
newer failed            failure  None  FSFTR
newer failed            failure  0     FSFTR
newer failed            failure  1     RRRTR
newer failed            stopped  None  TTTTT
newer failed            stopped  0     TTTTT
newer failed            stopped  1     TTTTT
newer stopped           success  None  SSFSR
newer stopped           success  0     SSFSR
newer stopped           success  1     SSFSR
newer stopped           failure  None  FSFFR
newer stopped           failure  0     FSFFR
newer stopped           failure  1     RRRRR
newer stopped           stopped  None  TTFTT
newer stopped           stopped  0     TTFTT
newer stopped           stopped  1     TTFTT
newer canceled          success  None  SSFTR
newer canceled          success  0     SSFTR
newer canceled          success  1     SSFTR
newer canceled          failure  None  FSFTR
newer canceled          failure  0     FSFTR
newer canceled          failure  1     RRRTR
newer canceled          stopped  None  TTFTT
newer canceled          stopped  0     TTFTT
newer canceled          stopped  1     TTFTT
retried queued          success  None  SSFTR
retried queued          success  0     SSFTR
retried queued          success  1     RSFTR
retried queued          failure  None  FSFTR
retried queued          failure  0     FSFTR
retried queued          failure  1     RRRRR
retried queued          stopped  None  TTFTT
retried queued          stopped  0     TTFTT
retried queued          stopped  1     RRFTR
retried started         success  None  SSFTR
retried started         success  0     SSFTR
retried started         success  1     RSFTR
retried started         failure  None  FSFTR
retried started         failure  0     FSFTR
retried started         failure  1     RRRRR
retried started         stopped  None  TTFTT
retried started         stopped  0     TTFTT
retried started         stopped  1     RRFTR
retried finished        success  None  SSFTR
retried finished        success  0     SSFTR
retried finished        success  1     RRFTR
retried finished        failure  None  FFFTR
retried finished        failure  0     FFFTR
retried finished        failure  1     RRRRR
retried finished        stopped  None  TTFTT
retried finished        stopped  0     TTFTT
retried finished        stopped  1     RRFTR
retried failed          success  None  SSSTR
retried failed          success  0     SSSTR
retried failed          success  1     RSRTR
retried failed          failure  None  FSFTR
retried failed          failure  0     FSFTR
retried failed          failure  1     RRRRR
retried failed          stopped  None  TTTTT
retried failed          stopped  0     TTTTT
retried failed          stopped  1     RRRTR
older started           success  None  .....
older started           success  0     .....
older started           success  1     .....
older started           failure  None  .....
older started           failure  0     .....
older started           failure  1     .....
older started           stopped  None  .....
older started           stopped  0     .....
older started           stopped  1     .....
"""


@pytest.mark.parametrize("line", TABLE.strip().splitlines())
def test_every_combination(line: str) -> None:
    place, rest = line[:24].strip(), line[24:].split()
    kind, left, letters = rest[0], None if rest[1] == "None" else int(rest[1]), rest[2]

    assert "".join(letter_of(place, kind, left, name) for name in RESULTS) == letters


def test_the_table_is_complete() -> None:
    keys = [line[: line.rindex(" ")].split() for line in TABLE.strip().splitlines()]
    assert len(keys) == len({tuple(key) for key in keys}) == len(PLACES) * len(KINDS) * len(LEFT)


# -- a run and its report ---------------------------------------------------------------------------------


def test_success_that_rq_calls_failed_needs_rqs_own_reason() -> None:
    assert outcome_of(RUN, record("failed", results=None), report=report()) is Undecided.NEEDS_RESULTS
    outcome = outcome_of(RUN, record("failed", results=(result("failure", 9, exc=EXC),)), report=report())
    assert isinstance(outcome, Outcome)
    assert (outcome.type, outcome.exc) == ("job.failure", EXC)


def test_job_canceled_while_running_is_waited_for_then_believed() -> None:
    assert outcome_of(RUN, record("canceled"), report=report()) is Undecided.UNCOMMITTED
    outcome = outcome_of(RUN, record("canceled"), report=report(), patient=False)
    assert isinstance(outcome, Outcome)
    assert outcome.type == "job.canceled"


def test_hash_that_looks_older_is_waited_for_then_judged_by_results() -> None:
    """Clocks of those who enqueue differ: a retry may seem older than what it retries."""
    older = record("started", enqueued_s_ago=90, retries_left=0)
    assert outcome_of(RUN, older, report=report(retries_left=1)) is Undecided.UNCOMMITTED
    outcome = outcome_of(RUN, older, report=report(retries_left=1), patient=False)
    assert isinstance(outcome, Outcome)
    assert outcome.type == "job.retrying"


@pytest.mark.parametrize(
    ("results", "following", "expected"),
    [
        pytest.param([result("failure", 30)], None, "job.success", id="only one of a run before"),
        pytest.param([result("failure", 9, exc=EXC)], None, "job.failure", id="its own"),
        pytest.param(
            [result("failure", 7, exc=EXC)],
            report(run=format_time(ago(9)), at=ago(8).timestamp()),
            "job.success",
            id="after the next run's report",
        ),
        pytest.param(
            [result("failure", 9, exc=EXC, started_at=ago(20))],
            None,
            "job.success",
            id="of a later one",
        ),
        pytest.param(
            [result("failure", 9, exc=EXC, started_at=ago(50.1))], None, "job.failure", id="of its execution"
        ),
    ],
)
def test_result_of_a_superseded_run(
    results: list[JobResult], following: OutboxEntry | None, expected: str
) -> None:
    job = record("queued", enqueued_s_ago=5, results=tuple(results))
    said = report(started_at=format_time(ago(50)))

    outcome = outcome_of(RUN, job, report=said, following=following, reported=())

    assert isinstance(outcome, Outcome)
    assert outcome.type == expected


def test_result_that_was_reported_as_another_runs_is_not_reported_again() -> None:
    job = record("queued", enqueued_s_ago=5, results=(result("success", 9),))
    other = reported("job.success", run=format_time(ago(55)), ended_s_ago=9)

    assert outcome_of(RUN, job, report=report(), reported=[other]) is Undecided.REPORTED


@pytest.mark.parametrize("left", [0, None])
def test_next_report_with_fewer_retries_left_shows_a_retry(left: int | None) -> None:
    following = report(run=format_time(ago(5)), at=ago(4).timestamp(), retries_left=left)

    outcome = outcome_of(RUN, None, report=report(retries_left=1), following=following)

    assert isinstance(outcome, Outcome)
    assert outcome.type == ("job.retrying" if left == 0 else "job.success")


# -- whose result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        pytest.param(record("finished", results=(result("success", 3),)), True, id="as the hash says"),
        pytest.param(record("finished", results=(result("failure", 3),)), False, id="of another type"),
        pytest.param(record("started", results=(result("success", 3),)), False, id="not over"),
        pytest.param(record("finished"), False, id="none"),
        pytest.param(record("stopped", results=(result("failure", 3, exc=STOPPED),)), True, id="a stop"),
        pytest.param(record("scheduled", results=(result("success", 3),)), True, id="waits for a repetition"),
        pytest.param(
            record("failed", ended_at=ago(3), results=(result("failure", 3, ended_at=ago(3)),)), True,
            id="ended when the hash says",
        ),
        pytest.param(
            record("failed", ended_at=ago(3), results=(result("failure", 30, ended_at=ago(30)),)), False,
            id="ended before",
        ),
    ],
)  # fmt: skip
def test_own_result_of_the_current_run(job: JobRecord, expected: bool) -> None:
    assert (own_result(job) is not None) is expected


@pytest.mark.parametrize(
    ("results", "known", "expected"),
    [
        pytest.param([], [], [], id="no result"),
        pytest.param([result("failure", 40)], [], ["job.failure"], id="failed and requeued"),
        pytest.param([result("success", 40)], [], ["job.success"], id="repeated"),
        pytest.param([result("failure", 40, exc=STOPPED)], [], ["job.stopped"], id="stopped"),
        pytest.param([result("retried", 40)], [], [], id="returned Retry"),
        pytest.param([result("failure", 200)], [], [], id="of a run long before"),
        pytest.param([result("failure", 100)], [], ["job.failure"], id="clocks differ"),
        pytest.param(
            [result("failure", 40), result("success", 35)], [], ["job.failure", "job.success"], id="two runs"
        ),
        pytest.param(
            [result("failure", 40, ended_at=ago(40))],
            [reported("job.failure", run=format_time(ago(70)), ended_s_ago=40)],
            [],
            id="reported of another run",
        ),
        pytest.param(
            [result("failure", 50), result("failure", 40)],
            [reported("job.failure", run=format_time(ago(70)), ended_s_ago=51)],
            ["job.failure"],
            id="RQ 1.16: one of two reported",
        ),
    ],
)
def test_unreported_endings_of_earlier_runs(
    results: list[JobResult], known: list[Reported], expected: list[str]
) -> None:
    job = record("queued", enqueued_s_ago=30, results=tuple(results))

    outcomes = unreported_outcomes(RUN, job, known, since=ago(300), run_is_reported=False)

    assert [outcome.type for outcome in outcomes] == expected
    assert [outcome.run for outcome in outcomes][:1] == [RUN][: len(expected)]
    assert len({outcome.run for outcome in outcomes}) == len(expected)


def test_result_of_the_current_run_is_no_earlier_ones() -> None:
    job = record("failed", enqueued_s_ago=30, results=(result("failure", 29.9),))

    assert unreported_outcomes(RUN, job, [], since=ago(300), run_is_reported=False) == []


# -- corrections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "said", "committed", "expected"),
    [
        pytest.param([], "job.success", True, "published", id="nothing reported"),
        pytest.param([reported("job.failure")], "job.failure", True, None, id="as reported"),
        pytest.param([reported("job.failure")], "job.success", True, "corrects", id="an orphan finished"),
        pytest.param([reported("job.canceled")], "job.success", True, "corrects", id="canceled, and ran on"),
        pytest.param([reported("job.failure", "job.success")], "job.failure", True, None, id="corrected"),
        pytest.param([reported("job.failure")], "job.success", False, None, id="only the callback says so"),
        pytest.param([reported("job.lost")], "job.success", False, "corrects", id="lost, and a late report"),
        pytest.param([reported("job.lost")], "job.success", True, "corrects", id="lost, and it is back"),
        pytest.param([reported("job.lost")], "job.lost", False, None, id="lost twice"),
        pytest.param(
            [reported("job.failure", run=format_time(ago(90)))], "job.success", True, "published", id="newer"
        ),
        pytest.param(
            [reported("job.failure", stored_s_ago=90_000)], "job.success", True, None, id="a day later"
        ),
        pytest.param(
            [reported("job.lost", run="created:" + format_time(ago(62)))], "job.success", False, "corrects",
            id="lost before its run was known",
        ),
        pytest.param(
            [reported("job.lost", run="created:" + format_time(ago(62)), stored_s_ago=61.5)], "job.success",
            True, "published", id="enqueued anew since it was lost",
        ),
        pytest.param(
            [reported("job.lost", "job.success", run="created:" + format_time(ago(62)))], "job.success",
            False, None, id="a loss that was corrected",
        ),
        pytest.param([reported("job.failure")], "job.retrying", True, "published", id="not final"),
    ],
)  # fmt: skip
def test_news(known: list[Reported], said: str, committed: bool, expected: str | None) -> None:
    new = news(Outcome(type=said, run=RUN, committed=committed), known, now=NOW)

    found = None if new is None else "corrects" if new.supersedes == "evt_1" else "published"
    assert found == expected
    assert new is None or expected != "corrects" or new.run == known[0].run


# -- watches ----------------------------------------------------------------------------------------------

READ = OutboxRead(until=NOW, absent_since=ago(15))
BEHIND = OutboxRead(until=ago(16), absent_since=ago(15))


def watch(**values: Any) -> WatchFacts:
    base = WatchFacts(
        job_id="job-1", endpoint_id=ENDPOINT, status="open", created_at=ago(62), counts_from=ago(62), run=RUN
    )
    return replace(base, **values)


Act = WatchAction
SETTLED = watch(settled=True, status="settled")


@pytest.mark.parametrize(
    ("facts", "job", "outbox", "action", "types"),
    [
        ("queued", record("queued"), READ, Act.WAIT, []),
        ("running, or os._exit(0) not yet abandoned", record("started"), READ, Act.WAIT, []),
        ("deferred", record("deferred"), READ, Act.WAIT, []),
        ("a status of RQ 4", record("?"), READ, Act.WAIT, []),
        ("returned", record("finished"), READ, Act.WAIT, ["job.success"]),
        ("raised, killed, abandoned", record("failed"), READ, Act.WAIT, ["job.failure"]),
        ("stopped", record("stopped"), READ, Act.WAIT, ["job.stopped"]),
        ("canceled", record("canceled"), READ, Act.WAIT, ["job.canceled"]),
        (watch(run=None), record("started"), READ, Act.BEGAN, []),
        (watch(run=None), record("failed"), READ, Act.BEGAN, ["job.failure"]),
        ("retried", record("queued", enqueued_s_ago=5, retries_left=0), READ, Act.BEGAN, ["job.retrying"]),
        (
            "failed and requeued",
            record("queued", enqueued_s_ago=5, results=(result("failure", 9),)),
            READ, Act.BEGAN, ["job.failure"],
        ),
        (
            "failed and requeued, and its report may wait",
            record("queued", enqueued_s_ago=5, results=(result("failure", 9),), tokens=frozenset({ENDPOINT})),
            BEHIND, Act.WAIT, [],
        ),
        (
            "just ended: its callback is on its way",
            record("finished", ended_at=ago(0.5), tokens=frozenset({ENDPOINT})), READ, Act.WAIT, [],
        ),
        (
            "ended, and no callback came",
            record("finished", ended_at=ago(2), tokens=frozenset({ENDPOINT})),
            READ, Act.WAIT, ["job.success"],
        ),
        ("just ended, carries none", record("finished", ended_at=ago(0.5)), READ, Act.WAIT, ["job.success"]),
        (watch(run=None, counts_from=ago(5)), record("finished"), READ, Act.WAIT, []),
        (
            watch(run=None, counts_from=ago(5)), record("finished", tokens=frozenset({ENDPOINT})), READ,
            Act.BEGAN, ["job.success"],
        ),
        (watch(missing_passes=0), None, READ, Act.MISSING, []),
        (watch(missing_passes=1), None, READ, Act.LOST, []),
        (watch(missing_passes=1), None, BEHIND, Act.WAIT, []),
        (watch(missing_passes=9), None, BEHIND, Act.WAIT, []),
        (SETTLED, None, READ, Act.WAIT, []),
        (SETTLED, record("failed"), READ, Act.WAIT, ["job.failure"]),
        (SETTLED, record("started", enqueued_s_ago=5), READ, Act.BEGAN, []),
        (watch(report=report()), None, READ, Act.WAIT, ["job.success"]),
        (watch(report=report()), None, BEHIND, Act.WAIT, []),
        (watch(report=report()), record("started"), READ, Act.WAIT, []),
        (watch(report=report()), record("failed"), READ, Act.WAIT, ["job.failure"]),
        (
            watch(report=report(retries_left=1)), record("queued", enqueued_s_ago=5, retries_left=0), READ,
            Act.BEGAN, ["job.retrying"],
        ),
        (watch(status="reserved", run=None), None, READ, Act.WAIT, []),
        (watch(status="reserved", run=None, created_at=ago(1000)), None, READ, Act.UNUSED, []),
        (watch(status="reserved", missing_passes=1), None, READ, Act.WAIT, []),
        (
            watch(status="reserved", created_at=ago(1000), missing_passes=1), None, READ, Act.LOST, [],
        ),
        (watch(status="reserved", run=None), record("failed"), READ, Act.BEGAN, ["job.failure"]),
        (
            watch(status="reserved", run=None, created_at=ago(1000), counts_from=ago(5)), record("queued"),
            READ, Act.UNUSED, [],
        ),
    ],
)  # fmt: skip
def test_conclusion(
    facts: WatchFacts | str,
    job: JobRecord | None,
    outbox: OutboxRead,
    action: WatchAction,
    types: list[str],
) -> None:
    watching = watch() if isinstance(facts, str) else facts

    conclusion = conclude(watching, job, [], now=NOW, outbox=outbox)

    assert (conclusion.action, [outcome.type for outcome in conclusion.outcomes]) == (action, types)


@pytest.mark.parametrize(
    ("read", "type_", "missing"),
    [
        (ago(1), "job.success", True),
        (ago(3), "job.success", False),
        (None, "job.success", False),
        (ago(1), "job.failure", False),
    ],
    ids=["read past it", "not read so far", "nobody asked", "of which there may be none"],
)
def test_success_lacks_its_report_where_the_outbox_is_read_past_it(
    read: datetime | None, type_: str, missing: bool
) -> None:
    outcome = Outcome(type=type_, run=format_time(ago(5)), ended_at=ago(2))
    outbox = OutboxRead(until=NOW, absent_since=NOW, complete_until=read)
    assert lacks_report(outcome, outbox) is missing


def test_settled_run_that_others_reported_is_caught_up_with() -> None:
    known = [reported("job.failure"), reported("job.success", run=format_time(ago(5)))]

    conclusion = conclude(
        SETTLED,
        record("finished", enqueued_s_ago=5),
        known,
        now=NOW,
        outbox=READ,
    )

    assert (conclusion.action, conclusion.outcomes) == (Act.CAUGHT_UP, ())


def test_run_that_was_noted_counts_whatever_the_clocks_say() -> None:
    behind = record("queued", enqueued_s_ago=120)

    assert counts(watch(), behind)
    assert not counts(watch(run=None), behind)
    assert counts(watch(run=None), record(enqueued_s_ago=62.5))


def test_loss_of_a_job_whose_run_is_known_has_its_run() -> None:
    assert outcome_of_loss(watch()).run == RUN
    assert outcome_of_loss(watch(run=None)).run == f"created:{format_time(ago(62))}"


# -- dependencies and trees -------------------------------------------------------------------------------


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
