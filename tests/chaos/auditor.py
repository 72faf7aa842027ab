"""The auditor: every accepted job × what the receiver saw × SQL × RQ.

Reads only. What it finds is a list of sentences per kind of fault; an empty report is what the suite wants.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis
from sqlalchemy import select

from flask_rq_webhooks.protocol.events import TERMINAL_TYPES
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.models import Delivery, Endpoint, Watch
from tests.servers import Received

TYPE_OF_STATUS = {
    "finished": "job.success",
    "failed": "job.failure",
    "stopped": "job.stopped",
    "canceled": "job.canceled",
}


@dataclass
class Audit:
    """What an audit found.

    :param accepted: jobs the client was promised a report of, or that exist or ran without an answer.
    :param lost: promised jobs nobody told of, by number.
    :param untruthful: jobs whose last word is not what RQ committed.
    :param doubled: runs with two terminal events, or more than one correction.
    :param changed: events sent under one ``webhook-id`` with different bytes, or one event under two ids.
    :param repeats: HTTP deliveries beyond the first accepted one of an event.
    """

    accepted: int = 0
    told: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    corrections: int = 0
    lost: list[str] = field(default_factory=list)
    untruthful: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    requests: int = 0
    repeats: int = 0

    @property
    def faults(self) -> list[str]:
        return [*self.lost, *self.untruthful, *self.doubled, *self.changed, *self.unfinished]


def audit(
    state: State,
    client: redis.Redis,
    received: Iterable[Received],
    promised: Mapping[int, str],
    unanswered: Iterable[int] = (),
) -> Audit:
    """Compare everything with everything.

    :param received: requests the receiver accepted with 2xx.
    :param promised: number the client gave a job → job id of the response that said
        ``Webhook-Registered: true``.
    :param unanswered: numbers whose request got no answer; their jobs may exist or not.
    """
    found = Audit()
    jobs = dict(promised)
    # A client that got no answer was promised nothing; but a job that ran has a webhook all the same.
    for number, job_id in client.hgetall("chaos:ran").items():
        jobs.setdefault(int(number), job_id.decode())
    found.accepted = len(jobs)

    first: dict[str, Received] = {}
    by_job: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in received:
        found.requests += 1
        event_id = one.headers["webhook-id"]
        if event_id in first:
            found.repeats += 1
            if first[event_id].body != one.body:
                found.changed.append(f"{event_id} was sent with different bytes")
            continue
        first[event_id] = one
        by_job[one.json["job_id"]].append(one.json)

    for number, job_id in sorted(jobs.items()):
        _audit_job(found, client, number, job_id, by_job.get(job_id, []))
    asked = {str(number) for number in unanswered}
    for job_id in set(by_job) - set(jobs.values()):
        if by_job[job_id][0]["reference"] not in asked:
            found.doubled.append(f"{job_id} was told of, and nobody asked")
    _audit_sql(found, state, set(first))
    return found


def _audit_job(
    found: Audit, client: redis.Redis, number: int, job_id: str, events: list[dict[str, Any]]
) -> None:
    terminal = [event for event in events if event["event"] in TERMINAL_TYPES]
    if not terminal:
        status = client.hget(f"rq:job:{job_id}", "status")
        found.lost.append(f"job {number} ({job_id}) is {status!r} in RQ, and nobody told")
        return
    firsts = [event for event in terminal if "supersedes" not in event]
    corrections = [event for event in terminal if "supersedes" in event]
    found.corrections += len(corrections)
    for event in terminal:
        found.told[event["event"]] += 1
        found.by_source[event["source"]] += 1
    runs = Counter(event.get("enqueued_at") for event in firsts)
    for run, count in runs.items():
        if count > 1:
            found.doubled.append(f"job {number} ({job_id}), run {run}: {count} terminal events")
    if len(corrections) > len(firsts):
        found.doubled.append(f"job {number} ({job_id}): {len(corrections)} corrections")
    superseded = {event["supersedes"] for event in corrections}
    last = max(
        (event for event in terminal if event["id"] not in superseded),
        key=lambda event: event.get("enqueued_at") or "",
    )
    status = client.hget(f"rq:job:{job_id}", "status")
    committed = None if status is None else TYPE_OF_STATUS.get(status.decode(), status.decode())
    if committed is not None and last["event"] != committed:
        found.untruthful.append(
            f"job {number} ({job_id}): told {[e['event'] for e in terminal]}, RQ says {committed}"
        )


def _audit_sql(found: Audit, state: State, seen: set[str]) -> None:
    with state.database.read() as connection:
        for delivery in connection.execute(select(Delivery.id, Delivery.event_id, Delivery.status)):
            if delivery.status != "succeeded":
                found.unfinished.append(f"delivery {delivery.id} is {delivery.status}")
            elif delivery.event_id not in seen:
                found.lost.append(f"delivery {delivery.id} succeeded, and the receiver saw nothing")
        query = (
            select(Watch.job_id)
            .join(Endpoint, Endpoint.id == Watch.endpoint_id)
            .where(Watch.status == "open", Watch.settled_at.is_(None))
        )
        for job_id in connection.execute(query).scalars():
            found.unfinished.append(f"the watch of {job_id} is still open")
