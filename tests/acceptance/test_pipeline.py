"""From an HTTP request to a signed, verified, logged webhook: stock worker, dispatcher, real receiver."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from rq.job import Job

from flask_rq_webhooks.receiver import verify
from tests.acceptance import tasks
from tests.acceptance.conftest import SECRET, Stack
from tests.acceptance.host_app import webhooks
from tests.servers import Received, wait_until

#: What the tests of this module run on, see conftest.
DATABASES = ("sqlite", "postgresql")
HEADER_VALUE = "Bearer a value nobody else may see"


def committed_status(stack: Stack, job_id: str) -> str | None:
    status = stack.redis.hget(f"rq:job:{job_id}", "status")
    return status.decode() if status is not None else None


def test_success_is_reported_signed_verified_and_logged(stack: Stack) -> None:
    stack.start_worker()
    stack.start_dispatcher()

    response = stack.submit("/runs/basin-7/run", webhook_headers={"Authorization": HEADER_VALUE})
    job_id = response.get_json()["job_id"]
    (received,) = stack.receiver.wait_for(1)

    assert response.headers["Webhook-Registered"] == "true"
    verified = verify(received.body, received.headers, SECRET)
    assert received.headers["Authorization"] == HEADER_VALUE
    assert received.headers["X-Webhook-Event"] == "job.success"
    assert received.headers["X-Webhook-Attempt"] == "1"
    payload = received.json
    assert list(payload)[:5] == ["event", "job_id", "runid", "timestamp", "result"]
    assert payload["event"] == "job.success"
    assert payload["job_id"] == job_id
    assert payload["runid"] == "basin-7"
    assert payload["result"] == {"runid": "basin-7", "outlet": "/data/basin-7", "peak": 12.5}
    assert payload["source"] == "callback"
    assert payload["id"] == verified.id

    status = wait_until(lambda: (s := stack.status(job_id))["delivery_status"] == "succeeded" and s)
    assert status["webhook_configured"] is True
    (delivery,) = status["deliveries"]
    (attempt,) = delivery["attempts"]
    assert attempt["status_code"] == 204
    assert attempt["number"] == 1
    assert HEADER_VALUE not in str(status)
    assert SECRET not in str(status)


def test_failure_is_reported_with_its_error(stack: Stack) -> None:
    stack.start_worker()
    stack.start_dispatcher()

    job_id = stack.call("fail", "no rain data")
    (received,) = stack.receiver.wait_for(1)

    verify(received.body, received.headers, SECRET)
    assert received.json["event"] == "job.failure"
    assert received.json["job_id"] == job_id
    assert received.json["error"]["type"] == "ValueError"
    assert received.json["error"]["message"] == "no rain data"
    assert "tasks.py" in received.json["error"]["traceback"]
    assert "result" not in received.json


def test_stopped_job_is_reported(stack: Stack) -> None:
    from rq.command import send_stop_job_command

    stack.start_worker()
    stack.start_dispatcher()

    job_id = stack.call("sleep", 60)
    wait_until(lambda: committed_status(stack, job_id) == "started")
    time.sleep(0.3)  # the worker listens for commands a moment after it started the job
    send_stop_job_command(stack.redis, job_id)
    (received,) = stack.receiver.wait_for(1)

    assert received.json["event"] == "job.stopped"
    assert received.json["job_id"] == job_id


def test_receiver_that_fails_twice_gets_the_same_bytes_and_id_a_third_time(stack: Stack) -> None:
    answers = iter([500, 503, 200])
    stack.receiver.respond = lambda received: (next(answers), {}, b"seen")
    stack.start_worker()
    stack.start_dispatcher()

    job_id = stack.call("add", 1, 2)
    received = stack.receiver.wait_for(3)

    assert len({r.body for r in received}) == 1
    assert len({r.headers["webhook-id"] for r in received}) == 1
    assert [r.headers["X-Webhook-Attempt"] for r in received] == ["1", "2", "3"]
    for one in received:
        verify(one.body, one.headers, SECRET)
    status = wait_until(lambda: (s := stack.status(job_id))["delivery_status"] == "succeeded" and s)
    assert [a["status_code"] for a in status["deliveries"][0]["attempts"]] == [500, 503, 200]


def test_users_own_callbacks_still_run(stack: Stack) -> None:
    stack.start_worker()
    stack.start_dispatcher()

    good = stack.call("add", 1, 2, on_success="tests.acceptance.tasks.note_success")
    bad = stack.call("fail", "dry", on_failure="tests.acceptance.tasks.note_failure")
    stack.receiver.wait_for(2)

    noted = [note.decode() for note in stack.redis.lrange("noted", 0, -1)]
    assert len(noted) == 2
    assert noted[0].startswith(f"success {good} ")
    assert noted[1] == f"failure {bad} ValueError dry"


def test_workhorse_killed_after_on_success_is_reported_as_rq_committed_it(stack: Stack) -> None:
    stack.start_worker()
    stack.start_dispatcher()

    job_id = stack.call("return_deadly_result")
    (received,) = stack.receiver.wait_for(1)

    assert committed_status(stack, job_id) == "failed"
    assert received.json["event"] == "job.failure"
    time.sleep(1)
    assert len(stack.receiver.received) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jobs", "options"),
    [
        pytest.param(500, {}, id="500-plain"),
        pytest.param(60, {"on_success": "tests.acceptance.tasks.slow_callback"}, id="slow-user-callback"),
    ],
)
def test_webhook_never_arrives_before_the_commit(stack: Stack, jobs: int, options: dict[str, Any]) -> None:
    early: list[str] = []
    inspector = redis.Redis.from_url(stack.redis_url)

    def respond(received: Received) -> int:
        status = inspector.hget(f"rq:job:{received.json['job_id']}", "status")
        if status not in (b"finished", b"failed"):
            early.append(f"{received.json['job_id']}: {status!r}")
        return 204

    stack.receiver.respond = respond
    job_ids = {stack.call("add", 1, number, **options) for number in range(jobs)}
    stack.start_dispatcher()
    # One that forks for every job, and one that does not and therefore has the greater share.
    stack.start_worker()
    stack.start_worker(worker_class="rq.SimpleWorker")

    received = stack.receiver.wait_for(jobs, timeout=100)
    inspector.close()
    assert early == []
    assert {r.json["job_id"] for r in received} == job_ids
    assert len(received) == jobs


def test_secrets_are_nowhere_but_encrypted(stack: Stack, tmp_path: Path) -> None:
    stack.receiver.respond = lambda received: 204
    worker = stack.start_worker()
    dispatcher = stack.start_dispatcher()
    job_id = stack.call("add", 1, 2, webhook={"webhook_headers": {"Authorization": HEADER_VALUE}})
    stack.call("fail", "dry", webhook={"webhook_headers": {"Authorization": HEADER_VALUE}})
    stack.receiver.wait_for(2)
    wait_until(lambda: stack.status(job_id)["delivery_status"] == "succeeded")

    redis_dump = b"".join(key + (stack.redis.dump(key) or b"") for key in stack.redis.scan_iter())
    # DUMP compresses long strings, so the readable parts are looked at as well.
    for key in stack.redis.scan_iter("rq:job:*"):
        if stack.redis.type(key) == b"hash":
            redis_dump += b"".join(k + v for k, v in stack.redis.hgetall(key).items())
            redis_dump += (Job.fetch(key.decode().split(":")[-1], stack.redis).description or "").encode()
    for key in stack.redis.scan_iter("rq_webhooks:*"):
        if stack.redis.type(key) == b"stream":
            redis_dump += repr(stack.redis.xrange(key)).encode()
    logs = (worker.output + dispatcher.output).encode()
    files = b"".join(path.read_bytes() for path in tmp_path.glob("host.db*"))
    assert job_id.encode() in redis_dump
    stored = stack.stored()
    assert job_id.encode() in stored
    if stack.database_url.startswith("sqlite"):
        assert b"rq_webhooks_endpoint" in files
    for place, content in {"redis": redis_dump, "logs": logs, "sql": stored, "files": files}.items():
        assert SECRET.encode() not in content, place
        assert HEADER_VALUE.encode() not in content, place


def test_watched_job_made_elsewhere_is_reported_by_reconcile(stack: Stack) -> None:
    queue = rq.Queue(connection=stack.redis)
    waiting = queue.enqueue(tasks.add, 1, 2)
    with stack.app.app_context():
        webhooks.watch(waiting, stack.receiver.url, secret=SECRET, runid="basin-9")
    stack.start_worker(burst=True).wait()
    dispatcher = stack.start_dispatcher()

    (received,) = stack.receiver.wait_for(1)

    verify(received.body, received.headers, SECRET)
    assert received.json["event"] == "job.success"
    assert received.json["job_id"] == waiting.id
    assert received.json["runid"] == "basin-9"
    assert received.json["result"] == {"sum": 3}
    assert received.json["source"] == "reconciled"
    assert dispatcher.popen.poll() is None
