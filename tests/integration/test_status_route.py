"""The status route: who may ask, what it tells, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from flask_rq_webhooks.observe.publisher import safe_render
from flask_rq_webhooks.protocol.events import JOB_FAILURE, Occurrence, format_time
from flask_rq_webhooks.storage.events import IngestItem, ingest
from tests.integration.hosts import Host
from tests.storage_rows import statements_of

TOKEN_URL = "https://hooks.example.com/services/T0000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX?key=hidden"


@pytest.fixture
def host(sqlite_url: str, redis_url: str) -> Iterator[Host]:
    made = Host(sqlite_url, redis_url)

    def build(runid: str) -> Any:
        return {"job_id": made.enqueue()}

    made.route(build, "/runs/<runid>/job")
    yield made
    made.close()


def submit(host: Host, runid: str = "r1") -> str:
    response = host.post(f"/runs/{runid}/job", json={"webhook_url": TOKEN_URL, "webhook_secret": "s"})
    assert response.headers["Webhook-Registered"] == "true"
    return str(response.get_json()["job_id"])


def fail(host: Host, job_id: str) -> str:
    """Store the failure of a job and its delivery; return the delivery's id."""
    record_failure(host, job_id)
    (delivery,) = host.rows("delivery")
    return str(delivery["id"])


def record_failure(host: Host, job_id: str) -> None:
    """Store the failure of a job of the run r1, and its deliveries."""
    now = datetime.now(UTC)
    ingest(
        host.state.database,
        [
            IngestItem(
                Occurrence(
                    type=JOB_FAILURE, occurred_at=now, source="callback", job_id=job_id, run=format_time(now),
                    runid="r1", enqueued_at=now, started_at=now, ended_at=now,
                    error={"type": "ValueError", "message": "dry", "traceback": "Traceback …"},
                )
            )
        ],
        render=safe_render(host.state),
        max_attempts=3,
    )  # fmt: skip


def attempt(host: Host, delivery_id: str, **values: Any) -> None:
    with host.state.database.write() as connection:
        row = {
            "id": "att_1", "delivery_id": delivery_id, "number": 1, "trigger": "scheduled",
            "status": "failed", "status_code": None, "error_code": "blocked",
            "error_detail": "10.1.2.3 is private",
            "started_at": "2024-01-01 00:00:00.000000", "duration_ms": 12.5,
            "request_headers": '{"webhook-id": "evt"}', "response_headers": '{"Server": "internal"}',
            "response_body": b"<b>internal</b>",
        } | values  # fmt: skip
        columns, named = ", ".join(row), ", ".join(f":{name}" for name in row)
        connection.execute(sa.text(f"INSERT INTO rq_webhooks_attempt ({columns}) VALUES ({named})"), row)


def set_delivery(host: Host, **values: Any) -> None:
    with host.state.database.write() as connection:
        changes = ", ".join(f"{name} = :{name}" for name in values)
        connection.execute(sa.text(f"UPDATE rq_webhooks_delivery SET {changes}"), values)


@pytest.mark.parametrize("path", ["/webhooks/jobs/{}", "/webhooks/job/{}/webhook"])
def test_waiting(host: Host, path: str) -> None:
    job_id = submit(host)

    response = host.app.test_client().get(path.format(job_id))

    assert response.status_code == 200
    status = response.get_json()
    assert status == {
        "job_id": job_id,
        "webhook_configured": True,
        "url": status["url"],
        "delivery_status": "waiting",
        "job_status": "queued",
        "events": [],
        "deliveries": [],
    }
    assert status["url"].startswith("https://hooks.example.com/")
    assert "XXXXXXXX" not in status["url"]
    assert "hidden" not in status["url"]
    assert int(response.headers["Retry-After"]) > 0
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_events_deliveries_and_attempts_without_what_is_not_the_clients(host: Host) -> None:
    job_id = submit(host)
    delivery_id = fail(host, job_id)
    attempt(host, delivery_id)

    response = host.app.test_client().get(f"/webhooks/jobs/{job_id}")

    status = response.get_json()
    assert status["delivery_status"] == "pending"
    (event,) = status["events"]
    assert (event["type"], event["runid"], event["source"]) == ("job.failure", "r1", "callback")
    (delivery,) = status["deliveries"]
    assert (delivery["id"], delivery["event_id"], delivery["event"]) == (
        delivery_id,
        event["id"],
        "job.failure",
    )
    (tried,) = delivery["attempts"]
    assert tried == {
        "number": 1,
        "status": "failed",
        "status_code": None,
        "error_code": "unreachable",
        "started_at": "2024-01-01T00:00:00+00:00",
        "duration_ms": 12.5,
    }
    for hidden in ("internal", "10.1.2.3", "hidden", "XXXXXXXX", "Traceback"):
        assert hidden not in response.text


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"status": "pending"}, (1, 1)),
        ({"status": "pending", "next_attempt_at": datetime.now() + timedelta(days=2)}, (300, 300)),
        ({"status": "sending"}, (1, 5)),
        ({"status": "succeeded"}, None),
        ({"status": "exhausted"}, None),
        ({"status": "canceled"}, None),
    ],
    ids=["due", "far", "sending", "succeeded", "exhausted", "canceled"],
)
def test_retry_after_while_the_answer_may_change(
    host: Host, changes: dict[str, Any], seconds: tuple[int, int] | None
) -> None:
    job_id = submit(host)
    fail(host, job_id)
    if "next_attempt_at" in changes:
        changes = changes | {"next_attempt_at": changes["next_attempt_at"].isoformat(" ")}
    set_delivery(host, **changes)

    response = host.app.test_client().get(f"/webhooks/jobs/{job_id}")

    assert response.get_json()["delivery_status"] == changes["status"]
    if seconds is None:
        assert "Retry-After" not in response.headers
    else:
        assert seconds[0] <= int(response.headers["Retry-After"]) <= seconds[1]


def test_etag(host: Host) -> None:
    job_id = submit(host)
    client = host.app.test_client()
    first = client.get(f"/webhooks/jobs/{job_id}")

    unchanged = client.get(f"/webhooks/jobs/{job_id}", headers={"If-None-Match": first.headers["ETag"]})
    fail(host, job_id)
    changed = client.get(f"/webhooks/jobs/{job_id}", headers={"If-None-Match": first.headers["ETag"]})

    assert unchanged.status_code == 304
    assert unchanged.data == b""
    assert int(unchanged.headers["Retry-After"]) > 0
    assert changed.status_code == 200
    assert changed.headers["ETag"] != first.headers["ETag"]


def test_redis_gone_leaves_the_job_status_unknown(host: Host) -> None:
    job_id = submit(host)
    host.state.redis.close()
    host.state._built["redis"] = type(host.redis).from_url(
        "redis://127.0.0.1:1/0", socket_connect_timeout=0.2
    )

    status = host.app.test_client().get(f"/webhooks/jobs/{job_id}").get_json()

    assert status["job_status"] is None
    assert status["webhook_configured"] is True


# Who may ask


def test_nothing_is_served_until_the_host_says_who_may_ask(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = submit(host)
    host.webhooks.authorize_function = None
    client = host.app.test_client()

    answers = [client.get(f"/webhooks/jobs/{asked}") for asked in (job_id, "unknown")]

    assert [answer.status_code for answer in answers] == [403, 403]
    assert answers[0].data == answers[1].data
    assert answers[0].get_json()["error"]["code"] == "forbidden"
    assert "@webhooks.authorize" in caplog.text


def test_unknown_foreign_and_unregistered_jobs_look_alike(host: Host) -> None:
    mine, foreign = submit(host, "mine"), submit(host, "foreign")
    unregistered = host.enqueue()
    asked: list[Any] = []

    @host.webhooks.authorize
    def may(permission: str, **what: Any) -> bool:
        asked.append((permission, what))
        return what["runid"] in (None, "mine")

    client = host.app.test_client()
    answers = {
        job_id: client.get(f"/webhooks/jobs/{job_id}") for job_id in (mine, foreign, unregistered, "unknown")
    }

    assert answers[mine].get_json()["webhook_configured"] is True
    for job_id in (foreign, unregistered, "unknown"):
        assert answers[job_id].status_code == 200
        assert answers[job_id].get_json() == {"job_id": job_id, "webhook_configured": False}
        assert set(answers[job_id].headers.keys()) == set(answers["unknown"].headers.keys())
    assert asked[0] == ("status", {"job_id": mine, "runid": "mine"})


def test_host_that_knows_no_callers_refuses_all_alike(host: Host) -> None:
    job_id = submit(host)
    host.webhooks.authorize(lambda permission, **what: False)
    client = host.app.test_client()

    answers = [client.get(f"/webhooks/jobs/{asked}") for asked in (job_id, "unknown")]

    assert [answer.status_code for answer in answers] == [403, 403]
    assert answers[0].data == answers[1].data


def test_endpoint_whose_jobs_were_never_enqueued_is_not_shown(host: Host) -> None:
    def refuse() -> Any:
        return {}

    host.route(refuse, "/refuse")
    host.post("/refuse")
    ((reserved, status),) = host.watches()

    assert status == "closed"
    assert host.app.test_client().get(f"/webhooks/jobs/{reserved}").get_json()["webhook_configured"] is False


def test_url_prefix(sqlite_url: str, redis_url: str) -> None:
    host = Host(sqlite_url, redis_url, RQ_WEBHOOKS_URL_PREFIX="/own/hooks")

    response = host.app.test_client().get("/own/hooks/jobs/some-job")

    assert response.get_json() == {"job_id": "some-job", "webhook_configured": False}
    host.close()


def test_health_is_open_and_shows_nothing_else(host: Host) -> None:
    from flask_rq_webhooks.storage.dispatchers import heartbeat

    host.webhooks.authorize_function = None
    client = host.app.test_client()

    without = client.get("/webhooks/health")
    heartbeat(host.state.database, "dsp_tests", started=True)
    with_one = client.get("/webhooks/health")

    assert (without.status_code, without.get_json()) == (503, {"ok": False})
    assert (with_one.status_code, with_one.get_json()) == (200, {"ok": True})


# Callers who share a job id


def share(host: Host, *runids: str | None) -> str:
    """Let one job be asked about by several requests, each with its own run; return the job's id."""
    job_id = submit(host, "r1")
    for runid in runids:
        with host.app.app_context():
            host.webhooks.watch(
                host.job(job_id), f"https://{runid}.example.com/hook", runid=runid, reference=runid
            )
    return job_id


def test_callers_who_share_a_job_see_only_what_they_were_cleared_for(host: Host) -> None:
    job_id = share(host, "r2")
    record_failure(host, job_id)
    cleared: set[str | None] = set()

    @host.webhooks.authorize
    def may(permission: str, **what: Any) -> bool:
        return what["runid"] is None or what["runid"] in cleared

    client = host.app.test_client()
    seen: dict[str, Any] = {}
    for runid in ("r1", "r2"):
        cleared.clear()
        cleared.add(runid)
        seen[runid] = client.get(f"/webhooks/jobs/{job_id}").get_json()
    cleared |= {"r1", "r2"}
    both = client.get(f"/webhooks/jobs/{job_id}").get_json()

    assert len(both["deliveries"]) == 2
    assert [delivery["url"].split("/")[2] for delivery in seen["r1"]["deliveries"]] == ["hooks.example.com"]
    assert [delivery["url"].split("/")[2] for delivery in seen["r2"]["deliveries"]] == ["r2.example.com"]
    assert seen["r2"]["url"].startswith("https://r2.example.com/")
    assert seen["r1"]["url"].startswith("https://hooks.example.com/")
    # The event's own run is that of the first request.
    assert [event["runid"] for event in seen["r1"]["events"]] == ["r1"]
    assert [event["runid"] for event in seen["r2"]["events"]] == [None]
    assert "r1" not in str(seen["r2"])


def test_foreign_and_unknown_jobs_take_the_same_questions_and_statements(host: Host) -> None:
    foreign = submit(host, "foreign")
    record_failure(host, foreign)
    unregistered = host.enqueue()
    asked: list[Any] = []

    @host.webhooks.authorize
    def may(permission: str, **what: Any) -> bool:
        asked.append(what["job_id"])
        return what["runid"] is None

    client = host.app.test_client()
    counted = {}
    for job_id in (foreign, unregistered, "unknown"):
        asked.clear()
        with statements_of(host.state.database) as statements:
            answer = client.get(f"/webhooks/jobs/{job_id}")
        assert answer.get_json() == {"job_id": job_id, "webhook_configured": False}
        counted[job_id] = (len(asked), len(statements))

    assert len(set(counted.values())) == 1, counted
