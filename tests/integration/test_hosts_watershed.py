"""The host app in view with a real worker: every shape of route, worker and result it has."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from flask import Flask
from rq.job import Job
from werkzeug.exceptions import InternalServerError

from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.testing import ReceivedWebhook, deliver_all
from tests.hosts.watershed import SITE_PREFIX, create_host, enqueue_hooks
from tests.servers import Process, rq_worker, wait_until

SECRET = " a secret that begins with a blank"
FIELDS = {"webhook_url": "https://client.example/hook", "webhook_secret": SECRET}
API = "/runs/basin-7/cfg/rq/api"


@pytest.fixture(params=["hooks-inside", "hooks-outside"])
def host(request: pytest.FixtureRequest, sqlite_url: str, redis_url: str) -> Iterator[Flask]:
    """Give the host app, whose enqueue hooks were installed before or after ours."""
    if request.param == "hooks-inside":
        with enqueue_hooks():
            yield from _host(sqlite_url, redis_url)
    else:
        yield from _host(sqlite_url, redis_url, enqueue_hooks)


@pytest.fixture
def plain_host(sqlite_url: str, redis_url: str) -> Iterator[Flask]:
    yield from _host(sqlite_url, redis_url)


def _host(database_url: str, redis_url: str, hooks: Any = None) -> Iterator[Flask]:
    app, webhooks = create_host(database_url, redis_url, PROPAGATE_EXCEPTIONS=False)
    state = get_state(app)
    state.database.create_tables()
    try:
        if hooks is None:
            yield app
        else:
            with hooks():
                yield app
    finally:
        webhooks.uninstrument_rq()
        state.database.dispose()
        state.redis.close()
        with app.app_context():
            app.extensions["sqlalchemy"].engine.dispose()


def work_off(redis_url: str, worker_class: str = "rq.Worker") -> None:
    with rq_worker(redis_url, burst=True, worker_class=worker_class) as worker:
        assert worker.wait(60) == 0, worker.output


def post(app: Flask, path: str, **options: Any) -> Any:
    response = app.test_client().post(path, **options)
    assert response.headers["Webhook-Registered"] == "true", response.text
    return response


def told(app: Flask, job_id: str) -> ReceivedWebhook:
    (webhook,) = deliver_all(app)
    assert webhook.verify(SECRET).json["job_id"] == job_id
    return webhook


@pytest.mark.parametrize(
    "worker_class",
    ["rq.Worker", "tests.hosts.workers.SavingWorker", "tests.hosts.workers.SavingSimpleWorker"],
)
def test_leftovers_of_the_payload_reach_the_job_and_webhook_fields_do_not(
    host: Flask, redis_url: str, redis_client: redis.Redis, worker_class: str
) -> None:
    response = post(host, f"{API}/build_landuse", json={"cover": " forest ", "years": [12], **FIELDS})
    job_id = response.get_json()["job_id"]

    work_off(redis_url, worker_class)
    webhook = told(host, job_id)

    assert webhook.json["event"] == "job.success"
    assert webhook.json["runid"] == "basin-7"
    assert webhook.json["result"] == {"runid": "basin-7", "options": {"cover": "forest", "years": 12}}
    job = Job.fetch(job_id, connection=redis_client)
    assert job.timeout == 216_000
    if "Saving" in worker_class:
        assert job.get_meta()["overwritten"] is True
    else:
        assert job.get_meta() == {"auth_actor": "user:7", "audit": "yes"}


@pytest.mark.parametrize(
    "worker_class", ["tests.hosts.workers.SavingWorker", "tests.hosts.workers.SavingSimpleWorker"]
)
def test_failure_under_workers_that_write_to_the_job(host: Flask, redis_url: str, worker_class: str) -> None:
    job_id = post(host, f"{API}/call/fails", json=FIELDS).get_json()["job_id"]

    work_off(redis_url, worker_class)

    payload = told(host, job_id).json
    assert payload["event"] == "job.failure"
    assert payload["error"]["type"] == "RuntimeError"
    assert payload["error"]["message"] == "no rain over basin-7"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("returns_tuple", ["basin-7", 3, "/data/basin-7"]),
        ("returns_path", "/data/basin-7"),
        ("returns_nothing", None),
        ("returns_job", str),
    ],
)
def test_results(host: Flask, redis_url: str, redis_client: redis.Redis, name: str, expected: Any) -> None:
    response = post(host, f"{API}/call/{name}", json=FIELDS)
    assert response.status_code == 202
    job_id = response.get_json()["job_id"]

    work_off(redis_url)

    result = told(host, job_id).json["result"]
    if expected is str:
        expected = Job.fetch(job_id, connection=redis_client).get_meta()["jobs:0,func:build"]
    assert result == expected


def test_async_view_bare_list_and_upload(plain_host: Flask, redis_url: str) -> None:
    client = plain_host.test_client()
    first = client.post(f"{API}/async/returns_path", json=FIELDS)
    second = client.post(
        "/rq/api/batch",
        data=json.dumps(["a", "b"]),
        content_type="application/json",
        headers={"X-Webhook-Url": FIELDS["webhook_url"], "X-Webhook-Secret": "for the list"},
    )
    third = client.post(
        f"{API}/upload", data={"dem": (io.BytesIO(b"12345"), "dem.tif"), "note": "n", **FIELDS}
    )
    assert [r.headers["Webhook-Registered"] for r in (first, second, third)] == ["true"] * 3

    work_off(redis_url)
    received = {webhook.json["job_id"]: webhook for webhook in deliver_all(plain_host)}

    a, b = second.get_json()["job_ids"]
    assert set(received) == {first.get_json()["job_id"], a, b, third.get_json()["job_id"]}
    for webhook in received.values():
        webhook.verify("for the list" if webhook.json["job_id"] in (a, b) else SECRET)
    assert received[a].json["runid"] == "a"
    assert received[third.get_json()["job_id"]].json["result"] == {
        "runid": "basin-7",
        "options": {"size": 5, "note": "n"},
    }


def test_batch_that_enqueues_nothing(plain_host: Flask) -> None:
    response = plain_host.test_client().post(
        "/rq/api/batch",
        data="[]",
        content_type="application/json",
        headers={"X-Webhook-Url": FIELDS["webhook_url"]},
    )

    assert response.get_json() == {"job_ids": []}
    assert response.headers["Webhook-Registered"] == "false"
    assert deliver_all(plain_host) == []


def test_errors_of_ours_wear_the_hosts_envelope_below_handlers_that_raise_again(
    plain_host: Flask, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    response = plain_host.test_client().post(
        f"{API}/build_landuse", json={"webhook_url": "http://10.0.0.1/", "cover": "forest"}
    )

    assert response.status_code == 400
    body = response.get_json()
    assert body["Success"] is False
    assert body["Code"] == "invalid_webhook"
    assert list(body["Details"]) == ["webhook_url"]
    assert redis_client.llen("rq:queue:default") == 0
    assert "failed" not in caplog.text


def test_view_that_raises_after_enqueuing_is_logged_by_the_host_and_its_job_is_told(
    plain_host: Flask, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InternalServerError):  # raised again once more, and left to the WSGI server
        plain_host.test_client().post(f"{API}/broken", json=FIELDS)

    assert "failed: LookupError('basin-7 has no watershed')" in caplog.text
    work_off(redis_url)
    (webhook,) = deliver_all(plain_host)
    assert webhook.json["event"] == "job.success"


def test_form_with_the_hosts_csrf_token(plain_host: Flask, redis_url: str) -> None:
    client = plain_host.test_client()
    with pytest.raises(InternalServerError):  # Flask-WTF's 400, through a handler that raises again
        client.post(f"{API}/form", data=FIELDS)
    token = client.get("/token").text

    response = client.post(f"{API}/form", data={"csrf_token": token, "cover": "forest", **FIELDS})

    assert response.headers["Webhook-Registered"] == "true"
    work_off(redis_url)
    payload = told(plain_host, response.get_json()["job_id"]).json
    assert payload["result"]["options"] == {"cover": "forest"}


def test_prefix_behind_a_proxy(plain_host: Flask, redis_url: str) -> None:
    job_id = post(plain_host, f"{API}/call/returns_path", json=FIELDS).get_json()["job_id"]
    forwarded = {
        "X-Forwarded-Prefix": SITE_PREFIX,
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "host.example",
    }

    status = plain_host.test_client().get(f"/webhooks/jobs/{job_id}", headers=forwarded)
    page = plain_host.test_client().get("/webhooks/", headers=forwarded)
    alias = plain_host.test_client().get(f"/webhooks/job/{job_id}/webhook", headers=forwarded)

    assert status.get_json()["webhook_configured"] is True
    assert status.get_json()["delivery_status"] == "waiting"
    assert alias.get_json() == status.get_json()
    if page.status_code == 200:  # every link of the pages keeps the prefix
        links = [part.split('"')[0] for part in page.text.replace("href=", "src=").split('src="')[1:]]
        assert links
        assert [link for link in links if link.startswith("/") and not link.startswith(SITE_PREFIX)] == []


def start_pool(redis_url: str, workers: int) -> Process:
    return Process(
        "python", "-m", "rq.cli", "worker-pool", "--url", redis_url, "--num-workers", str(workers), "default"
    )  # fmt: skip


def test_worker_pool(plain_host: Flask, redis_url: str, redis_client: redis.Redis) -> None:
    ids = [
        post(plain_host, f"{API}/call/{'fails' if n % 3 == 0 else 'returns_path'}", json=FIELDS).get_json()[
            "job_id"
        ]
        for n in range(12)
    ]

    with start_pool(redis_url, 3) as pool:
        ended = (b"finished", b"failed")
        wait_until(
            lambda: all(redis_client.hget(f"rq:job:{job_id}", "status") in ended for job_id in ids),
            timeout=40,
            what=lambda: f"all jobs to end: {pool.output}",
        )
        workers = {redis_client.hget(f"rq:job:{job_id}", "worker_name") for job_id in ids}
    received = deliver_all(plain_host)

    assert sorted(webhook.json["job_id"] for webhook in received) == sorted(ids)
    events = [webhook.json["event"] for webhook in received]
    assert (events.count("job.failure"), events.count("job.success")) == (4, 8)
    assert workers


def test_uninstrumented_host_is_told_that_nothing_is_registered(
    plain_host: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    from flask_rq_webhooks.queue import job_callbacks

    job_callbacks.uninstrument()
    response = plain_host.test_client().post(f"{API}/build_landuse", json=FIELDS)

    assert response.get_json()["Success"] is True
    assert response.headers["Webhook-Registered"] == "false"
    assert "instrument_rq=True" in caplog.text
