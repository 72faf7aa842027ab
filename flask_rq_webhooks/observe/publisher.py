"""Publish: turn outcomes into occurrences, and store those as events with deliveries, each once.

Shared by ingest, reconcile, ``send`` and the test ping. Calls the host's own functions (scrub and payload
formats) in such a way that their errors lose no event. Emits ``event_recorded`` after the commit. Does not
decide how a run ended: :mod:`~flask_rq_webhooks.observe.outcomes` does.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from rq.defaults import UNSERIALIZABLE_RETURN_VALUE_PAYLOAD

from .. import signals
from .._steps import reached
from ..config import Settings
from ..protocol.events import (
    JOB_FAILURE,
    JOB_PROGRESS,
    JOB_SUCCESS,
    SOURCE_CALLBACK,
    SOURCE_RECONCILED,
    TERMINAL_TYPES,
    Occurrence,
    parse_time,
)
from ..protocol.job_errors import error_from_text
from ..protocol.json_safe import dumps_capped, safe_text, to_json_safe
from ..protocol.payloads import FORMATS, RenderContext, Rendered
from ..queue.job_reader import JobRecord, read_result_value
from ..queue.outbox_entry import OutboxEntry
from ..queue.safe_pickle import UNKNOWN, progress_in
from ..storage import reported_runs
from ..storage.database import Database
from ..storage.events import Held, IngestedEvent, IngestItem, ingest, ingest_within
from ..storage.sql_errors import is_about_a_row
from ..storage.subscriptions import AdvanceClaim
from ..storage.watches import WatchRow
from ..tracing import EventSpans
from .outcomes import Outcome, reported_at

if TYPE_CHECKING:
    from redis import Redis
    from sqlalchemy import Connection

    from ..state import State
    from ..storage.database import Database
    from ..storage.subscriptions import EndpointRow

logger = logging.getLogger(__name__)

#: Maximum length of a run's name in characters.
MAX_RUN_NAME = 512

#: What a scrub function may change.
_EDITABLE = ("runid", "result", "error", "progress", "data")


class Consignee(Protocol):
    """The sender in the same process that takes the deliveries stored here."""

    def wake(self) -> None:
        """Tell the sender, from any thread, that deliveries have become due."""

    def offer(self) -> AdvanceClaim | None:
        """Offer places for deliveries about to be stored; ``None`` if they must be claimed later instead.

        Each claim is returned by one call of :meth:`take` or :meth:`withdraw`.
        """

    def take(self, claim: AdvanceClaim) -> None:
        """Send the deliveries that were stored and committed with *claim*."""

    def withdraw(self, claim: AdvanceClaim) -> None:
        """Free the places of *claim*, whether or not anything was stored with it."""


class Publisher:
    """Store occurrences, each once.

    :param state: the app's state.
    :param sender: this process's sender, if any. It gets new deliveries without having to claim them.
    :param on_ended: called with the ids of jobs whose endings were stored: their trees may be over now.
    """

    def __init__(
        self,
        state: State,
        *,
        sender: Consignee | None = None,
        on_ended: Callable[[Iterable[str]], None] = lambda job_ids: None,
    ) -> None:
        self._state = state
        self._sender = sender
        self._on_ended = on_ended
        self._max_attempts = state.settings.max_attempts
        self._render = safe_render(state)
        self._scrub = safe_scrub(state)

    @property
    def database(self) -> Database:
        """Return the database that stores the events."""
        return self._state.database

    def publish(
        self, items: Sequence[IngestItem], *, max_attempts: int | None = None, held: Held | None = None
    ) -> list[IngestedEvent]:
        """Store *items* in one transaction, then emit ``event_recorded`` for those that are new.

        :param max_attempts: attempts per delivery if the endpoint sets none; ``MAX_ATTEMPTS`` by default.
        :param held: the transaction, if it has already begun.
        :raises StorageUnavailableError: when SQL cannot be reached; none of *items* is stored.
        """
        state = self._state
        spans = EventSpans()
        claim = self._sender.offer() if self._sender is not None else None
        try:
            with state.app.app_context():  # the host's scrub function and formats may need one
                events = ingest(
                    state.database,
                    items,
                    render=self._render,
                    max_attempts=max_attempts or self._max_attempts,
                    scrub=self._scrub,
                    begin=spans.begin,
                    claim=claim,
                    repeated=self._sender is not None,  # a dispatcher retries until it succeeds
                    held=held,
                )
        except BaseException:
            if self._sender is not None and claim is not None:
                self._sender.withdraw(claim)  # the commit may have succeeded and its answer been lost
            raise
        reached("event stored")
        if self._sender is not None and claim is not None:
            self._sender.take(claim)
        spans.end(event.event_id for event in events if event.created)
        self.announce(events, to_be_claimed=claim is None or not claim.complete)
        return events

    def publish_within(self, connection: Connection, items: Sequence[IngestItem]) -> list[IngestedEvent]:
        """Store *items* as part of the caller's transaction.

        :returns: the events to pass to :meth:`announce` after the commit.
        """
        state = self._state
        with state.app.app_context():
            return ingest_within(
                state.database,
                connection,
                items,
                render=self._render,
                max_attempts=self._max_attempts,
                scrub=self._scrub,
            )

    def announce(self, events: Sequence[IngestedEvent], *, to_be_claimed: bool = True) -> None:
        """Wake the sender and emit ``event_recorded`` for the stored events.

        :param to_be_claimed: whether the sender must claim new deliveries.
        """
        state = self._state
        with state.app.app_context():
            if self._sender is not None and to_be_claimed and any(event.deliveries for event in events):
                self._sender.wake()
            self._on_ended(event.job_id for event in events if event.job_id and event.type in TERMINAL_TYPES)
            if signals.event_recorded.receivers:
                for event in events:
                    if event.created:
                        signals.emit(
                            signals.event_recorded,
                            state.app,
                            event_id=event.event_id,
                            event_type=event.type,
                            job_id=event.job_id,
                        )


# -- the host's own functions -----------------------------------------------------------------------------


def safe_scrub(state: State) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return the host's scrub function, wrapped so that it never raises and always returns JSON; or ``None``.

    If it fails, result, error, progress and data are left out: it is better to send too little than to send
    what it should have removed.
    """
    scrub = state.hooks.scrub_function
    if scrub is None:
        return None

    def scrubbed(payload: dict[str, Any]) -> dict[str, Any]:
        try:
            edited = scrub(payload)
            edited = payload if edited is None else edited
            kept = {name: to_json_safe(edited.get(name)) for name in _EDITABLE}
            if kept["runid"] is not None:
                # Make it fit into a PostgreSQL index.
                kept["runid"] = safe_text(kept["runid"], MAX_RUN_NAME).replace("\0", "")
            return kept
        except Exception:
            logger.exception(
                "The scrub function failed for %s of job %r; it is published without result, error, progress "
                "and data.",
                payload.get("event"), payload.get("job_id"),
            )  # fmt: skip
            return {"runid": payload.get("runid")}

    return scrubbed


def safe_render(state: State) -> Callable[[EndpointRow, str, Occurrence], bytes | Rendered]:
    """Return :meth:`State.render`, wrapped so that it never raises.

    If the host's format fails or is not registered here, the event is rendered in the format ``job``, without
    result, error and progress.
    """

    def render(endpoint: EndpointRow, event_id: str, occurrence: Occurrence) -> bytes | Rendered:
        try:
            return state.render(endpoint, event_id, occurrence)
        except Exception:
            logger.exception(
                "Format %r cannot render %s of job %r for endpoint %s; it is sent in the format 'job', "
                "without result, error and progress.",
                endpoint.format, occurrence.type, occurrence.job_id, endpoint.id,
            )  # fmt: skip
        return FORMATS["job"](
            replace(occurrence, result=None, error=None, progress=None),
            RenderContext(
                event_id=event_id,
                runid=endpoint.runid or occurrence.runid,
                reference=endpoint.reference,
                traceback="none",
                include_result=False,
                max_bytes=state.settings.max_payload_bytes,
            ),
        )

    return render


# -- what reconcile found ---------------------------------------------------------------------------------

#: Stores occurrences as events and deliveries, each once, in one transaction.
Publish = Callable[[Sequence[IngestItem]], object]

#: The most occurrences published in one transaction.
AT_ONCE = 200


@dataclass(slots=True)
class ReconcileReport:
    """What one pass did.

    :param looked_at: watches compared with RQ's state.
    :param reported: occurrences published, by type; some may have been published before.
    :param silent_successes: jobs that carry our callbacks and finished without a report in the outbox.
    :param adopted: reserved watches whose job was found.
    :param cleaned_queues: number of queues in which RQ ended jobs whose worker was gone.
    """

    looked_at: int = 0
    reported: Counter[str] = field(default_factory=Counter)
    silent_successes: int = 0
    adopted: int = 0
    cleaned_queues: int = 0


class PendingEvents:
    """The occurrences of one page of watches."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: dict[str, tuple[Occurrence, dict[str, bool]]] = {}
        self._losses: dict[str, Occurrence] = {}

    def add(self, row: WatchRow, occurrence: Occurrence) -> None:
        """Note that *occurrence* is for the endpoint of *row*."""
        key = occurrence.run_key or ""
        _first, receivers = self._found.setdefault(key, (occurrence, {}))
        # A watch that stays open would otherwise make us publish the event again in every pass.
        receivers[row.endpoint_id or ""] = row.scope == "tree" or occurrence.type not in TERMINAL_TYPES

    def add_loss(self, row: WatchRow, occurrence: Occurrence) -> None:
        """Note that a job is lost; all watches of a job report the same run, that of the first loss."""
        self.add(row, self._losses.setdefault(row.job_id, occurrence))

    def publish(self, publish: Publish) -> Counter[str]:
        """Publish what is new, in batches.

        :returns: how many occurrences were published, by type.
        """
        items = self._new_items()
        published: list[IngestItem] = []
        for start in range(0, len(items), AT_ONCE):
            reached("reconcile found")
            published += publish_some(publish, items[start : start + AT_ONCE])
        return Counter(item.occurrence.type for item in published)

    def _new_items(self) -> list[IngestItem]:
        """Return the items, except those that are already stored and settle no watch."""
        idle = [key for key, (_, receivers) in self._found.items() if all(receivers.values())]
        known = reported_runs.known_keys(self._database, idle) if idle else set()
        return [
            IngestItem(occurrence, tuple(endpoint_id for endpoint_id in receivers if endpoint_id))
            for key, (occurrence, receivers) in self._found.items()
            if key not in known
        ]


def publish_some(publish: Publish, items: Sequence[IngestItem]) -> Sequence[IngestItem]:
    """Publish *items* and return those that were stored: one that cannot be does not stop the others."""
    try:
        publish(items)
    except Exception as exc:
        if not is_about_a_row(exc):
            raise
        if len(items) > 1:
            middle = len(items) // 2
            return [*publish_some(publish, items[:middle]), *publish_some(publish, items[middle:])]
        logger.exception("The event of job %r cannot be stored; it is left out.", items[0].occurrence.job_id)
        return []
    return items


# -- from an outcome to an occurrence ---------------------------------------------------------------------


def occurrence_of_report(
    report: OutboxEntry, outcome: Outcome, settings: Settings, job: JobRecord | None = None
) -> Occurrence:
    """Return what a callback reported, as far as it agrees with the outcome.

    :param job: the job as RQ keeps it; its meta holds the last progress.
    """
    result, truncated, error = None, False, None
    if outcome.type == JOB_SUCCESS and settings.include_result:
        if report.kind == "success":
            result, truncated = _reported_result(report, settings.max_payload_bytes)
        else:
            truncated = True  # RQ committed a success; this callback does not know its result
    elif outcome.type == JOB_FAILURE:
        error = report.error if report.kind == "failure" else error_from_text(outcome.exc)
    ended_at = outcome.ended_at or reported_at(report)
    return Occurrence(
        type=outcome.type,
        occurred_at=ended_at,
        source=SOURCE_CALLBACK,
        job_id=report.job_id,
        run=outcome.run,
        runid=report.runid,
        func=report.func,
        queue=report.queue,
        enqueued_at=_time(report.enqueued_at),
        started_at=_time(report.started_at),
        ended_at=ended_at,
        result=result,
        result_truncated=truncated,
        error=error,
        supersedes=outcome.supersedes,
        progress=_progress(job, outcome, settings),
    )


def _progress(job: JobRecord | None, outcome: Outcome, settings: Settings) -> Any:
    """Return the progress in the job's meta if the job is still in the run that the outcome belongs to."""
    shown = outcome.type in TERMINAL_TYPES or outcome.type == JOB_PROGRESS
    if job is None or not job.meta or not shown or job.run != outcome.run:
        return None
    return progress_in(job.meta, settings.progress_meta_key)


def occurrence_of_loss(job_id: str, outcome: Outcome, *, now: datetime) -> Occurrence:
    """Return the occurrence for a job that is gone: how it ended is not known."""
    return Occurrence(
        type=outcome.type,
        occurred_at=now,
        source=SOURCE_RECONCILED,
        job_id=job_id,
        run=outcome.run,
        enqueued_at=None if outcome.run.startswith("created:") else parse_time(outcome.run),
    )


class OccurrenceReader:
    """Build occurrences from what RQ keeps, with results unless ``INCLUDE_RESULT`` is false."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self.settings = settings

    def of_job(
        self, job: JobRecord, outcome: Outcome, *, report: OutboxEntry | None = None, now: datetime
    ) -> Occurrence:
        """Return how a run of a job ended, according to what RQ committed.

        :param report: what the run's callback reported, which may know the result better than RQ does.
        """
        is_current = outcome.result is None and outcome.run == job.run
        result, truncated, error = None, False, None
        if outcome.type == JOB_SUCCESS:
            result, truncated = self._result(job, outcome, report, is_current=is_current)
        elif outcome.type == JOB_FAILURE:
            known: Mapping[str, str] | None = report.error if report is not None else None
            error = known or error_from_text(outcome.exc)
        return Occurrence(
            type=outcome.type,
            occurred_at=outcome.ended_at or now,
            source=SOURCE_RECONCILED,
            job_id=job.job_id,
            run=outcome.run,
            runid=job.runid,
            func=job.func,
            queue=job.queue,
            enqueued_at=job.enqueued_at if is_current else _began(outcome),
            started_at=job.started_at if is_current else _started(outcome),
            ended_at=outcome.ended_at,
            result=result,
            result_truncated=truncated,
            error=error,
            supersedes=outcome.supersedes,
            progress=_progress(job, outcome, self.settings),
        )

    def _result(
        self, job: JobRecord, outcome: Outcome, report: OutboxEntry | None, *, is_current: bool
    ) -> tuple[Any, bool]:
        if not self.settings.include_result:
            return None, False
        if report is not None and report.kind == "success":
            return _reported_result(report, self.settings.max_payload_bytes)
        # RQ keeps only one return value per job: that of the newest success.
        newest = next((result for result in reversed(job.results or ()) if result.type == "success"), None)
        if not is_current and outcome.supersedes is None and newest is not outcome.result:
            return None, True
        value = read_result_value(self._redis, job.job_id)
        if value is UNKNOWN or value == UNSERIALIZABLE_RETURN_VALUE_PAYLOAD:
            return None, True
        return dumps_capped(value, self.settings.max_payload_bytes)


def _reported_result(report: OutboxEntry, max_payload_bytes: int) -> tuple[Any, bool]:
    """Return the result in a report; it is already JSON, and no larger than the report it was read from."""
    too_large = (
        not 0 < report.size <= max_payload_bytes
        and len(json.dumps(report.result, separators=(",", ":"))) > max_payload_bytes
    )
    return (None, True) if too_large else (report.result, report.result_truncated)


def _began(outcome: Outcome) -> datetime | None:
    """Return when an earlier run was enqueued, or ``None`` for an unseen run: its time is not known."""
    run = outcome.run.removeprefix("created:")
    began = parse_time(run)
    return None if outcome.ended_at is not None and began >= outcome.ended_at else began


def _started(outcome: Outcome) -> datetime | None:
    return outcome.result.started_at if outcome.result is not None else None


def _time(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text)
