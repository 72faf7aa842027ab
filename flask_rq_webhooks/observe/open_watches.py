"""Open and reserved watches: jobs whose endings are not reported yet, and ids whose jobs do not exist yet.

Compares a page of watches with RQ: with a cheap probe first, closely if a job is not simply waiting. Also
publishes the events of a running job to endpoints that subscribe to them: ``job.started`` and ``job.stalled``
once, ``job.progress`` whenever it has changed.
:mod:`~flask_rq_webhooks.observe.outcomes` decides what the facts mean. Updates of a watch are written after
its events are stored, so a pass may be killed at any point.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from ..errors import OutboxEntryError, StorageUnavailableError
from ..protocol.events import (
    JOB_BLOCKED,
    JOB_PROGRESS,
    JOB_STALLED,
    JOB_STARTED,
    RUNNING_TYPES,
    Occurrence,
    run_key,
)
from ..queue.abandoned_jobs import expired_jobs
from ..queue.job_reader import JobRecord, probe_jobs, read_jobs, read_metas, read_statuses
from ..queue.outbox_entry import OutboxEntry, parse_entry
from ..queue.safe_pickle import progress_in
from ..storage import reported_runs
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.events import IngestItem
from ..storage.models import RESERVED
from ..storage.reported_runs import Reported
from ..storage.watches import WatchProbe, WatchRow, WatchUpdates
from .conclusions import (
    OutboxRead,
    WatchAction,
    WatchFacts,
    conclude,
    counts,
    is_blocked,
    lacks_report,
    later_run,
    outcome_of_loss,
    view_may_enqueue,
)
from .outcomes import TYPE_OF_STATUS, Outcome
from .publisher import (
    AT_ONCE,
    OccurrenceReader,
    PendingEvents,
    Publish,
    ReconcileReport,
    occurrence_of_loss,
    occurrence_of_report,
    publish_some,
)

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

_ENDED = frozenset(status.encode() for status in TYPE_OF_STATUS)


class OpenWatches:
    """Compare watches with what RQ committed.

    :param publish: stores occurrences as events and deliveries, each once.
    """

    def __init__(
        self, database: Database, redis: Redis, *, publish: Publish, occurrences: OccurrenceReader
    ) -> None:
        self._database = database
        self._redis = redis
        self._publish = publish
        self._occurrences = occurrences
        self._settings = occurrences.settings
        self._running = RunningJobs(database, redis, publish=publish, occurrences=occurrences)
        self._without_dependency: set[str] = set()

    def pass_over(
        self, page: Sequence[WatchProbe], report: ReconcileReport, now: datetime, *, outbox: OutboxRead
    ) -> set[str]:
        """Probe a page as cheaply as possible, and look closely at the watches that are not simply waiting.

        :returns: the queues of the jobs whose RQ status is ``started``.
        """
        report.looked_at += len(page)
        queues: set[str] = set()
        close: list[str] = []
        jobs = probe_jobs(self._redis, [watch.job_id for watch in page])
        running: list[RunningJob] = []
        for watch, job in zip(page, jobs, strict=True):
            if job is not None and job[0] == b"started" and not watch.wants.isdisjoint(RUNNING_TYPES):
                running.append(_running(watch, job))
            if job is None or watch.needs_full_read or watch.missing_passes or watch.run is None:
                close.append(watch.id)
                continue
            status, run, queue = job
            if status == b"started" and queue:
                queues.add(queue.decode("utf-8", "replace"))
            if (
                status in _ENDED
                or run != watch.run.encode()
                or (status == b"deferred" and JOB_BLOCKED in watch.wants)
            ):
                close.append(watch.id)
        wants_blocked = {watch.id for watch in page if JOB_BLOCKED in watch.wants}
        self.look_closely(close, report, now, outbox=outbox, wants_blocked=wants_blocked)
        if running:
            report.reported.update(self._running.publish_new(running, now))
            report.reported.update(self._running.publish_progress(running, now))
        return queues

    def publish_progress(self, page: Sequence[WatchProbe], now: datetime) -> Counter[str]:
        """Publish only the progress of the running jobs in *page*."""
        jobs = probe_jobs(self._redis, [watch.job_id for watch in page])
        running = [
            _running(watch, job)
            for watch, job in zip(page, jobs, strict=True)
            if job is not None and job[0] == b"started"
        ]
        return self._running.publish_progress(running, now)

    def look_closely(
        self,
        watch_ids: Sequence[str],
        report: ReconcileReport,
        now: datetime,
        *,
        outbox: OutboxRead,
        wants_blocked: set[str] | None = None,
    ) -> None:
        """Judge these watches by everything RQ and SQL know about their jobs, and publish what is new.

        :param wants_blocked: ids of the watches whose endpoints subscribe to ``job.blocked``.
        """
        rows = storage.load_watches(self._database, watch_ids)
        if not rows:
            return
        job_ids = list({row.job_id for row in rows})
        jobs = read_jobs(self._redis, job_ids, results=True)
        # Read after Redis, so that endings ingest stores in the meantime are not taken for unreported.
        reported = reported_runs.reported_endings(self._database, job_ids)
        events, updates = PendingEvents(self._database), WatchUpdates()
        blocked: list[tuple[WatchRow, JobRecord]] = []
        # Watches that know the run come first: the others of the same job then report the same run.
        for row in sorted(rows, key=lambda row: row.run is None):
            if row.job_id in jobs.unreadable:
                continue  # a broken hash proves nothing
            job = jobs.get(row.job_id)
            try:
                self._judge(
                    row, job, reported.get(row.job_id, ()), events, updates, report, now=now, outbox=outbox
                )
            except (RedisError, StorageUnavailableError):
                raise
            except Exception:
                logger.exception("Job %r cannot be judged; it is left out of this pass.", row.job_id)
                continue
            if job is not None and job.status == "deferred" and row.id in (wants_blocked or ()):
                blocked.append((row, job))
        self._find_blocked(blocked, events, now)
        report.adopted += len(updates.adopted)
        report.reported.update(events.publish(self._publish))
        storage.write_updates(self._database, updates, now=now)

    def _judge(
        self,
        row: WatchRow,
        job: JobRecord | None,
        reported: Sequence[Reported],
        events: PendingEvents,
        updates: WatchUpdates,
        report: ReconcileReport,
        *,
        now: datetime,
        outbox: OutboxRead,
    ) -> None:
        facts = _facts(row)
        conclusion = conclude(facts, job, reported, now=now, outbox=outbox)
        for outcome in conclusion.outcomes:
            if job is not None and row.endpoint_id in job.tokens and facts.report is None:
                report.silent_successes += lacks_report(outcome, outbox)
            events.add(row, self._occurrence(job, outcome, facts.report, now))
        if conclusion.uses_report:
            updates.decided.add(row.id)
        if conclusion.action is WatchAction.MISSING:
            updates.missing.add(row.id)
        elif conclusion.action is WatchAction.LOST:
            events.add_loss(row, occurrence_of_loss(row.job_id, outcome_of_loss(facts), now=now))
        elif conclusion.action is WatchAction.UNUSED:
            updates.closed.add(row.id)
        if job is None:
            if conclusion.action is WatchAction.CAUGHT_UP and (later := later_run(row.run, reported)):
                updates.caught_up[row.id] = (row.run, later.run, later.type)
            return
        if row.missing_passes:
            updates.present.add(row.id)
        if row.scope == "tree" and view_may_enqueue(row.status, row.created_at, now):
            return
        if row.status == RESERVED and counts(facts, job):
            updates.adopted.add(row.id)
        if conclusion.action is WatchAction.BEGAN:
            updates.began[row.id] = (row.run, job.run)
        elif conclusion.action is WatchAction.CAUGHT_UP:
            said = next(ending.type for ending in reported if ending.run == job.run)
            updates.caught_up[row.id] = (row.run, job.run, said)

    def _occurrence(
        self, job: JobRecord | None, outcome: Outcome, report: OutboxEntry | None, now: datetime
    ) -> Occurrence:
        of_this_run = report if report is not None and outcome.supersedes is None else None
        if of_this_run is not None and of_this_run.run != outcome.run:
            of_this_run = None
        if job is None or not outcome.committed:
            assert report is not None  # noqa: S101  (who else would say so)
            return occurrence_of_report(report, outcome, self._settings)
        return self._occurrences.of_job(job, outcome, report=of_this_run, now=now)

    def _find_blocked(
        self, waiting: Sequence[tuple[WatchRow, JobRecord]], events: PendingEvents, now: datetime
    ) -> None:
        if not waiting:
            self._without_dependency.clear()
            return
        statuses = read_statuses(self._redis, [id_ for _row, job in waiting for id_ in job.dependency_ids])
        absent_before, self._without_dependency = self._without_dependency, set()
        for row, job in waiting:
            if not is_blocked(job, statuses):
                continue
            if any(statuses[id_] is None for id_ in job.dependency_ids):
                # A dependency that is deleted when it ends is gone just before its dependents are queued.
                self._without_dependency.add(row.id)
                if row.id not in absent_before:
                    continue
            outcome = Outcome(type=JOB_BLOCKED, run=job.run)
            events.add(row, self._occurrences.of_job(job, outcome, now=now))


def _running(watch: WatchProbe, job: tuple[bytes, bytes, bytes]) -> RunningJob:
    run, queue = (one.decode("utf-8", "replace") for one in job[1:])
    return RunningJob(watch.job_id, run, queue, watch.wants)


def _facts(row: WatchRow) -> WatchFacts:
    return WatchFacts(
        job_id=row.job_id,
        endpoint_id=row.endpoint_id,
        status=row.status,
        created_at=row.created_at,
        counts_from=row.counts_from,
        run=row.run,
        settled=row.settled_at is not None,
        missing_passes=row.missing_passes,
        report=_parked_report(row),
        of_tree=row.scope == "tree",
    )


def _parked_report(row: WatchRow) -> OutboxEntry | None:
    if row.evidence is None:
        return None
    try:
        entry = parse_entry(row.evidence.encode())
    except OutboxEntryError as exc:
        logger.error("The report on watch %s cannot be read and is not used: %s", row.id, exc)
        return None
    return entry if entry.kind != "confirm" else None


# -- running jobs -----------------------------------------------------------------------------------------

#: How many events are remembered as stored, so that SQL is not asked for them in every pass.
_MAX_REMEMBERED = 200_000


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A watched job whose RQ status is ``started``.

    :param wants: optional event types that the watch's endpoint or a standing endpoint subscribes to.
    """

    job_id: str
    run: str
    queue: str
    wants: frozenset[str]


@dataclass(slots=True)
class _Progress:
    """What was last seen of a job's progress.

    :param meta: hash of the last meta that was examined.
    :param value: the progress last stored.
    :param at: when it was stored.
    """

    meta: int | None = None
    value: Any = None
    at: datetime | None = None


class RunningJobs:
    """Publish what is new about running jobs."""

    def __init__(
        self, database: Database, redis: Redis, *, publish: Publish, occurrences: OccurrenceReader
    ) -> None:
        self._database = database
        self._redis = redis
        self._publish = publish
        self._occurrences = occurrences
        self._stored: set[str] = set()
        self._progress: dict[str, _Progress] = {}
        self._looked_at: datetime | None = None

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
        self._stored |= reported_runs.known_keys(self._database, new)
        new -= self._stored
        records = read_jobs(self._redis, sorted({found[key][0].job_id for key in new}))
        items = []
        for key in sorted(new):
            job, event_type = found[key]
            record = records.get(job.job_id)
            if record is None or record.status != "started" or record.run != job.run:
                continue  # it has ended in the meantime
            occurrence = self._occurrences.of_job(record, Outcome(type=event_type, run=job.run), now=now)
            if event_type == JOB_STARTED:
                occurrence = replace(occurrence, occurred_at=record.started_at or now)
            items.append(IngestItem(occurrence))
        published = publish_some(self._publish, items) if items else []
        return Counter(item.occurrence.type for item in published)

    def publish_progress(self, jobs: Sequence[RunningJob], now: datetime) -> Counter[str]:
        """Publish the progress of those *jobs* whose meta differs from what was stored last.

        At most one event per job in each ``PROGRESS_INTERVAL``; changes in between wait for the next pass.

        :returns: how many occurrences were published, by type.
        """
        wanted = {job.job_id: job for job in jobs if JOB_PROGRESS in job.wants}
        if not wanted:
            return Counter()
        settings = self._occurrences.settings
        interval_s = settings.progress_interval or settings.reconcile_interval
        if len(self._progress) > _MAX_REMEMBERED or (
            self._looked_at is not None and (now - self._looked_at).total_seconds() > 2 * interval_s
        ):
            self._progress.clear()  # another dispatcher may have continued in the meantime
        self._looked_at = now
        # Passes begin slightly earlier or later than the interval says.
        not_since = now - timedelta(seconds=interval_s - min(0.5, 0.1 * interval_s))
        changed: dict[str, tuple[int, Any]] = {}
        for job_id, meta in zip(wanted, read_metas(self._redis, list(wanted)), strict=True):
            seen = self._progress.get(job_id)
            if seen is not None and (
                seen.meta == hash(meta) or (seen.at is not None and seen.at > not_since)
            ):
                continue
            changed[job_id] = (hash(meta), progress_in(meta, settings.progress_meta_key))
        unknown = [job_id for job_id in changed if job_id not in self._progress]
        stored = reported_runs.last_progress(self._database, unknown) if unknown else {}
        self._progress.update((job_id, _Progress(None, *stored.get(job_id, ()))) for job_id in unknown)
        due = []
        for job_id, (meta_hash, value) in changed.items():
            seen = self._progress[job_id]
            if value is None or value == seen.value:
                seen.meta = meta_hash
            elif seen.at is None or seen.at <= not_since:
                due.append(job_id)
        items = []
        for job_id, record in read_jobs(self._redis, due).items():
            if record.status == "started" and record.run == wanted[job_id].run:
                occurrence = self._occurrences.of_job(
                    record, Outcome(type=JOB_PROGRESS, run=record.run), now=now
                )
                items += [IngestItem(occurrence)] if occurrence.progress is not None else []
        published: list[IngestItem] = []
        for start in range(0, len(items), AT_ONCE):
            published += publish_some(self._publish, items[start : start + AT_ONCE])
        for item in published:
            seen = self._progress[item.occurrence.job_id or ""]
            seen.value, seen.at = item.occurrence.progress, now
        return Counter(item.occurrence.type for item in published)
