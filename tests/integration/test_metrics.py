"""Metrics: the numbers that are in SQL and Redis, in Prometheus' words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from flask_rq_webhooks.storage.dispatchers import heartbeat, pause
from tests.integration.hosts import Host
from tests.integration.test_api import create, succeed

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.rst"


@pytest.fixture
def host(sqlite_url: str, redis_url: str) -> Iterator[Host]:
    made = Host(sqlite_url, redis_url)
    made.route(lambda: {"job_id": made.enqueue()}, "/job")
    yield made
    made.close()


def scrape(host: Host) -> dict[tuple[str, ...], float]:
    """Return the samples: name and label values → value."""
    response = host.app.test_client().get("/webhooks/metrics")
    assert response.status_code == 200, response.text
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name.removeprefix("rq_webhooks_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_an_idle_host(host: Host) -> None:
    numbers = scrape(host)

    assert {value for name, value in numbers.items() if name[0] not in ("info", "redis_up")} == {0.0}
    assert numbers["redis_up",] == 1
    assert all(name[0] != "attempt_duration_seconds" for name in numbers)  # nobody knows


def test_what_is_in_sql_and_redis_is_counted(host: Host) -> None:
    create(host)
    succeed(host, "a", "b", "c")
    disabled = create(host)
    host.post(f"/webhooks/api/endpoints/{disabled['id']}/disable", json={})
    assert host.post().headers["Webhook-Registered"] == "true"
    heartbeat(host.state.database, "dsp_1", started=True)
    heartbeat(host.state.database, "dsp_2", started=True)
    pause(host.state.database)
    first, second, _third = [row["id"] for row in host.rows("delivery")]
    with host.state.database.write() as connection:
        for delivery_id, status, duration_ms in ((first, "succeeded", 100.0), (second, "exhausted", 300.0)):
            connection.execute(
                sa.text(
                    "UPDATE rq_webhooks_delivery SET status = :status, next_attempt_at = NULL, "
                    "finished_at = strftime('%Y-%m-%d %H:%M:%f000', 'now') WHERE id = :id"
                ),
                {"status": status, "id": delivery_id},
            )
            connection.execute(
                sa.text(
                    "INSERT INTO rq_webhooks_attempt (id, delivery_id, number, trigger, status, started_at, "
                    "duration_ms) VALUES (:id, :delivery, 1, 'scheduled', 'failed', "
                    "strftime('%Y-%m-%d %H:%M:%f000', 'now'), :ms)"
                ),
                {"id": f"att_{delivery_id}", "delivery": delivery_id, "ms": duration_ms},
            )
    host.redis.xadd(host.state.outbox.key, {"entry": "{}"})
    host.redis.xadd(host.state.outbox.rejected_key, {"entry": "x"})
    host.redis.xadd(host.state.outbox.rejected_key, {"entry": "y"})

    numbers = scrape(host)

    assert numbers["deliveries", "pending"] == 1
    assert numbers["deliveries", "succeeded"] == 1
    assert numbers["deliveries", "exhausted"] == 1
    assert numbers["deliveries_finished_last_hour", "succeeded"] == 1
    assert numbers["deliveries_finished_last_hour", "exhausted"] == 1
    assert 0 < numbers["oldest_due_seconds",] < 60
    assert numbers["attempt_duration_seconds", "0.95"] == 0.3
    assert numbers["watches", "open"] == 1
    assert 0 < numbers["oldest_watch_seconds",] < 60
    assert numbers["endpoints_disabled",] == 1
    assert numbers["dispatchers",] == 2
    assert numbers["paused",] == 1
    assert numbers["outbox_entries",] == 1
    assert numbers["outbox_rejected_entries",] == 2


def test_every_process_reports_the_same(host: Host, sqlite_url: str, redis_url: str) -> None:
    create(host)
    succeed(host, "a", "b")
    other = Host(sqlite_url, redis_url)
    try:
        mine, theirs = scrape(host), scrape(other)
    finally:
        other.close()

    moving = {("oldest_due_seconds",), ("oldest_watch_seconds",)}
    assert {k: v for k, v in mine.items() if k not in moving} == {
        k: v for k, v in theirs.items() if k not in moving
    }


def test_redis_down_leaves_its_numbers_out(sqlite_url: str) -> None:
    host = Host(sqlite_url, "redis://127.0.0.1:1/0")
    try:
        numbers = scrape(host)
    finally:
        host.close()

    assert numbers["redis_up",] == 0
    assert ("outbox_entries",) not in numbers
    assert numbers["dispatchers",] == 0


def test_without_the_package_the_answer_says_what_to_install(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    response = host.app.test_client().get("/webhooks/metrics")

    assert response.status_code == 501
    assert "pip install 'flask-rq-webhooks[metrics]'" in response.get_json()["error"]["message"]


def test_without_apispec_the_description_says_what_to_install(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "apispec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "apispec", None)

    response = host.app.test_client().get("/webhooks/openapi.json")

    assert response.status_code == 501
    assert "pip install 'flask-rq-webhooks[openapi]'" in response.get_json()["error"]["message"]


def test_metrics_need_the_permission_read(host: Host) -> None:
    host.webhooks.authorize(lambda permission, **what: permission == "status")

    assert host.app.test_client().get("/webhooks/metrics").status_code == 403


def test_every_metric_is_documented_and_no_other(host: Host) -> None:
    create(host)
    succeed(host, "a")
    (delivery,) = host.rows("delivery")
    with host.state.database.write() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO rq_webhooks_attempt (id, delivery_id, number, trigger, status, started_at, "
                "duration_ms) "
                "VALUES ('att_1', :id, 1, 'scheduled', 'failed', '2024-01-01 00:00:00.000000', 1)"
            ),
            {"id": delivery["id"]},
        )
    reported = {f"rq_webhooks_{name[0]}" for name in scrape(host)}
    documented = {
        line.split("``")[1].partition("{")[0]
        for line in DOCS.read_text().splitlines()
        if line.strip().startswith("* - ``rq_webhooks_")
    }

    assert documented == reported


def test_no_label_is_chosen_by_a_client(host: Host) -> None:
    host.post(json={"webhook_url": "https://chosen-by-a-client.example.com/", "webhook_reference": "chosen"})
    create(host)
    succeed(host, "chosen", runid="chosen")

    text: Any = host.app.test_client().get("/webhooks/metrics").text
    assert "chosen" not in text
