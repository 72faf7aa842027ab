"""Erase: the content is in no table, file, page or answer; the log stays and says so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flask_rq_webhooks import Queue
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.storage import retention
from tests.acceptance import tasks
from tests.integration.hosts import Host
from tests.servers import Receiver

RESULT, ANSWER, HEADER, REFERENCE = "result-c0ffee", "answer-c0ffee", "header-c0ffee", "reference-c0ffee"
TABLES = ("endpoint", "watch", "event", "delivery", "attempt", "secret")


@pytest.fixture
def host(database_url: str, redis_url: str) -> Iterator[Host]:
    made = Host(database_url, redis_url, RQ_WEBHOOKS_ALLOW_HTTP=True)
    queue = Queue("default", connection=made.redis, is_async=False)

    def build(runid: str) -> Any:
        return {"job_id": queue.enqueue(tasks.run_model, kwargs={"runid": RESULT + runid}).id}

    made.route(build, "/runs/<runid>/job")
    yield made
    made.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(lambda received: (200, {"X-Request-Id": ANSWER}, ANSWER.encode())) as server:
        yield server


def submit(host: Host, receiver: Receiver, runid: str = "r1", *, deliver: bool = True) -> str:
    fields = {
        "webhook_url": receiver.url, "webhook_secret": "s", "webhook_headers": {"X-Own": HEADER},
        "webhook_reference": REFERENCE + runid,
    }  # fmt: skip
    response = host.post(f"/runs/{runid}/job", json=fields)
    assert response.headers["Webhook-Registered"] == "true", response.text
    if deliver:
        Dispatcher(host.state).run(burst=True)
    return str(response.get_json()["job_id"])


def erase(host: Host, **what: str) -> Any:
    response = host.app.test_client().post("/webhooks/api/erase", json=what)
    return response.get_json() if response.status_code == 200 else response


@pytest.fixture
def dump(request: pytest.FixtureRequest, database_url: str) -> Callable[[], bytes]:
    """Give a function that makes a backup of the database."""

    def make() -> bytes:
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as connection:
            return "\n".join(connection.iterdump()).encode()

    if database_url.startswith("sqlite"):
        return make
    return partial(request.getfixturevalue("postgres").dump, database_url)


def files_of(database_url: str) -> bytes:
    """Return the bytes of the database's files; on PostgreSQL after a vacuum and a checkpoint."""
    if database_url.startswith("sqlite"):
        files = list(Path(database_url.removeprefix("sqlite:///")).parent.glob("host.db*"))
    else:
        engine = sa.create_engine(database_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql("VACUUM FULL")
            connection.exec_driver_sql("CHECKPOINT")
            folder, oid = connection.exec_driver_sql(
                "SELECT current_setting('data_directory'), oid FROM pg_database "
                "WHERE datname = current_database()"
            ).one()
        files = list((Path(folder) / "base" / str(oid)).glob("[0-9]*"))  # tables and indexes
    return b"".join(path.read_bytes() for path in files)


def everything(host: Host) -> str:
    return repr([host.rows(table) for table in TABLES])


@pytest.mark.parametrize("field", ["job_id", "runid", "reference"])
def test_the_content_is_gone_and_the_log_stays(
    host: Host, receiver: Receiver, database_url: str, dump: Callable[[], bytes], field: str
) -> None:
    job_id = submit(host, receiver)
    kept = submit(host, receiver, "r2")
    assert RESULT + "r1" in receiver.received[0].body.decode()
    before = everything(host)
    assert RESULT + "r1" in before
    assert ANSWER in before

    did = erase(host, **{field: {"job_id": job_id, "runid": "r1", "reference": REFERENCE + "r1"}[field]})

    assert did == {"events": 1, "canceled": 0, "in_flight": 0, "running": 0}
    for after in (everything(host).encode(), dump(), files_of(database_url)):
        assert (RESULT + "r1").encode() not in after
        assert (REFERENCE + "r1").encode() not in after
        assert (RESULT + "r2").encode() in after  # another job's

    client = host.app.test_client()
    (delivery,) = client.get("/webhooks/api/deliveries", query_string={"job_id": job_id}).get_json()["items"]
    assert (delivery["status"], delivery["attempts"]) == ("succeeded", 1)
    assert delivery["erased_at"] is not None
    detail = client.get(f"/webhooks/api/deliveries/{delivery['id']}").text
    page = client.get(f"/webhooks/deliveries/{delivery['id']}").text
    feed = client.get("/webhooks/api/events").get_json()["items"]
    for text in (detail, page, client.get(f"/webhooks/events/{delivery['event_id']}").text):
        assert "c0ffee" not in text
        assert "erased" in text
    assert [event["payload"] is None for event in feed] == [True, False]
    assert client.get(f"/webhooks/jobs/{kept}").get_json()["delivery_status"] == "succeeded"


def test_what_is_erased_is_not_sent_again(host: Host, receiver: Receiver) -> None:
    job_id = submit(host, receiver)
    erase(host, job_id=job_id)
    client = host.app.test_client()
    (delivery,) = host.rows("delivery")
    refused = client.post(f"/webhooks/api/deliveries/{delivery['id']}/resend", json={})
    assert (refused.status_code, refused.get_json()["error"]["code"]) == (409, "erased")
    client.post("/webhooks/api/recover", json={"status": ["succeeded"], "all": True})
    Dispatcher(host.state).run(burst=True)
    assert len(receiver.received) == 1
    assert erase(host, job_id=job_id)["events"] == 0


def test_pending_deliveries_are_canceled_first(host: Host, receiver: Receiver) -> None:
    receiver.respond = lambda received: 503
    job_id = submit(host, receiver)
    assert host.rows("delivery")[0]["status"] == "pending"
    assert erase(host, job_id=job_id) == {"events": 1, "canceled": 1, "in_flight": 0, "running": 0}
    (delivery,) = host.rows("delivery")
    assert (delivery["status"], bytes(delivery["body"])) == ("canceled", b"")


def test_what_is_being_sent_is_erased_afterwards(host: Host, receiver: Receiver) -> None:
    """The sender may still record an answer: until then the event counts as in flight."""
    job_id = submit(host, receiver)
    with host.state.database.write() as connection:
        lease = host.state.database.clock(60)
        connection.execute(
            retention.update(retention.Delivery).values(status="sending", lease_id="l", lease_until=lease)
        )
    assert erase(host, job_id=job_id) == {"events": 0, "canceled": 1, "in_flight": 1, "running": 0}
    with host.state.database.write() as connection:
        connection.execute(retention.update(retention.Delivery).values(lease_id=None, lease_until=None))
    assert erase(host, job_id=job_id) == {"events": 1, "canceled": 0, "in_flight": 0, "running": 0}
    assert ANSWER not in everything(host)


@pytest.mark.parametrize("what", [{}, {"job_id": "a", "runid": "b"}, {"user": "x"}, {"job_id": ""}])
def test_input_that_is_refused_erases_nothing(host: Host, receiver: Receiver, what: dict[str, str]) -> None:
    submit(host, receiver)
    assert erase(host, **what).status_code == 400
    assert RESULT in everything(host)


def test_the_command(host: Host, receiver: Receiver) -> None:
    submit(host, receiver)
    runner = host.app.test_cli_runner()
    result = runner.invoke(args=["rq-webhooks", "erase", "--runid", "r1"])
    assert result.output == "1 events erased; 0 of their deliveries were unfinished and are canceled.\n"
    assert runner.invoke(args=["rq-webhooks", "erase"]).exit_code != 0


def test_bodies_may_go_earlier_than_the_log(host: Host, receiver: Receiver) -> None:
    submit(host, receiver)
    assert retention.erase_finished(host.state.database, datetime.now(UTC) - timedelta(hours=1)) == 0
    assert RESULT in everything(host)
    assert retention.erase_finished(host.state.database, datetime.now(UTC) + timedelta(seconds=5)) == 1
    after = everything(host)
    assert RESULT not in after
    assert ANSWER not in after
    assert host.rows("delivery")[0]["status"] == "succeeded"


def die_in_the_middle(database_url: str, redis_url: str, runid: str) -> None:
    host = Host(database_url, redis_url)
    erase_deliveries = retention._erase_deliveries

    def die(*args: Any) -> None:
        erase_deliveries(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    retention._erase_deliveries = die
    retention.erase(host.state.database, runid=runid)


def test_a_kill_in_the_middle_leaves_nothing_half_erased(
    host: Host, receiver: Receiver, database_url: str, redis_url: str
) -> None:
    submit(host, receiver)
    before = everything(host)
    child = multiprocessing.get_context("spawn").Process(
        target=die_in_the_middle, args=(database_url, redis_url, "r1")
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert everything(host) == before
    assert erase(host, runid="r1")["events"] == 1
    assert RESULT not in everything(host)
