"""The auditor: what clients were promised × what the receiver got × what RQ committed.

It knows nothing of the product but what its users are promised: the answer's ``Webhook-Registered``, the
format ``job``, the headers and the signatures. It imports nothing of the package, and reads neither its
tables nor its keys. What RQ committed stands in the append-only file of the server.

========== ==================================================================================
lost       promised with ``Webhook-Registered: true``, RQ ended the run, and nobody reported it
untruthful the last word of a run is not what RQ committed last; or it was reported although the
           answer said ``false``
doubled    two endings of one run without ``supersedes`` between them, or a second correction
early      received before RQ committed it
altered    other bytes under one id, a signature, a job or a result that is not right
open       RQ has not ended the run: the storm was not over, and this run is not judged
========== ==================================================================================

Usage: ``python -m tests.chaos.auditor FOLDER`` judges again what a storm left there.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.chaos import aof
from tests.chaos.rq_record import LOST, Record, Run, instant, read_record

TERMINAL = ("job.success", "job.failure", "job.stopped", "job.canceled", LOST)
FAULTS = ("lost", "untruthful", "doubled", "early", "altered", "open")
#: Seconds by which two readings of this machine's clock may disagree.
CLOCK_S = 0.05


@dataclass
class Answer:
    """What a client asked for, and what it was answered.

    :param registered: the header ``Webhook-Registered``; ``None`` without one, or without an answer.
    :param jobs: the jobs the view said it enqueued.
    :param secret: the client's own; requests that carry this answer's number have to be signed with it.
    :param result: ``{"value": what a success of this kind returns, as JSON}``; empty where that varies.
    """

    number: int
    kind: str
    at: float
    secret: str
    status: int | None = None
    registered: str | None = None
    jobs: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def promised(self) -> bool:
        return self.status == 200 and self.registered == "true"


@dataclass
class Receipt:
    """One request as the receiver read it.

    :param answer: the status it answered; 0 where it reset the connection instead.
    """

    number: int
    at: float
    headers: dict[str, str]
    body: bytes
    answer: int

    @cached_property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def accepted(self) -> bool:
        return 200 <= self.answer < 300


@dataclass
class Evidence:
    """What a finished storm left."""

    answers: list[Answer]
    receipts: list[Receipt]
    commands: list[aof.Command]

    def save(self, folder: Path) -> None:
        """Write answers and receipts beside the server's own file."""
        names = [one.name for one in fields(Receipt)]
        receipts = [
            {**{name: getattr(receipt, name) for name in names}, "body": receipt.body.decode()}
            for receipt in self.receipts
        ]
        for name, rows in (("answers", [asdict(one) for one in self.answers]), ("receipts", receipts)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        answers = [Answer(**row) for row in _rows(folder / "answers.jsonl")]
        receipts = [
            Receipt(**{**row, "body": row["body"].encode()}) for row in _rows(folder / "receipts.jsonl")
        ]
        return cls(answers, receipts, aof.read(folder / "appendonlydir"))

    def of(self, job_id: str) -> Iterator[str]:
        """Give everything that names a job, for a person."""
        numbers = {one.number for one in self.answers if job_id in one.jobs}
        for receipt in self.receipts:
            if receipt.event.get("job_id") == job_id:
                numbers.add(int(receipt.event["reference"]))
        yield from (f"answer: {asdict(one)}" for one in self.answers if one.number in numbers)
        for receipt in self.receipts:
            if receipt.event.get("reference") in map(str, numbers):
                yield f"receipt {receipt.number} at {receipt.at:.3f}, answered {receipt.answer}:"
                yield f"    {receipt.headers}"
                yield f"    {receipt.body.decode()}"
        markers = {b"%d" % one.number for one in self.receipts if one.event.get("job_id") == job_id}
        name = job_id.encode()
        for command in self.commands:
            words = command.words
            mark = words[1:2] == (b"storm:receipt",) and words[2] in markers
            if mark or any(name in word for word in words):
                yield f"aof {command}"


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Fault:
    """One broken promise.

    :param job_id: the job; the event's id where no job is known.
    """

    kind: str
    job_id: str
    what: str


@dataclass
class Audit:
    """What an audit found.

    :param accepted: jobs that were promised a report.
    :param runs: runs of theirs that RQ ended.
    :param repeats: requests with an id that the receiver had already accepted.
    :param again: requests with an id that had been received before and not been accepted.
    """

    faults: list[Fault] = field(default_factory=list)
    accepted: int = 0
    runs: int = 0
    requests: int = 0
    repeats: int = 0
    again: int = 0
    corrections: int = 0
    reported: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Counter[str]:
        return Counter(fault.kind for fault in self.faults)

    def __str__(self) -> str:
        found = ", ".join(f"{self.counts[kind]} {kind}" for kind in FAULTS)
        return (
            f"{self.accepted} jobs accepted, {self.runs} runs, {self.requests} requests "
            f"({self.repeats} repeats), {self.corrections} corrections: {found}"
        )


def audit(evidence: Evidence, record: Record | None = None) -> Audit:
    """Judge a finished storm.

    :param record: what :func:`read_record` makes of the evidence's commands, where it is at hand already.
    """
    return _Auditor(evidence, record or read_record(evidence.commands)).audit()


class _Auditor:
    """One audit: the evidence by number, by id, by job and by run, and the faults found."""

    def __init__(self, evidence: Evidence, record: Record) -> None:
        self.record = record
        self.receipts = evidence.receipts
        self.answers = {one.number: one for one in evidence.answers}
        self.found = Audit(requests=len(evidence.receipts))
        #: Event id → its first receipt, in the order of arrival.
        self.first: dict[str, Receipt] = {}
        self.accepted: set[str] = set()
        self.of_run: dict[tuple[str, int], list[Receipt]] = defaultdict(list)
        self.of_job: dict[str, list[Receipt]] = defaultdict(list)

    def fault(self, kind: str, job_id: str, what: str) -> None:
        self.found.faults.append(Fault(kind, job_id, what))

    def audit(self) -> Audit:
        for receipt in self.receipts:
            self._take(receipt)
        for receipt in self.first.values():
            self._place(receipt)
        for (job_id, index), receipts in self.of_run.items():
            self._judge_run(job_id, self.record.jobs[job_id].runs[index], receipts)
        for answer in self.answers.values():
            if answer.kind.startswith("tree"):
                self._judge_tree(answer)
            if answer.promised:
                self.found.accepted += len(answer.jobs)
                self.found.kinds[answer.kind] += len(answer.jobs)
                if not answer.kind.startswith("tree"):
                    for job_id in answer.jobs:
                        self._miss(job_id)
            elif answer.registered == "false":
                for job_id in answer.jobs:
                    for receipt in self.of_job[job_id]:
                        said = receipt.event["event"]
                        self.fault("untruthful", job_id, f"answered false, and reported: {said}")
        return self.found

    # -- every request ------------------------------------------------------------------------------------

    def _take(self, receipt: Receipt) -> None:
        first = self.first.setdefault(receipt.id, receipt)
        job_id = str(receipt.event.get("job_id"))
        if first is not receipt:
            self.found.repeats += receipt.id in self.accepted
            self.found.again += receipt.id not in self.accepted
            if first.body != receipt.body:
                self.fault("altered", job_id, f"{receipt.id} was sent with other bytes")
        if receipt.accepted:
            self.accepted.add(receipt.id)
        answer = self._answer(receipt)
        if answer is None:
            self.fault("altered", job_id, f"{receipt.id} carries the reference of nobody")
        elif not signed(receipt.headers, receipt.body, answer.secret):
            self.fault("altered", job_id, f"{receipt.id}, request {receipt.number}: a wrong signature")

    def _answer(self, receipt: Receipt) -> Answer | None:
        reference = str(receipt.event.get("reference"))
        return self.answers.get(int(reference)) if reference.isdigit() else None

    # -- every event --------------------------------------------------------------------------------------

    def _place(self, receipt: Receipt) -> None:
        """Find the run an event is of, and check what it says of itself."""
        event, job_id = receipt.event, str(receipt.event.get("job_id"))
        answer = self._answer(receipt)
        if event.get("id") != receipt.id or receipt.headers.get("X-Webhook-Event") != event.get("event"):
            self.fault("altered", job_id, f"{receipt.id}: headers and body disagree")
        if event.get("event") not in TERMINAL:
            self.fault("untruthful", job_id, f"{receipt.id} is {event.get('event')}: nobody subscribed")
            return
        self.found.reported[event["event"]] += 1
        self.found.by_source[str(event.get("source"))] += 1
        self.found.corrections += "supersedes" in event
        if answer is not None and answer.jobs and job_id not in answer.jobs:
            self.fault("altered", job_id, f"{receipt.id}: job {job_id} is not of request {answer.number}")
        self.of_job[job_id].append(receipt)
        if event.get("scope") == "tree":
            return
        if answer is not None and event["event"] == "job.success":
            self._check_result(answer, job_id, event)
        job = self.record.jobs.get(job_id)
        if job is None:
            if event["event"] != LOST:
                self.fault("untruthful", job_id, f"{receipt.id}: RQ never had this job")
            return
        index = _run_of(job.runs, event)
        if index is None:
            when = event.get("enqueued_at")
            self.fault("untruthful", job_id, f"{receipt.id}: no run was enqueued at {when}")
            return
        self.of_run[job_id, index].append(receipt)

    def _check_result(self, answer: Answer, job_id: str, event: Mapping[str, Any]) -> None:
        # A result only the host's classes could read is left out, and said to be.
        left_out = event.get("result") is None and event.get("result_truncated") is True
        if "value" in answer.result and event.get("result") != answer.result["value"] and not left_out:
            said = str(event.get("result"))[:80]
            self.fault("altered", job_id, f"result {said!r}, returned {answer.result}")

    def _before(self, receipt: Receipt, position: int, since: float) -> bool:
        """Say whether a request was received before a moment of the file, by its order or by the clock."""
        mark = self.record.receipts.get(receipt.number)
        return (mark is not None and mark < position) or receipt.at < since - CLOCK_S

    # -- every run ----------------------------------------------------------------------------------------

    def _judge_run(self, job_id: str, run: Run, receipts: list[Receipt]) -> None:
        published = [receipt.event["event"] for receipt in receipts]
        for receipt in receipts:
            shown = run.shown(receipt.event["event"])
            if shown is not None and self._before(receipt, shown.position, shown.since):
                self.fault("early", job_id, f"{receipt.event['event']} received before RQ's {shown}")
        last = self._last_word(job_id, receipts, f"run {run.enqueued_at}")
        verdict = run.verdict
        if verdict is None:
            self.fault(
                "untruthful", job_id, f"run {run.enqueued_at}: reported {published}, and RQ did not end it"
            )
        elif last.event["event"] != verdict.event:
            self.fault(
                "untruthful", job_id, f"run {run.enqueued_at}: reported {published}, RQ says {verdict}"
            )
        else:
            for receipt in receipts:
                if receipt is not last and run.shown(receipt.event["event"]) is None:
                    said = receipt.event["event"]
                    what = f"run {run.enqueued_at}: reported {said}, which RQ never said"
                    self.fault("untruthful", job_id, what)

    def _last_word(self, job_id: str, receipts: list[Receipt], what: str) -> Receipt:
        """Return the event nothing supersedes; say so where there are several, or several corrections."""
        known = {receipt.id for receipt in receipts}
        links = [receipt.event["supersedes"] for receipt in receipts if "supersedes" in receipt.event]
        published = [receipt.event["event"] for receipt in receipts]
        if set(links) - known:
            self.fault("doubled", job_id, f"{what}: supersedes {links}, which is no ending of this run")
        standing = [receipt for receipt in receipts if receipt.id not in links]
        if len(standing) > 1:
            self.fault("doubled", job_id, f"{what}: {published} without supersedes between them")
        if len(links) > 1:
            self.fault("doubled", job_id, f"{what}: {len(links)} corrections: {published}")
        return (standing or receipts)[-1]

    def _miss(self, job_id: str) -> None:
        """Note what was promised and not reported."""
        job = self.record.jobs.get(job_id)
        if job is None:
            if not any(receipt.id in self.accepted for receipt in self.of_job[job_id]):
                self.fault("lost", job_id, "promised; RQ's record does not know it, and nobody reported")
            return
        for index, run in enumerate(job.runs):
            if run.verdict is None:
                if run is job.current:
                    self.fault("open", job_id, f"run {run.enqueued_at} has no end in RQ's record")
                continue
            self.found.runs += 1
            if not any(receipt.id in self.accepted for receipt in self.of_run[job_id, index]):
                what = f"run {run.enqueued_at}: RQ says {run.verdict}, and nobody reported"
                self.fault("lost", job_id, what)

    # -- trees --------------------------------------------------------------------------------------------

    def _judge_tree(self, answer: Answer) -> None:
        receipts = [receipt for job_id in answer.jobs for receipt in self.of_job[job_id]]
        name = answer.jobs[0] if answer.jobs else f"request {answer.number}"
        members = self._members(answer.jobs)
        runs = [job.current for job_id in members if (job := self.record.jobs.get(job_id)) is not None]
        # What waits for a failed job is never enqueued, and does not count.
        runs = [run for run in runs if run.enqueued_at or run.commits]
        if any(run.verdict is None for run in runs):
            self.fault("open", name, "the tree has not ended in RQ's record")
            return
        if not receipts:
            if answer.promised:
                self.fault("lost", name, "the tree ended, and nobody reported")
            return
        self.found.runs += 1
        if not any(receipt.id in self.accepted for receipt in receipts):
            self.fault("lost", name, "no request about the tree was accepted")
        last = self._last_word(name, receipts, "the tree")
        verdict = next((event for event in _GRAVITY if any(_says(run, event) for run in runs)), "job.success")
        if last.event["event"] != verdict:
            published = [receipt.event["event"] for receipt in receipts]
            self.fault("untruthful", name, f"the tree: reported {published}, RQ's record says {verdict}")
        for receipt in receipts:
            for run in runs:
                ends = [*run.commits, *([run.removed] if run.removed else [])]
                if self._before(receipt, ends[0].position, ends[0].since):
                    what = f"{receipt.id} came before the job enqueued {run.enqueued_at} ended"
                    self.fault("early", name, what)

    def _members(self, roots: Iterable[str]) -> set[str]:
        members, waiting = set(), list(roots)
        while waiting:
            job_id = waiting.pop()
            if job_id not in members:
                members.add(job_id)
                waiting += self.record.children.get(job_id, ())
        return members


#: What makes a tree more than a success, the gravest first.
_GRAVITY = ("job.failure", "job.stopped", "job.canceled")


def _says(run: Run, event: str) -> bool:
    return run.verdict is not None and run.verdict.event == event


def _run_of(runs: list[Run], event: Mapping[str, Any]) -> int | None:
    """Return which run an event is of; without a time of enqueueing, the last one."""
    enqueued = instant(event.get("enqueued_at"))
    if enqueued is None:
        return len(runs) - 1
    return next((index for index, run in enumerate(runs) if run.instant == enqueued), None)


def signed(headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Say whether both signatures are the client's (Standard Webhooks, and ``sha256=`` of the body)."""
    key = secret.encode()
    message = f"{headers.get('webhook-id')}.{headers.get('webhook-timestamp')}.".encode() + body
    standard = "v1," + base64.b64encode(hmac.digest(key, message, hashlib.sha256)).decode()
    plain = "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
    return (
        standard in headers.get("webhook-signature", "").split()
        and headers.get("X-Webhook-Signature") == plain
    )


def main() -> None:
    evidence = Evidence.load(Path(sys.argv[1]))
    found = audit(evidence)
    for fault in found.faults:
        print(f"{fault.kind}: {fault.job_id}: {fault.what}")
    print(found)


if __name__ == "__main__":
    main()
