"""Ingest: turn outbox entries into events in SQL: read, confirm against RQ, store, and only then acknowledge.

Owns the order of those steps. :mod:`~flask_rq_webhooks.queue.job_reader` reads what RQ committed,
:mod:`~flask_rq_webhooks.observe.outcomes` decides what it means, and
:mod:`~flask_rq_webhooks.observe.publisher` stores events. Does not know about sending.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .._steps import reached
from ..errors import DecryptionError, StorageUnavailableError
from ..protocol.events import JOB_LOST, TERMINAL_TYPES, Occurrence
from ..queue.job_reader import JobRecord, Jobs, read_endings, read_jobs
from ..storage.endpoints import confirm, watch_for_standing
from ..storage.events import Held, IngestItem, hold
from ..storage.reported_runs import ParkedReport, Reported, park_reports, reported_endings
from ..storage.sql_errors import is_about_a_row, is_overtaken
from ..storage.subscriptions import is_endpoint
from .outcomes import Outcome, Undecided, news, outcome_of
from .publisher import Publisher, occurrence_of_report

if TYPE_CHECKING:
    from ..queue.outbox import Entry
    from ..queue.outbox_entry import OutboxEntry
    from ..state import State

logger = logging.getLogger(__name__)

#: Seconds an entry may wait for RQ's commit before it is left to reconcile, which then reports the ending in
#: its next pass. RQ commits within milliseconds.
PATIENCE_S = 5.0
#: The first and the longest pause between two looks at an uncommitted job, in seconds. Between these limits
#: the pause is this share of the time it has waited.
FIRST_LOOK_S, LONGEST_LOOK_S, LOOK_SHARE = 0.0002, 0.1, 0.25
#: Pauses shorter than this need not end when a new entry arrives.
SHORT_PAUSE_MS = 5.0
#: How many new reports at most are awaited inside the transaction that stores them, and for how many looks.
HELD_REPORTS, HELD_LOOKS = 4, 8
#: Seconds after which that transaction is too old to use: Redis was slow, and the leases have begun.
HELD_S = 1.0
#: The most entries held in memory; the rest stay in the stream.
MAX_WAITING = 5000


@dataclass(slots=True)
class _Waiting:
    """An entry that was read and is still in the stream.

    :param since: when it was first looked at.
    :param proven: whether the job's own hash names the entry's endpoint.
    """

    id: str
    entry: OutboxEntry
    since: float
    look_at: float
    proven: bool = False

    @property
    def order(self) -> tuple[int, int]:
        milliseconds, _, number = self.id.partition("-")
        return int(milliseconds), int(number)


@dataclass(slots=True)
class _Judged:
    """What RQ's job hashes, read at one moment, say about the reports.

    :param close: reports for which RQ's results have to be read.
    :param undecided: reports of endings that RQ has not committed.
    """

    jobs: Jobs
    decided: list[tuple[_Waiting, Outcome]] = field(default_factory=list)
    close: list[_Waiting] = field(default_factory=list)
    undecided: list[_Waiting] = field(default_factory=list)


class Ingest:
    """Turn outbox entries into events, in one thread.

    An entry leaves the stream only after its event is committed in SQL. After any failure before that it is
    still there, and processing it again is a no-op (the run key is unique).

    :param state: the app's state.
    :param consumer: name of this reader within the stream's group.
    :param publisher: stores the confirmed events.
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
        self._publisher = publisher
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._done: list[str] = []
        self._skips = False
        #: When the stream was last read to its end.
        self._caught_up_at = 0.0

    @property
    def waiting(self) -> int:
        """Return how many entries have been read but are not yet acknowledged."""
        return len(self._waiting) + len(self._done)

    def is_idle(self) -> bool:
        """Return whether nothing waits here and the stream is empty.

        :raises redis.RedisError: when Redis cannot be asked.
        """
        return not self.waiting and self._state.outbox.length() == 0

    def run_once(self, block_ms: float = 300) -> int:
        """Read the new entries, store what can be stored, and return how many entries were finished.

        :param block_ms: how long to wait for new entries; less while uncommitted ones are due for a look.
        :raises redis.RedisError: when Redis cannot be reached; nothing is lost, call again.
        :raises StorageUnavailableError: when SQL cannot be reached; nothing is lost, call again.
        """
        self._acknowledge()
        self._read(block_ms)
        now = self._clock()
        jobs = {waiting.entry.job_id for waiting in self._waiting.values() if waiting.look_at <= now}
        # Reports of one job are judged together: a later one shows that RQ began the run again.
        due = [waiting for waiting in self._waiting.values() if waiting.entry.job_id in jobs]
        if not due:
            return 0
        before = len(self._waiting)
        try:
            self._settle(due)
        finally:
            self._acknowledge()
        return before - len(self._waiting)

    # -- the stream -----------------------------------------------------------------------------------

    def _read(self, block_ms: float) -> None:
        room = min(self._state.settings.batch, MAX_WAITING - len(self._waiting))
        if self._waiting:
            next_look = min(waiting.look_at for waiting in self._waiting.values())
            block_ms = max(0.1, min(block_ms, (next_look - self._clock()) * 1000))
        # Every other short pause only sleeps and reads no entries: it waits for RQ's commit.
        is_short = self._waiting and block_ms < SHORT_PAUSE_MS
        self._skips = bool(is_short and not self._skips)
        if room <= 0 or self._skips:
            time.sleep(block_ms / 1000)
            return
        read = self._state.outbox.read(self._consumer, count=room, block_ms=block_ms)
        now = self._clock()
        for one in read:
            if one.entry is None:
                self._set_aside(one, one.error or "not an outbox entry")
            elif one.id not in self._waiting:
                self._waiting[one.id] = _Waiting(id=one.id, entry=one.entry, since=now, look_at=now)
        if len(read) < room:
            self._caught_up_at = self._clock()

    def _set_aside(self, read: Entry, why: str) -> None:
        logger.error("Outbox entry %s is set aside in %s: %s", read.id, self._state.outbox.rejected_key, why)
        self._state.outbox.reject(read.id, read.raw, why)

    def _finish(self, done: Iterable[_Waiting]) -> None:
        for waiting in done:
            if self._waiting.pop(waiting.id, None) is not None:
                self._done.append(waiting.id)

    def _acknowledge(self) -> None:
        if self._done:
            self._state.outbox.done(self._done)
            self._done = []

    # -- decisions ------------------------------------------------------------------------------------

    def _settle(self, due: Sequence[_Waiting]) -> None:
        for waiting in due:
            if waiting.entry.kind == "confirm":
                self._confirm(waiting)
        reports = [waiting for waiting in due if waiting.entry.kind != "confirm"]
        following = self._following_reports(reports)
        held, began = self._hold(reports), self._clock()
        with nullcontext() if held is None else held.transaction:
            judged = self._judge(reports, following)
            for _ in range(0 if held is None else HELD_LOOKS):
                if judged.undecided:
                    time.sleep(FIRST_LOOK_S)
                    judged = self._judge(reports, following)
            if held is not None and judged.decided and self._clock() - began < HELD_S:
                self._store(judged, held)
        if judged.close:
            self._look_closely(judged, following)
        if judged.decided:
            self._store(judged)
        self._look_again(judged.undecided)

    def _hold(self, reports: Sequence[_Waiting]) -> Held | None:
        """Begin the transaction for a few new reports early, while RQ commits the endings they report."""
        may_wait = 0 < len(reports) <= HELD_REPORTS and self._state.database.reads_freely
        if not may_wait or any(waiting.look_at > waiting.since for waiting in reports):
            return None
        entries = [waiting.entry for waiting in reports]
        jobs, named = {one.job_id for one in entries}, {one.endpoint for one in entries}
        return hold(self._state.database, jobs, named, repeated=True)

    def _judge(self, reports: Sequence[_Waiting], following: Mapping[str, OutboxEntry]) -> _Judged:
        """Return what RQ's hashes say about the reported runs, and which reports need more than that."""
        judged = _Judged(read_endings(self._state.redis, list({one.entry.job_id for one in reports})))
        for waiting in reports:
            job = _existing(judged.jobs, waiting.entry.job_id)
            outcome = self._outcome_of(waiting, job, following)
            if job is None or outcome is Undecided.NEEDS_RESULTS:
                judged.close.append(waiting)
            elif isinstance(outcome, Outcome):
                judged.decided.append((waiting, outcome))
            else:
                judged.undecided.append(waiting)
        return judged

    def _look_closely(self, judged: _Judged, following: Mapping[str, OutboxEntry]) -> None:
        """Judge by RQ's results and by what was already reported about the job.

        The job is read again, together with its results: both must be from the same moment.
        """
        job_ids = list({waiting.entry.job_id for waiting in judged.close})
        jobs = read_endings(self._state.redis, job_ids, results=True)
        reported = reported_endings(self._state.database, job_ids)
        decided, undecided = judged.decided, judged.undecided
        now = datetime.now(UTC)
        for waiting in judged.close:
            entry = waiting.entry
            known = reported.get(entry.job_id, [])
            job = _existing(jobs, entry.job_id)
            is_newest = waiting.id not in following
            if job is None and is_newest and entry.retries_left and self._caught_up_at < waiting.since:
                undecided.append(waiting)  # a later run's report, which shows the retry, may still come
                continue
            outcome = self._outcome_of(waiting, job, following, known)
            if isinstance(outcome, Outcome):
                new = news(outcome, known, now=now)
                if new is None and any(ending.run == outcome.run for ending in known):
                    new = outcome  # the event exists but may lack the delivery to this endpoint
                if new is None:
                    self._finish([waiting])
                else:
                    decided.append((waiting, new))
            elif outcome is Undecided.REPORTED:
                self._finish([waiting])
            else:
                undecided.append(waiting)

    def _outcome_of(
        self,
        waiting: _Waiting,
        job: JobRecord | None,
        following: Mapping[str, OutboxEntry],
        reported: Sequence[Reported] = (),
    ) -> Outcome | Undecided:
        return outcome_of(
            waiting.entry.run,
            job,
            report=waiting.entry,
            following=following.get(waiting.id),
            reported=reported,
            patient=self._is_patient(waiting),
        )

    def _is_patient(self, waiting: _Waiting) -> bool:
        return self._clock() - waiting.since < PATIENCE_S

    def _following_reports(self, reports: Sequence[_Waiting]) -> dict[str, OutboxEntry]:
        """Return, by entry id, the report of the same job's next run, if it has been read too."""
        wanted = {waiting.entry.job_id for waiting in reports}
        by_job: dict[str, list[_Waiting]] = {}
        for waiting in self._waiting.values():
            if waiting.entry.job_id in wanted:
                by_job.setdefault(waiting.entry.job_id, []).append(waiting)
        following = {}
        for some in by_job.values():
            if len(some) > 1:
                some.sort(key=lambda waiting: waiting.order)
                for number, waiting in enumerate(some):
                    later = (one.entry for one in some[number + 1 :] if one.entry.run != waiting.entry.run)
                    entry = next(later, None)
                    if entry is not None:
                        following[waiting.id] = entry
        return following

    def _look_again(self, undecided: Sequence[_Waiting]) -> None:
        overdue = []
        for waiting in undecided:
            if self._is_patient(waiting):
                now = self._clock()
                pause_s = max(FIRST_LOOK_S, LOOK_SHARE * (now - waiting.since))
                waiting.look_at = now + min(pause_s, LONGEST_LOOK_S)
            else:
                overdue.append(waiting)
        if overdue:
            self._park(overdue)

    def _park(self, overdue: Sequence[_Waiting]) -> None:
        self._prove(overdue)
        for waiting in overdue:
            logger.warning(
                "RQ has not committed the end of job %r within %.0f s of its callback; left to reconcile.",
                waiting.entry.job_id, PATIENCE_S,
            )  # fmt: skip
        park_reports(
            self._state.database,
            [
                ParkedReport(
                    waiting.entry.endpoint,
                    waiting.entry.job_id,
                    waiting.entry.to_json(),
                    needs_watch=_needs_watch(waiting),
                )
                for waiting in overdue
            ],
        )
        self._finish(overdue)

    # -- confirmations --------------------------------------------------------------------------------

    def _confirm(self, waiting: _Waiting) -> None:
        """Open the watches of the jobs that a web process saw in Redis.

        The jobs may be gone by now; the seal proves that they existed. Without a valid seal, only jobs whose
        own hash names the endpoint count.
        """
        entry = waiting.entry
        sealed = self._unsealed(entry)
        if sealed is None:
            jobs = read_jobs(self._state.redis, entry.jobs)
            existing = [job_id for job_id in entry.jobs if _carries(jobs, job_id, entry.endpoint)]
            runs: dict[str, str | None] = {}
            unseen: list[str] = []
            if len(existing) < len(entry.jobs):
                logger.warning("Outbox entry %s confirms jobs that nothing proves; ignored.", waiting.id)
        else:
            runs, unseen = sealed
            existing = [job_id for job_id in entry.jobs if job_id not in unseen]
        if not is_endpoint(entry.endpoint):
            watch_for_standing(self._state.database, existing, unseen, runs)
            self._finish([waiting])
            return
        confirm(
            self._state.database,
            entry.endpoint,
            existing=existing,
            unseen=unseen,
            reserved_job_id=None,
            runs={job_id: run for job_id, run in runs.items() if run is not None},
        )
        self._finish([waiting])

    def _unsealed(self, entry: OutboxEntry) -> tuple[dict[str, str | None], list[str]] | None:
        """Return each job's run, and the jobs that were not in Redis yet; ``None`` without a valid seal."""
        if entry.seal is None:
            return None
        try:
            endpoint, runs, unseen = json.loads(self._state.cipher.decrypt(entry.seal))
        except DecryptionError:
            return None
        return (runs, unseen) if endpoint == entry.endpoint and set(runs) == set(entry.jobs) else None

    # -- storing --------------------------------------------------------------------------------------

    def _store(self, judged: _Judged, held: Held | None = None) -> None:
        items: list[tuple[_Waiting, IngestItem]] = []
        # Two callbacks may report one run (on_success timed out, then on_failure). The one that agrees with
        # RQ knows more and is stored first; the other is then a no-op.
        for waiting, outcome in sorted(judged.decided, key=lambda pair: not _agrees(pair[0].entry, pair[1])):
            occurrence = occurrence_of_report(
                waiting.entry, outcome, self._state.settings, judged.jobs.get(waiting.entry.job_id)
            )
            items.append((waiting, _item(waiting, occurrence)))
        judged.decided = []
        self._store_items(items, held)

    def _store_items(self, items: Sequence[tuple[_Waiting, IngestItem]], held: Held | None = None) -> None:
        try:
            reached("entries read")
            events = self._publisher.publish([item for _waiting, item in items], held=held)
            corrections = [
                (waiting, _correction(item, event.event_id))
                for (waiting, item), event in zip(items, events, strict=True)
                if _is_unforeseen_loss(item.occurrence, event.type, created=event.created)
            ]
            if corrections:
                self._publisher.publish([item for _waiting, item in corrections])
        except StorageUnavailableError as exc:
            if held is None or not is_overtaken(exc):
                raise
            self._store_items(items)
            return
        except Exception as exc:  # a bad entry must never block the stream
            if not is_about_a_row(exc):
                raise  # everything stays in the stream
            if len(items) > 1:
                middle = len(items) // 2
                self._store_items(items[:middle])
                self._store_items(items[middle:])
                return
            self._reject(items[0][0], f"{type(exc).__name__}: {exc}", exc)
            return
        answered = zip(items, events, strict=True)
        unproven = [pair for pair, event in answered if not event.event_id]
        ids = {waiting.id for waiting, _item in unproven}
        self._finish(waiting for waiting, _item in items if waiting.id not in ids)
        if unproven:
            self._demand_proof(unproven)

    def _demand_proof(self, unproven: Sequence[tuple[_Waiting, IngestItem]]) -> None:
        """Accept reports without a watch only if the job's own hash names the endpoint.

        The confirmation that creates the watch may come after them in the stream.
        """
        self._prove([waiting for waiting, _item in unproven])
        for waiting, _item in unproven:
            if not waiting.proven and self._is_patient(waiting):
                waiting.look_at = self._clock() + LONGEST_LOOK_S
            elif not waiting.proven:
                self._reject(waiting, "neither a watch nor the job's own callbacks name its endpoint")
        proven = [(waiting, replace(item, needs_watch=False)) for waiting, item in unproven if waiting.proven]
        if proven:
            self._store_items(proven)

    def _prove(self, some: Sequence[_Waiting]) -> None:
        jobs = read_jobs(self._state.redis, {waiting.entry.job_id for waiting in some})
        for waiting in some:
            waiting.proven = _carries(jobs, waiting.entry.job_id, waiting.entry.endpoint)

    def _reject(self, waiting: _Waiting, why: str, exc: Exception | None = None) -> None:
        logger.error(
            "The report on job %r cannot be stored; outbox entry %s is set aside in %s: %s",
            waiting.entry.job_id, waiting.id, self._state.outbox.rejected_key, why, exc_info=exc,
        )  # fmt: skip
        self._state.outbox.reject(waiting.id, waiting.entry.to_json(), why)
        self._waiting.pop(waiting.id, None)


def _existing(jobs: Jobs, job_id: str) -> JobRecord | None:
    """Return the job, or ``None`` if its hash has no status: a late write can leave such a hash."""
    job = jobs.get(job_id)
    return job if job is not None and job.status is not None else None


def _carries(jobs: Jobs, job_id: str, endpoint: str) -> bool:
    return job_id in jobs and endpoint in jobs[job_id].tokens


def _needs_watch(waiting: _Waiting) -> bool:
    return not waiting.proven and is_endpoint(waiting.entry.endpoint)


def _item(waiting: _Waiting, occurrence: Occurrence) -> IngestItem:
    return IngestItem(
        occurrence,
        endpoint_ids=(waiting.entry.endpoint,),
        needs_watch=_needs_watch(waiting),
        trace=waiting.entry.trace,
    )


def _is_unforeseen_loss(occurrence: Occurrence, stored_type: str, *, created: bool) -> bool:
    """Return whether the run was reported as lost, and *occurrence* says how it really ended."""
    return (
        not created
        and stored_type == JOB_LOST
        and occurrence.supersedes is None
        and occurrence.type in TERMINAL_TYPES
    )


def _correction(item: IngestItem, event_id: str) -> IngestItem:
    return replace(item, occurrence=replace(item.occurrence, supersedes=event_id))


def _agrees(entry: OutboxEntry, outcome: Outcome) -> bool:
    return outcome.type == f"job.{entry.kind}" or (entry.kind == "failure" and not outcome.is_final)
