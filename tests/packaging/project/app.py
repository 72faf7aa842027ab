"""A small app of a user, with types: runs on the installed wheel, and ``mypy --strict`` finds nothing."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from redis import Redis

from flask_rq_webhooks import InvalidWebhookError, Queue, RQWebhooks, __version__
from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.signals import delivery_exhausted

db = SQLAlchemy()
webhooks = RQWebhooks(db=db)


@webhooks.authorize
def may(permission: str, **what: Any) -> bool:
    return permission in {"status", "read"}


@webhooks.scrub
def scrub(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


@webhooks.payload_format("short")
def short(payload: dict[str, Any]) -> dict[str, Any]:
    return {"job": payload["job_id"]}


def create_app() -> Flask:
    """Return the app; ``REDIS_URL`` says where RQ's jobs are."""
    app = Flask("user_app")
    app.config["SECRET_KEY"] = "a key for tests only"
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///user.db"
    app.config["RQ_WEBHOOKS_REDIS_URL"] = os.environ["REDIS_URL"]
    redis = Redis.from_url(os.environ["REDIS_URL"])
    db.init_app(app)
    webhooks.init_app(app)

    @app.post("/build")
    @webhooks.accepts_webhook(events=["job.success", "job.failure"], scope="tree")
    def build() -> dict[str, str]:
        job = Queue("default", connection=redis).enqueue(sum, [1, 2])
        return {"job_id": job.id}

    @app.post("/publish")
    @webhooks.accepts_webhook
    def publish() -> dict[str, str]:
        try:
            job = webhooks.enqueue_with_webhook(
                Queue("default", connection=redis), sum, ([1, 2],), timeout="1h"
            )
        except InvalidWebhookError as exc:
            return {"error": str(exc)}
        return {"job_id": job.id, "event": webhooks.send("model.published", {"version": __version__})}

    return app


def receive(body: bytes, headers: dict[str, str]) -> None:
    verify(body, headers, ["a long random secret"])


def log_exhausted(app: Flask, **what: Any) -> None:
    app.logger.error("given up: %s", what)


delivery_exhausted.connect(log_exhausted)
