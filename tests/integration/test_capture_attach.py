"""Every way to enqueue, on a real server: what the job carries, and what is found of it afterwards."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import rq
from rq.decorators import job as job_decorator
from rq.job import Job

from flask_rq_webhooks.queue import job_callbacks
from flask_rq_webhooks.queue.job_callbacks import (
    Attachment,
    Queue,
    SameDatabase,
    current_attachment,
    look_at_jobs,
    was_handed_over,
)
from flask_rq_webhooks.queue.outbox import Outbox
from flask_rq_webhooks.queue.redis_database import database_name, redis_identity
from tests import jobs
from tests.servers import valkey_server

NAMESPACE = "nnnnnnnn"
ENDPOINT = f"ep{NAMESPACE}_" + "0" * 26
OURS = "flask_rq_webhooks.callbacks"
RQ_VERSION = tuple(int(part) for part in rq.VERSION.split(".")[:2]) if hasattr(rq, "VERSION") else (2, 0)


@contextmanager
def attached(endpoint: str = ENDPOINT, **options: Any) -> Iterator[Attachment]:
    attachment = Attachment(endpoint, endpoint, **options)
    reset = current_attachment.set(attachment)
    try:
        yield attachment
    finally:
        current_attachment.reset(reset)


@pytest.fixture
def _instrumented() -> Iterator[None]:
    job_callbacks.uninstrument()  # a host of an earlier test may have left it on
    original = rq.Queue.create_job
    job_callbacks.instrument()
    yield
    job_callbacks.uninstrument()
    assert rq.Queue.create_job is original


def stored_names(client: redis.Redis, job_id: str) -> list[str]:
    fields = ["success_callback_name", "failure_callback_name", "stopped_callback_name"]
    return [value.decode() for value in client.hmget(f"rq:job:{job_id}", fields) if value is not None]


def ours(user: str = "") -> list[str]:
    return [f"{OURS}.{kind}.{ENDPOINT}{user}" for kind in ("success", "failure", "stopped")]


# -- ways to enqueue ----------------------------------------------------------------------------------------


def decorated(queue: rq.Queue | str, **options: Any) -> Callable[..., Job]:
    @job_decorator(queue, **options)
    def function() -> None: ...

    return getattr(function, "enqueue", None) or function.delay  # type: ignore[attr-defined,no-any-return]


def in_a_group(queue: rq.Queue) -> list[Job]:
    from rq.group import Group

    group = Group.create(connection=queue.connection)
    return group.enqueue_many(
        queue, [Queue.prepare_data(jobs.add, (1, 2)), Queue.prepare_data(jobs.add, (3, 4))]
    )


def with_dependency(queue: rq.Queue) -> list[Job]:
    first = queue.enqueue(jobs.add, 1, 2)
    return [first, queue.enqueue(jobs.add, 3, 4, depends_on=first)]


def many_with_dependency(queue: rq.Queue) -> list[Job]:
    first = queue.enqueue(jobs.add, 1, 2)
    return [
        first,
        *queue.enqueue_many(
            [Queue.prepare_data(jobs.add, (1, 2)), Queue.prepare_data(jobs.add, depends_on=first)]
        ),
    ]


def look(
    redis_client: redis.Redis, attachment: Attachment, endpoint_id: str | None = None
) -> tuple[list[str], list[str], bool]:
    """Give the jobs that are there, those that are not, and whether any is there or on its way."""
    asked = replace(attachment, endpoint_id=endpoint_id or attachment.endpoint_id)
    existing, unseen = look_at_jobs(redis_client, asked, attachment.jobs)
    on_their_way = [job for job in attachment.jobs if job.id in unseen and was_handed_over(job)]
    return existing, unseen, bool(existing or on_their_way)


WAYS: dict[str, Callable[[rq.Queue], Any]] = {
    "enqueue": lambda queue: queue.enqueue(jobs.add, 1, 2),
    "enqueue with args": lambda queue: queue.enqueue("tests.jobs.add", args=(1, 2), kwargs={}),
    "enqueue_call": lambda queue: queue.enqueue_call(jobs.add, (1, 2), timeout=216_000),
    "enqueue_call by position": lambda queue: queue.enqueue_call(jobs.add, (1, 2), None, 7, 8, 9),
    "enqueue_in": lambda queue: queue.enqueue_in(timedelta(seconds=60), jobs.add, 1, 2),
    "enqueue_at": lambda queue: queue.enqueue_at(datetime(2099, 1, 1, tzinfo=UTC), jobs.add, 1, 2),
    "enqueue_many": lambda queue: queue.enqueue_many([Queue.prepare_data(jobs.add, (1, 2))] * 3),
    "enqueue_many with a dependency": many_with_dependency,
    "depends_on": with_dependency,
    "with meta and retry": lambda queue: queue.enqueue(jobs.add, 1, 2, meta={"a": 1}, retry=rq.Retry(2)),
    "at the front": lambda queue: queue.enqueue(jobs.add, 1, 2, at_front=True),
    "decorator with a queue": lambda queue: decorated(queue, connection=queue.connection)(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("instrumented", [False, True], ids=["our Queue", "instrumented"])
def test_ways_to_enqueue(
    way: Callable[[rq.Queue], Any],
    instrumented: bool,
    redis_client: redis.Redis,
    request: pytest.FixtureRequest,
) -> None:
    if instrumented:
        request.getfixturevalue("_instrumented")
    queue = (rq.Queue if instrumented else Queue)("default", connection=redis_client)
    with attached(reserved_job_id="reserved") as attachment:
        made = way(queue)
    made = made if isinstance(made, list) else [made]

    assert sorted(job.id for job in attachment.jobs) == sorted(job.id for job in made)
    assert "reserved" in {job.id for job in made}
    assert [stored_names(redis_client, job.id) for job in made] == [ours()] * len(made)
    existing, unseen, registered = look(redis_client, attachment)
    assert (sorted(existing), unseen, registered) == (sorted(job.id for job in made), [], True)


@pytest.mark.skipif(RQ_VERSION < (2, 0), reason="this RQ has no groups")
def test_groups(redis_client: redis.Redis) -> None:
    with attached() as attachment:
        made = in_a_group(Queue("default", connection=redis_client))

    assert [stored_names(redis_client, job.id) for job in made] == [ours(), ours()]
    assert len(attachment.jobs) == 2


def test_decorator_with_a_name_and_our_queue_class(redis_client: redis.Redis) -> None:
    enqueue = decorated("default", connection=redis_client, queue_class=Queue)
    with attached():
        job = enqueue()
    assert stored_names(redis_client, job.id) == ours()


def test_jobs_made_beside_the_queue_are_not_reached(redis_client: redis.Redis) -> None:
    """Documented: such jobs are for ``webhooks.watch``."""
    with attached() as attachment:
        job = Job.create(jobs.add, (1, 2), connection=redis_client)
        Queue("default", connection=redis_client).enqueue_job(job)

    assert stored_names(redis_client, job.id) == ["", "", ""]
    assert look(redis_client, attachment) == ([], [], False)


def test_users_callbacks_are_stored_in_the_name(redis_client: redis.Redis) -> None:
    with attached():
        job = Queue("default", connection=redis_client).enqueue(
            jobs.add,
            1,
            2,
            on_success=rq.Callback(jobs.note_success, timeout=9),
            on_failure=rq.Callback("a.b"),
        )

    success, failure, stopped = ours()
    assert stored_names(redis_client, job.id) == [
        f"{success}.tests.jobs.note_success",
        f"{failure}.a.b",
        stopped,
    ]
    assert redis_client.hget(f"rq:job:{job.id}", "success_callback_timeout") == b"9"


@pytest.mark.skipif(RQ_VERSION < (2, 10), reason="this RQ has no webhooks of its own")
def test_rqs_own_webhooks_stay(redis_client: redis.Redis) -> None:
    from rq.webhook import Webhook

    webhook = Webhook("https://example.com/hook", "finished")
    with attached():
        job = Queue("default", connection=redis_client).enqueue(jobs.add, 1, 2, webhooks=[webhook])

    stored = redis_client.hget(f"rq:job:{job.id}", "webhooks")
    assert [item["url"] for item in json.loads(stored)] == ["https://example.com/hook"]
    assert stored_names(redis_client, job.id) == ours()


# -- hosts that wrap enqueue themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("order", ["host first", "ours first"])
def test_host_wraps_enqueue_and_enqueue_call_and_saves_meta(
    order: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(name: str) -> None:
        inner = getattr(rq.Queue, name)

        @functools.wraps(inner)
        def host_hook(self: rq.Queue, *args: Any, **kwargs: Any) -> Job:
            job = inner(self, *args, **kwargs)
            job.meta = {"hook": name}
            job.save_meta()
            return job  # type: ignore[no-any-return]

        monkeypatch.setattr(rq.Queue, name, host_hook)

    if order == "ours first":
        job_callbacks.instrument()
    wrap("enqueue_call")
    wrap("enqueue")
    if order == "host first":
        job_callbacks.instrument()
    with attached() as attachment:
        job = rq.Queue("default", connection=redis_client).enqueue(jobs.add, 1, 2)
    job_callbacks.uninstrument()

    assert attachment.jobs == [job]
    assert stored_names(redis_client, job.id) == ours()
    assert Job.fetch(job.id, connection=redis_client).meta == {"hook": "enqueue"}


# -- jobs that were made and are not, or not any more, there ------------------------------------------------


@pytest.mark.skipif(not hasattr(rq.exceptions, "DuplicateJobError"), reason="this RQ has no unique=True")
def test_duplicate_is_neither_existing_nor_unseen(redis_client: redis.Redis) -> None:
    from rq.exceptions import DuplicateJobError

    queue = Queue("default", connection=redis_client)
    with attached("epnnnnnnnn_earlier"):
        queue.enqueue(jobs.add, 1, 2, job_id="nightly", unique=True)
    with attached() as attachment, pytest.raises(DuplicateJobError):
        queue.enqueue(jobs.add, 1, 2, job_id="nightly", unique=True)

    assert [job.id for job in attachment.jobs] == ["nightly"]
    assert look(redis_client, attachment) == ([], [], False)
    assert look(redis_client, attachment, "epnnnnnnnn_earlier") == (["nightly"], [], True)


@pytest.mark.parametrize("instrumented", [False, True], ids=["our queue", "instrumented"])
def test_redis_is_asked_about_what_rq_did_not_write_under_an_id_of_its_own(
    redis_client: redis.Redis, instrumented: bool, request: pytest.FixtureRequest
) -> None:
    if instrumented:
        request.getfixturevalue("_instrumented")
    queue = (rq.Queue if instrumented else Queue)("default", connection=redis_client)
    with attached() as attachment, redis_client.pipeline() as pipeline:
        written = queue.enqueue(jobs.add, 1, 2)
        waits = queue.enqueue(jobs.add, 1, 2, depends_on=written)
        named = queue.enqueue(jobs.add, 1, 2, job_id="nightly")
        unsent = queue.enqueue(jobs.add, 1, 2, pipeline=pipeline)
    with valkey_server() as other, client(other.url) as empty:
        assert look(empty, attachment)[:2] == ([written.id, waits.id], [named.id, unsent.id])
    assert look(redis_client, attachment)[:2] == ([written.id, waits.id, named.id], [unsent.id])


def test_same_id_enqueued_again_belongs_to_the_later_request(redis_client: redis.Redis) -> None:
    queue = Queue("default", connection=redis_client)
    with attached("epnnnnnnnn_earlier") as earlier:
        queue.enqueue(jobs.add, 1, 2, job_id="nightly")
    with attached() as later:
        queue.enqueue(jobs.add, 1, 2, job_id="nightly")
        queue.enqueue(jobs.add, 1, 2, job_id="nightly")

    assert look(redis_client, later) == (["nightly"], [], True)
    assert look(redis_client, earlier) == ([], [], False)


@pytest.mark.parametrize(
    "way",
    [
        lambda queue, pipe: queue.enqueue(jobs.add, 1, 2, pipeline=pipe),
        lambda queue, pipe: queue.enqueue_call(jobs.add, (1, 2), pipeline=pipe),
        lambda queue, pipe: queue.enqueue_in(timedelta(seconds=60), jobs.add, pipeline=pipe),
        lambda queue, pipe: queue.enqueue_many([Queue.prepare_data(jobs.add, (1, 2))], pipeline=pipe)[0],
    ],
    ids=["enqueue", "enqueue_call", "enqueue_in", "enqueue_many"],
)
def test_pipeline_that_is_executed_later(
    way: Callable[[rq.Queue, Any], Job], redis_client: redis.Redis
) -> None:
    with attached(reserved_job_id="reserved") as attachment, redis_client.pipeline() as pipe:
        way(Queue("default", connection=redis_client), pipe)
        before = look(redis_client, attachment)
        pipe.execute()

    assert before == ([], ["reserved"], True)
    assert look(redis_client, attachment) == (["reserved"], [], True)


def test_job_that_was_only_made(redis_client: redis.Redis) -> None:
    with attached() as attachment:
        job = Queue("default", connection=redis_client).create_job(jobs.add, (1, 2))

    assert look(redis_client, attachment) == ([], [job.id], False)


def test_nothing_was_made(redis_client: redis.Redis) -> None:
    with attached() as attachment:
        pass
    assert look(redis_client, attachment) == ([], [], False)


@pytest.mark.filterwarnings("ignore:.*(push|pop)_connection.*:DeprecationWarning")
@pytest.mark.parametrize("result_ttl", [None, 0])
def test_synchronous_queue(result_ttl: int | None, redis_client: redis.Redis) -> None:
    with attached() as attachment:
        queue = Queue("default", connection=redis_client, is_async=False)
        job = queue.enqueue(jobs.run, "basin-7", result_ttl=result_ttl)
        # RQ had written it, so its ending is reported, also where it is gone by now.
        assert look(redis_client, attachment) == ([job.id], [], True)

    assert redis_client.exists(f"rq:job:{job.id}") == (result_ttl != 0)
    (entry,) = Outbox(redis_client, NAMESPACE).read("reader", 10, 0)
    assert entry.entry is not None
    assert (entry.entry.kind, entry.entry.job_id, entry.entry.runid) == ("success", job.id, "basin-7")


@pytest.mark.filterwarnings("ignore:.*(push|pop)_connection.*:DeprecationWarning")
def test_synchronous_failure_with_the_users_callback(redis_client: redis.Redis) -> None:
    with attached():
        queue = Queue("default", connection=redis_client, is_async=False)
        job = queue.enqueue(jobs.fail, "no", on_failure=rq.Callback(jobs.note_failure))

    assert redis_client.lrange("noted", 0, -1) == [f"failure {job.id} ValueError no traceback".encode()]
    (entry,) = Outbox(redis_client, NAMESPACE).read("reader", 10, 0)
    assert entry.entry is not None
    assert entry.entry.error is not None
    assert entry.entry.error["message"] == "no"


def test_many_jobs_are_looked_at_in_few_round_trips(redis_client: redis.Redis) -> None:
    with attached() as attachment:
        queue = Queue("default", connection=redis_client)
        queue.enqueue_many([Queue.prepare_data(jobs.add, (1, 2))] * 700)
        ghosts = [queue.create_job(jobs.add, (1, 2)) for _number in range(5)]

    existing, unseen, registered = look(redis_client, attachment)
    assert (len(existing), unseen, registered) == (700, [job.id for job in ghosts], True)


# -- databases ----------------------------------------------------------------------------------------------


@contextmanager
def client(url: str, **options: Any) -> Iterator[redis.Redis]:
    connection = redis.Redis.from_url(url, **options)
    try:
        yield connection
    finally:
        connection.close()


def test_one_database_under_several_names(tmp_path: Path) -> None:
    with valkey_server(unixsocket=str(tmp_path / "s")) as server:
        by_name = f"redis://localhost:{server.port}/0"
        by_socket = f"unix://{tmp_path / 's'}?db=0"
        with client(server.url) as one, client(by_name) as two, client(by_socket) as three:
            assert redis_identity(one) == redis_identity(three) != None  # noqa: E711
            same = SameDatabase(one)
            assert [same(one), same(two), same(three), same(three)] == [True] * 4
            with (
                client(server.url.replace("/0", "/1")) as other,
                client(by_socket.replace("=0", "=1")) as another,
            ):
                assert [same(other), same(another)] == [False, False]
                assert redis_identity(other) != redis_identity(one)


def test_restarted_server_is_still_the_same(tmp_path: Path) -> None:
    with (
        valkey_server(unixsocket=str(tmp_path / "s")) as server,
        client(server.url) as one,
        client(f"unix://{tmp_path / 's'}?db=0") as two,
    ):
        same = SameDatabase(one)
        before = redis_identity(one)
        server.stop()
        server.start()
        assert same(two)
        assert redis_identity(one) != before


def test_two_servers(redis_client: redis.Redis) -> None:
    with valkey_server() as server, client(server.url) as other:
        assert SameDatabase(redis_client)(other) is False


def test_server_that_may_not_be_asked(redis_url: str, redis_client: redis.Redis) -> None:
    """Without INFO the addresses have to be equal."""
    redis_client.acl_setuser(
        "shy", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=["-info"]
    )
    try:
        shy = redis_url.replace("redis://", "redis://shy:x@")
        with client(shy) as connection, client(shy.replace("127.0.0.1", "localhost")) as alias:
            assert redis_identity(connection) is None
            assert SameDatabase(redis_client)(connection) is True
            assert SameDatabase(redis_client)(alias) is True
            with client(shy.replace("/0", "/1")) as other:
                assert SameDatabase(redis_client)(other) is False
            assert "shy" not in database_name(connection)
    finally:
        redis_client.acl_deluser("shy")


def test_configured_server_that_is_not_there(
    redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The usual mistake: RQ_WEBHOOKS_REDIS_URL was not set, and nothing listens at its default."""
    job_callbacks._refused_databases.clear()
    with client("redis://127.0.0.1:1/0", retry=None, socket_connect_timeout=1) as configured:
        for _request in range(2):
            with attached(same_database=SameDatabase(configured)) as attachment:
                job = Queue("default", connection=redis_client).enqueue(jobs.add, 1, 2)
            assert attachment.refused
            assert stored_names(redis_client, job.id) == ["", "", ""]

    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    port = redis_client.connection_pool.connection_kwargs["port"]
    assert record.getMessage() == (
        f"Jobs are enqueued in redis://localhost:{port}/0, but flask_rq_webhooks is configured for "
        "redis://localhost:1/0. They run without webhooks. "
        "Set RQ_WEBHOOKS_REDIS_URL to the database your queues use."
    )


def test_queue_whose_server_is_not_there(redis_client: redis.Redis) -> None:
    with (
        client("redis://127.0.0.1:1/0", retry=None, socket_connect_timeout=1) as gone,
        attached(same_database=SameDatabase(redis_client)) as attachment,
        pytest.raises(redis.ConnectionError),
    ):
        Queue("default", connection=gone).enqueue(jobs.add, 1, 2)
    assert attachment.refused is False


def test_fakeredis() -> None:
    server = fakeredis.FakeServer()
    one, two = fakeredis.FakeRedis(server=server), fakeredis.FakeRedis(server=server)
    other_number = fakeredis.FakeRedis(server=server, db=1)
    elsewhere, nameless = fakeredis.FakeRedis(server=fakeredis.FakeServer()), fakeredis.FakeRedis()
    try:
        same = SameDatabase(one)
        assert [same(one), same(two)] == [True, True]
        assert [same(other_number), same(elsewhere), same(nameless)] == [False, False, False]
        assert SameDatabase(nameless)(nameless)
        assert database_name(one).startswith("fakeredis server ")
    finally:
        for connection in (one, two, other_number, elsewhere, nameless):
            connection.close()
