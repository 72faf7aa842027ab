"""Requests that may be sent again: an endpoint is made once per Idempotency-Key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.hosts import Host

URL = "https://receiver.example.com/in"


@pytest.fixture
def host(database_url: str, redis_url: str) -> Iterator[Host]:
    made = Host(database_url, redis_url)
    yield made
    made.close()


def create(host: Host, key: str | None, **values: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return host.app.test_client().post(
        "/webhooks/api/endpoints", json={"url": URL, **values}, headers=headers
    )


def test_the_same_key_makes_one_endpoint_and_shows_its_secret_once(host: Host) -> None:
    first, again = create(host, "order-1"), create(host, "order-1")
    other, without = create(host, "order-2"), create(host, None)

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.get_json()["secret"].startswith("whsec_")
    assert "secret" not in again.get_json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert {**again.get_json(), "secret": first.get_json()["secret"]} == first.get_json()
    assert len({answer.get_json()["id"] for answer in (first, other, without)}) == 3
    assert len(host.rows("endpoint")) == 3
    assert len(host.rows("secret")) == 3


def test_ten_requests_at_once_make_one(host: Host) -> None:
    barrier = threading.Barrier(10)
    statuses: list[int] = []

    def ask() -> None:
        barrier.wait()
        statuses.append(create(host, "at-once").status_code)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(statuses) == [200] * 9 + [201]
    assert len(host.rows("endpoint")) == len(host.rows("secret")) == 1


def test_a_key_used_for_another_url_is_a_conflict(host: Host) -> None:
    create(host, "order-1")
    answer = create(host, "order-1", url="https://elsewhere.example.com/")

    assert answer.status_code == 409
    assert answer.get_json()["error"]["code"] == "idempotency_key"
    assert [row["url"] for row in host.rows("endpoint")] == [URL]


@pytest.mark.parametrize("key", ["", "a b", "k" * 256, "\u00e9".encode().decode("latin-1"), "a\tb"], ids=repr)
def test_a_key_must_be_one(host: Host, key: str) -> None:
    answer = create(host, key)

    assert answer.status_code == 400
    assert set(answer.get_json()["error"]["details"]) == {"Idempotency-Key"}
    assert host.rows("endpoint") == []


def test_an_endpoint_made_with_a_key_is_one_like_any_other(host: Host) -> None:
    client = host.app.test_client()
    created = create(host, "order-1").get_json()
    path = f"/webhooks/api/endpoints/{created['id']}"

    assert client.get(path).get_json()["url"] == URL
    assert created["id"] in [item["id"] for item in client.get("/webhooks/api/endpoints").get_json()["items"]]
    assert client.patch(path, json={"description": "mine"}).status_code == 200
    assert client.delete(path).status_code == 204
    assert create(host, "order-1").status_code == 201  # deleted: made anew
