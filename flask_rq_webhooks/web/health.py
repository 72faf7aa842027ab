"""Alarms: conditions under which webhooks do not arrive although nothing fails.

Owns their sentences, each with what to do. Those of :func:`everywhere` are cheap enough for every page.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from redis.exceptions import RedisError

from ..queue.outbox import age_of_oldest, missing_reports
from ..state import State
from ..storage.dispatchers import dispatcher_alive, paused_since
from ..storage.statistics import COUNT_CAP, Statistics
from .formatting import moment, number, span

#: Entries in the outbox that a live dispatcher never lets accumulate.
OUTBOX_LONG = 500
#: Seconds a report may wait in the outbox. A dispatcher that gets through hands it on within 5.
STUCK_S = 60.0
#: A watch older than this is a job that runs for days, or one that is stuck.
WATCH_OLD = timedelta(days=1)
#: Seconds after which a due delivery is late.
LATE_S = 60.0


@dataclass(frozen=True, slots=True)
class Alarm:
    """One condition.

    :param text: the condition.
    :param advice: what to do.
    :param severe: nothing is delivered.
    """

    text: str
    advice: str
    severe: bool = False


def everywhere(state: State) -> list[Alarm]:
    """Return what stops or endangers all deliveries now.

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
        stuck = nothing_comes_of_reports(state)
    except RedisError:
        alarm(
            "Redis cannot be reached: outcomes of jobs are not seen.",
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
            "Callback reports are read from the outbox and nothing comes of them.",
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


def nothing_comes_of_reports(state: State) -> bool:
    """Say whether a callback report has waited so long that no living dispatcher gets through with it.

    :raises redis.RedisError: when Redis cannot be asked.
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
        found.append(Alarm(text, "Events missed meanwhile can be recovered when they are enabled."))
    age = None if numbers.oldest_watch is None else now - numbers.oldest_watch
    if age is not None and age > WATCH_OLD:
        text = f"The oldest job with a webhook has been waiting for {span(age.total_seconds())}."
        found.append(Alarm(text, "It is still running or queued, or no worker listens to its queue."))
    return found
