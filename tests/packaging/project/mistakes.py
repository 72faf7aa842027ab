"""The mistakes of a user that ``mypy --strict`` must find, each on a line that says so."""

from __future__ import annotations

from redis import Redis

from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.receiver import verify

webhooks = RQWebhooks(db="sqlite:///user.db")  # mistake: arg-type
queue = Queue("default", connection=Redis())


@webhooks.accepts_webhook(scope="tree")
def build(runid: str) -> str:
    return runid


# The decorator keeps what the view takes and returns.
build(7)  # mistake: arg-type
number: int = build("blue-creek")  # mistake: assignment

webhooks.accepts_webhook(scope=True)  # mistake: call-overload
webhooks.accept_webhook(build)  # mistake: attr-defined
webhooks.send("model.published", "done")  # mistake: arg-type
verify(b"{}", {}, 7)  # mistake: arg-type
webhooks.enqueue_with_webhook(queue, build, ("blue-creek",), timeout=[1])  # mistake: arg-type
