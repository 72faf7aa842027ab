"""A host app on a SQLite file and a real Redis, built for one test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
import rq
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.state import get_state
from tests.acceptance import tasks

URL = "https://hooks.example.com/in"
SECRET = "a secret"
FIELDS = {"webhook_url": URL, "webhook_secret": SECRET}


class Host:
    """A host app on a SQLite file and a real Redis, with a queue of ours."""

    def __init__(self, database_url: str, redis_url: str, **config: Any) -> None:
        self.app = Flask("host")
        self.app.config.update(
            SECRET_KEY="tests",
            SQLALCHEMY_DATABASE_URI=database_url,
            RQ_WEBHOOKS_REDIS_URL=redis_url,
            **config,
        )
        self.db = SQLAlchemy(self.app)
        self.webhooks = RQWebhooks(db=self.db)
        self.webhooks.authorize(lambda permission, **what: True)
        self.webhooks.init_app(self.app)
        self.state = get_state(self.app)
        self.redis = redis.Redis.from_url(redis_url)
        self.queue = Queue("default", connection=self.redis)
        self.state.database.create_tables()

    def enqueue(self, **options: Any) -> str:
        return str(self.queue.enqueue(tasks.add, 1, 2, **options).id)

    def route(self, view: Callable[..., Any], rule: str = "/job", **options: Any) -> None:
        decorated = self.webhooks.accepts_webhook(**options)(view)
        self.app.add_url_rule(rule, view.__name__, decorated, methods=["GET", "POST"])

    def post(self, path: str = "/job", **options: Any) -> Any:
        return self.app.test_client().post(path, **(options or {"json": FIELDS}))

    def rows(self, table: str) -> list[dict[str, Any]]:
        with self.state.database.read() as connection:
            return [
                dict(row._mapping)
                for row in connection.execute(sa.text(f"SELECT * FROM rq_webhooks_{table}"))
            ]

    def watches(self) -> list[tuple[str, str]]:
        return [(row["job_id"], row["status"]) for row in self.rows("watch")]

    def job(self, job_id: str) -> rq.job.Job:
        return rq.job.Job.fetch(job_id, connection=self.redis)

    def close(self) -> None:
        self.redis.close()
        if "redis" in self.state._built:
            self.state.redis.close()
        self.state.database.dispose()
        with self.app.app_context():
            self.db.engine.dispose()
