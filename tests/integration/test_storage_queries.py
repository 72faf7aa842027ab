"""What people read: bounded, in order, with cursors."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from flask_rq_webhooks.protocol.events import SOURCE_APPLICATION, Occurrence
from flask_rq_webhooks.storage.attempts import record_attempts
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import heartbeat, pause
from flask_rq_webhooks.storage.endpoints import confirm
from flask_rq_webhooks.storage.events import IngestItem
from flask_rq_webhooks.storage.feed import events_after
from flask_rq_webhooks.storage.filters import DeliveryFilter
from flask_rq_webhooks.storage.models import Delivery, Event
from flask_rq_webhooks.storage.queries import (
    MAX_PAGE,
    CursorError,
    delivery_detail,
    endpoint_detail,
    event_detail,
    job_webhook,
    list_deliveries,
    list_endpoints,
)
from flask_rq_webhooks.storage.standing_endpoints import disable_standing
from flask_rq_webhooks.storage.statistics import Hour, statistics
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
    set_values,
)


def record(database: Database, *records: object) -> None:
    record_attempts(database, records, dispatcher_id="dsp_1", disable_after=100)  # type: ignore[arg-type]


def test_the_webhook_of_a_job_from_waiting_to_succeeded(database: Database) -> None:
    assert job_webhook(database, "job-1") is None
    endpoint_id = new_endpoint(database, job_id="job-1", runid="run", url="https://a.example/h?token=1")
    confirm(database, endpoint_id, existing=["job-1"], unseen=[], reserved_job_id="job-1")
    waiting = job_webhook(database, "job-1")
    assert waiting is not None
    assert (waiting.url, waiting.runid, waiting.delivery_status) == (
        "https://a.example/h?token=1", "run", "waiting",
    )  # fmt: skip
    assert (waiting.events, waiting.deliveries) == ((), ())
    (event,) = publish(database, occurrence("job-1"))
    pending = job_webhook(database, "job-1")
    assert pending is not None
    assert pending.delivery_status == "pending"
    assert [one.id for one in pending.events] == [event.event_id]
    (claimed,) = claim(database)
    record(database, attempt(claimed, retry_in(0)))
    (claimed,) = claim(database)
    record(database, attempt(claimed))
    done = job_webhook(database, "job-1")
    assert done is not None
    ((delivery, attempts),) = done.deliveries
    assert (done.delivery_status, delivery.status, delivery.attempts) == ("succeeded", "succeeded", 2)
    assert [(one.number, one.status, one.error_code) for one in attempts] == [
        (1, "failed", "http_5xx"),
        (2, "succeeded", None),
    ]
    assert attempts[0].request_headers == {"X-Webhook-Attempt": "1"}
    assert attempts[0].response_body == b"ok"


def test_the_webhook_of_a_job_hides_standing_endpoints(database: Database) -> None:
    new_endpoint(database, kind="standing", url="https://internal.example/")
    publish(database, occurrence("job-1"))
    assert job_webhook(database, "job-1") is None
    new_endpoint(database, job_id="job-2")
    publish(database, occurrence("job-2"))
    stored = job_webhook(database, "job-2")
    assert stored is not None
    assert [delivery.url for delivery, _attempts in stored.deliveries] == ["https://hooks.example.com/x"]


def test_a_reservation_that_came_to_nothing_is_no_webhook(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1")
    confirm(database, endpoint_id, existing=[], unseen=[], reserved_job_id="job-1")
    assert job_webhook(database, "job-1") is None


def test_pages_of_deliveries(database: Database) -> None:
    ids = sorted(deliver_to(database, "a.example", 7), reverse=True)
    first = list_deliveries(database, DeliveryFilter(), limit=3)
    second = list_deliveries(database, DeliveryFilter(), limit=3, cursor=first.cursor)
    third = list_deliveries(database, DeliveryFilter(), limit=3, cursor=second.cursor)
    assert [one.id for page in (first, second, third) for one in page.items] == ids
    assert [len(page.items) for page in (first, second, third)] == [3, 3, 1]
    assert third.cursor is None
    assert list_deliveries(database, DeliveryFilter(), limit=7).cursor is None


def test_a_page_is_never_longer_than_the_cap(database: Database) -> None:
    deliver_to(database, "a.example", MAX_PAGE + 5)
    page = list_deliveries(database, DeliveryFilter(), limit=10_000)
    assert len(page.items) == MAX_PAGE
    assert page.cursor is not None
    assert len(list_deliveries(database, DeliveryFilter(), limit=-5).items) == 1


@pytest.mark.parametrize("cursor", ["", "x", "é", "MTIz!", "aGVsbG8", "MQpu"])
def test_foreign_cursors_are_refused(database: Database, cursor: str) -> None:
    with pytest.raises(CursorError):
        list_deliveries(database, DeliveryFilter(), cursor=cursor)
    with pytest.raises(CursorError):
        events_after(database, cursor=cursor)


def test_filters_of_deliveries(database: Database) -> None:
    one = new_endpoint(database, host="a.example", events=("*",))
    two = new_endpoint(database, host="b.example", events=("*",))
    publish(database, IngestItem(occurrence("job-1", runid="run-1"), (one, two)))
    publish(database, IngestItem(occurrence("job-2", runid="run-2", type="job.failure"), (one,)))
    (claimed,) = claim(database, limit=1)
    record(database, attempt(claimed, EXHAUSTED))

    def found(**values: object) -> set[tuple[str | None, str]]:
        page = list_deliveries(database, DeliveryFilter(**values))  # type: ignore[arg-type]
        return {(delivery.job_id, delivery.host) for delivery in page.items}

    now = datetime.now(UTC)
    every = {("job-1", "a.example"), ("job-1", "b.example"), ("job-2", "a.example")}
    assert found() == every
    assert found(endpoint_id=two) == {("job-1", "b.example")}
    assert found(host="a.example") == every - {("job-1", "b.example")}
    assert found(event_type="job.failure") == {("job-2", "a.example")}
    assert found(job_id="job-1") == every - {("job-2", "a.example")}
    assert found(runid="run-2") == {("job-2", "a.example")}
    assert found(statuses=("exhausted",)) == {(claimed.job_id, claimed.host)}
    assert found(statuses=("exhausted", "pending")) == every
    assert found(event_id=claimed.event_id, endpoint_id=claimed.endpoint_id) == {
        (claimed.job_id, claimed.host)
    }
    assert found(since=now - timedelta(minutes=1), until=now + timedelta(minutes=1)) == every
    assert found(until=now - timedelta(minutes=1)) == set()
    assert found(since=now + timedelta(minutes=1)) == set()


def test_details(database: Database) -> None:
    endpoint_id = new_endpoint(
        database, job_id="job-1", secret="s", headers={"A": "1"}, events=("job.success",)
    )
    publish(database, occurrence("job-1"))
    (claimed,) = claim(database)
    record(database, attempt(claimed))
    detail = delivery_detail(database, claimed.id)
    assert detail is not None
    assert (detail.delivery.id, detail.body) == (claimed.id, claimed.body)
    assert [one.number for one in detail.attempts] == [1]
    assert detail.event == event_detail(database, claimed.event_id)
    assert detail.event.payload == row(database, Event).payload
    assert detail.endpoint == endpoint_detail(database, endpoint_id)
    assert (detail.endpoint.secrets, detail.endpoint.events) == (1, ("job.success",))
    for hidden in ("https://", str(detail.endpoint.headers)):
        assert hidden not in repr(detail)
    assert delivery_detail(database, "dlv_x") is None
    assert endpoint_detail(database, "ep_x") is None
    assert event_detail(database, "evt_x") is None


def test_endpoints_by_kind(database: Database) -> None:
    standing = [new_endpoint(database, kind="standing", description=f"no {number}") for number in range(3)]
    bound = new_endpoint(database)
    page = list_endpoints(database, limit=2)
    rest = list_endpoints(database, limit=2, cursor=page.cursor)
    assert [one.id for one in (*page.items, *rest.items)] == sorted(standing, reverse=True)
    assert [one.id for one in list_endpoints(database, kind="job").items] == [bound]


def test_numbers_of_an_empty_database(database: Database) -> None:
    numbers = statistics(database)
    assert set(numbers.counts.values()) == {0}
    assert (numbers.oldest_due_s, numbers.success_rate, numbers.p50_ms, numbers.oldest_watch) == (None,) * 4
    assert (numbers.hours, numbers.worst_hosts) == ([], [])
    assert (numbers.dispatchers, numbers.paused_since, numbers.endpoints_disabled) == (0, None, 0)


def test_numbers(database: Database) -> None:
    deliver_to(database, "good.example", 6)
    deliver_to(database, "bad.example", 3)
    claimed = claim(database)
    records = []
    for number, one in enumerate(sorted(claimed, key=lambda one: one.host)):
        decision = EXHAUSTED if one.host == "bad.example" else attempt(one).decision
        records.append(attempt(one, decision, duration_ms=10.0 * (number + 1)))
    record(database, *records)
    (waits,) = deliver_to(database, "late.example")
    set_values(database, Delivery, waits, next_attempt_at=datetime.now(UTC) - timedelta(seconds=30))
    new_endpoint(database, job_id="reserved-job")
    disable_standing(database, new_endpoint(database, kind="standing"))
    heartbeat(database, "dsp_1", started=True)
    pause(database)
    finished = datetime.now(UTC) - timedelta(hours=2)
    one_done = next(one.id for one in claimed if one.host == "good.example")
    set_values(database, Delivery, one_done, finished_at=finished)
    numbers = statistics(database)
    assert numbers.counts == {"pending": 1, "sending": 0, "succeeded": 6, "exhausted": 3, "canceled": 0}
    assert numbers.oldest_due_s is not None
    assert 29 < numbers.oldest_due_s < 35
    assert numbers.hours[0] == Hour(finished.replace(minute=0, second=0, microsecond=0), succeeded=1)
    assert sum(hour.exhausted for hour in numbers.hours) == 3
    assert numbers.hours_complete
    assert numbers.success_rate == pytest.approx(6 / 9)
    assert (numbers.p50_ms, numbers.p95_ms) == (50.0, 90.0)
    assert [(one.host, one.attempts, one.failed) for one in numbers.worst_hosts] == [("bad.example", 3, 3)]
    assert numbers.watches == {"open": 0, "reserved": 1}
    assert numbers.oldest_watch is not None
    assert (numbers.dispatchers, numbers.endpoints_disabled) == (1, 1)
    assert numbers.paused_since is not None


def test_application_events_have_no_job(database: Database) -> None:
    new_endpoint(database, kind="standing", events=("*",))
    what = Occurrence(type="model.published", occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION)
    publish(database, what)
    (delivery,) = list_deliveries(database, DeliveryFilter()).items
    assert (delivery.job_id, delivery.event_type, delivery.endpoint_kind) == (
        None,
        "model.published",
        "standing",
    )
