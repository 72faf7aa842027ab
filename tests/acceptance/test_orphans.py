"""A work-horse that outlives its worker: RQ calls the job abandoned, and is wrong."""

from __future__ import annotations

import json

import psutil
import pytest

from flask_rq_webhooks.receiver import verify
from tests.acceptance.conftest import SECRET, Stack
from tests.servers import Process, wait_until

#: RQ takes a job for abandoned a minute after the last sign of its worker, and a moment for looking.
ABANDONED_S = 100


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_orphan_that_finishes_after_rq_called_its_job_abandoned_is_reported_as_a_correction(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"RQ_WEBHOOKS_RECONCILE_INTERVAL": 0.5, "RQ_WEBHOOKS_CLEAN_ABANDONED": True}
    monkeypatch.setenv("TEST_SETTINGS", json.dumps(settings))
    stack.start_dispatcher().wait_for_output("started")
    command = ("python", "-m", "rq.cli", "worker", "--url", stack.redis_url, "--job-monitoring-interval", "1")
    with Process(*command, "default", env=stack.environment) as worker:
        job_id = stack.call("wait_for", "orphan")
        wait_until(lambda: stack.redis.llen("orphan:there") == 1, timeout=60)
        (orphan,) = psutil.Process(worker.pid).children()
        worker.kill()
        assert orphan.is_running()

    # Nobody else looks after the queue, and nobody has changed anything of RQ's.
    (first,) = stack.receiver.wait_for(1, timeout=ABANDONED_S)
    assert orphan.is_running()
    assert stack.redis.hget(f"rq:job:{job_id}", "status") == b"failed"
    assert (first.json["event"], first.json["job_id"]) == ("job.failure", job_id)
    assert first.json["error"]["type"] == "AbandonedJobError"
    assert "supersedes" not in first.json

    stack.redis.set("orphan:go", "1")
    second = stack.receiver.wait_for(2, timeout=60)[1]
    orphan.wait(timeout=60)
    assert stack.redis.hget(f"rq:job:{job_id}", "status") == b"finished"
    verify(second.body, second.headers, SECRET)
    assert (second.json["event"], second.json["job_id"]) == ("job.success", job_id)
    assert second.json["supersedes"] == first.json["id"] != second.json["id"]
    assert second.json["result"] == "let go"

    status = wait_until(lambda: (s := stack.status(job_id))["delivery_status"] == "succeeded" and s)
    assert sorted(event["type"] for event in status["events"]) == ["job.failure", "job.success"]
    assert len(stack.receiver.received) == 2
