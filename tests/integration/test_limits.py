"""The rate limit per host: counted in Redis, and never in the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import redis

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.dispatch.host_limits import PAUSE_S, RateLimiter
from tests.pipeline import add_endpoint, attempts, deliveries, enqueue, open_state
from tests.servers import Receiver, free_port, valkey_server


@contextmanager
def limiter(client: redis.Redis, per_minute: int, **options: object) -> Iterator[RateLimiter]:
    made = RateLimiter(client, per_minute, **options)  # type: ignore[arg-type]
    yield made
    made.close()


def test_so_many_per_host_and_minute(redis_client: redis.Redis) -> None:
    with limiter(redis_client, 2) as limit:
        assert [limit.wait_s("a.example") for _ in range(2)] == [0, 0]
        assert 0 < limit.wait_s("a.example") <= 60
        assert limit.wait_s("b.example") == 0
        assert set(limit.full_hosts()) == {"a.example"}


def test_large_limits_are_counted_in_blocks_and_never_exceeded(redis_client: redis.Redis) -> None:
    with limiter(redis_client, 1000) as first, limiter(redis_client, 1000) as second:
        redis_client.config_resetstat()
        granted = 0
        for _ in range(600):
            granted += (first.wait_s("a.example") == 0) + (second.wait_s("a.example") == 0)
        assert 990 <= granted <= 1000
        assert first.wait_s("a.example") > 0
        assert second.wait_s("a.example") > 0
        # 100 blocks of 10, and each dispatcher's question that was answered with no. On a server that has not
        # seen the script yet, the first call fails and is made again.
        asked = redis_client.info("commandstats")["cmdstat_evalsha"]
        assert asked["calls"] - asked["failed_calls"] <= 102
        assert asked["failed_calls"] <= 1


def test_a_block_is_not_used_after_its_window(redis_client: redis.Redis) -> None:
    now = time.time()
    with limiter(redis_client, 1000, clock=lambda: now) as limit:
        assert limit.wait_s("a.example") == 0
        (key,) = redis_client.keys("rq_webhooks:limits*")
        assert int(redis_client.get(key) or 0) == 10
        assert limit.wait_s("a.example") == 0
        assert int(redis_client.get(key) or 0) == 10
        now += 61
        assert limit.wait_s("a.example") == 0
        assert int(redis_client.get(key) or 0) == 20


def test_no_limit_asks_nobody() -> None:
    with redis.Redis(port=free_port()) as nobody, limiter(nobody, 0) as limit:
        assert limit.wait_s("a.example") == 0


def test_two_dispatchers_count_together_and_two_apps_apart(redis_client: redis.Redis) -> None:
    with limiter(redis_client, 1) as first, limiter(redis_client, 1) as second:
        assert first.wait_s("a.example") == 0
        assert second.wait_s("a.example") > 0
    with limiter(redis_client, 1, namespace="other") as other_app:
        assert other_app.wait_s("a.example") == 0


def test_next_window_is_open_again(redis_client: redis.Redis) -> None:
    now = time.time()
    with limiter(redis_client, 1, clock=lambda: now) as limit:
        assert limit.wait_s("a.example") == 0
        wait_s = limit.wait_s("a.example")
        assert wait_s > 0
        redis_client.flushdb()  # as the server does when the window ends
        assert limit.wait_s("a.example") > 0  # known without asking
        now += wait_s + 0.01
        assert limit.wait_s("a.example") == 0


def test_redis_down_means_send_and_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    now = time.time()
    with redis.Redis(port=free_port()) as nobody, limiter(nobody, 1, clock=lambda: now) as limit:
        began = time.monotonic()
        assert [limit.wait_s("a.example") for _ in range(100)] == [0] * 100
        assert time.monotonic() - began < 1
        assert caplog.text.count("cannot be counted") == 1
        now += PAUSE_S + 1
        assert limit.wait_s("a.example") == 0
        assert caplog.text.count("cannot be counted") == 2


def test_counting_goes_on_when_redis_is_back() -> None:
    now = time.time()
    with valkey_server() as server:
        client = redis.Redis.from_url(server.url)
        with limiter(client, 1, clock=lambda: now) as limit:
            server.stop()
            assert [limit.wait_s("a.example") for _ in range(3)] == [0, 0, 0]
            server.start()
            now += PAUSE_S + 1
            assert limit.wait_s("a.example") == 0
            assert limit.wait_s("a.example") > 0
        client.close()


def test_over_the_limit_waits_without_spending_an_attempt(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    with open_state(database_url, redis_url, rate_limit_per_minute=2) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        for _ in range(5):
            enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
        Dispatcher(state).run(burst=True)

        assert len(receiver.received) == 2
        waiting = [delivery for delivery in deliveries(state) if delivery.status == "pending"]
        assert [delivery.attempts for delivery in waiting] == [0, 0, 0]
        assert len(attempts(state)) == 2
        soon = datetime.now(UTC) + timedelta(seconds=61)
        assert all(delivery.next_attempt_at <= soon for delivery in waiting)


def test_over_the_limit_is_given_up_with_the_policy_drop(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    with open_state(database_url, redis_url, rate_limit_per_minute=2, rate_limit_policy="drop") as state:
        endpoint_id = add_endpoint(state, receiver.url)
        for _ in range(5):
            enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
        Dispatcher(state).run(burst=True)

        assert len(receiver.received) == 2
        assert (
            sorted(delivery.status for delivery in deliveries(state)) == ["exhausted"] * 3 + ["succeeded"] * 2
        )
        dropped = [attempt for attempt in attempts(state) if attempt.status == "failed"]
        assert [(attempt.error_code, attempt.status_code) for attempt in dropped] == [
            ("rate_limited", None)
        ] * 3


def test_notices_name_every_attempt(sqlite_url: str, redis_url: str, receiver: Receiver) -> None:
    with (
        redis.Redis.from_url(redis_url, decode_responses=True) as listener,
        open_state(sqlite_url, redis_url, pubsub_url=redis_url) as state,
        listener.pubsub() as channel,
    ):
        channel.psubscribe("*")
        assert channel.get_message(timeout=5) is not None
        job_id = enqueue(state, add_endpoint(state, receiver.url, runid="basin-7"), "tests.jobs.add", 1, 2)
        Dispatcher(state).run(burst=True)
        heard: dict[str, str] = {}
        while (message := channel.get_message(timeout=1)) is not None:
            heard[message["channel"]] = message["data"]

    assert heard["basin-7:webhook"] == f"rq:{job_id} WEBHOOK succeeded job.success"
    telemetry = json.loads(heard["webhooks:telemetry"])
    assert abs(telemetry.pop("timestamp") - time.time()) < 30
    url = telemetry.pop("url")
    assert url.startswith(f"http://127.0.0.1:{receiver.port}/")
    assert telemetry == {"job_id": job_id, "runid": "basin-7", "status": "succeeded", "attempts": 1}


def test_delivery_does_not_wait_for_notices(
    sqlite_url: str, redis_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    with open_state(sqlite_url, redis_url, pubsub_url=nobody) as state:
        enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
        Dispatcher(state).run(burst=True)
        assert [delivery.status for delivery in deliveries(state)] == ["succeeded"]
    assert "notices cannot be published" in caplog.text
