"""What the two customers do: endpoints of their own, by API key and on pages, and nothing of each other's."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

from flask_rq_webhooks.testing import deliver_all

KEYS = {"acme": "the-key-of-acme", "umbra": "the-key-of-umbra"}
RUN = "/runs/blue-creek/plain/rq/api"


@pytest.fixture(autouse=True)
def customers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give both customers their API keys."""
    pairs = (f"{name}={key}" for name, key in KEYS.items())
    monkeypatch.setenv("EXAMPLE_CUSTOMERS", " ".join(pairs))


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def test_a_customer_subscribes_once_and_hears_of_its_own_jobs_only(
    app: Flask, client: FlaskClient, work: Callable[[], None]
) -> None:
    secrets, paths = {}, {}
    for name in KEYS:
        made = client.post(
            "/webhooks/api/endpoints", json={"url": f"https://{name}.example/hooks"}, headers=bearer(name)
        )
        assert made.status_code == 201
        secrets[name] = made.get_json()["secret"]
        paths[name] = f"/webhooks/portal/endpoints/{made.get_json()['id']}"

    answer = client.post(f"{RUN}/build_landuse", json={}, headers=bearer("acme"))

    assert answer.headers["Webhook-Registered"] == "true"
    assert "Webhook-Registered" not in client.post(f"{RUN}/build_landuse", json={}).headers
    work()
    (webhook,) = deliver_all(app)
    assert webhook.url == "https://acme.example/hooks"
    assert webhook.verify(secrets["acme"]).json["job_id"] == answer.get_json()["job_id"]
    for name, other in (("acme", "umbra"), ("umbra", "acme")):
        visitor = app.test_client()
        signed_in = visitor.post("/login", data={"token": KEYS[name]})
        assert signed_in.location == "/webhooks/portal/"
        shown = visitor.get(paths[name])
        assert re.search(rf"<header class=\"customer\">.*<span>{name}</span>", shown.text)  # the app's layout
        assert f"https://{name}.example/hooks" in shown.text
        assert visitor.get(paths[other]).status_code == 404
        assert visitor.get("/webhooks/").status_code == 403
    for path in paths.values():
        client.delete(
            path.replace("portal", "api"), headers=bearer("acme" if path == paths["acme"] else "umbra")
        )


def test_who_has_no_key_has_no_portal(client: FlaskClient) -> None:
    assert client.get("/webhooks/portal/").status_code == 403
    assert client.post("/login", data={"token": "guessed"}).status_code == 403
    assert client.get("/webhooks/portal/", headers={"Authorization": "Bearer "}).status_code == 403
