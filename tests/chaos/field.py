"""One installation whose every part can be killed and started again: the field of storms and kills.

It keeps what the auditor wants to know: what clients were answered, what the receiver read, and the
append-only file of Valkey. Everything is a process of its own but the clients and the receiver.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from flask_rq_webhooks.state import get_state
from tests.acceptance.host_app import create_app
from tests.chaos import aof
from tests.chaos.auditor import Answer, Evidence, Receipt
from tests.servers import PostgresHandle, Process, Received, Receiver, ValkeyHandle, free_port, wait_until

FLASK = ("python", "-m", "flask", "--app", "tests.chaos.host_app")
INTERVAL_S = 2.0
SETTINGS = {
    "RQ_WEBHOOKS_RETRY_SCHEDULE": [0.5, 1, 1, 2, 2, 2, 5, 5, 5, 5, 5],
    "RQ_WEBHOOKS_TIMEOUT": 5,
    "RQ_WEBHOOKS_TRACEBACK": "none",
}
#: The lease of a delivery: TIMEOUT and half a minute.
LEASE_S = 35
#: Nothing may be lost or written again in another form; times of every second.
VALKEY = {
    "appendonly": "yes",
    "aof-timestamp-enabled": "yes",
    "aof-use-rdb-preamble": "no",
    "auto-aof-rewrite-percentage": "0",
}
#: The options of a stock worker, by what its process is called: one forks, and one runs jobs itself.
WORKERS = {"worker": ("default",), "simple": ("--worker-class", "rq.SimpleWorker", "simple")}
QUEUES = ("default", "simple", "parked")


@dataclass
class Field:
    """The parts, by name, and what clients were answered.

    :param clean_abandoned: the setting of this name.
    :param interval_s: seconds between two passes of reconcile.
    :param die: environment that makes the next process die at a named step.
    """

    folder: Path
    valkey: ValkeyHandle
    database_url: str
    postgres: PostgresHandle | None = None
    clean_abandoned: bool = True
    interval_s: float = INTERVAL_S
    die: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = free_port()
        self.processes: dict[str, Process] = {}
        self.answers: list[Answer] = []
        self.receipts: list[Receipt] = []
        self.kills: Counter[str] = Counter()
        self._lock = threading.RLock()
        self.redis = redis.Redis.from_url(self.valkey.url, socket_timeout=5)
        self._marker = redis.Redis.from_url(self.valkey.url, socket_timeout=1, retry=None)
        self.respond: Callable[[Received], int | None] = lambda received: 204
        self.receiver = Receiver(self._receive)
        (self.folder / "logs").mkdir(exist_ok=True)
        self.engine = sa.create_engine(self.database_url, poolclass=sa.NullPool)
        self._create_tables()
        with self.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE IF NOT EXISTS held (id INTEGER)"))

    def _create_tables(self) -> None:
        """Create the product's tables by its command, in this process: another one takes seconds."""
        app = create_app(
            {"SQLALCHEMY_DATABASE_URI": self.database_url, "RQ_WEBHOOKS_REDIS_URL": self.valkey.url}
        )
        done = app.test_cli_runner().invoke(args=["rq-webhooks", "init-db"])
        assert done.exit_code == 0, done.output
        get_state(app).database.dispose()
        get_state(app).redis.close()

    @property
    def environment(self) -> dict[str, str]:
        settings = {
            **SETTINGS,
            "RQ_WEBHOOKS_CLEAN_ABANDONED": self.clean_abandoned,
            "RQ_WEBHOOKS_RECONCILE_INTERVAL": self.interval_s,
        }
        return {
            "TEST_DATABASE_URL": self.database_url,
            "TEST_REDIS_URL": self.valkey.url,
            "TEST_SETTINGS": json.dumps(settings),
            **self.die,
        }

    def _receive(self, received: Received) -> Any:
        """Keep a request, and leave a mark in Valkey's file before it is answered."""
        with self._lock:
            receipt = Receipt(len(self.receipts), received.at, received.headers, received.body, 0)
            self.receipts.append(receipt)
        with suppress(redis.RedisError):  # the server is away: then the clock has to do
            self._marker.set("storm:receipt", receipt.number)
        status = self.respond(received)
        receipt.answer = status or 0
        return status

    # -- processes ------------------------------------------------------------------------------------

    def command(self, name: str) -> tuple[str, ...]:
        kind = name.partition("-")[0]
        if kind == "web":
            return (*FLASK, "run", "--port", str(self.port), "--no-reload")
        if kind == "dispatcher":
            return (*FLASK, "rq-webhooks", "worker")
        return ("python", "-m", "rq.cli", "worker", "--url", self.valkey.url, *WORKERS[kind])

    def start(self, name: str) -> Process:
        """Start the process *name*: ``web``, ``dispatcher-1``, ``worker-1`` and so on."""
        process = Process(*self.command(name), env=self.environment, own_group=True)
        with self._lock:
            self.processes[name] = process
        if name == "web":

            def answers() -> bool:
                assert process.popen.poll() is None, f"the web process ended: {process.output}"
                return self.web_answers()

            wait_until(answers, timeout=60, what=lambda: f"the web process: {process.output}")
        return process

    def web_answers(self) -> bool:
        """Say whether the web process takes requests."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/webhooks/health")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True

    def kill(self, name: str) -> None:
        """SIGKILL the process *name*; a worker's work-horse lives on."""
        process = self.processes[name]
        process.kill()
        process.wait()

    def discard(self, name: str) -> None:
        """End a process, if it has not ended, and keep what it printed."""
        process = self.processes.pop(name)
        process.stop()
        log = Path(process.log.name)
        with (self.folder / "logs" / f"{name}.log").open("a") as kept:
            kept.write(log.read_text(errors="replace"))
        log.unlink(missing_ok=True)

    def restart_dead(self) -> None:
        """Start again whatever has ended."""
        for name, process in list(self.processes.items()):
            if process.popen.poll() is not None:
                self.discard(name)
                self.start(name)

    def named(self, *kinds: str) -> list[str]:
        """Return the names of the processes of these kinds."""
        return [name for name in self.processes if name.partition("-")[0] in kinds]

    def horses(self, name: str) -> list[psutil.Process]:
        """Return the work-horses of a worker."""
        try:
            return psutil.Process(self.processes[name].pid).children()
        except psutil.NoSuchProcess:
            return []

    # -- clients --------------------------------------------------------------------------------------

    def submit(
        self, number: int, kind: str = "succeed", *, result: dict[str, Any] | None = None, **order: Any
    ) -> Answer:
        """Ask for jobs as a client does, and keep the answer.

        :param kind: what the audit calls it; one that begins with ``tree`` is asked for as a tree, one that
            begins with ``subscribed`` by a customer who has an endpoint and sends no URL.
        :param order: what the host app takes; ``function`` defaults to *kind*.
        """
        answer = Answer(number, kind, time.time(), f"the secret of client {number}", result=result or {})
        body = {"number": number, "function": kind.removeprefix("subscribed, "), **order}
        self.answers.append(answer)
        headers = {}
        if kind.startswith("subscribed"):
            headers = {"X-Tenant": f"client {number}"}
            own = {"url": self.receiver.url, "secret": answer.secret, "reference": str(number)}
            if self._post("/webhooks/api/endpoints", own, headers)[0] != 201:
                return answer
        else:
            body |= {"webhook_url": self.receiver.url, "webhook_secret": answer.secret,
                     "webhook_reference": str(number)}  # fmt: skip
        path = "/trees" if kind.startswith("tree") else "/jobs"
        answer.status, answer.registered, content = self._post(path, body, headers)
        if answer.status == 200:
            answer.jobs = json.loads(content)["jobs"]
        return answer

    def _post(
        self, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> tuple[int | None, str | None, bytes]:
        """Return status, ``Webhook-Registered`` and body of the answer; nothing where there was none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(
                "POST", path, json.dumps(body), {"Content-Type": "application/json", **headers}
            )
            response = connection.getresponse()
            return response.status, response.headers["Webhook-Registered"], response.read()
        except (OSError, http.client.HTTPException):
            return None, None, b""
        finally:
            connection.close()

    # -- the end --------------------------------------------------------------------------------------

    def expire_started(self, *, of_the_dead: bool) -> None:
        """Let time pass for RQ's registry of started jobs: its entries end, as 90 s without a sign do it.

        Under RQ's lock: a clean-up under way reads what has ended and then deletes all that has, and so would
        miss what is made to have ended in between. Time itself does not do that.

        :param of_the_dead: only jobs of workers whose process is gone.
        """
        alive = {b""} if not of_the_dead else self._living_workers()
        for queue in QUEUES:
            lock = f"rq:clean_registries:{queue}"
            deadline = time.monotonic() + 2  # longer, and it is the lock of a worker that was killed
            while not self.redis.set(lock, 1, nx=True, ex=899) and time.monotonic() < deadline:
                time.sleep(0.01)
            for entry in self.redis.zrange(f"rq:wip:{queue}", 0, -1):
                worker = self.redis.hget(b"rq:job:" + entry.partition(b":")[0], "worker_name")
                if worker not in alive:
                    self.redis.zadd(f"rq:wip:{queue}", {entry: time.time() - 1}, xx=True)
            self.redis.delete(lock)

    def _living_workers(self) -> set[bytes | None]:
        pids = {str(self.processes[name].pid).encode() for name in self.named(*WORKERS)}
        names = [key.rpartition(b":")[2] for key in self.redis.smembers("rq:workers")]
        return {None, *(name for name in names if self.redis.hget(b"rq:worker:" + name, "pid") in pids)}

    def settle(self, timeout: float = 120) -> None:
        """Let RQ end everything: no more kills, all parts alive, no worker but new ones.

        A job that leaves by ``os._exit(0)`` keeps its entry in RQ's registry; then time passes once more.
        """
        deadline = time.monotonic() + timeout
        while not self._settles(patience_s=40):
            assert time.monotonic() < deadline, "RQ does not end every job"

    def _settles(self, *, patience_s: float) -> bool:
        for name in self.named(*WORKERS):
            self.discard(name)
        deadline = time.monotonic() + 15  # orphaned work-horses end by themselves
        while time.monotonic() < deadline and any(self.redis.zcard(f"rq:wip:{queue}") for queue in QUEUES):
            time.sleep(0.2)
        self.expire_started(of_the_dead=False)
        for queue in QUEUES:
            # Jobs a worker had taken from the queue and not begun: RQ's clean-up calls them failed after a
            # minute or two; here they are put back, as an operator would.
            for job_id in self.redis.lrange(f"rq:queue:{queue}:intermediate", 0, -1):
                if self.redis.hget(b"rq:job:" + job_id, "status") == b"queued":
                    self.redis.rpush(f"rq:queue:{queue}", job_id)
            self.redis.delete(f"rq:queue:{queue}:intermediate")
        self.restart_dead()
        self.start("worker-last")
        self.start("simple-last")
        deadline = time.monotonic() + patience_s
        while not self.rq_is_done():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def rq_is_done(self) -> bool:
        """Say whether no job is queued or running."""
        # What is parked waits for an operator; the ids of jobs that expired there stay.
        keys = [f"rq:queue:{queue}" for queue in QUEUES if queue != "parked"]
        queued = [self.redis.llen(key) + self.redis.llen(f"{key}:intermediate") for key in keys]
        return not any(queued) and not any(self.redis.zcard(f"rq:wip:{queue}") for queue in QUEUES)

    def evidence(self) -> Evidence:
        """Return what the auditor may see."""
        commands = aof.read(self.folder / "valkey" / "appendonlydir")
        with self._lock:
            return Evidence(list(self.answers), list(self.receipts), commands)

    def logged(self, word: str) -> Iterator[str]:
        """Give the lines of all processes that hold *word*."""
        for name in list(self.processes):
            for line in self.processes[name].output.splitlines():
                if word in line:
                    yield f"{name}: {line}"
        for log in sorted((self.folder / "logs").iterdir()):
            for line in log.read_text().splitlines():
                if word in line:
                    yield f"{log.stem}: {line}"

    def close(self) -> None:
        for name in list(self.processes):
            self.discard(name)
        self.redis.close()
        self._marker.close()
        self.receiver.close()


@contextmanager
def open_field(
    folder: Path, *, postgres: PostgresHandle | None = None, clean_abandoned: bool = True,
    interval_s: float = INTERVAL_S,
) -> Iterator[Field]:  # fmt: skip
    """Give a field with its own Valkey that keeps an append-only file."""
    (folder / "valkey").mkdir(parents=True)
    valkey = ValkeyHandle(data_dir=folder / "valkey", config=dict(VALKEY))
    valkey.start()
    try:
        url = postgres.new_database() if postgres is not None else f"sqlite:///{folder / 'host.db'}"
        opened = Field(folder, valkey, url, postgres, clean_abandoned, interval_s)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        valkey.stop()
