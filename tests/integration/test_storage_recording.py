"""An attempt and everything that follows from it, in one transaction."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from flask_rq_webhooks.storage.attempts import AttemptRecord, Decision, RecordResult, record_attempts
from flask_rq_webhooks.storage.claims import free_expired_leases
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.deliveries import cancel_part, resend
from flask_rq_webhooks.storage.filters import DeliveryFilter
from flask_rq_webhooks.storage.models import Attempt, Delivery, Endpoint
from flask_rq_webhooks.storage.standing_endpoints import enable_standing
from tests.storage_rows import (
    EXHAUSTED,
    attempt,
    claim,
    deliver_to,
    new_endpoint,
    occurrence,
    publish,
    retry_in,
    row,
    rows,
    set_values,
)


def record(database: Database, *records: AttemptRecord, disable_after: int = 100) -> RecordResult:
    return record_attempts(database, records, dispatcher_id="dsp_1", disable_after=disable_after)


def test_success(database: Database) -> None:
    (delivery_id,) = deliver_to(database, "a.example")
    (claimed,) = claim(database)
    made = attempt(claimed)
    result = record(database, made)
    assert (result.recorded, result.stale, result.disabled) == ({delivery_id: "succeeded"}, (), {})
    stored = row(database, Delivery)
    assert (stored.status, stored.attempts, stored.status_code, stored.error_code) == (
        "succeeded",
        1,
        204,
        None,
    )
    assert (stored.lease_id, stored.lease_until, stored.next_attempt_at) == (None, None, None)
    assert abs((stored.finished_at - datetime.now(UTC)).total_seconds()) < 5
    kept = row(database, Attempt)
    assert (kept.delivery_id, kept.number, kept.status, kept.trigger) == (
        delivery_id,
        1,
        "succeeded",
        "scheduled",
    )
    assert (kept.status_code, kept.duration_ms, kept.dispatcher_id) == (204, 12.5, "dsp_1")
    assert kept.started_at == made.started_at
    assert json.loads(kept.request_headers) == {"X-Webhook-Attempt": "1"}
    assert json.loads(kept.response_headers) == {"content-type": "text/plain"}
    assert kept.response_body == b"ok"


def test_a_failure_is_due_again_and_the_last_one_is_not(database: Database) -> None:
    deliver_to(database, "a.example")
    (claimed,) = claim(database)
    record(database, attempt(claimed, retry_in(300)))
    stored = row(database, Delivery)
    assert (stored.status, stored.attempts, stored.error_code) == ("pending", 1, "http_5xx")
    assert stored.finished_at is None
    assert 295 < (stored.next_attempt_at - datetime.now(UTC)).total_seconds() < 301
    set_values(database, Delivery, stored.id, next_attempt_at=datetime.now(UTC))
    (claimed,) = claim(database)
    assert claimed.number == 2
    failed = attempt(claimed, EXHAUSTED, status_code=None, error_code="timeout", error_detail="after 15 s")
    assert record(database, failed).recorded == {claimed.id: "exhausted"}
    stored = row(database, Delivery)
    assert (stored.status, stored.attempts, stored.error_code, stored.status_code) == (
        "exhausted", 2, "timeout", None,
    )  # fmt: skip
    assert stored.finished_at is not None
    assert [(one.number, one.status, one.error_code) for one in rows(database, Attempt)] == [
        (1, "failed", "http_5xx"),
        (2, "failed", "timeout"),
    ]


def test_a_batch_with_other_results(database: Database) -> None:
    deliver_to(database, "a.example", 8)
    claimed = claim(database)
    decisions = [EXHAUSTED, retry_in(1), attempt(claimed[2]).decision]
    result = record(database, *[attempt(one, decisions[n % 3]) for n, one in enumerate(claimed)])
    assert list(result.recorded.values()) == ["exhausted", "pending", "succeeded"] * 2 + [
        "exhausted",
        "pending",
    ]
    assert {one.id: one.status for one in rows(database, Delivery)} == result.recorded
    assert len(rows(database, Attempt)) == 8


def test_nothing_to_record(database: Database) -> None:
    assert record(database) == RecordResult({}, (), {})


def test_recording_again_records_nothing(database: Database) -> None:
    deliver_to(database, "a.example")
    (claimed,) = claim(database)
    made = attempt(claimed)
    record(database, made)
    again = record(database, made, made)
    assert (again.recorded, again.stale) == ({}, (claimed.id, claimed.id))
    assert len(rows(database, Attempt)) == 1


def test_a_lost_lease_records_nothing_and_moves_nothing_back(database: Database) -> None:
    """A dispatcher cut off for longer than its lease comes back when another has delivered."""
    deliver_to(database, "a.example", 2)
    cut_off = claim(database, lease_s=0.1)
    time.sleep(0.15)
    assert free_expired_leases(database) == 2
    first, second = claim(database)
    record(database, attempt(first))
    result = record(database, *[attempt(one, retry_in(1)) for one in cut_off])
    assert result.recorded == {}
    assert set(result.stale) == {first.id, second.id}
    stored = {one.id: one for one in rows(database, Delivery)}
    assert (stored[first.id].status, stored[second.id].status) == ("succeeded", "sending")
    assert stored[second.id].lease_id == second.lease_id
    assert len(rows(database, Attempt)) == 1
    record(database, attempt(second, retry_in(1)))
    assert [one.number for one in rows(database, Attempt)] == [1, 1]


@pytest.mark.parametrize(
    ("decision", "status"),
    [(retry_in(1), "canceled"), (EXHAUSTED, "canceled"), (Decision(status="succeeded"), "succeeded")],
    ids=["failed", "exhausted", "succeeded"],
)
def test_canceled_while_it_was_sent(database: Database, decision: Decision, status: str) -> None:
    deliver_to(database, "a.example")
    (claimed,) = claim(database)
    assert cancel_part(database, DeliveryFilter()).done == 1
    assert resend(database, claimed.id) == "sending", "an attempt is still under way"
    assert record(database, attempt(claimed, decision)).recorded == {claimed.id: status}
    stored = row(database, Delivery)
    assert (stored.status, stored.attempts, stored.next_attempt_at) == (status, 1, None)
    assert len(rows(database, Attempt)) == 1


def fail_standing(database: Database, endpoint_id: str, count: int, **options: int) -> RecordResult:
    publish(database, *[occurrence(f"{endpoint_id}-{number}-{time.time_ns()}") for number in range(count)])
    claimed = claim(database, per_host=64)
    assert len(claimed) == count
    return record(database, *[attempt(one, retry_in(3600)) for one in claimed], **options)


def test_a_standing_endpoint_is_disabled_after_failures_over_a_day(database: Database) -> None:
    endpoint_id = new_endpoint(database, kind="standing")
    assert fail_standing(database, endpoint_id, 4, disable_after=5).disabled == {}
    assert fail_standing(database, endpoint_id, 1, disable_after=5).disabled == {}, (
        "not failing for a day yet"
    )
    stored = row(database, Endpoint)
    assert (stored.failures, stored.enabled) == (5, True)
    set_values(database, Endpoint, endpoint_id, failing_since=datetime.now(UTC) - timedelta(hours=25))
    assert fail_standing(database, endpoint_id, 1, disable_after=5).disabled == {endpoint_id: "failing"}
    stored = row(database, Endpoint)
    assert (stored.failures, stored.enabled, stored.disabled_reason) == (6, False, "failing")
    assert stored.disabled_at is not None
    assert enable_standing(database, endpoint_id)
    stored = row(database, Endpoint)
    assert (stored.failures, stored.failing_since, stored.enabled) == (0, None, True)
    assert (stored.disabled_at, stored.disabled_reason) == (None, None)


def test_long_failing_but_few_failures_stays_enabled(database: Database) -> None:
    endpoint_id = new_endpoint(database, kind="standing")
    fail_standing(database, endpoint_id, 1, disable_after=5)
    set_values(database, Endpoint, endpoint_id, failing_since=datetime.now(UTC) - timedelta(days=9))
    assert fail_standing(database, endpoint_id, 1, disable_after=5).disabled == {}


def test_a_success_ends_the_failures(database: Database) -> None:
    endpoint_id = new_endpoint(database, kind="standing")
    fail_standing(database, endpoint_id, 3)
    publish(database, occurrence("good"))
    (claimed,) = claim(database)
    record(database, attempt(claimed))
    stored = row(database, Endpoint)
    assert (stored.failures, stored.failing_since) == (0, None)


def test_failures_in_one_batch_count_from_the_last_success(database: Database) -> None:
    new_endpoint(database, kind="standing")
    publish(database, *[occurrence(f"job-{number}") for number in range(4)])
    made = [attempt(one, retry_in(60)) for one in claim(database)]
    made[1] = replace(made[1], decision=Decision(status="succeeded"))
    record(database, *made)
    assert row(database, Endpoint).failures == 2


def test_gone_disables_a_standing_endpoint_at_once_and_spares_a_job_bound_one(database: Database) -> None:
    standing = new_endpoint(database, kind="standing")
    bound = new_endpoint(database, job_id="job-1")
    publish(database, occurrence("job-1"))
    gone = Decision(status="exhausted", error_code="http_4xx", disable_endpoint=True)
    result = record(database, *[attempt(one, gone, status_code=410) for one in claim(database)])
    assert result.disabled == {standing: "gone"}
    stored = {one.id: one for one in rows(database, Endpoint)}
    assert (stored[standing].enabled, stored[standing].disabled_reason) == (False, "gone")
    assert (stored[bound].enabled, stored[bound].failures) == (True, 0)
