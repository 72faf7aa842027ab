"""A second, smaller service: one route, the ``task`` payload format, its own header names.

Its clients send no secret. They ask for ``"sign_payload": true`` and verify with the secret that this service
shares with them (``ANALYSIS_SIGNING_SECRET``). A factory makes the app, and its
queues are the drop-in :class:`flask_rq_webhooks.Queue` instead of instrumented RQ queues.
"""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, request
from flask.typing import ResponseReturnValue

from flask_rq_webhooks import Queue, RQWebhooks

from . import jobs


def create_app() -> Flask:
    """Return a new analysis service, configured from the environment.

    ``ANALYSIS_DATABASE_URI`` says where its webhook tables are; create them with
    ``flask --app example_app.analysis rq-webhooks init-db``.
    """
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=os.environ.get("SECRET_KEY", "only for the example"),
        RQ_WEBHOOKS_DATABASE_URI=os.environ.get("ANALYSIS_DATABASE_URI", "sqlite:///analysis.db"),
        RQ_WEBHOOKS_ALLOW_HTTP=os.environ.get("ALLOW_HTTP", "0"),
        RQ_WEBHOOKS_SIGNING_SECRET=os.environ.get("ANALYSIS_SIGNING_SECRET"),
        RQ_WEBHOOKS_HEADER_PREFIX="X-Analysis",
        RQ_WEBHOOKS_FORMAT="task",
        MAX_CONTENT_LENGTH=4 * 2**20,
    )
    webhooks = RQWebhooks(app, redis=lambda: jobs.connect())

    @webhooks.authorize
    def may(permission: str, **what: Any) -> bool:
        """Let everybody who knows a job's id see its webhook's status; nobody may do more."""
        return permission == "status"

    @app.post("/api/v1/analyze/async")
    @webhooks.accepts_webhook
    def analyze() -> ResponseReturnValue:
        """Enqueue the analysis of ``{"flows": [numbers]}``."""
        payload = request.get_json(silent=True)
        flows = payload.get("flows") if isinstance(payload, dict) else None
        if not isinstance(flows, list) or not all(isinstance(flow, int | float) for flow in flows):
            return {"error": "flows must be a list of numbers"}, 422
        with jobs.connect() as connection:
            job = Queue("default", connection=connection).enqueue(jobs.analyze_rq, flows)
        return {"task_id": job.id, "status": "PENDING"}, 202

    return app
