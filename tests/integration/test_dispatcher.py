"""The whole dispatcher in this process: real Redis, both databases, a real receiver."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from flask_rq_webhooks import signals
from flask_rq_webhooks.dispatch import sender
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher, PeriodicJob
from flask_rq_webhooks.dispatch.host_limits import RateLimiter
from flask_rq_webhooks.dispatch.http import AttemptRequest, AttemptResult, RequestsTransport
from flask_rq_webhooks.dispatch.pubsub import Notices
from flask_rq_webhooks.dispatch.recorder import Recorder
from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.observe.ingest import Ingest
from flask_rq_webhooks.observe.publisher import Publisher
from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage import dispatchers
from flask_rq_webhooks.storage.claims import claim_due
from flask_rq_webhooks.storage.models import Delivery
from tests.pipeline import (
    SECRET,
    add_endpoint,
    attempts,
    deliveries,
    enqueue,
    events,
    open_state,
    running_dispatcher,
)
from tests.servers import Received, Receiver, postgres_server, valkey_server, wait_until


@pytest.fixture
def state(database_url: str, redis_url: str) -> Iterator[State]:
    with open_state(database_url, redis_url, retry_schedule=(0.05, 0.05)) as opened:
        yield opened


def burst(state: State, **options: Any) -> None:
    Dispatcher(state, **options).run(burst=True)


def test_job_is_delivered_signed_and_logged(state: State, receiver: Receiver) -> None:
    headers = {"Authorization": "Bearer of the client", "User-Agent": "theirs", "webhook-id": "forged"}
    endpoint_id = add_endpoint(state, receiver.url, headers=headers)
    job_id = enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)

    burst(state)

    (received,) = receiver.received
    verified = verify(received.body, received.headers, SECRET)
    assert received.json["job_id"] == job_id
    assert received.json["result"] == 3
    (delivery,) = deliveries(state)
    assert (delivery.status, delivery.attempts, delivery.status_code) == ("succeeded", 1, 204)
    assert received.body == delivery.body
    assert verified.id == delivery.event_id
    sent = received.headers
    assert sent["Content-Type"] == "application/json"
    assert sent["User-Agent"] == state.settings.user_agent
    assert sent["webhook-id"] == delivery.event_id
    assert sent["X-Webhook-Event"] == "job.success"
    assert sent["X-Webhook-Delivery"] == delivery.id
    assert sent["X-Webhook-Attempt"] == "1"
    assert sent["X-Webhook-Timestamp"] == sent["webhook-timestamp"]
    assert abs(int(sent["webhook-timestamp"]) - time.time()) < 30
    assert sent["Authorization"] == "Bearer of the client"
    (attempt,) = attempts(state)
    logged = json.loads(attempt.request_headers)
    assert logged["webhook-id"] == delivery.event_id
    assert "Bearer" not in attempt.request_headers
    assert (attempt.number, attempt.status, attempt.status_code) == (1, "succeeded", 204)


def test_task_format_has_an_iso_timestamp(state: State, receiver: Receiver) -> None:
    enqueue(state, add_endpoint(state, receiver.url, format="task"), "tests.jobs.add", 1, 2)
    burst(state)
    (received,) = receiver.received
    sent_at = datetime.fromisoformat(received.headers["X-Webhook-Timestamp"])
    assert int(sent_at.timestamp()) == int(received.headers["webhook-timestamp"])
    assert received.json["event_type"] == "task.completed"


def test_endpoint_without_secret_is_sent_unsigned(state: State, receiver: Receiver) -> None:
    enqueue(state, add_endpoint(state, receiver.url, secret=None), "tests.jobs.add", 1, 2)
    burst(state)
    (received,) = receiver.received
    assert not {name for name in received.headers if "signature" in name.lower()}


def test_server_wide_secret_signs_where_asked(database_url: str, redis_url: str, receiver: Receiver) -> None:
    with open_state(database_url, redis_url, signing_secret="the server's own") as state:
        endpoint_id = add_endpoint(state, receiver.url, secret=None, sign_payload=True)
        enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
        burst(state)
        (received,) = receiver.received
        verify(received.body, received.headers, "the server's own")


@pytest.mark.parametrize("why", ["wrong-key", "no-server-wide-secret"])
def test_what_cannot_be_signed_is_neither_sent_nor_lost(
    state: State, receiver: Receiver, why: str, database_url: str, redis_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if why == "wrong-key":
        endpoint_id = add_endpoint(state, receiver.url)
    else:
        endpoint_id = add_endpoint(state, receiver.url, secret=None, sign_payload=True)
    enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
    other_key = {"encryption_keys": ["another key, nobody stored anything with it"]}
    with open_state(database_url, redis_url) as misconfigured:
        if why == "wrong-key":
            misconfigured.app.config["SECRET_KEY"] = other_key["encryption_keys"][0]
        burst(misconfigured)

    assert receiver.received == []
    (delivery,) = deliveries(state)
    assert (delivery.status, delivery.attempts) == ("pending", 0)
    assert timedelta(seconds=50) < delivery.next_attempt_at - datetime.now(UTC) <= timedelta(seconds=60)
    assert attempts(state) == []
    assert ("ENCRYPTION_KEYS" if why == "wrong-key" else "SIGNING_SECRET") in caplog.text


def test_failed_attempts_are_repeated_with_the_same_bytes_and_id(state: State, receiver: Receiver) -> None:
    answers = iter([500, 503, 200])
    receiver.respond = lambda received: (next(answers), {}, b"seen")
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)

    with running_dispatcher(state):
        received = receiver.wait_for(3)
        wait_until(lambda: deliveries(state)[0].status == "succeeded")

    assert len({one.body for one in received}) == 1
    assert len({one.headers["webhook-id"] for one in received}) == 1
    assert [one.headers["X-Webhook-Attempt"] for one in received] == ["1", "2", "3"]
    assert [(a.number, a.status_code, a.error_code) for a in attempts(state)] == [
        (1, 500, "http_5xx"), (2, 503, "http_5xx"), (3, 200, None),
    ]  # fmt: skip


def test_delivery_is_exhausted_when_all_attempts_failed(state: State, receiver: Receiver) -> None:
    heard: Counter[str] = Counter()

    def listen_failed(_app: Any, **what: Any) -> None:
        heard[f"failed {what['error_code']}"] += 1

    def listen_exhausted(_app: Any, **what: Any) -> None:
        heard[f"exhausted after {what['attempts']}"] += 1

    receiver.respond = lambda received: (500, {}, b"no")
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    with (
        signals.attempt_failed.connected_to(listen_failed, sender=state.app),
        signals.delivery_exhausted.connected_to(listen_exhausted, sender=state.app),
        running_dispatcher(state),
    ):
        wait_until(lambda: deliveries(state) and deliveries(state)[0].status == "exhausted")
    assert len(receiver.received) == 3
    assert heard == {"failed http_5xx": 3, "exhausted after 3": 1}


def test_one_slow_host_has_its_share_and_no_more(database_url: str, redis_url: str) -> None:
    lock = threading.Lock()
    now_open = most_open = 0

    def slow(_received: Received) -> int:
        nonlocal now_open, most_open
        with lock:
            now_open += 1
            most_open = max(most_open, now_open)
        time.sleep(0.3)
        with lock:
            now_open -= 1
        return 204

    with (
        open_state(database_url, redis_url, concurrency=8, concurrency_per_host=3) as state,
        Receiver(slow) as slow_receiver,
        Receiver() as quick_receiver,
    ):
        slow_endpoint = add_endpoint(state, slow_receiver.url)
        quick_endpoint = add_endpoint(state, quick_receiver.url)
        for endpoint_id in [slow_endpoint] * 12 + [quick_endpoint] * 12:
            enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
        burst(state)
        assert len(slow_receiver.received) == 12
        assert most_open == 3
        assert len(quick_receiver.received) == 12
        # The slow host needs four rounds of 0.3 s; the quick one did not wait for them.
        last_quick = max(received.at for received in quick_receiver.received)
        last_slow = max(received.at for received in slow_receiver.received)
        assert last_quick < last_slow - 0.3


def test_end_of_job_to_receiver_takes_milliseconds(state: State, receiver: Receiver) -> None:
    endpoint_id = add_endpoint(state, receiver.url)
    ended: dict[str, float] = {}
    with running_dispatcher(state):
        wait_until(lambda: dispatchers.dispatcher_alive(state.database))
        for _ in range(30):
            ended[enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)] = time.time()
            time.sleep(0.05)
        receiver.wait_for(30)
    waits = sorted(one.at - ended[one.json["job_id"]] for one in receiver.received)
    # A third, since this machine may be busy with other things; anything that polls by the second fails.
    assert waits[10] < 0.5, waits


def test_stop_finishes_what_is_in_flight(state: State, receiver: Receiver) -> None:
    receiver.respond = lambda received: time.sleep(0.7) or 204
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    with running_dispatcher(state):
        receiver.wait_for(1)
    (delivery,) = deliveries(state)
    assert (delivery.status, delivery.attempts) == ("succeeded", 1)
    assert not dispatchers.dispatcher_alive(state.database)


def test_nothing_is_sent_while_paused(state: State, receiver: Receiver) -> None:
    dispatchers.pause(state.database)
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    burst(state)
    assert receiver.received == []
    assert [event.type for event in events(state)] == ["job.success"]

    dispatchers.resume(state.database)
    burst(state)
    assert len(receiver.received) == 1


def test_delivery_of_a_dead_dispatcher_is_sent_by_another(state: State, receiver: Receiver) -> None:
    dispatchers.pause(state.database)
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    burst(state)
    dispatchers.resume(state.database)
    (lost,) = claim_due(state.database, limit=1, per_host=1, in_flight={}, lease_s=3600)
    burst(state)
    assert receiver.received == []  # still held

    with state.database.write() as connection:
        connection.execute(update(Delivery).values(lease_until=datetime.now(UTC) - timedelta(seconds=1)))
    with running_dispatcher(state):
        (received,) = receiver.wait_for(1)
    assert received.headers["webhook-id"] == lost.event_id
    assert [attempt.number for attempt in attempts(state)] == [1]


def test_two_dispatchers_deliver_everything_once(
    state: State, receiver: Receiver, database_url: str, redis_url: str
) -> None:
    endpoint_ids = [add_endpoint(state, receiver.url) for _ in range(3)]
    jobs = {enqueue(state, endpoint_ids[number % 3], "tests.jobs.add", 1, number) for number in range(120)}
    with open_state(database_url, redis_url) as second, running_dispatcher(state), running_dispatcher(second):
        receiver.wait_for(120)
        wait_until(lambda: all(delivery.status == "succeeded" for delivery in deliveries(state)))
    assert {received.json["job_id"] for received in receiver.received} == jobs
    assert len(receiver.received) == 120
    assert len(attempts(state)) == 120
    assert state.outbox.length() == 0


def test_concurrency_is_never_exceeded(state: State) -> None:
    lock = threading.Lock()
    now_open = most_open = 0

    def slow(_received: Received) -> int:
        nonlocal now_open, most_open
        with lock:
            now_open += 1
            most_open = max(most_open, now_open)
        time.sleep(0.05)
        with lock:
            now_open -= 1
        return 204

    with Receiver(slow) as first, Receiver(slow) as second:
        for receiver in (first, second):
            endpoint_id = add_endpoint(state, receiver.url)
            for _ in range(15):
                enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
        burst(state, concurrency=4)
        assert len(first.received) + len(second.received) == 30
    assert most_open <= 4


def test_error_in_a_periodic_job_ends_nothing(
    state: State, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_should_stop: Any) -> None:
        raise ZeroDivisionError("a bug")

    with running_dispatcher(state, periodic=[PeriodicJob(name="broken", interval_s=0.05, run=broken)]):
        wait_until(lambda: caplog.text.count("ZeroDivisionError") >= 2)
        enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
        receiver.wait_for(1)


def test_error_nobody_expected_does_not_end_the_ingest(
    state: State, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    state.redis.set(state.outbox.key, "not a stream")
    with running_dispatcher(state):
        wait_until(lambda: "WRONGTYPE" in caplog.text)
        state.redis.delete(state.outbox.key)
        enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
        receiver.wait_for(1)
    assert "works again" in caplog.text


def test_redis_may_go_and_come_back(
    database_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        valkey_server(save="", appendonly="no") as server,
        open_state(database_url, server.url, retry_schedule=(0.3, 0.3)) as state,
    ):
        endpoint_id = add_endpoint(state, receiver.url)
        answers = iter([500])
        receiver.respond = lambda received: next(answers, 204)
        with running_dispatcher(state), caplog.at_level(logging.INFO):
            enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
            receiver.wait_for(1)
            server.stop()
            # Retries come from SQL, so they go on without Redis.
            receiver.wait_for(2)
            wait_until(lambda: "Nothing is lost" in caplog.text)
            server.start()
            enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
            receiver.wait_for(3)
        assert caplog.text.count("ingest: ConnectionError") + caplog.text.count("ingest: TimeoutError") <= 2


def test_claim_whose_answer_was_lost_is_made_again_at_once(
    state: State, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []

    def claim_and_lose(*args: Any, **options: Any) -> Any:
        claimed = claim_due(*args, **options)
        if claimed and not lost:
            lost.append(claimed[0].lease_id)
            raise StorageUnavailableError("the connection broke before the answer came")
        return claimed

    monkeypatch.setattr(sender, "claim_due", claim_and_lose)
    monkeypatch.setattr(sender.Sender, "offer", lambda self: None)  # a fresh delivery may need no claim
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    with running_dispatcher(state):
        receiver.wait_for(1, timeout=sender.LEASE_MARGIN_S / 2)
        wait_until(lambda: deliveries(state)[0].status == "succeeded")
    assert lost
    assert len(attempts(state)) == 1


class IdleTransport:
    """Takes requests and never begins with them."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        self.submitted += 1
        return Future()

    def close(self, *, wait: bool) -> None:
        """Nothing was begun."""


def test_what_the_transport_does_not_begin_is_given_back(
    state: State, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "QUEUED_S", 0.1)
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    transport = IdleTransport()
    with running_dispatcher(state, transport=transport):
        wait_until(lambda: transport.submitted >= 2)
    (left,) = deliveries(state)
    assert (left.status, left.attempts, left.lease_id) == ("pending", 0, None)
    assert not attempts(state)
    burst(state)
    assert len(receiver.received) == 1


class RefusingTransport(IdleTransport):
    """Has no thread for a request, once; then it hands it on."""

    def __init__(self, transport: RequestsTransport) -> None:
        super().__init__()
        self._transport = transport

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        self.submitted += 1
        if self.submitted == 2:
            raise RuntimeError("can't start new thread")
        return self._transport.submit(request)


def test_what_the_transport_refuses_is_sent_later(state: State, receiver: Receiver) -> None:
    endpoint_id = add_endpoint(state, receiver.url)
    for number in range(4):
        enqueue(state, endpoint_id, "tests.jobs.add", 1, number)
    with (
        RequestsTransport(state.url_policy, concurrency=2) as transport,
        running_dispatcher(state, transport=RefusingTransport(transport), concurrency=2) as dispatcher,
    ):
        wait_until(lambda: [one.status for one in deliveries(state)] == ["succeeded"] * 4, timeout=20)
        assert dispatcher._sender.in_flight == 0, "it keeps no place"
    assert len(attempts(state)) == 4


class OneHangs(IdleTransport):
    """Answers at once, except for one host: that never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = 0

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        future = super().submit(request)
        if "//127.0.0.2" not in request.url:
            self.answered += 1
            future.set_result(AttemptResult(started_at=datetime.now(UTC), duration_ms=1.0, status_code=204))
        return future


def test_a_host_that_hangs_does_not_slow_the_claims_for_others(state: State) -> None:
    for host, jobs in (("127.0.0.2", 10), ("127.0.0.3", 20)):
        endpoint_id = add_endpoint(state, f"http://{host}:9/in")
        for number in range(jobs):
            enqueue(state, endpoint_id, "tests.jobs.add", 1, number)
    Ingest(state, consumer="tests", publisher=Publisher(state)).run_once(block_ms=1)
    transport = OneHangs()
    sending = sender.Sender(
        state,
        transport=transport,
        limiter=RateLimiter(state.redis, 0),
        recorder=Recorder(state, notices=Notices.from_settings(state.settings), dispatcher_id="dsp_1"),
        concurrency=64,
    )
    waits = []
    while transport.answered < 20 and len(waits) < 10:
        waits.append(sending.advance())
    assert transport.answered == 20
    assert transport.submitted == 28, "eight in flight to the one that hangs"
    assert waits[:-1] == [0.0] * (len(waits) - 1), "there was room again at once"


def test_recording_ends_however_fast_answers_come(state: State, receiver: Receiver) -> None:
    endpoint_id = add_endpoint(state, receiver.url)
    enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
    recorder = Recorder(state, notices=Notices.from_settings(state.settings), dispatcher_id="dsp_1")
    written = 0

    def one_more(_retry_in_s: float | None) -> None:
        nonlocal written
        written += 1
        if written < 100:  # another answer arrived while this one was written
            recorder.add_refusal(lost, "rate_limited", "")

    recorder.on_recorded = one_more
    Ingest(state, consumer="tests", publisher=Publisher(state)).run_once(block_ms=1)
    (lost,) = claim_due(state.database, limit=1, per_host=8, in_flight={}, lease_s=45)
    recorder.add_refusal(lost, "rate_limited", "")
    recorder.record()
    assert written == 1
    assert len(recorder) == 1


@pytest.mark.slow
def test_postgresql_may_be_restarted(receiver: Receiver, redis_url: str) -> None:
    with (
        postgres_server() as server,
        open_state(server.new_database(), redis_url, retry_schedule=(0.2,) * 20) as state,
    ):
        endpoint_id = add_endpoint(state, receiver.url)
        jobs = [enqueue(state, endpoint_id, "tests.jobs.add", 1, number) for number in range(150)]
        receiver.respond = lambda received: time.sleep(0.02) or 204
        with running_dispatcher(state, concurrency=4):
            receiver.wait_for(20)
            server.stop()
            time.sleep(1.5)
            server.start()
            wait_until(
                lambda: (
                    len(deliveries(state)) == 150
                    and all(delivery.status == "succeeded" for delivery in deliveries(state))
                ),
                timeout=60,
            )
        by_id = Counter(received.headers["webhook-id"] for received in receiver.received)
        assert {received.json["job_id"] for received in receiver.received} == set(jobs)
        assert set(by_id) == {event.id for event in events(state)}
        assert len(attempts(state)) == 150
