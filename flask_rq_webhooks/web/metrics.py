"""Metrics for Prometheus, read from SQL and Redis: the same in every process, and correct with many.

Owns the names of the metrics. Nothing is counted in memory, so nothing has to be summed and a restart loses
nothing. No label holds a host or a job: clients choose those. Knows nothing of permissions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from ..errors import ConfigurationError
from ..state import State
from ..storage.statistics import Statistics, statistics
from ..version import __version__

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

logger = logging.getLogger(__name__)

#: Content type of the answer.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(state: State) -> bytes:
    """Return every metric in Prometheus' text format.

    :raises ConfigurationError: without the package ``prometheus-client``.
    :raises StorageUnavailableError: when SQL cannot be reached.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as exc:
        raise ConfigurationError(
            "Metrics need the package prometheus-client; install it with "
            "pip install 'flask-rq-webhooks[metrics]'."
        ) from exc
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(state))
    return generate_latest(registry)


class _Collector:
    """Read everything for one answer.

    :param state: the app's state.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering this reads no names from SQL."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this moment."""
        numbers = statistics(self._state.database, hours=1)
        yield _gauge("info", "Always 1; the version that answers.", {(__version__,): 1}, ["version"])
        yield from _of_sql(numbers, datetime.now(UTC))
        yield from self._of_redis()

    def _of_redis(self) -> Iterable[Metric]:
        outbox = self._state.outbox
        try:
            waiting: int | None = outbox.length()
            rejected: int | None = outbox.rejected()
        except RedisError as exc:
            logger.warning("The outbox cannot be measured: %s: %s", type(exc).__name__, exc)
            waiting = rejected = None
        yield _gauge("redis_up", "Whether Redis answered.", {(): float(waiting is not None)})
        if waiting is None or rejected is None:
            return  # absent, not 0: nobody knows
        yield _gauge("outbox_entries", "Callbacks that no dispatcher has stored yet.", {(): waiting})
        yield _gauge("outbox_rejected_entries", "Outbox entries set aside as malformed.", {(): rejected})


def _of_sql(numbers: Statistics, now: datetime) -> Iterable[Metric]:
    yield _gauge(
        "deliveries",
        "Deliveries kept, by status; counted up to 10000, and 10001 means more.",
        {(status,): count for status, count in numbers.counts.items()},
        ["status"],
    )
    finished = {
        status: sum(getattr(hour, status) for hour in numbers.hours)
        for status in ("succeeded", "exhausted", "canceled")
    }
    yield _gauge(
        "deliveries_finished_last_hour",
        "Deliveries that ended within the last 60 minutes, by status; of the newest 50000.",
        {(status,): count for status, count in finished.items()},
        ["status"],
    )
    yield _gauge(
        "oldest_due_seconds",
        "For how long the longest due delivery has been due; 0 when none is.",
        {(): numbers.oldest_due_s or 0.0},
    )
    if numbers.p50_ms is not None and numbers.p95_ms is not None:
        yield _gauge(
            "attempt_duration_seconds",
            "Quantiles of the duration of the newest 2000 attempts.",
            {("0.5",): numbers.p50_ms / 1000, ("0.95",): numbers.p95_ms / 1000},
            ["quantile"],
        )
    yield _gauge(
        "watches",
        "Jobs whose ending is awaited, by status; counted up to 10000, and 10001 means more.",
        {(status,): count for status, count in numbers.watches.items()},
        ["status"],
    )
    oldest_s = 0.0 if numbers.oldest_watch is None else (now - numbers.oldest_watch).total_seconds()
    yield _gauge(
        "oldest_watch_seconds",
        "For how long the oldest of them has been awaited; 0 when none is.",
        {(): max(0.0, oldest_s)},
    )
    yield _gauge(
        "endpoints_disabled", "Standing endpoints that are disabled.", {(): numbers.endpoints_disabled}
    )
    yield _gauge("dispatchers", "Dispatchers with a heartbeat within 30 s.", {(): numbers.dispatchers})
    yield _gauge("paused", "Whether all sending is paused.", {(): float(numbers.paused_since is not None)})


def _gauge(
    name: str, about: str, values: dict[tuple[str, ...], float], labels: list[str] | None = None
) -> Metric:
    from prometheus_client.metrics_core import GaugeMetricFamily

    family = GaugeMetricFamily(f"rq_webhooks_{name}", about, labels=labels or [])
    for label_values, value in values.items():
        family.add_metric(list(label_values), value)
    return family
