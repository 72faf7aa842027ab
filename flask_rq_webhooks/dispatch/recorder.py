"""Record the results of attempts, and report them as signals, status notices, and events for operators.

This module owns results from their arrival until they are in SQL, what they mean for their delivery, and
the batch sizes for writing them. ``webhook.delivery_exhausted`` and ``webhook.endpoint_disabled`` are stored
in the transaction that records the attempt, so that a crash loses both or neither, and only if a standing
endpoint subscribes to them. Events about a tenant's endpoint belong to the tenant and contain no more than a
client may know. This module knows neither what is due nor how requests are sent.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .. import signals
from .._steps import reached
from ..observe.publisher import Publisher
from ..protocol.events import (
    DELIVERY_EXHAUSTED,
    ENDPOINT_DISABLED,
    JOB_PROGRESS,
    OPERATOR_TYPES,
    SOURCE_APPLICATION,
    WEBHOOK_PING,
    Occurrence,
)
from ..protocol.headers import mask_headers
from ..protocol.urls import redact_url
from ..storage.attempts import (
    PROGRESS_SCHEDULE,
    AttemptRecord,
    Decision,
    RecordResult,
    coarse_code,
    record_attempts,
)
from ..storage.claims import ClaimedDelivery
from ..storage.events import IngestedEvent, IngestItem
from ..storage.models import EXHAUSTED
from ..storage.sql_errors import DataError
from ..storage.subscriptions import wanted_by_standing
from .http import AttemptRequest, AttemptResult
from .pubsub import Notices

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..state import State

logger = logging.getLogger(__name__)

#: Seconds for which results are collected while others are still expected, so that they share a transaction.
#: No request waits for it: a place is free as soon as its result has arrived.
GATHER_S = 0.02
#: Longest time between checks, seconds.
LONGEST_SLEEP_S = 1.0


def judge(
    state: State, delivery: ClaimedDelivery, request: AttemptRequest, result: AttemptResult
) -> AttemptRecord:
    """Decide what a result means for its delivery; return the attempt to record."""
    policy = state.retry_policy.for_endpoint(delivery.retry_schedule, delivery.retry_statuses)
    if delivery.event_type == JOB_PROGRESS:
        policy = replace(policy, schedule=PROGRESS_SCHEDULE, max_retry_after_s=PROGRESS_SCHEDULE[-1])
    decision = policy.decide(
        status_code=result.status_code,
        error_code=result.error_code,
        number=delivery.number,
        max_attempts=delivery.max_attempts,
        retry_after=result.retry_after,
        now=datetime.now(UTC),
        random=random.random,
        retry_4xx=delivery.format != "task" or delivery.retry_statuses is not None,
    )
    return AttemptRecord(
        delivery=delivery,
        started_at=result.started_at,
        duration_ms=result.duration_ms,
        status_code=result.status_code,
        error_code=decision.error_code,
        error_detail=result.error_detail,
        request_headers=mask_headers(request.headers, header_prefix=state.settings.header_prefix),
        response_headers=result.response_headers,
        response_body=result.response_body,
        decision=decision,
    )


class Recorder:
    """Record results, step by step, in one thread.

    :param state: the app's state.
    :param notices: publishes every recorded attempt; with ``None``, nothing is published.
    :param dispatcher_id: stored with every attempt.
    """

    def __init__(self, state: State, *, notices: Notices | None, dispatcher_id: str) -> None:
        self._state = state
        self._notices = notices
        self._dispatcher_id = dispatcher_id
        self._publisher = Publisher(state)
        self._arrived: deque[tuple[ClaimedDelivery, AttemptRequest, AttemptResult] | AttemptRecord] = deque()
        self._unrecorded: list[AttemptRecord] = []
        self._woken = threading.Event()
        #: Called after every batch with the seconds until its first retry, if there is one.
        self.on_recorded: Callable[[float | None], None] = lambda retry_in_s: None

    def __len__(self) -> int:
        """Return how many attempts are waiting to be recorded."""
        return len(self._arrived) + len(self._unrecorded)

    def add(self, delivery: ClaimedDelivery, request: AttemptRequest, result: AttemptResult) -> None:
        """Accept a result; may be called from any thread."""
        self._arrived.append((delivery, request, result))
        if not self._woken.is_set():
            self._woken.set()

    def add_refusal(self, delivery: ClaimedDelivery, error_code: str, detail: str) -> None:
        """Accept an attempt that ended its delivery without sending; may be called from any thread."""
        self._arrived.append(
            AttemptRecord(
                delivery=delivery,
                started_at=datetime.now(UTC),
                duration_ms=0.0,
                status_code=None,
                error_code=error_code,
                error_detail=detail,
                request_headers={},
                response_headers={},
                response_body=b"",
                decision=Decision(
                    status="exhausted", delay_s=None, disable_endpoint=False, error_code=error_code
                ),
            )
        )
        self._woken.set()

    def wake(self) -> None:
        """Make :meth:`step` return soon; may be called from any thread."""
        self._woken.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until there may be something to record."""
        if not len(self):
            self._woken.wait(timeout_s)
        self._woken.clear()

    def step(self, *, more_to_come: Callable[[], object] = lambda: False) -> None:
        """Wait for results and record them.

        :param more_to_come: returns whether requests are still in flight.
        :raises StorageUnavailableError: when SQL cannot be reached; the results are kept, call again.
        """
        self.wait(LONGEST_SLEEP_S)
        until = time.monotonic() + GATHER_S
        while 0 < len(self) < self._state.settings.batch and more_to_come():
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(left_s, GATHER_S / 4))
        self.record()

    def record(self) -> None:
        """Record the results that have arrived so far, not those that arrive meanwhile.

        :raises StorageUnavailableError: when SQL cannot be reached; the results are kept, call again.
        """
        for _ in range(len(self._arrived)):
            one = self._arrived[0]  # stays here, and so is counted, until it is in the other list
            self._unrecorded.append(one if isinstance(one, AttemptRecord) else judge(self._state, *one))
            self._arrived.popleft()
        while self._unrecorded:
            batch = self._unrecorded[: self._state.settings.batch]
            reached("attempt made")
            self._record_batch(batch)
            reached("attempt recorded")
            del self._unrecorded[: len(batch)]
            delays = [one.decision.delay_s for one in batch if one.decision.delay_s is not None]
            self.on_recorded(min(delays, default=None))

    def _record_batch(self, batch: Sequence[AttemptRecord]) -> None:
        try:
            self._write(batch)
        except DataError as exc:
            if len(batch) > 1:
                for record in batch:
                    self._record_batch([record])
                return
            # The receiver's response cannot be stored. The outcome must be, or the attempt is repeated.
            logger.error(
                "The answer to delivery %s cannot be stored, only its outcome: %s", batch[0].delivery.id, exc
            )
            self._write(
                [
                    replace(
                        batch[0],
                        error_detail="The receiver's answer could not be stored.",
                        response_headers={},
                        response_body=b"",
                    )
                ]
            )

    def _write(self, records: Sequence[AttemptRecord]) -> None:
        published: list[IngestedEvent] = []

        def publish(connection: Connection, outcome: RecordResult) -> None:
            published.clear()
            if outcome.disabled or EXHAUSTED in outcome.recorded.values():
                published.extend(publish_for_operators(self._publisher, connection, records, outcome))

        outcome = record_attempts(
            self._state.database,
            records,
            dispatcher_id=self._dispatcher_id,
            disable_after=self._state.settings.disable_after,
            in_transaction=publish,
        )
        if published:
            self._publisher.announce(published)
            self.on_recorded(0.0)
        statuses = [(record, outcome.recorded.get(record.delivery.id)) for record in records]
        recorded = [(record, status) for record, status in statuses if status is not None]
        if outcome.stale:
            logger.warning(
                "%d attempts are not recorded: they are already, or their delivery was deleted, or they "
                "were made under a lease that had run out; then they are made again, same webhook-id: %s",
                len(outcome.stale), ", ".join(outcome.stale[:5]),
            )  # fmt: skip
        if self._notices is not None:
            self._notices.publish(recorded)
        self._emit(recorded, outcome.disabled)

    def _emit(self, recorded: Iterable[tuple[AttemptRecord, str]], disabled: Mapping[str, str]) -> None:
        has_receivers = (
            signals.delivery_succeeded.receivers
            or signals.attempt_failed.receivers
            or signals.delivery_exhausted.receivers
            or signals.endpoint_disabled.receivers
        )
        if not has_receivers:
            return
        app = self._state.app
        with app.app_context():
            for record, status in recorded:
                delivery = record.delivery
                what = {
                    "delivery_id": delivery.id,
                    "event_id": delivery.event_id,
                    "job_id": delivery.job_id,
                    "url": redact_url(delivery.url),
                    "attempts": delivery.number,
                }
                if status == "succeeded":
                    signals.emit(signals.delivery_succeeded, app, **what)
                    continue
                what |= {"error_code": record.decision.error_code, "status_code": record.status_code}
                signals.emit(signals.attempt_failed, app, **what)
                if status == "exhausted":
                    signals.emit(signals.delivery_exhausted, app, **what)
            for endpoint_id, reason in disabled.items():
                signals.emit(signals.endpoint_disabled, app, endpoint_id=endpoint_id, reason=reason)


# -- events for operators ---------------------------------------------------------------------------------

#: Deliveries of these types cause no events: a failing endpoint of an operator would cause ever more.
_NOT_REPORTED = OPERATOR_TYPES | {WEBHOOK_PING}


def publish_for_operators(
    publisher: Publisher, connection: Connection, records: Sequence[AttemptRecord], result: RecordResult
) -> list[IngestedEvent]:
    """Store the events that *records* cause, in the transaction that records them.

    :returns: the events to pass to :meth:`Publisher.announce` after the commit.
    """
    # If there are two attempts of one delivery, the one under the later lease was recorded.
    newest = {one.delivery.id: one for one in sorted(records, key=lambda one: one.delivery.lease_id)}
    exhausted = [
        record
        for record in newest.values()
        if result.recorded.get(record.delivery.id) == EXHAUSTED
        and record.delivery.event_type not in _NOT_REPORTED
    ]
    if not exhausted and not result.disabled:
        return []
    tenants = {record.delivery.tenant for record in records if record.delivery.tenant is not None}
    wanted = wanted_by_standing(connection, OPERATOR_TYPES, tenants)

    def is_wanted(event_type: str, tenant: str | None) -> bool:
        return event_type in wanted.get(None, ()) or event_type in wanted.get(tenant, ())

    found = [
        IngestItem(_occurrence(DELIVERY_EXHAUSTED, _of_delivery(record)), tenant=record.delivery.tenant)
        for record in exhausted
        if is_wanted(DELIVERY_EXHAUSTED, record.delivery.tenant)
    ]
    of_endpoint = {record.delivery.endpoint_id: record.delivery for record in records}
    for endpoint_id, reason in sorted(result.disabled.items()):
        delivery = of_endpoint[endpoint_id]
        if is_wanted(ENDPOINT_DISABLED, delivery.tenant):
            data = {"endpoint_id": endpoint_id, "url": redact_url(delivery.url), "reason": reason}
            found.append(IngestItem(_occurrence(ENDPOINT_DISABLED, data), tenant=delivery.tenant))
    return publisher.publish_within(connection, found) if found else []


def _occurrence(event_type: str, data: dict[str, Any]) -> Occurrence:
    return Occurrence(type=event_type, occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION, data=data)


def _of_delivery(record: AttemptRecord) -> dict[str, Any]:
    delivery, code = record.delivery, record.decision.error_code
    return {
        "delivery_id": delivery.id,
        "event_id": delivery.event_id,
        "event": delivery.event_type,
        "job_id": delivery.job_id,
        "endpoint_id": delivery.endpoint_id,
        "url": redact_url(delivery.url),
        "attempts": delivery.number,
        "error_code": code if delivery.tenant is None else coarse_code(code),
        "status_code": record.status_code,
    }
