"""Runs that are under way: ``job.started`` and ``job.stalled``, each once per run, for those who ask.

Owns which of the jobs that RQ calls started have something new to report. Whether the run has ended meanwhile
is decided where events are stored (:func:`~flask_rq_webhooks.storage.events.ingest`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from ..protocol.events import JOB_STALLED, JOB_STARTED, run_key
from ..queue.abandoned_jobs import expired_jobs
from ..queue.job_reader import read_jobs
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.events import IngestItem
from .occurrences import OccurrenceReader
from .outcomes import Outcome
from .pending_events import Publish, publish_some

if TYPE_CHECKING:
    from redis import Redis

#: Events that are remembered as stored, so that SQL is not asked for them in every pass.
_MAX_REMEMBERED = 200_000


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A watched job that RQ calls started.

    :param wants: optional types that the watch's endpoint or a standing one asks for.
    """

    job_id: str
    run: str
    queue: str
    wants: frozenset[str]


class RunningJobs:
    """Publish what is new about runs that are under way."""

    def __init__(
        self, database: Database, redis: Redis, *, publish: Publish, occurrences: OccurrenceReader
    ) -> None:
        self._database = database
        self._redis = redis
        self._publish = publish
        self._occurrences = occurrences
        self._stored: set[str] = set()

    def publish_new(self, jobs: Sequence[RunningJob], now: datetime) -> Counter[str]:
        """Publish what is new about *jobs*.

        :returns: how many occurrences were published, by type.
        """
        queues = {job.queue for job in jobs if JOB_STALLED in job.wants}
        expired = {queue: expired_jobs(self._redis, queue) for queue in queues}
        found: dict[str, tuple[RunningJob, str]] = {}
        for job in jobs:
            types = [JOB_STARTED] if JOB_STARTED in job.wants else []
            if JOB_STALLED in job.wants and job.job_id in expired[job.queue]:
                types.append(JOB_STALLED)
            found.update((run_key(job.job_id, job.run, one), (job, one)) for one in types)
        if len(self._stored) > _MAX_REMEMBERED:
            self._stored.clear()
        new = found.keys() - self._stored
        if not new:
            return Counter()
        self._stored |= storage.known_keys(self._database, new)
        new -= self._stored
        records = read_jobs(self._redis, sorted({found[key][0].job_id for key in new}))
        items = []
        for key in sorted(new):
            job, event_type = found[key]
            record = records.get(job.job_id)
            if record is None or record.status != "started" or record.run != job.run:
                continue  # it ended meanwhile
            occurrence = self._occurrences.of_job(record, Outcome(type=event_type, run=job.run), now=now)
            if event_type == JOB_STARTED:
                occurrence = replace(occurrence, occurred_at=record.started_at or now)
            items.append(IngestItem(occurrence))
        published = publish_some(self._publish, items) if items else []
        return Counter(item.occurrence.type for item in published)
