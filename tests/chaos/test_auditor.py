"""The auditor itself: a run without faults has none, and every falsification of it is counted.

The run is written here, in the commands RQ 3.0 was seen to write; no server takes part. The same
falsifications are put into the real runs of ``test_storm.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import aof
from tests.chaos.auditor import Answer, Evidence, Receipt, audit
from tests.chaos.falsify import FALSIFICATIONS, Case
from tests.chaos.rq_record import read_record

BEGAN = 1_800_000_000


class Story:
    """Writes what a run leaves: answers, requests at the receiver, and the server's file."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.receipts: list[Receipt] = []
        self.content = b""
        self.now = float(BEGAN)
        self.enqueued: dict[str, str] = {}

    def write(self, *commands: tuple[Any, ...]) -> None:
        """Append a transaction, a second after the one before."""
        self.now += 1
        self.content += b"#TS:%d\r\n" % self.now + aof.encode([b"MULTI"])
        for command in commands:
            self.content += aof.encode([str(word).encode() for word in command])
        self.content += aof.encode([b"EXEC"])

    def ask(self, kind: str, *jobs: str, registered: str | None = "true", status: int | None = 200) -> None:
        number = len(self.answers) + 1
        answer = Answer(number, kind, self.now, f"the secret of client {number}", status, registered)
        answer.jobs = list(jobs) if status else []
        answer.result = {"value": number}
        for job_id in jobs:
            self.answers[job_id] = answer
            self.enqueue(job_id)

    def enqueue(self, job_id: str) -> None:
        self.enqueued[job_id] = f"2027-01-15T08:00:{self.now - BEGAN:09.6f}Z"
        self.write(
            ("HSET", f"rq:job:{job_id}", "status", "queued"),
            ("HSET", f"rq:job:{job_id}", "created_at", "…", "enqueued_at", self.enqueued[job_id]),
            ("RPUSH", "rq:queue:default", job_id),
        )

    def end(self, job_id: str, status: str) -> None:
        """Let RQ commit a final state, with a result where it keeps one."""
        commands: list[tuple[Any, ...]] = [
            ("HSET", f"rq:job:{job_id}", "status", status),
            ("HSET", f"rq:job:{job_id}", "created_at", "…", "enqueued_at", self.enqueued[job_id]),
        ]
        if status in ("finished", "failed"):
            stamp = f"{int((self.now + 1) * 1000)}-0"
            commands.append(("XADD", f"rq:results:{job_id}", "MAXLEN", "=", 1, stamp, "type", 1))
        self.write(*commands)

    def remove(self, job_id: str) -> None:
        self.write(("UNLINK", f"rq:job:{job_id}"))

    def receive(
        self, job_id: str, event: str, *, status: int = 204, mark: bool = True, **more: Any
    ) -> Receipt:
        """Let the receiver read an event of the job's present run."""
        answer = self.answers[job_id]
        body: dict[str, Any] = {
            "event": event, "job_id": job_id, "timestamp": self.now, "id": f"event-{len(self.receipts)}",
            "enqueued_at": self.enqueued[job_id], "source": "callback", "reference": str(answer.number),
            **more,
        }  # fmt: skip
        if event == "job.success":
            body["result"] = answer.number
        number = len(self.receipts)
        headers = {"webhook-timestamp": str(int(self.now))}
        plain = Receipt(number, self.now + 0.5, headers, json.dumps(body).encode(), status)
        receipt = Case(self.evidence(), read_record([])).signed(plain)
        self.receipts.append(receipt)
        if mark:
            self.write(("SET", "storm:receipt", number))
        return receipt

    def repeat(self, receipt: Receipt, *, status: int = 204) -> None:
        number = len(self.receipts)
        self.receipts.append(Receipt(number, self.now, receipt.headers, receipt.body, status))
        self.write(("SET", "storm:receipt", number))

    def evidence(self) -> Evidence:
        answers = {answer.number: answer for answer in self.answers.values()}
        return Evidence(list(answers.values()), list(self.receipts), list(aof.parse(self.content)))


def publish() -> Story:
    """Return a run with every kind of ending, each reported as it has to be."""
    story = Story()
    for job_id in ("a", "b"):
        story.ask("success", job_id)
        story.end(job_id, "finished")
        story.receive(job_id, "job.success")
    story.ask("failure", "failure")
    story.end("failure", "failed")
    story.receive("failure", "job.failure")
    story.ask("failure", "failed")
    story.end("failed", "failed")
    first = story.receive("failed", "job.failure", status=503)
    story.repeat(first, status=0)
    story.repeat(first)
    story.repeat(first)  # a dispatcher died before it noted the answer

    story.ask("Retry, fails, then succeeds", "retried")
    story.enqueue("retried")
    story.end("retried", "finished")
    story.receive("retried", "job.success")

    story.ask("requeued", "requeued")
    for status, event in (("failed", "job.failure"), ("finished", "job.success")):
        story.end("requeued", status)
        story.receive("requeued", event)
        if status == "failed":
            story.enqueue("requeued")

    story.ask("stopped", "stopped")
    story.end("stopped", "stopped")
    story.receive("stopped", "job.stopped")

    story.ask("canceled while running", "canceled")
    story.end("canceled", "canceled")
    wrong = story.receive("canceled", "job.canceled")
    story.end("canceled", "finished")
    story.receive("canceled", "job.success", supersedes=wrong.id)

    story.ask("deleted", "deleted")
    story.remove("deleted")
    story.receive("deleted", "job.lost")

    story.ask("result_ttl=1", "short")
    story.end("short", "finished")
    story.remove("short")
    story.receive("short", "job.success", mark=False)  # the server was away

    story.ask("tree of two", "root", "child")
    story.end("root", "finished")
    story.end("child", "failed")
    story.receive("root", "job.failure", scope="tree")

    story.ask("success", "unanswered", status=None, registered=None)
    story.end("unanswered", "finished")
    story.receive("unanswered", "job.success")
    story.ask("success", "not promised", registered="false")
    story.end("not promised", "finished")
    return story


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return publish().evidence()


def test_a_run_without_faults(evidence: Evidence) -> None:
    found = audit(evidence)

    assert found.faults == []
    assert (found.accepted, found.runs) == (12, 12)
    assert (found.requests, found.again, found.repeats) == (17, 2, 1)
    assert found.corrections == 1
    assert found.reported == {
        "job.success": 7, "job.failure": 4, "job.stopped": 1, "job.canceled": 1, "job.lost": 1
    }  # fmt: skip


@pytest.mark.parametrize("name", FALSIFICATIONS)
def test_every_falsification_is_counted(evidence: Evidence, name: str) -> None:
    kind, falsify = FALSIFICATIONS[name]

    changed = falsify(Case(evidence, read_record(evidence.commands)))

    assert changed is not None, "the run has no case for it"
    assert audit(changed).counts[kind] > 0


def test_there_are_twenty_falsifications_of_every_kind() -> None:
    assert len(FALSIFICATIONS) >= 20
    assert {kind for kind, _ in FALSIFICATIONS.values()} == {
        "lost", "untruthful", "doubled", "early", "altered"
    }  # fmt: skip


def test_a_run_that_rq_has_not_ended_is_said_to_be_open() -> None:
    story = Story()
    story.ask("success", "open")

    assert [fault.kind for fault in audit(story.evidence()).faults] == ["open"]


def test_a_repeat_is_counted_and_no_fault(evidence: Evidence) -> None:
    repeated = Evidence(
        evidence.answers, [*evidence.receipts, replace(evidence.receipts[0], number=99)], evidence.commands
    )

    found = audit(repeated)

    assert (found.repeats, found.faults) == (2, [])


def test_an_orphan_that_ends_an_earlier_run_is_that_run_s_end() -> None:
    """RQ gives a run up and retries it; then the orphaned work-horse finishes the first run."""
    story = Story()
    story.ask("Retry", "job")
    earlier = story.enqueued["job"]
    story.enqueue("job")
    later, story.enqueued["job"] = story.enqueued["job"], earlier
    story.end("job", "finished")
    story.enqueued["job"] = later
    story.end("job", "failed")

    runs = read_record(story.evidence().commands).jobs["job"].runs

    assert [[commit.event for commit in run.commits] for run in runs] == [["job.success"], ["job.failure"]]


def test_result_ttl_0_is_a_success_that_leaves_no_state() -> None:
    story = Story()
    story.ask("result_ttl=0", "job")
    story.write(("HINCRBY", "rq:worker:w", "successful_job_count", 1), ("DEL", "rq:job:job"))
    story.receive("job", "job.success")

    assert audit(story.evidence()).faults == []


def test_evidence_is_written_and_read_again(evidence: Evidence, tmp_path: Path) -> None:
    folder = tmp_path / "appendonlydir"
    folder.mkdir()
    (folder / "a.manifest").write_text("file a.1.base.aof seq 1 type b\nfile a.1.incr.aof seq 1 type i\n")
    (folder / "a.1.base.aof").write_bytes(b"")
    (folder / "a.1.incr.aof").write_bytes(publish().content + b"*2\r\n$3\r\nSET\r\n$5\r\ncut o")

    evidence.save(tmp_path)
    again = Evidence.load(tmp_path)

    assert again == evidence
    assert str(audit(again)) == str(audit(evidence))
    about = "\n".join(again.of("requeued"))
    assert about.count("\naof #") == 14  # thrice a run, twice its end; RPUSH, XADD and the mark, twice each
    assert "status failed" in about
    assert '"event": "job.failure"' in about


def test_a_snapshot_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.manifest").write_text("file a.1.base.rdb seq 1 type b\n")
    (tmp_path / "a.1.base.rdb").write_bytes(b"REDIS0011")

    with pytest.raises(ValueError, match="a snapshot: set aof-use-rdb-preamble no"):
        aof.read(tmp_path)


def test_the_auditor_imports_nothing_of_the_product() -> None:
    for module in ("auditor", "rq_record", "aof", "falsify"):
        source = (Path(__file__).parent / f"{module}.py").read_text()
        assert "flask_rq_webhooks" not in source
