"""Claim and record as history and backlog grow and while history is pruned, and a dispatcher's memory."""

from __future__ import annotations

import statistics
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import psutil
from sqlalchemy import func, select

from flask_rq_webhooks.dispatch.dispatcher import PRUNE_AGAIN_S, PRUNE_BATCH, PRUNE_PART_S
from flask_rq_webhooks.storage.attempts import AttemptRecord, Decision, record_attempts
from flask_rq_webhooks.storage.claims import ClaimedDelivery, claim_due
from flask_rq_webhooks.storage.models import Attempt, Delivery, new_id
from flask_rq_webhooks.storage.retention import prune

from .claim_plan import fill, fill_history
from .harness import Report, Size, blocks
from .installation import KINDS, Installation, servers
from .receiver import receiver

BATCH = 64
FEW = 10_000
HOSTS = 1000


def growth(size: Size) -> Report:
    """Compare the rate of claim and record with 10,000 rows and with many, and while these are pruned.

    Both databases, in turns.
    """
    many, claims = size["rows"], size["claims"]
    report = Report(
        f"Claim and record, batches of {BATCH}, {HOSTS:,} hosts: {many:,} rows against {FEW:,}, and while "
        "those of history are pruned"
    )
    with servers() as some:
        for kind, database in KINDS.items():
            few, history, backlog = (some.installation(kind) for _ in range(3))
            fill_history(history.state.database, many, HOSTS)
            fill(history.state.database, size["history_due"], HOSTS, analyze=True, first=many)
            fill(few.state.database, FEW, HOSTS, analyze=True)
            fill(backlog.state.database, many, HOSTS, analyze=True)
            took: dict[str, list[float]] = {"few": [], "rows of history": [], "due": []}
            for number in range(claims + 5):
                for name, installation in zip(took, (few, history, backlog), strict=True):
                    seconds = claim_and_record(installation)
                    if number >= 5:
                        took[name].append(seconds)
            parts = {name: blocks(seconds, size["rounds"]) for name, seconds in took.items()}
            medians = {name: statistics.median(seconds) for name, seconds in took.items()}
            report.data[kind] = medians
            for name in ("rows of history", "due"):
                report.add(
                    f"{database}: {BATCH / medians['few']:,.0f}/s with {FEW:,} rows, "
                    f"{BATCH / medians[name]:,.0f}/s with {many:,} {name}",
                    [short / long for short, long in zip(parts["few"], parts[name], strict=True)],
                    "share",
                    promise="growth",
                    at_least=0.9,
                )
            for installation in (few, history, backlog):
                _check(installation, BATCH * (claims + 5), many if installation is history else 0)
            _prune(report, database, history, size["parts"])
    return report


def _prune(report: Report, database: str, installation: Installation, parts: int) -> None:
    """Prune in the same process while claiming and recording, as a dispatcher does."""
    before = _size_mb(installation)
    pruner = _Pruner(installation)
    pruner.start()
    alone: list[float] = []
    beside: list[float] = []
    until = time.monotonic() + parts * PRUNE_AGAIN_S
    while time.monotonic() < until:
        busy = pruner.busy
        took = claim_and_record(installation)
        beside.append(took)
        if not busy and not pruner.busy:
            alone.append(took)
    pruner.enough = True
    pruner.join()
    assert pruner.deleted
    report.data[f"pruning, {database}"] = {
        "claims": len(beside),
        "deleted": pruner.deleted,
        "size_mb": before,
    }
    report.add(
        f"{database} ({before:,.0f} MB): {pruner.deleted:,} deliveries are pruned meanwhile; rate",
        statistics.mean(alone) / statistics.mean(beside),
        "share",
        promise="pruning",
        at_least=0.9,
    )
    longest = 1000 * max(beside)
    report.add(f"{database}: longest claim and record", longest, "ms", promise="pruning", at_most=200)


class _Pruner(threading.Thread):
    """Prunes in parts, as a dispatcher does, until it is told that it is enough."""

    def __init__(self, installation: Installation) -> None:
        super().__init__(daemon=True)
        self._database = installation.state.database
        self.deleted = 0
        self.busy = self.enough = False

    def run(self) -> None:
        while not self.enough:
            until, self.busy = time.monotonic() + PRUNE_PART_S, True
            pruned = prune(
                self._database,
                datetime.now(UTC),
                batch=PRUNE_BATCH,
                should_stop=lambda until=until: time.monotonic() > until,
            )
            self.busy = False
            self.deleted += pruned.deliveries
            time.sleep(PRUNE_AGAIN_S - PRUNE_PART_S)


def _size_mb(installation: Installation) -> float:
    database = installation.state.database
    if database.is_sqlite:
        return Path(str(database.engine.url.database)).stat().st_size / 2**20
    with database.read() as connection:
        size = connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()
    return int(size) / 2**20


def claim_and_record(installation: Installation) -> float:
    """Claim a batch, record that each delivery succeeded, and return the seconds that took."""
    database = installation.state.database
    began = time.perf_counter()
    claimed = claim_due(database, limit=BATCH, per_host=8, in_flight={}, lease_s=45)
    assert len(claimed) == BATCH
    outcome = record_attempts(
        database,
        [_succeeded(delivery) for delivery in claimed],
        dispatcher_id=new_id("dsp"),
        disable_after=100,
    )
    assert len(outcome.recorded) == BATCH
    return time.perf_counter() - began


def _check(installation: Installation, claimed: int, before: int) -> None:
    """Fail unless each delivery that was claimed has succeeded, with one attempt."""
    with installation.state.database.read() as connection:
        done = select(func.count()).select_from(Delivery).where(Delivery.status == "succeeded")
        assert connection.execute(done).scalar_one() == claimed + before
        attempts = select(func.count()).select_from(Attempt)
        assert connection.execute(attempts).scalar_one() == claimed + before


def _succeeded(delivery: ClaimedDelivery) -> AttemptRecord:
    return AttemptRecord(
        delivery=delivery,
        started_at=datetime.now(UTC),
        duration_ms=12.5,
        status_code=200,
        error_code=None,
        error_detail=None,
        request_headers={"Content-Type": "application/json", "webhook-id": delivery.event_id},
        response_headers={"content-type": "text/plain"},
        response_body=b"ok",
        decision=Decision(status="succeeded", delay_s=None, disable_endpoint=False, error_code=None),
    )


def memory(size: Size) -> Report:
    """Watch the resident memory of a dispatcher that sends the first deliveries of a long backlog."""
    due, sent = size["due"], size["sent"]
    report = Report(f"Resident memory of a dispatcher, SQLite, {due:,} due, over {sent:,} deliveries")
    with servers() as some, receiver(40) as target:
        installation = some.installation()
        endpoints = installation.endpoints(HOSTS, target.urls())
        fill(installation.state.database, due, HOSTS, analyze=True, endpoints=endpoints)
        target.ask("/reset")
        with installation.dispatcher() as dispatcher:
            dispatcher.wait_for_output("started")
            process = psutil.Process(dispatcher.pid)
            samples: list[tuple[int, float]] = []
            deadline = time.monotonic() + 1200
            while not samples or samples[-1][0] < sent:
                time.sleep(0.5)
                assert dispatcher.popen.poll() is None, dispatcher.output
                assert time.monotonic() < deadline, samples[-1]
                samples.append((target.ask("/count"), process.memory_info().rss / 2**20))
            assert dispatcher.stop() == 0, dispatcher.output
        installation.wait_until_recorded(target.ask("/count"))
        _tell_memory(report, samples, sent)
    return report


def _tell_memory(report: Report, samples: list[tuple[int, float]], sent: int) -> None:
    """Say how much memory it was at most, and how much more at the end than after the first tenth."""
    tenths = [
        statistics.median([rss for count, rss in samples if low <= count <= high] or [samples[-1][1]])
        for low, high in pairwise(sent * tenth / 10 for tenth in range(1, 11))
    ]
    report.data["ours"] = {
        "second_to_last_tenth_mb": tenths,
        "samples": samples[:: max(1, len(samples) // 50)],
    }
    words = f"{sent:,} deliveries"
    most = max(rss for _count, rss in samples)
    report.add(f"{words}: most", most, "MB", promise="memory", at_most=110)
    report.add(
        f"{words}: the last tenth against the second ({tenths[0]:.0f} MB); flat",
        tenths[-1] - tenths[0],
        "MB",
        promise="memory",
        at_most=5,
    )
