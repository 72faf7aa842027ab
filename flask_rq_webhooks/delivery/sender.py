"""One thread's work: claim what is due, send it, record what came back.

Owns what is in flight, and when it is worth asking SQL for more. SQL is the truth: behind everything in
memory here stands a lease, and what is lost here is sent again under the same ``webhook-id``. Knows nothing
of RQ, of the outbox, nor of how bytes travel (:class:`~flask_rq_webhooks.delivery.transport.Transport`).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy.exc import DataError

from .. import signals
from .._steps import reached
from ..errors import ConfigurationError, DecryptionError, StorageUnavailableError
from ..protocol.headers import mask_headers
from ..protocol.retry import Decision
from ..protocol.urls import redact_url
from ..storage.deliveries import (
    AttemptRecord,
    ClaimedDelivery,
    claim_due,
    defer,
    next_due_in,
    record_attempts,
    release,
)
from .limits import RateLimiter
from .notices import Notices
from .sending import build_request
from .transport import AttemptRequest, AttemptResult, Transport

if TYPE_CHECKING:
    from ..state import State

logger = logging.getLogger(__name__)

#: Seconds a lease lasts beyond the deadline of the attempt it covers.
LEASE_MARGIN_S = 30.0
#: Longest time without a look at SQL: what other processes made due is seen at the latest then.
LONGEST_SLEEP_S = 1.0
#: The same while some host has all the requests in flight it may have.
CAPPED_SLEEP_S = 0.25
#: Seconds a delivery waits that cannot be signed or opened (wrong key); no attempt is spent.
UNSENDABLE_S = 60.0
#: Seconds for which results gather while others are still to come, so that they share a transaction.
GATHER_S = 0.004
#: The same, while the transport has not begun with all it was given: nobody waits for more.
LONGEST_GATHER_S = 0.05
#: First and longest pause while deliveries are due that cannot be claimed (host's minute full).
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5


class Sender:
    """Claim, send and record, step by step, in one thread.

    :param state: the app's state.
    :param transport: sends; its futures may be resolved in any thread.
    :param limiter: asked before every request.
    :param notices: told after every recorded attempt.
    :param concurrency: requests in flight at once.
    :param dispatcher_id: written into every attempt.
    """

    def __init__(
        self,
        state: State,
        *,
        transport: Transport,
        limiter: RateLimiter,
        notices: Notices,
        concurrency: int,
        dispatcher_id: str,
    ) -> None:
        self._state = state
        self._transport = transport
        self._limiter = limiter
        self._notices = notices
        self._concurrency = concurrency
        self._dispatcher_id = dispatcher_id
        self._woken = threading.Event()
        self._fresh = True  # something may have become due; set by any thread
        self._in_flight: dict[tuple[str, str], ClaimedDelivery] = {}
        self._per_host: Counter[str] = Counter()
        self._capped: set[str] = set()
        self._finished: deque[tuple[ClaimedDelivery, AttemptRequest, AttemptResult]] = deque()
        self._newest: Future[AttemptResult] | None = None
        self._enough = 1  # results worth a transaction of their own
        self._unrecorded: list[AttemptRecord] = []
        self._claim_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        #: When the latest look began that found nothing to do (monotonic); ``None`` while there is work.
        self.idle_since: float | None = None

    @property
    def in_flight(self) -> int:
        """Return how many requests are in flight."""
        return len(self._in_flight)

    def wake(self) -> None:
        """Say, from any thread, that a delivery may have become due."""
        self._fresh = True
        self._woken.set()

    def step(self) -> None:
        """Record what came back, send what is due, and wait until either may be worth doing again.

        :raises StorageUnavailableError: when SQL cannot be reached; results are kept, call again.
        """
        wait_s = self.advance()
        if wait_s > 0:
            self._woken.wait(wait_s)
            self._gather()

    def _gather(self) -> None:
        """Let more results come in, so that they share a transaction, while that keeps nobody waiting."""
        until = time.monotonic() + LONGEST_GATHER_S
        self._woken.clear()
        while 0 < len(self._finished) < self._enough and not self._fresh:
            self._woken.wait(GATHER_S)
            newest = self._newest
            if newest is None or newest.running() or newest.done() or time.monotonic() >= until:
                return

    def advance(self) -> float:
        """Record what came back and send what is due; return for how many seconds nothing more is expected.

        :raises StorageUnavailableError: when SQL cannot be reached; results are kept, call again.
        """
        self._woken.clear()
        began = time.monotonic()
        self._record()
        free = self._concurrency - len(self._in_flight)
        if free > 0 and (self._fresh or began >= self._claim_at):
            self._fresh = False
            try:
                self._send_due(min(free, self._state.settings.batch), began)
            except BaseException:
                self._fresh = True
                raise
        elif self._in_flight:
            self.idle_since = None
        if self._finished or self._fresh:
            return 0.0
        return LONGEST_SLEEP_S if free <= 0 else self._claim_at - time.monotonic()

    def finish(self, *, hurry: Callable[[], bool]) -> None:
        """Wait for what is in flight and record it; claim nothing more.

        :param hurry: says whether to release what is in flight instead; asked again and again.
        """
        # Every attempt has a deadline of its own, so this one only matters while SQL is away.
        give_up_at = time.monotonic() + self._state.settings.timeout + LEASE_MARGIN_S
        while (self._in_flight or self._unrecorded) and not hurry() and time.monotonic() < give_up_at:
            self._woken.wait(0.1)
            self._woken.clear()
            try:
                self._record()
            except StorageUnavailableError:
                time.sleep(0.1)
        try:
            self._record()
            if self._in_flight:
                logger.warning(
                    "%d requests in flight are released; they will be sent again.", len(self._in_flight)
                )
                release(self._state.database, list(self._in_flight.values()))
        except StorageUnavailableError as exc:
            logger.error(
                "%d attempts could not be recorded and will be made again under the same webhook-id: %s",
                len(self._unrecorded) + len(self._in_flight), exc,
            )  # fmt: skip

    # -- claim and send -------------------------------------------------------------------------------

    def _send_due(self, limit: int, began: float) -> None:
        settings = self._state.settings
        claimed = claim_due(
            self._state.database,
            limit=limit,
            per_host=settings.concurrency_per_host,
            in_flight=self._occupied(),
            lease_s=settings.timeout + LEASE_MARGIN_S,
        )
        if claimed:
            reached("delivery claimed")
            self.idle_since = None
            self._submit(claimed)
        self._capped = {
            host for host, count in self._per_host.items() if count >= settings.concurrency_per_host
        }
        now = time.monotonic()
        if len(claimed) == limit:
            self._claim_at = now
        elif self._capped:
            self._claim_at = now + CAPPED_SLEEP_S
        else:
            self._claim_at = now + self._sleep_s(bool(claimed), began)

    def _occupied(self) -> dict[str, int]:
        """Return what is in flight by host; one that had all its requests of this minute counts as full."""
        occupied = dict(self._per_host)
        if self._state.settings.rate_limit_policy == "defer":
            for host in self._limiter.full_hosts():
                occupied[host] = self._state.settings.concurrency_per_host
        return occupied

    def _sleep_s(self, claimed_some: bool, began: float) -> float:
        due_in = next_due_in(self._state.database)
        busy = bool(self._in_flight or self._unrecorded or self._finished)
        if due_in is None or due_in > 0:
            self._pause_s = FIRST_PAUSE_S
            self.idle_since = None if busy else began
            return LONGEST_SLEEP_S if due_in is None else min(due_in, LONGEST_SLEEP_S)
        if claimed_some:
            return 0.0
        # Due, and not to be had: its host's minute is full, or another dispatcher is claiming it.
        self.idle_since = began if self._limiter.full_hosts() and not busy else None
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return self._pause_s

    def _submit(self, claimed: Sequence[ClaimedDelivery]) -> None:
        unsendable: list[ClaimedDelivery] = []
        cause: Exception | None = None
        for delivery in claimed:
            wait_s = self._limiter.wait_s(delivery.host)
            if wait_s > 0:
                self._over_limit(delivery, wait_s)
                continue
            try:
                request = build_request(delivery, state=self._state, now=datetime.now(UTC))
            except (DecryptionError, ConfigurationError, ValueError) as exc:
                unsendable.append(delivery)
                cause = exc
                continue
            self._in_flight[delivery.id, delivery.lease_id] = delivery
            self._per_host[delivery.host] += 1
            self._enough = max(1, len(self._in_flight) // 2)
            self._newest = self._transport.submit(request)
            self._newest.add_done_callback(self._collector(delivery, request))
        if unsendable:
            endpoints = sorted({delivery.endpoint_id for delivery in unsendable})
            logger.error(
                "%d deliveries cannot be signed or opened; they wait %.0f s, no attempt is spent (%s): %s",
                len(unsendable), UNSENDABLE_S, ", ".join(endpoints[:5]), cause,
            )  # fmt: skip
            for delivery in unsendable:
                defer(self._state.database, delivery, delay_s=UNSENDABLE_S)

    def _collector(
        self, delivery: ClaimedDelivery, request: AttemptRequest
    ) -> Callable[[Future[AttemptResult]], None]:
        def collect(future: Future[AttemptResult]) -> None:
            self._finished.append((delivery, request, future.result()))
            if len(self._finished) in (1, self._enough):
                self._woken.set()

        return collect

    def _over_limit(self, delivery: ClaimedDelivery, wait_s: float) -> None:
        if self._state.settings.rate_limit_policy == "defer":
            defer(self._state.database, delivery, delay_s=wait_s)
            return
        self._unrecorded.append(
            AttemptRecord(
                delivery=delivery,
                started_at=datetime.now(UTC),
                duration_ms=0.0,
                status_code=None,
                error_code="rate_limited",
                error_detail="The destination host had all the requests of this minute; nothing was sent.",
                request_headers={},
                response_headers={},
                response_body=b"",
                decision=Decision(
                    status="exhausted", delay_s=None, disable_endpoint=False, error_code="rate_limited"
                ),
            )
        )
        self._woken.set()

    # -- record ---------------------------------------------------------------------------------------

    def _collect(self) -> None:
        settings = self._state.settings
        while self._finished:
            delivery, request, result = self._finished.popleft()
            if self._in_flight.pop((delivery.id, delivery.lease_id), None) is None:
                continue
            self._per_host[delivery.host] -= 1
            if not self._per_host[delivery.host]:
                del self._per_host[delivery.host]
            if delivery.host in self._capped:
                self._claim_at = 0.0
            decision = self._state.retry_policy.decide(
                status_code=result.status_code,
                error_code=result.error_code,
                number=delivery.number,
                max_attempts=delivery.max_attempts,
                retry_after=result.retry_after,
                now=datetime.now(UTC),
                random=random.random,
            )
            if decision.delay_s is not None:
                self._claim_at = min(self._claim_at, time.monotonic() + decision.delay_s)
            self._unrecorded.append(
                AttemptRecord(
                    delivery=delivery,
                    started_at=result.started_at,
                    duration_ms=result.duration_ms,
                    status_code=result.status_code,
                    error_code=decision.error_code,
                    error_detail=result.error_detail,
                    request_headers=mask_headers(request.headers, header_prefix=settings.header_prefix),
                    response_headers=result.response_headers,
                    response_body=result.response_body,
                    decision=decision,
                )
            )

    def _record(self) -> None:
        self._collect()
        while self._unrecorded:
            batch = self._unrecorded[: self._state.settings.batch]
            reached("attempt made")
            self._record_batch(batch)
            reached("attempt recorded")
            del self._unrecorded[: len(batch)]

    def _record_batch(self, batch: Sequence[AttemptRecord]) -> None:
        try:
            self._write(batch)
        except DataError as exc:
            if len(batch) > 1:
                for record in batch:
                    self._record_batch([record])
                return
            # What a receiver sent cannot be stored; the outcome must be, or the attempt is made for ever.
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
        outcome = record_attempts(
            self._state.database,
            records,
            dispatcher_id=self._dispatcher_id,
            disable_after=self._state.settings.disable_after,
        )
        told = [(record, outcome.recorded.get(record.delivery.id)) for record in records]
        recorded = [(record, status) for record, status in told if status is not None]
        if outcome.stale:
            logger.warning(
                "%d attempts were made under a lease that had run out, and will be made again under the same "
                "webhook-id: %s", len(outcome.stale), ", ".join(outcome.stale[:5]),
            )  # fmt: skip
        self._notices.publish(recorded)
        self._emit(recorded, outcome.disabled)

    def _emit(self, recorded: Iterable[tuple[AttemptRecord, str]], disabled: Mapping[str, str]) -> None:
        heard = (
            signals.delivery_succeeded.receivers
            or signals.attempt_failed.receivers
            or signals.delivery_exhausted.receivers
            or signals.endpoint_disabled.receivers
        )
        if not heard:
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
