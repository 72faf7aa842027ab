"""Alarms and metrics for monitoring, read from SQL and Redis, so they are the same in every process.

Alarms are conditions under which webhooks do not arrive although nothing fails; each says what to do. Those
of :func:`everywhere` are cheap enough for every page. This module defines the names of the metrics. Nothing
is counted in memory, so numbers need no summing and a restart loses nothing. No label contains a host or a
job: clients choose those.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from redis.exceptions import RedisError

from ..queue.outbox import age_of_oldest, missing_reports
from ..state import State
from ..storage.dispatchers import dispatcher_alive, paused_since
from ..storage.statistics import COUNT_CAP, Statistics, statistics
from ..version import __version__
from .api_contract import not_installed
from .formatting import OUTCOMES, moment, number, span

logger = logging.getLogger(__name__)

#: Number of outbox entries that a live dispatcher never lets accumulate.
OUTBOX_LONG = 500
#: Seconds a report may wait in the outbox. A dispatcher that keeps up stores it within 5.
STUCK_S = 60.0
#: A watch older than this belongs to a job that runs for days, or to one that is stuck.
WATCH_OLD = timedelta(days=1)
#: Seconds after which a due delivery is late.
LATE_S = 60.0


@dataclass(frozen=True, slots=True)
class Alarm:
    """One condition.

    :param text: the condition.
    :param advice: what to do.
    :param severe: whether it means that nothing is delivered.
    """

    text: str
    advice: str
    severe: bool = False


def everywhere(state: State) -> list[Alarm]:
    """Return alarms about what stops or endangers all deliveries now.

    :raises StorageUnavailableError: when SQL cannot be reached.
    """
    found = []

    def alarm(text: str, advice: str, *, severe: bool = False) -> None:
        found.append(Alarm(text, advice, severe))

    if not dispatcher_alive(state.database):
        alarm(
            "No dispatcher is alive: nothing is delivered.",
            "Start one: flask rq-webhooks worker",
            severe=True,
        )
    since = paused_since(state.database)
    if since is not None:
        alarm(f"All sending is paused since {moment(since)} UTC.", "Resume it on the overview.", severe=True)
    if not state.settings.enabled:
        alarm("RQ_WEBHOOKS_ENABLED is off: no webhooks are accepted.", "Accepted ones are still delivered.")
    try:
        waiting = state.outbox.length()
        rejected = state.outbox.rejected()
        silent = state.outbox.silent_callbacks()
        stuck = reports_are_stuck(state)
    except RedisError:
        alarm(
            "Redis cannot be reached: outcomes of jobs are not noticed.",
            "Run flask rq-webhooks doctor for the cause.",
            severe=True,
        )
        return found
    if waiting > OUTBOX_LONG:
        alarm(
            f"{number(waiting)} callbacks wait in the outbox, which can hold "
            f"{number(state.settings.outbox_maxlen)}.",
            "Dispatchers do not keep up, or none reads this outbox.",
        )
    if stuck:
        alarm(
            "Callback reports are read from the outbox, but nothing comes of them.",
            "See the dispatcher's log; its last error repeats there.",
            severe=True,
        )
    if silent:
        alarm(*missing_reports(state.outbox, silent))
    if rejected:
        alarm(
            f"{number(rejected)} outbox entries were set aside because they are malformed.",
            "See the dispatcher's log: another program writes to this Redis, or versions differ.",
        )
    return found


def reports_are_stuck(state: State) -> bool:
    """Return whether a callback report has waited so long that no live dispatcher can be processing it.

    :raises redis.RedisError: when Redis cannot be reached.
    """
    waited_s = age_of_oldest(state.redis, state.outbox.key)
    return waited_s is not None and waited_s > STUCK_S


def of_numbers(numbers: Statistics, now: datetime) -> list[Alarm]:
    """Return alarms that follow from the overview's numbers."""
    found = []
    if numbers.oldest_due_s is not None and numbers.oldest_due_s > LATE_S and numbers.paused_since is None:
        text = f"The oldest due delivery has been due for {span(numbers.oldest_due_s)}."
        found.append(Alarm(text, "Dispatchers are too few, stuck, or held back by a limit per host."))
    if numbers.endpoints_disabled:
        text = f"{number(numbers.endpoints_disabled, COUNT_CAP)} standing endpoints are disabled."
        found.append(Alarm(text, "Events they missed can be recovered when they are enabled."))
    age = None if numbers.oldest_watch is None else now - numbers.oldest_watch
    if age is not None and age > WATCH_OLD:
        text = f"The oldest job with a webhook has been waiting for {span(age.total_seconds())}."
        found.append(Alarm(text, "It is still running or queued, or no worker listens to its queue."))
    return found


# -- metrics for Prometheus -------------------------------------------------------------------------------

#: Content type of the response.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(state: State) -> bytes:
    """Return every metric in Prometheus' text format.

    :raises ApiError: without the package ``prometheus-client``.
    :raises StorageUnavailableError: when SQL cannot be reached.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ImportError as exc:
        raise not_installed("Metrics need", "prometheus-client", "metrics") from exc
    registry = CollectorRegistry()
    for name, about, value in _measured(state):
        label, values = value if isinstance(value, tuple) else (None, {None: value})
        gauge = Gauge(f"rq_webhooks_{name}", about, [label] if label else [], registry=registry)
        for label_value, one in values.items():
            (gauge.labels(label_value) if label else gauge).set(one)
    return generate_latest(registry)


#: A number; or the name of a label, and a number for each of its values.
Measured = float | tuple[str, Mapping[str, float]]


def _measured(state: State) -> Iterator[tuple[str, str, Measured]]:
    """Yield name, description and value of each metric. One that cannot be known is absent, not 0."""
    numbers = statistics(state.database, hours=1)
    yield "info", "Always 1; the version that answers.", ("version", {__version__: 1})
    about = "Deliveries kept, by status; counted up to 10000, and 10001 means more."
    yield "deliveries", about, ("status", numbers.counts)
    ended = {name: sum(getattr(hour, name) for hour in numbers.hours) for name in OUTCOMES}
    about = "Deliveries that ended within the last 60 minutes, by status; of the newest 50000."
    yield "deliveries_finished_last_hour", about, ("status", ended)
    about = "For how long the longest due delivery has been due; 0 when none is."
    yield "oldest_due_seconds", about, numbers.oldest_due_s or 0.0
    if numbers.p50_ms is not None and numbers.p95_ms is not None:
        quantiles = {"0.5": numbers.p50_ms / 1000, "0.95": numbers.p95_ms / 1000}
        about = "Quantiles of the duration of the newest 2000 attempts."
        yield "attempt_duration_seconds", about, ("quantile", quantiles)
    about = "Jobs whose ending is awaited, by status; counted up to 10000, and 10001 means more."
    yield "watches", about, ("status", numbers.watches)
    since = numbers.oldest_watch
    oldest_s = 0.0 if since is None else (datetime.now(UTC) - since).total_seconds()
    about = "For how long the oldest of them has been awaited; 0 when none is."
    yield "oldest_watch_seconds", about, max(0.0, oldest_s)
    yield "endpoints_disabled", "Standing endpoints that are disabled.", numbers.endpoints_disabled
    yield "dispatchers", "Dispatchers with a heartbeat within 30 s.", numbers.dispatchers
    yield "paused", "Whether all sending is paused.", numbers.paused_since is not None
    try:
        waiting, rejected = state.outbox.length(), state.outbox.rejected()
    except RedisError as exc:
        logger.warning("The outbox cannot be measured: %s: %s", type(exc).__name__, exc)
        yield "redis_up", "Whether Redis answered.", 0
        return
    yield "redis_up", "Whether Redis answered.", 1
    yield "outbox_entries", "Callbacks that no dispatcher has stored yet.", waiting
    yield "outbox_rejected_entries", "Outbox entries set aside as malformed.", rejected
