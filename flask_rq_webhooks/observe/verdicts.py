"""What a callback's word is worth once RQ's committed state is known. Pure: everything is handed in.

A callback runs *before* RQ commits, and a work-horse may die in between; so its word is evidence. What RQ
committed wins. Only where RQ no longer knows does the callback's word stand.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from ..protocol.events import (
    JOB_CANCELED,
    JOB_FAILURE,
    JOB_RETRYING,
    JOB_STOPPED,
    JOB_SUCCESS,
    SOURCE_CALLBACK,
    Occurrence,
    parse_time,
)
from ..protocol.tracebacks import error_from_text

if TYPE_CHECKING:
    from ..queue.job_reader import JobRecord, JobResult
    from ..queue.outbox_entry import OutboxEntry

#: How much the clocks of a worker and of whoever wrote a result may differ.
_CLOCKS = timedelta(seconds=1)

_TYPE_OF_KIND = {"success": JOB_SUCCESS, "failure": JOB_FAILURE, "stopped": JOB_STOPPED}
_TYPE_OF_STATUS = {
    "finished": JOB_SUCCESS,
    "failed": JOB_FAILURE,
    "stopped": JOB_STOPPED,
    "canceled": JOB_CANCELED,
}
_TYPE_OF_RESULT = {
    "success": JOB_SUCCESS,
    "failure": JOB_FAILURE,
    "stopped": JOB_STOPPED,
    "retried": JOB_RETRYING,
}
#: Where RQ puts a run that ended and will begin again, before it has a new ``enqueued_at``.
_AGAIN = {"scheduled", "queued", "deferred", "ready_to_enqueue", "rate_limited"}


class Open(enum.Enum):
    """Why there is no verdict yet."""

    #: RQ has not committed the end of the run.
    UNCOMMITTED = enum.auto()
    #: RQ's results have to be read first.
    NEEDS_RESULTS = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How the run ended.

    :param type: event type.
    :param ended_at: when, where RQ says so.
    :param exc: traceback text RQ kept, where the callback could not know of the failure.
    """

    type: str
    ended_at: datetime | None = None
    exc: str | None = None


def judge(
    entry: OutboxEntry,
    job: JobRecord | None,
    results: Sequence[JobResult] | None = None,
    *,
    patient: bool = True,
) -> Verdict | Open:
    """Return how the run that *entry* tells of ended, by what RQ committed.

    :param entry: of kind ``success``, ``failure`` or ``stopped``.
    :param job: the job as it is now, possibly already in a newer run; ``None`` if it is gone.
    :param results: RQ's results of the job, oldest first; ``None`` when they have not been read.
    :param patient: whether the commit may still come. ``False`` accepts a job that stays ``canceled``.
    """
    if job is None or job.status is None:
        return Verdict(type=_word(entry), ended_at=job.ended_at if job is not None else None)
    if job.run == entry.run:
        return _judge_same_run(entry, job, results, patient=patient)
    if _began_before(job.run, entry.run):
        return Open.UNCOMMITTED  # the worker's view has not reached the hash
    return _judge_superseded(entry, job, results)


def _judge_same_run(
    entry: OutboxEntry, job: JobRecord, results: Sequence[JobResult] | None, *, patient: bool
) -> Verdict | Open:
    will_retry = entry.kind == "failure" and bool(entry.retries_left)
    if job.status in _AGAIN:
        if will_retry:
            return Verdict(type=JOB_RETRYING)
        # A repetition that waits for its time; but "queued" in the same run is one that has yet to begin.
        waits = job.status not in ("queued", "deferred")
        return _judge_superseded(entry, job, results) if waits else Open.UNCOMMITTED
    committed = _TYPE_OF_STATUS.get(job.status or "")
    if committed is None:
        return Open.UNCOMMITTED
    if committed == JOB_CANCELED and entry.kind != "stopped" and patient:
        return Open.UNCOMMITTED  # a job canceled while it runs becomes finished or failed at its commit
    exc = None
    if committed == JOB_FAILURE and entry.kind != "failure":
        if results is None:
            return Open.NEEDS_RESULTS
        exc = next((result.exc for result in reversed(results) if result.type == "failure"), None) or job.exc
    return Verdict(type=committed, ended_at=job.ended_at, exc=exc)


def _judge_superseded(
    entry: OutboxEntry, job: JobRecord, results: Sequence[JobResult] | None
) -> Verdict | Open:
    if entry.kind == "failure" and entry.retries_left:
        return Verdict(type=JOB_RETRYING)
    if entry.kind == "stopped":
        return Verdict(type=JOB_STOPPED)  # RQ's results call it a failure
    if results is None:
        return Open.NEEDS_RESULTS
    told_at = datetime.fromtimestamp(entry.at, UTC)
    # The commit follows the callback, so the run's own result is the first one after it.
    for result in results:
        if result.at >= told_at - _CLOCKS:
            committed = _TYPE_OF_RESULT.get(result.type)
            if committed is not None:
                exc = result.exc if committed == JOB_FAILURE and entry.kind != "failure" else None
                return Verdict(type=committed, ended_at=result.at, exc=exc)
    if (
        entry.retries_left is not None
        and job.retries_left is not None
        and job.retries_left < entry.retries_left
    ):
        return Verdict(type=JOB_RETRYING)  # the work-horse died after on_success, and RQ began again
    return Verdict(type=_word(entry))


def _word(entry: OutboxEntry) -> str:
    if entry.kind == "failure" and entry.retries_left:
        return JOB_RETRYING
    return _TYPE_OF_KIND[entry.kind]


def _began_before(run: str, other: str) -> bool:
    """Say whether *run* is older than *other*; never for a job that had not been enqueued."""
    return not run.startswith("created:") and not other.startswith("created:") and run < other


def occurrence_of(
    entry: OutboxEntry, verdict: Verdict, *, include_result: bool, max_payload_bytes: int
) -> Occurrence:
    """Return the occurrence that *verdict* makes of *entry*, with as much evidence as fits the verdict."""
    told_at = datetime.fromtimestamp(entry.at, UTC)
    result, truncated, error = None, False, None
    if verdict.type == JOB_SUCCESS and entry.kind == "success" and include_result:
        # JSON already, as the entry is, and no larger than it.
        truncated = (
            not 0 < entry.size <= max_payload_bytes
            and len(json.dumps(entry.result, separators=(",", ":"))) > max_payload_bytes
        )
        result = None if truncated else entry.result
        truncated = truncated or entry.result_truncated
    elif verdict.type == JOB_FAILURE:
        error = entry.error if entry.kind == "failure" else error_from_text(verdict.exc)
    ended_at = verdict.ended_at or told_at
    return Occurrence(
        type=verdict.type,
        occurred_at=ended_at,
        source=SOURCE_CALLBACK,
        job_id=entry.job_id,
        run=entry.run,
        runid=entry.runid,
        func=entry.func,
        queue=entry.queue,
        enqueued_at=_time(entry.enqueued_at),
        started_at=_time(entry.started_at),
        ended_at=ended_at,
        result=result,
        result_truncated=truncated,
        error=error,
    )


def _time(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text)
