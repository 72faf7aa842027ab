"""Register, view, confirm: views of every kind, hosts with every habit, servers that are gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
import pytest
import redis
import rq
import sqlalchemy as sa
from flask import abort, jsonify, request
from flask.views import MethodView
from flask_wtf import CSRFProtect
from sqlalchemy.pool import QueuePool

from flask_rq_webhooks import ConfigurationError, Queue
from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.queue.job_callbacks import current_attachment
from flask_rq_webhooks.storage import endpoints
from flask_rq_webhooks.storage.dispatchers import heartbeat
from flask_rq_webhooks.testing import deliver_all
from tests.acceptance import tasks
from tests.integration.hosts import FIELDS, URL, Host
from tests.servers import valkey_server, wait_until

MODULE = "flask_rq_webhooks.accept.request_fields"


@pytest.fixture
def make_host(make_host: Callable[..., Host]) -> Callable[..., Host]:
    """Give a function that makes host apps whose dispatcher is alive."""

    def make(**config: Any) -> Host:
        host = make_host(**config)
        heartbeat(host.state.database, "dsp_tests", started=True)
        return host

    return make


# What is stored


def test_everything_a_request_says_is_stored_and_the_first_job_gets_the_reserved_id(host: Host) -> None:
    host.app.config["RQ_WEBHOOKS_SIGNING_SECRET"] = None
    seen: list[Any] = []

    def build(runid: str, config: str) -> Any:
        seen.append((request.get_json(), host.watches()))
        return {"job_id": host.enqueue()}

    host.route(build, "/runs/<runid>/<config>/build", events=["job.failure"])
    response = host.post(
        "/runs/basin-7/disturbed/build",
        json={
            "webhook_url": "https://Hooks.Example.com:443/in",
            "webhook_secret": "  kept  ",
            "webhook_headers": {"Authorization": "Bearer abc"},
            "webhook_events": ["job.success", "job.retrying"],
            "webhook_format": "task",
            "webhook_reference": "order 7",
            "webhook_timeout": 2.5,
            "webhook_retry_count": 3,
            "wet": True,
        },
    )

    job_id = response.get_json()["job_id"]
    assert response.headers["Webhook-Registered"] == "true"
    assert seen == [({"wet": True}, [(job_id, "reserved")])]
    (endpoint,) = host.rows("endpoint")
    assert endpoint["url"] == "https://hooks.example.com/in"
    assert endpoint["host"] == "hooks.example.com"
    assert endpoint["runid"] == "basin-7"
    assert endpoint["events"] == '["job.success", "job.retrying"]'
    assert (endpoint["format"], endpoint["reference"]) == ("task", "order 7")
    assert (endpoint["timeout_s"], endpoint["max_attempts"]) == (2.5, 3)
    assert host.state.cipher.decrypt(endpoint["headers"]) == '{"Authorization": "Bearer abc"}'
    (secret,) = host.rows("secret")
    assert host.state.cipher.decrypt(secret["secret"]) == "  kept  "
    assert host.watches() == [(job_id, "open")]
    assert host.job(job_id).success_callback.__name__ is not None
    assert endpoint["id"].encode() in host.redis.hget(f"rq:job:{job_id}", "success_callback_name")


def test_events_of_the_route_where_the_request_names_none(host: Host) -> None:
    def build() -> Any:
        return {"job_id": host.enqueue()}

    host.route(build, events=["job.failure"], scope="tree")
    host.post()

    (endpoint,) = host.rows("endpoint")
    assert (endpoint["events"], endpoint["scope"], endpoint["runid"]) == ('["job.failure"]', "tree", None)


def test_several_jobs_of_one_view_each_get_a_watch(host: Host) -> None:
    ids: list[str] = []

    def build() -> Any:
        ids.extend([host.enqueue(), host.enqueue(job_id="own-id"), host.enqueue()])
        return {}

    host.route(build)
    host.post()

    assert sorted(host.watches()) == sorted((job_id, "open") for job_id in ids)
    assert len({row["endpoint_id"] for row in host.rows("watch")}) == 1


def test_own_job_id_closes_the_reserved_watch(host: Host) -> None:
    def build() -> Any:
        return {"job_id": host.enqueue(job_id="own-id")}

    host.route(build)
    response = host.post()

    assert response.headers["Webhook-Registered"] == "true"
    assert sorted(status for _, status in host.watches()) == ["closed", "open"]
    assert ("own-id", "open") in host.watches()


# Views of every kind


class Refusal(Exception):
    """What the host's own error handler answers."""


def returns_dict(job_id: str) -> Any:
    return {"job_id": job_id}


def returns_response(job_id: str) -> Any:
    return jsonify(job_id=job_id)


def returns_tuple(job_id: str) -> Any:
    return {"job_id": job_id}, 202, {"X-Own": "1"}


def returns_stream(job_id: str) -> Any:
    return flask.Response(iter([b"a", b"b"]))


def aborts(job_id: str) -> Any:
    abort(418)


def aborts_with_response(job_id: str) -> Any:
    abort(flask.make_response("no", 409))


def raises_handled(job_id: str) -> Any:
    raise Refusal(job_id)


def raises_unhandled(job_id: str) -> Any:
    raise KeyError(job_id)


def swallows(job_id: str) -> Any:
    try:
        raise KeyError(job_id)
    except Exception:
        return {"Success": False}, 200


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (returns_dict, 200),
        (returns_response, 200),
        (returns_tuple, 202),
        (returns_stream, 200),
        (aborts, 418),
        (aborts_with_response, 409),
        (raises_handled, 422),
        (raises_unhandled, 500),
        (swallows, 200),
    ],
)
def test_header_is_on_every_answer_and_the_watch_is_confirmed(
    host: Host, ending: Callable[[str], Any], status: int, is_async: bool
) -> None:
    host.app.register_error_handler(Refusal, lambda exc: ({"refused": str(exc)}, 422))
    host.app.config["PROPAGATE_EXCEPTIONS"] = False
    ids: list[str] = []

    def build() -> Any:
        ids.append(host.enqueue())
        return ending(ids[0])

    async def build_async() -> Any:
        await asyncio.sleep(0)
        ids.append(await asyncio.create_task(enqueue_in_a_task()))
        return ending(ids[0])

    async def enqueue_in_a_task() -> str:
        return host.enqueue()

    host.route(build_async if is_async else build)
    response = host.post()

    assert response.status_code == status
    assert response.headers["Webhook-Registered"] == "true"
    assert response.headers.get("X-Own") == ("1" if ending is returns_tuple else None)
    assert host.watches() == [(ids[0], "open")]
    assert current_attachment.get() is None


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_exceptions_leave_the_app_unchanged(host: Host, is_async: bool) -> None:
    host.app.testing = True
    raised = Refusal("as it was")

    def build() -> Any:
        raise raised

    async def build_async() -> Any:
        raise raised

    host.route(build_async if is_async else build)
    with pytest.raises(Refusal) as caught:
        host.post()

    assert caught.value is raised
    assert [status for _, status in host.watches()] == ["closed"]


def test_method_view_and_blueprint(host: Host) -> None:
    class Jobs(MethodView):
        @host.webhooks.accepts_webhook
        def post(self, runid: str) -> Any:
            """Say what the method says."""
            return {"job_id": host.enqueue()}

        @host.webhooks.accepts_webhook
        async def put(self, runid: str) -> Any:
            return {"job_id": host.enqueue()}

    blueprint = flask.Blueprint("jobs", __name__)
    blueprint.add_url_rule("/runs/<runid>/jobs", view_func=Jobs.as_view("jobs"))
    host.app.register_blueprint(blueprint)
    client = host.app.test_client()

    answers = [method("/runs/r1/jobs", json=FIELDS) for method in (client.post, client.put)]

    assert [answer.headers["Webhook-Registered"] for answer in answers] == ["true", "true"]
    assert [row["runid"] for row in host.rows("endpoint")] == ["r1", "r1"]
    assert Jobs.post.__doc__ == "Say what the method says."
    assert Jobs.post.__name__ == "post"


def test_get_with_a_url_in_the_query_string(host: Host) -> None:
    def build() -> Any:
        return {"args": dict(request.args), "job_id": host.enqueue()}

    host.route(build)
    response = host.app.test_client().get("/job", query_string={"webhook_url": URL, "q": "1"})

    assert response.headers["Webhook-Registered"] == "true"
    assert response.get_json()["args"] == {"q": "1"}


def test_without_webhook_fields_nothing_happens(host: Host) -> None:
    def build() -> Any:
        assert current_attachment.get() is None
        return {"job_id": host.enqueue(), "data": request.get_data(as_text=True)}

    host.route(build)
    sent = '{"webhook_secret": "s",  "a": 1}'
    response = host.post(data=sent, content_type="application/json")

    assert "Webhook-Registered" not in response.headers
    assert response.get_json()["data"] == sent
    assert host.rows("endpoint") == host.rows("watch") == []
    assert host.redis.hget(f"rq:job:{response.get_json()['job_id']}", "success_callback_name") in (b"", None)


def test_decorated_function_outside_of_a_request_is_the_function(host: Host) -> None:
    decorated = host.webhooks.accepts_webhook(lambda: "plain")

    assert decorated() == "plain"


def test_nested_decorated_call_registers_once(host: Host) -> None:
    @host.webhooks.accepts_webhook
    def inner() -> str:
        return host.enqueue()

    def build() -> Any:
        return {"ids": [inner(), host.enqueue()]}

    host.route(build)
    response = host.post(json=[1], headers={"X-Webhook-Url": URL})

    assert len(host.rows("endpoint")) == 1
    assert sorted(host.watches()) == sorted((job_id, "open") for job_id in response.get_json()["ids"])


def test_decorated_functions_one_after_the_other_register_each(host: Host) -> None:
    step = host.webhooks.accepts_webhook(host.enqueue)

    def build() -> Any:
        return {"ids": [step(), step()]}

    host.app.add_url_rule("/job", view_func=build, methods=["POST"])
    response = host.post()

    assert response.headers["Webhook-Registered"] == "true"
    assert len(host.rows("endpoint")) == 2
    assert sorted(host.watches()) == sorted((job_id, "open") for job_id in response.get_json()["ids"])


# Nothing enqueued


def test_nothing_enqueued_is_said_and_logged(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Any:
        return {"queued": 0}

    host.webhooks.uninstrument_rq()  # whatever another test left behind
    host.route(build)
    response = host.post()

    assert response.headers["Webhook-Registered"] == "false"
    assert [status for _, status in host.watches()] == ["closed"]
    assert [record.levelname for record in caplog.records if record.name == MODULE] == ["WARNING"]
    assert "view 'build' of /job" in caplog.text
    assert "instrument_rq=True" in caplog.text


@pytest.mark.parametrize("answer", [400, 403, 409, 500])
def test_view_that_refuses_is_not_warned_of(
    host: Host, caplog: pytest.LogCaptureFixture, answer: int
) -> None:
    def build() -> Any:
        return {"error": "no"}, answer

    host.route(build)
    response = host.post()

    assert response.headers["Webhook-Registered"] == "false"
    assert [record for record in caplog.records if record.name == MODULE] == []


def made_by_hand(host: Host) -> rq.job.Job:
    job = rq.job.Job.create(tasks.add, (1, 2), connection=host.redis, origin="default")
    return host.queue.enqueue_job(job)


def test_real_cause_is_named_where_queues_are_instrumented(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    def build() -> Any:
        return {"job_id": made_by_hand(host).id}

    host.route(build)
    host.webhooks.instrument_rq()
    try:
        response = host.post()
    finally:
        host.webhooks.uninstrument_rq()

    assert response.headers["Webhook-Registered"] == "false"
    assert "webhooks.watch(job)" in caplog.text
    assert "instrument_rq" not in caplog.text


def test_duplicate_unique_job_is_not_registered(host: Host) -> None:
    if "unique" not in rq.Queue.enqueue_call.__code__.co_varnames:
        pytest.skip("this RQ knows no unique jobs")
    host.enqueue(job_id="the-one")

    def build() -> Any:
        try:
            host.queue.enqueue(tasks.add, 1, 2, job_id="the-one", unique=True)
        except rq.exceptions.DuplicateJobError:
            return {"Success": False}

    host.route(build)

    assert host.post().headers["Webhook-Registered"] == "false"


def test_disabled_strips_and_registers_nothing(make_host: Callable[..., Host]) -> None:
    host = make_host(RQ_WEBHOOKS_ENABLED=False)

    def build() -> Any:
        return {"seen": request.get_json(), "job_id": host.enqueue()}

    host.route(build)
    for sent in (FIELDS, {"webhook_url": "not a url"}):
        response = host.post(json={**sent, "a": 1})
        assert response.get_json()["seen"] == {"a": 1}
        assert response.headers["Webhook-Registered"] == "false"
    assert host.rows("endpoint") == []


# Bad fields


def test_bad_fields_are_answered_before_the_view_and_nothing_is_enqueued(host: Host) -> None:
    def build() -> Any:
        raise AssertionError("the view must not run")

    host.route(build)
    response = host.post(
        json={"webhook_url": "http://10.0.0.1/", "webhook_secret": "", "sign_payload": "perhaps"}
    )

    assert response.status_code == 400
    assert response.headers["Webhook-Registered"] == "false"
    error = response.get_json()["error"]
    assert error["code"] == "invalid_webhook"
    assert set(error["details"]) == {"webhook_url", "webhook_secret", "sign_payload"}
    assert all(isinstance(why, list) and why and isinstance(why[0], str) for why in error["details"].values())
    assert host.rows("endpoint") == []


def test_answer_does_not_say_whether_a_host_exists(host: Host) -> None:
    def build() -> Any:
        return {"job_id": host.enqueue()}

    host.route(build)
    existing = host.post(json={"webhook_url": "https://localhost/"})
    made_up = host.post(json={"webhook_url": "https://no-such-name.invalid/"})

    assert existing.status_code == 400
    assert made_up.status_code in (200, 400)  # the name is looked up when it is sent to, not before
    assert "resolve" not in existing.text + made_up.text


def test_error_envelope_renders_bad_fields_in_the_hosts_way(host: Host) -> None:
    @host.webhooks.error_envelope
    def envelope(code: str, message: str, details: dict[str, list[str]], status: int) -> Any:
        return {"Success": False, "Error": code, "Fields": sorted(details), "Status": status}

    @host.app.errorhandler(Exception)
    def generic(exc: Exception) -> Any:
        return {"generic": True}, 500

    host.route(lambda: {})
    response = host.post(json={"webhook_url": 7})

    assert response.status_code == 400
    assert response.get_json() == {
        "Success": False, "Error": "invalid_webhook", "Fields": ["webhook_url"], "Status": 400,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"events": ["job.finished"]}, {"events": "job.success"}, {"events": []}, {"scope": "forest"}],
    ids=str,
)
def test_bad_options_of_the_decorator_are_refused_at_once(host: Host, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        host.webhooks.accepts_webhook(**options)(lambda: {})


# Hosts


def test_host_with_an_open_write_transaction_in_the_view(host: Host) -> None:
    with host.app.app_context():
        host.db.session.execute(sa.text("CREATE TABLE own (id INTEGER PRIMARY KEY)"))
        host.db.session.commit()

    def build() -> Any:
        host.db.session.execute(sa.text("INSERT INTO own VALUES (1)"))  # the write lock is held from here on
        return {"job_id": host.enqueue()}

    host.route(build)
    began = time.monotonic()
    response = host.post()
    took = time.monotonic() - began

    job_id = response.get_json()["job_id"]
    assert response.headers["Webhook-Registered"] == "true"
    assert took < 1
    assert host.watches() == [(job_id, "reserved")]
    (entry,) = [entry.entry for entry in host.state.outbox.read("tests", 10, 1)]
    assert entry is not None
    assert (entry.kind, entry.jobs) == ("confirm", (job_id,))
    assert entry.endpoint == host.rows("endpoint")[0]["id"]
    with host.app.app_context():
        assert host.db.session.execute(sa.text("SELECT count(*) FROM own")).scalar() == 0, (
            "ours committed theirs"
        )


def test_host_that_rolls_back_or_commits_touches_nothing_of_ours(host: Host) -> None:
    def build() -> Any:
        host.db.session.execute(sa.text("SELECT 1"))
        job_id = host.enqueue()
        host.db.session.rollback()
        return {"job_id": job_id}

    host.route(build)
    response = host.post()

    assert host.watches() == [(response.get_json()["job_id"], "open")]


def test_host_pool_of_one_connection_is_not_shared(make_host: Callable[..., Host]) -> None:
    host = make_host(
        SQLALCHEMY_ENGINE_OPTIONS={
            "poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2,
        }
    )  # fmt: skip

    def build() -> Any:
        with host.db.engine.connect() as only_one:
            assert only_one.execute(sa.text("SELECT 1")).scalar() == 1
            return {"job_id": host.enqueue()}

    host.route(build)
    response = host.post()

    assert response.headers["Webhook-Registered"] == "true"
    assert host.watches() == [(response.get_json()["job_id"], "open")]


def test_global_csrf_protect_reads_the_form_first(make_host: Callable[..., Host]) -> None:
    host = make_host()
    CSRFProtect(host.app)

    def build() -> Any:
        return {"form": dict(request.form), "job_id": host.enqueue()}

    @host.app.get("/token")
    def token() -> str:
        from flask_wtf.csrf import generate_csrf

        return str(generate_csrf())

    host.route(build)
    client = host.app.test_client()
    csrf_token = client.get("/token").text
    refused = client.post("/job", data=FIELDS)
    response = client.post("/job", data={**FIELDS, "a": "1", "csrf_token": csrf_token})

    assert refused.status_code == 400
    assert len(host.rows("endpoint")) == 1
    assert response.headers["Webhook-Registered"] == "true"
    assert response.get_json()["form"] == {"a": "1", "csrf_token": csrf_token}


def test_queue_on_another_database_is_not_registered(
    host: Host, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = redis.Redis.from_url(redis_url.removesuffix("/0") + "/1")

    def build() -> Any:
        return {"job_id": Queue("default", connection=other).enqueue(tasks.add, 1, 2).id}

    host.route(build)
    response = host.post()

    assert response.headers["Webhook-Registered"] == "false"
    assert other.exists(f"rq:job:{response.get_json()['job_id']}") == 1
    other.flushdb()
    other.close()


# Servers that are gone


def test_sql_unreachable_is_503_before_the_view(host: Host, tmp_path: Path) -> None:
    ran: list[bool] = []

    def build() -> Any:
        ran.append(True)
        return {}

    host.route(build)
    host.state.database.dispose()
    (tmp_path / "host.db").rename(tmp_path / "away.db")
    (tmp_path / "host.db").mkdir()  # cannot be opened as a database
    try:
        response = host.post()
        unasked = host.post(json={"a": 1})
    finally:
        (tmp_path / "host.db").rmdir()
        (tmp_path / "away.db").rename(tmp_path / "host.db")

    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert response.headers["Webhook-Registered"] == "false"
    assert response.get_json()["error"]["code"] == "webhooks_unavailable"
    assert "host.db" not in response.text
    assert ran == [True]
    assert unasked.status_code == 200
    assert host.redis.dbsize() == 0


def test_tables_missing_is_503_that_the_log_explains(
    make_host: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host()
    with host.state.database.write() as connection:
        connection.execute(sa.text("DROP TABLE rq_webhooks_watch"))
    host.route(lambda: {})

    assert host.post().status_code == 503
    assert "init-db" in caplog.text


@pytest.mark.parametrize("job_id", [None, "nightly"], ids=["id of its own", "chosen id"])
def test_redis_gone_after_enqueuing_keeps_the_promise(
    database_url: str, job_id: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """RQ took the job, so its ending is reported: as lost, where Redis comes back without it."""
    with valkey_server() as server:
        host = Host(database_url, server.url)

        def build() -> Any:
            enqueued = host.enqueue(job_id=job_id)
            server.stop()
            return {"job_id": enqueued}

        host.route(build)
        response = host.post()
        watches = host.watches()
        server.start()
        delivered: list[Any] = []
        for _ in range(4):
            delivered += deliver_all(host.app)
        host.close()

    asked_redis = job_id is not None  # nobody else could write under the id that RQ made up
    job_id = response.get_json()["job_id"]
    assert response.status_code == 200
    assert response.headers["Webhook-Registered"] == "true"
    assert response.headers["Webhook-Job-Id"] == job_id
    assert (job_id, "open") in watches
    assert len(watches) == 1 + asked_redis  # the reserved id was not needed: closed
    assert ("cannot say whether" in caplog.text) == asked_redis
    assert [(webhook.json["event"], webhook.json["job_id"]) for webhook in delivered] == [
        ("job.lost", job_id)
    ]


def test_redis_and_sql_gone_after_enqueuing_keep_the_promise(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither takes the confirmation until both are back; by then the job is gone, which is reported."""
    confirm = endpoints.confirm
    with valkey_server() as server:
        host = Host(database_url, server.url)

        def fail(*_arguments: Any, **_options: Any) -> None:
            raise StorageUnavailableError("busy")

        def build() -> Any:
            job_id = host.enqueue()
            server.stop()
            monkeypatch.setattr(endpoints, "confirm", fail)
            return {"job_id": job_id}

        host.route(build)
        response = host.post()
        job_id = response.get_json()["job_id"]
        assert host.watches() == [(job_id, "reserved")]
        monkeypatch.setattr(endpoints, "confirm", confirm)
        wait_until(lambda: host.watches() == [(job_id, "open")], timeout=10)
        server.start()
        delivered: list[Any] = []
        for _ in range(4):
            delivered += deliver_all(host.app)
        host.close()

    assert response.headers["Webhook-Registered"] == "true"
    assert [(webhook.json["event"], webhook.json["job_id"]) for webhook in delivered] == [
        ("job.lost", job_id)
    ]


# Limits and warnings


def test_too_many_waiting_for_one_host_is_429(make_host: Callable[..., Host]) -> None:
    host = make_host(RQ_WEBHOOKS_MAX_WAITING_PER_HOST=1)

    def build() -> Any:
        return {"job_id": host.enqueue()}

    host.route(build)
    assert host.post().status_code == 200
    endpoint_id = host.rows("endpoint")[0]["id"]
    with host.state.database.write() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO rq_webhooks_event (id, type, source, payload, occurred_at, created_at) "
                "VALUES ('evt_1', 'job.success', 'callback', '{}', '2024-01-01', '2024-01-01')"
            )
        )
        delivery = {
            "id": "dlv_1", "event_id": "evt_1", "endpoint_id": endpoint_id, "host": "hooks.example.com",
            "event_type": "job.success", "status": "pending", "trigger": "scheduled", "body": b"{}",
            "attempts": 0, "max_attempts": 1, "created_at": "2024-01-01",
        }  # fmt: skip
        columns = ", ".join(delivery)
        values = ", ".join(f":{name}" for name in delivery)
        connection.execute(
            sa.text(f"INSERT INTO rq_webhooks_delivery ({columns}) VALUES ({values})"), delivery
        )

    refused = host.post()
    elsewhere = host.post(json={"webhook_url": "https://other.example.com/"})

    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.get_json()["error"]["code"] == "too_many_waiting"
    assert elsewhere.status_code == 200


def test_no_dispatcher_is_warned_of_once(
    sqlite_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(sqlite_url, redis_url)

    def build() -> Any:
        return {"job_id": host.enqueue()}

    host.route(build)
    answers = [host.post() for _ in range(3)]
    host.close()

    assert [answer.headers["Webhook-Registered"] for answer in answers] == ["true"] * 3
    warnings = [record for record in caplog.records if "flask rq-webhooks worker" in record.getMessage()]
    assert [warning.levelno for warning in warnings] == [logging.WARNING]


# Without the decorator


def test_enqueue_with_webhook_from_a_payload_on_a_plain_queue(host: Host) -> None:
    plain = rq.Queue("default", connection=host.redis)

    @host.app.post("/explicit")
    def explicit() -> Any:
        job = host.webhooks.enqueue_with_webhook(
            plain, tasks.run_model, ("r1",), timeout=77, runid="r1", payload=request.get_json()
        )
        return {"job_id": job.id}

    response = host.post("/explicit", json=FIELDS)
    without = host.post("/explicit", json={"a": 1})
    bad = host.post("/explicit", json={"webhook_url": 7})

    job_id = response.get_json()["job_id"]
    assert host.watches() == [(job_id, "open")]
    assert host.rows("endpoint")[0]["runid"] == "r1"
    assert host.job(job_id).timeout == 77
    assert type(plain) is rq.Queue
    assert without.status_code == 200
    assert bad.status_code == 400
    assert bad.get_json()["error"]["code"] == "invalid_webhook"
    assert plain.count == 2


def test_enqueue_with_webhook_uses_the_fields_of_the_decorated_request(host: Host) -> None:
    class OwnQueue(rq.Queue):
        """A host's own."""

    plain = OwnQueue("default", connection=host.redis)

    def build() -> Any:
        return {"job_id": host.webhooks.enqueue_with_webhook(plain, tasks.add, (1, 2)).id}

    host.route(build)
    response = host.post()

    assert response.headers["Webhook-Registered"] == "true"
    assert host.watches() == [(response.get_json()["job_id"], "open")]
    assert len(host.rows("endpoint")) == 1
