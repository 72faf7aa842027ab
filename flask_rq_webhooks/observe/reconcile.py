"""Reconcile: find every ending no callback reported, and every verdict RQ changed afterwards.

Owns the order of one pass: told runs first (:mod:`~flask_rq_webhooks.observe.settled_watches`), then all
that waits (:mod:`~flask_rq_webhooks.observe.open_watches`), trees
(:mod:`~flask_rq_webhooks.observe.job_trees`), and last what RQ is to end itself
(:mod:`~flask_rq_webhooks.queue.abandoned_jobs`). What the facts mean is decided in
:mod:`~flask_rq_webhooks.observe.outcomes`; statements are in :mod:`~flask_rq_webhooks.storage.watches`;
telling is left to a function it is given. Reads jobs by the ids it watches, many in one round trip; never
searches Redis.

A pass may be interrupted anywhere and repeated by anyone: telling is idempotent by the run key, and what is
noted of a watch is noted after its run was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..config import Settings
from ..protocol.events import JOB_BLOCKED
from ..queue.abandoned_jobs import end_abandoned
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.models import OPEN, RESERVED
from ..storage.watches import Glance
from .job_trees import TreeReporter
from .occurrences import OccurrenceReader
from .open_watches import WaitingWatches
from .pending_events import Publish, ReconcileReport
from .settled_watches import SettledWatches

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["PAGE", "ReconcileReport", "Reconciler"]

#: Watches per page: one statement and one round trip to Redis.
PAGE = 1000


class Reconciler:
    """Compare what was promised with what RQ committed, and tell what nobody told.

    One at a time: the caller holds the reconcile lease. Two at once would do no harm, only work twice.

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
        settings: Settings,
        outbox_key: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._redis = redis
        self._clean_abandoned = settings.clean_abandoned
        self._clock = clock
        occurrences = OccurrenceReader(redis, settings)
        self._settled = SettledWatches(database, redis, publish=publish, occurrences=occurrences)
        self._waiting = WaitingWatches(
            database, redis, publish=publish, occurrences=occurrences, outbox_key=outbox_key, clock=clock
        )
        self.trees = TreeReporter(database, redis, publish=publish, settings=settings, clock=clock)

    def run_once(self, should_stop: Callable[[], bool] = lambda: False) -> ReconcileReport:
        """Make one pass over every open, reserved and recently settled watch, and every open tree.

        :param should_stop: asked between pages.
        :raises redis.RedisError: when Redis cannot be asked; nothing is lost, call again.
        :raises StorageUnavailableError: when SQL cannot be used; nothing is lost, call again.
        """
        report = ReconcileReport()
        now = self._clock()
        # First, so that a new run of a told job is judged in this very pass.
        self._settled.look_again(report, now, page=PAGE, should_stop=should_stop)
        outbox_lags = self._waiting.outbox_lags()
        queues: set[str] = set()
        for page in self._waiting_pages():
            if should_stop():
                return report
            queues |= self._waiting.pass_over(page, report, now, outbox_lags=outbox_lags)
        report.told.update(self.trees.run_once(should_stop))
        if self._clean_abandoned:
            report.cleaned_queues = end_abandoned(self._redis, queues)
        return report

    def _waiting_pages(self) -> Iterator[list[Glance]]:
        all_want_blocked = storage.any_standing_wants(self._database, JOB_BLOCKED)
        for status in (OPEN, RESERVED):
            after = ""
            while True:
                page = storage.glance_at_waiting(
                    self._database, status, after=after, limit=PAGE, all_want_blocked=all_want_blocked
                )
                if page:
                    yield page
                if len(page) < PAGE:
                    break
                after = page[-1].id
