"""Trace one delivery from the request to the receiver, in one process: ``python -m tests.trace_pipeline``.

Prints every module of the package that the delivery passes through, how many functions of it were called, and
how often control moved from one module to another. What runs at start, before the request, does not count.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import fakeredis
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import flask_rq_webhooks
from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.state import get_state
from tests.acceptance import tasks
from tests.servers import Receiver

PACKAGE = Path(flask_rq_webhooks.__file__).parent


@dataclass
class Trace:
    """What one delivery passed through."""

    #: Module names with the functions that were called.
    functions: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    #: How often control moved from one module to another, per thread.
    moves: int = 0
    _last: dict[int, str] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """Return the modules in the order in which they were entered."""
        return list(self.functions)

    def note(self, frame: Any, event: str, _argument: object) -> None:
        """Take one event of :func:`sys.setprofile`."""
        if event != "call":
            return
        code: CodeType = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name == "<module>":
            return
        path = Path(code.co_filename).relative_to(PACKAGE)
        module = ".".join(path.with_suffix("").parts)
        self.functions[module].add(code.co_qualname)
        thread = threading.get_ident()
        if self._last.get(thread) not in (None, module):
            self.moves += 1
        self._last[thread] = module


def trace_one_delivery(database_url: str = "sqlite://") -> Trace:
    """Deliver the webhook of one request to a receiver on loopback, and return what it passed through."""
    with fakeredis.FakeRedis(server=fakeredis.FakeServer()) as redis, Receiver() as receiver:
        app = Flask("host")
        app.config.update(
            SECRET_KEY="tests", SQLALCHEMY_DATABASE_URI=database_url, RQ_WEBHOOKS_ALLOW_HTTP=True
        )
        db = SQLAlchemy(app)
        webhooks = RQWebhooks(app, db=db, redis=redis)
        queue = Queue("default", connection=redis, is_async=False)

        @app.post("/add")
        @webhooks.accepts_webhook
        def start() -> Any:
            return {"job_id": queue.enqueue(tasks.add, 2, 3).id}

        state = get_state(app)
        state.database.create_tables()
        trace = Trace()

        def deliver(path: str, dispatcher: Dispatcher) -> None:
            fields = {"webhook_url": receiver.url + path, "webhook_secret": "s3cret"}
            response = app.test_client().post("/add", json=fields)
            assert response.headers["Webhook-Registered"] == "true"
            dispatcher.run(burst=True)

        deliver("first", Dispatcher(state))  # connects, compiles statements, reads settings
        dispatcher = Dispatcher(state)
        threading.setprofile(trace.note)
        sys.setprofile(trace.note)
        try:
            deliver("second", dispatcher)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            state.database.dispose()
            with app.app_context():
                db.engine.dispose()
        assert len(receiver.received) == 2
    return trace


def main() -> None:
    trace = trace_one_delivery()
    for module, functions in trace.functions.items():
        print(f"{module:40} {len(functions):3} functions")
    functions = sum(map(len, trace.functions.values()))
    print(f"{len(trace.modules)} modules, {functions} functions, {trace.moves} moves")


if __name__ == "__main__":
    main()
