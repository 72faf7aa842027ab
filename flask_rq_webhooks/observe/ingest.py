"""From the outbox stream to events in SQL: read, confirm against RQ, store, and only then acknowledge.

Owns the order of those steps. What RQ committed is read in :mod:`~flask_rq_webhooks.queue.job_reader`,
what it means is decided in :mod:`~flask_rq_webhooks.observe.verdicts`, and SQL is in
:mod:`~flask_rq_webhooks.storage.events`. Knows nothing of sending.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._steps import reached
from ..queue.job_reader import JobResult, Jobs, read_endings, read_results
from ..storage.endpoints import confirm
from ..storage.events import IngestItem
from ..storage.settling import park_evidence
from ..storage.sql_errors import is_about_a_row
from .publisher import Publisher
from .verdicts import Open, Verdict, judge, occurrence_of

if TYPE_CHECKING:
    from ..queue.outbox import Entry
    from ..queue.outbox_entry import OutboxEntry
    from ..state import State

logger = logging.getLogger(__name__)

#: Seconds an entry may wait for RQ's commit before it is handed to reconcile.
PATIENCE_S = 5.0
#: The first and the longest pause between two looks at an uncommitted job, seconds.
FIRST_LOOK_S, LONGEST_LOOK_S = 0.003, 0.1
#: Entries held in memory at most; the rest stays in the stream.
MAX_WAITING = 5000


@dataclass(slots=True)
class _Waiting:
    """An entry that was read and is still in the stream."""

    id: str
    entry: OutboxEntry
    since: float
    look_at: float
    pause_s: float = FIRST_LOOK_S


class Ingest:
    """Turn outbox entries into events, in one thread.

    An entry leaves the stream only after its event is committed in SQL. Whatever fails in between leaves it
    there, and doing it again is a no-op (the run key is unique).

    :param state: the app's state.
    :param consumer: name of this reader within the stream's group.
    :param publisher: stores what was confirmed.
    :param clock: monotonic seconds.
    """

    def __init__(
        self,
        state: State,
        *,
        consumer: str,
        publisher: Publisher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._consumer = consumer
        self._teller = publisher
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._settled: list[str] = []

    @property
    def waiting(self) -> int:
        """Return how many entries were read and are not yet settled."""
        return len(self._waiting) + len(self._settled)

    def is_idle(self) -> bool:
        """Say whether nothing waits here and the stream is empty.

        :raises redis.RedisError: when Redis cannot be asked.
        """
        return not self.waiting and self._state.outbox.length() == 0

    def run_once(self, block_ms: int = 300) -> int:
        """Read what has come, settle what can be settled, and return how many entries that were.

        :param block_ms: how long to wait for new entries; less while uncommitted ones are due for a look.
        :raises redis.RedisError: when Redis cannot be reached; nothing is lost, call again.
        :raises StorageUnavailableError: when SQL cannot be reached; nothing is lost, call again.
        """
        self._acknowledge()
        self._read(block_ms)
        now = self._clock()
        due = [waiting for waiting in self._waiting.values() if waiting.look_at <= now]
        if not due:
            return 0
        before = len(self._waiting)
        try:
            self._settle(due)
        finally:
            self._acknowledge()
        return before - len(self._waiting)

    # -- the stream -----------------------------------------------------------------------------------

    def _read(self, block_ms: int) -> None:
        room = min(self._state.settings.batch, MAX_WAITING - len(self._waiting))
        if self._waiting:
            next_look = min(waiting.look_at for waiting in self._waiting.values())
            block_ms = max(1, min(block_ms, int((next_look - self._clock()) * 1000)))
        if room <= 0:
            time.sleep(block_ms / 1000)
            return
        now = self._clock()
        for read in self._state.outbox.read(self._consumer, count=room, block_ms=block_ms):
            if read.entry is None:
                self._set_aside(read, read.error or "not an outbox entry")
            elif read.id not in self._waiting:
                self._waiting[read.id] = _Waiting(id=read.id, entry=read.entry, since=now, look_at=now)

    def _set_aside(self, read: Entry, why: str) -> None:
        logger.error("Outbox entry %s is set aside in %s: %s", read.id, self._state.outbox.rejected_key, why)
        self._state.outbox.reject(read.id, read.raw, why)

    def _finish(self, settled: Iterable[_Waiting]) -> None:
        for waiting in settled:
            if self._waiting.pop(waiting.id, None) is not None:
                self._settled.append(waiting.id)

    def _acknowledge(self) -> None:
        if self._settled:
            self._state.outbox.done(self._settled)
            self._settled = []

    # -- settling -------------------------------------------------------------------------------------

    def _settle(self, due: Sequence[_Waiting]) -> None:
        jobs = self._look(due)
        told: list[tuple[_Waiting, Verdict]] = []
        overdue: list[_Waiting] = []
        needs_results: list[_Waiting] = []
        for waiting in due:
            if waiting.entry.kind == "confirm":
                self._confirm(waiting, jobs)
                continue
            patient = self._clock() - waiting.since < PATIENCE_S
            verdict = judge(waiting.entry, jobs.get(waiting.entry.job_id), patient=patient)
            if verdict is Open.NEEDS_RESULTS:
                needs_results.append(waiting)
            elif isinstance(verdict, Verdict):
                told.append((waiting, verdict))
            elif patient:
                waiting.look_at = self._clock() + waiting.pause_s
                waiting.pause_s = min(waiting.pause_s * 1.6, LONGEST_LOOK_S)
            else:
                overdue.append(waiting)
        if needs_results:
            told += self._judge_by_results(needs_results, jobs)
        if told:
            self._store(told)
        if overdue:
            self._park(overdue)

    def _look(self, due: Sequence[_Waiting]) -> Jobs:
        ids: dict[str, None] = {}
        for waiting in due:
            if waiting.entry.kind == "confirm":
                ids.update(dict.fromkeys(waiting.entry.jobs))
            else:
                ids[waiting.entry.job_id] = None
        return read_endings(self._state.redis, list(ids))

    def _judge_by_results(self, undecided: Sequence[_Waiting], jobs: Jobs) -> list[tuple[_Waiting, Verdict]]:
        ids = list({waiting.entry.job_id for waiting in undecided})
        results: dict[str, list[JobResult]] = read_results(self._state.redis, ids)
        told = []
        for waiting in undecided:
            job_id = waiting.entry.job_id
            verdict = judge(waiting.entry, jobs.get(job_id), results.get(job_id, []), patient=False)
            if isinstance(verdict, Verdict):  # always: nothing stays open once the results are known
                told.append((waiting, verdict))
        return told

    def _confirm(self, waiting: _Waiting, jobs: Jobs) -> None:
        entry = waiting.entry
        confirm(
            self._state.database,
            entry.endpoint,
            existing=[job_id for job_id in entry.jobs if job_id in jobs],
            unseen=[job_id for job_id in entry.jobs if job_id not in jobs],
            reserved_job_id=None,
        )
        self._finish([waiting])

    def _park(self, overdue: Sequence[_Waiting]) -> None:
        for waiting in overdue:
            logger.warning(
                "RQ has not committed the end of job %r within %.0f s of its callback; reconcile will tell.",
                waiting.entry.job_id, PATIENCE_S,
            )  # fmt: skip
        park_evidence(
            self._state.database,
            [(waiting.entry.endpoint, waiting.entry.job_id, waiting.entry.to_json()) for waiting in overdue],
        )
        self._finish(overdue)

    # -- storing --------------------------------------------------------------------------------------

    def _store(self, told: Sequence[tuple[_Waiting, Verdict]]) -> None:
        settings = self._state.settings
        items: list[tuple[_Waiting, IngestItem]] = []
        # Two callbacks may tell of one run (on_success timed out, then on_failure); the one that agrees with
        # RQ knows more and goes first, the other is then a no-op.
        for waiting, verdict in sorted(told, key=lambda pair: not _agrees(pair[0].entry, pair[1])):
            occurrence = occurrence_of(
                waiting.entry,
                verdict,
                include_result=settings.include_result,
                max_payload_bytes=settings.max_payload_bytes,
            )
            items.append((waiting, IngestItem(occurrence, endpoint_ids=(waiting.entry.endpoint,))))
        self._store_items(items)

    def _store_items(self, items: Sequence[tuple[_Waiting, IngestItem]]) -> None:
        try:
            reached("entries read")
            self._teller.publish([item for _waiting, item in items])
        except Exception as exc:  # a bad entry must never block the stream
            if not is_about_a_row(exc):
                raise  # everything stays in the stream
            if len(items) > 1:
                middle = len(items) // 2
                self._store_items(items[:middle])
                self._store_items(items[middle:])
                return
            self._reject(items[0][0], exc)
            return
        reached("event stored")
        self._finish(waiting for waiting, _item in items)

    def _reject(self, waiting: _Waiting, exc: Exception) -> None:
        logger.error(
            "The event of job %r cannot be stored; outbox entry %s is set aside in %s.",
            waiting.entry.job_id, waiting.id, self._state.outbox.rejected_key, exc_info=exc,
        )  # fmt: skip
        self._state.outbox.reject(waiting.id, waiting.entry.to_json(), f"{type(exc).__name__}: {exc}")
        self._waiting.pop(waiting.id, None)


def _agrees(entry: OutboxEntry, verdict: Verdict) -> bool:
    return verdict.type == f"job.{entry.kind}" or (entry.kind == "failure" and verdict.type == "job.retrying")
