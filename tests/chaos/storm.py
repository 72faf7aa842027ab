"""A storm: clients ask for jobs of every kind while every part is killed; then calm, and the audit.

Everything random comes from one seed. Which process is hit at which moment also depends on the machine, so a
seed repeats a storm in kind and not to the letter.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job

from tests.chaos.auditor import Audit, Evidence, audit
from tests.chaos.field import INTERVAL_S, LEASE_S, Field
from tests.chaos.tasks import ODD
from tests.servers import Received, wait_until

#: Kind → how many of a hundred, what the host app is asked for, what an operator does afterwards.
KINDS: dict[str, tuple[int, dict[str, Any], str]] = {
    "success": (10, {"function": "succeed"}, ""),
    "subscribed, success": (3, {"function": "succeed"}, ""),
    "subscribed, killed": (1, {"function": "be_killed"}, ""),
    "success, two jobs": (3, {"function": "succeed", "times": 2}, ""),
    "success, SimpleWorker": (6, {"function": "succeed", "queue": "simple"}, ""),
    "odd result": (8, {"function": "odd"}, ""),
    "result_ttl=1": (8, {"function": "succeed", "options": {"result_ttl": 1}}, ""),
    "result_ttl=0": (2, {"function": "succeed", "options": {"result_ttl": 0}}, ""),
    "takes a while": (4, {"function": "rest"}, ""),
    "outlives its worker": (1, {"function": "rest", "arguments": [4]}, ""),
    "failure": (7, {"function": "fail"}, ""),
    "memory limit": (2, {"function": "run_out_of_memory"}, ""),
    "killed for memory": (3, {"function": "be_killed"}, ""),
    "exit 3": (3, {"function": "leave", "arguments": [3]}, ""),
    "exit 0": (1, {"function": "leave", "arguments": [0]}, ""),
    "dies before the commit": (2, {"function": "die_before_commit"}, ""),
    "Retry, fails twice": (4, {"function": "fail", "options": {"retry": 1}}, ""),
    "Retry, fails, then succeeds": (4, {"function": "first_then", "arguments": ["fail", "succeed"],
                                        "options": {"retry": 1}}, ""),
    "Retry, killed, then fails": (4, {"function": "first_then", "arguments": ["be_killed", "fail"],
                                      "options": {"retry": 1}}, ""),
    "Retry, killed, then succeeds": (2, {"function": "first_then", "arguments": ["be_killed", "succeed"],
                                         "options": {"retry": 2}}, ""),
    "Retry, worker dies before the commit": (1, {"function": "first_then", "options": {"retry": 1},
        "arguments": ["die_with_worker_before_commit", "succeed"]}, ""),
    "returns Retry": (2, {"function": "return_retry"}, ""),
    "requeued": (4, {"function": "first_then", "arguments": ["fail", "succeed"]}, "requeue"),
    "requeued, fails again": (2, {"function": "fail"}, "requeue"),
    "stopped": (2, {"function": "rest", "arguments": [12]}, "stop"),
    "canceled": (2, {"function": "succeed", "queue": "parked"}, "cancel"),
    "canceled while running": (1, {"function": "rest", "arguments": [3]}, "cancel"),
    "deleted": (3, {"function": "succeed", "queue": "parked"}, "delete"),
    "expired": (1, {"function": "succeed", "queue": "parked", "options": {"ttl": 1}}, ""),
    "tree of three": (2, {"function": "succeed", "times": 3}, ""),
    "tree that fails": (1, {"function": "first_then", "arguments": ["be_killed", "fail"], "times": 2,
                            "options": {"retry": 1}}, ""),
    "tree with children": (1, {"function": "plant", "arguments": [["succeed", "odd", "rest"]]}, ""),
    "tree with children that fail": (1, {"function": "plant", "arguments": [["succeed", "be_killed"]]}, ""),
}  # fmt: skip
#: Of a hundred requests, how many leave a transaction of the host's own open past the view.
HELD = 2
#: Jobs that may wait in RQ before clients wait.
BACKLOG = 30
#: Jobs accepted for each hit; clients wait for the killer where a fast machine would outrun it.
JOBS_PER_HIT = 6
#: Seconds of calm after which what was not reported is lost, and seconds that nothing more may happen in.
PATIENCE_S = 150
QUIET_S = 2 * INTERVAL_S + 14


class Operator(threading.Thread):
    """Stops, cancels, deletes and requeues jobs, each as soon as it can be."""

    def __init__(self, target: Field, chosen: random.Random) -> None:
        super().__init__(daemon=True)
        self._field = target
        self._random = chosen
        self._due: list[tuple[float, int, str, str, float]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.leaving = threading.Event()

    def order(self, action: str, job_id: str) -> None:
        """Do *action* to a job from now on or from a little later on."""
        begin = time.monotonic() + self._random.choice((0.0, 0.0, 0.1, 1.0, 3.0))
        self._push(begin, action, job_id, begin + 90)

    def _push(self, due: float, action: str, job_id: str, until: float) -> None:
        with self._lock:
            heapq.heappush(self._due, (due, next(self._numbers), action, job_id, until))

    @property
    def waiting(self) -> int:
        return len(self._due)

    def run(self) -> None:
        while not self.leaving.wait(0.02):
            while self._due and self._due[0][0] <= time.monotonic():
                with self._lock:
                    _, _, action, job_id, until = heapq.heappop(self._due)
                try:
                    done = self._do(action, job_id)
                except redis.RedisError:
                    done = False
                except (NoSuchJobError, InvalidJobOperation):
                    done = True
                if not done and time.monotonic() < until:
                    self._push(time.monotonic() + 0.2, action, job_id, until)

    def _do(self, action: str, job_id: str) -> bool:
        """Say whether there is nothing left to do."""
        client = self._field.redis
        job = Job.fetch(job_id, connection=client)
        status = job.get_status()
        if action == "cancel":
            if job.origin != "parked" and status == "queued":
                return False
            job.cancel()
        elif action == "delete":
            job.delete()
        elif action == "requeue":
            if status in ("queued", "started"):
                return False
            if status == "failed":
                job.requeue()
        elif action == "stop":
            if status == "queued":
                return False
            if status == "started":
                send_stop_job_command(client, job_id)
                return False  # a worker that was just starting the job has not heard
        return True


class Clients:
    """Threads that ask for jobs until enough were accepted."""

    def __init__(self, target: Field, seed: int, count: int, operator: Operator, *, threads: int = 3) -> None:
        self._field = target
        self._count = count
        self._operator = operator
        self._numbers = itertools.count(1)
        self._threads = [
            threading.Thread(target=self._ask, args=(random.Random(f"{seed} client {number}"),), daemon=True)
            for number in range(threads)
        ]

    @property
    def accepted(self) -> int:
        return sum(len(answer.jobs) for answer in list(self._field.answers) if answer.promised)

    def run(self, *, timeout: float, check: Callable[[], None]) -> None:
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + timeout
        while any(thread.is_alive() for thread in self._threads):
            assert time.monotonic() < deadline, f"only {self.accepted} jobs accepted within {timeout:.0f} s"
            check()
            time.sleep(0.5)

    def _ask(self, chosen: random.Random) -> None:
        kinds = list(KINDS)
        weights = [KINDS[kind][0] for kind in kinds]
        while self.accepted < self._count:
            kind = chosen.choices(kinds, weights)[0]
            order, action = KINDS[kind][1:]
            held = chosen.randrange(100) < (40 if action == "delete" else HELD)
            self._wait_for_room()
            number = next(self._numbers)
            answer = self._field.submit(
                number, kind, result=_result(order["function"], number), hold=held, **order
            )
            for job_id in answer.jobs if action else ():
                self._operator.order(action, job_id)
            if answer.status != 200:
                time.sleep(0.5)
                with suppress(AssertionError):
                    wait_until(self._field.web_answers, timeout=60)

    def _wait_for_room(self) -> None:
        """Wait while RQ has enough to do or is away, and while hits lag behind the jobs."""
        for _ in range(600):
            with suppress(redis.RedisError):
                has_room = self._field.redis.llen("rq:queue:default") < BACKLOG
                if has_room and self.accepted < JOBS_PER_HIT * (self._field.kills.total() + 1):
                    return
            time.sleep(0.1)


def _result(function: str, number: int) -> dict[str, Any]:
    return {"value": ODD[number % len(ODD)][1] if function == "odd" else number}


class Killer(threading.Thread):
    """Kills and stops parts of a field at random, and starts again what has ended."""

    #: Part → how often it is chosen.
    VICTIMS = {
        "web": 2, "dispatcher": 4, "worker": 2, "worker and work-horse": 3, "work-horse": 4,
        "receiver answers 503": 2, "receiver resets": 2, "Valkey": 2, "PostgreSQL": 2, "both servers": 1,
        "dispatcher stopped": 2, "time passes": 3,
    }  # fmt: skip

    def __init__(self, target: Field, seed: int) -> None:
        super().__init__(daemon=True)
        self.field = target
        self.random = random.Random(f"{seed} killer")
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        self._stopped: threading.Thread | None = None
        self._parts = [part for part in self.VICTIMS if part != "PostgreSQL" or target.postgres is not None]

    def run(self) -> None:
        try:
            self._stop_dispatcher(LEASE_S + 3)
            while not self.stopping.wait(self.random.uniform(0.1, 1.3)):
                part = self.random.choices(self._parts, [self.VICTIMS[part] for part in self._parts])[0]
                try:
                    self._hit(part)
                except redis.RedisError:
                    continue  # Valkey is on its way up
                self.field.restart_dead()
        except BaseException as exc:  # raised by check(), in the thread that waits
            self.error = exc

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Stop killing; what was stopped goes on, and the receiver answers."""
        self.stopping.set()
        self.join(90)
        self.field.respond = lambda received: 204
        self.check()

    def _one(self, kind: str) -> str:
        return self.random.choice(self.field.named(kind))

    def _hit(self, part: str) -> None:
        target = self.field
        if part in ("web", "dispatcher"):
            target.kill(self._one(part))
        elif part == "worker":
            target.kill(self._one(self.random.choice(("worker", "worker", "simple"))))
        elif part == "worker and work-horse":
            name = self._one("worker")
            horses = target.horses(name)
            target.kill(name)
            for horse in horses:
                horse.kill() if horse.is_running() else None
        elif part == "work-horse":
            horses = target.horses(self._one("worker"))
            if not horses:
                return
            for horse in horses:
                horse.kill() if horse.is_running() else None
        elif part == "dispatcher stopped":
            self._stop_dispatcher(self.random.choice((2, 6, 15, LEASE_S + 3)))
        elif part == "time passes":
            target.expire_started(of_the_dead=True)
        elif part.startswith("receiver"):
            self._spoil_receiver(None if "resets" in part else 503)
        else:
            self._restart_servers(valkey=part != "PostgreSQL", postgres=part != "Valkey")
        target.kills[part] += 1

    def _spoil_receiver(self, answer: int | None) -> None:
        until = time.monotonic() + self.random.uniform(0.5, 4)
        chosen = random.Random(self.random.random())

        def respond(received: Received) -> int | None:
            return answer if time.monotonic() < until and chosen.random() < 0.7 else 204

        self.field.respond = respond

    def _restart_servers(self, *, valkey: bool, postgres: bool) -> None:
        """Kill the servers at one moment, and start them again after another."""
        target = self.field
        down_s = self.random.choice((0.0, 0.3, 1.0, 2.5))
        if valkey:
            os.kill(target.valkey.pid, signal.SIGKILL)
        if postgres and target.postgres is not None:
            target.postgres.stop(immediately=True)
        time.sleep(down_s)
        if valkey:
            target.valkey.stop()
        if postgres and target.postgres is not None:
            time.sleep(0.1)
            target.postgres.start()
        if valkey:
            target.valkey.start()

    def _stop_dispatcher(self, seconds: float) -> None:
        """SIGSTOP one dispatcher for a while, never all of them."""
        name = self._one("dispatcher")
        if (self._stopped and self._stopped.is_alive()) or len(self.field.named("dispatcher")) < 2:
            return
        process = self.field.processes[name]
        process.kill(signal.SIGSTOP)

        def go_on() -> None:
            self.stopping.wait(seconds)
            process.kill(signal.SIGCONT)

        # Not this thread: it may be waiting for a web process, and that for a lock of the stopped one.
        self._stopped = threading.Thread(target=go_on, daemon=True)
        self._stopped.start()


def _queue_is_empty(target: Field) -> bool:
    try:
        return not target.redis.llen("rq:queue:default")
    except redis.RedisError:
        return False


def storm(target: Field, seed: int, count: int, *, timeout: float) -> tuple[Audit, Evidence]:
    """Play a storm until *count* jobs were accepted; return what the auditor finds after it, and from what.

    :param timeout: seconds for each of the storm and the calm after it.
    """
    target.start("web")
    for name in ("dispatcher-1", "dispatcher-2", "worker-1", "worker-2", "simple-1"):
        target.start(name)
    operator = Operator(target, random.Random(f"{seed} operator"))
    operator.start()
    killer = Killer(target, seed)
    killer.start()
    clients = Clients(target, seed, count, operator)
    try:
        clients.run(timeout=timeout, check=killer.check)
        wait_until(
            lambda: killer.error is not None or _queue_is_empty(target),
            timeout=timeout,
            what="the queue to empty",
        )
    finally:
        killer.stop()
    wait_until(lambda: not operator.waiting, timeout=120, what="the operator's work")
    operator.leaving.set()
    operator.join(10)
    target.settle(timeout)

    deadline = time.monotonic() + PATIENCE_S
    while True:
        time.sleep(5)
        evidence = target.evidence()
        counts = audit(evidence).counts
        if not counts["lost"] and not counts["open"]:
            break
        if time.monotonic() > deadline:
            break
    # What RQ may still change its mind about, and what must not be sent twice.
    time.sleep(QUIET_S)
    evidence = target.evidence()
    return audit(evidence), evidence


def keep_evidence(target: Field, found: Audit, evidence: Evidence, folder: Path) -> str:
    """Write what speaks of every fault into *folder*, one file a job, and return the whole of it."""
    folder.mkdir(parents=True, exist_ok=True)
    evidence.save(folder)
    shutil.copytree(target.folder / "valkey" / "appendonlydir", folder / "appendonlydir", dirs_exist_ok=True)
    shutil.copytree(target.folder / "logs", folder / "logs", dirs_exist_ok=True)
    for name, process in target.processes.items():
        with (folder / "logs" / f"{name}.log").open("a") as log:
            log.write(process.output)
    texts = []
    for job_id in dict.fromkeys(fault.job_id for fault in found.faults):
        lines = [f"{fault.kind}: {fault.what}" for fault in found.faults if fault.job_id == job_id]
        text = "\n".join([job_id, *lines, *evidence.of(job_id), *target.logged(job_id)])
        (folder / f"{job_id}.txt").write_text(text + "\n")
        texts.append(text)
    return "\n\n".join(texts)
