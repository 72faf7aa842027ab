"""PostgreSQL goes away in the middle of everything, and comes back."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import redis
import sqlalchemy as sa

from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.models import Attempt, Delivery, Endpoint, Event, Watch
from tests.acceptance.conftest import FLASK, SECRET, Stack, running_stack
from tests.servers import PostgresHandle, Process, postgres_server, wait_until

#: Seconds without a database; the long form is for the release notes.
OUTAGE_S = float(os.environ.get("RQ_WEBHOOKS_TEST_OUTAGE_S", "4"))


@pytest.fixture
def own_postgres() -> Iterator[PostgresHandle]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def outage_stack(own_postgres: PostgresHandle, redis_url: str, redis_client: redis.Redis) -> Iterator[Stack]:
    with running_stack(redis_url, own_postgres.new_database(), redis_client) as running:
        yield running


@dataclass
class Client:
    """Submits jobs one after the other, and keeps what it was answered."""

    stack: Stack
    pause_s: float
    answers: list[tuple[float, int, float, str | None]] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._submit)
        self._thread.start()

    def _submit(self) -> None:
        number = 0
        while not self._stopped.is_set():
            number += 1
            began = time.monotonic()
            name, args = ("add", [1, number]) if number % 4 else ("fail", [f"no {number}"])
            response = self.stack.submit(f"/call/{name}", {"args": args})
            took_s = time.monotonic() - began
            job_id = response.get_json().get("job_id") if response.status_code == 200 else None
            self.answers.append((began, response.status_code, took_s, job_id))
            self._stopped.wait(self.pause_s)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(30)

    def statuses(self, since: float, until: float) -> Counter[int]:
        return Counter(
            status for began, status, took_s, _ in self.answers if since <= began and began + took_s <= until
        )

    @property
    def accepted(self) -> set[str]:
        return {job_id for _, _, _, job_id in self.answers if job_id}


def count(stack: Stack, query: Any) -> int:
    with get_state(stack.app).database.read() as connection:
        return int(connection.execute(query).scalar_one())


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ending", ["stopped", "crashed"])
def test_nothing_is_lost_and_nothing_is_enqueued_unregistered(
    outage_stack: Stack, own_postgres: PostgresHandle, redis_client: redis.Redis, ending: str
) -> None:
    stack = outage_stack
    stack.start_worker(worker_class="rq.SimpleWorker")
    dispatchers = [stack.start_dispatcher() for _ in range(2)]
    for dispatcher in dispatchers:
        dispatcher.wait_for_output("started")
    client = Client(stack, pause_s=0.03)
    try:
        stack.receiver.wait_for(20, timeout=60)
        gone_at = time.monotonic()
        own_postgres.stop(immediately=ending == "crashed")
        down_at = time.monotonic()
        time.sleep(OUTAGE_S)
        up_at = time.monotonic()
        own_postgres.start()
        serving_at = time.monotonic()
        accepted = len(client.accepted)
        wait_until(lambda: len(client.accepted) >= accepted + 20, what="jobs to be accepted again")
    finally:
        client.stop()

    # While it was away: 503, each at once, and nothing else.
    away = client.statuses(down_at, up_at)
    assert set(away) == {503}, away
    assert away[503] >= OUTAGE_S * 2
    assert {status for _, status, _, _ in client.answers} == {200, 503}
    assert max(took_s for _, _, took_s, _ in client.answers) < 6
    assert client.statuses(serving_at + 1, time.monotonic())[503] == 0

    # Everything accepted is reported, once, and verifiably.
    jobs = client.accepted
    wait_until(
        lambda: {r.json["job_id"] for r in stack.receiver.received} >= jobs,
        timeout=90,
        what="every accepted job to be reported",
    )
    wait_until(lambda: count(stack, sa.select(sa.func.count()).where(Delivery.status != "succeeded")) == 0)
    from flask_rq_webhooks.receiver import verify

    by_job: dict[str, set[str]] = {}
    for received in stack.receiver.received:
        webhook_id = verify(received.body, received.headers, SECRET).id
        assert webhook_id is not None
        by_job.setdefault(received.json["job_id"], set()).add(webhook_id)
    assert by_job.keys() == jobs
    assert all(len(ids) == 1 for ids in by_job.values())
    repeats = len(stack.receiver.received) - len(jobs)

    # No job is enqueued without its endpoint: each job in Redis has a watch, and was accepted.
    in_redis = {key.decode().removeprefix("rq:job:") for key in redis_client.scan_iter("rq:job:*")}
    assert in_redis == jobs
    with get_state(stack.app).database.read() as connection:
        watched = set(
            connection.execute(
                sa.select(Watch.job_id)
                .join(Endpoint, Endpoint.id == Watch.endpoint_id)
                .where(Watch.status == "settled")
            ).scalars()
        )
        events = Counter(connection.execute(sa.select(Event.job_id)).scalars())
        attempts = connection.execute(sa.select(sa.func.count()).select_from(Attempt)).scalar_one()
    assert watched == jobs
    assert events == Counter(jobs)
    assert attempts == len(jobs)
    assert all(dispatcher.popen.poll() is None for dispatcher in dispatchers)
    print(
        f"\n{ending}: away {up_at - gone_at:.1f} s, {len(jobs)} jobs accepted and reported, "
        f"{away[503]} answers 503 (slowest {max(t for _, _, t, _ in client.answers):.2f} s), "
        f"{repeats} requests repeated under the same webhook-id"
    )


def test_host_answers_503_in_its_words_and_nothing_runs(
    outage_stack: Stack, own_postgres: PostgresHandle, redis_client: redis.Redis
) -> None:
    stack = outage_stack
    job_id = stack.call("add", 1, 2)
    redis_client.delete("rq:queue:default")
    own_postgres.stop()

    response = stack.submit("/call/add", {"args": [1, 2]})

    assert response.status_code == 503
    assert response.get_json()["error"]["code"] == "webhooks_unavailable"
    assert int(response.headers["Retry-After"]) > 0
    assert response.headers["Webhook-Registered"] == "false"
    assert redis_client.llen("rq:queue:default") == 0
    # A request without a webhook is not affected.
    plain = stack.client().post("/call/add", json={"args": [1, 2]})
    assert plain.status_code == 200
    assert stack.client().get(f"/webhooks/jobs/{job_id}").status_code == 503
    assert stack.client().get("/webhooks/health").status_code == 503

    own_postgres.start()

    assert stack.submit("/call/add", {"args": [1, 2]}).headers["Webhook-Registered"] == "true"
    assert stack.client().get(f"/webhooks/jobs/{job_id}").status_code == 200


@pytest.mark.parametrize("options", [(), ("--processes", "2")], ids=["one", "two"])
def test_dispatcher_started_before_sql_waits_for_it(
    outage_stack: Stack,
    own_postgres: PostgresHandle,
    options: tuple[str, ...],
) -> None:
    stack, count = outage_stack, 2 if options else 1
    stack.call("add", 1, 2)
    own_postgres.stop()
    parent = stack.start_dispatcher(*options)
    wait_until(lambda: parent.output.count("Waiting for SQL; ") == count, timeout=60)
    pids = {child.pid for child in psutil.Process(parent.pid).children()} or {parent.pid}
    time.sleep(5)  # it tries every two seconds
    assert parent.output.count("Waiting for SQL; ") == count, "one line each"
    assert " started: up to " not in parent.output
    own_postgres.start()
    wait_until(lambda: parent.output.count(" started: up to ") == count, timeout=60)
    assert ({child.pid for child in psutil.Process(parent.pid).children()} or {parent.pid}) == pids
    assert "Next start in" not in parent.output  # no child ended meanwhile
    stack.start_worker(burst=True)
    stack.receiver.wait_for(1)
    assert parent.stop() == 0


def test_dispatcher_that_waits_for_sql_is_stopped_at_once(
    outage_stack: Stack, own_postgres: PostgresHandle
) -> None:
    own_postgres.stop()
    try:
        for options in ((), ("--processes", "2")):
            parent = outage_stack.start_dispatcher(*options)
            wait_until(lambda one=parent: "Waiting for SQL; " in one.output, timeout=60)
            began = time.monotonic()
            assert parent.stop() == 0, parent.output
            assert time.monotonic() - began < 10
            assert "Traceback" not in parent.output
    finally:
        own_postgres.start()


def test_dispatcher_does_not_wait_for_what_refuses_it(own_postgres: PostgresHandle, redis_url: str) -> None:
    environment = {"TEST_DATABASE_URL": own_postgres.url("no_such"), "TEST_REDIS_URL": redis_url}
    with Process(*FLASK, "rq-webhooks", "worker", env=environment) as process:
        assert process.wait(60) == 1
        assert "does not exist" in process.output
        assert "Traceback" not in process.output


def test_connections_that_the_server_closed_are_not_used_again(
    outage_stack: Stack, own_postgres: PostgresHandle
) -> None:
    """As after an idle timeout, or an administrator's pg_terminate_backend."""
    stack = outage_stack
    stack.call("add", 1, 2)
    url = own_postgres.url().replace("+psycopg", "")
    import psycopg

    with psycopg.connect(url, autocommit=True) as admin:
        closed = admin.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        ).fetchone()
    assert closed is not None
    assert closed[0] >= 1

    assert stack.submit("/call/add", {"args": [1, 2]}).headers["Webhook-Registered"] == "true"


def test_own_pool_is_small_and_shared_by_nobody(outage_stack: Stack, own_postgres: PostgresHandle) -> None:
    """However many threads register at once: ten connections of ours, none of the host's."""
    stack = outage_stack
    answers: list[int] = []

    def submit() -> None:
        for _ in range(5):
            answers.append(stack.submit("/call/add", {"args": [1, 2]}).status_code)

    threads = [threading.Thread(target=submit) for _ in range(20)]
    for thread in threads:
        thread.start()
    counts: list[int] = []
    import psycopg

    with psycopg.connect(own_postgres.url().replace("+psycopg", ""), autocommit=True) as admin:
        while any(thread.is_alive() for thread in threads):
            row = admin.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE 'test_%'"
            ).fetchone()
            assert row is not None
            counts.append(row[0])
            time.sleep(0.01)
    for thread in threads:
        thread.join()

    assert answers == [200] * 100
    # One that was closed is listed until its process has ended, so a single count may be too high.
    most = max(min(counts[start : start + 10]) for start in range(max(1, len(counts) - 9)))
    assert 1 <= most <= 10
