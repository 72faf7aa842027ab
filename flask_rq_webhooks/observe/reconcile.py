"""Reconcile: find every ending no callback reported, and every run RQ changed its mind about.

Owns the order of one pass: settled watches first (:mod:`~flask_rq_webhooks.observe.settled_watches`), then
open and reserved ones (:mod:`~flask_rq_webhooks.observe.open_watches`), trees
(:mod:`~flask_rq_webhooks.observe.job_trees`), and last what RQ is to end itself
(:mod:`~flask_rq_webhooks.queue.abandoned_jobs`). Reads jobs by the ids it watches, many in one round trip;
never searches Redis.

A pass may be interrupted anywhere and repeated by anyone: events are unique by their run key, and a watch is
updated after its event is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..config import Settings
from ..queue.abandoned_jobs import end_abandoned
from ..queue.outbox import read_until, server_time
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.models import OPEN, RESERVED
from ..storage.watches import WatchProbe
from .conclusions import OutboxRead
from .job_trees import TreeReporter
from .occurrences import OccurrenceReader
from .open_watches import OpenWatches
from .pending_events import Publish, ReconcileReport
from .settled_watches import SettledWatches

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["PAGE", "ReconcileReport", "Reconciler"]

#: Watches per page: one statement and one round trip to Redis.
PAGE = 1000


class Reconciler:
    """Compare what was promised with what RQ committed, and report what nobody reported.

    One at a time: the caller holds the reconcile lease. Two at once would do no harm, only work twice.

    :param publish: stores occurrences as events and deliveries, each once.
    :param outbox_key: the stream of callbacks' reports; while one may speak of a job, its absence proves
        nothing.
    :param clock: aware UTC now.
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
        #: When the last whole pass ended, on Redis' clock and on ours.
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

    def _look_at_outbox(self) -> OutboxRead:
        """Return how far the callbacks' reports have been read.

        Asked before anything else: whatever was read by then is stored by the time SQL is asked.
        """
        asked_at = server_time(self._redis)
        until = read_until(self._redis, self._outbox_key)
        absent_since = server_time(self._redis)
        # A job missed in the pass before was absent at its end. A longer time ago another dispatcher may
        # have made a pass, so only now is certain.
        if self._last_pass is not None:
            ended_at, noted = self._last_pass
            if time.monotonic() - noted < 2 * self._settings.reconcile_interval:
                absent_since = ended_at
        complete_until = asked_at if until is None else min(until, asked_at)
        return OutboxRead(
            until=until or absent_since, absent_since=absent_since, complete_until=complete_until
        )

    def _waiting_pages(self) -> Iterator[list[WatchProbe]]:
        standing_want = storage.optional_types_of_standing(self._database)
        for status in (OPEN, RESERVED):
            after = ""
            while True:
                page = storage.probe_waiting(
                    self._database, status, after=after, limit=PAGE, standing_want=standing_want
                )
                if page:
                    yield page
                if len(page) < PAGE:
                    break
                after = page[-1].id
