"""What happened: event types and the occurrence that becomes an event.

Defines the vocabulary and the run key. Does not know how events are stored, rendered or sent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

JOB_SUCCESS = "job.success"
JOB_FAILURE = "job.failure"
JOB_STOPPED = "job.stopped"
JOB_CANCELED = "job.canceled"
JOB_LOST = "job.lost"
JOB_RETRYING = "job.retrying"
JOB_BLOCKED = "job.blocked"
JOB_STARTED = "job.started"
JOB_PROGRESS = "job.progress"
JOB_STALLED = "job.stalled"
WEBHOOK_PING = "webhook.ping"
ENDPOINT_DISABLED = "webhook.endpoint_disabled"
DELIVERY_EXHAUSTED = "webhook.delivery_exhausted"

#: Every run ends with one of these.
TERMINAL_TYPES = frozenset({JOB_SUCCESS, JOB_FAILURE, JOB_STOPPED, JOB_CANCELED, JOB_LOST})
#: Sent only to endpoints that subscribe to them by name.
OPTIONAL_TYPES = frozenset({JOB_RETRYING, JOB_BLOCKED, JOB_STARTED, JOB_PROGRESS, JOB_STALLED})
#: Events about a run in progress: never stored after its ending, and no longer sent then.
RUNNING_TYPES = frozenset({JOB_STARTED, JOB_PROGRESS, JOB_STALLED})
JOB_TYPES = TERMINAL_TYPES | OPTIONAL_TYPES
#: In an endpoint's event list: every type except ``job.progress``, application types included.
EVERY_TYPE = "*"
#: Events about deliveries, for operators' standing endpoints that subscribe to them by name.
OPERATOR_TYPES = frozenset({ENDPOINT_DISABLED, DELIVERY_EXHAUSTED})

#: How far apart the clocks of web hosts, workers and databases may be. A run may seem to begin this long
#: before the registration that caused it. If they differ more and only times can tell, as for a job without
#: our callbacks, a run that began just after registration may be taken for an earlier one.
CLOCK_SKEW = timedelta(seconds=1)

#: How we learned about the occurrence.
SOURCE_CALLBACK = "callback"
SOURCE_RECONCILED = "reconciled"
SOURCE_APPLICATION = "application"

_APPLICATION_TYPE = re.compile(r"[a-z0-9_]+(?:\.[a-z0-9_]+)+")


def is_application_type(event_type: str) -> bool:
    """Return whether *event_type* may be sent by an application: dotted lower-case words, not one of ours.

    Source: Standard Webhooks, "Event types".
    """
    return (
        len(event_type) <= 100
        and _APPLICATION_TYPE.fullmatch(event_type) is not None
        and not event_type.startswith(("job.", "webhook."))
    )


#: Cached, because ingest parses and formats each timestamp of a job several times.
_few = lru_cache(maxsize=4096)


@_few
def format_time(moment: datetime) -> str:
    """Return *moment* as RQ writes it into a job's hash: ``2024-01-01T00:00:00.000000Z``.

    :param moment: aware; a naive one is taken as UTC, because RQ before 2.0 returns such times.
    """
    if moment.tzinfo is not None and moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


@_few
def parse_time(text: str) -> datetime:
    """Return the aware UTC time that :func:`format_time` or RQ wrote.

    :raises ValueError: when *text* is not such a time, or is so far away that adding days to it overflows.
    """
    moment = datetime.fromisoformat(text)
    if not 1 < moment.year < 9999:
        raise ValueError(f"The year {moment.year} of {text!r} is out of range.")
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def run_of(enqueued_at: datetime | None, created_at: datetime) -> str:
    """Return the identity of a job's run, as callbacks report it and RQ's hash shows it."""
    return f"created:{format_time(created_at)}" if enqueued_at is None else format_time(enqueued_at)


def is_wanted(event_type: str, names: Collection[str] | None) -> bool:
    """Return whether an endpoint with the event list *names* gets events of *event_type*.

    Without a list, it gets every terminal type. With a list, it gets the types named; :data:`EVERY_TYPE`
    stands for everything except ``job.progress``, because a long job has very many of those.
    """
    if names is None:
        return event_type in TERMINAL_TYPES
    return event_type in names or (EVERY_TYPE in names and event_type != JOB_PROGRESS)


def run_key(job_id: str, run: str, event_type: str, *, correction: bool = False) -> str:
    """Return the key that makes an event of one run unique in SQL.

    Every terminal type shares one key, so a run has one terminal event; a correction has its own.

    :param run: the run's ``enqueued_at`` as :func:`format_time` writes it, or ``created:<created_at>``
        if the job was never enqueued.
    """
    if event_type in TERMINAL_TYPES:
        return f"{job_id}|{run}|{'correction' if correction else 'end'}"
    return f"{job_id}|{run}|{event_type}"


# Not frozen: creating a frozen one takes three times as long, for every entry.
@dataclass(slots=True, kw_only=True)
class Occurrence:
    """One thing that happened, before it is stored as an event.

    :param type: one of :data:`JOB_TYPES`, :data:`WEBHOOK_PING` or an application type.
    :param occurred_at: aware UTC; the end of the run, if known.
    :param source: ``"callback"``, ``"reconciled"`` or ``"application"``.
    :param job_id: RQ's id, ``None`` for application events.
    :param run: identity of the run, see :func:`run_key`.
    :param runid: the host's name for the run: from ``job.meta["runid"]`` or the first positional
        argument; an endpoint's own run id takes precedence when a payload is rendered.
    :param result: JSON-safe return value; ``None`` unless the type is ``job.success``.
    :param error: ``{"type", "message", "traceback"}``; only with ``job.failure``.
    :param jobs: for trees, counts by status.
    :param supersedes: id of the event that this one corrects.
    :param progress: JSON-safe value from the job's meta, if known.
    :param data: an application event's own object.
    :param sequence: 1, 2, 3 … among the job's events, assigned when it is stored.
    """

    type: str
    occurred_at: datetime
    source: str
    job_id: str | None = None
    run: str | None = None
    runid: str | None = None
    func: str | None = None
    queue: str | None = None
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    result: Any = None
    result_truncated: bool = False
    error: Mapping[str, str] | None = None
    sequence: int | None = None
    scope: str = "job"
    jobs: Mapping[str, int] | None = None
    supersedes: str | None = None
    progress: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_key(self) -> str | None:
        """Return the key unique in SQL, or ``None`` if the occurrence may be stored any number of times."""
        if self.job_id is None or self.run is None:
            return None
        key = run_key(self.job_id, self.run, self.type, correction=self.supersedes is not None)
        if self.type == JOB_PROGRESS:  # many in a run
            key += f"|{self.occurred_at.timestamp():.3f}"
        return f"tree|{key}" if self.scope == "tree" else key
