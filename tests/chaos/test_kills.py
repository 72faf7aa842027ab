"""SIGKILL at every named step, Redis wiped, and a dispatcher away; each with one known outcome."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.chaos.auditor import Audit, audit
from tests.chaos.field import Field, open_field
from tests.chaos.test_storm import LONG, note
from tests.servers import Received, wait_until

INTERVAL_S = 1.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    with open_field(tmp_path, interval_s=INTERVAL_S) as opened:
        yield opened


def checked(field: Field) -> Audit:
    """Return the audit, which has found no fault."""
    found = audit(field.evidence())
    assert found.faults == []
    return found


def select(field: Field, query: str) -> list[Any]:
    with field.engine.connect() as connection:
        return list(connection.execute(sa.text(query)).scalars())


#: Step → process that reaches it, and how often the receiver gets a request about the one job.
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
    "reconcile stored": ("dispatcher", 1),
}


@pytest.mark.parametrize("subscribed", ["", "subscribed, "], ids=["by-url", "subscribed"])
@pytest.mark.parametrize("label", STEPS, ids=[label.replace(" ", "-") for label in STEPS])
def test_sigkill_at_a_named_step(field: Field, label: str, subscribed: str, tmp_path: Path) -> None:
    process, times = STEPS[label]
    # What reconcile found is stored where callbacks' reports are.
    step = label.replace("reconcile stored", "event stored")
    mark = tmp_path / "died"
    field.die = {"TEST_DIE_AT": step, "TEST_DIE_ONCE": str(mark)}
    for name in ("worker-1", "dispatcher-1", "web"):  # web last: it is waited for
        field.start(name)

    # A work-horse that dies has no callback, so that reconcile has to find its job.
    answer = field.submit(1, subscribed + ("be_killed" if label.startswith("reconcile") else "succeed"))
    wait_until(mark.exists, timeout=90, what=step)
    wait_until(lambda: any(p.popen.poll() is not None for p in field.processes.values()))
    if process == "dispatcher":  # while no other lives that may be sending
        expire_leases(field)
    field.restart_dead()

    assert answer.promised == (process != "web")
    if times == 0:
        time.sleep(2 * INTERVAL_S + 1)
        assert field.receipts == []
        assert select(field, "SELECT status FROM rq_webhooks_watch") == ["reserved"]
        return
    wait_until(lambda: len(field.receipts) >= times, timeout=90, what=f"{times} requests after {label}")
    wait_until(lambda: delivered(field, 1), what="the delivery to be recorded")
    time.sleep(INTERVAL_S + 0.5)
    found = checked(field)
    assert (found.requests, found.repeats) == (times, times - 1)
    assert found.reported.total() == 1
    assert delivered(field, 1)
    note(f"killed at: {label}{', subscribed once' if subscribed else ''}", found, {process: 1})


@pytest.mark.parametrize("step", ["newer stored", "older canceled"])
def test_sigkill_while_an_ending_replaces_progress(field: Field, step: str, tmp_path: Path) -> None:
    field.respond = lambda received: 503 if received.headers["X-Webhook-Event"] == "job.progress" else 204
    mark = tmp_path / "died"
    field.die = {"TEST_DIE_AT": step, "TEST_DIE_ONCE": str(mark)}
    for name in ("worker-1", "dispatcher-1", "web"):
        field.start(name)

    # It ends while the retry of its progress waits.
    wanted = ["job.success", "job.progress"]
    field.submit(1, "progress", arguments=[INTERVAL_S + 1.5], webhook_events=wanted)
    wait_until(mark.exists, timeout=90, what=step)
    wait_until(lambda: any(p.popen.poll() is not None for p in field.processes.values()))
    stored = (
        "SELECT e.type || ' ' || d.status FROM rq_webhooks_event e "
        "JOIN rq_webhooks_delivery d ON d.event_id = e.id"
    )
    assert select(field, stored) == ["job.progress pending"]  # all of the transaction or nothing
    with field.engine.begin() as connection:  # the dead dispatcher's entries are taken over much later
        connection.execute(sa.text("UPDATE rq_webhooks_delivery SET next_attempt_at = '2101-01-01'"))
    field.restart_dead()

    wait_until(lambda: field.receipts and field.receipts[-1].answer == 204, timeout=90, what="the ending")
    time.sleep(INTERVAL_S + 0.5)
    assert sorted(select(field, stored)) == ["job.progress canceled", "job.success succeeded"]
    assert [one.answer for one in field.receipts].count(204) == 1
    assert field.receipts[-1].answer == 204  # no progress after the end


def expire_leases(field: Field) -> None:
    """Spare the test the 35 seconds after which a dead dispatcher's lease is free."""
    with field.engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE rq_webhooks_delivery SET lease_until = '2001-01-01' WHERE status = 'sending'")
        )


def delivered(field: Field, count: int) -> bool:
    """Say whether there are *count* deliveries, all of them recorded as done."""
    return select(field, "SELECT status FROM rq_webhooks_delivery") == ["succeeded"] * count


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
    wait_until(lambda: len(field.receipts) == 2, timeout=40)
    wait_until(lambda: delivered(field, 1), what="the delivery to be recorded")

    found = checked(field)
    # Whether the receiver could still write its first answer is a race with the end of the connection.
    assert (found.requests, found.repeats + found.again) == (2, 1)
    assert len(select(field, "SELECT id FROM rq_webhooks_attempt")) == 1
    note("killed at: HTTP under way", found, {"dispatcher": 1})


@pytest.mark.slow_machine(reason="two hundred requests in turn may meet a server that is still starting")
def test_redis_wiped_with_200_jobs_waiting(field: Field) -> None:
    field.start("web")
    field.start("dispatcher-1")
    submit_all(field, 200)
    # A confirmation that found SQLite busy waits in the outbox, and would be wiped with it.
    watches = "SELECT DISTINCT status FROM rq_webhooks_watch"
    wait_until(lambda: select(field, watches) == ["open"], what="all jobs to be confirmed")
    field.redis.flushall()
    wait_until(lambda: len(field.receipts) >= 200, timeout=60)
    time.sleep(2 * INTERVAL_S)

    found = checked(field)
    assert found.reported == {"job.lost": 200}
    note("Redis wiped with 200 jobs waiting", found, {})


def test_dispatcher_off_while_jobs_end_and_their_results_expire(field: Field) -> None:
    count = 2000 if LONG else 100
    for name in ("web", "worker-1", "worker-2"):
        field.start(name)
    submit_all(field, count, options={"result_ttl": 1})
    wait_until(field.rq_is_done, timeout=250, what="jobs to end")
    wait_until(lambda: not list(field.redis.scan_iter("rq:job:*")), timeout=60, what="records to expire")
    field.start("dispatcher-1")
    wait_until(lambda: len(field.receipts) >= count, timeout=120)
    time.sleep(2 * INTERVAL_S)

    found = checked(field)
    assert found.reported == {"job.success": count}
    assert found.requests == count
    note(f"Dispatcher off while {count} jobs ended, results expired meanwhile", found, {})


def submit_all(field: Field, count: int, **order: Any) -> None:
    """Ask for *count* jobs from four clients at once; all are promised a report."""
    numbers = iter(range(count))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            field.submit(number, "succeed", result={"value": number}, **order)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert sum(answer.promised for answer in field.answers) == count
