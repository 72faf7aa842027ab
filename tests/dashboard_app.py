"""A host with its dashboard, for the tests of pages: who may do what is said by the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from flask import Flask
from sqlalchemy import insert, select

from flask_rq_webhooks import RQWebhooks
from flask_rq_webhooks.observe.publisher import safe_render
from flask_rq_webhooks.protocol.events import JOB_FAILURE, Occurrence, format_time
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage.attempts import record_attempts
from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.storage.models import Delivery, Watch, new_id
from tests import storage_rows

#: What a stranger would put wherever it may be shown: breaks out of text, attributes, scripts, URLs, CSS.
HOSTILE = (
    """'"></title></pre></script><script>window.hacked=1</script>"""
    """<img src=x onerror=hacked=1>{{1234*5678}}\u202e"""
)


@contextmanager
def open_host(
    database_url: str, redis_url: str, allowed: set[str], *, app: Flask | None = None, **config: Any
) -> Iterator[tuple[Flask, State]]:
    """Give an app and its state on empty tables.

    :param allowed: the permissions the caller has; the test may change the set.
    :param app: the app to initialise; a new one by default.
    """
    app = app or Flask("host", template_folder=config.pop("template_folder", None))
    app.config.update(
        {
            "SECRET_KEY": "a key for tests only",
            "RQ_WEBHOOKS_DATABASE_URI": database_url,
            "RQ_WEBHOOKS_REDIS_URL": redis_url,
            "RQ_WEBHOOKS_ALLOW_HTTP": True,
            **config,
        }
    )
    webhooks = RQWebhooks(app)
    webhooks.authorize(lambda permission, **what: permission in allowed)
    state = get_state(app)
    state.database.create_tables()
    try:
        yield app, state
    finally:
        state.database.dispose()
        state.redis.close()


def add_endpoint(state: State, url: str = "https://hooks.example.com/in", **values: Any) -> str:
    """Store an endpoint as the app would, standing unless *values* say otherwise; return its id."""
    checked = state.url_policy.check_url(url)
    endpoint = NewEndpoint(**{"url": checked.url, "host": checked.host_key, "kind": "standing", **values})
    return register(state.database, state.cipher, endpoint, namespace=state.namespace, reserved_job_id=None)


def add_delivery(state: State, endpoint_id: str, *, job_id: str = "job-1", **values: Any) -> str:
    """Store an event of a job and return the id of its delivery to *endpoint_id*."""
    now = datetime.now(UTC)
    occurrence = Occurrence(
        **{
            "type": JOB_FAILURE,
            "occurred_at": now,
            "source": "callback",
            "job_id": job_id,
            "run": format_time(now),
            "enqueued_at": now,
            "error": {"type": "ValueError", "message": "no", "traceback": "no"},
            **values,
        }
    )
    (event,) = ingest(
        state.database,
        [IngestItem(occurrence, (endpoint_id,))],
        render=safe_render(state),
        max_attempts=state.settings.max_attempts,
    )
    with state.database.read() as connection:
        return str(
            connection.execute(
                select(Delivery.id).where(
                    Delivery.event_id == event.event_id, Delivery.endpoint_id == endpoint_id
                )
            ).scalar_one()
        )


def add_deliveries(state: State, endpoint_id: str, count: int) -> None:
    """Store the failures of many jobs, each with a delivery to *endpoint_id*, in one transaction."""
    now = datetime.now(UTC)
    items = [
        IngestItem(
            Occurrence(
                type=JOB_FAILURE, occurred_at=now, source="callback", job_id=f"many-{number}",
                run=format_time(now), enqueued_at=now,
            ),
            (endpoint_id,),
        )
        for number in range(count)
    ]  # fmt: skip
    ingest(state.database, items, render=safe_render(state), max_attempts=state.settings.max_attempts)


def attempt_all(state: State, decision: Any, **values: Any) -> int:
    """Record one attempt of whatever is due; return of how many."""
    claimed = storage_rows.claim(state.database)
    if claimed:
        record_attempts(
            state.database,
            [storage_rows.attempt(delivery, decision, **values) for delivery in claimed],
            dispatcher_id="dsp_test",
            disable_after=state.settings.disable_after,
        )
    return len(claimed)


def add_watch(state: State, endpoint_id: str, job_id: str, **values: Any) -> None:
    """Note that a job is promised to be reported."""
    with state.database.write() as connection:
        connection.execute(
            insert(Watch).values(
                **{
                    "id": new_id("wat"),
                    "endpoint_id": endpoint_id,
                    "job_id": job_id,
                    "status": "open",
                    "missing_passes": 0,
                    "created_at": datetime.now(UTC),
                    **values,
                }
            )
        )


def add_hostile(state: State) -> dict[str, str]:
    """Fill every place that strangers write to; return the ids by kind."""
    endpoint_id = add_endpoint(
        state,
        "https://hooks.example.com/'%22%3E<script>alert(1)</script>/in?k=<b>",
        headers={"X-Evil": "<script>alert(1)</script>"},
        description=HOSTILE,
        reference=HOSTILE[:256],
        runid=HOSTILE,
        secret="a secret that is never shown",
    )
    delivery_id = add_delivery(
        state,
        endpoint_id,
        job_id=HOSTILE,
        runid=HOSTILE,
        func=HOSTILE,
        queue=HOSTILE,
        error={"type": HOSTILE, "message": HOSTILE, "traceback": HOSTILE},
    )
    attempt_all(
        state,
        storage_rows.retry_in(3600),
        error_detail=HOSTILE,
        response_headers={"server": HOSTILE, HOSTILE: "x"},
        response_body=HOSTILE.encode() + b"\x00\xff",
        request_headers={"X-Evil": HOSTILE, "Content-Type": "application/json"},
    )
    add_watch(state, endpoint_id, HOSTILE)
    with state.database.read() as connection:
        event_id = connection.execute(
            select(Delivery.event_id).where(Delivery.id == delivery_id)
        ).scalar_one()
    return {"endpoint_id": endpoint_id, "delivery_id": delivery_id, "event_id": event_id}
