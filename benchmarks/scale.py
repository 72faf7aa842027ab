"""Claim and record as history and backlog grow, and the memory of a dispatcher with both."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime

import psutil

from flask_rq_webhooks.protocol.retry import Decision
from flask_rq_webhooks.storage.deliveries import AttemptRecord, ClaimedDelivery, claim_due, record_attempts
from flask_rq_webhooks.storage.models import new_id

from .claim_plan import fill
from .harness import Options, Report
from .installation import Installation, servers
from .receiver import receiver

BATCH = 64


def growth(options: Options) -> Report:
    """Compare the rate of claim and record with 10,000 rows and with many; both databases, in turns."""
    many = options.scaled(1_000_000, 100_000)
    report = Report(f"Claim and record, batches of {BATCH}: {many:,} rows against 10,000")
    with servers() as some:
        for kind in ("sqlite", "postgresql"):
            few, history, backlog = (some.installation(kind) for _ in range(3))
            fill(few.state.database, 10_000, 1000, analyze=True)
            fill(backlog.state.database, many, 1000, analyze=True)
            fill(history.state.database, many, 1000, analyze=True)
            with history.state.database.write() as connection:
                connection.exec_driver_sql(
                    "UPDATE rq_webhooks_delivery SET status = 'succeeded', next_attempt_at = NULL,"
                    " finished_at = CURRENT_TIMESTAMP"
                )
            urls = [f"http://127.0.0.{number}:9/0/h" for number in range(1, 200)]
            history.seed_due(10_000, urls, shared_endpoints=True)
            took: dict[str, list[float]] = {"10,000": [], "history": [], "due": []}
            for number in range(1 + options.scaled(60, 20)):
                for name, installation in zip(took, (few, history, backlog), strict=True):
                    seconds = _claim_and_record(installation)
                    if number:
                        took[name].append(seconds)
            medians = {name: statistics.median(some) for name, some in took.items()}
            report.data[kind] = medians
            for name, words in (("history", "rows of history"), ("due", "due")):
                share = medians["10,000"] / medians[name]
                report.add(
                    f"{kind}: {BATCH / medians['10,000']:,.0f}/s; rate with {many:,} {words}",
                    f"{share:.2f}",
                    target=">= 0.85",
                    holds=share >= 0.85,
                )
    return report


def _claim_and_record(installation: Installation) -> float:
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


def memory(options: Options) -> Report:
    """Watch the resident memory of a dispatcher that works off a long backlog."""
    due = options.scaled(1_000_000, 20_000)
    sent = options.scaled(200_000, 10_000)
    report = Report(f"Resident memory of a dispatcher, {due:,} due, over {sent:,} deliveries")
    with servers() as some, receiver(40) as target:
        installation = some.installation()
        installation.seed_due(due, target.urls(), shared_endpoints=True)
        with installation.dispatcher() as dispatcher:
            process = psutil.Process(dispatcher.pid)
            samples: list[tuple[int, float]] = []
            while not samples or samples[-1][0] < sent:
                time.sleep(1)
                assert dispatcher.popen.poll() is None, dispatcher.output
                samples.append((target.ask("/count"), process.memory_info().rss / 2**20))
    early = next(rss for count, rss in samples if count >= sent / 10)
    most, last = max(rss for _count, rss in samples), samples[-1][1]
    report.data = {"samples": samples[:: max(1, len(samples) // 50)]}
    report.add("most", f"{most:.0f} MB", target="<= 150 MB", holds=most <= 150)
    report.add(
        f"after a tenth {early:.0f} MB, at the end {last:.0f} MB; growth",
        f"{last - early:+.1f} MB",
        target="flat (<= 5 MB)",
        holds=last - early <= 5,
    )
    return report
