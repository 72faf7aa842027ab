"""Watches that wait: open ones, whose job has not been told of, and reserved ones, whose job is yet to come.

Owns how a page of them is compared with RQ: cheaply first, closely where something is not simply waiting.
What the facts mean is decided in :mod:`~flask_rq_webhooks.observe.outcomes`. What is noted of a watch is
noted after its run was told, so that a pass may die anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from ..errors import OutboxEntryError
from ..protocol.events import JOB_BLOCKED, JOB_RETRYING, format_time
from ..queue.job_reader import JobRecord, JobResult, probe_jobs, read_jobs, read_results, read_statuses
from ..queue.outbox import age_of_oldest
from ..queue.outbox_entry import OutboxEntry, parse_entry
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.models import RESERVED
from ..storage.watches import Glance, Notes, WatchRow
from .occurrences import OccurrenceReader
from .outcomes import (
    CLOCK_SKEW,
    TYPE_OF_STATUS,
    Meaning,
    WatchFacts,
    counts,
    ending_of_superseded,
    is_blocked,
    meaning_of,
    occurrence_of_loss,
    occurrence_of_state,
)
from .pending_events import Findings, Publish, ReconcileReport

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

#: The oldest outbox entry may be this old before absence of a job proves nothing.
OUTBOX_LAG = timedelta(seconds=10)

_ENDED = frozenset(status.encode() for status in TYPE_OF_STATUS)


@dataclass(frozen=True, slots=True)
class _Watch:
    """One watch that is looked at closely.

    :param meaning: what is to be done about it.
    """

    row: WatchRow
    facts: WatchFacts
    meaning: Meaning


@dataclass(slots=True)
class _Page:
    """What comes of one page of them."""

    now: datetime
    findings: Findings
    notes: Notes = field(default_factory=Notes)


class WaitingWatches:
    """Compare watches that wait with what RQ committed.

    :param publish: stores occurrences as events and deliveries, each once.
    :param outbox_key: the stream of callbacks' words; while old ones wait there, absence proves nothing.
    :param clock: aware UTC now.
    """

    def __init__(
        self,
        database: Database,
        redis: Redis,
        *,
        publish: Publish,
        occurrences: OccurrenceReader,
        outbox_key: str | None,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._redis = redis
        self._publish = publish
        self._occurrences = occurrences
        self._outbox_key = outbox_key
        self._clock = clock
        self._without_dependency: set[str] = set()

    def outbox_lags(self) -> bool:
        """Say whether words of callbacks have waited long: their jobs may be gone by now."""
        if self._outbox_key is None:
            return False
        age_s = age_of_oldest(self._redis, self._outbox_key)
        return age_s is not None and age_s > OUTBOX_LAG.total_seconds()

    def pass_over(
        self, page: Sequence[Glance], report: ReconcileReport, now: datetime, *, outbox_lags: bool
    ) -> set[str]:
        """Look at a page as cheaply as can be, and closely at what is not simply waiting.

        :param outbox_lags: :meth:`outbox_lags`, asked before anything was read.
        :returns: the queues of jobs that RQ calls started.
        """
        report.looked_at += len(page)
        queues: set[str] = set()
        close: list[str] = []
        for glance, probe in zip(
            page, probe_jobs(self._redis, [glance.job_id for glance in page]), strict=True
        ):
            if probe is None or glance.remarkable or glance.missing_passes or glance.run is None:
                close.append(glance.id)
                continue
            status, run, queue = probe
            if status == b"started" and queue:
                queues.add(queue.decode("utf-8", "replace"))
            if (
                status in _ENDED
                or run != glance.run.encode()
                or (status == b"deferred" and glance.wants_blocked)
            ):
                close.append(glance.id)
        if close:
            rows = storage.load_watches(self._database, close)
            wants_blocked = {glance.id for glance in page if glance.wants_blocked}
            self._judge(rows, report, now, outbox_lags=outbox_lags, wants_blocked=wants_blocked)
        return queues

    def _judge(
        self,
        rows: Sequence[WatchRow],
        report: ReconcileReport,
        now: datetime,
        *,
        outbox_lags: bool,
        wants_blocked: set[str],
    ) -> None:
        records = read_jobs(self._redis, [row.job_id for row in rows])
        watches = []
        for row in rows:
            facts = _facts(row)
            meaning = meaning_of(facts, records.get(row.job_id), now=now, outbox_lags=outbox_lags)
            watches.append(_Watch(row, facts, meaning))
        results = read_results(self._redis, _results_wanted(watches, records))
        page = _Page(now, Findings(self._database))
        blocked: list[tuple[WatchRow, JobRecord]] = []
        # Those that know the run first: the others of the same job then tell of the same one.
        for watch in sorted(watches, key=lambda watch: watch.row.run is None):
            job = records.get(watch.row.job_id)
            if job is None:
                self._judge_absent(watch, page)
                continue
            self._judge_present(watch, job, results.get(job.job_id, []), page)
            if watch.meaning is Meaning.WAIT and job.status == "deferred" and watch.row.id in wants_blocked:
                blocked.append((watch.row, job))
        self._find_blocked(blocked, page)
        report.adopted += len(page.notes.adopted)
        report.told.update(page.findings.publish(self._publish))
        storage.write_notes(self._database, page.notes, now=now)

    def _judge_absent(self, watch: _Watch, page: _Page) -> None:
        row, facts, notes = watch.row, watch.facts, page.notes
        if watch.meaning is Meaning.WORD and facts.evidence is not None:
            page.findings.add(row, self._occurrences.of_word(facts.evidence))
            notes.spent.add(row.id)
        elif watch.meaning is Meaning.LOST:
            page.findings.add_loss(row, occurrence_of_loss(facts, now=page.now))
        elif watch.meaning is Meaning.MISSING:
            notes.missing.add(row.id)
        elif watch.meaning is Meaning.UNUSED:
            notes.closed.add(row.id)
        elif watch.meaning is Meaning.OVER:
            notes.over.add(row.id)

    def _judge_present(
        self, watch: _Watch, job: JobRecord, results: Sequence[JobResult], page: _Page
    ) -> None:
        row, notes, evidence = watch.row, page.notes, watch.facts.evidence
        if watch.meaning is Meaning.UNUSED:
            notes.closed.add(row.id)
            return
        if row.missing_passes:
            notes.present.add(row.id)
        if evidence is not None and evidence.run != job.run:
            earlier = ending_of_superseded(evidence.run, job, results)
            page.findings.add(
                row,
                self._occurrences.of_word(evidence)
                if earlier is None
                else self._occurrences.of_earlier_run(job, evidence.run, earlier, results),
            )
            notes.spent.add(row.id)
        began_again = self._tell_earlier_run(watch, job, results, page)
        if watch.meaning is Meaning.ENDED:
            ending = self._occurrences.of_job(job, results, evidence=evidence, now=page.now)
            page.findings.add(row, ending)
        counted = counts(watch.facts, job)
        if row.status == RESERVED and counted:
            notes.adopted.add(row.id)
        # A run that never was enqueued has no time that later runs could be compared with.
        if counted and job.run != row.run and job.enqueued_at is not None and not began_again:
            notes.seen[row.id] = job.run

    def _tell_earlier_run(
        self, watch: _Watch, job: JobRecord, results: Sequence[JobResult], page: _Page
    ) -> bool:
        """Tell how the run before the current one ended, where nobody did; say whether one ending was told.

        That the job began again is then noted by a later pass, when the earlier run is settled.
        """
        row = watch.row
        if watch.facts.told or row.run == job.run or job.enqueued_at is None:
            return False
        if row.run is None:
            return self._tell_unseen_run(row, job, results, page)
        earlier = ending_of_superseded(row.run, job, results)
        if earlier is not None:
            page.findings.add(row, self._occurrences.of_earlier_run(job, row.run, earlier, results))
            return True
        if job.retries_left is not None or any(result.type == "retried" for result in results):
            page.findings.add(row, occurrence_of_state(job, JOB_RETRYING, now=page.now, run=row.run))
        return False

    def _tell_unseen_run(
        self, row: WatchRow, job: JobRecord, results: Sequence[JobResult], page: _Page
    ) -> bool:
        """Tell of a run that ended and began again before any pass saw it, and that no callback told of.

        Its own identity is not known any more; the one it gets is that of a job never enqueued.
        """
        if not _has_begun_again(job):
            return False
        run = "created:" + format_time(job.created_at)
        earlier = ending_of_superseded(format_time(max(job.created_at, row.counts_from)), job, results)
        if earlier is None or self._clock() - earlier.at < OUTBOX_LAG or self.outbox_lags():
            return False
        ended = format_time(earlier.at + CLOCK_SKEW)
        if any(
            key.split("|")[1] < ended
            for _type, key, _at in storage.endings_of_job(self._database, job.job_id)
        ):
            return False
        page.findings.add(row, self._occurrences.of_earlier_run(job, run, earlier, results))
        return True

    def _find_blocked(self, waiting: Sequence[tuple[WatchRow, JobRecord]], page: _Page) -> None:
        if not waiting:
            self._without_dependency.clear()
            return
        statuses = read_statuses(self._redis, [id_ for _row, job in waiting for id_ in job.dependency_ids])
        absent_before, self._without_dependency = self._without_dependency, set()
        for row, job in waiting:
            if not is_blocked(job, statuses):
                continue
            if any(statuses[id_] is None for id_ in job.dependency_ids):
                # A dependency that is deleted as it ends is gone a moment before its dependents are queued.
                self._without_dependency.add(row.id)
                if row.id not in absent_before:
                    continue
            page.findings.add(row, occurrence_of_state(job, JOB_BLOCKED, now=page.now))


def _facts(row: WatchRow) -> WatchFacts:
    return WatchFacts(
        job_id=row.job_id,
        endpoint_id=row.endpoint_id,
        status=row.status,
        created_at=row.created_at,
        counts_from=row.counts_from,
        run=row.run,
        told=row.settled_at is not None,
        missing_passes=row.missing_passes,
        evidence=_parsed(row),
    )


def _parsed(row: WatchRow) -> OutboxEntry | None:
    if row.evidence is None:
        return None
    try:
        entry = parse_entry(row.evidence.encode())
    except OutboxEntryError as exc:
        logger.error("The evidence on watch %s cannot be read and is not used: %s", row.id, exc)
        return None
    return entry if entry.kind != "confirm" else None


def _results_wanted(watches: Sequence[_Watch], records: dict[str, JobRecord]) -> list[str]:
    wanted: dict[str, None] = {}
    for watch in watches:
        row, job, evidence = watch.row, records.get(watch.row.job_id), watch.facts.evidence
        if job is None:
            continue
        superseded = row.run != job.run if row.run is not None else _has_begun_again(job)
        if watch.meaning is Meaning.ENDED or superseded or (evidence and evidence.run != job.run):
            wanted[row.job_id] = None
    return list(wanted)


def _has_begun_again(job: JobRecord) -> bool:
    """Say whether the current run is probably not the job's first."""
    return job.enqueued_at is not None and job.enqueued_at - job.created_at > timedelta(seconds=1)
