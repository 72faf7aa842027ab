"""A host that OpenTelemetry's SDK instruments: one request, its job, and all attempts; prints the spans.

A program of its own: a process has one tracer provider, for good.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import redis
from flask import Flask, request
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.state import get_state
from tests.acceptance import tasks
from tests.pipeline import InProcessWorker

tracer = trace.get_tracer("host")


class TracedWorker(InProcessWorker):
    """A worker as instrumentations make it: a span around the job and its callbacks."""

    def perform_job(self, job: Any, *others: Any) -> bool:
        with tracer.start_as_current_span("job", context=propagate.extract(job.meta)):
            return bool(super().perform_job(job, *others))


def main(database_url: str, redis_url: str, receiver_url: str, traceparent: str) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    app = Flask("host")
    app.config.update(
        SECRET_KEY="tests", RQ_WEBHOOKS_DATABASE_URI=database_url, RQ_WEBHOOKS_REDIS_URL=redis_url,
        RQ_WEBHOOKS_ALLOW_HTTP=True, RQ_WEBHOOKS_RETRY_SCHEDULE=[0.1],
    )  # fmt: skip
    webhooks = RQWebhooks(app)
    state = get_state(app)
    state.database.create_tables()
    queue = Queue("default", connection=redis.Redis.from_url(redis_url))

    @app.post("/job")
    @webhooks.accepts_webhook
    def job() -> Any:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return {"job_id": queue.enqueue(tasks.add, 1, 2, meta=carrier).id}

    @app.before_request
    def begin() -> None:
        context = propagate.extract(dict(request.headers.items(lower=True)))
        request.environ["span"] = tracer.start_as_current_span("request", context=context)
        request.environ["span"].__enter__()

    @app.teardown_request
    def finish(_error: BaseException | None) -> None:
        request.environ["span"].__exit__(None, None, None)

    response = app.test_client().post(
        "/job", json={"webhook_url": receiver_url}, headers={"traceparent": traceparent}
    )
    assert response.headers["Webhook-Registered"] == "true"
    TracedWorker([queue], connection=queue.connection).work(burst=True, logging_level="ERROR")
    until = time.monotonic() + 20
    while exporter.get_finished_spans()[-1].attributes.get("rq_webhooks.attempt") != 2:
        assert time.monotonic() < until, "no second attempt"
        Dispatcher(state).run(burst=True)
    print(json.dumps([_shown(span) for span in exporter.get_finished_spans()]))


def _shown(span: Any) -> dict[str, Any]:
    return {
        "name": span.name,
        "trace": f"{span.context.trace_id:032x}",
        "id": f"{span.context.span_id:016x}",
        "parent": f"{span.parent.span_id:016x}",
        "kind": span.kind.name,
        "attributes": dict(span.attributes),
        "is_error": span.status.status_code is trace.StatusCode.ERROR,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
