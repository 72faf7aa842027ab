"""What RQ did to each job, read from the append-only file of its server.

Only the standard library, and only RQ's own keys: which runs a job had, what RQ committed for each, when the
job's record was removed. Besides, what the receiver and the jobs of the storm wrote there about themselves:

``SET storm:receipt <number>``
    the receiver had read request *number*, so everything later in the file happened later.
``SADD storm:children:<job id> <job id>``
    a job enqueued another one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby

from tests.chaos.aof import Command

#: RQ's final states, and the event that says so.
EVENT_OF_STATUS = {
    "finished": "job.success",
    "failed": "job.failure",
    "stopped": "job.stopped",
    "canceled": "job.canceled",
}
LOST = "job.lost"

_JOB = b"rq:job:"
_RESULTS = b"rq:results:"
_CHILDREN = b"storm:children:"


@dataclass(frozen=True)
class Commit:
    """RQ wrote a final state, or removed the record (``job.lost``).

    :param since: unix seconds before which it cannot have happened.
    """

    position: int
    since: float
    event: str


@dataclass
class Run:
    """One run of a job: from one enqueueing to the next.

    :param enqueued_at: RQ's own words; empty while the job was never enqueued.
    """

    enqueued_at: str
    began: int
    commits: list[Commit] = field(default_factory=list)
    removed: Commit | None = None

    @property
    def instant(self) -> datetime | None:
        return instant(self.enqueued_at)

    @property
    def verdict(self) -> Commit | None:
        """Return what RQ said last: its last final state, else that the record is gone."""
        return self.commits[-1] if self.commits else self.removed

    def shown(self, event: str) -> Commit | None:
        """Return the first moment from which RQ showed what *event* says."""
        if event == LOST:
            return self.removed
        return next((commit for commit in self.commits if commit.event == event), None)


@dataclass
class Job:
    """A job's runs in the order in which they began.

    :param current: the run RQ's record is of. An orphaned work-horse can turn the record back to an
        earlier run.
    """

    runs: list[Run]
    current: Run


@dataclass
class Record:
    """Everything the file says.

    :param receipts: number of a request at the receiver → position.
    :param children: job id → jobs it enqueued, or that waited for it.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    receipts: dict[int, int] = field(default_factory=dict)
    children: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    commands: int = 0


def instant(text: str | None) -> datetime | None:
    """Read a time as RQ and the events write it; ``None`` where there is none."""
    if not text:
        return None
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def read_record(commands: Iterable[Command]) -> Record:
    """Follow every job through *commands*; a transaction counts as one moment."""
    record = Record()
    for _, group in groupby(commands, key=lambda command: command.position):
        _follow(record, list(group))
    return record


def _follow(record: Record, group: list[Command]) -> None:
    written: dict[str, dict[bytes, bytes]] = {}
    removed: list[str] = []
    since = float(group[0].at)
    succeeded = False
    for command in group:
        record.commands += 1
        name, *words = (command.words[0].upper(), *command.words[1:])
        if name in (b"HSET", b"HMSET") and (job_id := _job_id(words[0])):
            written.setdefault(job_id, {}).update(zip(words[1::2], words[2::2], strict=True))
        elif name == b"XADD" and words[0].startswith(_RESULTS):
            stamp = next(word for word in words[1:] if word.partition(b"-")[0].isdigit() and b"-" in word)
            since = int(stamp.partition(b"-")[0]) / 1000
        elif name in (b"DEL", b"UNLINK"):
            removed += [job_id for word in words if (job_id := _job_id(word))]
        elif name in (b"FLUSHALL", b"FLUSHDB"):
            removed += list(record.jobs)
        elif name == b"HINCRBY" and words[1] == b"successful_job_count":
            succeeded = True
        elif name == b"SET" and words[0] == b"storm:receipt":
            record.receipts[int(words[1])] = command.position
        elif name == b"SADD" and words[0].startswith(_CHILDREN):
            record.children[words[0][len(_CHILDREN) :].decode()] |= {word.decode() for word in words[1:]}
        elif name == b"SADD" and words[0].startswith(_JOB) and words[0].endswith(b":dependents"):
            parent = words[0][len(_JOB) : -len(b":dependents")].decode()
            record.children[parent] |= {word.decode() for word in words[1:]}
    position = group[0].position
    for job_id, fields in written.items():
        _write(record.jobs, job_id, fields, position, since)
    for job_id in removed:
        job = record.jobs.get(job_id)
        if job is None or job.current.removed is not None:
            continue
        # With result_ttl=0 RQ commits a success by removing the job in the transaction that counts it.
        if succeeded and not job.current.commits:
            job.current.commits.append(Commit(position, since, "job.success"))
        job.current.removed = Commit(position, since, LOST)


def _write(
    jobs: dict[str, Job], job_id: str, written: dict[bytes, bytes], position: int, since: float
) -> None:
    enqueued_at = written.get(b"enqueued_at", b"").decode()
    job = jobs.get(job_id)
    if job is None:
        run = Run(enqueued_at, position)
        job = jobs[job_id] = Job([run], run)
    elif enqueued_at and not job.current.enqueued_at:
        job.current.enqueued_at = enqueued_at
    elif enqueued_at and enqueued_at != job.current.enqueued_at:
        known = [run for run in job.runs if run.enqueued_at == enqueued_at]
        job.current = known[0] if known else Run(enqueued_at, position)
        if not known:
            job.runs.append(job.current)
    event = EVENT_OF_STATUS.get(written.get(b"status", b"").decode())
    if event is not None:
        job.current.commits.append(Commit(position, since, event))


def _job_id(key: bytes) -> str | None:
    """Return the job whose record *key* is; ``None`` for other keys."""
    name = key[len(_JOB) :]
    return name.decode() if key.startswith(_JOB) and name and b":" not in name else None
