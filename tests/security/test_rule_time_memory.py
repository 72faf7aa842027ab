"""SECURITY 7–9 through a dispatcher: what a receiver does costs a bounded time, and others nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.models import Endpoint
from tests.pipeline import add_endpoint, attempts, callbacks, deliveries, enqueue, open_state, rows
from tests.security.attackers import Attacker, drip, then
from tests.servers import Receiver

OpenState = Callable[..., State]


@pytest.fixture
def open_(sqlite_url: str, redis_url: str) -> Iterator[OpenState]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(open_state(sqlite_url, redis_url, **settings))


def publish(state: State, url: str, **options: Any) -> str:
    endpoint_id = add_endpoint(state, url, **options)
    enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
    return endpoint_id


def slow_headers(connection: Any) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    drip(b"X-A: b\r\n")(connection)


def slow_body(connection: Any) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    drip(b"a")(connection)


def continues(connection: Any) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.002)  # faster, and the headers are soon too long


@pytest.mark.slow_machine(reason="two seconds between the first timeout and the next request")
@pytest.mark.parametrize("script", [slow_headers, slow_body, continues], ids=lambda script: script.__name__)
def test_an_attacker_is_left_at_the_deadline_and_the_next_host_is_not_kept_waiting(
    open_: OpenState, receiver: Receiver, script: Any
) -> None:
    state = open_(timeout=1, connect_timeout=1, retry_schedule=[], concurrency=4, concurrency_per_host=2)
    with Attacker(then(b"", script)) as attacker:
        for _ in range(4):
            publish(state, attacker.url)
        publish(state, receiver.url)
        began = time.time()
        Dispatcher(state).run(burst=True)
        took = time.time() - began

    assert len(receiver.received) == 1
    failed = [row for row in attempts(state) if row.status == "failed"]
    first_slot_free_at = min(row.started_at.replace(tzinfo=UTC).timestamp() for row in failed) + 1
    # Hosts that never succeeded share their places: a new one waits for the first of them, not for all.
    assert receiver.received[0].at < first_slot_free_at + 1
    assert [(row.status_code, row.error_code) for row in failed] == [(None, "timeout")] * 4
    assert all(row.duration_ms < 2000 for row in failed)
    assert took < 12  # two rounds of two, on a busy machine


def test_a_big_answer_is_kept_up_to_the_cap(open_: OpenState, receiver: Receiver) -> None:
    state = open_()
    receiver.respond = lambda _received: (200, {"X-Own": "dropped", "Server": "s" * 5000}, b"\0<x>" * 100_000)
    publish(state, receiver.url)
    Dispatcher(state).run(burst=True)

    (attempt,) = attempts(state)
    assert attempt.status == "succeeded"
    assert attempt.response_body == (b"\0<x>" * 4096)[: 16 * 1024]
    assert "dropped" not in attempt.response_headers
    assert len(attempt.response_headers) < 1000


@pytest.mark.parametrize(
    ("value", "least_s", "most_s"),
    [
        *((value, 450, 550) for value in (
            "nan", "inf", "-5", "+5", "1e3", "0x10", "5.5", "9" * 400, "", "soon", "\u0661\u0662",
            "Thu, 32 Foo 2024 99:99:99 GMT", "Thu, 01 Jan 1970 00:00:00 GMT",
        )),
        ("600", 600, 600),
        ("9999999999", 86400, 86400),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400, 86400),
    ],
)  # fmt: skip
def test_retry_after_is_believed_within_bounds(
    open_: OpenState, receiver: Receiver, value: str, least_s: float, most_s: float
) -> None:
    state = open_(retry_schedule=[500])
    header = value.encode("utf-8").decode("latin-1")
    receiver.respond = lambda _received: (503, {"Retry-After": header}, b"")
    publish(state, receiver.url)
    Dispatcher(state).run(burst=True)

    (delivery,) = deliveries(state)
    due = delivery.next_attempt_at.replace(tzinfo=UTC)
    wait_s = (due - datetime.now(UTC)).total_seconds()
    assert least_s - 10 < wait_s <= most_s


# -- standing endpoints -----------------------------------------------------------------------------------


def standing(state: State, url: str, **values: Any) -> str:
    endpoint_id = add_endpoint(state, url, kind="standing")
    if values:
        with state.database.write() as connection:
            connection.execute(update(Endpoint).where(Endpoint.id == endpoint_id).values(**values))
    return endpoint_id


def end_job(state: State, watched_by: str) -> None:
    """Let a job end that is sent to standing endpoints."""
    import uuid

    import rq

    queue = rq.Queue(connection=state.redis, is_async=False)
    names = {name: rq.Callback(path) for name, path in callbacks(watched_by).items()}
    job = queue.create_job("tests.jobs.add", args=(1, 2), job_id=str(uuid.uuid4()), **names)
    queue.enqueue_job(job)


def test_an_endpoint_that_failed_for_a_day_is_disabled_and_sent_nothing_more(
    open_: OpenState, receiver: Receiver
) -> None:
    state = open_(retry_schedule=[], disable_after=3)
    receiver.respond = lambda _received: 500
    long_ago = datetime.now(UTC) - timedelta(hours=25)
    failing = standing(state, receiver.url, failures=2, failing_since=long_ago)
    recent = standing(state, receiver.url, failures=50, failing_since=datetime.now(UTC) - timedelta(hours=1))
    everyone = f"ep{state.namespace}_all"
    end_job(state, everyone)
    Dispatcher(state).run(burst=True)
    end_job(state, everyone)
    Dispatcher(state).run(burst=True)

    found = {row.id: row for row in rows(state, Endpoint)}
    assert (found[failing].enabled, found[failing].disabled_reason, found[failing].failures) == (
        False,
        "failing",
        3,
    )
    assert (found[recent].enabled, found[recent].failures) == (True, 52)
    assert len(receiver.received) == 3


def test_gone_disables_a_standing_endpoint_at_once(open_: OpenState, receiver: Receiver) -> None:
    state = open_()
    receiver.respond = lambda _received: 410
    endpoint_id = standing(state, receiver.url)
    everyone = f"ep{state.namespace}_all"
    end_job(state, everyone)
    Dispatcher(state).run(burst=True)
    end_job(state, everyone)
    Dispatcher(state).run(burst=True)

    (endpoint,) = rows(state, Endpoint)
    assert (endpoint.id, endpoint.enabled, endpoint.disabled_reason) == (endpoint_id, False, "gone")
    assert [row.status for row in deliveries(state)] == ["exhausted"]
    assert len(receiver.received) == 1
