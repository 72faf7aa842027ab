"""A dispatcher may be killed at any moment: nothing is lost, and what is repeated says so by its id."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest
from sqlalchemy import func, select

from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.models import Attempt, Delivery, Event
from tests.acceptance.conftest import SECRET, Stack
from tests.servers import wait_until

JOBS = 500
KILLS = 10


def count_of_succeeded(stack: Stack) -> int:
    with get_state(stack.app).database.read() as connection:
        query = select(func.count()).select_from(Delivery).where(Delivery.status == "succeeded")
        return int(connection.execute(query).scalar_one())


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_dispatcher_killed_at_ten_random_moments(stack: Stack) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    chance = random.Random(seed)
    stack.receiver.respond = lambda received: time.sleep(0.01) or 204
    job_ids = {stack.call("add", 1, number) for number in range(JOBS)}
    stack.start_worker(worker_class="rq.SimpleWorker", burst=True)

    for _ in range(KILLS):
        dispatcher = stack.start_dispatcher()
        dispatcher.wait_for_output("started")
        time.sleep(chance.uniform(0, 0.4))
        dispatcher.kill(signal.SIGKILL)
        dispatcher.wait()
    killed_at = len(stack.receiver.received)
    stack.start_dispatcher()
    wait_until(lambda: count_of_succeeded(stack) == JOBS, timeout=180, what="all deliveries succeeded")

    # A kill between headers and body leaves a torn request, which no receiver takes for a webhook.
    received = [one for one in stack.receiver.received if len(one.body) == int(one.headers["Content-Length"])]
    assert killed_at < JOBS, "every job was reported before the last kill; the test proves nothing"
    assert {one.json["job_id"] for one in received} == job_ids
    ids_of_job: dict[str, set[str]] = {}
    for one in received:
        verify(one.body, one.headers, SECRET)
        ids_of_job.setdefault(one.json["job_id"], set()).add(one.headers["webhook-id"])
    assert all(len(ids) == 1 for ids in ids_of_job.values())
    repeats = Counter(one.headers["webhook-id"] for one in received)
    assert sum(repeats.values()) - JOBS <= KILLS * 64, "more was repeated than was in flight"
    with get_state(stack.app).database.read() as connection:
        assert connection.execute(select(func.count()).select_from(Event)).scalar_one() == JOBS
        twice = (
            select(Attempt.delivery_id).group_by(Attempt.delivery_id, Attempt.number).having(func.count() > 1)
        )
        assert connection.execute(twice).all() == []
    assert get_state(stack.app).outbox.length() == 0


def test_sigterm_finishes_what_is_in_flight_and_exits_0(stack: Stack) -> None:
    stack.receiver.respond = lambda received: time.sleep(1) or 204
    stack.start_worker(worker_class="rq.SimpleWorker")
    dispatcher = stack.start_dispatcher()
    job_id = stack.call("add", 1, 2)
    stack.receiver.wait_for(1)

    began = time.monotonic()
    dispatcher.kill(signal.SIGTERM)
    assert dispatcher.wait(20) == 0
    assert time.monotonic() - began < 10
    assert stack.status(job_id)["delivery_status"] == "succeeded"
    assert "stopped" in dispatcher.output
    assert "Traceback" not in dispatcher.output


def test_second_signal_does_not_wait(stack: Stack) -> None:
    hold = True

    def respond(_received: object) -> int:
        deadline = time.monotonic() + 12
        while hold and time.monotonic() < deadline:
            time.sleep(0.05)
        return 204

    stack.receiver.respond = respond
    stack.start_worker(worker_class="rq.SimpleWorker")
    first = stack.start_dispatcher()
    job_id = stack.call("add", 1, 2)
    stack.receiver.wait_for(1)
    began = time.monotonic()
    first.kill(signal.SIGTERM)
    time.sleep(0.5)
    first.kill(signal.SIGTERM)
    assert first.wait(20) == 0
    assert time.monotonic() - began < 8
    assert stack.status(job_id)["delivery_status"] == "pending"

    hold = False
    stack.start_dispatcher()
    received = stack.receiver.wait_for(2)
    assert len({one.headers["webhook-id"] for one in received}) == 1
    wait_until(lambda: stack.status(job_id)["delivery_status"] == "succeeded")


@pytest.mark.slow
def test_two_dispatchers_and_a_worker_deliver_each_job_once(stack: Stack) -> None:
    dispatchers = [stack.start_dispatcher() for _ in range(2)]
    for dispatcher in dispatchers:
        dispatcher.wait_for_output("started")
    stack.start_worker(worker_class="rq.SimpleWorker")
    job_ids = [stack.call("add", 1, number) for number in range(150)]
    stack.receiver.wait_for(150, timeout=60)
    wait_until(lambda: count_of_succeeded(stack) == 150)
    received = stack.receiver.received
    assert sorted(one.json["job_id"] for one in received) == sorted(job_ids)
