"""One job plays every game it can with a small model of RQ, while the real ingest and reconcile look on.

Redis and SQL are dictionaries; between any two reads or writes of ours, RQ may go on. At every event: RQ had
committed it. In the end: every run has at most one ending and one correction, the last word is what RQ
committed, and nothing that RQ committed or lost is left unreported.

A few hundred games by default; ``RQ_WEBHOOKS_GAMES=20000`` plays more (``make games``).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.observe.ingest import Ingest
from flask_rq_webhooks.observe.reconcile import Reconciler
from flask_rq_webhooks.protocol.events import TERMINAL_TYPES, format_time
from flask_rq_webhooks.queue.job_reader import JobRecord, JobResult, Jobs
from flask_rq_webhooks.queue.outbox import Entry
from flask_rq_webhooks.queue.outbox_entry import OutboxEntry
from flask_rq_webhooks.storage.events import IngestedEvent
from flask_rq_webhooks.storage.reported_runs import Reported, _is_as_late
from flask_rq_webhooks.storage.watches import SettledProbe, WatchProbe, WatchRow

GAMES = int(os.environ.get("RQ_WEBHOOKS_GAMES", "300"))
SEED = int(os.environ.get("RQ_WEBHOOKS_GAMES_SEED", "20260301"))
EPOCH = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ENDPOINT = "eptesttest_" + "0" * 26
JOB = "job-1"
TYPE = {
    "finished": "job.success",
    "failed": "job.failure",
    "stopped": "job.stopped",
    "canceled": "job.canceled",
}
STOPPED = "Job stopped by user, work-horse terminated."


class Rq:
    """One job, as RQ keeps it in Redis.

    :param skew_s: what the workers' clock is ahead of Redis'.
    :param has_times: RQ 2.10 and newer note the execution's times with a result.
    """

    def __init__(self, *, skew_s: float, has_times: bool, retries: int | None, attached: bool) -> None:
        self.now = EPOCH
        self.skew = timedelta(seconds=skew_s)
        self.has_times = has_times
        self.attached = attached
        self.stream: list[tuple[str, OutboxEntry]] = []
        self.results: list[JobResult] = []
        self.hash: dict[str, Any] | None = None
        self.committed: dict[str, list[str]] = {}
        self.runs: list[str] = []
        self.reports: Counter[str] = Counter()
        self.kind: str | None = None
        self.abandoned = False
        self._number = 0
        self._enqueue(retries)

    def tick(self, seconds: float = 0.004) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now

    def _enqueue(self, retries: int | None) -> None:
        at = self.tick() + self.skew
        self.hash = {"status": "queued", "enqueued_at": at, "retries_left": retries, "ended_at": None}
        self.runs.append(format_time(at))
        self.kind, self.abandoned = None, False

    @property
    def status(self) -> str | None:
        return None if self.hash is None else self.hash["status"]

    def start(self) -> None:
        if self.status == "queued" and self.hash is not None:
            self.hash |= {"status": "started", "began": self.tick() + self.skew}
            self.hash["started_at"] = self.tick() + self.skew

    def _report(self, kind: str) -> None:
        if not self.attached or self.hash is None:
            return
        self._number += 1
        at = self.tick()
        began = self.hash.get("started_at")
        milliseconds = int(at.timestamp() * 1000)
        self.reports[kind] += 1
        entry = OutboxEntry(
            kind=kind, endpoint=ENDPOINT, job_id=JOB, run=self.runs[-1], enqueued_at=self.runs[-1],
            at=milliseconds / 1000, retries_left=self.hash["retries_left"],
            started_at=None if began is None else format_time(began),
            error={"type": "E", "message": "", "traceback": ""} if kind == "failure" else None,
        )  # fmt: skip
        self.stream.append((f"{milliseconds}-{self._number}", entry))

    def succeed(self) -> None:
        if self.status in ("started", "canceled") and self._runs() and self.kind is None:
            self.kind = "success"
            self._report("success")

    def fail(self) -> None:
        if self.status in ("started", "canceled") and self._runs() and self.kind is None:
            self.kind = "failure"
            self._report("failure")

    def end_silently(self) -> None:
        """Come to the end of the job without its report: Redis was away from the callback."""
        if self.status == "started" and self.kind is None:
            self.kind = "success"

    def report_again(self) -> None:
        if self.kind is not None and self.status == "started":
            self._report(self.kind)

    def _runs(self) -> bool:
        return self.hash is not None and self.hash.get("started_at") is not None

    def commit(self) -> None:
        if self.status not in ("started", "canceled") or self.kind is None:
            return
        if self.kind == "success":
            self._end("finished", "success", None)
        else:
            self._fail_or_retry("ValueError: x", result=True)

    def kill_horse(self) -> None:
        if self.status == "started":
            self._fail_or_retry("Work-horse terminated unexpectedly", result=True)

    def abandon(self) -> None:
        """Give the run up whose worker is gone, work-horse and all or without it."""
        if self.status != "started" or (
            self.kind == "success" and not self.has_times and not self._retries()
        ):
            return  # RQ 1.16 leaves no trace then; not even it knows
        reported = self.kind
        self._report("failure")
        was = self.runs[-1]
        self._fail_or_retry("AbandonedJobError", result=self.has_times)
        self.abandoned = reported is None and self.runs[-1] == was

    def finish_as_orphan(self) -> None:
        if self.status == "failed" and self.abandoned:
            self.abandoned = False
            self._report("success")
            self._end("finished", "success", None)

    def stop(self) -> None:
        if self.status == "started":
            self._report("stopped")
            self._end("stopped", "failure", STOPPED)

    def _retries(self) -> int:
        assert self.hash is not None
        return int(self.hash["retries_left"] or 0)

    def _fail_or_retry(self, exc: str, *, result: bool) -> None:
        if self._retries():
            self._enqueue(self._retries() - 1)
        else:
            self._end("failed", "failure" if result else None, exc)

    def _end(self, status: str, result: str | None, exc: str | None) -> None:
        assert self.hash is not None
        at = self.tick()
        self.hash |= {"status": status, "ended_at": at + self.skew}
        self.committed.setdefault(self.runs[-1], []).append(TYPE[status])
        if result is not None:
            milliseconds = timedelta(microseconds=at.microsecond % 1000)
            times = (
                {"started_at": self.hash.get("began"), "ended_at": at + self.skew} if self.has_times else {}
            )
            self.results.append(JobResult(type=result, at=at - milliseconds, exc=exc, **times))
            self.results = self.results[-10:]
        self.kind = None

    def cancel(self) -> None:
        if self.hash is not None and self.status in ("queued", "started"):
            self.tick()
            self.hash["status"] = "canceled"
            self.committed.setdefault(self.runs[-1], []).append("job.canceled")

    def requeue(self) -> None:
        if self.hash is not None and (
            self.status in ("finished", "failed", "stopped")
            or (self.status == "canceled" and not self._runs())
        ):
            self._enqueue(self.hash["retries_left"])

    def delete(self) -> None:
        self.hash, self.results, self.abandoned = None, [], False

    def expire(self) -> None:
        if self.status in ("finished", "failed", "stopped"):
            self.delete()

    def wait(self) -> None:
        self.tick(1.0)

    def record(self, *, results: bool) -> JobRecord | None:
        if self.hash is None:
            return None
        return JobRecord(
            job_id=JOB, status=self.hash["status"], run=self.runs[-1], created_at=EPOCH + self.skew,
            enqueued_at=self.hash["enqueued_at"], started_at=self.hash.get("started_at"),
            ended_at=self.hash["ended_at"], retries_left=self.hash["retries_left"],
            tokens=frozenset({ENDPOINT} if self.attached else ()),
            results=tuple(self.results) if results else None,
        )  # fmt: skip


MOVES = (
    "start", "succeed", "fail", "commit", "end_silently", "report_again", "kill_horse", "abandon",
    "finish_as_orphan", "stop", "cancel", "requeue", "delete", "expire", "wait",
)  # fmt: skip


class World:
    """RQ, our tables, and the readers of both."""

    def __init__(self, rq: Rq, dispatcher_skew_s: float) -> None:
        self.rq = rq
        self.skew = timedelta(seconds=dispatcher_skew_s)
        self.script: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.taken: set[str] = set()
        at = EPOCH + rq.skew
        self.watch: dict[str, Any] = {
            "status": "open", "run": rq.runs[0] if rq.attached else None, "evidence": None, "missing": 0,
            "created_at": at, "settled_at": None, "outcome": None, "recheck": False,
        }  # fmt: skip

    def then(self) -> None:
        """Let RQ go on, as the script says."""
        self.rq.tick()
        if self.script:
            getattr(self.rq, self.script.pop(0))()

    # -- Redis --------------------------------------------------------------------------------------------

    def read_jobs(self, _redis: Any, job_ids: Any, *, results: bool = False, **_more: Any) -> Jobs:
        jobs = Jobs()
        record = self.rq.record(results=results)
        if record is not None and list(job_ids):
            jobs[JOB] = record
        self.then()
        return jobs

    def probe_jobs(self, _redis: Any, job_ids: Sequence[str]) -> list[Any]:
        record = self.rq.record(results=False)
        self.then()
        if record is None:
            return [None for _ in job_ids]
        return [((record.status or "").encode(), record.run.encode(), b"default") for _ in job_ids]

    def read_until(self, _redis: Any, _key: Any) -> datetime | None:
        oldest = self.rq.stream[0][0] if self.rq.stream else None
        self.then()
        return None if oldest is None else datetime.fromtimestamp(int(oldest.partition("-")[0]) / 1000, UTC)

    def server_time(self, _redis: Any) -> datetime:
        return self.rq.tick()

    def read(self, consumer: str, *, count: int, block_ms: int) -> list[Entry]:
        found = [Entry(id_, entry) for id_, entry in self.rq.stream if id_ not in self.taken][:count]
        self.taken.update(one.id for one in found)
        self.then()
        return found

    def done(self, ids: Sequence[str]) -> None:
        self.rq.stream = [pair for pair in self.rq.stream if pair[0] not in ids]
        self.then()

    # -- SQL ----------------------------------------------------------------------------------------------

    def reported_endings(self, _database: Any, _job_ids: Any) -> dict[str, list[Reported]]:
        runs: dict[str, list[dict[str, Any]]] = {}
        for event in self.events:
            if event["type"] in TERMINAL_TYPES:
                runs.setdefault(event["run"], []).append(event)
        endings = [
            Reported(run=run, types=tuple(one["type"] for one in some), event_id=some[0]["id"],
                     ended_at=tuple(one["ended_at"] for one in some), stored_at=some[0]["stored_at"])
            for run, some in runs.items()
        ]  # fmt: skip
        self.then()
        return {JOB: endings} if endings else {}

    def publish(self, items: Sequence[Any], **_options: Any) -> list[IngestedEvent]:
        answers = []
        for item in items:
            what = item.occurrence
            there = next((one for one in self.events if one["key"] == what.run_key), None)
            if there is None:
                there = {
                    "key": what.run_key, "run": what.run, "type": what.type, "id": f"evt_{len(self.events)}",
                    "ended_at": what.occurred_at, "stored_at": self.rq.now, "supersedes": what.supersedes,
                }  # fmt: skip
                self.check_truth(what.type)
                self.events.append(there)
                note(f"{self.rq.now:%T.%f} {there['type']} of {there['run']} {there['supersedes'] or ''}")
                answers.append(IngestedEvent(there["id"], what.type, JOB, created=True, deliveries=1))
            else:
                answers.append(IngestedEvent(there["id"], there["type"], JOB, created=False, deliveries=0))
            noted = self.watch["run"]
            if there["type"] in TERMINAL_TYPES and (noted is None or _is_as_late(what.run, noted)):
                self.watch |= {
                    "status": "settled", "run": what.run, "outcome": there["type"], "evidence": None,
                    "missing": 0, "settled_at": self.rq.now, "recheck": True,
                }  # fmt: skip
        self.then()
        return answers

    def check_truth(self, event_type: str) -> None:
        """Never early, never more often than RQ committed it."""
        if event_type not in TERMINAL_TYPES or event_type == "job.lost":
            return
        said = 1 + sum(one["type"] == event_type for one in self.events)
        true = sum(event_type in ends for ends in self.rq.committed.values())
        if self.rq.hash is None:  # RQ no longer knows: a report stands
            true += self.rq.reports[event_type.removeprefix("job.")]
        assert said <= true, f"{event_type} was not committed: {self.rq.committed}"

    def park_reports(self, _database: Any, reports: Sequence[Any]) -> None:
        for one in reports:
            self.watch |= {"status": "open", "evidence": one.entry, "missing": 0}
        self.then()

    def load_watches(self, _database: Any, ids: Sequence[str]) -> list[WatchRow]:
        self.then()
        watch = self.watch
        if not ids or watch["status"] == "closed":
            return []
        return [
            WatchRow(id="wat", endpoint_id=ENDPOINT, job_id=JOB, status=watch["status"], run=watch["run"],
                     evidence=watch["evidence"], missing_passes=watch["missing"],
                     created_at=watch["created_at"], settled_at=watch["settled_at"],
                     counts_from=watch["created_at"], scope="job")
        ]  # fmt: skip

    def probe_waiting(self, _database: Any, status: str, *, after: str, **_more: Any) -> list[WatchProbe]:
        watch = self.watch
        if watch["status"] != status or after:
            return []
        full = watch["evidence"] is not None or watch["settled_at"] is not None
        return [WatchProbe("wat", JOB, watch["run"], watch["missing"], full, frozenset())]

    def probe_settled(self, _database: Any, *, kept: bool, after: str, limit: int) -> list[SettledProbe]:
        watch = self.watch
        if watch["status"] != "settled" or watch["recheck"] != kept or after:
            return []
        return [SettledProbe("wat", JOB, watch["run"], watch["outcome"], watch["settled_at"])]

    def write_updates(self, _database: Any, updates: Any, **_more: Any) -> None:
        watch = self.watch
        waiting = watch["status"] in ("reserved", "open")
        if updates.missing and waiting:
            watch["missing"] += 1
        if updates.present and waiting:
            watch["missing"] = 0
        if updates.decided:
            watch["evidence"] = None
            if watch["status"] == "open" and watch["settled_at"] is not None:
                watch["status"] = "settled"
        for before, run in updates.began.values():
            if watch["status"] in ("reserved", "open", "settled") and watch["run"] == before:
                watch |= {"status": "open", "run": run, "settled_at": None, "outcome": None, "recheck": False,
                          "missing": 0}  # fmt: skip
        for before, run, said in updates.caught_up.values():
            if watch["status"] == "settled" and watch["run"] == before:
                watch |= {"run": run, "outcome": said}
        if updates.kept and watch["status"] == "settled":
            watch["recheck"] = True
        if updates.forgotten and watch["status"] == "settled":
            watch["recheck"] = False
        self.then()


class Game:
    """A world with a dispatcher in it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.outbox = SimpleNamespace(
            read=world.read, done=world.done, length=lambda: len(world.rq.stream), key="k", rejected_key="r"
        )
        self.settings = load_settings({"RQ_WEBHOOKS_INCLUDE_RESULT": False}, {})
        self.monotonic = lambda: (world.rq.now - EPOCH).total_seconds()
        self.start_again()

    def start_again(self) -> None:
        """Be killed, and started again: what was read and not stored is read once more."""
        self.world.taken.clear()
        state: Any = SimpleNamespace(
            redis=None,
            database=SimpleNamespace(reads_freely=True),
            outbox=self.outbox,
            settings=self.settings,
            cipher=None,
        )
        publisher: Any = SimpleNamespace(publish=self.world.publish)
        self.ingest = Ingest(state, consumer="c", publisher=publisher, clock=self.monotonic)
        self.reconciler = Reconciler(
            state.database, state.redis, publish=self.world.publish, settings=self.settings, outbox_key="k",
            clock=lambda: self.world.rq.now + self.world.skew,
        )  # fmt: skip
        trees: Any = SimpleNamespace(run_once=lambda _should_stop: [])
        self.reconciler.trees = trees

    def read_and_die(self) -> None:
        self.world.read("c", count=2, block_ms=0)
        self.ingest._waiting.clear()

    def reconcile(self) -> None:
        self.reconciler.run_once()

    def take_in(self) -> None:
        self.ingest.run_once(block_ms=0)

    def come_to_rest(self) -> None:
        """Let the dispatcher do all it has to do, while RQ does nothing more."""
        self.world.script.clear()
        self.start_again()
        for _ in range(6):
            for _ in range(8):
                self.take_in()
                self.world.rq.tick(1.0)
            self.reconcile()
            self.world.rq.tick(15.0)


OURS = ("take_in", "take_in", "reconcile", "reconcile", "read_and_die", "start_again")


@contextmanager
def instead_of_redis_and_sql(world: World) -> Iterator[None]:
    observe = "flask_rq_webhooks.observe"
    watches = "flask_rq_webhooks.storage.watches"
    reported = "flask_rq_webhooks.storage.reported_runs"
    with ExitStack() as stack:
        for target, replacement in {
            f"{observe}.ingest.hold": lambda *_around, **_options: SimpleNamespace(transaction=ExitStack()),
            f"{observe}.ingest.FIRST_LOOK_S": 0.0,
            f"{observe}.ingest.HELD_LOOKS": 2,
            f"{observe}.ingest.read_endings": world.read_jobs,
            f"{observe}.ingest.read_jobs": world.read_jobs,
            f"{observe}.ingest.reported_endings": world.reported_endings,
            f"{observe}.ingest.park_reports": world.park_reports,
            f"{observe}.open_watches.read_jobs": world.read_jobs,
            f"{observe}.open_watches.probe_jobs": world.probe_jobs,
            f"{observe}.reconcile.probe_jobs": world.probe_jobs,
            f"{observe}.reconcile.any_exists": lambda _redis, _ids: world.rq.hash is not None,
            f"{observe}.reconcile.read_until": world.read_until,
            f"{observe}.reconcile.server_time": world.server_time,
            f"{observe}.reconcile.time": SimpleNamespace(monotonic=lambda: world.rq.now.timestamp()),
            f"{reported}.reported_endings": world.reported_endings,
            f"{watches}.load_watches": world.load_watches,
            f"{watches}.probe_waiting": world.probe_waiting,
            f"{watches}.probe_settled": world.probe_settled,
            f"{watches}.write_updates": world.write_updates,
            f"{watches}.optional_types_of_standing": lambda *_arguments: {},
            f"{reported}.known_keys": lambda *_arguments: {one["key"] for one in world.events},
        }.items():
            stack.enter_context(patch(target, replacement))
        yield


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@seed(SEED)
@settings(
    max_examples=GAMES, deadline=None, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    moves=st.lists(
        st.one_of(
            st.sampled_from(MOVES).map(lambda move: (move, ())),
            st.tuples(st.sampled_from(OURS), st.lists(st.sampled_from(MOVES), max_size=5).map(tuple)),
        ),
        max_size=24,
    ),
    worker_skew_s=st.sampled_from([0.0, -60.0, 60.0]),
    dispatcher_skew_s=st.sampled_from([0.0, -60.0, 60.0]),
    has_times=st.booleans(),
    retries=st.sampled_from([None, 1, 2]),
    attached=st.booleans(),
)
@pytest.mark.timeout(3600)
def test_whatever_happens_every_run_is_reported_truthfully_and_once(
    moves: list[tuple[str, tuple[str, ...]]],
    worker_skew_s: float,
    dispatcher_skew_s: float,
    has_times: bool,
    retries: int | None,
    attached: bool,
) -> None:
    rq = Rq(skew_s=worker_skew_s, has_times=has_times, retries=retries, attached=attached)
    world = World(rq, dispatcher_skew_s)
    with instead_of_redis_and_sql(world):
        game = Game(world)
        for move, script in moves:
            if move in MOVES:
                getattr(rq, move)()
            else:
                world.script = list(script)
                getattr(game, move)()
                world.script.clear()
            rq.tick()
        game.come_to_rest()
    check_the_end(world)


def check_the_end(world: World) -> None:
    rq = world.rq
    ends = Counter(
        one["run"] for one in world.events if one["type"] in TERMINAL_TYPES and not one["supersedes"]
    )
    corrections = Counter(one["run"] for one in world.events if one["supersedes"])
    assert max(ends.values(), default=0) <= 1
    assert max(corrections.values(), default=0) <= 1
    last = rq.runs[-1]
    said = [one["type"] for one in world.events if one["run"] == last and one["type"] in TERMINAL_TYPES]
    if rq.hash is None:
        known = world.watch["run"] is None or world.watch["status"] == "settled"
        assert known, "a job that is gone was not reported"
        assert world.watch["status"] == "settled"
    elif rq.status in TYPE:
        assert said, f"{rq.status} was not reported"
        # A second change of mind has no second correction.
        assert said[-1] == TYPE[rq.status or ""] or len(said) == 2
    else:
        assert world.watch["status"] in ("open", "settled")
    assert not rq.stream
    assert world.watch["evidence"] is None or rq.status in ("started", "queued", "canceled")


def test_the_seed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A counter-example can be played again: its seed and its moves are in the output."""
    assert random.Random(SEED).random() == random.Random(SEED).random()
    print(f"games: {GAMES}, seed: {SEED}")
    assert str(SEED) in capsys.readouterr().out
