"""What operators of the service see and do: commands, pages, and who is allowed in."""

from __future__ import annotations

from collections.abc import Callable

from flask import Flask
from flask.testing import FlaskClient

from flask_rq_webhooks.testing import InMemoryReceiver, deliver_all

from .conftest import TOKEN

RUN = "/runs/blue-creek/plain/rq/api"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def test_nobody_is_let_in_without_the_token(client: FlaskClient) -> None:
    for path in ("/webhooks/", "/webhooks/deliveries", "/webhooks/api/stats", "/webhooks/metrics"):
        assert client.get(path).status_code == 403
        assert client.get(path, headers={"Authorization": "Bearer guessed"}).status_code == 403
        assert client.get(path, headers=AUTHORIZED).status_code == 200


def test_an_operator_signs_in(client: FlaskClient) -> None:
    assert client.post("/login", data={"token": "guessed"}).status_code == 403
    assert client.post("/login", data={"token": TOKEN}).location == "/webhooks/"
    assert client.get("/webhooks/").status_code == 200


def test_what_a_client_refused_is_recovered_with_a_command(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    client.post(f"{RUN}/build_soils", json={"webhook_url": "https://wrong.example/hooks"})
    work()
    assert len(deliver_all(app, InMemoryReceiver(410))) == 1
    runner = app.test_cli_runner()
    recovered = runner.invoke(args=["rq-webhooks", "recover", "--host", "wrong.example"])
    assert recovered.output == "1 deliveries are due now.\n"
    assert len(deliver_all(app)) == 1


def test_the_job_page_shows_what_became_of_the_webhook(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    fields = {"webhook_url": "https://client.example/hooks"}
    job_id = client.post(f"{RUN}/build_soils", json=fields).get_json()["job_id"]
    work()
    deliver_all(app)
    page = f"/runs/blue-creek/plain/jobs/{job_id}"
    assert "rq-webhooks" not in client.get(page).text
    shown = client.get(page, headers=AUTHORIZED).text
    assert "https://client.example/hooks" in shown
    assert "Delivered" in shown
