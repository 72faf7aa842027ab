"""Decide what outcomes mean for a watch: what to publish and what to note. Pure: everything is passed in.

Decides which runs count, when an absent job is lost, and when absence proves nothing. How a run ended is
decided in :mod:`~flask_rq_webhooks.observe.outcomes`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ..protocol.events import CLOCK_SKEW, JOB_LOST, JOB_RETRYING, JOB_SUCCESS, format_time
from ..queue.job_reader import JobRecord
from ..queue.outbox_entry import OutboxEntry
from ..storage.reported_runs import Reported
from .outcomes import (
    Outcome,
    Undecided,
    by_report,
    is_loss_of,
    may_have_been_retried,
    news,
    outcome_of,
    unreported_outcomes,
)

#: Passes that must miss a job before it counts as lost: a job that is being replaced is absent for a moment.
#: A job absent for longer than a pass is reported as lost, and corrected when it is back.
LOST_AFTER_PASSES = 2
#: How long a reserved job id waits for its job: views may take minutes, pipelines may be executed later.
#: After that the watch is closed; a callback of the job still names the endpoint and is reported.
RESERVED_GRACE = timedelta(minutes=15)
#: How long a view that has not reported that it is done may enqueue further jobs of a tree; most servers kill
#: it by then. If it takes longer, a tree whose jobs so far have ended is reported before its last jobs.
VIEW_GRACE = timedelta(seconds=30)
#: How long reconcile waits for the callbacks of a job that carries them, because they know its result. If
#: they take longer, reconcile reports the same ending first, with the result as far as RQ keeps it.
CALLBACK_GRACE = timedelta(seconds=1.5)


def view_may_enqueue(status: str, created_at: datetime, now: datetime) -> bool:
    """Return whether the view that reserved a job of a tree may still be enqueuing others.

    :param status: of the watch, which was created at *created_at*; not ``"reserved"`` once the view is done.
    """
    return status == "reserved" and now - created_at <= VIEW_GRACE


class WatchAction(enum.Enum):
    """What to do with a watch, apart from publishing its outcomes."""

    #: The watch keeps waiting, or stays settled.
    WAIT = enum.auto()
    #: Its job is absent, and must be missing in another pass before that counts.
    MISSING = enum.auto()
    #: Its job is gone, and nobody reported how it ended.
    LOST = enum.auto()
    #: Its job id was reserved and never became a job of this request.
    UNUSED = enum.auto()
    #: The job is in a run that has not been reported: the watch is open, for this run.
    BEGAN = enum.auto()
    #: The job's newest run has been reported: the watch is settled with it.
    CAUGHT_UP = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchFacts:
    """What SQL knows about a watch.

    :param run: the last run noted; its ending has been reported if *settled* is true.
    :param counts_from: runs that began earlier do not count, unless the job carries our endpoint.
    :param report: a callback's report of an ending that RQ had not committed.
    """

    job_id: str
    endpoint_id: str | None
    status: str
    created_at: datetime
    counts_from: datetime
    run: str | None = None
    settled: bool = False
    missing_passes: int = 0
    report: OutboxEntry | None = None
    of_tree: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRead:
    """How far the callbacks' reports have been read, by Redis' clock.

    :param until: every report made before this time was read, and its event is stored.
    :param absent_since: a job missing in the previous pass was absent at this time; its reports are older.
    :param complete_until: like *until*, but no later than is certain; ``None`` if it is not needed.
    """

    until: datetime
    absent_since: datetime
    complete_until: datetime | None = None

    @property
    def has_all_of_absent(self) -> bool:
        """Return whether no report can be waiting about a job that was missing in the previous pass."""
        return self.until >= self.absent_since


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """What follows from a watch and RQ's committed state.

    :param outcomes: the outcomes to publish for the watch's endpoint.
    :param uses_report: whether the watch's report has been dealt with.
    """

    action: WatchAction = WatchAction.WAIT
    outcomes: tuple[Outcome, ...] = ()
    uses_report: bool = False


def conclude(
    watch: WatchFacts,
    job: JobRecord | None,
    reported: Sequence[Reported],
    *,
    now: datetime,
    outbox: OutboxRead,
) -> Conclusion:
    """Return what to do about a watch.

    :param job: the job with its results; ``None`` if RQ has no such job.
    :param reported: the job's endings that were reported, oldest first.
    """
    if job is None:
        return _of_absent_job(watch, reported, now=now, outbox=outbox)
    outcomes: list[Outcome] = []
    uses_report = False
    if watch.report is not None:
        outcome = outcome_of(watch.report.run, job, report=watch.report, reported=reported, patient=False)
        if isinstance(outcome, Outcome):
            outcomes.append(outcome)
        uses_report = outcome is not Undecided.UNCOMMITTED
    if not counts(watch, job):
        unused = watch.status == "reserved" and now - watch.created_at > RESERVED_GRACE
        action = WatchAction.UNUSED if unused else WatchAction.WAIT
        return Conclusion(
            action=action, outcomes=_published(watch, outcomes, reported, now), uses_report=uses_report
        )
    action = WatchAction.WAIT
    if job.run != watch.run and job.enqueued_at is not None and not _is_same_loss(watch, job, reported):
        earlier = _of_earlier_runs(watch, job, reported, outcomes)
        if job.tokens and any(
            outcome.result is not None and outcome.result.at >= outbox.until for outcome in earlier
        ):
            # The callback's report may still be unread; it tells which run this ending belongs to.
            return Conclusion(outcomes=_published(watch, outcomes, reported, now), uses_report=uses_report)
        outcomes += earlier
        is_reported = any(ending.run == job.run for ending in reported) and not watch.of_tree
        action = WatchAction.CAUGHT_UP if watch.settled and is_reported else WatchAction.BEGAN
    if not _callback_may_be_on_its_way(watch, job, now):
        outcome = outcome_of(job.run, job, report=_report_of(watch, job.run), patient=False)
        if isinstance(outcome, Outcome) and outcome not in outcomes:
            outcomes.append(outcome)
    return Conclusion(
        action=action, outcomes=_published(watch, outcomes, reported, now), uses_report=uses_report
    )


def _published(
    watch: WatchFacts, outcomes: Sequence[Outcome], reported: Sequence[Reported], now: datetime
) -> tuple[Outcome, ...]:
    """Return the outcomes in the form in which they are published.

    An open watch gets its ending even if it was reported to others: its endpoint may lack the delivery.
    """
    published = []
    for outcome in outcomes:
        new = news(outcome, reported, now=now)
        if new is None and not watch.settled and any(ending.run == outcome.run for ending in reported):
            new = outcome
        if new is not None and not (watch.settled and watch.of_tree):
            published.append(new)
    return tuple(published)


def _of_earlier_runs(
    watch: WatchFacts, job: JobRecord, reported: Sequence[Reported], of_report: Sequence[Outcome]
) -> list[Outcome]:
    """Return how the runs between the one noted on the watch and the current one ended.

    :param of_report: the outcomes taken from the report on the watch.
    """
    if watch.of_tree and watch.settled:
        return []
    noted = None if watch.run is None or watch.run.startswith("created:") else watch.run
    # A run whose report is stored on the watch is judged by that report.
    is_reported = (
        watch.settled
        or any(ending.run == noted for ending in reported)
        or (watch.report is not None and watch.report.run == noted)
    )
    earlier = unreported_outcomes(
        noted,
        job,
        reported,
        since=watch.counts_from,
        run_is_reported=is_reported,
        taken=[outcome.result for outcome in of_report if outcome.result is not None],
    )
    if not earlier and noted is not None and not is_reported and may_have_been_retried(job):
        return [Outcome(type=JOB_RETRYING, run=noted)]
    return earlier


def _of_absent_job(
    watch: WatchFacts, reported: Sequence[Reported], *, now: datetime, outbox: OutboxRead
) -> Conclusion:
    if watch.settled and watch.report is None:
        return Conclusion()
    if watch.report is not None:
        if not outbox.has_all_of_absent:
            return Conclusion()  # a later run's report may be unread and show that RQ retried this run
        outcome = news(by_report(watch.report), reported, now=now)
        return Conclusion(outcomes=() if outcome is None else (outcome,), uses_report=True)
    if not watch.of_tree and later_run(watch.run, reported) is not None:
        return Conclusion(action=WatchAction.CAUGHT_UP)  # it ran again: how this run ended is no longer known
    if watch.status == "reserved" and watch.run is None:
        unused = now - watch.created_at > RESERVED_GRACE
        return Conclusion(action=WatchAction.UNUSED if unused else WatchAction.WAIT)
    if watch.status == "reserved" and now - watch.created_at <= RESERVED_GRACE:
        return Conclusion()  # it may be in a pipeline that is not executed yet
    if watch.missing_passes + 1 < LOST_AFTER_PASSES:
        return Conclusion(action=WatchAction.MISSING)
    return Conclusion(action=WatchAction.LOST if outbox.has_all_of_absent else WatchAction.WAIT)


def lacks_report(outcome: Outcome, outbox: OutboxRead) -> bool:
    """Return whether a callback should have reported *outcome* but has not: they report every success."""
    at = outcome.ended_at if outcome.result is None else outcome.result.at
    return (
        outcome.type == JOB_SUCCESS
        and outcome.supersedes is None
        and at is not None
        and outbox.complete_until is not None
        and at < outbox.complete_until
    )


def later_run(run: str | None, reported: Sequence[Reported]) -> Reported | None:
    """Return the newest reported ending of a run later than *run*, the run noted on a watch."""
    if run is None or run.startswith("created:"):
        return None
    later = [ending for ending in reported if not ending.run.startswith("created:") and ending.run > run]
    return max(later, key=lambda ending: ending.run, default=None)


def outcome_of_loss(watch: WatchFacts) -> Outcome:
    """Return the outcome for a watch whose job is gone: how it ended is not known."""
    run = watch.run or "created:" + format_time(watch.created_at)
    return Outcome(type=JOB_LOST, run=run, committed=False)


def _is_same_loss(watch: WatchFacts, job: JobRecord, reported: Sequence[Reported]) -> bool:
    """Return whether the job was reported lost before its run had been noted, and is now back."""
    if watch.run is None or not watch.run.startswith("created:"):
        return False
    began = Outcome(type=JOB_SUCCESS, run=job.run)
    return any(ending.run == watch.run and is_loss_of(ending, began) for ending in reported)


def counts(watch: WatchFacts, job: JobRecord) -> bool:
    """Return whether the job's current run began after we promised to report it.

    A job whose callbacks carry the endpoint was enqueued for it, whatever the clocks say.
    Once a run has been noted on a watch that is no longer reserved, later runs count too.
    """
    if watch.endpoint_id is not None and watch.endpoint_id in job.tokens:
        return True
    if watch.run is not None and watch.status != "reserved":
        return True
    return (job.enqueued_at or job.created_at) >= watch.counts_from - CLOCK_SKEW


def _callback_may_be_on_its_way(watch: WatchFacts, job: JobRecord, now: datetime) -> bool:
    if job.ended_at is None or watch.report is not None or watch.endpoint_id not in job.tokens:
        return False
    return timedelta(0) <= now - job.ended_at < CALLBACK_GRACE


def _report_of(watch: WatchFacts, run: str) -> OutboxEntry | None:
    return watch.report if watch.report is not None and watch.report.run == run else None


# -- dependencies -----------------------------------------------------------------------------------------


def is_blocked(
    job: JobRecord, statuses: Mapping[str, str | None], *, blocked: frozenset[str] = frozenset()
) -> bool:
    """Return whether a deferred job waits for something that will not happen.

    :param statuses: the statuses of the jobs it depends on; ``None`` for absent ones.
    :param blocked: dependencies that are known to be blocked themselves.
    """
    if job.status != "deferred":
        return False
    for dependency in job.dependency_ids:
        status = statuses.get(dependency)
        if status in (None, "stopped", "canceled") or dependency in blocked:
            return True
        if status == "failed" and not job.allow_dependency_failures:
            return True
    return False
