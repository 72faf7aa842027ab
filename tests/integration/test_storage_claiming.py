"""Due deliveries are leased to one sender, fairly across hosts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, text

from flask_rq_webhooks.storage import claims
from flask_rq_webhooks.storage.attempts import record_attempts
from flask_rq_webhooks.storage.claims import defer, free_expired_leases, next_due_in, release
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.deliveries import cancel_part, resend
from flask_rq_webhooks.storage.dispatchers import pause, resume
from flask_rq_webhooks.storage.filters import DeliveryFilter
from flask_rq_webhooks.storage.models import Delivery, Event, Secret
from flask_rq_webhooks.storage.standing_endpoints import rotate_secret
from tests.storage_rows import CIPHER, attempt, claim, deliver_to, new_endpoint, row, rows, set_values


def wait_until_due(database: Database, ids: list[str], *, s_ago: float) -> None:
    """Make deliveries due since *s_ago* seconds, the first the longest."""
    now = datetime.now(UTC)
    for number, delivery_id in enumerate(ids):
        due = now - timedelta(seconds=s_ago) + timedelta(milliseconds=number)
        set_values(database, Delivery, delivery_id, next_attempt_at=due)


def test_a_claim_has_all_that_sending_needs(database: Database) -> None:
    (delivery_id,) = deliver_to(
        database, "a.example", secret="s3cret", headers={"X-Own": "1"}, timeout_s=3.0, sign_payload=True,
    )  # fmt: skip
    (claimed,) = claim(database)
    stored, event = row(database, Delivery), row(database, Event)
    assert (claimed.id, claimed.lease_id) == (delivery_id, stored.lease_id)
    assert (stored.status, claimed.number, claimed.trigger, claimed.max_attempts) == (
        "sending",
        1,
        "scheduled",
        12,
    )
    assert (claimed.body, claimed.host, claimed.url) == (stored.body, "a.example", "https://a.example/x")
    assert (claimed.event_id, claimed.event_type, claimed.job_id) == (event.id, "job.success", event.job_id)
    assert (claimed.endpoint_id, claimed.endpoint_kind) == (stored.endpoint_id, "job")
    assert claimed.headers is not None
    assert CIPHER.decrypt(claimed.headers) == '{"X-Own": "1"}'
    assert [CIPHER.decrypt(secret) for secret in claimed.secrets] == ["s3cret"]
    assert (claimed.sign_payload, claimed.format, claimed.timeout_s) == (True, "job", 3.0)
    assert 40 < (stored.lease_until - datetime.now(UTC)).total_seconds() <= 46
    for hidden in ("s3cret", "X-Own", "https://a.example"):
        assert hidden not in repr(claimed)


def test_live_secrets_newest_first(database: Database) -> None:
    endpoint_id = new_endpoint(database, kind="standing", secret="first")
    rotate_secret(database, CIPHER, endpoint_id, "second", grace_s=60)
    rotate_secret(database, CIPHER, endpoint_id, "third", grace_s=600)
    deliver_to(database, "b.example")
    by_endpoint = {claimed.endpoint_id: claimed for claimed in claim(database)}
    secrets = by_endpoint[endpoint_id].secrets
    assert [CIPHER.decrypt(secret) for secret in secrets] == ["third", "second", "first"]
    for secret in rows(database, Secret, Secret.expires_at.is_not(None)):
        set_values(database, Secret, secret.id, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    release(database, list(by_endpoint.values()))
    by_endpoint = {claimed.endpoint_id: claimed for claimed in claim(database)}
    assert [CIPHER.decrypt(secret) for secret in by_endpoint[endpoint_id].secrets] == ["third"]


def test_nothing_is_claimed_twice_or_early(database: Database) -> None:
    first, second = deliver_to(database, "a.example", 2)
    set_values(database, Delivery, second, next_attempt_at=datetime.now(UTC) + timedelta(seconds=30))
    assert [claimed.id for claimed in claim(database)] == [first]
    assert claim(database) == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("then", ["pending", "succeeded"])
def test_a_claim_reads_little_whatever_postgresql_believes(database: Database, then: str) -> None:
    """Autovacuum looks at the table while nothing is due, which is most of the time; or while much is."""
    for number in range(20):
        deliver_to(database, f"host{number}.example", 100)
    with database.write() as connection:
        connection.execute(text("UPDATE rq_webhooks_delivery SET status = :then"), {"then": then})
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE rq_webhooks_delivery"))
    with database.write() as connection:
        connection.execute(text("UPDATE rq_webhooks_delivery SET status = 'pending'"))

    plans: list[dict[str, Any]] = []

    def explain(connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if "walk(host" in statement:
            cursor = connection.connection.cursor()  # in the transaction of the claim
            cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            plans.append(cursor.fetchone()[0][0]["Plan"])

    event.listen(database.engine, "before_cursor_execute", explain)
    assert len(claim(database, limit=64)) == 64
    (plan,) = plans
    assert deliveries_read(plan) < 1500  # all 2,000 that are due, and again at every look, otherwise


def deliveries_read(plan: dict[str, Any]) -> float:
    """Return how many rows of deliveries a plan has read."""
    mine = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
    read = mine * plan["Actual Loops"] if plan.get("Relation Name") == "rq_webhooks_delivery" else 0
    return read + sum(map(deliveries_read, plan.get("Plans", [])))


def test_limit_and_the_cap_per_host(database: Database) -> None:
    deliver_to(database, "a.example", 20)
    deliver_to(database, "b.example", 20)
    assert claim(database, limit=0) == []
    claimed = claim(database, per_host=8, in_flight={"a.example": 3, "b.example": 8, "other.example": 1})
    assert Counter(one.host for one in claimed) == {"a.example": 5}
    assert len(claim(database, limit=3)) == 3


@pytest.mark.parametrize("window", [1, 256], ids=["hosts-in-turn", "all-that-is-due"])
def test_the_least_busy_hosts_go_first(
    database: Database, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "WINDOW", window)
    old = deliver_to(database, "a.example", 10)
    wait_until_due(database, old, s_ago=3600)
    deliver_to(database, "b.example", 10)
    deliver_to(database, "z.example", 2)
    claimed = claim(database, limit=6)
    assert Counter(one.host for one in claimed) == {"a.example": 2, "b.example": 2, "z.example": 2}
    assert [one.id for one in claimed if one.host == "a.example"] == old[:2]
    busy = claim(database, limit=4, in_flight={"a.example": 3, "b.example": 1})
    assert Counter(one.host for one in busy) == {"b.example": 3, "a.example": 1}


@pytest.mark.parametrize("window", [1, 256], ids=["hosts-in-turn", "all-that-is-due"])
def test_the_longest_due_of_a_host_goes_first(
    database: Database, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "WINDOW", window)
    ids = deliver_to(database, "a.example", 5)
    wait_until_due(database, ids[::-1], s_ago=60)
    assert [one.id for one in claim(database, limit=2)] == ids[::-1][:2]


def test_every_host_has_its_turn_when_there_are_more_hosts_than_places(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "WINDOW", 10)
    hosts = [f"h{number:02}.example" for number in range(20)]
    for host in hosts:
        deliver_to(database, host, 5)
    wait_until_due(
        database, [one.id for one in rows(database, Delivery, Delivery.host == "h00.example")], s_ago=99
    )
    order = [one.host for _ in range(5) for one in sorted(claim(database, limit=8), key=lambda one: one.host)]
    assert Counter(order) == dict.fromkeys(hosts, 2)
    assert set(order[:20] if len(set(order[:16])) == 16 else []) >= set(hosts[:16])


def test_a_host_without_room_is_passed_over(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "WINDOW", 1)
    deliver_to(database, "a.example", 3)
    deliver_to(database, "b.example", 3)
    claimed = claim(database, limit=1, per_host=2, in_flight={"a.example": 2})
    assert [one.host for one in claimed] == ["b.example"]


def test_hosts_that_wait_for_a_retry_are_passed_over(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "WINDOW", 2)
    for host in ("a.example", "b.example", "c.example"):
        wait_until_due(database, deliver_to(database, host, 2), s_ago=-60)
    deliver_to(database, "d.example", 3)
    assert [one.host for one in claim(database, limit=2)] == ["d.example"] * 2


def test_paused_claims_nothing(database: Database) -> None:
    deliver_to(database, "a.example")
    pause(database)
    assert claim(database) == []
    assert next_due_in(database) is None
    resume(database)
    assert len(claim(database)) == 1


def test_an_expired_lease_is_claimed_again(database: Database) -> None:
    deliver_to(database, "a.example")
    (first,) = claim(database, lease_s=0.2)
    assert free_expired_leases(database) == 0
    time.sleep(0.25)
    assert free_expired_leases(database) == 1
    (second,) = claim(database)
    assert (second.id, second.number) == (first.id, 1)
    assert second.lease_id != first.lease_id


def test_deferred_and_released(database: Database) -> None:
    deliver_to(database, "a.example", 2)
    first, second = claim(database)
    assert defer(database, [first], delay_s=60)
    assert not defer(database, [first], delay_s=60), "it is no longer held"
    assert release(database, [first, second]) == 1
    assert release(database, []) == 0
    stored = {one.id: one for one in rows(database, Delivery)}
    assert {(one.status, one.attempts, one.lease_id) for one in stored.values()} == {("pending", 0, None)}
    assert 58 < (stored[first.id].next_attempt_at - datetime.now(UTC)).total_seconds() < 61
    assert [one.id for one in claim(database)] == [second.id]


def test_given_back_after_it_was_canceled_it_is_nobodys(database: Database) -> None:
    (delivery_id,) = deliver_to(database, "a.example")
    (claimed,) = claim(database)
    assert cancel_part(database, DeliveryFilter(host="a.example")).done == 1
    assert release(database, [claimed]) == 0
    stored = row(database, Delivery)
    assert (stored.status, stored.lease_id, stored.lease_until) == ("canceled", None, None)
    assert resend(database, delivery_id)
    assert claim(database), "nothing stands in the way of sending it again"


def test_next_due_in(database: Database) -> None:
    assert next_due_in(database) is None
    first, second = deliver_to(database, "a.example", 2)
    assert next_due_in(database) == 0
    set_values(database, Delivery, first, next_attempt_at=datetime.now(UTC) + timedelta(seconds=50))
    set_values(database, Delivery, second, next_attempt_at=datetime.now(UTC) + timedelta(seconds=20))
    due = next_due_in(database)
    assert due is not None
    assert 18 < due < 21


@pytest.mark.parametrize("window", [1, 256], ids=["hosts-in-turn", "all-that-is-due"])
def test_dispatchers_at_once_never_claim_the_same(
    database: Database, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "WINDOW", window)
    for number in range(6):
        deliver_to(database, f"h{number}.example", 50)
    databases = [Database(database.url) for _ in range(4)]
    claimed: list[str] = []
    lock = threading.Lock()
    start = threading.Barrier(4)

    def work(own: Database, name: str) -> None:
        start.wait()
        idle = 0
        while idle < 20:
            batch = claim(own, limit=16)
            idle = 0 if batch else idle + 1
            result = record_attempts(
                own, [attempt(one) for one in batch], dispatcher_id=name, disable_after=100
            )
            with lock:
                claimed.extend(result.recorded)
            assert result.stale == ()

    threads = [
        threading.Thread(target=work, args=(own, f"dsp_{number}")) for number, own in enumerate(databases)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in databases:
        own.dispose()
    assert Counter(claimed) == {one.id: 1 for one in rows(database, Delivery)}
    assert len(claimed) == 300
    assert {one.status for one in rows(database, Delivery)} == {"succeeded"}


def test_two_dispatchers_share_the_backlog_of_one_host(database: Database) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    deliver_to(database, "a.example", 16)
    other = Database(database.url)
    # The first claim is still in its transaction when the second is made.
    with database.write() as connection:
        parameters = {
            "limit": 8, "per_host": 8, "in_flight": "{}", "window": 256, "after": "", "lease_id": "lea_1",
            "lease_s": 45.0,
        }  # fmt: skip
        first = connection.execute(claims._CLAIM_POSTGRESQL, parameters).all()
        second = claim(other, limit=8)
    other.dispose()
    assert len(first) == len(second) == 8
    assert not {one.id for one in first} & {one.id for one in second}
