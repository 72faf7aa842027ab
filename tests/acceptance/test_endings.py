"""Every way a job can end, with stock worker, dispatcher and receiver: what is reported, by what, how soon.

One installation serves all rows; every row has a queue of its own, and a worker where it needs one. With
``RQ_WEBHOOKS_ENDINGS_FILE`` set, what was measured is written there for the documentation
(``tests/chaos/write_tables.py``).
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import rq
from rq.command import send_stop_job_command
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry

from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import get_state
from tests.acceptance.conftest import FLASK, SECRET
from tests.acceptance.host_app import create_app, db, webhooks
from tests.servers import Process, Received, Receiver, rq_worker, valkey_server, wait_until

try:
    from rq import Webhook
except ImportError:  # RQ before 2.10
    Webhook = None

TASKS = "tests.acceptance.ending_tasks."
INTERVAL_S = 2.0
#: What a person may wait for, seconds after RQ's state shows the ending.
CALLBACK_S = 1.0
RECONCILED_S = INTERVAL_S + 2
#: A job that is gone has to be missed by two passes.
LOST_S = 2 * INTERVAL_S + 2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@dataclass
class Installation:
    """One running installation, and what was measured with it."""

    app: Any
    redis: redis.Redis
    redis_url: str
    hook: Receiver
    rq_hook: Receiver
    plain_hook: Receiver
    measured: list[dict[str, Any]] = field(default_factory=list)

    def events(self, job_id: str) -> list[Received]:
        """Return the first arrival of every event of a job."""
        first: dict[str, Received] = {}
        for received in list(self.hook.received):
            if received.json["job_id"] == job_id:
                first.setdefault(received.headers["webhook-id"], received)
        return list(first.values())

    def status(self, job_id: str) -> str | None:
        status = self.redis.hget(f"rq:job:{job_id}", "status")
        return status.decode() if status is not None else None


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("endings")
    with ExitStack() as stack:
        server = stack.enter_context(valkey_server())
        settings = {"RQ_WEBHOOKS_RECONCILE_INTERVAL": INTERVAL_S, "RQ_WEBHOOKS_CLEAN_ABANDONED": True}
        config = {
            "SQLALCHEMY_DATABASE_URI": f"sqlite:///{folder / 'host.db'}",
            "RQ_WEBHOOKS_REDIS_URL": server.url,
            **settings,
        }
        app = create_app(config)
        state = get_state(app)
        state.database.create_tables()
        client = stack.enter_context(redis.Redis.from_url(server.url))
        receivers = [stack.enter_context(Receiver()) for _ in range(3)]
        client.set("plain-receiver", receivers[2].url)
        environment = {
            "TEST_DATABASE_URL": config["SQLALCHEMY_DATABASE_URI"],
            "TEST_REDIS_URL": server.url,
            "TEST_SETTINGS": json.dumps(settings),
        }
        dispatcher = stack.enter_context(Process(*FLASK, "rq-webhooks", "worker", env=environment))
        dispatcher.wait_for_output("started")
        found = Installation(app, client, server.url, *receivers)
        yield found
        report = os.environ.get("RQ_WEBHOOKS_ENDINGS_FILE")
        if report:
            Path(report).write_text(json.dumps({"rq": rq.__version__, "rows": found.measured}, indent=1))
        state.redis.close()
        state.database.dispose()
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()


class Case:
    """One row: its queue, its workers, its job."""

    def __init__(self, installation: Installation, name: str) -> None:
        self.installation = installation
        self.name = name
        self.redis = installation.redis
        self.queue = rq.Queue(f"row-{abs(hash(name)) % 10**8}", connection=self.redis)
        self.cleanup = ExitStack()

    def worker(self, worker_class: str = "rq.Worker") -> Process:
        process = rq_worker(self.installation.redis_url, self.queue.name, worker_class=worker_class)
        self.cleanup.enter_context(process)
        process.wait_for_output("Listening on")
        return process

    def enqueue(
        self,
        function: str,
        *args: Any,
        queue: rq.Queue | None = None,
        compared: bool = True,
        fields: dict[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Enqueue with our webhook and, where *compared*, with what people use today beside it."""
        if compared:
            for kind in ("success", "failure", "stopped"):
                options.setdefault(f"on_{kind}", rq.Callback(f"{TASKS}post_{kind}"))
            if Webhook is not None:
                url = self.installation.rq_hook.url
                options["webhooks"] = [Webhook(url, kind, method="POST") for kind in ("finished", "failed")]
        payload = {"webhook_url": self.installation.hook.url, "webhook_secret": SECRET, **(fields or {})}
        with self.installation.app.app_context():
            job = webhooks.enqueue_with_webhook(
                queue or self.queue, TASKS + function, args, payload=payload, **options
            )
        return str(job.id)

    def job(self, job_id: str) -> Job:
        return Job.fetch(job_id, connection=self.redis)

    def wait_for_status(self, job_id: str, *statuses: str | None, timeout: float = 30) -> float:
        """Wait until RQ has committed one of *statuses* (``None``: gone); return the time."""
        wait_until(
            lambda: self.installation.status(job_id) in statuses,
            timeout=timeout,
            what=f"{statuses} of {self.name}",
        )
        return time.time()

    def expect(
        self,
        job_id: str,
        event: str,
        source: str,
        *,
        since: float,
        within_s: float,
        number: int = 1,
        note: str = "",
    ) -> Any:
        """Wait for the *number*-th event of the job, check it, and keep what was measured."""
        received = wait_until(
            lambda: len(found := self.installation.events(job_id)) >= number and found[number - 1],
            timeout=within_s + 10,
            what=f"{event} of {self.name}",
        )
        verify(received.body, received.headers, SECRET)
        body = received.json
        seconds = received.at - since
        assert (body["event"], body["source"]) == (event, source), body
        assert seconds <= within_s, f"{self.name}: {seconds:.2f} s"
        self.installation.measured.append(
            {
                "row": self.name,
                "event": event,
                "source": source,
                "seconds": round(max(seconds, 0.0), 3),
                "bound": within_s,
                "note": note,
                "job_id": job_id,
                "rq_webhook": self._words(self.installation.rq_hook, job_id, "status"),
                "plain_callback": self._words(self.installation.plain_hook, job_id, "word"),
            }
        )
        return body

    @staticmethod
    def _words(receiver: Receiver, job_id: str, name: str) -> list[str]:
        time.sleep(0.2)
        return [one.json[name] for one in list(receiver.received) if one.json["job_id"] == job_id]


@pytest.fixture
def case(installation: Installation, request: pytest.FixtureRequest) -> Iterator[Case]:
    made = Case(installation, request.node.name)
    with made.cleanup:
        yield made


def named(name: str) -> Callable[[Any], Any]:
    """Call a row by the words of the table."""

    def rename(function: Any) -> Any:
        function.row = name
        return function

    return rename


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, case: Case) -> None:
    case.name = getattr(request.function, "row", request.node.name)


# -- reported by callbacks --------------------------------------------------------------------------------


@named("returns")
def test_returns(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("succeed", {"peak": 12.5})
    since = case.wait_for_status(job_id, "finished")

    body = case.expect(job_id, "job.success", "callback", since=since, within_s=CALLBACK_S)

    assert body["result"] == {"peak": 12.5}


@named("returns, ``result_ttl=0``")
def test_returns_and_leaves_nothing(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("succeed", 7, result_ttl=0)
    since = case.wait_for_status(job_id, None)

    body = case.expect(job_id, "job.success", "callback", since=since, within_s=CALLBACK_S)

    assert body["result"] == 7


@named("raises")
def test_raises(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("fail")
    since = case.wait_for_status(job_id, "failed")

    body = case.expect(job_id, "job.failure", "callback", since=since, within_s=CALLBACK_S)

    assert body["error"]["type"] == "ValueError"


@named("raises, ``Retry(max=2)`` exhausted")
def test_retries_exhausted(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("fail", retry=rq.Retry(max=2))
    since = case.wait_for_status(job_id, "failed")

    case.expect(job_id, "job.failure", "callback", since=since, within_s=CALLBACK_S)


@named("raises, succeeds when retried after an interval")
def test_retry_with_interval_succeeds(case: Case) -> None:
    worker = rq_worker(case.installation.redis_url, "--with-scheduler", case.queue.name)
    case.cleanup.enter_context(worker)
    job_id = case.enqueue("fail_first", retry=rq.Retry(max=1, interval=1))
    since = case.wait_for_status(job_id, "finished", timeout=60)

    case.expect(job_id, "job.success", "callback", since=since, within_s=CALLBACK_S)


@named("job timeout")
def test_timeout(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("run_for", 30, timeout=1)
    since = case.wait_for_status(job_id, "failed")

    body = case.expect(job_id, "job.failure", "callback", since=since, within_s=CALLBACK_S)

    assert body["error"]["type"] == "JobTimeoutException"


@named("``SystemExit`` in the job")
def test_system_exit(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("leave_system")
    since = case.wait_for_status(job_id, "failed")

    case.expect(job_id, "job.failure", "callback", since=since, within_s=CALLBACK_S)


@named("stop command")
def test_stop_command(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("run_for", 60)
    case.wait_for_status(job_id, "started")
    time.sleep(0.5)  # the worker listens for commands a moment after it started the job
    send_stop_job_command(case.redis, job_id)
    since = case.wait_for_status(job_id, "stopped")

    case.expect(job_id, "job.stopped", "callback", since=since, within_s=CALLBACK_S)


@named("stop command to a ``SimpleWorker`` (ignored)")
def test_stop_command_that_is_ignored(case: Case) -> None:
    if tuple(int(part) for part in rq.__version__.split(".")[:2]) < (2, 12):  # 1.16.2 and 2.6.1 do
        pytest.skip("this RQ kills the worker's whole process group, which is ours")
    case.worker("rq.SimpleWorker")
    job_id = case.enqueue("run_for", 2)
    case.wait_for_status(job_id, "started")
    time.sleep(0.5)
    send_stop_job_command(case.redis, job_id)
    since = case.wait_for_status(job_id, "finished")

    case.expect(job_id, "job.success", "callback", since=since, within_s=CALLBACK_S)


@named("worker alone SIGKILLed, the orphan finishes")
def test_orphan_finishes(case: Case) -> None:
    worker = case.worker()
    job_id = case.enqueue("run_for", 3)
    case.wait_for_status(job_id, "started")
    time.sleep(0.3)
    worker.kill()
    since = case.wait_for_status(job_id, "finished")

    case.expect(job_id, "job.success", "callback", since=since, within_s=CALLBACK_S)


@named("the user's ``on_success`` raises")
def test_own_callback_raises(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("succeed", compared=False, on_success=rq.Callback(TASKS + "raise_on_success"))
    since = case.wait_for_status(job_id, "failed")

    body = case.expect(job_id, "job.failure", "callback", since=since, within_s=CALLBACK_S)

    assert body["error"]["type"] == "LookupError"


@named("work-horse killed after ``on_success``, before the commit")
def test_killed_between_callback_and_commit(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("return_deadly_result")
    since = case.wait_for_status(job_id, "failed")

    case.expect(job_id, "job.failure", "callback", since=since, within_s=CALLBACK_S)


@named("``is_async=False``")
def test_synchronous(case: Case) -> None:
    queue = rq.Queue(case.queue.name, connection=case.redis, is_async=False)
    job_id = case.enqueue("succeed", queue=queue)
    since = case.wait_for_status(job_id, "finished")

    case.expect(job_id, "job.success", "callback", since=since, within_s=CALLBACK_S)


@named("requeued after a failure")
def test_requeue(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("fail_first")
    since = case.wait_for_status(job_id, "failed")
    case.expect(job_id, "job.failure", "callback", since=since, within_s=CALLBACK_S, note="first run")
    FailedJobRegistry(case.queue.name, case.redis).requeue(job_id)
    since = case.wait_for_status(job_id, "finished")

    case.expect(
        job_id, "job.success", "callback", since=since, within_s=CALLBACK_S, number=2, note="second run"
    )


@named("``Repeat(times=1)``")
def test_repeat(case: Case) -> None:
    repeat = pytest.importorskip("rq.repeat").Repeat
    case.worker()
    job_id = case.enqueue("succeed", repeat=repeat(times=1))
    since = case.wait_for_status(job_id, "finished")

    case.expect(job_id, "job.success", "callback", since=since, within_s=CALLBACK_S, note="first run")
    case.expect(
        job_id, "job.success", "callback", since=since, within_s=CALLBACK_S, number=2, note="second run"
    )


# -- found by reconcile -----------------------------------------------------------------------------------


@named("work-horse SIGKILL, out of memory")
def test_work_horse_killed(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("kill_own_work_horse")
    since = case.wait_for_status(job_id, "failed")

    body = case.expect(job_id, "job.failure", "reconciled", since=since, within_s=RECONCILED_S)

    assert body["error"]["type"] == "WorkHorseTerminated"


@named("``os._exit(3)``")
def test_exit_3(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("leave_at_once", 3)
    since = case.wait_for_status(job_id, "failed")

    case.expect(job_id, "job.failure", "reconciled", since=since, within_s=RECONCILED_S)


@pytest.mark.chaos  # RQ waits for a minute
@named("ignores the timeout signal")
def test_timeout_ignored(case: Case) -> None:
    url, queue = case.installation.redis_url, case.queue.name
    case.cleanup.enter_context(rq_worker(url, "--job-monitoring-interval", "1", queue))
    job_id = case.enqueue("ignore_everything", 120, timeout=1)
    since = case.wait_for_status(job_id, "failed", timeout=100)

    # In the second in which the worker kills it, the job's heartbeat has expired as well: a dispatcher that
    # cleans abandoned jobs may be first, and RQ then runs the callback.
    result = Job.fetch(job_id, connection=case.installation.redis).latest_result()
    source = "callback" if "AbandonedJobError" in str(result and result.exc_string) else "reconciled"
    case.expect(job_id, "job.failure", source, since=since, within_s=RECONCILED_S)


@named("stuck in the intermediate queue")
def test_stuck_in_intermediate_queue(case: Case) -> None:
    intermediate = case.queue.intermediate_queue
    job_id = case.enqueue("succeed")
    # A worker took it, died, and was last seen two minutes ago.
    case.redis.lmove(case.queue.key, intermediate.key)
    case.redis.set(intermediate.get_first_seen_key(job_id), time.time() - 120)
    case.worker()
    since = case.wait_for_status(job_id, "failed")

    case.expect(job_id, "job.failure", "reconciled", since=since, within_s=RECONCILED_S)


@named("returns ``Retry``, exhausted")
def test_returned_retry_exhausted(case: Case) -> None:
    pytest.importorskip("rq.repeat")  # RQ 2 brought returned retries
    case.worker()
    job_id = case.enqueue("return_retry")
    since = case.wait_for_status(job_id, "failed")

    case.expect(job_id, "job.failure", "reconciled", since=since, within_s=RECONCILED_S)


@named("``cancel()`` of a queued job")
def test_cancel_queued(case: Case) -> None:
    job_id = case.enqueue("succeed")
    case.job(job_id).cancel()

    case.expect(job_id, "job.canceled", "reconciled", since=time.time(), within_s=RECONCILED_S)


@named("``cancel()`` of a deferred job")
def test_cancel_deferred(case: Case) -> None:
    first = case.queue.enqueue(TASKS + "succeed")
    job_id = case.enqueue("succeed", depends_on=first)
    case.job(job_id).cancel()

    case.expect(job_id, "job.canceled", "reconciled", since=time.time(), within_s=RECONCILED_S)


@named("``cancel()`` of a running job that then finishes")
def test_cancel_running(case: Case) -> None:
    case.worker()
    job_id = case.enqueue("run_for", 2 * INTERVAL_S + 2)
    case.wait_for_status(job_id, "started")
    time.sleep(0.3)
    case.job(job_id).cancel()

    first = case.expect(
        job_id, "job.canceled", "reconciled", since=time.time(), within_s=RECONCILED_S, note="RQ said so"
    )
    since = case.wait_for_status(job_id, "finished")
    correction = case.expect(
        job_id, "job.success", "reconciled", since=since, within_s=RECONCILED_S, number=2, note="correction"
    )
    assert correction["supersedes"] == first["id"]


@named("deleted")
def test_deleted(case: Case) -> None:
    job_id = case.enqueue("succeed")
    case.job(job_id).delete()

    case.expect(job_id, "job.lost", "reconciled", since=time.time(), within_s=LOST_S)


@named("TTL ran out in the queue")
def test_ttl_ran_out(case: Case) -> None:
    job_id = case.enqueue("succeed", ttl=1)
    since = case.wait_for_status(job_id, None)

    case.expect(job_id, "job.lost", "reconciled", since=since, within_s=LOST_S)


@named("dependency failed")
def test_dependency_failed(case: Case) -> None:
    first = case.queue.enqueue(TASKS + "fail")
    job_id = case.enqueue("succeed", depends_on=first, fields={"webhook_events": ["job.blocked"]})
    case.worker()
    since = case.wait_for_status(first.id, "failed")

    case.expect(job_id, "job.blocked", "reconciled", since=since, within_s=RECONCILED_S, note="if subscribed")


def let_it_expire(case: Case, job_id: str) -> float:
    """Do what 90 seconds without a heartbeat do to the registry of started jobs."""
    registry = StartedJobRegistry(case.queue.name, connection=case.redis)
    (entry,) = case.redis.zrange(registry.key, 0, -1)
    assert entry.startswith(job_id.encode())
    case.redis.zadd(registry.key, {entry: time.time() - 1})
    return time.time()


@named("``os._exit(0)``")
def test_exit_0(case: Case) -> None:
    worker = case.worker()
    job_id = case.enqueue("leave_at_once", 0)
    case.wait_for_status(job_id, "started")
    worker.stop()
    since = let_it_expire(case, job_id)

    body = case.expect(
        job_id,
        "job.failure",
        "callback",
        since=since,
        within_s=RECONCILED_S,
        note="CLEAN_ABANDONED, after its TTL",
    )
    assert body["error"]["type"] == "AbandonedJobError"


@named("worker and work-horse SIGKILLed")
def test_worker_host_lost(case: Case) -> None:
    worker = case.worker()
    job_id = case.enqueue("run_for", 60)
    case.wait_for_status(job_id, "started")
    time.sleep(0.3)
    horses = psutil.Process(worker.pid).children()
    worker.kill()
    for horse in horses:
        os.kill(horse.pid, signal.SIGKILL)
    since = let_it_expire(case, job_id)

    case.expect(
        job_id,
        "job.failure",
        "callback",
        since=since,
        within_s=RECONCILED_S,
        note="CLEAN_ABANDONED, after its TTL",
    )


# -- afterwards -------------------------------------------------------------------------------------------


def test_no_client_got_more_than_the_table_says(installation: Installation) -> None:
    """Every row's job has its events and no others, each delivered once."""
    time.sleep(2 * INTERVAL_S)
    expected: dict[str, list[str]] = {}
    for row in installation.measured:
        expected.setdefault(row["job_id"], []).append(row["event"])
    got: dict[str, list[str]] = {}
    for received in installation.hook.received:
        got.setdefault(received.json["job_id"], []).append(received.json["event"])
    assert len(expected) >= 20
    assert got == expected
