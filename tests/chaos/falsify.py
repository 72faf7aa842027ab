"""Falsifications: changes to the evidence of a finished run, each of which the auditor has to count.

Where an event is changed it is signed anew, so that nothing but the change itself gives it away. What a run
has no case for (no correction, no tree) gives ``None``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.chaos.aof import Command
from tests.chaos.auditor import Answer, Evidence, Receipt
from tests.chaos.rq_record import Record, Run

Falsification = Callable[["Case"], Evidence | None]
#: Name → the kind of fault that has to be counted once more, and the change.
FALSIFICATIONS: dict[str, tuple[str, Falsification]] = {}


def falsification(kind: str, name: str) -> Callable[[Falsification], Falsification]:
    """Enter a change under *name*."""

    def enter(function: Falsification) -> Falsification:
        FALSIFICATIONS[name] = (kind, function)
        return function

    return enter


class Case:
    """A finished run without faults, and its events by kind."""

    def __init__(self, evidence: Evidence, record: Record) -> None:
        self.evidence = evidence
        self.record = record
        self.answers = {answer.number: answer for answer in evidence.answers}
        self.first: dict[str, Receipt] = {}
        for receipt in evidence.receipts:
            self.first.setdefault(receipt.id, receipt)

    def answer(self, receipt: Receipt) -> Answer:
        return self.answers[int(receipt.event["reference"])]

    def run(self, receipt: Receipt) -> Run | None:
        job = self.record.jobs.get(receipt.event["job_id"])
        if job is None:
            return None
        return next((run for run in job.runs if run.enqueued_at == receipt.event.get("enqueued_at")), None)

    def alone(self, *events: str, tree: bool = False) -> Iterator[Receipt]:
        """Give the only ending of promised jobs of one run, or of trees."""
        corrected = {receipt.event["supersedes"] for receipt in self.corrections()}
        for receipt in self.first.values():
            event = receipt.event
            runs = self.record.jobs[event["job_id"]].runs if event["job_id"] in self.record.jobs else []
            if (
                (not events or event["event"] in events)
                and (event.get("scope") == "tree") == tree
                and (len(runs) == 1 or tree)
                and self.answer(receipt).promised
                and "supersedes" not in event
                and receipt.id not in corrected
                and receipt.accepted
                and receipt.number in self.record.receipts
            ):
                yield receipt

    def corrections(self) -> Iterator[Receipt]:
        return (receipt for receipt in self.first.values() if "supersedes" in receipt.event)

    # -- evidence, changed ----------------------------------------------------------------------------

    def receipts(self, change: Callable[[Receipt], list[Receipt]]) -> Evidence:
        """Return the evidence with every request replaced by what *change* makes of it."""
        changed = [new for receipt in self.evidence.receipts for new in change(receipt)]
        return Evidence(self.evidence.answers, changed, self.evidence.commands)

    def without(self, event_id: str) -> Evidence:
        return self.receipts(lambda receipt: [] if receipt.id == event_id else [receipt])

    def with_event(self, receipt: Receipt, **changes: Any) -> Evidence:
        """Return the evidence with another content of one event; ``None`` removes a key."""
        return self.receipts(lambda one: [self.signed(one, **changes)] if one.id == receipt.id else [one])

    def and_event(self, receipt: Receipt, event_id: str, **changes: Any) -> Evidence:
        """Return the evidence with one more event beside *receipt*."""
        new = self.signed(receipt, id=event_id, **changes)
        return self.receipts(lambda one: [one, new] if one is receipt else [one])

    def signed(self, receipt: Receipt, secret: str | None = None, **changes: Any) -> Receipt:
        """Return a request with a changed event under the client's own signature."""
        event = {key: value for key, value in {**receipt.event, **changes}.items() if value is not None}
        body = json.dumps(event).encode()
        headers = {**receipt.headers, "webhook-id": event["id"], "X-Webhook-Event": event["event"]}
        key = (secret or self.answer(receipt).secret).encode()
        message = f"{event['id']}.{headers['webhook-timestamp']}.".encode() + body
        headers["webhook-signature"] = "v1," + base64.b64encode(hmac.digest(key, message, "sha256")).decode()
        headers["X-Webhook-Signature"] = "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
        return Receipt(receipt.number, receipt.at, headers, body, receipt.answer)

    def with_command(self, change: Callable[[Command], Command]) -> Evidence:
        commands = [change(command) for command in self.evidence.commands]
        return Evidence(self.evidence.answers, self.evidence.receipts, commands)

    def with_mark(self, receipt: Receipt, position: int) -> Evidence:
        """Return the evidence with the mark of one request at another place of the server's file."""
        words = (b"SET", b"storm:receipt", b"%d" % receipt.number)
        kept = [command for command in self.evidence.commands if command.words != words]
        index = next(i for i, command in enumerate(kept) if command.position >= position)
        kept.insert(index, Command(position, kept[index].at, words))
        return Evidence(self.evidence.answers, self.evidence.receipts, kept)

    def with_answer(self, answer: Answer, **changes: Any) -> Evidence:
        answers = [replace(one, **changes) if one is answer else one for one in self.evidence.answers]
        return Evidence(answers, self.evidence.receipts, self.evidence.commands)


# -- lost -------------------------------------------------------------------------------------------------


@falsification("lost", "an event is dropped")
def _(case: Case) -> Evidence | None:
    return next((case.without(one.id) for one in case.alone("job.success")), None)


@falsification("lost", "a job.lost is dropped")
def _(case: Case) -> Evidence | None:
    return next((case.without(one.id) for one in case.alone("job.lost")), None)


@falsification("lost", "the first of two runs is dropped")
def _(case: Case) -> Evidence | None:
    for receipt in case.first.values():
        job = case.record.jobs.get(receipt.event["job_id"])
        if job is None or len(job.runs) != 2 or not all(run.commits for run in job.runs):
            continue
        if case.run(receipt) is job.runs[0] and case.answer(receipt).promised:
            return case.without(receipt.id)
    return None


@falsification("lost", "a tree's event is dropped")
def _(case: Case) -> Evidence | None:
    return next((case.without(one.id) for one in case.alone(tree=True)), None)


@falsification("lost", "the receiver accepted no request of an event")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone():
        return case.receipts(lambda one, id=receipt.id: [replace(one, answer=503) if one.id == id else one])
    return None


@falsification("lost", "a promised job that RQ does not know")
def _(case: Case) -> Evidence | None:
    answer = Answer(10**9, "success", 0.0, "secret", 200, "true", ["no-such-job"])
    return Evidence([*case.evidence.answers, answer], case.evidence.receipts, case.evidence.commands)


# -- untruthful -------------------------------------------------------------------------------------------


@falsification("untruthful", "a success reported as a failure")
def _(case: Case) -> Evidence | None:
    return next((case.with_event(one, event="job.failure") for one in case.alone("job.success")), None)


@falsification("untruthful", "a failure reported as a success")
def _(case: Case) -> Evidence | None:
    return next((case.with_event(one, event="job.success") for one in case.alone("job.failure")), None)


@falsification("untruthful", "a stop reported as a cancel")
def _(case: Case) -> Evidence | None:
    return next((case.with_event(one, event="job.canceled") for one in case.alone("job.stopped")), None)


@falsification("untruthful", "a success reported as lost")
def _(case: Case) -> Evidence | None:
    return next((case.with_event(one, event="job.lost") for one in case.alone("job.success")), None)


@falsification("untruthful", "RQ committed something else")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone("job.success"):
        key = b"rq:job:" + receipt.event["job_id"].encode()

        def change(command: Command, key: bytes = key) -> Command:
            if command.words[1:2] != (key,):
                return command
            return replace(command, words=tuple(b"failed" if w == b"finished" else w for w in command.words))

        false = case.with_command(change)
        if false.commands != case.evidence.commands:  # with result_ttl=0 RQ writes no status
            return false
    return None


@falsification("untruthful", "a run that was retried is reported")
def _(case: Case) -> Evidence | None:
    for receipt in case.first.values():
        job = case.record.jobs.get(receipt.event["job_id"])
        if job and len(job.runs) == 2 and not job.runs[0].commits and receipt.event.get("scope") != "tree":
            return case.and_event(receipt, "extra", event="job.failure", enqueued_at=job.runs[0].enqueued_at)
    return None


@falsification("untruthful", "the run of an event never was")
def _(case: Case) -> Evidence | None:
    when = "2001-01-01T00:00:00.000000Z"
    return next((case.with_event(one, enqueued_at=when) for one in case.alone("job.success")), None)


@falsification("untruthful", "a correction is dropped")
def _(case: Case) -> Evidence | None:
    return next((case.without(one.id) for one in case.corrections()), None)


@falsification("untruthful", "a tree that failed is reported as a success")
def _(case: Case) -> Evidence | None:
    failed = case.alone("job.failure", tree=True)
    return next((case.with_event(one, event="job.success") for one in failed), None)


@falsification("untruthful", "the answer said false")
def _(case: Case) -> Evidence | None:
    return next((case.with_answer(case.answer(one), registered="false") for one in case.alone()), None)


# -- doubled ----------------------------------------------------------------------------------------------


@falsification("doubled", "the same ending under another id")
def _(case: Case) -> Evidence | None:
    return next((case.and_event(one, "extra") for one in case.alone("job.success")), None)


@falsification("doubled", "a second ending of another kind")
def _(case: Case) -> Evidence | None:
    found = case.alone("job.success")
    return next((case.and_event(one, "extra", event="job.failure") for one in found), None)


@falsification("doubled", "a tree is reported twice")
def _(case: Case) -> Evidence | None:
    return next((case.and_event(one, "extra") for one in case.alone(tree=True)), None)


@falsification("doubled", "a correction without supersedes")
def _(case: Case) -> Evidence | None:
    return next((case.with_event(one, supersedes=None) for one in case.corrections()), None)


@falsification("doubled", "a correction of something else")
def _(case: Case) -> Evidence | None:
    return next((case.with_event(one, supersedes="unknown") for one in case.corrections()), None)


@falsification("doubled", "a second correction")
def _(case: Case) -> Evidence | None:
    return next((case.and_event(one, "extra", supersedes=one.id) for one in case.corrections()), None)


# -- early ------------------------------------------------------------------------------------------------


@falsification("early", "a request before the commit, by the order of the server's file")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone("job.success", "job.failure"):
        run = case.run(receipt)
        if run is not None and run.commits:
            return case.with_mark(receipt, run.commits[0].position - 1)
    return None


@falsification("early", "a job.lost before the record was removed")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone("job.lost"):
        run = case.run(receipt)
        if run is not None and run.removed is not None:
            return case.with_mark(receipt, run.removed.position - 1)
    return None


@falsification("early", "a request before the commit, by the clock, the server being away")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone("job.success"):
        run = case.run(receipt)
        if run is not None and run.commits:
            evidence = case.receipts(
                lambda one, since=run.commits[0].since, id=receipt.id: (
                    [replace(one, at=since - 0.1)] if one.id == id else [one]
                )
            )
            words = (b"SET", b"storm:receipt", b"%d" % receipt.number)
            kept = [command for command in evidence.commands if command.words != words]
            return Evidence(evidence.answers, evidence.receipts, kept)
    return None


@falsification("early", "a tree's event before its last job ended")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone(tree=True):
        runs = [case.record.jobs[job_id].current for job_id in case.answer(receipt).jobs]
        last = max((run.commits[0].position for run in runs if run.commits), default=0)
        if last:
            return case.with_mark(receipt, last - 1)
    return None


# -- altered ----------------------------------------------------------------------------------------------


@falsification("altered", "a result is changed")
def _(case: Case) -> Evidence | None:
    return next((case.with_event(one, result="another") for one in case.alone("job.success")), None)


@falsification("altered", "a result goes missing")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone("job.success"):
        if receipt.event["result"] is not None:
            return case.with_event(receipt, result=None)
    return None


@falsification("altered", "a byte of the body is changed, the signature is not")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone("job.success"):
        new = replace(receipt, body=receipt.body.replace(b"job.success", b"job.Success", 1))
        return case.receipts(lambda one, old=receipt, new=new: [new if one is old else one])
    return None


@falsification("altered", "another client's secret")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone():
        new = case.signed(receipt, secret="the secret of client 0")  # noqa: S106
        return case.receipts(lambda one, old=receipt, new=new: [new if one is old else one])
    return None


@falsification("altered", "a repeat with other bytes")
def _(case: Case) -> Evidence | None:
    for receipt in case.alone("job.success"):
        new = case.signed(receipt, timestamp=1.0)
        return case.receipts(lambda one, old=receipt, new=new: [one, new] if one is old else [one])
    return None


@falsification("altered", "an event of somebody else's job")
def _(case: Case) -> Evidence | None:
    found = [one for one in case.alone("job.success") if len(case.answer(one).jobs) == 1]
    return case.with_event(found[0], job_id=found[1].event["job_id"]) if len(found) > 1 else None
