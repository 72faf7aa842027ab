"""What a Redis writer, an ACL or a failover does to a running dispatcher, with real servers."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import re
import resource
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
import rq

from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.errors import RQWebhooksError
from flask_rq_webhooks.queue.redis_database import connect
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import confirm
from flask_rq_webhooks.web.monitoring import everywhere, reports_are_stuck
from tests.pipeline import add_endpoint, callbacks, enqueue, open_state, running_dispatcher
from tests.security.test_rule_pickles import ATTACKS
from tests.servers import Forwarder, Receiver, valkey_server, wait_until

NOW = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def watched(state: State, endpoint_id: str, job_id: str, **fields: Any) -> None:
    """Write the hash of a job that ended, and the watch that waits for it."""
    confirm(state.database, endpoint_id, existing=[job_id], unseen=[], reserved_job_id=None)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # runs that began before the watch do not count
    written = {"status": "finished", "created_at": now, "enqueued_at": now, "ended_at": now, "origin": "q"}
    state.redis.hset(f"rq:job:{job_id}", mapping={**written, **fields})  # type: ignore[arg-type]


def test_attacks_in_every_field_hold_no_other_job_up(
    database_url: str, redis_url: str, receiver: Receiver
) -> None:
    bomb = zlib.compress(b"]" * 10**8, 9)
    with open_state(database_url, redis_url, reconcile_interval=0.3) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        with running_dispatcher(state):  # imports, threads and connections are no part of what is measured
            enqueue(state, endpoint_id, "tests.jobs.add", 0, 0)
            receiver.wait_for(1)
        # What a few bytes can do; those of megabytes take their own size while they are read.
        small = [attack for attack in ATTACKS.values() if len(attack) < 2**17]
        attacks = [*small, bomb, b"\x80\x04" + bomb]
        for number, attack in enumerate(attacks):
            name = f"bad-{number}"
            watched(state, endpoint_id, name, data=zlib.compress(attack), meta=attack)
            fields: Any = {"type": "1", "return_value": b64encode(attack)}
            state.redis.xadd(f"rq:results:{name}", fields)
            watched(state, endpoint_id, f"{name}-plain", data=bomb, exc_info=bomb, status="failed")
            state.redis.xadd(f"rq:results:{name}-plain", {"type": "2", "exc_string": b64encode(bomb)})
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with running_dispatcher(state):
            for number in range(4):
                began = time.monotonic()
                job_id = enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", number, 1)
                wait_until(lambda wanted=job_id: wanted in {got.json["job_id"] for got in receiver.received})
                assert time.monotonic() - began < 5
            expected = {f"bad-{number}" for number in range(len(attacks))}
            wait_until(lambda: expected <= {got.json["job_id"] for got in receiver.received}, timeout=60)
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
        assert grown_mb < 30


def entry(state: State, job_id: str, **changed: Any) -> str:
    fields = {
        "v": 1, "kind": "success", "endpoint": f"ep{state.namespace}_all", "job_id": job_id, "run": NOW,
        "at": time.time(), "func": None, "queue": None, "created_at": NOW, "enqueued_at": NOW,
        "started_at": NOW, "runid": None, "retries_left": None, "result": None, "result_truncated": False,
        "error": None,
    }  # fmt: skip
    return json.dumps({**fields, **changed})


def a_set(state: State, endpoint_id: str) -> None:
    state.redis.sadd("rq:job:x:dependents", "y")
    state.redis.xadd(state.outbox.key, {"entry": entry(state, "x:dependents")})
    state.redis.xadd(state.outbox.key, {"entry": entry(state, "x:dependents", endpoint=endpoint_id)})


def time_that_overflows(state: State, endpoint_id: str) -> None:
    far = "0001-01-01T00:00:00+23:59"
    state.redis.hset("rq:job:far", mapping={"status": "finished", "created_at": NOW, "enqueued_at": far})
    state.redis.xadd(state.outbox.key, {"entry": entry(state, "far")})
    state.redis.xadd(state.outbox.key, {"entry": entry(state, "far", run="9999-12-31T23:59:59.999999Z")})
    state.redis.xadd(state.outbox.key, {"entry": entry(state, "far", run="0001-01-01T00:00:00.000000Z")})
    watched(state, endpoint_id, "far-2", enqueued_at=far, ended_at=far, started_at=far)


def watched_job_of_another_type(state: State, endpoint_id: str) -> None:
    for job_id, write in {
        "text": lambda key: state.redis.set(key, "x"),
        "list": lambda key: state.redis.rpush(key, "x"),
    }.items():
        write(f"rq:job:{job_id}")
        confirm(state.database, endpoint_id, existing=[job_id], unseen=[], reserved_job_id=None)


def broken_hashes(state: State, endpoint_id: str) -> None:
    watched(state, endpoint_id, "no-time", created_at="yesterday")
    watched(state, endpoint_id, "nonsense", status=b"\xff\xfe", retries_left="9" * 5000, origin=b"\0\0")
    watched(state, endpoint_id, "no-result")
    state.redis.set("rq:results:no-result", "text")
    watched(state, endpoint_id, "result-of-the-far-future", status="failed")
    state.redis.xadd("rq:results:result-of-the-far-future", {"type": "2"}, id="18446744073709551615-0")
    meta = {"jobs:1,func:x": ["\ud800", "a\0b", "", "y" * 10**5], "runid": "a\0b\ud800"}
    watched(state, endpoint_id, "impossible-ids", meta=pickle.dumps(meta, 5))


@pytest.mark.parametrize("break_it", [a_set, time_that_overflows, watched_job_of_another_type, broken_hashes])
def test_one_broken_job_is_set_aside_and_the_others_go_on(
    break_it: Callable[[State, str], None],
    database_url: str,
    redis_url: str,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_state(database_url, redis_url, reconcile_interval=0.2) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        break_it(state, endpoint_id)
        with running_dispatcher(state):
            for number in range(2):
                job_id = enqueue(state, endpoint_id, "tests.jobs.add", number, 1)
                wait_until(
                    lambda wanted=job_id: wanted in {got.json["job_id"] for got in receiver.received},
                    timeout=5,
                )
            # Nobody reports this one: reconcile finds it beside the broken ones.
            unreported = enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 5, 1)
            wait_until(lambda: unreported in {got.json["job_id"] for got in receiver.received}, timeout=10)
            silent = f"silent-{break_it.__name__}"
            watched(state, endpoint_id, silent)
            wait_until(lambda: silent in {got.json["job_id"] for got in receiver.received}, timeout=15)
            wait_until(lambda: state.outbox.length() == 0, timeout=15)
        assert "unexpected error" not in caplog.text


def test_workers_that_cannot_write_our_key_are_noticed(
    sqlite_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        valkey_server(save="", appendonly="no") as server,
        open_state(sqlite_url, server.url, reconcile_interval=0.3) as state,
    ):
        state.redis.execute_command(  # type: ignore[no-untyped-call]
            "ACL", "SETUSER", "worker", "on", ">pw", "~rq:*", "&rq:*", "+@all"
        )
        worker = redis.Redis(port=server.port, username="worker", password="pw")
        endpoint_id = add_endpoint(state, receiver.url)
        with running_dispatcher(state):
            for number in range(3):
                job_id = f"job-{number}"
                ours = {name: rq.Callback(path) for name, path in callbacks(endpoint_id).items()}
                queue = rq.Queue(connection=worker, is_async=False)
                queue.enqueue_job(queue.create_job("tests.jobs.add", args=(1, 2), job_id=job_id, **ours))
                confirm(state.database, endpoint_id, existing=[job_id], unseen=[], reserved_job_id=None)
            receiver.wait_for(3)
            wait_until(lambda: "~rq_webhooks:*" in caplog.text)
            assert "Redis refuses its user 'worker' the key" in caplog.text
        assert state.outbox.silent_callbacks() == 3
        assert any("~rq_webhooks:*" in alarm.advice for alarm in everywhere(state))
        worker.close()


@pytest.mark.parametrize("report", ["is unread", "is missing"])
def test_reports_that_are_unread_are_not_missing_and_missing_ones_are_no_fault_of_the_acl(
    database_url: str, redis_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture, report: str
) -> None:
    with open_state(database_url, redis_url, reconcile_interval=0.3) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        state.outbox.read("dispatcher-that-dies", 1, 0)
        for number in range(3):
            enqueue(state, endpoint_id, "tests.jobs.add", number, 1)
        if report == "is unread":
            assert len(state.outbox.read("dispatcher-that-dies", 10, 0)) == 3
        else:
            state.redis.xtrim(state.outbox.key, 0)
        with running_dispatcher(state):
            receiver.wait_for(3)
            assert {got.json["source"] for got in receiver.received} == {"reconciled"}
            time.sleep(1)
        silent = 3 if report == "is missing" else 0
        assert state.outbox.silent_callbacks() == silent
        assert ("without a callback report in the outbox: it was not written" in caplog.text) == bool(silent)
        assert "ACL" not in caplog.text
        assert "NOPERM" not in caplog.text


@contextmanager
def failed_over() -> Iterator[tuple[redis.Redis, redis.Redis]]:
    """Give a client of ours whose open connection leads to what is a replica now, and one of the primary.

    New connections lead to the primary, as after a failover behind one name.
    """
    with (
        valkey_server(save="", appendonly="no") as first,
        valkey_server(save="", appendonly="no") as second,
        Forwarder(first.port) as forwarder,
        redis.Redis.from_url(second.url) as primary,
        redis.Redis.from_url(first.url) as replica,
    ):
        client = connect(f"redis://127.0.0.1:{forwarder.port}/0")
        assert client.set("key", 1)
        replica.execute_command("REPLICAOF", "127.0.0.1", str(second.port))  # type: ignore[no-untyped-call]
        forwarder.path = second.port
        yield client, primary
        client.close()


def test_connection_that_answered_readonly_is_not_used_again() -> None:
    with failed_over() as (client, primary):
        assert client.set("key", 2)
        assert primary.get("key") == b"2"


def test_readonly_within_a_pipeline_is_noticed_too() -> None:
    with failed_over() as (client, primary):
        with client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.incr("number")
            assert pipeline.execute()[1] == 1
        assert primary.get("number") == b"1"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (SystemExit(3), "called sys.exit(3)"),
        (asyncio.CancelledError(), "raised CancelledError"),
        (GeneratorExit(), "raised GeneratorExit"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_hook_that_would_end_its_thread_ends_the_dispatcher_with_the_reason(
    sqlite_url: str, redis_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture,
    raised: BaseException, said: str,
) -> None:  # fmt: skip
    def scrub(payload: dict[str, Any]) -> dict[str, Any]:
        raise raised

    with open_state(sqlite_url, redis_url) as state:
        state.hooks.scrub_function = scrub  # type: ignore[misc]
        enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
        with pytest.raises(RQWebhooksError, match=re.escape(f"{said} during 'ingest'")):
            Dispatcher(state).run()
        assert state.outbox.length() == 1  # nothing is lost
    assert type(raised).__name__ in caplog.text


def test_health_is_not_ok_while_nothing_comes_of_what_is_read(sqlite_url: str, redis_url: str) -> None:
    with open_state(sqlite_url, redis_url) as state:
        assert not reports_are_stuck(state)
        long_ago = int((time.time() - 90) * 1000)
        state.redis.xadd(state.outbox.key, {"entry": "{}"}, id=f"{long_ago}-0")
        assert reports_are_stuck(state)
        assert any(alarm.severe and "nothing comes" in alarm.text for alarm in everywhere(state))


def test_a_refusal_of_redis_is_no_sign_of_life(
    sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flask_rq_webhooks.dispatch import dispatcher

    monkeypatch.setattr(dispatcher, "STUCK_S", 0.3)
    monkeypatch.setattr(dispatcher, "HEARTBEAT_S", 0.1)
    with open_state(sqlite_url, redis_url) as state, caplog.at_level(logging.ERROR):
        state.redis.set(state.outbox.key, "not a stream")
        with running_dispatcher(state):
            wait_until(lambda: "No heartbeat: ingest" in caplog.text)


def test_an_event_that_cannot_be_stored_holds_no_other_of_its_page_up(
    sqlite_url: str, redis_url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    with open_state(sqlite_url, redis_url, reconcile_interval=0.2) as state:
        endpoint_id = add_endpoint(state, receiver.url)
        for number in range(5):
            watched(state, endpoint_id, f"job-{number}")
        with state.database.write() as connection:
            connection.exec_driver_sql(
                "CREATE TRIGGER refuse BEFORE INSERT ON rq_webhooks_event WHEN new.job_id = 'job-2' "
                "BEGIN SELECT RAISE(ABORT, 'refused by a test'); END"
            )
        with running_dispatcher(state):
            wait_until(lambda: {got.json["job_id"] for got in receiver.received} >= {"job-0", "job-4"})
            wait_until(lambda: "event of job 'job-2' cannot be stored" in caplog.text)
        assert {got.json["job_id"] for got in receiver.received} == {"job-0", "job-1", "job-3", "job-4"}
