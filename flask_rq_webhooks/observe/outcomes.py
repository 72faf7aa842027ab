"""What a watch and RQ's committed state mean together. Pure: everything is handed in.

The rules of reconcile, apart from where the facts come from and what is done with the answer: which runs
count, how a run ended, when a missing job is lost, what is a correction.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ..protocol.events import (
    JOB_CANCELED,
    JOB_FAILURE,
    JOB_LOST,
    JOB_RETRYING,
    JOB_STOPPED,
    JOB_SUCCESS,
    SOURCE_CALLBACK,
    SOURCE_RECONCILED,
    TERMINAL_TYPES,
    Occurrence,
    format_time,
    parse_time,
)
from ..protocol.json_safe import dumps_capped
from ..protocol.tracebacks import error_from_text
from ..queue.job_reader import JobRecord, JobResult
from ..queue.outbox_entry import OutboxEntry
from ..queue.safe_pickle import UNKNOWN

#: Passes that have to miss a confirmed job before it counts as lost.
LOST_AFTER_PASSES = 2
#: How long a reserved id may wait for its job: views that take minutes, pipelines executed later.
RESERVED_GRACE = timedelta(minutes=15)
#: How long a job that carries our callbacks is left to them after its end: they know its result.
CALLBACK_GRACE = timedelta(seconds=1.5)
#: How much the clocks of web hosts and workers may differ.
CLOCK_SKEW = timedelta(seconds=1)

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


class Meaning(enum.Enum):
    """What is to be done about an open watch."""

    #: Nothing has ended.
    WAIT = enum.auto()
    #: The run has ended; RQ says how.
    ENDED = enum.auto()
    #: RQ no longer knows; a callback's parked word stands.
    WORD = enum.auto()
    #: The job is not there; to be seen once more before it means anything.
    MISSING = enum.auto()
    #: The job is gone and nobody said how it ended.
    LOST = enum.auto()
    #: The id was reserved and never became a job of this request.
    UNUSED = enum.auto()
    #: The job is gone, and its last run has been told.
    OVER = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchFacts:
    """What SQL knows of a watch.

    :param run: last run seen; told already where *told* says so.
    :param counts_from: runs that began before do not count, unless the job carries our endpoint.
    :param evidence: a callback's word that RQ had not committed.
    """

    job_id: str
    endpoint_id: str | None
    status: str
    created_at: datetime
    counts_from: datetime
    run: str | None = None
    told: bool = False
    missing_passes: int = 0
    evidence: OutboxEntry | None = None


def meaning_of(
    watch: WatchFacts, job: JobRecord | None, *, now: datetime, outbox_lags: bool = False
) -> Meaning:
    """Return what RQ's committed state means for an open or reserved watch.

    :param job: ``None`` where RQ has no such job.
    :param outbox_lags: callbacks' words are waiting to be read; absence proves nothing then.
    """
    if job is None:
        return _meaning_of_absence(watch, now=now, outbox_lags=outbox_lags)
    if not counts(watch, job):
        waited = watch.status == "reserved" and now - watch.created_at > RESERVED_GRACE
        return Meaning.UNUSED if waited else Meaning.WAIT
    if job.status not in TYPE_OF_STATUS or (watch.told and watch.run == job.run):
        return Meaning.WAIT
    return Meaning.WAIT if _callback_may_be_on_its_way(watch, job, now) else Meaning.ENDED


def _callback_may_be_on_its_way(watch: WatchFacts, job: JobRecord, now: datetime) -> bool:
    if job.ended_at is None or watch.evidence is not None or watch.endpoint_id not in job.tokens:
        return False
    return timedelta(0) <= now - job.ended_at < CALLBACK_GRACE


def _meaning_of_absence(watch: WatchFacts, *, now: datetime, outbox_lags: bool) -> Meaning:
    if watch.evidence is not None:
        return Meaning.WORD
    if watch.told:
        return Meaning.OVER
    if watch.status == "reserved":
        return Meaning.UNUSED if now - watch.created_at > RESERVED_GRACE else Meaning.WAIT
    if outbox_lags:
        return Meaning.WAIT
    return Meaning.LOST if watch.missing_passes + 1 >= LOST_AFTER_PASSES else Meaning.MISSING


def counts(watch: WatchFacts, job: JobRecord) -> bool:
    """Say whether the job's current run began after we promised to report it.

    A job whose callbacks carry the endpoint was enqueued for it, whatever the clocks say.
    """
    if watch.endpoint_id is not None and watch.endpoint_id in job.tokens:
        return True
    return (job.enqueued_at or job.created_at) >= watch.counts_from - CLOCK_SKEW


def ending_of_superseded(run: str, job: JobRecord, results: Sequence[JobResult]) -> JobResult | None:
    """Return the result that ended *run*, where *job* is already in a newer run; ``None`` if RQ kept none.

    Runs follow one another, so the result of one lies between its beginning and that of the next.

    :param run: the run, by the time it was enqueued.
    """
    if run.startswith("created:") or job.enqueued_at is None:
        return None
    began = parse_time(run)
    if results and _type_of(results[-1]) == TYPE_OF_STATUS.get(job.status or ""):
        results = results[:-1]  # the current run's own
    ended = [
        result
        for result in results
        if began - CLOCK_SKEW <= result.at <= job.enqueued_at + CLOCK_SKEW and result.type != "retried"
    ]
    return ended[-1] if ended else None


def is_correction(told_type: str, job: JobRecord, *, told_run: str, told_at: datetime) -> bool:
    """Say whether RQ now says something else of a run than we told.

    :param told_run: the run told; that of a lost job we never saw is not known and begins ``created:``.
    :param told_at: when it was told.
    """
    committed = TYPE_OF_STATUS.get(job.status or "")
    if committed is None or committed == told_type:
        return False
    if job.run == told_run:
        return True
    unknown = told_type == JOB_LOST and told_run.startswith("created:")
    return unknown and (job.enqueued_at or job.created_at) <= told_at


def is_blocked(
    job: JobRecord, statuses: Mapping[str, str | None], *, blocked: frozenset[str] = frozenset()
) -> bool:
    """Say whether a deferred job waits for something that will not happen.

    :param statuses: of the jobs it depends on; ``None`` for absent ones.
    :param blocked: dependencies that are known to be blocked themselves.
    """
    if job.status != "deferred":
        return False
    for dependency in job.dependency_ids:
        status = statuses.get(dependency)
        if status in (None, "stopped", "canceled") or dependency in blocked:
            return True
        if status == "failed" and not job.allow_dependency_failures:
            return True
    return False


# -- occurrences ------------------------------------------------------------------------------------------


def occurrence_of_job(
    job: JobRecord,
    results: Sequence[JobResult],
    *,
    now: datetime,
    max_payload_bytes: int,
    value: Any = UNKNOWN,
    evidence: OutboxEntry | None = None,
    supersedes: str | None = None,
    run: str | None = None,
) -> Occurrence:
    """Return how the job's current run ended, by what RQ committed.

    :param value: what a successful run returned.
    :param evidence: a callback's word on the same run, which may know the result better than RQ does.
    :param supersedes: id of the event this corrects.
    :param run: where the run was told under another identity.
    """
    event_type = TYPE_OF_STATUS[job.status or ""]
    last = _last_of_run(job, results, event_type)
    ended_at = _ended_at(job, last)
    evidence = evidence if evidence is not None and evidence.run == job.run else None
    result, truncated, error = None, False, None
    if event_type == JOB_SUCCESS:
        result, truncated = _result_of(value, evidence, max_payload_bytes)
    elif event_type == JOB_FAILURE:
        known = evidence.error if evidence is not None and evidence.kind == "failure" else None
        error = known or error_from_text(last.exc if last is not None and last.exc else job.exc)
    return _occurrence(
        job, event_type, run or job.run, ended_at=ended_at, now=now,
        result=result, result_truncated=truncated, error=error, supersedes=supersedes,
    )  # fmt: skip


def occurrence_of_result(
    job: JobRecord, run: str, result: JobResult, *, max_payload_bytes: int, value: Any = UNKNOWN
) -> Occurrence:
    """Return how an earlier run of the job ended, by the result RQ kept of it."""
    event_type = _type_of(result)
    kept, truncated, error = None, False, None
    if event_type == JOB_SUCCESS:
        kept, truncated = _result_of(value, None, max_payload_bytes)
    elif event_type == JOB_FAILURE:
        error = error_from_text(result.exc)
    return _occurrence(
        job, event_type, run, ended_at=result.at, now=result.at,
        result=kept, result_truncated=truncated, error=error, of_current_run=False,
    )  # fmt: skip


def occurrence_of_word(entry: OutboxEntry, *, max_payload_bytes: int) -> Occurrence:
    """Return what a callback said of a run RQ no longer knows."""
    ended_at = datetime.fromtimestamp(entry.at, UTC)
    event_type = _TYPE_OF_KIND[entry.kind]
    if entry.kind == "failure" and entry.retries_left:
        event_type = JOB_RETRYING
    result, truncated = None, False
    if event_type == JOB_SUCCESS:
        result, truncated = dumps_capped(entry.result, max_payload_bytes)
    return Occurrence(
        type=event_type,
        occurred_at=ended_at,
        source=SOURCE_CALLBACK,
        job_id=entry.job_id,
        run=entry.run,
        runid=entry.runid,
        func=entry.func,
        queue=entry.queue,
        enqueued_at=parse_time(entry.enqueued_at) if entry.enqueued_at else None,
        started_at=parse_time(entry.started_at) if entry.started_at else None,
        ended_at=ended_at,
        result=result,
        result_truncated=truncated or entry.result_truncated,
        error=entry.error,
    )


def occurrence_of_loss(watch: WatchFacts, *, now: datetime) -> Occurrence:
    """Return that the job of *watch* is gone without a word: outcome unknown."""
    run = watch.run or "created:" + format_time(watch.created_at)
    known = watch.run is not None and not watch.run.startswith("created:")
    return Occurrence(
        type=JOB_LOST,
        occurred_at=now,
        source=SOURCE_RECONCILED,
        job_id=watch.job_id,
        run=run,
        enqueued_at=parse_time(run) if known else None,
    )


def occurrence_of_state(
    job: JobRecord, event_type: str, *, now: datetime, run: str | None = None
) -> Occurrence:
    """Return a non-terminal occurrence: the job waits in vain, or its run ended and RQ began another."""
    if event_type in TERMINAL_TYPES:
        raise ValueError(f"{event_type} ends a run")
    return _occurrence(job, event_type, run or job.run, ended_at=None, now=now, of_current_run=run is None)


def _occurrence(
    job: JobRecord,
    event_type: str,
    run: str,
    *,
    ended_at: datetime | None,
    now: datetime,
    of_current_run: bool = True,
    **fields: Any,
) -> Occurrence:
    if of_current_run:
        enqueued_at, started_at = job.enqueued_at, job.started_at
    else:
        enqueued_at, started_at = parse_time(run.removeprefix("created:")), None
    return Occurrence(
        type=event_type,
        occurred_at=ended_at or now,
        source=SOURCE_RECONCILED,
        job_id=job.job_id,
        run=run,
        runid=job.runid,
        func=job.func,
        queue=job.queue,
        enqueued_at=enqueued_at,
        started_at=started_at,
        ended_at=ended_at,
        **fields,
    )


def _type_of(result: JobResult) -> str:
    # RQ records a stop as a failure, with a sentence of its own.
    if result.type == "failure" and (result.exc or "").startswith("Job stopped by user"):
        return JOB_STOPPED
    return _TYPE_OF_KIND[result.type]


def _last_of_run(job: JobRecord, results: Sequence[JobResult], event_type: str) -> JobResult | None:
    """Return the newest result that says the same as the committed status, if it is of the run."""
    for result in reversed(results):
        if _type_of(result) == event_type:
            began = job.enqueued_at
            return result if began is None or result.at >= began - CLOCK_SKEW else None
    return None


def _ended_at(job: JobRecord, result: JobResult | None) -> datetime | None:
    ended_at = job.ended_at
    if ended_at is not None and (job.enqueued_at is None or ended_at >= job.enqueued_at):
        return ended_at
    return result.at if result is not None else None


def _result_of(value: Any, evidence: OutboxEntry | None, max_payload_bytes: int) -> tuple[Any, bool]:
    if evidence is not None and evidence.kind == "success":
        kept, truncated = dumps_capped(evidence.result, max_payload_bytes)
        return kept, truncated or evidence.result_truncated
    return (None, True) if value is UNKNOWN else dumps_capped(value, max_payload_bytes)
