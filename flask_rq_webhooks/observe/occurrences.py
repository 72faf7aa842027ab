"""How runs of a job ended, told with what the job returned, where RQ still has it.

Owns the one read that :mod:`~flask_rq_webhooks.observe.outcomes` leaves to others, the return value, and the
app's settings about it. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rq.defaults import UNSERIALIZABLE_RETURN_VALUE_PAYLOAD

from ..config import Settings
from ..protocol.events import Occurrence
from ..queue.job_reader import JobRecord, JobResult, read_result_value
from ..queue.outbox_entry import OutboxEntry
from ..queue.safe_pickle import UNKNOWN
from .outcomes import occurrence_of_job, occurrence_of_result, occurrence_of_word

if TYPE_CHECKING:
    from redis import Redis


class OccurrenceReader:
    """Make occurrences of what RQ keeps, results included unless ``INCLUDE_RESULT`` says no."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._include_result = settings.include_result
        self._max_payload_bytes = settings.max_payload_bytes

    def of_job(
        self,
        job: JobRecord,
        results: Sequence[JobResult],
        *,
        now: datetime,
        evidence: OutboxEntry | None = None,
        supersedes: str | None = None,
        run: str | None = None,
    ) -> Occurrence:
        """Return how the job's current run ended.

        The parameters are those of :func:`~flask_rq_webhooks.observe.outcomes.occurrence_of_job`.
        """
        return occurrence_of_job(
            job,
            results,
            value=self._value(job.job_id) if job.status == "finished" else UNKNOWN,
            evidence=evidence,
            now=now,
            max_payload_bytes=self._max_payload_bytes,
            supersedes=supersedes,
            run=run,
        )

    def of_earlier_run(
        self, job: JobRecord, run: str, ending: JobResult, results: Sequence[JobResult]
    ) -> Occurrence:
        """Return how *run* ended, where the job is in a newer one."""
        # RQ keeps one return value a job: the newest success's.
        latest = ending.type == "success" and not any(
            other.type == "success" and other.at > ending.at for other in results
        )
        return occurrence_of_result(
            job,
            run,
            ending,
            value=self._value(job.job_id) if latest else UNKNOWN,
            max_payload_bytes=self._max_payload_bytes,
        )

    def of_word(self, evidence: OutboxEntry) -> Occurrence:
        """Return what a callback said of a run RQ no longer knows."""
        return occurrence_of_word(evidence, max_payload_bytes=self._max_payload_bytes)

    def _value(self, job_id: str) -> object:
        if not self._include_result:
            return None
        value = read_result_value(self._redis, job_id)
        return UNKNOWN if value == UNSERIALIZABLE_RETURN_VALUE_PAYLOAD else value
