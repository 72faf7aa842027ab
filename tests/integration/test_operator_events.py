"""``webhook.delivery_exhausted`` and ``webhook.endpoint_disabled``: what an operator's receiver gets."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from flask_rq_webhooks.dispatch import recorder
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import NewEndpoint
from flask_rq_webhooks.storage.models import Delivery, Endpoint
from flask_rq_webhooks.storage.standing_endpoints import create_standing
from flask_rq_webhooks.web import operations
from tests.pipeline import SECRET, add_endpoint, deliveries, enqueue, events, open_state, rows
from tests.servers import Receiver

EXHAUSTED, DISABLED = "webhook.delivery_exhausted", "webhook.endpoint_disabled"


@pytest.fixture
def state(database_url: str, redis_url: str) -> Iterator[State]:
    with open_state(database_url, redis_url, retry_schedule=(0.05, 0.05), disable_after=2) as opened:
        yield opened


@pytest.fixture
def gone() -> Iterator[Receiver]:
    with Receiver(lambda received: (410, {}, b"gone")) as opened:
        yield opened


def add_standing(state: State, url: str, *types: str, **options: Any) -> str:
    checked = state.url_policy.check_url(url)
    endpoint = NewEndpoint(
        url=checked.url,
        host=checked.host_key,
        kind="standing",
        secret=SECRET,
        events=types or None,
        **options,
    )
    return create_standing(state.database, state.cipher, endpoint, namespace=state.namespace)


def burst(state: State) -> None:
    """Send everything that is due, retries and what follows from them included."""
    for _ in range(3):
        with state.database.write() as connection:
            pending = Delivery.status == "pending"
            connection.execute(update(Delivery).where(pending).values(next_attempt_at=datetime.now(UTC)))
        Dispatcher(state).run(burst=True)


@pytest.mark.parametrize("scope", ["job", "tree"])
def test_exhausted_delivery_is_reported_to_those_who_asked(
    state: State, receiver: Receiver, gone: Receiver, scope: str
) -> None:
    add_standing(state, receiver.url, EXHAUSTED, scope=scope)
    failing = add_endpoint(state, gone.url + "?token=private")
    job_id = enqueue(state, failing, "tests.jobs.add", 1, 2)

    burst(state)

    (received,) = receiver.received
    verify(received.body, received.headers, SECRET)
    assert received.headers["X-Webhook-Event"] == EXHAUSTED
    lost = next(one for one in deliveries(state) if one.endpoint_id == failing)
    data = received.json["data"]
    assert (data["delivery_id"], data["event_id"], data["event"]) == (lost.id, lost.event_id, "job.success")
    assert (data["job_id"], data["endpoint_id"], data["attempts"]) == (job_id, failing, 1)
    assert (data["error_code"], data["status_code"]) == ("http_4xx", 410)
    assert b"private" not in received.body


def test_nothing_is_stored_where_nobody_asked(state: State, receiver: Receiver, gone: Receiver) -> None:
    add_standing(state, receiver.url)
    enqueue(state, add_endpoint(state, gone.url), "tests.jobs.add", 1, 2)
    burst(state)
    assert [one.type for one in events(state)] == ["job.success"]
    assert [one.json["event"] for one in receiver.received] == ["job.success"]


def test_disabled_endpoint_is_reported_to_the_others(
    state: State, receiver: Receiver, gone: Receiver
) -> None:
    add_standing(state, receiver.url, DISABLED)
    failing = add_standing(state, gone.url + "?token=private", "job.success", DISABLED)
    enqueue(state, add_endpoint(state, receiver.url, events=("job.failure",)), "tests.jobs.add", 1, 2)

    burst(state)

    (received,) = receiver.received
    assert received.json["event"] == DISABLED
    assert received.json["data"]["endpoint_id"] == failing
    assert received.json["data"]["reason"] == "gone"
    assert b"private" not in received.body
    assert not next(one for one in rows(state, Endpoint) if one.id == failing).enabled
    assert not [one for one in deliveries(state) if (one.endpoint_id, one.event_type) == (failing, DISABLED)]


def test_endpoint_that_fails_too_often_is_reported_once(state: State, receiver: Receiver) -> None:
    add_standing(state, receiver.url, DISABLED)
    with Receiver(lambda received: (500, {}, b"no")) as down:
        failing = add_standing(state, down.url)
        long_ago = datetime.now(UTC) - timedelta(hours=25)
        with state.database.write() as connection:
            this = update(Endpoint).where(Endpoint.id == failing)
            connection.execute(this.values(failures=1, failing_since=long_ago))
        enqueue(state, add_endpoint(state, receiver.url, events=("job.failure",)), "tests.jobs.add", 1, 2)
        burst(state)
    assert [one.json["data"]["reason"] for one in receiver.received] == ["failing"]


def test_nothing_follows_from_deliveries_of_such_events_and_of_pings(state: State, gone: Receiver) -> None:
    """Else one dead receiver would cause events about events about events."""
    with Receiver(lambda received: (400, {}, b"no")) as refusing:
        first = add_standing(state, refusing.url, EXHAUSTED)
        add_standing(state, refusing.url, EXHAUSTED)
        operations.ping(state, first)
        burst(state)
        assert [one.type for one in events(state)] == ["webhook.ping"]

        enqueue(state, add_endpoint(state, gone.url), "tests.jobs.add", 1, 2)
        burst(state)

    assert [one.type for one in events(state)].count(EXHAUSTED) == 1
    assert {one.status for one in deliveries(state)} == {"exhausted"}


def test_failed_transaction_stores_neither_attempt_nor_event(
    state: State, receiver: Receiver, gone: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event is in the transaction of the attempt: what is recorded again is not published twice."""
    add_standing(state, receiver.url, EXHAUSTED)
    enqueue(state, add_endpoint(state, gone.url), "tests.jobs.add", 1, 2)
    publish, failures = recorder.publish_for_operators, []

    def fail_after_publishing(*arguments: Any) -> Any:
        published = publish(*arguments)
        if published and not failures:
            failures.append(published)
            raise StorageUnavailableError("the server went away before the commit")
        return published

    monkeypatch.setattr(recorder, "publish_for_operators", fail_after_publishing)
    burst(state)

    assert len(failures) == 1
    assert [one.json["event"] for one in receiver.received] == [EXHAUSTED]
    assert sorted(one.type for one in events(state)) == ["job.success", EXHAUSTED]
