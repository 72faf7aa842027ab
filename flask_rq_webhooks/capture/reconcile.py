"""Reconcile: find every ending no callback reported, and every verdict RQ changed afterwards.

Owns the order of one pass: which watches are looked at, what is read of RQ, what is told and noted. What
the facts mean is decided in :mod:`~flask_rq_webhooks.capture.endings`; statements are in
:mod:`~flask_rq_webhooks.storage.watches`; telling is left to a function it is given. Reads jobs by the ids
it watches, many in one round trip; never searches Redis.

A pass may be interrupted anywhere and repeated by anyone: telling is idempotent by the run key, and what is
noted of a watch is noted after its run was told.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from redis import Redis
from rq.defaults import UNSERIALIZABLE_RETURN_VALUE_PAYLOAD
from rq.registry import StartedJobRegistry
from rq.serializers import DefaultSerializer, JSONSerializer

from .._steps import reached
from ..config import Settings
from ..errors import OutboxEntryError
from ..protocol.events import (
    JOB_BLOCKED,
    JOB_LOST,
    JOB_RETRYING,
    JOB_SUCCESS,
    TERMINAL_TYPES,
    Occurrence,
    format_time,
)
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.ingesting import IngestItem
from ..storage.models import OPEN, RESERVED
from ..storage.watches import Glance, Notes, SettledRow, WatchRow
from .endings import (
    CLOCK_SKEW,
    TYPE_OF_STATUS,
    Meaning,
    WatchFacts,
    ending_of_superseded,
    is_blocked,
    is_correction,
    meaning_of,
    occurrence_of_job,
    occurrence_of_loss,
    occurrence_of_result,
    occurrence_of_state,
    occurrence_of_word,
)
from .outbox import OutboxEntry, parse_entry
from .rq_details import JobRecord, probe_jobs, read_records, read_statuses, uses_pickle
from .rq_state import UNKNOWN, JobResult, read_result_value, read_results
from .trees import TreeReporter

logger = logging.getLogger(__name__)

Tell = Callable[[Sequence[IngestItem]], object]

#: Watches per page: one statement and one round trip to Redis.
PAGE = 1000
#: Occurrences told in one transaction.
_TOLD_AT_ONCE = 200
#: How long RQ may change its verdict on a told run.
SECOND_LOOKS_FOR = timedelta(hours=24)
#: A settled run is looked at in every pass for so long; then successes ever more rarely.
_FRESH = timedelta(minutes=10)
#: The oldest outbox entry may be this old before absence of a job proves nothing.
_OUTBOX_LAG = timedelta(seconds=10)


@dataclass(slots=True)
class ReconcileReport:
    """What one pass did.

    :param looked_at: watches compared with RQ's state.
    :param told: occurrences handed on, by type; some may have been told before.
    """

    looked_at: int = 0
    told: Counter[str] = field(default_factory=Counter)
    corrections: int = 0
    adopted: int = 0
    closed: int = 0
    reopened: int = 0
    cleaned_queues: int = 0


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


class Reconciler:
    """Compare what was promised with what RQ committed, and tell what nobody told.

    One at a time: the caller holds the reconcile lease. Two at once would do no harm, only work twice.

    :param tell: stores occurrences as events and deliveries, each once.
    :param outbox_key: the stream of callbacks' words; while old ones wait there, absence proves nothing.
    :param clock: aware UTC now.
    """

    def __init__(
        self,
        database: Database,
        redis: Redis,
        *,
        tell: Tell,
        settings: Settings,
        outbox_key: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._redis = redis
        self._tell = tell
        self._settings = settings
        self._outbox_key = outbox_key
        self._clock = clock
        self._settled: dict[str, _Settled] = {}
        self._settled_since: datetime | None = None
        self._without_dependency: set[str] = set()
        self.trees = TreeReporter(database, redis, tell=tell, settings=settings, clock=clock)

    def run_once(self, should_stop: Callable[[], bool] = lambda: False) -> ReconcileReport:
        """Make one pass over every open, reserved and recently settled watch, and every open tree.

        :param should_stop: asked between pages.
        :raises redis.RedisError: when Redis cannot be asked; nothing is lost, call again.
        :raises StorageUnavailableError: when SQL cannot be used; nothing is lost, call again.
        """
        report = ReconcileReport()
        now = self._clock()
        # First, so that a new run of a told job is judged in this very pass.
        self._look_again(report, now, should_stop)
        outbox_lags = self._outbox_lags()
        blocked_matters = storage.any_standing_wants(self._database, JOB_BLOCKED)
        queues: set[str] = set()
        for status in (OPEN, RESERVED):
            for page in self._pages(status, all_want_blocked=blocked_matters):
                if should_stop():
                    return report
                self._pass_over(page, report, now, outbox_lags=outbox_lags, queues=queues)
        for told in self.trees.run_once(should_stop):
            report.told[told] += 1
        if self._settings.clean_abandoned:
            self._clean_registries(queues, report)
        return report

    # -- watches that wait ----------------------------------------------------------------------------

    def _pages(self, status: str, *, all_want_blocked: bool) -> Iterator[list[Glance]]:
        after = ""
        while True:
            page = storage.glance_at_waiting(
                self._database, status, after=after, limit=PAGE, all_want_blocked=all_want_blocked
            )
            if page:
                yield page
            if len(page) < PAGE:
                return
            after = page[-1].id

    def _pass_over(
        self,
        page: Sequence[Glance],
        report: ReconcileReport,
        now: datetime,
        *,
        outbox_lags: bool,
        queues: set[str],
    ) -> None:
        """Look at a page as cheaply as can be, and closely at what is not simply waiting."""
        report.looked_at += len(page)
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
            wants_blocked = {glance.id for glance in page if glance.wants_blocked}
            self._judge(storage.load_watches(self._database, close), report, now, outbox_lags, wants_blocked)

    def _judge(
        self,
        rows: Sequence[WatchRow],
        report: ReconcileReport,
        now: datetime,
        outbox_lags: bool,
        wants_blocked: set[str],
    ) -> None:
        records = read_records(self._redis, [row.job_id for row in rows])
        facts = {row.id: self._facts(row) for row in rows}
        meanings = {
            row.id: meaning_of(facts[row.id], records.get(row.job_id), now=now, outbox_lags=outbox_lags)
            for row in rows
        }
        results = read_results(self._redis, self._results_wanted(rows, facts, meanings, records))
        notes, items = Notes(), _Items(self._database)
        waiting: list[tuple[WatchRow, JobRecord]] = []
        # Those that know the run first: the others of the same job then tell of the same one.
        for row in sorted(rows, key=lambda row: row.run is None):
            job, watch, meaning = records.get(row.job_id), facts[row.id], meanings[row.id]
            if job is None:
                self._judge_absent(row, watch, meaning, notes, items, now)
                continue
            self._judge_present(
                row, watch, meaning, job, results.get(row.job_id, []), notes, items, report, now
            )
            if meaning is Meaning.WAIT and job.status == "deferred" and row.id in wants_blocked:
                waiting.append((row, job))
        self._find_blocked(waiting, items, now)
        report.adopted += len(notes.adopted)
        report.closed += len(notes.closed)
        self._tell_all(items.to_tell(), report)
        storage.write_notes(self._database, notes, now=now)

    def _facts(self, row: WatchRow) -> WatchFacts:
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

    def _results_wanted(
        self,
        rows: Sequence[WatchRow],
        facts: dict[str, WatchFacts],
        meanings: dict[str, Meaning],
        records: dict[str, JobRecord],
    ) -> list[str]:
        wanted: dict[str, None] = {}
        for row in rows:
            job, evidence = records.get(row.job_id), facts[row.id].evidence
            if job is None:
                continue
            superseded = row.run != job.run if row.run is not None else _has_begun_again(job)
            if meanings[row.id] is Meaning.ENDED or superseded or (evidence and evidence.run != job.run):
                wanted[row.job_id] = None
        return list(wanted)

    def _judge_absent(
        self,
        row: WatchRow,
        watch: WatchFacts,
        meaning: Meaning,
        notes: Notes,
        items: _Items,
        now: datetime,
    ) -> None:
        if meaning is Meaning.WORD and watch.evidence is not None:
            items.add(row, self._word(watch.evidence))
            notes.spent.add(row.id)
        elif meaning is Meaning.LOST:
            items.add_loss(row, occurrence_of_loss(watch, now=now))
        elif meaning is Meaning.MISSING:
            notes.missing.add(row.id)
        elif meaning is Meaning.UNUSED:
            notes.closed.add(row.id)
        elif meaning is Meaning.OVER:
            notes.over.add(row.id)

    def _judge_present(
        self,
        row: WatchRow,
        watch: WatchFacts,
        meaning: Meaning,
        job: JobRecord,
        results: Sequence[JobResult],
        notes: Notes,
        items: _Items,
        report: ReconcileReport,
        now: datetime,
    ) -> None:
        if meaning is Meaning.UNUSED:
            notes.closed.add(row.id)
            return
        if row.missing_passes:
            notes.present.add(row.id)
        evidence = watch.evidence
        if evidence is not None and evidence.run != job.run:
            earlier = ending_of_superseded(evidence.run, job, results)
            told = (
                self._word(evidence)
                if earlier is None
                else self._earlier(job, evidence.run, earlier, results)
            )
            items.add(row, told)
            notes.spent.add(row.id)
        began_again = self._tell_earlier_run(row, watch, job, results, items, now)
        if meaning is Meaning.ENDED:
            items.add(
                row,
                occurrence_of_job(
                    job,
                    results,
                    value=self._value(job.job_id) if job.status == "finished" else UNKNOWN,
                    evidence=evidence,
                    now=now,
                    max_payload_bytes=self._settings.max_payload_bytes,
                ),
            )
        counted = meaning is Meaning.ENDED or watch.endpoint_id in job.tokens or _counts(row, job)
        if row.status == RESERVED and counted:
            notes.adopted.add(row.id)
        # A run that never was enqueued has no time that later runs could be compared with.
        if counted and job.run != row.run and job.enqueued_at is not None and not began_again:
            notes.seen[row.id] = job.run

    def _tell_earlier_run(
        self,
        row: WatchRow,
        watch: WatchFacts,
        job: JobRecord,
        results: Sequence[JobResult],
        items: _Items,
        now: datetime,
    ) -> bool:
        """Tell how the run before the current one ended, where nobody did; say whether one ending was told.

        That the job began again is then noted by a later pass, when the earlier run is settled.
        """
        if watch.told or row.run == job.run or job.enqueued_at is None:
            return False
        if row.run is None:
            return self._tell_unseen_run(row, job, results, items, now)
        earlier = ending_of_superseded(row.run, job, results)
        if earlier is not None:
            items.add(row, self._earlier(job, row.run, earlier, results))
            return True
        if job.retries_left is not None or any(result.type == "retried" for result in results):
            items.add(row, occurrence_of_state(job, JOB_RETRYING, now=now, run=row.run))
        return False

    def _tell_unseen_run(
        self, row: WatchRow, job: JobRecord, results: Sequence[JobResult], items: _Items, now: datetime
    ) -> bool:
        """Tell of a run that ended and began again before any pass saw it, and that no callback told of.

        Its own identity is not known any more; the one it gets is that of a job never enqueued.
        """
        if not _has_begun_again(job):
            return False
        run = "created:" + format_time(job.created_at)
        earlier = ending_of_superseded(format_time(max(job.created_at, row.counts_from)), job, results)
        if earlier is None or self._clock() - earlier.at < _OUTBOX_LAG or self._outbox_lags():
            return False
        ended = format_time(earlier.at + CLOCK_SKEW)
        if any(
            key.split("|")[1] < ended
            for _type, key, _at in storage.endings_of_job(self._database, job.job_id)
        ):
            return False
        items.add(row, self._earlier(job, run, earlier, results))
        return True

    def _earlier(
        self, job: JobRecord, run: str, ending: JobResult, results: Sequence[JobResult]
    ) -> Occurrence:
        latest = ending.type == "success" and not any(
            other.type == "success" and other.at > ending.at for other in results
        )
        return occurrence_of_result(
            job,
            run,
            ending,
            value=self._value(job.job_id) if latest else UNKNOWN,
            max_payload_bytes=self._settings.max_payload_bytes,
        )

    def _word(self, evidence: OutboxEntry) -> Occurrence:
        return occurrence_of_word(evidence, max_payload_bytes=self._settings.max_payload_bytes)

    def _value(self, job_id: str) -> object:
        if not self._settings.include_result:
            return None
        value = read_result_value(self._redis, job_id)
        return UNKNOWN if value == UNSERIALIZABLE_RETURN_VALUE_PAYLOAD else value

    def _find_blocked(
        self, waiting: Sequence[tuple[WatchRow, JobRecord]], items: _Items, now: datetime
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
                # A dependency that is deleted as it ends is gone a moment before its dependents are queued.
                self._without_dependency.add(row.id)
                if row.id not in absent_before:
                    continue
            items.add(row, occurrence_of_state(job, JOB_BLOCKED, now=now))

    # -- watches that were settled --------------------------------------------------------------------

    def _look_again(self, report: ReconcileReport, now: datetime, should_stop: Callable[[], bool]) -> None:
        self._load_settled(now)
        due = [settled for settled in self._settled.values() if settled.next_look <= now]
        for start in range(0, len(due), PAGE):
            if should_stop():
                return
            self._look_again_at(due[start : start + PAGE], report, now)

    def _load_settled(self, now: datetime) -> None:
        since = now - SECOND_LOOKS_FOR
        if self._settled_since is not None:
            since = max(since, self._settled_since - timedelta(minutes=1))
        after = ""
        while True:
            page = storage.load_settled(self._database, since=since, after=after, limit=PAGE)
            new = [
                row
                for row in page
                if (known := self._settled.get(row.id)) is None or known.row.run != row.run
            ]
            told = storage.told_endings(self._database, [(row.job_id, row.run) for row in new])
            for row in new:
                events = told.get((row.job_id, row.run))
                if events:
                    self._settled[row.id] = _Settled(
                        row,
                        event_id=events[0].event_id,
                        type=events[0].type,
                        told_at=events[0].created_at,
                        corrected=len(events) > 1,
                        next_look=now,
                    )
            if len(page) < PAGE:
                break
            after = page[-1].id
        self._settled_since = now

    def _look_again_at(self, due: Sequence[_Settled], report: ReconcileReport, now: datetime) -> None:
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
        records = read_records(self._redis, [settled.row.job_id for settled in changed])
        notes, items = Notes(), _Items(self._database)
        corrected: list[_Settled] = []
        for settled in changed:
            job, row = records.get(settled.row.job_id), settled.row
            if job is None:
                continue
            settled.seen = True
            if is_correction(settled.type, job, told_run=row.run, told_at=settled.told_at):
                if not settled.corrected:
                    corrected.append(settled)
            elif job.run != row.run and job.enqueued_at is not None and _is_newer(job.run, row.run, settled):
                notes.waiting_again[row.id] = job.run
                del self._settled[row.id]
            elif job.repeats and job.run == row.run:
                notes.repeating.add(row.id)
                del self._settled[row.id]
        results = read_results(self._redis, list({settled.row.job_id for settled in corrected}))
        for settled in corrected:
            job = records[settled.row.job_id]
            items.add(
                settled.row,
                occurrence_of_job(
                    job,
                    results.get(job.job_id, []),
                    value=self._value(job.job_id) if job.status == "finished" else UNKNOWN,
                    now=now,
                    max_payload_bytes=self._settings.max_payload_bytes,
                    supersedes=settled.event_id,
                    run=settled.row.run,
                ),
            )
        report.reopened += len(notes.waiting_again)
        report.corrections += len(items.to_tell())
        self._tell_all(items.to_tell(), report)
        for settled in corrected:
            settled.corrected = True
        storage.write_notes(self._database, notes, now=now)

    # -- parts ----------------------------------------------------------------------------------------

    def _tell_all(self, items: Sequence[IngestItem], report: ReconcileReport) -> None:
        for start in range(0, len(items), _TOLD_AT_ONCE):
            reached("reconcile found")
            self._tell(items[start : start + _TOLD_AT_ONCE])
            reached("reconcile told")
        report.told.update(item.occurrence.type for item in items)

    def _outbox_lags(self) -> bool:
        if self._outbox_key is None:
            return False
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xrange(self._outbox_key, count=1)
            pipeline.time()
            oldest, (seconds, _microseconds) = pipeline.execute()
        if not oldest:
            return False
        entry_id = oldest[0][0]
        text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
        return bool(int(seconds) - int(text.partition("-")[0]) / 1000 > _OUTBOX_LAG.total_seconds())

    def _clean_registries(self, queues: set[str], report: ReconcileReport) -> None:
        """Let RQ end the jobs whose worker is gone: it runs their failure callbacks here and now."""
        if threading.current_thread() is not threading.main_thread():
            # RQ before 3.0 raises there, and 3.0 loses the callback for ever.
            logger.warning("Abandoned jobs are cleaned in the main thread only; this pass leaves them.")
            return
        for queue in sorted(queues):
            serializer = DefaultSerializer if uses_pickle(self._redis, queue) else JSONSerializer
            registry = StartedJobRegistry(queue, connection=self._redis, serializer=serializer)
            if not registry.get_expired_job_ids():
                continue
            try:
                registry.cleanup()
            except Exception:
                # A host's own failure callback may raise anything; RQ before 3.0 lets it through.
                logger.exception("Cleaning the registry of started jobs of the queue %r failed.", queue)
            else:
                report.cleaned_queues += 1


class _Items:
    """What a page makes us tell, each run once, and only what is news to somebody."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._items: dict[str, tuple[Occurrence, dict[str, bool]]] = {}
        self._losses: dict[str, Occurrence] = {}
        self._chosen: list[IngestItem] | None = None

    def add(self, row: WatchRow | SettledRow, occurrence: Occurrence) -> None:
        """Tell *occurrence* to the endpoint of *row*."""
        key = occurrence.run_key or ""
        _first, receivers = self._items.setdefault(key, (occurrence, {}))
        # A watch that stays open whatever is told would make us tell it again in every pass.
        stays_open = isinstance(row, WatchRow) and (
            row.scope == "tree" or occurrence.type not in TERMINAL_TYPES
        )
        receivers[row.endpoint_id or ""] = stays_open
        self._chosen = None

    def add_loss(self, row: WatchRow, occurrence: Occurrence) -> None:
        """Tell that a job is lost: of one job the same run, whichever watch knows it."""
        self.add(row, self._losses.setdefault(row.job_id, occurrence))

    def to_tell(self) -> list[IngestItem]:
        """Return the items, without those that were told and settle nothing."""
        if self._chosen is None:
            idle = [key for key, (_, receivers) in self._items.items() if all(receivers.values())]
            known = storage.known_keys(self._database, idle) if idle else set()
            self._chosen = [
                IngestItem(occurrence, tuple(endpoint_id for endpoint_id in receivers if endpoint_id))
                for key, (occurrence, receivers) in self._items.items()
                if key not in known
            ]
        return self._chosen


_ENDED = frozenset(status.encode() for status in TYPE_OF_STATUS)


def _parsed(row: WatchRow) -> OutboxEntry | None:
    if row.evidence is None:
        return None
    try:
        entry = parse_entry(row.evidence.encode())
    except OutboxEntryError as exc:
        logger.error("The evidence on watch %s cannot be read and is not used: %s", row.id, exc)
        return None
    return entry if entry.kind != "confirm" else None


def _has_begun_again(job: JobRecord) -> bool:
    """Say whether the current run is probably not the job's first."""
    return job.enqueued_at is not None and job.enqueued_at - job.created_at > timedelta(seconds=1)


def _counts(row: WatchRow, job: JobRecord) -> bool:
    return (job.enqueued_at or job.created_at) >= row.counts_from - CLOCK_SKEW


def _is_newer(run: str, told_run: str, settled: _Settled) -> bool:
    if told_run.startswith("created:"):
        return settled.type != JOB_LOST or run > format_time(settled.told_at)
    return run > told_run
