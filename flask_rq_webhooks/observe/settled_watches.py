"""Watches that were settled: their runs were told, and for a day RQ may change its verdict or run them again.

Owns which told runs are looked at once more, and when. What is a correction is decided in
:mod:`~flask_rq_webhooks.observe.outcomes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from ..protocol.events import JOB_LOST, JOB_SUCCESS, format_time
from ..queue.job_reader import probe_jobs, read_jobs, read_results
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.watches import Notes, SettledRow
from .occurrences import OccurrenceReader
from .outcomes import TYPE_OF_STATUS, is_correction
from .pending_events import Findings, Publish, ReconcileReport

if TYPE_CHECKING:
    from redis import Redis

#: How long RQ may change its verdict on a told run.
SECOND_LOOKS_FOR = timedelta(hours=24)
#: A settled run is looked at in every pass for so long; then successes ever more rarely.
_FRESH = timedelta(minutes=10)


@dataclass(slots=True)
class _Settled:
    """A told run that is looked at again."""

    row: SettledRow
    event_id: str
    type: str
    told_at: datetime
    corrected: bool
    next_look: datetime
    seen: bool = False


class SettledWatches:
    """Compare runs that were told with what RQ says of them now.

    Keeps in memory the runs of the last day whose jobs RQ still has, and of the last minutes, so that a pass
    reads of SQL only those that are new.

    :param publish: stores occurrences as events and deliveries, each once.
    """

    def __init__(
        self, database: Database, redis: Redis, *, publish: Publish, occurrences: OccurrenceReader
    ) -> None:
        self._database = database
        self._redis = redis
        self._publish = publish
        self._occurrences = occurrences
        self._settled: dict[str, _Settled] = {}
        self._loaded_until: datetime | None = None

    def look_again(
        self, report: ReconcileReport, now: datetime, *, page: int, should_stop: Callable[[], bool]
    ) -> None:
        """Look at every told run whose time has come.

        :param page: watches a statement and a round trip.
        :param should_stop: asked between pages.
        """
        due = [settled for settled in self._settled.values() if settled.next_look <= now]
        # Page by page, because there may be very many: RQ has forgotten most jobs of a day, and so may we.
        for new in self._load(now, page):
            if should_stop():
                return
            self._look_at(new, report, now)
        for start in range(0, len(due), page):
            if should_stop():
                return
            some = due[start : start + page]
            # One that began anew was loaded in its place.
            self._look_at([one for one in some if self._settled.get(one.row.id) is one], report, now)

    def _load(self, now: datetime, limit: int) -> Iterator[list[_Settled]]:
        """Read what was settled since the last pass, and give it in pages."""
        since = now - SECOND_LOOKS_FOR
        if self._loaded_until is not None:
            since = max(since, self._loaded_until - timedelta(minutes=1))
        after = ""
        while True:
            page = storage.load_settled(self._database, since=since, after=after, limit=limit)
            new = [
                row
                for row in page
                if (known := self._settled.get(row.id)) is None or known.row.run != row.run
            ]
            told = storage.told_endings(self._database, [(row.job_id, row.run) for row in new])
            loaded = {
                row.id: _Settled(
                    row,
                    event_id=events[0].event_id,
                    type=events[0].type,
                    told_at=events[0].created_at,
                    corrected=len(events) > 1,
                    next_look=now,
                )
                for row in new
                if (events := told.get((row.job_id, row.run)))
            }
            self._settled |= loaded
            if loaded:
                yield list(loaded.values())
            if len(page) < limit:
                break
            after = page[-1].id
        self._loaded_until = now

    def _look_at(self, due: Sequence[_Settled], report: ReconcileReport, now: datetime) -> None:
        report.looked_at += len(due)
        changed: list[_Settled] = []
        probes = probe_jobs(self._redis, [settled.row.job_id for settled in due])
        for settled, probe in zip(due, probes, strict=True):
            age = now - settled.row.settled_at
            fresh = age < _FRESH
            if probe is None:
                # Only what was called lost may come back.
                if age > SECOND_LOOKS_FOR or (not fresh and settled.type != JOB_LOST):
                    del self._settled[settled.row.id]
                continue
            if age > SECOND_LOOKS_FOR:
                del self._settled[settled.row.id]
                continue
            if not fresh and settled.type == JOB_SUCCESS:
                settled.next_look = now + age / 4
            status, run, _queue = probe
            same = run.decode("ascii", "replace") == settled.row.run
            if (not same and run) or not settled.seen or TYPE_OF_STATUS.get(status.decode()) != settled.type:
                changed.append(settled)
        if changed:
            self._judge_again(changed, report, now)

    def _judge_again(self, changed: Sequence[_Settled], report: ReconcileReport, now: datetime) -> None:
        records = read_jobs(self._redis, [settled.row.job_id for settled in changed])
        notes, findings = Notes(), Findings(self._database)
        corrected: list[_Settled] = []
        for settled in changed:
            job, row = records.get(settled.row.job_id), settled.row
            if job is None:
                continue
            settled.seen = True
            if is_correction(settled.type, job, told_run=row.run, told_at=settled.told_at):
                if not settled.corrected:
                    corrected.append(settled)
            elif job.run != row.run and job.enqueued_at is not None and _is_newer(job.run, settled):
                notes.waiting_again[row.id] = job.run
                del self._settled[row.id]
            elif job.repeats and job.run == row.run:
                notes.repeating.add(row.id)
                del self._settled[row.id]
        results = read_results(self._redis, list({settled.row.job_id for settled in corrected}))
        for settled in corrected:
            job = records[settled.row.job_id]
            correction = self._occurrences.of_job(
                job,
                results.get(job.job_id, []),
                now=now,
                supersedes=settled.event_id,
                run=settled.row.run,
            )
            findings.add(settled.row, correction)
        report.told.update(findings.publish(self._publish))
        for settled in corrected:
            settled.corrected = True
        storage.write_notes(self._database, notes, now=now)


def _is_newer(run: str, settled: _Settled) -> bool:
    """Say whether *run* began after the one that was told."""
    told_run = settled.row.run
    if told_run.startswith("created:"):
        return settled.type != JOB_LOST or run > format_time(settled.told_at)
    return run > told_run
