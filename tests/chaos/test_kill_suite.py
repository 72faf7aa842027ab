"""SIGKILL at every named step and at random; then the auditor. Long forms: ``make chaos``.

With ``RQ_WEBHOOKS_CHAOS_FILE`` set, the counts are added there, one JSON object a line, for the docs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import select, update

from flask_rq_webhooks.storage.models import Attempt, Delivery, Event, Watch
from tests.chaos.auditor import Audit, audit
from tests.chaos.field import Field, Killer, open_field
from tests.servers import PostgresHandle, Received, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    with open_field(tmp_path) as opened:
        yield opened


def note(name: str, found: Audit, target: Field, **more: Any) -> None:
    path = os.environ.get("RQ_WEBHOOKS_CHAOS_FILE")
    if not path:
        return
    line = {
        "name": name,
        "accepted": found.accepted,
        "told": dict(found.told),
        "by_source": dict(found.by_source),
        "corrections": found.corrections,
        "lost": len(found.lost),
        "untruthful": len(found.untruthful),
        "doubled": len(found.doubled),
        "changed": len(found.changed),
        "requests": found.requests,
        "repeats": found.repeats,
        "kills": dict(target.kills),
        **more,
    }
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def checked(target: Field) -> Audit:
    found = audit(target.state, target.redis, target.accepted, target.promised, target.unanswered)
    assert found.faults == []
    return found


# -- named steps ------------------------------------------------------------------------------------------

#: Step → process that reaches it, and how often the receiver is told of one job.
STEPS = {
    "registered": ("web", 0),
    "enqueued": ("web", 1),
    "confirmed": ("web", 1),
    "entries read": ("dispatcher", 1),
    "event stored": ("dispatcher", 1),
    "delivery claimed": ("dispatcher", 1),
    "attempt made": ("dispatcher", 2),
    "attempt recorded": ("dispatcher", 1),
    "reconcile found": ("dispatcher", 1),
    "reconcile told": ("dispatcher", 1),
}


@pytest.mark.parametrize("step", STEPS, ids=[step.replace(" ", "-") for step in STEPS])
def test_sigkill_at_a_named_step(field: Field, step: str, tmp_path: Path) -> None:
    process, times = STEPS[step]
    mark = tmp_path / "died"
    field.die = {"TEST_DIE_AT": step, "TEST_DIE_ONCE": str(mark)}
    for name in ("worker-1", "dispatcher-1", "web"):  # web last: it is waited for
        field.start(name)

    # A work-horse that dies has no callback, so that reconcile has to find its job.
    field.submit(1, "die" if step.startswith("reconcile") else "succeed")
    wait_until(mark.exists, timeout=90, what=step)
    wait_until(lambda: any(p.popen.poll() is not None for p in field.processes.values()))
    field.restart_dead()
    expire_leases(field)

    if times == 0:
        assert field.promised == {}
        time.sleep(5)
        assert field.accepted == []
        assert [watch.status for watch in rows(field, Watch)] == ["reserved"]
        return
    wait_until(lambda: len(field.accepted) >= times, timeout=90, what=f"{times} requests after {step}")
    wait_until(field.all_told, what="everything to be recorded")
    time.sleep(2.5)
    found = checked(field)
    assert found.accepted == 1
    assert found.requests == times
    assert len(rows(field, Event)) == 1
    assert len({one.headers["webhook-id"] for one in field.accepted}) == 1
    note(f"killed at: {step}", found, field, process=process)


def expire_leases(field: Field) -> None:
    """Spare the test the 35 seconds after which a dead dispatcher's lease is free."""
    with field.state.database.write() as connection:
        connection.execute(
            update(Delivery)
            .where(Delivery.status == "sending")
            .values(lease_until=datetime.now(UTC) - timedelta(seconds=1))
        )


def rows(field: Field, table: Any) -> list[Any]:
    with field.state.database.read() as connection:
        return list(connection.execute(select(table.__table__)))


def test_dispatcher_killed_while_the_receiver_is_answering(field: Field) -> None:
    dying = threading.Event()

    def respond(received: Received) -> int:
        if not dying.is_set():
            dying.set()
            os.kill(field.processes["dispatcher-1"].pid, signal.SIGKILL)
            time.sleep(0.3)
        return 204

    field.respond = respond
    for name in ("web", "worker-1", "dispatcher-1"):
        field.start(name)
    field.submit(1)
    wait_until(dying.is_set)
    wait_until(lambda: field.processes["dispatcher-1"].popen.poll() is not None)
    expire_leases(field)
    field.restart_dead()
    wait_until(lambda: len(field.accepted) == 2, timeout=40)
    wait_until(field.all_told, what="everything to be recorded")

    found = checked(field)
    assert found.repeats == 1
    assert len(rows(field, Attempt)) == 1
    note("killed at: HTTP under way", found, field, process="dispatcher")


# -- Redis wiped, dispatcher away -------------------------------------------------------------------------


def test_redis_wiped_with_200_jobs_waiting(field: Field) -> None:
    field.start("web")
    field.start("dispatcher-1")
    submit_all(field, 200)
    assert len(field.promised) == 200
    # A confirmation that found SQLite busy waits in the outbox, and would be wiped with it.
    wait_until(lambda: {watch.status for watch in rows(field, Watch)} == {"open"})
    field.redis.flushall()
    wait_until(lambda: len(field.accepted) >= 200, timeout=60)
    field.settle()

    found = checked(field)
    assert found.told == {"job.lost": 200}
    note("Redis wiped with 200 jobs waiting", found, field)


@pytest.mark.chaos
def test_dispatcher_off_while_2000_jobs_end_and_their_results_expire(field: Field) -> None:
    _away(field, 2000)


def test_dispatcher_off_while_100_jobs_end_and_their_results_expire(field: Field) -> None:
    _away(field, 100)


def _away(field: Field, count: int) -> None:
    field.start("web")
    for number in range(3):
        field.start(f"worker-{number}")
    submit_all(field, count)
    assert len(field.promised) == count
    wait_until(field.rq_is_done, timeout=250, what="jobs to end")
    wait_until(lambda: field.redis.xlen(field.state.outbox.key) >= count, timeout=20)
    for job_id in field.promised.values():
        field.redis.delete(f"rq:job:{job_id}", f"rq:results:{job_id}")
    field.start("dispatcher-1")
    wait_until(lambda: len(field.accepted) >= count, timeout=120)
    field.settle()

    found = checked(field)
    assert found.told == {"job.success": count}
    assert {one.json["result"] for one in field.accepted} == set(range(count))
    note(f"Dispatcher off while {count} jobs ended, results expired meanwhile", found, field)


def submit_all(field: Field, count: int, *, kinds: tuple[str, ...] = ("succeed",), threads: int = 4) -> None:
    numbers = iter(range(count))
    lock = threading.Lock()

    def client(seed: int) -> None:
        chosen = random.Random(seed)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            kind = chosen.choice(kinds)
            if field.submit(number, kind, retries=1 if kind == "fail_first" else 0) is None:
                wait_until(field.web_answers, timeout=60, what="the web process to be back")

    workers = [threading.Thread(target=client, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


# -- random kills -----------------------------------------------------------------------------------------

KINDS = ("succeed", "succeed", "succeed", "sleep", "fail", "fail_first", "die", "leave")


def _random_kills(field: Field, count: int, *, seed: int, servers: bool, timeout: float) -> None:
    for name in ("web", "dispatcher-1", "dispatcher-2", "worker-1", "worker-2"):
        field.start(name)
    began = time.monotonic()
    killer = Killer(field, seed, servers=servers)
    killer.start()
    try:
        submit_all(field, count, kinds=KINDS)
        # Jobs are still being worked off; go on killing.
        wait_until(
            lambda: killer.error is not None or _waiting(field) < 20,
            timeout=timeout,
            what="the queue to empty",
        )
    finally:
        killer.stop()
    field.respond = lambda received: 204
    field.settle(timeout)
    found = checked(field)
    assert found.accepted >= count * 0.8
    note(
        f"{count} jobs under random kills",
        found,
        field,
        seed=seed,
        database=field.state.database.engine.dialect.name,
        unanswered=len(field.unanswered),
        seconds=round(time.monotonic() - began),
    )


def _waiting(field: Field) -> int:
    try:
        return int(field.redis.llen("rq:queue:default"))
    except redis.RedisError:
        return 10**6


def test_random_kills(field: Field) -> None:
    _random_kills(field, 120, seed=1, servers=False, timeout=120)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [11, 12])
def test_thousand_jobs_under_random_kills_sqlite(field: Field, seed: int) -> None:
    _random_kills(field, 1000, seed=seed, servers=True, timeout=900)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [21, 22])
def test_thousand_jobs_under_random_kills_postgresql(
    tmp_path: Path, postgres: PostgresHandle, seed: int
) -> None:
    with open_field(tmp_path, postgres=postgres) as field:
        _random_kills(field, 1000, seed=seed, servers=True, timeout=900)
