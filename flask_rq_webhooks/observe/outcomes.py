"""How a run of a job ended: the rules that ingest and reconcile share. Pure: everything is passed in.

A callback reports *before* RQ commits, and the work-horse may die in between. So a report is only evidence,
and what RQ committed wins. A report counts on its own only if RQ no longer knows the run.

A job's hash shows only its current run. How an earlier run ended is in RQ's results, which do not name the
run they belong to. These rules assign each result to a run and rely on as few clock comparisons as possible:

* The hash and the results are read at the same moment, so the newest result belongs to the current run if
  that run is over, and to an earlier run if it is not.
* A retry leaves no result and reduces ``retries_left`` by one.
* The same Redis server timestamps a callback's report and RQ's result, the report first.
* A result from which an event was made is not reported again.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from ..protocol.events import (
    CLOCK_SKEW,
    JOB_CANCELED,
    JOB_FAILURE,
    JOB_LOST,
    JOB_RETRYING,
    JOB_STOPPED,
    JOB_SUCCESS,
    TERMINAL_TYPES,
    format_time,
    parse_time,
)
from ..queue.job_reader import JobRecord, JobResult
from ..queue.outbox_entry import OutboxEntry
from ..storage.reported_runs import Reported

#: How long RQ may still change the ending of a run, such as when an orphaned work-horse finishes after all.
#: Later changes are not reported.
CORRECTIONS_FOR = timedelta(hours=24)
#: How far the clocks of Redis and of enqueuing machines may differ if nothing else tells whose a result is.
#: Beyond that, a run that ended without a callback and began again between two passes is not reported.
LARGE_CLOCK_SKEW = timedelta(minutes=2)
#: Precision of the timestamps in Redis streams.
_MILLISECOND = timedelta(milliseconds=1)

TYPE_OF_STATUS = {
    "finished": JOB_SUCCESS,
    "failed": JOB_FAILURE,
    "stopped": JOB_STOPPED,
    "canceled": JOB_CANCELED,
}
_TYPE_OF_KIND = {
    "success": JOB_SUCCESS,
    "failure": JOB_FAILURE,
    "stopped": JOB_STOPPED,
    "retried": JOB_RETRYING,
}
#: A job between two runs that RQ starts by itself; ``enqueued_at`` is still that of the first run.
_BETWEEN_RUNS = frozenset({"scheduled", "queued", "deferred", "ready_to_enqueue", "rate_limited"})
#: Those of them in which the job's current run has not begun.
_NOT_BEGUN = frozenset({"queued", "deferred"})


class Undecided(enum.Enum):
    """Why there is no outcome."""

    #: RQ has not committed the end of the run.
    UNCOMMITTED = enum.auto()
    #: RQ's results must be read first.
    NEEDS_RESULTS = enum.auto()
    #: The ending was already reported as that of another run.
    REPORTED = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    :param type: the event type; the outcome is final if this is a terminal one.
    :param run: identity of the run, see :func:`~flask_rq_webhooks.protocol.events.run_key`.
    :param ended_at: when the run ended, if known.
    :param exc: traceback text that RQ kept of a failure.
    :param committed: whether RQ committed it; otherwise only the callback says so, or nobody (``job.lost``).
    :param result: the RQ result it was taken from, if the job is in a newer run by now.
    :param supersedes: id of the event that it corrects.
    """

    type: str
    run: str
    ended_at: datetime | None = None
    exc: str | None = None
    committed: bool = True
    result: JobResult | None = None
    supersedes: str | None = None

    @property
    def is_final(self) -> bool:
        """Return whether the run is over."""
        return self.type in TERMINAL_TYPES


# -- one run ----------------------------------------------------------------------------------------------


def outcome_of(
    run: str,
    job: JobRecord | None,
    *,
    report: OutboxEntry | None = None,
    following: OutboxEntry | None = None,
    reported: Sequence[Reported] = (),
    patient: bool = True,
) -> Outcome | Undecided:
    """Return how *run* ended.

    :param job: the job's current state, with its results if they were read; ``None`` if RQ has no such job.
    :param report: what the run's callback reported, of kind ``success``, ``failure`` or ``stopped``.
    :param following: the report of the job's next run, if it has been read.
    :param reported: the job's endings that were already reported, oldest first; needed only if the job is
        absent or in another run.
    :param patient: whether RQ may still commit. ``False`` accepts a job that stays ``canceled``, and a hash
        whose run looks older than the report's, because the machines' clocks differ.
    """
    if job is None:
        return Undecided.UNCOMMITTED if report is None else by_report(report, following)
    if job.run == run:
        return _of_current_run(run, job, report, following, reported, patient=patient)
    if patient and job.run is not None and _began_before(job.run, run):
        return Undecided.UNCOMMITTED  # the hash may have been overwritten with an older copy
    if report is None:
        return Undecided.UNCOMMITTED  # see unreported_outcomes
    return _of_superseded_run(job, report, following, reported)


def _of_current_run(
    run: str,
    job: JobRecord,
    report: OutboxEntry | None,
    following: OutboxEntry | None,
    reported: Sequence[Reported],
    *,
    patient: bool,
) -> Outcome | Undecided:
    committed = TYPE_OF_STATUS.get(job.status or "")
    if committed is None:
        if report is None or job.status not in _BETWEEN_RUNS:
            return Undecided.UNCOMMITTED
        if _expects_retry(report):
            return Outcome(type=JOB_RETRYING, run=run)
        if job.status in _NOT_BEGUN:
            return Undecided.UNCOMMITTED
        # The job waits for its repetition, or for a retry because the work-horse died after on_success.
        return _of_superseded_run(job, report, following, reported)
    if committed == JOB_CANCELED and report is not None and report.kind != "stopped" and patient:
        return Undecided.UNCOMMITTED  # a job canceled while running becomes finished or failed on commit
    exc = None
    own = own_result(job)
    if committed == JOB_FAILURE and (report is None or report.kind != "failure"):
        if job.results is None:
            return Undecided.NEEDS_RESULTS
        exc = (own.exc if own is not None else None) or job.exc
    return Outcome(type=committed, run=run, ended_at=_ended_at(job, own), exc=exc)


def _of_superseded_run(
    job: JobRecord, report: OutboxEntry, following: OutboxEntry | None, reported: Sequence[Reported]
) -> Outcome | Undecided:
    retrying = Outcome(type=JOB_RETRYING, run=report.run)
    if _was_retried(report, following):
        return retrying
    if _expects_retry(report) and _was_retried(report, job):
        return retrying
    if job.results is None:
        return Undecided.NEEDS_RESULTS
    result = _result_after(report, following, job)
    if result is None:
        return retrying if _was_retried(report, job) else by_report(report, following)
    if _expects_retry(report) and _type_of(result) != JOB_STOPPED:
        return retrying  # only a stop keeps RQ from retrying
    if any(_is_claimed(result, ending) for ending in reported if ending.run != report.run):
        return Undecided.REPORTED
    return _by_result(report.run, result)


def by_report(report: OutboxEntry, following: OutboxEntry | None = None) -> Outcome:
    """Return the outcome that a callback reported for a run that RQ no longer knows."""
    if _expects_retry(report) or _was_retried(report, following):
        return Outcome(type=JOB_RETRYING, run=report.run, committed=False)
    return Outcome(
        type=_TYPE_OF_KIND[report.kind], run=report.run, ended_at=reported_at(report), committed=False
    )


def _by_result(run: str, result: JobResult) -> Outcome:
    return Outcome(
        type=_type_of(result), run=run, ended_at=result.ended_at or result.at, exc=result.exc, result=result
    )


def _expects_retry(report: OutboxEntry) -> bool:
    return report.kind == "failure" and bool(report.retries_left)


def _was_retried(report: OutboxEntry, later: JobRecord | OutboxEntry | None) -> bool:
    """Return whether RQ retried the reported run: every retry reduces the retries left by one."""
    return (
        later is not None
        and report.retries_left is not None
        and later.retries_left is not None
        and later.retries_left < report.retries_left
    )


def _result_after(report: OutboxEntry, following: OutboxEntry | None, job: JobRecord) -> JobResult | None:
    """Return the reported run's own result: the first one after the report, unless a later run made it.

    The execution of a run begins before the run's ``started_at``; both times are from one machine's clock.
    """
    own = own_result(job) if job.run != report.run else None
    for result in job.results or ():
        if result is own or result.at < reported_at(report) - _MILLISECOND:
            continue
        if following is not None and result.at > reported_at(following):
            return None
        if report.kind == "stopped" and result.type in ("success", "retried"):
            return None  # a stopped run leaves a failure
        if result.started_at is not None and report.started_at is not None:
            return result if result.started_at <= parse_time(report.started_at) else None
        return result
    return None


def reported_at(report: OutboxEntry) -> datetime:
    """Return when Redis received the report."""
    return datetime.fromtimestamp(report.at, UTC)


def _began_before(run: str, other: str) -> bool:
    """Return whether *run* looks older than *other*; always false if the job had never been enqueued."""
    return not run.startswith("created:") and not other.startswith("created:") and run < other


# -- RQ's results -----------------------------------------------------------------------------------------


def own_result(job: JobRecord) -> JobResult | None:
    """Return the result of the job's current run: the newest result, if it agrees with the hash."""
    if not job.results:
        return None
    last = job.results[-1]
    # RQ has committed a success for a job that waits for its repetition.
    committed = JOB_SUCCESS if job.status == "scheduled" else TYPE_OF_STATUS.get(job.status or "")
    if committed is None or _type_of(last) != committed:
        return None
    if last.ended_at is not None and job.ended_at is not None:
        return last if abs(last.ended_at - job.ended_at) <= _MILLISECOND else None
    return last


def unreported_outcomes(
    run: str | None,
    job: JobRecord,
    reported: Sequence[Reported],
    *,
    since: datetime,
    run_is_reported: bool,
    taken: Sequence[JobResult] = (),
) -> list[Outcome]:
    """Return how runs before the job's current one ended, if RQ knows it and no event has reported it.

    :param run: the run that was noted last, or ``None``.
    :param since: when the first run that counts began.
    :param run_is_reported: whether an event says how *run* ended.
    :param taken: results already assigned to a callback's report.
    """
    own = own_result(job)
    results = [
        result
        for result in job.results or ()
        if result is not own
        and result.type != "retried"
        and result not in taken
        and (result.ended_at is None or result.ended_at != job.ended_at)
    ]
    # A reported ending of the current run was made from the current run's own result.
    others = [ending for ending in reported if own is None or ending.run != job.run]
    left = _unclaimed(results, others)
    if run is None:
        found = [result for result in left if (result.started_at or result.at) >= since]
    else:
        since = max(since, parse_time(run))
        found = [result for result in left if result.at >= since - CLOCK_SKEW]
    open_run = None if run_is_reported else run
    if not found and left and open_run is not None and not may_have_been_retried(job):
        # *run* must have ended, or the job could not be in a newer run; so the clocks differ.
        found = [result for result in left[-1:] if result.at >= since - LARGE_CLOCK_SKEW]
    outcomes = []
    for result in found:
        # An unseen run has no known identity; the time it ended is as unique as the time it was enqueued.
        outcomes.append(_by_result(open_run or format_time(result.ended_at or result.at), result))
        open_run = None
    return outcomes


def may_have_been_retried(job: JobRecord) -> bool:
    """Return whether RQ may have retried a run of the job without committing an ending."""
    return job.retries_left is not None or any(result.type == "retried" for result in job.results or ())


def _unclaimed(results: Sequence[JobResult], reported: Sequence[Reported]) -> list[JobResult]:
    """Return the results from which no reported ending was made."""
    left = list(results)
    unmatched = []
    for ending in reported:
        same = next((result for result in left if _is_claimed(result, ending)), None)
        if same is not None:
            left.remove(same)
        else:
            unmatched.append(ending)
    # For results without RQ's times: each ending, newest first, takes the newest result of its type.
    for ending in reversed(unmatched):
        same = next((r for r in reversed(left) if r.ended_at is None and _type_of(r) in ending.types), None)
        if same is not None:
            left.remove(same)
    return left


def _is_claimed(result: JobResult, ending: Reported) -> bool:
    moment = result.ended_at or result.at
    return any(abs(moment - ended_at) <= _MILLISECOND for ended_at in ending.ended_at)


def _type_of(result: JobResult) -> str:
    # RQ records a stop as a failure with a fixed message.
    if result.type == "failure" and (result.exc or "").startswith("Job stopped by user"):
        return JOB_STOPPED
    return _TYPE_OF_KIND[result.type]


def _ended_at(job: JobRecord, result: JobResult | None) -> datetime | None:
    ended_at = job.ended_at
    if ended_at is not None and (job.enqueued_at is None or ended_at >= job.enqueued_at - LARGE_CLOCK_SKEW):
        return ended_at
    return result.at if result is not None else None


# -- corrections ------------------------------------------------------------------------------------------


def news(outcome: Outcome, reported: Iterable[Reported], *, now: datetime) -> Outcome | None:
    """Return *outcome* as it is to be published: unchanged, as a correction, or not at all.

    A run has one ending and at most one correction. Only an outcome that RQ committed may correct an ending;
    ``job.lost`` means that the outcome was not known, so a callback's report may correct it too.
    """
    if not outcome.is_final:
        return outcome
    for ending in reported:
        if ending.run != outcome.run and not is_loss_of(ending, outcome):
            continue
        if ending.type == outcome.type or ending.corrected or now - ending.stored_at > CORRECTIONS_FOR:
            return None
        if not outcome.committed and ending.type != JOB_LOST:
            return None
        return replace(outcome, run=ending.run, supersedes=ending.event_id)
    return outcome


def is_loss_of(ending: Reported, outcome: Outcome) -> bool:
    """Return whether *ending* reports a never-seen job as lost, and *outcome* is how it really ended."""
    if JOB_LOST not in ending.types or not ending.run.startswith("created:"):
        return False
    began = outcome.run.removeprefix("created:")
    return parse_time(began) <= ending.stored_at + CLOCK_SKEW
