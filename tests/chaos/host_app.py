"""The host app of the kill suite: dies at a named step where it is told to.

``TEST_DIE_AT`` names the step and ``TEST_DIE_ONCE`` a file that is made just before, so that the process
started again afterwards lives.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import redis
import rq
from flask import Flask, request

from flask_rq_webhooks import _steps
from tests.acceptance import host_app
from tests.acceptance.host_app import webhooks
from tests.chaos import tasks


def _die_once(step: str) -> None:
    mark = Path(os.environ["TEST_DIE_ONCE"])
    if step == os.environ["TEST_DIE_AT"] and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def create_app() -> Flask:
    app = host_app.create_app()
    queue_connection = redis.Redis.from_url(app.config["RQ_WEBHOOKS_REDIS_URL"], socket_timeout=5)

    @app.post("/jobs/<name>")
    @webhooks.accepts_webhook
    def submit(name: str) -> Any:
        body = request.get_json()
        options: dict[str, Any] = {}
        if body.get("retries"):
            options["retry"] = rq.Retry(max=body["retries"])
        job = rq.Queue(connection=queue_connection).enqueue_call(
            getattr(tasks, name), (body["number"],), result_ttl=86400, **options
        )
        return {"job_id": job.id}

    if os.environ.get("TEST_DIE_AT"):
        _steps.install(_die_once)
    return app
