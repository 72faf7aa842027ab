"""Reconcile: find every ending that no callback reported, and every run whose ending RQ has changed.

Defines the order of one pass: settled watches first, then open and reserved ones
(:mod:`~flask_rq_webhooks.observe.open_watches`), trees (:mod:`~flask_rq_webhooks.observe.job_trees`), and
last the jobs that RQ itself is to end (:mod:`~flask_rq_webhooks.queue.abandoned_jobs`). Reads jobs by the ids
it watches, many in one round trip; never searches Redis.

While RQ keeps the job of a settled watch, every pass checks whether it is in another run. Jobs that RQ has
forgotten come back only if their id is used again, for example by a cron; a sweep finds them within minutes.
Pages come from SQL, so memory does not grow with the number of runs.

A pass may be interrupted anywhere and repeated by any dispatcher: events are unique by their run key, and a
watch is updated after its event is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from ..config import Settings
from ..protocol.events import JOB_LOST, JOB_PROGRESS
from ..queue.abandoned_jobs import end_abandoned
from ..queue.job_reader import any_exists, probe_jobs
from ..queue.outbox import read_until, server_time
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.models import OPEN, RESERVED
from ..storage.watches import SettledProbe, WatchProbe, WatchUpdates
from .conclusions import OutboxRead
from .job_trees import TreeReporter
from .open_watches import OpenWatches
from .outcomes import CORRECTIONS_FOR, TYPE_OF_STATUS
from .publisher import OccurrenceReader, Publish, ReconcileReport

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["PAGE", "ReconcileReport", "Reconciler"]

#: Watches per page; a page takes one SQL statement and one round trip to Redis.
PAGE = 1000


class Reconciler:
    """Compare the watches with what RQ committed, and report the endings that nobody reported.

    One at a time: the caller holds the reconcile lease. Two at once would be harmless, but do the work twice.

    :param publish: stores occurrences as events and deliveries, each once.
    :param outbox_key: the stream of the callbacks' reports; while it may hold a report about a job, the job's
        absence proves nothing.
    :param clock: returns the current time, aware and in UTC.
    """

    def __init__(
        self,
        database: Database,
        redis: Redis,
        *,
        publish: Publish,
        settings: Settings,
        outbox_key: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._redis = redis
        self._settings = settings
        self._outbox_key = outbox_key
        self._clock = clock
        occurrences = OccurrenceReader(redis, settings)
        self._open = OpenWatches(database, redis, publish=publish, occurrences=occurrences)
        self._settled = SettledWatches(database, redis, self._open)
        self.trees = TreeReporter(database, redis, publish=publish, settings=settings, clock=clock)
        #: When the last complete pass ended, by Redis' clock and by our monotonic clock.
        self._last_pass: tuple[datetime, float] | None = None

    def run_once(self, should_stop: Callable[[], bool] = lambda: False) -> ReconcileReport:
        """Make one pass over every open, reserved and kept settled watch, and every open tree.

        :param should_stop: asked between pages.
        :raises redis.RedisError: when Redis cannot be asked; nothing is lost, call again.
        :raises StorageUnavailableError: when SQL cannot be used; nothing is lost, call again.
        """
        report = ReconcileReport()
        now = self._clock()
        outbox = self._look_at_outbox()
        # First, so that a new run of a settled job is judged in this very pass.
        self._settled.look_again(report, now, outbox=outbox, page=PAGE, should_stop=should_stop)
        queues: set[str] = set()
        for page in self._waiting_pages():
            if should_stop():
                return report
            queues |= self._open.pass_over(page, report, now, outbox=outbox)
        report.reported.update(self.trees.run_once(should_stop))
        if self._settings.clean_abandoned:
            report.cleaned_queues = end_abandoned(self._redis, queues)
        self._last_pass = (server_time(self._redis), time.monotonic())
        return report

    def publish_progress(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Publish only the progress of running jobs; meant to be called at short intervals."""
        now = self._clock()
        for page in self._waiting_pages((OPEN,), wanting=JOB_PROGRESS):
            if should_stop():
                return
            self._open.publish_progress(page, now)

    def _look_at_outbox(self) -> OutboxRead:
        """Return how far the callbacks' reports have been read.

        Called before anything else: whatever was read by then is stored by the time SQL is queried.
        """
        asked_at = server_time(self._redis)
        until = read_until(self._redis, self._outbox_key)
        absent_since = server_time(self._redis)
        # A job missing in the previous pass was absent when that pass ended. If our last pass is too old,
        # another dispatcher may have made one since, so only the present time is certain.
        if self._last_pass is not None:
            ended_at, noted = self._last_pass
            if time.monotonic() - noted < 2 * self._settings.reconcile_interval:
                absent_since = ended_at
        complete_until = asked_at if until is None else min(until, asked_at)
        return OutboxRead(
            until=until or absent_since, absent_since=absent_since, complete_until=complete_until
        )

    def _waiting_pages(
        self, statuses: Sequence[str] = (OPEN, RESERVED), *, wanting: str | None = None
    ) -> Iterator[list[WatchProbe]]:
        standing_want = storage.optional_types_of_standing(self._database)
        for status in statuses:
            after = ""
            while True:
                page = storage.probe_waiting(
                    self._database,
                    status,
                    after=after,
                    limit=PAGE,
                    standing_want=standing_want,
                    wanting=wanting,
                )
                if page:
                    yield page
                if len(page) < PAGE:
                    break
                after = page[-1].id


# -- settled watches --------------------------------------------------------------------------------------

#: A settled watch counts as kept for at least this long: a lost job may come back.
_FRESH = timedelta(minutes=10)
#: Watches whose jobs RQ keeps that are examined in one pass. If there are more, they take turns.
KEPT_AT_ONCE = 100_000
#: Watches whose jobs RQ has forgotten that are examined in one pass. A million take twelve passes; RQ keeps
#: the result of a job that ran again for 500 s.
FORGOTTEN_AT_ONCE = 100_000


class SettledWatches:
    """Find the settled watches whose jobs have changed in RQ."""

    def __init__(self, database: Database, redis: Redis, watches: OpenWatches) -> None:
        self._database = database
        self._redis = redis
        self._watches = watches
        self._after = {True: "", False: ""}

    def look_again(
        self,
        report: ReconcileReport,
        now: datetime,
        *,
        outbox: OutboxRead,
        page: int,
        should_stop: Callable[[], bool],
    ) -> None:
        """Examine the kept watches, then the next part of the forgotten ones.

        :param page: watches per SQL statement and round trip.
        :param should_stop: asked between pages.
        """
        for kept, at_once in ((True, KEPT_AT_ONCE), (False, FORGOTTEN_AT_ONCE)):
            for _ in range(max(1, at_once // page)):
                if should_stop():
                    return
                after = self._after[kept]
                probes = storage.probe_settled(self._database, kept=kept, after=after, limit=page)
                if kept:
                    self._look_at_kept(probes, report, now, outbox)
                else:
                    self._look_at_forgotten(probes, report, now, outbox)
                if len(probes) < page:
                    self._after[kept] = ""
                    break
                self._after[kept] = probes[-1].id

    def _look_at_kept(
        self, probes: list[SettledProbe], report: ReconcileReport, now: datetime, outbox: OutboxRead
    ) -> None:
        report.looked_at += len(probes)
        updates, close = WatchUpdates(), []
        jobs = probe_jobs(self._redis, [watch.job_id for watch in probes])
        for watch, job in zip(probes, jobs, strict=True):
            age = now - watch.settled_at
            if job is None:
                may_be_back = age < (CORRECTIONS_FOR if watch.outcome == JOB_LOST else _FRESH)
                if not may_be_back:
                    updates.forgotten.add(watch.id)
                continue
            status, run, _queue = job
            if run and run != watch.run.encode():
                close.append(watch.id)
            elif watch.outcome is not None and age < CORRECTIONS_FOR:
                committed = TYPE_OF_STATUS.get(status.decode("utf-8", "replace"))
                if committed is not None and committed != watch.outcome:
                    close.append(watch.id)
        self._watches.look_closely(close, report, now, outbox=outbox)
        storage.write_updates(self._database, updates, now=now)

    def _look_at_forgotten(
        self, probes: list[SettledProbe], report: ReconcileReport, now: datetime, outbox: OutboxRead
    ) -> None:
        if not probes or not any_exists(self._redis, [watch.job_id for watch in probes]):
            return
        jobs = probe_jobs(self._redis, [watch.job_id for watch in probes])
        back = [watch for watch, job in zip(probes, jobs, strict=True) if job is not None]
        storage.write_updates(self._database, WatchUpdates(kept={watch.id for watch in back}), now=now)
        self._look_at_kept(back, report, now, outbox)
