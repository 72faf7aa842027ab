"""The other migration guides, done: from rq.Webhook, from a callback that posts, from task notifications.

The diffs are those the documentation shows; nothing else is changed on either side.
"""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from rq.job import Job

from flask_rq_webhooks.receiver import verify
from tests.hosts.copies import HostCopy, Web
from tests.servers import Process, Received, Receiver, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SECRET = "a long random secret"


class Printing:
    """A client's receiver process, which prints a JSON list for every webhook it accepts."""

    def __init__(self, host: HostCopy, port: int | None = None, **environment: str) -> None:
        self.port = port or free_port()
        self.process: Process = host.start("receiver.py", str(self.port), **environment)
        Web(self.process, self.port).wait()  # rq.Webhook tries once
        self.url = f"http://127.0.0.1:{self.port}/told"

    @property
    def accepted(self) -> list[Any]:
        return [json.loads(line) for line in self.process.output.splitlines() if line.endswith("]")]

    def wait_for(self, job_id: str) -> list[Any]:
        """Wait until a job was reported and return what was printed of it."""

        def reported() -> list[Any] | None:
            return next((line for line in self.accepted if job_id in json.dumps(line)), None)

        found: list[Any] = wait_until(reported, what=lambda: f"{job_id} in {self.process.output}")
        return found


@pytest.mark.skipif(not hasattr(rq, "Webhook"), reason="rq.Webhook came with RQ 2.10")
def test_from_rq_webhook(tmp_path: Path, redis_url: str) -> None:
    with HostCopy("rq_webhook", tmp_path, redis_url, WEBHOOK_SECRET=SECRET) as host, Receiver() as raw:
        # Before: RQ sends.
        web = host.start_web()
        old_receiver = Printing(host)
        worker = host.start_worker()
        web.wait()
        by_rq = web.post("/reports/one", {"webhook_url": old_receiver.url}).json()["job_id"]
        assert old_receiver.wait_for(by_rq) == [by_rq, "finished", ""]
        web.post("/reports/one", {"webhook_url": raw.url, "pages": 0})
        (rqs_own,) = raw.wait_for(1)
        worker.stop()
        in_between = web.post("/reports/late", {"webhook_url": old_receiver.url}).json()["job_id"]
        web.process.stop()

        # The service has changed, the receiver has not.
        host.apply("1-app.diff")
        web, _ = host.start_web(), host.start_worker()
        host.start_dispatcher("rq-webhooks init-db")
        web.wait()
        good = web.post("/reports/two", {"webhook_url": old_receiver.url}).json()["job_id"]
        bad = web.post("/reports/two", {"webhook_url": old_receiver.url, "pages": 0}).json()["job_id"]
        assert old_receiver.wait_for(good) == [good, "finished", ""]
        assert old_receiver.wait_for(bad) == [bad, "failed", "ValueError: a report of 0 pages"]
        assert old_receiver.wait_for(in_between) == [in_between, "finished", ""]  # by RQ, as it was enqueued
        web.post("/reports/two", {"webhook_url": raw.url, "pages": 0})
        _, ours = raw.wait_for(2)
        assert same_shape(rqs_own.json, ours.json)

        # The receiver has changed: it verifies, and asks for the format that says more.
        host.apply("2-receiver.diff")
        new_receiver = Printing(host, ONLY_SIGNED="1")
        signed = {"webhook_url": new_receiver.url, "webhook_secret": SECRET}
        plain = web.post("/reports/three", signed).json()["job_id"]
        more = web.post("/reports/three", {**signed, "webhook_format": "job", "pages": 0}).json()["job_id"]
        assert new_receiver.wait_for(plain) == [plain, "finished", ""]
        assert new_receiver.wait_for(more) == [more, "failed", "ValueError: a report of 0 pages"]
        reported = [line[0] for line in old_receiver.accepted]
        assert sorted(reported) == sorted({by_rq, in_between, good, bad})  # each once


def same_shape(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Say whether two bodies have the same keys in the same order, and values of the same kinds."""
    return [(key, type(value)) for key, value in old.items()] == [
        (key, type(value)) for key, value in new.items()
    ] and {key: old[key] for key in ("func_name", "status")} == {
        key: new[key] for key in ("func_name", "status")
    }


def test_from_a_callback_that_posts(tmp_path: Path, redis_url: str, redis_client: redis.Redis) -> None:
    answers: Iterator[int] = iter([500, 204, 204, 204, 204, 204, 500, 204])
    with (
        HostCopy("home_made", tmp_path, redis_url) as host,
        Receiver(lambda received: next(answers)) as receiver,
    ):

        def status(job_id: str) -> Any:
            return Job.fetch(job_id, connection=redis_client).get_status()

        def bodies(received: list[Received]) -> list[Any]:
            return [one.json for one in received]

        # Before: a receiver that is down for a moment makes a good job a failed one.
        web = host.start_web()
        worker = host.start_worker()
        web.wait()
        lost = web.post("/simulations", {"steps": 1, "callback_url": receiver.url}).json()["job_id"]
        done, failed = bodies(receiver.wait_for(2))
        assert (done["state"], failed["state"]) == ("done", "failed")
        wait_until(lambda: status(lost) == "failed")
        good = web.post("/simulations", {"steps": 2, "callback_url": receiver.url}).json()["job_id"]
        bad = web.post("/simulations", {"steps": -1, "callback_url": receiver.url}).json()["job_id"]
        before = bodies(receiver.wait_for(4)[2:])
        assert before == [
            {"job": good, "state": "done", "result": {"steps": 2}},
            {"job": bad, "state": "failed", "reason": "-1 steps"},
        ]
        worker.stop()
        in_between = web.post("/simulations", {"steps": 3, "callback_url": receiver.url}).json()["job_id"]
        web.process.stop()

        # After: the app asks for webhooks. The job that waits still posts, once; new ones do not.
        host.apply("1-app.diff")
        web, worker = host.start_web(), host.start_worker()
        dispatcher = host.start_dispatcher("rq-webhooks init-db")
        web.wait()
        (posted,) = bodies(receiver.wait_for(5)[4:])
        assert posted == {"job": in_between, "state": "done", "result": {"steps": 3}}
        fields = {"callback_url": receiver.url, "callback_secret": SECRET}
        new_bad = web.post("/simulations", {"steps": -1, **fields}).json()["job_id"]
        (reported,) = receiver.wait_for(6)[5:]
        assert reported.json == {"job": new_bad, "state": "failed", "reason": "-1 steps"}
        verify(reported.body, reported.headers, SECRET)

        # Nothing waits that names the old functions: they go. What the callback did beside posting stays.
        worker.stop()
        host.apply("2-notify.diff")
        host.start_worker()
        new_good = web.post("/simulations", {"steps": 4, **fields}).json()["job_id"]
        refused, accepted = receiver.wait_for(8)[6:]
        assert refused.body == accepted.body
        assert accepted.json == {"job": new_good, "state": "done", "result": {"steps": 4}}
        assert accepted.headers["X-Webhook-Attempt"] == "2"
        assert status(new_good) == "finished"
        assert int(redis_client.hget("simulations", "finished") or 0) == 4
        assert dispatcher.popen.poll() is None


def test_from_task_notifications(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "CELERY_BROKER_URL": redis_url,
        "WEBHOOK_SIGNING_SECRET": SECRET,
        "ALLOWED_WEBHOOK_DOMAINS": "127.0.0.1,client.example",
        "WEBHOOK_RATE_LIMIT_PER_MINUTE": "600",
        "WEBHOOKS_ENABLED": "true",
    }
    with HostCopy("task_notifications", tmp_path, redis_url, **environment) as host, Receiver() as raw:
        # Before: what the tasks called, without Celery around it.
        old = load(host.folder / "notifications.py")
        receiver = Printing(host)
        wait_until(lambda: _listens(receiver.port))
        monkeypatch.setenv("WEBHOOK_SIGNING_SECRET", SECRET)
        old["notify"](receiver.url, "old", "check_document", result=1, sign=True)
        assert receiver.wait_for("old")[:2] == [
            "task.completed",
            {"id": "old", "name": "check_document", "status": "SUCCESS"},
        ]

        # After: RQ runs the tasks; the receiver is the same process.
        host.apply("1-app.diff")
        web, _ = host.start_web(), host.start_worker()
        host.start_dispatcher("rq-webhooks init-db")
        web.wait()
        asked = {"webhook_url": receiver.url, "sign_payload": True}
        answer = web.post("/api/v1/checks", {"text": "gr\u00fcn \U0001f33f", **asked})
        assert (answer.status_code, answer.json()["status"]) == (202, "PENDING")
        good = answer.json()["task_id"]
        bad = web.post("/api/v1/checks", {"text": "", **asked}).json()["task_id"]
        event, task, body = receiver.wait_for(good)
        assert (event, task) == (
            "task.completed",
            {"id": good, "name": "check_document", "status": "SUCCESS"},
        )
        assert json.loads(body)["result"] == {"valid": True, "words": 2}
        event, task, body = receiver.wait_for(bad)
        assert (event, task["status"], json.loads(body)["error"]) == (
            "task.failed",
            "FAILURE",
            "nothing to check",
        )

        # Byte for byte what the old code makes of the same facts, under the same headers.
        web.post("/api/v1/checks", {"text": "gr\u00fcn", **asked, "webhook_url": raw.url})
        web.post("/api/v1/checks", {"text": "", **asked, "webhook_url": raw.url})
        for received in raw.wait_for(2):
            reported = received.json
            expected = old["build_body"](
                reported["task"]["id"], "check_document", reported["timestamp"],
                result=reported.get("result"), error=reported.get("error"),
            )  # fmt: skip
            assert received.body == expected
            assert received.headers["X-Guardrails-Signature"] == old["signature"](expected)
            assert received.headers["X-Guardrails-Timestamp"].endswith("Z")
            assert received.headers["User-Agent"] == "Guardrails-Webhook/1.0"
            verify(received.body, received.headers, SECRET)  # and the newer signature beside it

        # The allow-list of the environment still holds, and unsigned means unsigned.
        refused = web.post("/api/v1/checks", {"text": "a", "webhook_url": "https://elsewhere.example/"})
        assert refused.status_code == 400
        web.post("/api/v1/checks", {"text": "a", "webhook_url": raw.url})
        unsigned = raw.wait_for(3)[2]
        assert "X-Guardrails-Signature" not in unsigned.headers


def test_the_tasks_notified_before(tmp_path: Path, redis_url: str) -> None:
    """The page's starting point, in Celery itself."""
    pytest.importorskip("celery")
    environment = {"CELERY_BROKER_URL": "memory://", "WEBHOOK_SIGNING_SECRET": SECRET}
    with HostCopy("task_notifications", tmp_path, redis_url, **environment) as host:
        receiver = Printing(host)
        code = (
            "import tasks\n"
            "tasks.celery.conf.task_always_eager = True\n"
            f"print(tasks.check_document.delay('a b', webhook_url={receiver.url!r}, sign=True).id)"
        )
        wait_until(lambda: _listens(receiver.port))
        task_id = host.run("-c", code).strip()
        event, task, body = receiver.wait_for(task_id)
        assert (event, task["name"], json.loads(body)["result"]["words"]) == (
            "task.completed",
            "check_document",
            2,
        )


def load(path: Path) -> dict[str, Any]:
    """Run a file of the old service and return its names."""
    spec = importlib.util.spec_from_file_location("old_notifications", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
