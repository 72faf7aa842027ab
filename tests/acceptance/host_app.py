"""A host app as plain as they come, configured by the environment: used in-process and by ``flask``."""

from __future__ import annotations

import json
import os
from typing import Any

import redis
import rq
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy

from flask_rq_webhooks import RQWebhooks
from tests.acceptance import tasks

db = SQLAlchemy()
webhooks = RQWebhooks(db=db, instrument_rq=True)


@webhooks.authorize
def may(permission: str, **what: Any) -> bool:
    return True


def create_app(config: dict[str, Any] | None = None) -> Flask:
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY="a key for tests only",
        SQLALCHEMY_DATABASE_URI=os.environ.get("TEST_DATABASE_URL", "sqlite://"),
        RQ_WEBHOOKS_REDIS_URL=os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:1/0"),
        RQ_WEBHOOKS_ALLOW_HTTP=True,
    )
    app.config.update(json.loads(os.environ.get("TEST_SETTINGS", "{}")))
    app.config.update(config or {})
    db.init_app(app)
    webhooks.init_app(app)

    def queue() -> rq.Queue:
        client = app.config.get("TEST_REDIS", redis.Redis)
        return rq.Queue("default", connection=client.from_url(app.config["RQ_WEBHOOKS_REDIS_URL"]))

    @app.post("/runs/<runid>/run")
    @webhooks.accepts_webhook
    def run(runid: str) -> Any:
        job = queue().enqueue_call(tasks.run_model, (runid,), timeout=600)
        return {"Success": True, "job_id": job.id}

    @app.post("/call/<name>")
    @webhooks.accepts_webhook
    def call(name: str) -> Any:
        options = request.get_json()
        for kind in ("on_success", "on_failure"):
            if kind in options:
                options[kind] = rq.Callback(options[kind])
        job = queue().enqueue_call(getattr(tasks, name), **options)
        return {"job_id": job.id, "fields": sorted(options)}

    @app.post("/trees/<runid>")
    @webhooks.accepts_webhook(scope="tree")
    def tree(runid: str) -> Any:
        """Enqueue jobs that end when they are let go: all at once, or below a root that has ended by then."""
        order = request.get_json()
        if order["below"]:
            root = queue().enqueue_call(tasks.plant, (runid, order["jobs"]), timeout=600)
            return {"roots": [root.id]}
        jobs = [queue().enqueue_call(tasks.wait_for, (runid,), timeout=600) for _ in range(order["jobs"])]
        return {"roots": [job.id for job in jobs]}

    return app
