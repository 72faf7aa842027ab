"""Trees: one event when everything a request started has ended (``scope="tree"``).

Decides which jobs belong to a tree and when it is over. A tree consists of its roots (the jobs the request
enqueued), the jobs named in their meta under ``CHILD_META_PREFIX`` keys, their RQ dependents, and so on down.
The members found are remembered in SQL, because a root's record expires while its children run for hours, and
because RQ forgets a dependent as soon as it is released: a dependent not noted in meta is known only if the
tree was examined while it waited.

May run in several processes at once: the event of a tree is unique by its root's run.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from ..config import Settings
from ..errors import StorageUnavailableError
from ..protocol.events import (
    JOB_CANCELED,
    JOB_FAILURE,
    JOB_LOST,
    JOB_STOPPED,
    JOB_SUCCESS,
    SOURCE_RECONCILED,
    Occurrence,
    format_time,
    parse_time,
)
from ..protocol.job_errors import error_from_text
from ..protocol.json_safe import dumps_capped
from ..queue.job_reader import (
    JobRecord,
    read_dependents,
    read_jobs,
    read_result_value,
    read_results,
    read_statuses,
)
from ..queue.safe_pickle import UNKNOWN
from ..storage import watches as storage
from ..storage.database import Database
from ..storage.events import IngestItem
from ..storage.models import RESERVED
from ..storage.reported_runs import reported_endings
from ..storage.sql_errors import is_about_a_row
from ..storage.watches import TreeRow
from .conclusions import RESERVED_GRACE, is_blocked, view_may_enqueue
from .outcomes import TYPE_OF_STATUS

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

#: The most jobs of one tree that are examined.
MAX_JOBS = 10_000
#: Trees per page.
_PAGE = 200

_STATUS_OF_TYPE = {event_type: status for status, event_type in TYPE_OF_STATUS.items()}
#: Job statuses that give a tree another event type than success, the most serious first.
_GRAVITY = (
    ("failed", JOB_FAILURE),
    ("stopped", JOB_STOPPED),
    ("canceled", JOB_CANCELED),
    ("lost", JOB_LOST),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeVerdict:
    """How a tree ended.

    :param counts: number of jobs by status; ``deferred`` ones could not run.
    """

    type: str
    counts: Mapping[str, int]


def verdict_on(
    statuses: Mapping[str, str], blocked: frozenset[str], *, lost: frozenset[str] = frozenset()
) -> TreeVerdict | None:
    """Return how a tree ended, or ``None`` while something in it is active.

    :param statuses: the statuses of the jobs that exist or whose ending is known.
    :param blocked: deferred jobs that wait for something that will not happen: they count as not run.
    :param lost: roots that are gone and whose endings are not known.
    """
    if any(status not in TYPE_OF_STATUS and id_ not in blocked for id_, status in statuses.items()):
        return None
    counts = Counter(statuses.values())
    if lost:
        counts["lost"] = len(lost)
    event_type = next((event_type for status, event_type in _GRAVITY if counts[status]), JOB_SUCCESS)
    if event_type == JOB_SUCCESS and blocked:
        # A deferred job waits for a job that is gone, so not all of the tree has finished.
        event_type = JOB_FAILURE
    return TreeVerdict(type=event_type, counts=dict(sorted(counts.items())))


def blocked_jobs(jobs: Mapping[str, JobRecord], statuses: Mapping[str, str | None]) -> frozenset[str]:
    """Return the deferred jobs that will not run, including those that depend on other blocked jobs.

    :param statuses: the statuses of all jobs that the deferred ones depend on.
    """
    blocked: frozenset[str] = frozenset()
    while True:
        more = frozenset(id_ for id_, job in jobs.items() if is_blocked(job, statuses, blocked=blocked))
        if more == blocked:
            return blocked
        blocked = more


class TreeReporter:
    """Evaluate open trees and publish those that are over.

    :param publish: stores occurrences as events and deliveries, each once.
    :param clock: returns the current time, aware and in UTC.
    """

    def __init__(
        self,
        database: Database,
        redis: Redis,
        *,
        publish: Callable[[Sequence[IngestItem]], object],
        settings: Settings,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._redis = redis
        self._publish = publish
        self._settings = settings
        self._clock = clock
        self._hints: set[str] = set()
        self._lock = threading.Lock()

    def look_sooner(self, job_ids: Iterable[str]) -> None:
        """Note that these jobs ended, for :meth:`run_hinted` to evaluate their trees. Thread-safe."""
        with self._lock:
            self._hints.update(job_ids)

    def run_hinted(self) -> list[str]:
        """Evaluate the trees of the jobs noted since the last call; return the event types reported."""
        with self._lock:
            hints, self._hints = self._hints, set()
        return self._evaluate_all(storage.open_trees_of(self._database, hints))

    def run_once(self, should_stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Evaluate every open tree; return the event types reported."""
        reported: list[str] = []
        after = ""
        while not should_stop():
            page = storage.open_trees(self._database, after=after, limit=_PAGE)
            reported += self._evaluate_all(page)
            if len(page) < _PAGE:
                break
            after = page[-1]
        return reported

    def _evaluate_all(self, endpoint_ids: Sequence[str]) -> list[str]:
        reported = []
        for endpoint_id, rows in storage.load_trees(self._database, endpoint_ids).items():
            try:
                event_type = self._evaluate(endpoint_id, rows)
            except (RedisError, StorageUnavailableError):
                raise
            except Exception as exc:
                if not is_about_a_row(exc):
                    raise
                logger.exception("The tree of endpoint %s cannot be judged; it is left out.", endpoint_id)
                continue
            if event_type is not None:
                reported.append(event_type)
        return reported

    def _evaluate(self, endpoint_id: str, rows: Sequence[TreeRow]) -> str | None:
        now = self._clock()
        roots = [row for row in rows if row.root]
        jobs = self._walk(rows)
        if any(view_may_enqueue(row.status, row.created_at, now) for row in roots):
            return None
        unused = [row for row in roots if row.status == RESERVED and row.job_id not in jobs]
        if any(now - row.created_at <= RESERVED_GRACE for row in unused):
            return None  # they may be in a pipeline that is not executed yet
        roots = [row for row in roots if row not in unused]
        if not roots:
            return None
        known, lost = self._remembered(rows, jobs)
        if any(row.job_id not in jobs and row.job_id not in known | lost for row in roots):
            return None  # absent, but not certainly lost; the pass over all watches decides
        statuses = {id_: job.status or "created" for id_, job in jobs.items()} | known
        self._remember(endpoint_id, rows, statuses)
        verdict = verdict_on(statuses, self._blocked(jobs), lost=frozenset(lost))
        if verdict is None:
            return None
        # A job may have noted a child in a parent that we had already read.
        again = self._walk(rows)
        if {id_: job.status for id_, job in again.items()} != {id_: job.status for id_, job in jobs.items()}:
            return None
        present = [row for row in roots if row.job_id in jobs]
        # The first job that the request enqueued.
        root = min(present, key=lambda row: jobs[row.job_id].created_at) if present else roots[0]
        self._report(endpoint_id, root, jobs, verdict, now)
        runs = {row.job_id: jobs[row.job_id].run for row in present}
        run = runs.get(root.job_id) or _unknown_run(root)
        storage.settle_tree(self._database, endpoint_id, run=run, runs=runs, now=now)
        return verdict.type

    def _walk(self, rows: Sequence[TreeRow]) -> dict[str, JobRecord]:
        """Return every existing job of the tree; walks it level by level and visits each job once."""
        jobs: dict[str, JobRecord] = {}
        looked_for: set[str] = set()
        level = list(dict.fromkeys(row.job_id for row in rows))
        while level and len(looked_for) < MAX_JOBS:
            level = level[: MAX_JOBS - len(looked_for)]
            looked_for.update(level)
            found = read_jobs(self._redis, level, child_prefix=self._settings.child_meta_prefix)
            jobs |= found
            dependents = read_dependents(self._redis, list(found))
            below = [id_ for job in found.values() for id_ in (*job.children, *dependents[job.job_id])]
            level = [id_ for id_ in dict.fromkeys(below) if id_ not in looked_for]
        return jobs

    def _remembered(
        self, rows: Sequence[TreeRow], jobs: Mapping[str, JobRecord]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return how the jobs with no record left ended, and the roots that were lost; both by job id."""
        known: dict[str, str] = {}
        lost: dict[str, str] = {}
        for row in rows:
            if row.job_id in jobs:
                continue
            if row.evidence in TYPE_OF_STATUS:
                known[row.job_id] = row.evidence
                continue
            endings = reported_endings(self._database, [row.job_id]).get(row.job_id, [])
            if endings and (status := _STATUS_OF_TYPE.get(endings[-1].type)) is not None:
                known[row.job_id] = status
            elif endings and row.root:
                lost[row.job_id] = endings[-1].type
        return known, lost

    def _remember(self, endpoint_id: str, rows: Sequence[TreeRow], statuses: Mapping[str, str]) -> None:
        by_job = {row.job_id: row for row in rows}
        storage.remember_members(
            self._database,
            endpoint_id,
            found={id_: status for id_, status in statuses.items() if id_ not in by_job},
            changed={
                row.watch_id: statuses[id_]
                for id_, row in by_job.items()
                if not row.root and id_ in statuses and statuses[id_] != row.evidence
            },
        )

    def _blocked(self, jobs: Mapping[str, JobRecord]) -> frozenset[str]:
        deferred = {id_: job for id_, job in jobs.items() if job.status == "deferred"}
        if not deferred:
            return frozenset()
        dependencies = [id_ for job in deferred.values() for id_ in job.dependency_ids]
        return blocked_jobs(deferred, read_statuses(self._redis, dependencies))

    def _report(
        self,
        endpoint_id: str,
        root: TreeRow,
        jobs: Mapping[str, JobRecord],
        verdict: TreeVerdict,
        now: datetime,
    ) -> None:
        record = jobs.get(root.job_id)
        run = record.run if record is not None else _unknown_run(root)
        ended = [job.ended_at for job in jobs.values() if job.ended_at is not None]
        ended_at = max(ended, default=None)
        result, truncated = self._result(root.job_id, record, verdict)
        occurrence = Occurrence(
            type=verdict.type,
            occurred_at=ended_at or now,
            source=SOURCE_RECONCILED,
            job_id=root.job_id,
            run=run,
            runid=record.runid if record is not None else None,
            func=record.func if record is not None else None,
            queue=record.queue if record is not None else None,
            enqueued_at=record.enqueued_at if record is not None else _time_of(run),
            started_at=record.started_at if record is not None else None,
            ended_at=ended_at,
            result=result,
            result_truncated=truncated,
            error=self._error(jobs) if verdict.type == JOB_FAILURE else None,
            scope="tree",
            jobs=verdict.counts,
        )
        self._publish([IngestItem(occurrence, (endpoint_id,))])

    def _result(self, root_id: str, root: JobRecord | None, verdict: TreeVerdict) -> tuple[Any, bool]:
        """Return what the root returned, if RQ still has it, and whether it was truncated."""
        if verdict.type != JOB_SUCCESS or root is None or not self._settings.include_result:
            return None, False
        value = read_result_value(self._redis, root_id)
        return (None, False) if value is UNKNOWN else dumps_capped(value, self._settings.max_payload_bytes)

    def _error(self, jobs: Mapping[str, JobRecord]) -> Mapping[str, str]:
        """Return the error of the member that failed first."""
        failed = [job for job in jobs.values() if job.status == "failed"]
        if not failed:
            return error_from_text("JobNotRun: a job of the tree waits for one that is gone")
        first = min(failed, key=lambda job: job.ended_at or job.created_at)
        results = read_results(self._redis, [first.job_id])[first.job_id]
        exc = next((result.exc for result in reversed(results) if result.type == "failure"), None)
        return error_from_text(exc or first.exc)


def _unknown_run(root: TreeRow) -> str:
    return root.run or "created:" + format_time(root.created_at)


def _time_of(run: str) -> datetime | None:
    return None if run.startswith("created:") else parse_time(run)
