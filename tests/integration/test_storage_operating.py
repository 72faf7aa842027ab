"""Resend, recover, cancel and prune."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from flask_rq_webhooks.protocol.events import SOURCE_APPLICATION, WEBHOOK_PING, Occurrence
from flask_rq_webhooks.storage import deliveries
from flask_rq_webhooks.storage.attempts import record_attempts
from flask_rq_webhooks.storage.crypto import Cipher, rekey
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.deliveries import (
    BATCH,
    Part,
    cancel_part,
    left_to_cancel,
    left_to_recover,
    recover_part,
    resend,
)
from flask_rq_webhooks.storage.endpoints import confirm
from flask_rq_webhooks.storage.events import IngestItem
from flask_rq_webhooks.storage.filters import DeliveryFilter
from flask_rq_webhooks.storage.models import Attempt, Base, Delivery, Endpoint, Event, Secret, Watch
from flask_rq_webhooks.storage.queries import CursorError
from flask_rq_webhooks.storage.retention import Pruned, prune
from flask_rq_webhooks.storage.standing_endpoints import disable_standing, enable_standing
from tests.storage_rows import (
    CIPHER,
    EXHAUSTED,
    MAX_ATTEMPTS,
    attempt,
    claim,
    deliver_to,
    new_endpoint,
    occurrence,
    publish,
    render,
    row,
    rows,
    set_values,
)


def finish(database: Database, decision: object = None) -> list[str]:
    """Attempt everything due, and return the deliveries."""
    claimed = claim(database, per_host=64)
    made = [attempt(one, decision) if decision is not None else attempt(one) for one in claimed]  # type: ignore[arg-type]
    record_attempts(database, made, dispatcher_id="dsp_1", disable_after=100)
    return [one.id for one in claimed]


def done_in_parts(
    step: Callable[..., Part], database: Database, where: DeliveryFilter, at_most: int = BATCH
) -> list[int]:
    """Do all parts; return how many deliveries each of them changed."""
    part = step(database, where, cursor=None, at_most=at_most)
    done = [part.done]
    while part.cursor is not None:
        part = step(database, where, cursor=part.cursor, at_most=at_most)
        done.append(part.done)
    return done


def recovered(database: Database, where: DeliveryFilter, at_most: int = BATCH) -> int:
    return sum(done_in_parts(part_of, database, where, at_most))


def canceled(database: Database, where: DeliveryFilter) -> int:
    return sum(done_in_parts(cancel_part, database, where))


@pytest.mark.parametrize("decision", [None, EXHAUSTED], ids=["succeeded", "exhausted"])
def test_resend_is_one_more_attempt_of_the_same_bytes(database: Database, decision: object) -> None:
    deliver_to(database, "a.example", max_attempts=1)
    (delivery_id,) = finish(database, decision)
    before = row(database, Delivery)
    assert resend(database, delivery_id) == "pending"
    stored = row(database, Delivery)
    assert (stored.status, stored.trigger, stored.finished_at) == ("pending", "manual", None)
    assert (stored.attempts, stored.max_attempts) == (1, 2)
    (claimed,) = claim(database)
    assert (claimed.number, claimed.trigger, claimed.event_id, claimed.body) == (
        2, "manual", before.event_id, before.body,
    )  # fmt: skip
    record_attempts(database, [attempt(claimed)], dispatcher_id="dsp_1", disable_after=100)
    assert [(one.number, one.trigger) for one in rows(database, Attempt)] == [(1, "scheduled"), (2, "manual")]
    assert row(database, Delivery).trigger == "scheduled"


def test_resend_of_what_waits_is_sooner(database: Database) -> None:
    (delivery_id,) = deliver_to(database, "a.example")
    set_values(database, Delivery, delivery_id, next_attempt_at=datetime.now(UTC) + timedelta(hours=5))
    assert resend(database, delivery_id) == "pending"
    (claimed,) = claim(database)
    assert (claimed.number, claimed.max_attempts) == (1, MAX_ATTEMPTS)
    assert resend(database, delivery_id) == "sending"
    assert row(database, Delivery).lease_id == claimed.lease_id
    assert resend(database, "dlv_unknown") is None


def test_recover_by_filter_in_batches(database: Database) -> None:
    deliver_to(database, "a.example", 7)
    deliver_to(database, "b.example", 2)
    finish(database, EXHAUSTED)
    deliver_to(database, "a.example", 2)
    finish(database)
    done = done_in_parts(part_of, database, DeliveryFilter(host="a.example"), 3)
    assert [number for number in done if number] == [3, 3, 1]
    by_status = {(one.host, one.status, one.trigger) for one in rows(database, Delivery)}
    assert by_status == {
        ("a.example", "pending", "manual"),
        ("a.example", "succeeded", "scheduled"),
        ("b.example", "exhausted", "scheduled"),
    }
    assert recovered(database, DeliveryFilter(statuses=("succeeded",))) == 2


def test_recover_makes_what_a_disabled_endpoint_missed(database: Database) -> None:
    standing = new_endpoint(database, kind="standing", reference="st")
    publish(database, occurrence("before"))
    disable_standing(database, standing)
    late = new_endpoint(database, kind="standing", host="late.example")
    disable_standing(database, late)
    publish(
        database,
        *[occurrence(f"missed-{number}") for number in range(5)],
        occurrence("optional", type="job.retrying"),
        occurrence("tree", scope="tree"),
        Occurrence(type=WEBHOOK_PING, occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION),
    )
    assert recovered(database, DeliveryFilter(endpoint_id=standing)) == 0, "it is disabled"
    enable_standing(database, standing)
    assert recovered(database, DeliveryFilter(endpoint_id=standing), at_most=2) == 5
    assert recovered(database, DeliveryFilter(endpoint_id=standing)) == 0, "nothing is made twice"
    made = [json.loads(one.body) for one in rows(database, Delivery, Delivery.trigger == "manual")]
    assert sorted(body[2] for body in made) == [f"missed-{number}" for number in range(5)]
    assert {body[3] for body in made} == {"st"}
    enable_standing(database, late)
    assert recovered(database, DeliveryFilter(job_id="missed-1")) == 1
    assert recovered(database, DeliveryFilter(statuses=("exhausted",))) == 0
    assert recovered(database, DeliveryFilter(since=datetime.now(UTC) + timedelta(hours=1))) == 0
    assert {one.host for one in rows(database, Delivery)} == {"hooks.example.com", "late.example"}


def part_of(database: Database, where: DeliveryFilter, cursor: str | None, at_most: int = 2) -> Part:
    return recover_part(
        database, where, render=render, max_attempts=MAX_ATTEMPTS, cursor=cursor, at_most=at_most
    )


def test_recover_goes_on_where_the_part_before_stopped(database: Database) -> None:
    ids = deliver_to(database, "a.example", 5)
    finish(database, EXHAUSTED)
    where = DeliveryFilter(host="a.example", statuses=("exhausted",))
    first = part_of(database, where, None)
    assert first == Part(2, sorted(ids)[1])
    assert left_to_recover(database, where, first.cursor) == 3
    # What fails again meanwhile is behind the cursor: the walk ends.
    finish(database, EXHAUSTED)
    assert left_to_recover(database, where, None) == 5
    second = part_of(database, where, first.cursor)
    assert part_of(database, where, second.cursor) == Part(1, None)
    by_status = {one.id: one.status for one in rows(database, Delivery)}
    assert [by_status[one] for one in sorted(ids)] == ["exhausted"] * 2 + ["pending"] * 3


def test_a_part_that_was_the_last_says_so(database: Database) -> None:
    deliver_to(database, "a.example", 4)
    first = cancel_part(database, DeliveryFilter(), at_most=2)
    assert left_to_cancel(database, DeliveryFilter(), first.cursor) == 2
    assert cancel_part(database, DeliveryFilter(), cursor=first.cursor, at_most=2) == Part(2, None)
    assert left_to_cancel(database, DeliveryFilter(statuses=("succeeded",)), None) == 0


def test_what_disabled_endpoints_missed_is_made_in_parts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "EVENTS_PER_PART", 3)
    ids = sorted(new_endpoint(database, kind="standing", host=f"{name}.example") for name in "abc")
    for endpoint_id in ids:
        disable_standing(database, endpoint_id)
    publish(database, *[occurrence(f"missed-{number}") for number in range(7)])
    for endpoint_id in ids:
        enable_standing(database, endpoint_id)
    everything, parts = DeliveryFilter(), []
    cursor: str | None = None
    while True:
        if cursor is not None and len(rows(database, Delivery)) == 9:
            disable_standing(database, ids[1])  # seven for the first endpoint, two of this one's
        parts.append(part_of(database, everything, cursor))
        cursor = parts[-1].cursor
        if cursor is None:
            break
        assert left_to_recover(database, everything, cursor) is None
    assert all(part.done <= 2 for part in parts)
    by_endpoint = Counter(one.endpoint_id for one in rows(database, Delivery))
    assert (by_endpoint[ids[0]], by_endpoint[ids[2]]) == (7, 7)
    assert 0 < by_endpoint[ids[1]] < 7
    enable_standing(database, ids[1])
    assert recovered(database, everything) == 7 - by_endpoint[ids[1]] + 0
    assert part_of(database, everything, None).cursor is not None, (
        "whether anything was missed has to be looked for"
    )


@pytest.mark.parametrize(
    "cursor", ["", "x", "dlv_1", "ep_1:evt_1", "dlv_" + "U" * 26, "dlv_" + "0" * 26 + "\n"]
)
def test_a_cursor_of_somebody_else_is_refused(database: Database, cursor: str) -> None:
    deliver_to(database, "a.example")
    for step in (part_of, lambda *args: cancel_part(args[0], args[1], cursor=cursor)):
        with pytest.raises(CursorError):
            step(database, DeliveryFilter(), cursor)
    for count in (left_to_recover, left_to_cancel):
        with pytest.raises(CursorError):
            count(database, DeliveryFilter(), cursor)
    assert row(database, Delivery).status == "pending"


def test_cancel_by_filter(database: Database) -> None:
    deliver_to(database, "a.example", 5)
    deliver_to(database, "b.example", 1)
    assert done_in_parts(cancel_part, database, DeliveryFilter(host="a.example"), 2) == [2, 2, 1]
    stored = rows(database, Delivery, Delivery.host == "a.example")
    assert {(one.status, one.next_attempt_at) for one in stored} == {("canceled", None)}
    assert all(one.finished_at is not None for one in stored)
    assert [one.host for one in claim(database)] == ["b.example"]
    assert canceled(database, DeliveryFilter(statuses=("succeeded",))) == 0
    assert canceled(database, DeliveryFilter(statuses=("pending",))) == 0
    assert canceled(database, DeliveryFilter(statuses=("sending",))) == 1


def test_cancel_waits_for_what_is_being_recorded(database: Database) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    deliver_to(database, "a.example", 3)
    claimed = claim(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            connection.execute(select(Delivery.id).where(Delivery.id == claimed[0].id).with_for_update())
            waiting = pool.submit(cancel_part, database, DeliveryFilter(host="a.example"))
            with pytest.raises(FutureTimeoutError):
                waiting.result(timeout=0.5)
        assert waiting.result(timeout=30) == Part(3, None)
    assert {one.status for one in rows(database, Delivery)} == {"canceled"}


def age(database: Database, model: type[Base], column: str, by: timedelta) -> None:
    with database.write() as connection:
        connection.execute(update(model).values({column: datetime.now(UTC) - by}))


def test_prune_takes_what_ended_long_ago_and_nothing_unfinished(database: Database) -> None:
    old, month = timedelta(days=31), datetime.now(UTC) - timedelta(days=30)
    new_endpoint(database, job_id="done", secret="s")
    publish(database, occurrence("done"))
    finish(database)
    waits = new_endpoint(database, job_id="waits")
    publish(database, occurrence("waits"))
    opened = new_endpoint(database, job_id="open")
    confirm(database, opened, existing=["open"], unseen=[], reserved_job_id="open")
    standing = new_endpoint(database, kind="standing")
    assert prune(database, month) == Pruned(), "nothing is old yet"
    age(database, Delivery, "finished_at", old)
    set_values(database, Delivery, row(database, Delivery, Delivery.status == "pending").id, finished_at=None)
    age(database, Event, "created_at", old)
    age(database, Endpoint, "created_at", old)
    for watch in rows(database, Watch, Watch.status == "settled"):
        set_values(database, Watch, watch.id, settled_at=datetime.now(UTC) - old)
    reported: list[int] = []
    pruned = prune(database, month, progress=reported.append)
    assert pruned == Pruned(deliveries=1, events=1, watches=2, endpoints=1)
    assert reported == [1, 2, 4, 5]
    assert [one.job_id for one in rows(database, Event)] == ["waits"]
    assert [one.endpoint_id for one in rows(database, Delivery)] == [waits]
    assert rows(database, Attempt) == []
    assert [one.job_id for one in rows(database, Watch)] == ["open"]
    assert {one.id for one in rows(database, Endpoint)} == {waits, opened, standing}


def test_prune_takes_endpoints_nothing_points_to(database: Database) -> None:
    month = datetime.now(UTC) + timedelta(seconds=5)
    for number in range(5):
        endpoint_id = new_endpoint(database, job_id=f"job-{number}", secret="s")
        confirm(database, endpoint_id, existing=[], unseen=[], reserved_job_id=f"job-{number}")
    kept = new_endpoint(database, job_id="open")
    pruned = prune(database, month, batch=2)
    assert (pruned.watches, pruned.endpoints) == (5, 5)
    assert [one.id for one in rows(database, Endpoint)] == [kept]
    assert rows(database, Secret) == []


def test_prune_in_batches(database: Database) -> None:
    deliver_to(database, "a.example", 25)
    finish(database)
    pruned = prune(database, datetime.now(UTC) + timedelta(seconds=5), batch=4)
    assert (pruned.deliveries, pruned.events, pruned.watches, pruned.endpoints) == (25, 25, 25, 1)
    assert rows(database, Attempt) == []


def test_prune_stops_when_asked_and_goes_on_where_it_stopped(database: Database) -> None:
    deliver_to(database, "a.example", 10)
    finish(database)
    answers = iter([False, False, True, True, True, True])
    until = datetime.now(UTC) + timedelta(seconds=5)
    assert prune(database, until, batch=3, should_stop=lambda: next(answers)) == Pruned(deliveries=6)
    assert len(rows(database, Delivery)) == len(rows(database, Attempt)) == 4
    rest = prune(database, until, batch=3)
    assert (rest.deliveries, rest.events, rest.watches, rest.endpoints) == (4, 10, 10, 1)


def test_a_pruned_endpoint_does_not_break_a_late_callback(database: Database) -> None:
    endpoint_id = new_endpoint(database)
    prune(database, datetime.now(UTC) + timedelta(seconds=5))
    assert rows(database, Endpoint) == []
    (reported,) = publish(database, IngestItem(occurrence("job-1"), (endpoint_id,)))
    assert (reported.created, reported.deliveries) == (True, 0)


def test_rekey_encrypts_everything_anew(database: Database) -> None:
    for number in range(5):
        new_endpoint(database, secret=f"s{number}", headers={"N": str(number)} if number else {})
    reported: list[int] = []
    assert rekey(database, Cipher(["newer", "a key for tests"]), batch=2, progress=reported.append) == 9
    assert reported == [2, 4, 5, 7, 9]
    newer = Cipher(["newer"])
    assert {newer.decrypt(one.secret) for one in rows(database, Secret)} == {
        f"s{number}" for number in range(5)
    }
    headers = {one.headers and newer.decrypt(one.headers) for one in rows(database, Endpoint)}
    assert headers == {None, *(json.dumps({"N": str(number)}) for number in range(1, 5))}
    with pytest.raises(Exception, match="Nothing is lost"):
        rekey(database, CIPHER)
