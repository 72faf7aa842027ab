"""Settled watches: their runs were reported, and RQ may run the jobs again or change its mind.

Owns which settled watches are looked at, and how often. While RQ keeps a job, every pass looks whether it is
in another run. Jobs that RQ has forgotten come back only under the same id, such as those of a cron; a sweep
over them finds these within minutes. Pages come from SQL, so memory does not grow with the number of runs.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from ..protocol.events import JOB_LOST
from ..queue.job_reader import any_exists, probe_jobs
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.watches import SettledProbe, WatchUpdates
from .conclusions import OutboxRead
from .open_watches import OpenWatches
from .outcomes import CORRECTIONS_FOR, TYPE_OF_STATUS
from .pending_events import ReconcileReport

if TYPE_CHECKING:
    from redis import Redis

#: A settled watch counts as kept for at least this long: a lost job may come back.
_FRESH = timedelta(minutes=10)
#: Watches whose jobs RQ keeps, looked at in one pass. Where there are more, they take turns.
KEPT_AT_ONCE = 100_000
#: Watches whose jobs RQ has forgotten, looked at in one pass. A million take twelve passes; RQ keeps the
#: result of a job that ran again for 500 s.
FORGOTTEN_AT_ONCE = 100_000


class SettledWatches:
    """Find the settled watches whose jobs RQ says something new of."""

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
        """Look at the kept ones, then at the next part of the forgotten ones.

        :param page: watches a statement and a round trip.
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
