"""The host app of storms and kills: enqueues what it is asked for; dies at a named step if configured.

Who calls is the tenant that the header ``X-Tenant`` names.

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
from sqlalchemy import text

from flask_rq_webhooks import _steps
from tests.acceptance import host_app
from tests.acceptance.host_app import db, webhooks


def _die_once(step: str) -> None:
    mark = Path(os.environ["TEST_DIE_ONCE"])
    if step == os.environ["TEST_DIE_AT"] and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def create_app() -> Flask:
    app = host_app.create_app()
    webhooks.tenant(lambda: request.headers.get("X-Tenant"))
    webhooks.authorize(lambda permission, **what: permission == "own" or "X-Tenant" not in request.headers)
    connection = redis.Redis.from_url(app.config["RQ_WEBHOOKS_REDIS_URL"], socket_timeout=5)

    def submit() -> Any:
        """Enqueue ``times`` jobs; with ``hold``, leave a transaction of the host's own open."""
        body = request.get_json()
        if body.get("hold"):
            # Rolled back when the app context ends, which is after the webhook was confirmed.
            db.session.execute(text("CREATE TABLE IF NOT EXISTS held (id INTEGER)"))
            db.session.execute(text("INSERT INTO held VALUES (1)"))
        options = dict(body.get("options", {}))
        if "retry" in options:
            options["retry"] = rq.Retry(max=options["retry"])
        queue = rq.Queue(body.get("queue", "default"), connection=connection)
        arguments = (body["number"], *body.get("arguments", []))
        jobs = [
            queue.enqueue_call(f"tests.chaos.tasks.{body['function']}", arguments, **options)
            for _ in range(body.get("times", 1))
        ]
        return {"jobs": [job.id for job in jobs]}

    app.add_url_rule("/jobs", "jobs", webhooks.accepts_webhook(submit), methods=["POST"])
    app.add_url_rule("/trees", "trees", webhooks.accepts_webhook(scope="tree")(submit), methods=["POST"])
    if os.environ.get("TEST_DIE_AT"):
        _steps.install(_die_once)
    return app
