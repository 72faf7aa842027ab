"""The explicit helper, and ATTACH="all": jobs with callbacks where no decorator is involved."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import rq
import sqlalchemy as sa
from flask import Flask, copy_current_request_context, request
from redis import Redis
from rq.job import Job

from flask_rq_webhooks import InvalidWebhookError, Queue, RQWebhooks
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage.models import Endpoint, Event, Watch
from flask_rq_webhooks.testing import InMemoryReceiver, deliver_all
from tests.acceptance import tasks
from tests.integration.hosts import Host
from tests.pipeline import work
from tests.storage_rows import statements_of

#: RQ 1.16's workers use what it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*(push|pop)_connection.*:DeprecationWarning")

URL = "https://hooks.example.com/in"
ASKED = {"webhook_url": URL, "webhook_secret": "s3cret", "other": 1}


@pytest.fixture
def make_state(redis_url: str, sqlite_url: str) -> Iterator[Any]:
    states: list[State] = []

    def make(**config: Any) -> tuple[RQWebhooks, State]:
        host = Flask("host")
        host.config.update(
            SECRET_KEY="tests", RQ_WEBHOOKS_DATABASE_URI=sqlite_url, RQ_WEBHOOKS_REDIS_URL=redis_url, **config
        )
        webhooks = RQWebhooks(host)
        state = get_state(host)
        state.database.create_tables()
        states.append(state)
        return webhooks, state

    yield make
    from flask_rq_webhooks.queue.job_callbacks import set_default_attachment

    set_default_attachment(None)
    for state in states:
        state.database.dispose()
        state.redis.close()


def success_callback(redis: Redis, job_id: str) -> str:
    return redis.hget(f"rq:job:{job_id}", "success_callback_name").decode()


def test_fields_come_from_the_payload(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    queue = rq.Queue(connection=redis_client)

    with state.app.app_context():
        job = webhooks.enqueue_with_webhook(
            queue, tasks.add, (1, 2), timeout=30, runid="basin", payload=ASKED, meta={"kept": 1}, job_id="own"
        )

    assert job.id == "own"
    assert job.timeout == 30
    assert job.meta == {"runid": "basin", "kept": 1}
    with state.database.read() as connection:
        endpoint = connection.execute(sa.select(Endpoint.id, Endpoint.url, Endpoint.runid)).one()
        watches = connection.execute(sa.select(Watch.job_id, Watch.status)).all()
    assert (endpoint.url, endpoint.runid) == (URL, "basin")
    assert ("own", "open") in [tuple(watch) for watch in watches]
    assert success_callback(redis_client, "own") == f"flask_rq_webhooks.callbacks.success.{endpoint.id}"


def test_a_payload_without_url_enqueues_as_if_nobody_had_asked(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()

    with state.app.app_context():
        job = webhooks.enqueue_with_webhook(rq.Queue(connection=redis_client), tasks.add, (1, 2), payload={})

    assert success_callback(redis_client, job.id) == ""
    with state.database.read() as connection:
        assert connection.execute(sa.select(Endpoint.id)).all() == []


def test_bad_fields_enqueue_nothing(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    queue = rq.Queue(connection=redis_client)

    with state.app.app_context(), pytest.raises(InvalidWebhookError) as caught:
        webhooks.enqueue_with_webhook(queue, tasks.add, (1, 2), payload={"webhook_url": "http://10.0.0.1/"})

    assert list(caught.value.details) == ["webhook_url"]
    assert queue.job_ids == []


def test_bad_fields_in_a_view_answer_400(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    def view() -> Any:
        webhooks.enqueue_with_webhook(
            rq.Queue(connection=redis_client), tasks.add, (1, 2), payload={"webhook_url": "nonsense"}
        )
        return {}

    response = state.app.test_client().post("/job")

    assert response.status_code == 400
    assert response.get_json()["error"]["code"] == "invalid_webhook"


def test_in_a_decorated_view_the_requests_fields_count_for_a_plain_queue(
    make_state: Any, redis_client: Redis
) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook
    def view() -> Any:
        job = webhooks.enqueue_with_webhook(rq.Queue(connection=redis_client), tasks.add, (1, 2))
        return {"job_id": job.id}

    response = state.app.test_client().post("/job", json=ASKED)

    assert response.headers["Webhook-Registered"] == "true"
    name = success_callback(redis_client, response.get_json()["job_id"])
    assert name.startswith("flask_rq_webhooks.callbacks.success.ep")


def test_disabled_enqueues_without_webhook(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state(RQ_WEBHOOKS_ENABLED=False)

    with state.app.app_context():
        job = webhooks.enqueue_with_webhook(
            rq.Queue(connection=redis_client), tasks.add, (1, 2), payload=ASKED
        )

    assert success_callback(redis_client, job.id) == ""


def test_attach_all_gives_every_job_of_the_app_callbacks(make_state: Any, redis_client: Redis) -> None:
    _webhooks, state = make_state(RQ_WEBHOOKS_ATTACH="all")
    queue = Queue(connection=redis_client)

    with state.app.app_context():
        inside = queue.enqueue(tasks.add, 1, 2)
    outside = queue.enqueue(tasks.add, 1, 2)

    assert success_callback(redis_client, inside.id) == (
        f"flask_rq_webhooks.callbacks.success.ep{state.namespace}_all"
    )
    assert success_callback(redis_client, outside.id) == ""


def test_watch_promises_to_report_a_job_made_elsewhere(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    job = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)

    with state.app.app_context():
        endpoint_id = webhooks.watch(job, URL, secret="s3cret", runid="basin", events=["job.failure"])

    with state.database.read() as connection:
        watch = connection.execute(sa.select(Watch.endpoint_id, Watch.job_id, Watch.status)).one()
        endpoint = connection.execute(sa.select(Endpoint.url, Endpoint.runid, Endpoint.events)).one()
    assert tuple(watch) == (endpoint_id, job.id, "open")
    assert tuple(endpoint) == (URL, "basin", '["job.failure"]')


@pytest.mark.parametrize("fields", [{"url": "http://10.0.0.1/"}, {"url": URL, "colour": "blue"}])
def test_watch_refuses_what_it_cannot_promise(make_state: Any, redis_client: Redis, fields: Any) -> None:
    webhooks, state = make_state()
    job = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)

    with state.app.app_context(), pytest.raises(InvalidWebhookError):
        webhooks.watch(job, **fields)

    with state.database.read() as connection:
        assert connection.execute(sa.select(Watch.id)).all() == []


def made_by_hand(redis_client: Redis) -> Job:
    job = Job.create(tasks.add, (1, 2), connection=redis_client, origin="default")
    return rq.Queue("default", connection=redis_client).enqueue_job(job)


@pytest.mark.parametrize("length", [512, 513, 9000])
def test_a_job_id_that_our_tables_cannot_hold_is_never_promised(
    database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    host = Host(database_url, redis_url)
    plain = rq.Queue("default", connection=host.redis)

    def by_route() -> Any:
        return host.enqueue(job_id="r" * length)

    def by_watch_before() -> Any:
        job = Job.create(tasks.add, (1, 2), connection=host.redis, origin="default", id="b" * length)
        host.webhooks.watch(job)
        return plain.enqueue_job(job).id

    def by_watch_after() -> Any:
        job = plain.enqueue(tasks.add, 1, 2, job_id="a" * length)
        host.webhooks.watch(job)
        return job.id

    def by_url() -> Any:
        job = Job.create(tasks.add, (1, 2), connection=host.redis, origin="default", id="u" * length)
        host.webhooks.watch(job, URL, secret="s3cret")
        return plain.enqueue_job(job).id

    def by_helper() -> Any:
        job_id = "h" * length
        return host.webhooks.enqueue_with_webhook(plain, tasks.add, (1, 2), payload=ASKED, job_id=job_id).id

    for view in (by_route, by_watch_before, by_watch_after):
        host.route(view, f"/{view.__name__}")
    for view in (by_url, by_helper):
        host.app.add_url_rule(f"/{view.__name__}", view.__name__, view, methods=["POST"])
    views = (by_route, by_watch_before, by_watch_after, by_url, by_helper)
    answers = {view.__name__: host.post(f"/{view.__name__}") for view in views}
    queued = set(plain.job_ids)
    work(host.redis)
    reported = {webhook.json["job_id"] for webhook in deliver_all(host.app)}
    left = host.state.outbox.length()
    host.close()

    assert left == 0
    assert "set aside" not in caplog.text
    if length <= 512:
        assert [answer.status_code for answer in answers.values()] == [200] * 5
        assert reported == queued == {letter * length for letter in "rbauh"}
    else:
        assert reported == set()
        assert queued == {letter * length for letter in "rba"}, "refused before anything was enqueued"
        for name in ("by_url", "by_helper"):
            assert answers[name].status_code == 400
            (why,) = answers[name].get_json()["error"]["details"]["job_id"]
            assert f"has {length} characters. Use at most 512" in why
        for name in ("by_route", "by_watch_before", "by_watch_after"):
            assert answers[name].headers["Webhook-Registered"] == "false"
            assert "Webhook-Job-Id" not in answers[name].headers
        assert caplog.text.count(f"has {length} characters") == 3
        assert "it enqueued no job" not in caplog.text, "the real cause alone"


def test_watch_takes_one_transaction(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    job = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)

    with state.app.app_context():
        webhooks.watch(job, URL)  # the first one asks more
        with statements_of(state.database) as said:
            webhooks.watch(job, URL, secret="s3cret")

    assert [statement.split()[0] for statement in said] == ["BEGIN", "INSERT", "INSERT", "INSERT"]


def test_watch_keeps_the_rules_of_all_promises(
    make_state: Any, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    job = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)
    webhooks, state = make_state(RQ_WEBHOOKS_ENABLED=False)
    with state.app.app_context():
        assert webhooks.watch(job, URL) is None
        assert webhooks.watch(job) is None
    with state.database.read() as connection:
        assert connection.execute(sa.select(Endpoint.id)).all() == []

    webhooks, state = make_state(RQ_WEBHOOKS_MAX_WAITING_PER_HOST=1)
    with state.app.app_context():
        endpoint_id = webhooks.watch(job, URL)
        assert "no dispatcher is alive" in caplog.text
        work(redis_client)
        answers_later = InMemoryReceiver(503)
        for _ in range(2):
            deliver_all(state.app, answers_later, retries=False)
        with pytest.raises(InvalidWebhookError, match="Too many") as caught:
            webhooks.watch(job, URL)
    assert endpoint_id is not None
    assert list(caught.value.details) == ["webhook_url"]


@pytest.mark.parametrize("beside", ["made by hand", "made earlier", "attached too"])
def test_watch_without_url_is_the_requests_webhook(make_state: Any, redis_client: Redis, beside: str) -> None:
    webhooks, state = make_state()
    earlier = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)
    ids: list[Any] = []

    @state.app.post("/job")
    @webhooks.accepts_webhook
    def view() -> Any:
        if beside == "made by hand":
            job = made_by_hand(redis_client)
        elif beside == "made earlier":
            job = earlier
        else:
            job = Queue(connection=redis_client).enqueue(tasks.add, 1, 2)
        ids.append(webhooks.watch(job))
        return {"job_id": job.id}

    asked = state.app.test_client().post("/job", json=ASKED)
    unasked = state.app.test_client().post("/job", json={})
    job_id = asked.get_json()["job_id"]
    work(redis_client)
    delivered = [webhook for _ in range(3) for webhook in deliver_all(state.app)]

    assert asked.headers["Webhook-Registered"] == "true"
    assert asked.headers["Webhook-Job-Id"] == job_id
    assert "Webhook-Registered" not in unasked.headers
    assert ids[0].startswith("ep")
    assert ids[1] is None
    assert [(webhook.json["event"], webhook.json["job_id"]) for webhook in delivered] == [
        ("job.success", job_id)
    ]
    delivered[0].verify("s3cret")


def test_watched_job_of_an_earlier_request_counts_also_where_sql_is_busy(
    sqlite_url: str, redis_url: str, redis_client: Redis
) -> None:
    """The host holds a write transaction past the view, so the watch is confirmed through the outbox."""
    host = Host(sqlite_url, redis_url)
    earlier = rq.Queue(connection=redis_client).enqueue(tasks.add, 1, 2)
    redis_client.hset(earlier.key, "enqueued_at", "2024-01-01T00:00:00.000000Z")
    earlier = Job.fetch(earlier.id, connection=redis_client)
    with host.app.app_context():
        host.db.session.execute(sa.text("CREATE TABLE own (id INTEGER PRIMARY KEY)"))
        host.db.session.commit()

    def build() -> Any:
        host.db.session.execute(sa.text("INSERT INTO own VALUES (1)"))
        host.webhooks.watch(earlier)
        return {}

    host.route(build)
    answer = host.post()
    waiting = host.state.outbox.length()
    ingested = deliver_all(host.app)
    work(redis_client)
    # A worker would write a time of its own only for a run that it enqueues.
    delivered = [webhook for _ in range(2) for webhook in deliver_all(host.app)]
    host.close()

    assert answer.headers["Webhook-Job-Id"] == earlier.id
    assert (waiting, ingested) == (1, [])
    assert [webhook.json["job_id"] for webhook in delivered] == [earlier.id]


@pytest.mark.parametrize("where", ["thread", "after_request"])
def test_watch_from_a_thread_and_after_the_view(make_state: Any, redis_client: Redis, where: str) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook
    def view() -> Any:
        if where == "thread":
            with ThreadPoolExecutor(1) as pool:
                job = pool.submit(made_by_hand, redis_client).result()
                pool.submit(copy_current_request_context(webhooks.watch), job).result()
        return {}

    @state.app.after_request
    def enqueue_afterwards(response: Any) -> Any:
        if where == "after_request":
            webhooks.watch(made_by_hand(redis_client))
        return response

    answer = state.app.test_client().post("/job", json=ASKED)
    work(redis_client)
    delivered = [webhook for _ in range(2) for webhook in deliver_all(state.app)]

    assert answer.headers["Webhook-Registered"] == "true"
    assert [webhook.json["job_id"] for webhook in delivered] == [answer.headers["Webhook-Job-Id"]]


def test_create_job_and_enqueue_job_carry_the_webhook(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook
    def view() -> Any:
        queue = Queue(connection=redis_client)
        return {"job_id": queue.enqueue_job(queue.create_job(tasks.add, (1, 2))).id}

    answer = state.app.test_client().post("/job", json=ASKED)

    assert answer.headers["Webhook-Registered"] == "true"
    assert success_callback(redis_client, answer.get_json()["job_id"]) != ""


def test_fields_are_validated_before_anything_is_enqueued(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    queue = rq.Queue(connection=redis_client)

    @state.app.post("/job")
    def view() -> Any:
        asked = webhooks.validate(request.get_json())
        job = queue.enqueue(tasks.add, 1, 2)
        if asked:
            webhooks.watch(
                job, request.get_json()["webhook_url"], secret=request.get_json()["webhook_secret"]
            )
        return {"job_id": job.id, "asked": asked}

    client = state.app.test_client()
    bad = client.post("/job", json={"webhook_url": "http://10.0.0.1/", "webhook_secret": ""})
    count = queue.count
    good, plain = client.post("/job", json=ASKED), client.post("/job", json={"webhook_secret": ""})

    assert (bad.status_code, count) == (400, 0)
    assert set(bad.get_json()["error"]["details"]) == {"webhook_url", "webhook_secret"}
    assert (good.get_json()["asked"], plain.get_json()["asked"]) == (True, False)
    assert good.headers["Webhook-Registered"] == "true"
    assert good.headers["Webhook-Job-Id"] == good.get_json()["job_id"]


def test_job_timeout_and_run_ids_that_are_numbers(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()
    queue = rq.Queue(connection=redis_client)

    with state.app.app_context():
        job = webhooks.enqueue_with_webhook(queue, tasks.add, (1, 2), job_timeout=77, runid=42, payload=ASKED)
        webhooks.watch(queue.enqueue(tasks.add, 1, 2), URL, runid=43)
        webhooks.send("model.published", {}, runid=44)

    assert Job.fetch(job.id, connection=redis_client).timeout == 77
    with state.database.read() as connection:
        assert sorted(connection.execute(sa.select(Endpoint.runid)).scalars()) == ["42", "43"]
        assert connection.execute(sa.select(Event.runid)).scalar_one() == "44"


def test_answer_to_the_helper_names_the_job(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    def view() -> Any:
        queue = rq.Queue(connection=redis_client)
        job = webhooks.enqueue_with_webhook(queue, tasks.add, (1, 2), payload=request.get_json())
        return {"job_id": job.id}

    client = state.app.test_client()
    asked, plain = client.post("/job", json=ASKED), client.post("/job", json={"a": 1})

    assert asked.headers["Webhook-Registered"] == "true"
    assert asked.headers["Webhook-Job-Id"] == asked.get_json()["job_id"]
    assert "Webhook-Registered" not in plain.headers


# Which jobs


def side_job(address: str) -> str:
    return address


@pytest.mark.parametrize(
    "chosen",
    [["add"], [tasks.add], ["tests.acceptance.tasks.add", "other"], lambda name: name.endswith(".add")],
    ids=["last part", "function", "dotted", "predicate"],
)
def test_only_chosen_jobs_are_reported(make_state: Any, redis_client: Redis, chosen: Any) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook(jobs=chosen)
    def view() -> Any:
        queue = Queue(connection=redis_client)
        mail = queue.enqueue(side_job, "someone@example.com")
        job = queue.enqueue("tests.acceptance.tasks.add", 1, 2)
        return {"job_id": job.id, "mail": mail.id}

    answer = state.app.test_client().post("/job", json=ASKED)

    assert answer.headers["Webhook-Registered"] == "true"
    assert answer.headers["Webhook-Job-Id"] == answer.get_json()["job_id"]
    assert success_callback(redis_client, answer.get_json()["mail"]) == ""
    assert success_callback(redis_client, answer.get_json()["job_id"]) != ""


def test_none_of_the_chosen_jobs_is_said_in_the_log(
    make_state: Any, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook(jobs=["build"])
    def view() -> Any:
        Queue(connection=redis_client).enqueue(tasks.add, 1, 2)
        return {}

    answer = state.app.test_client().post("/job", json=ASKED)

    assert answer.headers["Webhook-Registered"] == "false"
    assert "chooses none of the jobs it enqueued (tests.acceptance.tasks.add)" in caplog.text


def test_twenty_jobs_at_most_are_named(make_state: Any, redis_client: Redis) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook
    def view() -> Any:
        queue = Queue(connection=redis_client)
        return {"ids": [queue.enqueue(tasks.add, 1, 2).id for _ in range(25)]}

    answer = state.app.test_client().post("/job", json=ASKED)

    assert answer.headers["Webhook-Job-Id"].split(", ") == answer.get_json()["ids"][:20]


# What the run is called


def deleted(redis_client: Redis, job_id: str) -> None:
    """Let reconcile be the one who reports: the job was canceled, so no callback runs."""
    Job.fetch(job_id, connection=redis_client).cancel()


def echo(text: Any, **options: Any) -> Any:
    return text


@pytest.mark.parametrize("source", ["callback", "reconciled"])
@pytest.mark.parametrize(
    ("argument", "meta", "options", "expected"),
    [
        ("basin-7", {}, {}, "basin-7"),
        ("x" * 128, {}, {}, "x" * 128),
        ("x" * 129, {}, {}, None),
        ("Your report is ready", {}, {}, None),
        ("select\n1", {}, {}, None),
        ("", {}, {}, None),
        (7, {}, {}, None),
        ("basin-7", {"runid": 42}, {}, "42"),
        ("basin-7", {"runid": "run"}, {}, "run"),
        ("basin-7", {}, {"runid": None}, None),
        ("basin-7", {"runid": 42}, {"runid": None}, "42"),
    ],
    ids=["name", "128", "129", "words", "lines", "empty", "number", "integer in meta", "text in meta",
         "switched off", "switched off, meta"],
)  # fmt: skip
def test_run_is_called_the_same_by_callback_and_reconcile(
    make_state: Any,
    redis_client: Redis,
    source: str,
    argument: Any,
    meta: dict[str, Any],
    options: dict[str, Any],
    expected: str | None,
) -> None:
    webhooks, state = make_state()

    @state.app.post("/job")
    @webhooks.accepts_webhook(**options)
    def view() -> Any:
        queue = Queue(connection=redis_client)
        return {"job_id": queue.enqueue(echo, argument, meta=meta, on_success=None).id}

    job_id = state.app.test_client().post("/job", json=ASKED).get_json()["job_id"]
    if source == "callback":
        work(redis_client)
    else:
        deleted(redis_client, job_id)
    (webhook,) = [webhook for _ in range(2) for webhook in deliver_all(state.app)]

    assert webhook.json["source"] == source
    assert webhook.json["runid"] == expected
