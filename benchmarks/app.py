"""The host app under measurement, configured by the environment: everything on that a host may turn on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import redis
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import flask_rq_webhooks
from flask_rq_webhooks import RQWebhooks

from . import tasks


def create_app(environment: Mapping[str, str] = os.environ) -> Flask:
    """Return the app with one route three times: undecorated, decorated, and as a client uses it."""
    if environment.get("BENCH_STEPS"):
        from .latency import note_steps

        note_steps(environment["BENCH_STEPS"])
    app = Flask("benchmarks.app")
    db = SQLAlchemy()
    webhooks = RQWebhooks(db=db)
    settings = json.loads(environment.get("BENCH_SETTINGS", "{}"))
    app.config.update(
        SECRET_KEY="a key for benchmarks",
        SQLALCHEMY_DATABASE_URI=environment["BENCH_DATABASE_URL"],
        RQ_WEBHOOKS_REDIS_URL=environment["BENCH_REDIS_URL"],
        RQ_WEBHOOKS_ALLOW_HTTP=True,
        RQ_WEBHOOKS_RATE_LIMIT_PER_MINUTE=10_000_000,
        **{f"RQ_WEBHOOKS_{name.upper()}": value for name, value in settings.items()},
    )
    db.init_app(app)
    webhooks.init_app(app)
    connection = redis.Redis.from_url(app.config["RQ_WEBHOOKS_REDIS_URL"])
    queue = flask_rq_webhooks.Queue("routes", connection=connection)

    def enqueue() -> Any:
        job = queue.enqueue_call(tasks.nothing, (), timeout=600, result_ttl=60)
        return {"Success": True, "job_id": job.id}

    app.add_url_rule("/plain", "plain", enqueue, methods=["POST"])
    app.add_url_rule("/decorated", "decorated", webhooks.accepts_webhook(enqueue), methods=["POST"])
    return app
