"""Claim due deliveries, sign them, and hand them to the transport, in one thread.

Deliveries that this process itself stores while nothing else is due need no separate claim: they are stored
as already claimed, under a lease like all others (:meth:`Sender.offer`).

This module decides when to ask SQL for more, and for how much. SQL is the truth: everything in memory here is
covered by a lease, and what is lost here is sent again under the same ``webhook-id``. Which hosts may have a
place is decided in :mod:`~flask_rq_webhooks.dispatch.host_limits`, and what a result means in
:mod:`~flask_rq_webhooks.dispatch.recorder`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from .. import tracing
from .._steps import reached
from ..errors import ConfigurationError, DecryptionError, StorageUnavailableError
from ..storage.attempts import error_code_for_status, latest_outcomes
from ..storage.claims import ClaimedDelivery, claim_due, defer, free_leases, next_due_in, release
from ..storage.models import new_id
from ..storage.subscriptions import AdvanceClaim
from .host_limits import HostRecords, InFlight, RateLimiter
from .http import AttemptRequest, AttemptResult, Transport
from .recorder import Recorder
from .request_builder import build_request

if TYPE_CHECKING:
    from ..state import State

logger = logging.getLogger(__name__)

#: Seconds a lease lasts beyond the deadline of the attempt it covers.
LEASE_MARGIN_S = 30.0
#: Longest time without checking SQL, where other processes may have made something due, seconds.
LONGEST_SLEEP_S = 1.0
#: The same while a host has its maximum number of requests in flight.
CAPPED_SLEEP_S = 0.25
#: Seconds for which a delivery that cannot be signed or decrypted is deferred; no attempt is spent.
UNSENDABLE_S = 60.0
#: Work claimed ahead of the transport, in seconds at its current pace, so that it never waits for SQL.
AHEAD_S = 0.1
#: Upper limit of the work claimed ahead, as a multiple of the concurrency.
AHEAD_MAX = 2
#: Seconds within which the transport must start a delivery claimed ahead; after that it is released.
QUEUED_S = 5.0
#: Minimum seconds over which the transport's pace is measured.
PACE_S = 0.1
#: Seconds for which free places accumulate for one claim, when nothing is claimed ahead.
GATHER_S = 0.004
#: First and longest pause while due deliveries cannot be claimed (host at its rate limit), seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5
#: Number of latest attempts read at the start.
RECENT_ATTEMPTS = 5000


class Sender:
    """Claim and send, step by step, in one thread.

    :param state: the app's state.
    :param transport: sends the requests; its futures may be resolved in any thread.
    :param limiter: asked before every request.
    :param recorder: receives every result.
    :param concurrency: maximum number of requests in flight.
    """

    def __init__(
        self,
        state: State,
        *,
        transport: Transport,
        limiter: RateLimiter,
        recorder: Recorder,
        concurrency: int,
    ) -> None:
        self._state = state
        self._transport = transport
        self._limiter = limiter
        self._recorder = recorder
        recorder.on_recorded = self._on_recorded
        self._concurrency = concurrency
        self._woken = threading.Event()
        self._fresh = True  # something may have become due; set by any thread
        self._freed = False  # a host that had no place has one again; set by any thread
        self._hosts = HostRecords()
        self._in_flight = InFlight(self._hosts, concurrency)
        self._held: dict[str, float] = {}  # hosts beyond their share, and until when they are deferred
        self._sweeps = False  # the latest claim met mostly such hosts: larger claims defer them faster
        self._queued: deque[tuple[float, Future[AttemptResult], ClaimedDelivery]] = deque()
        self._capped: frozenset[str] = frozenset()
        self._unwanted: list[ClaimedDelivery] = []  # to be released
        self._doubtful: list[str] = []  # leases of claims that may have succeeded although no answer came
        self._stored: deque[AdvanceClaim] = deque()  # advance claims whose deliveries are stored
        self._claiming = True  # if true, no places are offered; changed under the lock
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # held by the thread that submits requests
        self._enough_at = -1  # with at most so many in flight, a claim is worth it; negative: none is wanted
        self._pace = _Pace()
        self._claim_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        #: Start of the latest check that found nothing to do (monotonic); ``None`` while there is work.
        self.idle_since: float | None = None

    @property
    def in_flight(self) -> int:
        """Return how many requests are in flight or queued in the transport."""
        return len(self._in_flight)

    def wake(self) -> None:
        """Signal that a delivery may have become due; may be called from any thread."""
        self._fresh = True
        self._woken.set()

    def offer(self) -> AdvanceClaim | None:
        """Offer places for deliveries that are about to be stored; may be called from any thread.

        ``None`` while any other delivery is known to wait for a place, so that none is overtaken.
        """
        if self._claiming or self._fresh or self._freed or time.monotonic() >= self._claim_at:
            return None
        lease_s = self._state.settings.timeout + LEASE_MARGIN_S
        return AdvanceClaim(lease_id=new_id("lea"), lease_s=lease_s, take_place=self._keep_place)

    def _keep_place(self, host: str) -> bool:
        # Not during a claim, which has already counted the places.
        with self._lock:
            return (
                not self._claiming
                and self._room() > 0
                and host not in self._capped
                and self._in_flight.has_place(host)
                and self._in_flight.keep_place(host, most=self._state.settings.concurrency_per_host)
            )

    def take(self, claim: AdvanceClaim) -> None:
        """Send what was stored with *claim*; the calling thread does so itself if the sender's is idle."""
        if not claim.hosts:
            return
        self._stored.append(claim)
        if self._turn.acquire(blocking=False):
            try:
                self._send_stored(time.monotonic())
            finally:
                self._turn.release()
        else:
            self._woken.set()

    def withdraw(self, claim: AdvanceClaim) -> None:
        """Free the places of *claim* and any deliveries stored with it; may be called from any thread."""
        if claim.hosts:
            self._in_flight.free_places(claim.hosts.values())
            self._doubtful.append(claim.lease_id)
            self.wake()

    def step(self) -> None:
        """Send what is due, and wait until there may be more.

        :raises StorageUnavailableError: when SQL cannot be reached; call again.
        """
        with self._turn:
            wait_s = self.advance()
        if wait_s <= 0 or not self._woken.wait(wait_s) or self._fresh or self._stored:
            return
        if self._freed or not self._ahead():
            time.sleep(GATHER_S)

    def advance(self) -> float:
        """Send what is due; return for how many seconds nothing more is expected.

        :raises StorageUnavailableError: when SQL cannot be reached; call again.
        """
        self._woken.clear()
        self._enough_at = -1
        if not self._hosts.restored:
            self._hosts.restore(latest_outcomes(self._state.database, RECENT_ATTEMPTS))
        began = time.monotonic()
        self._take_back(began)
        self._send_stored(began)
        self._pace.measure(self._in_flight.answered, began)
        with self._lock:
            room = self._room()
            claims = room > 0 and (self._fresh or self._freed or began >= self._claim_at)
            self._claiming = claims
        if claims:
            self._fresh = self._freed = False
            try:
                batch = self._state.settings.batch
                self._send_due(batch if self._sweeps else min(room, batch), began)
            except BaseException:
                self._fresh = True
                raise
            finally:
                self._claiming = False
        elif self._is_busy():
            self.idle_since = None
        wait_s = 0.0 if self._fresh or self._freed else self._claim_at - time.monotonic()
        if room > 0 and wait_s > 0:
            return wait_s
        # There may be more to send than there is room for.
        limit = self._concurrency + self._ahead()
        self._enough_at = limit - max(1, self._ahead() // 2)
        if self._room() > 0 and len(self._in_flight) <= self._enough_at:
            return 0.0
        return LONGEST_SLEEP_S

    def finish(self, *, hurry: Callable[[], bool]) -> None:
        """Wait for the requests in flight and record their results; claim nothing more.

        :param hurry: returns whether to release them instead; asked repeatedly.
        """
        while self._stored:  # the thread that offered them has ended
            self.withdraw(self._stored.popleft())
        # Every attempt has a deadline of its own, so this one only matters while SQL is down.
        give_up_at = time.monotonic() + self._state.settings.timeout + LEASE_MARGIN_S
        while self._is_busy() and not hurry() and time.monotonic() < give_up_at:
            try:
                self._take_back(float("inf"))
                self._recorder.record()
            except StorageUnavailableError:
                time.sleep(0.1)
            if self._in_flight:
                self._recorder.wait(0.1)
        try:
            self._recorder.record()
            self._give_back()
            self._free_doubtful()
            left = self._in_flight.deliveries()
            if left:
                logger.warning("%d requests in flight are released; they will be sent again.", len(left))
                release(self._state.database, left)
        except StorageUnavailableError as exc:
            logger.error(
                "%d attempts could not be recorded and will be made again under the same webhook-id: %s",
                len(self._recorder) + len(self._in_flight), exc,
            )  # fmt: skip

    def _ahead(self) -> int:
        """Return how many to claim beyond the concurrency, so that the transport never waits for a claim."""
        return min(AHEAD_MAX * self._concurrency, int(self._pace.per_second * AHEAD_S))

    def _room(self) -> int:
        limit = self._concurrency + self._ahead()
        if len(self._recorder) >= 4 * limit:
            return 0  # SQL cannot keep up, or is down: send nothing whose result cannot be recorded
        return limit - self._in_flight.places_taken

    def _is_busy(self) -> bool:
        return bool(len(self._in_flight) or len(self._recorder) or self._stored)

    def _take_back(self, now: float) -> None:
        """Release what the transport has not started in time: the lease covers the request, not a queue."""
        while self._queued:
            since, future, delivery = self._queued[0]
            if not (future.running() or future.done()):
                if now - since < QUEUED_S:
                    break
                if future.cancel():
                    self._in_flight.remove(delivery, answered=False)
                    self._unwanted.append(delivery)
            self._queued.popleft()
        self._give_back()

    def _give_back(self) -> None:
        if self._unwanted:
            release(self._state.database, self._unwanted)
            self._unwanted.clear()

    def _free_doubtful(self) -> None:
        if doubtful := list(self._doubtful):
            free_leases(self._state.database, doubtful)
            del self._doubtful[: len(doubtful)]

    def _send_stored(self, now: float) -> None:
        """Send what was stored as claimed; free it if that was too long ago for the lease."""
        while self._stored:
            claim = self._stored.popleft()
            if now - claim.began > QUEUED_S:
                self.withdraw(claim)
                continue
            reached("delivery claimed")
            self.idle_since = None
            try:
                self._submit(claim.claimed)
            finally:
                self._in_flight.free_places(claim.hosts.values())

    def _send_due(self, limit: int, began: float) -> None:
        settings = self._state.settings
        self._free_doubtful()
        lease_id = new_id("lea")
        begun = Counter(self._in_flight.per_host())
        try:
            claimed = claim_due(
                self._state.database,
                limit=limit,
                per_host=settings.concurrency_per_host,
                in_flight=self._occupied(),
                lease_s=settings.timeout + LEASE_MARGIN_S,
                lease_id=lease_id,
            )
        except StorageUnavailableError:
            self._doubtful.append(lease_id)
            raise
        if claimed:
            reached("delivery claimed")
            self.idle_since = None
            self._submit(claimed)
        # Hosts that may have more due than this claim could take. A hanging host is always among them, and
        # must not hide that results from other hosts have made room since.
        begun.update(delivery.host for delivery in claimed)
        self._capped = self._full(begun)
        if self._capped - self._full(self._in_flight.per_host()):
            self._freed = True
        now = time.monotonic()
        if len(claimed) == limit:
            self._claim_at = now
        elif self._capped:
            self._claim_at = now + CAPPED_SLEEP_S
        else:
            self._claim_at = now + self._sleep_s(bool(claimed), began)

    def _full(self, requests: Mapping[str, int]) -> frozenset[str]:
        """Return the hosts that have their maximum number of requests in flight."""
        most = self._state.settings.concurrency_per_host
        return frozenset(host for host, count in requests.items() if count >= most)

    def _occupied(self) -> dict[str, int]:
        """Return the requests in flight by host; a host without requests left this minute counts as full."""
        occupied = self._in_flight.per_host()
        if self._state.settings.rate_limit_policy == "defer":
            for host in self._limiter.full_hosts():
                occupied[host] = self._state.settings.concurrency_per_host
        return occupied

    def _sleep_s(self, claimed_some: bool, began: float) -> float:
        due_in = next_due_in(self._state.database)
        busy = self._is_busy()
        if due_in is None or due_in > 0:
            self._pause_s = FIRST_PAUSE_S
            waits = any(until > began for until in self._held.values())
            self.idle_since = None if busy or waits else began
            return LONGEST_SLEEP_S if due_in is None else min(due_in, LONGEST_SLEEP_S)
        if claimed_some:
            return 0.0
        # Due but not available: the host is at its rate limit, or another dispatcher is claiming it.
        self.idle_since = began if self._limiter.full_hosts() and not busy else None
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return self._pause_s

    def _submit(self, claimed: Sequence[ClaimedDelivery]) -> None:
        over_limit: dict[str, list[ClaimedDelivery]] = {}
        held: list[ClaimedDelivery] = []
        unsendable: list[ClaimedDelivery] = []
        cause: Exception | None = None
        for number, delivery in enumerate(claimed):
            if not self._in_flight.has_place(delivery.host):
                held.append(delivery)
                continue
            if self._limiter.wait_s(delivery.host) > 0:
                over_limit.setdefault(delivery.host, []).append(delivery)
                continue
            span = _span_of(delivery)
            try:
                request = build_request(delivery, state=self._state, now=datetime.now(UTC), span=span)
            except (DecryptionError, ConfigurationError, ValueError) as exc:
                unsendable.append(delivery)
                cause = exc
                continue
            self._in_flight.add(delivery)
            try:
                future = self._transport.submit(request)
            except BaseException:
                self._in_flight.remove(delivery, answered=False)
                self._unwanted += [*claimed[number:], *held, *unsendable, *chain(*over_limit.values())]
                raise
            self._queued.append((time.monotonic(), future, delivery))
            future.add_done_callback(self._collector(delivery, request, span))
        for host, deliveries in over_limit.items():
            self._put_off(host, deliveries)
        self._sweeps = 2 * len(held) > len(claimed) and self._in_flight.is_doubtful
        if held:
            self._hold_back(held)
        if unsendable:
            endpoints = sorted({delivery.endpoint_id for delivery in unsendable})
            logger.error(
                "%d deliveries cannot be signed or opened; they wait %.0f s, no attempt is spent (%s): %s",
                len(unsendable), UNSENDABLE_S, ", ".join(endpoints[:5]), cause,
            )  # fmt: skip
            defer(self._state.database, unsendable, delay_s=UNSENDABLE_S)

    def _hold_back(self, deliveries: Sequence[ClaimedDelivery]) -> None:
        """Defer deliveries beyond their share, about as long as the hosts ahead of them need.

        Otherwise a claim might meet thousands of them before it meets others.
        """
        now = time.monotonic()
        self._held = {host: until for host, until in self._held.items() if until > now}
        if not self._held:
            logger.warning(
                "Hosts that are new, fail or never succeeded have their whole share of the requests in "
                "flight; %d deliveries to such hosts wait. No attempt is spent, and other hosts do not wait.",
                len(deliveries),
            )
        delay_s = self._in_flight.hold_s(len(self._held) + len(deliveries))
        self._held |= dict.fromkeys((delivery.host for delivery in deliveries), now + delay_s)
        defer(self._state.database, deliveries, delay_s=delay_s)

    def _collector(
        self, delivery: ClaimedDelivery, request: AttemptRequest, span: Any
    ) -> Callable[[Future[AttemptResult]], None]:
        def collect(future: Future[AttemptResult]) -> None:
            if future.cancelled():
                return  # taken back
            result = future.result()
            if span is not None:
                _end(span, result)
            self._hosts.note(delivery.host, result)
            self._recorder.add(delivery, request, result)
            self._in_flight.remove(delivery, answered=True)
            if delivery.host in self._capped:
                self._freed = True
                self._woken.set()
            elif len(self._in_flight) <= self._enough_at:
                self._woken.set()

        return collect

    def _put_off(self, host: str, deliveries: Sequence[ClaimedDelivery]) -> None:
        if self._state.settings.rate_limit_policy == "defer":
            defer(self._state.database, deliveries, delay_s=self._limiter.full_hosts().get(host, 0.05))
            return
        for delivery in deliveries:
            self._recorder.add_refusal(
                delivery,
                "rate_limited",
                "The destination host had all the requests of this minute; nothing was sent.",
            )

    def _on_recorded(self, retry_in_s: float | None) -> None:
        if retry_in_s is not None and retry_in_s < LONGEST_SLEEP_S:
            self.wake()
        elif len(self._in_flight) <= self._enough_at:
            self._woken.set()  # there was no room because too much waited to be recorded


def _span_of(delivery: ClaimedDelivery) -> Any:
    """Start the span of an attempt; a span that is never ended is never reported."""
    attributes = {
        "http.request.method": "POST",
        "server.address": delivery.host,
        "rq_webhooks.event_id": delivery.event_id,
        "rq_webhooks.event_type": delivery.event_type,
        "rq_webhooks.job_id": delivery.job_id,
        "rq_webhooks.delivery_id": delivery.id,
        "rq_webhooks.attempt": delivery.number,
    }
    return tracing.start("rq_webhooks attempt", delivery.trace, "CLIENT", attributes)


def _end(span: Any, result: AttemptResult) -> None:
    status = result.status_code
    known = {} if status is None else {"http__response__status_code": status}
    tracing.end(
        span, result.error_code or (None if status is None else error_code_for_status(status)), **known
    )


class _Pace:
    """The number of results per second."""

    def __init__(self) -> None:
        self.per_second = 0.0
        self._since = time.monotonic()
        self._answered = 0

    def measure(self, answered: int, now: float) -> None:
        """Update the pace from the number of results up to *now*."""
        if now - self._since >= PACE_S:
            self.per_second = (answered - self._answered) / (now - self._since)
            self._since, self._answered = now, answered
