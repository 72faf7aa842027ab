"""The page at ``/``: what a visitor chooses, and what they see."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from example_app.receiver import Receiver
from flask_rq_webhooks.testing import InMemoryReceiver, ReceivedWebhook, deliver_all

from .conftest import TOKEN

SECRET = "what the receiver verifies with"


@pytest.fixture
def demo_receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """Serve the example receiver, and name it to the page as the demo does."""
    with Receiver(0, [SECRET]) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("EXAMPLE_RECEIVER_URL", server.url)
        monkeypatch.setenv("EXAMPLE_RECEIVER_SECRET", SECRET)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def deliver(app: Flask, demo_receiver: Receiver) -> Callable[[], list[ReceivedWebhook]]:
    """Give a function that delivers what is due to the receiver, without the network."""

    def answer(webhook: ReceivedWebhook) -> int | str:
        parts = urlsplit(webhook.url)
        path = f"{parts.path}?{parts.query}"
        return demo_receiver.receive(path, list(webhook.headers.items()), webhook.body) or "timeout"

    return lambda: deliver_all(app, InMemoryReceiver(answer))


def submit(client: FlaskClient, job: str, receiver: str) -> str:
    """Submit the form and return the path of the page it leads to."""
    answer = client.post("/", data={"job": job, "receiver": receiver})
    assert answer.status_code == 303, answer.text
    return str(answer.location)


def refreshes(page: TestResponse) -> bool:
    return '<noscript><meta http-equiv="refresh" content="1"></noscript>' in page.text


def headings(page: TestResponse) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page.text)


def test_the_form_offers_jobs_and_receivers(client: FlaskClient, demo_receiver: Receiver) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert re.findall(r'name="job" value="(\w+)"', page.text) == ["success", "failure", "killed"]
    assert re.findall(r'name="receiver" value="(\w+)"', page.text) == ["good", "flaky", "hangs"]


def test_a_webhook_is_watched_until_its_receiver_has_verified_it(
    client: FlaskClient,
    work: Callable[[], None],
    demo_receiver: Receiver,
    deliver: Callable[[], list[ReceivedWebhook]],
) -> None:
    path = submit(client, "success", "good")
    waiting = client.get(path)
    assert "The job has not ended yet." in waiting.text
    assert refreshes(waiting)
    work()
    deliver()
    ended = client.get(path)
    assert "The webhook was delivered." in ended.text
    assert headings(ended) == ["Attempt 1, answered 204"]
    assert "Signature verified" in ended.text
    assert "job.success" in ended.text
    assert not refreshes(ended)


def test_a_failure_is_delivered_at_the_third_attempt(
    client: FlaskClient,
    work: Callable[[], None],
    demo_receiver: Receiver,
    deliver: Callable[[], list[ReceivedWebhook]],
) -> None:
    path = submit(client, "failure", "flaky")
    work()
    deliver()
    ended = client.get(path)
    assert headings(ended) == [
        "Attempt 1, answered 503",
        "Attempt 2, answered 503",
        "Attempt 3, answered 204",
    ]
    assert "InputError" in ended.text


def test_a_receiver_that_hangs_is_given_up(
    client: FlaskClient,
    work: Callable[[], None],
    demo_receiver: Receiver,
    deliver: Callable[[], list[ReceivedWebhook]],
) -> None:
    path = submit(client, "success", "hangs")
    work()
    attempts = len(deliver())
    ended = client.get(path)
    assert "The webhook was given up" in ended.text
    assert set(re.sub(r"\d+", "N", heading) for heading in headings(ended)) == {"Attempt N, not answered"}
    assert len(headings(ended)) == attempts
    assert not refreshes(ended)


def test_only_the_browser_that_submitted_a_run_sees_it(
    app: Flask,
    client: FlaskClient,
    work: Callable[[], None],
    demo_receiver: Receiver,
    deliver: Callable[[], list[ReceivedWebhook]],
) -> None:
    path = submit(client, "success", "good")
    work()
    deliver()
    assert client.get(path).status_code == 200
    assert app.test_client().get(path).status_code == 404
    assert client.get("/webhooks/").status_code == 403


@pytest.mark.parametrize("form", [{}, {"job": "success"}, {"job": "success", "receiver": "http://10.0.0.1"}])
def test_what_the_form_does_not_offer_is_refused(
    client: FlaskClient, demo_receiver: Receiver, form: dict[str, str]
) -> None:
    answer = client.post("/", data=form)
    assert answer.status_code == 400
    assert "Choose a job and a receiver." in answer.text


def test_without_a_receiver_the_page_says_how_to_get_one(client: FlaskClient) -> None:
    assert "make demo" in client.get("/").text
    assert client.post("/", data={"job": "success", "receiver": "good"}).status_code == 404


def test_the_link_of_the_demo_signs_in(client: FlaskClient) -> None:
    assert "you are signed in" not in client.get("/").text
    assert client.get("/login?token=guessed").status_code == 403
    assert client.get(f"/login?token={TOKEN}").location == "/"
    assert "you are signed in" in client.get("/").text
    assert client.get("/webhooks/").status_code == 200
