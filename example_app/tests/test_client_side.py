"""A client of the service: the receiving route of its own Flask app, tested with real deliveries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, g
from flask.testing import FlaskClient

from flask_rq_webhooks.receiver import verified_webhook
from flask_rq_webhooks.testing import InMemoryReceiver, ReceivedWebhook, deliver_all

RUN = "/runs/blue-creek/plain/rq/api"
SECRET = "what the client chose"


def make_receiving_app(secrets: list[str], handled: dict[str, Any]) -> Flask:
    """Return an app that takes each webhook once, whoever sends it again."""
    app = Flask("client")

    @app.post("/hooks")
    @verified_webhook(secrets)
    def hook() -> Any:
        handled.setdefault(g.webhook.id, g.webhook.json)
        return "", 204

    return app


def posted_to(app: Flask) -> Callable[[ReceivedWebhook], int]:
    """Return a function that hands what is sent to *app*, and answers as it does."""

    def post(webhook: ReceivedWebhook) -> int:
        response = app.test_client().post("/hooks", data=webhook.body, headers=dict(webhook.headers))
        return response.status_code

    return post


def test_what_the_service_sends_is_accepted_and_taken_once(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    handled: dict[str, Any] = {}
    receiving = posted_to(make_receiving_app([SECRET], handled))
    client.post(
        f"{RUN}/build_landuse",
        json={"webhook_url": "https://client.example/hooks", "webhook_secret": SECRET},
    )
    work()
    # The client takes it, and its answer is lost on the way: so it is sent again.
    lost_once = InMemoryReceiver(lambda webhook: "reset" if receiving(webhook) == 204 else 500, receiving)
    assert len(deliver_all(app, lost_once)) == 2
    (payload,) = handled.values()
    assert payload["event"] == "job.success"


@pytest.mark.parametrize(
    ("secrets", "expected"),
    [
        pytest.param(["another secret"], [401] * 5, id="wrong"),
        pytest.param(["the next secret", SECRET], [204], id="being-rotated"),
    ],
)
def test_only_who_shares_the_secret_is_accepted(
    app: Flask, client: FlaskClient, work: Callable[[], None], secrets: list[str], expected: list[int]
) -> None:
    handled: dict[str, Any] = {}
    answers: list[int] = []
    receiving = posted_to(make_receiving_app(secrets, handled))

    def answer(webhook: ReceivedWebhook) -> int:
        answers.append(receiving(webhook))
        return answers[-1]

    client.post(
        f"{RUN}/build_landuse",
        json={"webhook_url": "https://client.example/hooks", "webhook_secret": SECRET},
    )
    work()
    deliver_all(app, InMemoryReceiver(answer))
    assert answers == expected  # 401 is tried again for five minutes: the client may be rotating its keys
    assert len(handled) == expected.count(204)


def test_a_body_that_was_changed_on_the_way_is_refused(
    app: Flask, client: FlaskClient, work: Callable[[], None], receiver: InMemoryReceiver
) -> None:
    client.post(
        f"{RUN}/build_landuse",
        json={"webhook_url": "https://client.example/hooks", "webhook_secret": SECRET},
    )
    work()
    (webhook,) = deliver_all(app, receiver)
    changed = ReceivedWebhook(webhook.url, webhook.headers, webhook.body.replace(b"success", b"failure"))
    assert posted_to(make_receiving_app([SECRET], {}))(changed) == 401
    assert posted_to(make_receiving_app([SECRET], {}))(webhook) == 204
