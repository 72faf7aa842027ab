"""Occurrences: an outcome with everything that is known of the run.

Owns what goes into an event beside its type, and the one read that :mod:`~flask_rq_webhooks.observe.outcomes`
leaves to others: the return value. Decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rq.defaults import UNSERIALIZABLE_RETURN_VALUE_PAYLOAD

from ..config import Settings
from ..protocol.events import (
    JOB_FAILURE,
    JOB_SUCCESS,
    SOURCE_CALLBACK,
    SOURCE_RECONCILED,
    Occurrence,
    parse_time,
)
from ..protocol.json_safe import dumps_capped
from ..protocol.tracebacks import error_from_text
from ..queue.job_reader import JobRecord, read_result_value
from ..queue.outbox_entry import OutboxEntry
from ..queue.safe_pickle import UNKNOWN
from .outcomes import Outcome, reported_at

if TYPE_CHECKING:
    from redis import Redis


def occurrence_of_report(report: OutboxEntry, outcome: Outcome, settings: Settings) -> Occurrence:
    """Return what a callback reported, as far as it fits the outcome."""
    result, truncated, error = None, False, None
    if outcome.type == JOB_SUCCESS and settings.include_result:
        if report.kind == "success":
            result, truncated = _reported_result(report, settings.max_payload_bytes)
        else:
            truncated = True  # RQ committed a success; this callback does not know its result
    elif outcome.type == JOB_FAILURE:
        error = report.error if report.kind == "failure" else error_from_text(outcome.exc)
    ended_at = outcome.ended_at or reported_at(report)
    return Occurrence(
        type=outcome.type,
        occurred_at=ended_at,
        source=SOURCE_CALLBACK,
        job_id=report.job_id,
        run=outcome.run,
        runid=report.runid,
        func=report.func,
        queue=report.queue,
        enqueued_at=_time(report.enqueued_at),
        started_at=_time(report.started_at),
        ended_at=ended_at,
        result=result,
        result_truncated=truncated,
        error=error,
        supersedes=outcome.supersedes,
    )


def occurrence_of_loss(job_id: str, outcome: Outcome, *, now: datetime) -> Occurrence:
    """Return that a job is gone and nobody knows how it ended."""
    return Occurrence(
        type=outcome.type,
        occurred_at=now,
        source=SOURCE_RECONCILED,
        job_id=job_id,
        run=outcome.run,
        enqueued_at=None if outcome.run.startswith("created:") else parse_time(outcome.run),
    )


class OccurrenceReader:
    """Make occurrences of what RQ keeps, results included unless ``INCLUDE_RESULT`` says no."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self.settings = settings

    def of_job(
        self, job: JobRecord, outcome: Outcome, *, report: OutboxEntry | None = None, now: datetime
    ) -> Occurrence:
        """Return how a run of a job ended, by what RQ committed.

        :param report: what the run's callback reported, which may know the result better than RQ does.
        """
        is_current = outcome.result is None and outcome.run == job.run
        result, truncated, error = None, False, None
        if outcome.type == JOB_SUCCESS:
            result, truncated = self._result(job, outcome, report, is_current=is_current)
        elif outcome.type == JOB_FAILURE:
            known: Mapping[str, str] | None = report.error if report is not None else None
            error = known or error_from_text(outcome.exc)
        return Occurrence(
            type=outcome.type,
            occurred_at=outcome.ended_at or now,
            source=SOURCE_RECONCILED,
            job_id=job.job_id,
            run=outcome.run,
            runid=job.runid,
            func=job.func,
            queue=job.queue,
            enqueued_at=job.enqueued_at if is_current else _began(outcome),
            started_at=job.started_at if is_current else _started(outcome),
            ended_at=outcome.ended_at,
            result=result,
            result_truncated=truncated,
            error=error,
            supersedes=outcome.supersedes,
        )

    def _result(
        self, job: JobRecord, outcome: Outcome, report: OutboxEntry | None, *, is_current: bool
    ) -> tuple[Any, bool]:
        if not self.settings.include_result:
            return None, False
        if report is not None and report.kind == "success":
            return _reported_result(report, self.settings.max_payload_bytes)
        # RQ keeps one return value of a job: the newest success's.
        newest = next((result for result in reversed(job.results or ()) if result.type == "success"), None)
        if not is_current and outcome.supersedes is None and newest is not outcome.result:
            return None, True
        value = read_result_value(self._redis, job.job_id)
        if value is UNKNOWN or value == UNSERIALIZABLE_RETURN_VALUE_PAYLOAD:
            return None, True
        return dumps_capped(value, self.settings.max_payload_bytes)


def _reported_result(report: OutboxEntry, max_payload_bytes: int) -> tuple[Any, bool]:
    """Return the result in a report: JSON already, and no larger than the report it was read from."""
    too_large = (
        not 0 < report.size <= max_payload_bytes
        and len(json.dumps(report.result, separators=(",", ":"))) > max_payload_bytes
    )
    return (None, True) if too_large else (report.result, report.result_truncated)


def _began(outcome: Outcome) -> datetime | None:
    """Return when an earlier run was enqueued; that of a run nobody saw is not known."""
    run = outcome.run.removeprefix("created:")
    began = parse_time(run)
    return None if outcome.ended_at is not None and began >= outcome.ended_at else began


def _started(outcome: Outcome) -> datetime | None:
    return outcome.result.started_at if outcome.result is not None else None


def _time(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text)
