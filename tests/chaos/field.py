"""One installation whose every part can be killed and started again: the field of the kill suite."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
from rq.registry import StartedJobRegistry
from sqlalchemy import func, select

from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.models import Delivery, Watch
from tests.acceptance.host_app import create_app, db
from tests.servers import PostgresHandle, Process, Received, Receiver, ValkeyHandle, free_port, wait_until

FLASK = ("python", "-m", "flask", "--app", "tests.chaos.host_app")
SETTINGS = {
    "RQ_WEBHOOKS_RECONCILE_INTERVAL": 2,
    "RQ_WEBHOOKS_CLEAN_ABANDONED": True,
    "RQ_WEBHOOKS_RETRY_SCHEDULE": [0.5, 1, 1, 2, 2, 2, 5, 5, 5, 5, 5],
    "RQ_WEBHOOKS_TIMEOUT": 5,
}


@dataclass
class Field:
    """The parts, by name, and what clients were promised.

    :param die: environment that makes the next process die at a named step.
    """

    folder: Path
    valkey: ValkeyHandle
    database_url: str
    postgres: PostgresHandle | None = None
    die: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cleanup = ExitStack()
        self.port = free_port()
        self.processes: dict[str, Process] = {}
        self.promised: dict[int, str] = {}
        self.unanswered: list[int] = []
        self.kills: Counter[str] = Counter()
        self.accepted: list[Received] = []
        self._lock = threading.RLock()
        self.receiver = Receiver(self._receive)
        self.cleanup.callback(lambda: self.receiver.close())
        self.respond: Any = lambda received: 204
        self.app = create_app(
            {
                "SQLALCHEMY_DATABASE_URI": self.database_url,
                "RQ_WEBHOOKS_REDIS_URL": self.valkey.url,
                **SETTINGS,
            }
        )
        self.state = get_state(self.app)
        self.state.database.create_tables()
        self.redis = redis.Redis.from_url(self.valkey.url)

    def _receive(self, received: Received) -> Any:
        status = self.respond(received)
        if status in (200, 204):
            with self._lock:
                self.accepted.append(received)
        return status

    # -- processes ------------------------------------------------------------------------------------

    def command(self, name: str) -> tuple[str, ...]:
        kind = name.partition("-")[0]
        if kind == "web":
            return (*FLASK, "run", "--port", str(self.port), "--no-reload")
        if kind == "dispatcher":
            return (*FLASK, "rq-webhooks", "worker")
        return ("python", "-m", "rq.cli", "worker", "--url", self.valkey.url, "default")

    def start(self, name: str) -> Process:
        """Start the process *name*: ``web``, ``dispatcher-1``, ``worker-1`` and so on."""
        environment = {
            "TEST_DATABASE_URL": self.database_url,
            "TEST_REDIS_URL": self.valkey.url,
            "TEST_SETTINGS": json.dumps(SETTINGS),
            **self.die,
        }
        process = Process(*self.command(name), env=environment)
        with self._lock:
            self.processes[name] = process
        if name == "web":
            wait_until(self.web_answers, timeout=30, what=f"the web process: {process.output}")
        return process

    def web_answers(self) -> bool:
        """Say whether the web process takes requests."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/webhooks/health")
            connection.getresponse().read()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def kill(self, name: str) -> None:
        """SIGKILL the process *name*; a worker's work-horse lives on."""
        process = self.processes[name]
        process.kill()
        process.wait()
        self.kills[name.partition("-")[0]] += 1

    def discard(self, name: str) -> None:
        process = self.processes.pop(name)
        process.stop()
        Path(process.log.name).unlink(missing_ok=True)

    def restart_dead(self) -> None:
        """Start again whatever has ended."""
        for name, process in list(self.processes.items()):
            if process.popen.poll() is not None:
                self.discard(name)
                self.start(name)

    def horses(self, name: str) -> list[psutil.Process]:
        try:
            return psutil.Process(self.processes[name].pid).children()
        except psutil.NoSuchProcess:
            return []

    # -- clients --------------------------------------------------------------------------------------

    def submit(self, number: int, name: str = "succeed", *, retries: int = 0) -> str | None:
        """Ask for a job as a client does; return its id, or ``None`` when no answer came."""
        body = json.dumps(
            {
                "number": number,
                "retries": retries,
                "webhook_url": self.receiver.url,
                "webhook_secret": "a secret of the client",
                "webhook_reference": str(number),
            }
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            connection.request("POST", f"/jobs/{name}", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            self.unanswered.append(number)
            return None
        finally:
            connection.close()
        if response.status != 200:
            self.unanswered.append(number)
            return None
        job_id = str(json.loads(answer)["job_id"])
        if response.headers["Webhook-Registered"] == "true":
            self.promised[number] = job_id
        else:
            self.unanswered.append(number)
        return job_id

    # -- the end --------------------------------------------------------------------------------------

    def settle(self, timeout: float = 120) -> None:
        """Let everything that can still happen happen: no more kills, all parts alive, no jobs left."""
        for name in [name for name in self.processes if name.startswith("worker")]:
            self.discard(name)
        self._bury_the_dead()
        self.restart_dead()
        self.start("worker-last")
        wait_until(self.rq_is_done, timeout=timeout, what="RQ to run every job")
        wait_until(self.all_told, timeout=timeout, what="every event to be delivered")
        # What RQ may still change its mind about, and what must not be sent twice.
        time.sleep(2 * SETTINGS["RQ_WEBHOOKS_RECONCILE_INTERVAL"] + 1)
        wait_until(self.all_told, timeout=timeout, what="every correction to be delivered")

    def _bury_the_dead(self) -> None:
        """Do at once what RQ does within minutes: no worker runs, so whatever is started is abandoned."""
        registry = StartedJobRegistry("default", connection=self.redis)
        deadline = time.time() + 5  # orphaned work-horses end by themselves
        while time.time() < deadline and self.redis.zcard(registry.key):
            time.sleep(0.2)
        for entry in self.redis.zrange(registry.key, 0, -1):
            self.redis.zadd(registry.key, {entry: time.time() - 1})
        # Jobs a worker had taken from the queue and not begun: RQ's clean-up calls them failed after a
        # minute or two; here they are put back, as an operator would.
        for job_id in self.redis.lrange("rq:queue:default:intermediate", 0, -1):
            if self.redis.hget(b"rq:job:" + job_id, "status") == b"queued":
                self.redis.rpush("rq:queue:default", job_id)
        self.redis.delete("rq:queue:default:intermediate")

    def rq_is_done(self) -> bool:
        """Say whether no job is queued or running."""
        registry = StartedJobRegistry("default", connection=self.redis)
        return not self.redis.llen("rq:queue:default") and not self.redis.zcard(registry.key)

    def all_told(self) -> bool:
        """Say whether no ending, no entry and no delivery is under way."""
        with self.state.database.read() as connection:
            waiting = connection.execute(
                select(func.count())
                .select_from(Watch)
                .where(Watch.status == "open", Watch.settled_at.is_(None))
            ).scalar_one()
            due = connection.execute(
                select(func.count()).select_from(Delivery).where(Delivery.status.in_(["pending", "sending"]))
            ).scalar_one()
        return not waiting and not due and not self.redis.xlen(self.state.outbox.key)

    def close(self) -> None:
        for name in list(self.processes):
            self.discard(name)
        self.state.redis.close()
        self.redis.close()
        self.state.database.dispose()
        with self.app.app_context():
            for engine in db.engines.values():
                engine.dispose()
        self.cleanup.close()


@contextmanager
def open_field(folder: Path, *, postgres: PostgresHandle | None = None) -> Iterator[Field]:
    """Give a field with its own Valkey that keeps an append-only file."""
    valkey = ValkeyHandle(data_dir=folder / "valkey", config={"appendonly": "yes"})
    (folder / "valkey").mkdir()
    valkey.start()
    try:
        url = postgres.new_database() if postgres is not None else f"sqlite:///{folder / 'host.db'}"
        opened = Field(folder, valkey, url, postgres)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        valkey.stop()


class Killer(threading.Thread):
    """Kill parts of a field at random until told to stop, and start them again.

    :param servers: also kill Valkey and restart PostgreSQL.
    """

    def __init__(self, target: Field, seed: int, *, servers: bool) -> None:
        super().__init__(daemon=True)
        self.field = target
        self.random = random.Random(seed)
        self.stopping = threading.Event()
        self.victims = ["web", "dispatcher", "worker", "host", "horse", "horse", "receiver"]
        if servers:
            self.victims += ["valkey", "postgres"]
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stopping.wait(self.random.uniform(0.3, 1.5)):
                self._kill_one(self.random.choice(self.victims))
        except BaseException as exc:  # reported by stop(), in the test's thread
            self.error = exc

    def stop(self) -> None:
        self.stopping.set()
        self.join(60)
        if self.error is not None:
            raise self.error

    def _named(self, kind: str) -> str:
        return self.random.choice([name for name in self.field.processes if name.startswith(kind)])

    def _kill_one(self, victim: str) -> None:
        target = self.field
        if victim in ("web", "dispatcher", "worker"):
            target.kill(self._named(victim))
        elif victim == "horse":
            for horse in target.horses(self._named("worker")):
                os.kill(horse.pid, signal.SIGKILL)
                target.kills["work-horse"] += 1
        elif victim == "host":
            name = self._named("worker")
            horses = target.horses(name)
            target.kill(name)
            for horse in horses:
                if horse.is_running():
                    os.kill(horse.pid, signal.SIGKILL)
            target.kills["worker and work-horse"] += 1
            target.kills["worker"] -= 1
        elif victim == "receiver":
            until = time.time() + 1
            target.respond = lambda received: 204 if time.time() > until else 503
            target.kills["receiver (503 for 1 s)"] += 1
        elif victim == "valkey":
            os.kill(target.valkey.pid, signal.SIGKILL)
            time.sleep(0.3)
            target.valkey.stop()
            target.valkey.start()
            target.kills["valkey"] += 1
        elif target.postgres is not None:
            target.postgres.stop()
            target.postgres.start()
            target.kills["postgresql"] += 1
        target.restart_dead()
