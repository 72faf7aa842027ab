"""The dispatcher process: threads that ingest, send, record and heartbeat, and a graceful shutdown.

This module owns the process lifecycle: threads recover from errors, signals stop the process, and periodic
jobs run in the main thread. The work of the threads is in :mod:`~flask_rq_webhooks.observe.ingest`,
:mod:`~flask_rq_webhooks.dispatch.sender` and :mod:`~flask_rq_webhooks.dispatch.recorder`.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from redis.exceptions import RedisError, ResponseError

from ..errors import RQWebhooksError, StorageUnavailableError
from ..observe.ingest import Ingest
from ..observe.publisher import Publisher
from ..observe.reconcile import Reconciler, ReconcileReport
from ..queue.outbox import missing_reports
from ..storage.claims import free_expired_leases
from ..storage.dispatchers import drop_reconcile_lease, forget_dead, heartbeat, sign_off, take_reconcile_lease
from ..storage.models import new_id
from ..storage.retention import Pruned, erase_finished, prune
from ..storage.sql_errors import is_away
from .host_limits import RateLimiter
from .http import Transport, open_transport
from .pubsub import Notices
from .recorder import Recorder
from .sender import Sender

if TYPE_CHECKING:
    from ..state import State

logger = logging.getLogger(__name__)

#: Seconds between heartbeats, and between checks for expired leases.
HEARTBEAT_S = 5.0
#: Seconds without a completed step after which a thread counts as stuck and heartbeats stop.
STUCK_S = 60.0
#: Seconds between checks of trees in which a job ended; done by every dispatcher, with or without the lease.
TREES_S = 0.5
#: Seconds between pruning rounds, and between the parts of one round.
PRUNE_S, PRUNE_AGAIN_S = 3600.0, 5.0
#: Seconds per part: deliveries are sent meanwhile, and the main thread has other work to do.
PRUNE_PART_S = 0.4
#: Rows per pruning transaction: SQLite lets nobody else write meanwhile.
PRUNE_BATCH = 50
#: Seconds after a missed pass until another dispatcher takes over. Two concurrent passes do no harm.
LEASE_SPARE_S = 5.0
#: First and longest pause after an error, seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodicJob:
    """A job that the main thread runs periodically.

    It runs in the main thread because RQ cleans its registries correctly only there.

    :param name: shown in the log.
    :param interval_s: seconds from one start to the next.
    :param first_after_s: seconds until the first start.
    :param run: called with a function that returns whether to stop early.
    """

    name: str
    interval_s: float
    first_after_s: float = 0.0
    run: Callable[[Callable[[], bool]], object]


def reconcile_now(state: State) -> ReconcileReport | None:
    """Look once for endings that no callback reported; return ``None`` if a dispatcher is already doing so.

    :raises StorageUnavailableError: when SQL cannot be reached.
    :raises redis.RedisError: when Redis cannot be reached.
    """
    owner = new_id("cli")
    if not take_reconcile_lease(state.database, owner, _lease_s(state)):
        return None
    try:
        return _reconciler(state, Publisher(state)).run_once()
    finally:
        drop_reconcile_lease(state.database, owner)


def _reconciler(state: State, publisher: Publisher) -> Reconciler:
    return Reconciler(
        state.database,
        state.redis,
        publish=publisher.publish,
        settings=state.settings,
        outbox_key=state.outbox.key,
    )


def _lease_s(state: State) -> float:
    return 2 * state.settings.reconcile_interval + LEASE_SPARE_S


def wait_for_sql(state: State, on_alive: Callable[[], bool]) -> None:
    """Return as soon as SQL can be used; while it cannot be reached, try again every few seconds.

    Call this before creating a :class:`Dispatcher`, because the names of our Redis keys are stored in SQL.
    SIGTERM and SIGINT end the process.

    :param on_alive: called after each failed try; ``False`` ends the process.
    :raises StorageUnavailableError: when SQL refuses access or our tables are missing.
    """

    def leave(*_: object) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    waiting = False
    try:
        while True:
            try:
                forget_dead(state.database)
                return
            except StorageUnavailableError as exc:
                if not is_away(exc):
                    raise
                if not waiting:
                    logger.error("Waiting for SQL; nothing is lost: %s", exc)
                waiting = True
            if not on_alive():
                leave()
            time.sleep(LONGEST_PAUSE_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Dispatcher:
    """Deliver until stopped.

    :param state: the app's state.
    :param transport: sends the requests; created here by default. One that is passed in is not closed here.
    :param concurrency: maximum number of requests in flight; ``CONCURRENCY`` by default.
    :param periodic: jobs for the main thread in addition to the built-in ones, such as reconcile and pruning.
    :param on_alive: called every few seconds while no thread is stuck; ``False`` stops the dispatcher.
    :raises StorageUnavailableError: when SQL cannot be reached.
    """

    def __init__(
        self,
        state: State,
        *,
        transport: Transport | None = None,
        concurrency: int | None = None,
        periodic: Sequence[PeriodicJob] = (),
        on_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        settings = state.settings
        self.id = new_id("dsp")
        self._state = state
        self._concurrency = concurrency or settings.concurrency
        self._limiter = RateLimiter(state.redis, settings.rate_limit_per_minute, namespace=state.namespace)
        self._notices = Notices.from_settings(settings)
        self._own_transport = transport is None
        self._transport = transport or open_transport(
            settings, state.url_policy, concurrency=self._concurrency
        )
        self._recorder = Recorder(state, notices=self._notices, dispatcher_id=self.id)
        self._sender = Sender(
            state,
            transport=self._transport,
            limiter=self._limiter,
            recorder=self._recorder,
            concurrency=self._concurrency,
        )
        publisher = Publisher(state, sender=self._sender)
        self._reconciler = _reconciler(state, publisher)
        trees = self._reconciler.trees
        hinting = Publisher(state, sender=self._sender, on_ended=trees.look_sooner)
        self._ingest = Ingest(state, consumer=self.id, publisher=hinting)
        interval_s = settings.reconcile_interval
        self._periodic = [
            PeriodicJob(
                name="reconcile", interval_s=interval_s, first_after_s=interval_s, run=self._reconcile
            ),
            *self._progress_job(),
            PeriodicJob(name="trees", interval_s=TREES_S, run=lambda _should_stop: trees.run_hinted()),
            PeriodicJob(name="prune", interval_s=PRUNE_AGAIN_S, first_after_s=PRUNE_S / 60, run=self._prune),
            *periodic,
        ]
        self._on_alive = on_alive
        self._stop_requested = False
        self._hurry = False
        self._troubles: dict[str, type[BaseException]] = {}
        self._alive_at: dict[str, float] = {}
        self._outbox_empty_since: float | None = None
        self._prune_at = 0.0
        self._ended_by: tuple[str, BaseException] | None = None
        self._warned_of_silence = False
        self._poke_read, self._poke_write = os.pipe()
        os.set_blocking(self._poke_write, False)

    # -- lifecycle ------------------------------------------------------------------------------------

    def run(self, *, burst: bool = False) -> None:
        """Run until :meth:`stop`, SIGTERM or SIGINT; then finish the requests in flight and return.

        A second signal ends the wait: requests in flight are released and will be sent again under the same
        ``webhook-id``. May be called only once.

        :param burst: return as soon as the outbox is empty and nothing is due; no periodic jobs.
        :raises StorageUnavailableError: when SQL cannot be reached at the start.
        :raises RQWebhooksError: when a function of the host app called ``sys.exit()``.
        """
        heartbeat(self._state.database, self.id, started=True)
        logger.info(
            "Dispatcher %s started: up to %d requests in flight, %d per host.",
            self.id, self._concurrency, self._state.settings.concurrency_per_host,
        )  # fmt: skip
        work = {
            "ingest": self._ingest.run_once,
            "send": self._sender.step,
            "record": partial(self._recorder.step, more_to_come=lambda: self._sender.in_flight),
            "heartbeat": self._show_life,
        }
        threads = [
            threading.Thread(target=self._work, args=item, name=f"rq-webhooks-{item[0]}")
            for item in work.items()
        ]
        with self._signals():
            for thread in threads:
                thread.start()
            try:
                self._run_periodic_jobs(burst=burst)
            finally:
                self._stop_requested = True
                self._sender.wake()
                self._recorder.wake()
                for thread in threads:
                    while thread.is_alive():  # one long join would keep Python from handling signals
                        thread.join(0.1)
                try:
                    self._sender.finish(hurry=lambda: self._hurry)
                finally:
                    self._close()
        logger.info("Dispatcher %s stopped.", self.id)
        if self._ended_by is not None:
            name, cause = self._ended_by
            raise RQWebhooksError(
                f"The dispatcher stopped because something {_what_ended(cause)} during {name!r}: "
                "look at your scrub, payload_format and signal functions; the log has the traceback."
            ) from cause

    def stop(self) -> None:
        """Ask :meth:`run` to finish what is in flight and return. May be called from any thread."""
        self._stop_requested = True
        self._poke()
        self._sender.wake()
        self._recorder.wake()

    def _close(self) -> None:
        if self._own_transport:
            self._transport.close(wait=not self._hurry)
        self._limiter.close()
        if self._notices is not None:
            self._notices.close()
        os.close(self._poke_read)
        os.close(self._poke_write)
        try:
            sign_off(self._state.database, self.id)
        except StorageUnavailableError as exc:
            logger.warning("Dispatcher %s could not sign off: %s", self.id, exc)

    # -- the main thread ------------------------------------------------------------------------------

    def _run_periodic_jobs(self, *, burst: bool) -> None:
        started = time.monotonic()
        due = {job.name: started + job.first_after_s for job in self._periodic}
        while not self._stop_requested:
            for job in () if burst else self._periodic:
                if time.monotonic() >= due[job.name] and not self._stop_requested:
                    due[job.name] = time.monotonic() + job.interval_s
                    self._attempt(job.name, partial(job.run, lambda: self._stop_requested))
            if burst and self._nothing_left():
                return
            self._wait(0.01 if burst else min(due.values()) - time.monotonic())

    def _nothing_left(self) -> bool:
        """Return whether the outbox is empty and, checked after that, nothing is due or in flight."""
        try:
            empty = self._ingest.is_idle()
        except RedisError:
            empty = False  # the ingest thread logs it
        if not empty:
            self._outbox_empty_since = None
            return False
        if self._outbox_empty_since is None:
            self._outbox_empty_since = time.monotonic()
        idle_since = self._sender.idle_since
        if idle_since is not None and idle_since >= self._outbox_empty_since:
            return True
        self._sender.wake()
        return False

    def _reconcile(self, should_stop: Callable[[], bool]) -> None:
        if not take_reconcile_lease(self._state.database, self.id, _lease_s(self._state)):
            return  # another dispatcher does it
        report = self._reconciler.run_once(should_stop)
        if report.reported:
            logger.info("Reconcile reported endings that no callback had: %s", dict(report.reported))
        self._notice_silent_callbacks(report.silent_successes)

    def _progress_job(self) -> list[PeriodicJob]:
        """Return the job that publishes progress more often than reconcile does, if that is configured."""
        interval_s = self._state.settings.progress_interval
        if interval_s is None or interval_s >= self._state.settings.reconcile_interval:
            return []

        def publish(should_stop: Callable[[], bool]) -> None:
            if take_reconcile_lease(self._state.database, self.id, _lease_s(self._state)):
                self._reconciler.publish_progress(should_stop)

        return [PeriodicJob(name="progress", interval_s=interval_s, first_after_s=interval_s, run=publish)]

    def _notice_silent_callbacks(self, count: int) -> None:
        """Log once that reports are missing from the outbox, and why, if that is known."""
        if not count:
            return
        self._state.outbox.note_silent_callbacks(count)
        if not self._warned_of_silence and (silent := self._state.outbox.silent_callbacks()):
            self._warned_of_silence = True
            what, advice = missing_reports(self._state.outbox, silent)
            logger.warning("%s %s Until then such webhooks wait for reconcile.", what, advice)

    def _prune(self, should_stop: Callable[[], bool]) -> None:
        """Prune for a moment. The next call does the rest; if nothing is left, pruning pauses for an hour."""
        began = time.monotonic()
        if began < self._prune_at:
            return
        days = timedelta(days=self._state.settings.retention_days)
        now = datetime.now(UTC)
        hours = self._state.settings.payload_retention_hours
        if hours is not None and (
            erased := erase_finished(self._state.database, now - timedelta(hours=hours))
        ):
            logger.info("Erased the bodies of %d deliveries.", erased)
        pruned = prune(
            self._state.database,
            now - days,
            batch=PRUNE_BATCH,
            should_stop=lambda: should_stop() or time.monotonic() - began > PRUNE_PART_S,
        )
        if time.monotonic() - began <= PRUNE_PART_S:
            self._prune_at = began + PRUNE_S
        if pruned != Pruned():
            logger.info("Pruned: %s", pruned)

    # -- signals --------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # Use only attributes and a pipe: the interrupted code may already hold a lock we would take here.
        self._hurry = self._stop_requested
        self._stop_requested = True
        self._poke()

    def _poke(self) -> None:
        try:
            os.write(self._poke_write, b"x")
        except OSError:
            return  # the pipe is full, so there is enough to read; or closed, so nothing waits

    def _wait(self, timeout_s: float) -> None:
        readable, _, _ = select.select([self._poke_read], [], [], max(0.0, timeout_s))
        if readable:
            os.read(self._poke_read, 4096)

    # -- threads --------------------------------------------------------------------------------------

    def _work(self, name: str, step: Callable[[], object]) -> None:
        """Repeat *step* until stopped, with growing pauses after errors."""
        pause_s = FIRST_PAUSE_S
        while not self._stop_requested:
            if self._attempt(name, step):
                pause_s = FIRST_PAUSE_S
            else:
                self._sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _attempt(self, name: str, step: Callable[[], object]) -> bool:
        """Run *step* and return whether it succeeded: the only place where a thread recovers from errors."""
        try:
            step()
        except (StorageUnavailableError, RedisError) as exc:
            if not isinstance(exc, ResponseError):  # a server that answers and refuses is not an outage
                self._alive_at[name] = time.monotonic()
            if self._troubles.get(name) is not type(exc):
                self._troubles[name] = type(exc)
                logger.error(
                    "%s: %s: %s. Nothing is lost; trying until it works.", name, type(exc).__name__, exc
                )
            return False
        except Exception:
            # Not counted as progress: a thread that never completes a step must not look healthy.
            logger.exception("%s: an unexpected error; trying again.", name)
            return False
        except BaseException as exc:
            # A function of the host app called sys.exit() or let asyncio's CancelledError escape. That would
            # end only this thread; the others would go on as if nothing were missing.
            logger.exception("%s: something %s; the dispatcher stops.", name, _what_ended(exc))
            self._ended_by = self._ended_by or (name, exc)
            self.stop()
            return False
        self._alive_at[name] = time.monotonic()
        if self._troubles.pop(name, None) is not None:
            logger.warning("%s: works again.", name)
        return True

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stop_requested and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _show_life(self) -> None:
        stuck = [
            name
            for name in ("ingest", "send", "record")
            if time.monotonic() - self._alive_at.setdefault(name, time.monotonic()) > STUCK_S
        ]
        if stuck:
            logger.error(
                "No heartbeat: %s has not got through for more than %.0f s.", " and ".join(stuck), STUCK_S
            )
        else:
            if not self._on_alive():
                self.stop()
            heartbeat(self._state.database, self.id, started=False)
        if free_expired_leases(self._state.database):
            self._sender.wake()
        self._sleep(HEARTBEAT_S)


def _what_ended(cause: BaseException) -> str:
    if isinstance(cause, SystemExit):
        return f"called sys.exit({cause.code!r})"
    return f"raised {type(cause).__name__}"
