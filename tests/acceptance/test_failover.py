"""A failover under load: open connections still lead to the first server, which takes no writes any more."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
import redis
import sqlalchemy as sa
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError, ReadOnlyError
from redis.retry import Retry

from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.storage.models import Event
from tests.acceptance.conftest import SECRET, Stack, running_stack
from tests.acceptance.test_postgres_outage import Client, count
from tests.servers import (
    Forwarder,
    PostgresHandle,
    execute,
    postgres_server,
    rq_worker,
    valkey_server,
    wait_until,
)

#: Seconds after which the first request has to be accepted again, and the first webhook to arrive.
BACK_S = 5.0


def socket_of(server: PostgresHandle) -> str:
    return f"{sa.make_url(server.url()).query['host']}/.s.PGSQL.5432"


def _not_of_a_backup(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(("postmaster.", ".s.PGSQL", ".handle"))]


@contextmanager
def standby_of(primary: PostgresHandle) -> Iterator[PostgresHandle]:
    """Run a second server that follows *primary* synchronously."""
    folder = Path(tempfile.mkdtemp(prefix="rqw-standby-"))
    target = folder / "data"
    with psycopg.connect(primary.url().replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SELECT pg_backup_start('standby', true)")
        shutil.copytree(primary.data_dir, target, ignore=_not_of_a_backup)
        (label,) = connection.execute("SELECT labelfile FROM pg_backup_stop(false)").fetchone() or ("",)
    (target / "backup_label").write_text(label)
    (target / "standby.signal").touch()
    with (target / "postgresql.auto.conf").open("a") as configuration:
        configuration.write(f"primary_conninfo = 'host={primary.data_dir} user=postgres'\n")
    owner = primary.data_dir.stat()
    for path in (folder, target, *target.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    standby = PostgresHandle(target)
    standby.start()
    try:
        execute(primary.url(), "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        yield standby
    finally:
        standby.stop(immediately=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def primary() -> Iterator[PostgresHandle]:
    with postgres_server() as server:
        yield server


def test_a_failover_under_load_is_five_seconds_and_loses_nothing(
    primary: PostgresHandle, redis_url: str, redis_client: redis.Redis
) -> None:
    name = sa.make_url(primary.new_database()).database
    with standby_of(primary) as standby, Forwarder(socket_of(primary)) as forwarder:
        url = f"postgresql+psycopg://postgres@127.0.0.1:{forwarder.port}/{name}"
        with running_stack(redis_url, url, redis_client) as stack:
            dispatcher = stack.start_dispatcher()
            stack.start_worker(worker_class="rq.SimpleWorker")  # a fork for each job may take a second
            clients = [Client(stack, pause_s=0.05) for _ in range(3)]
            for client in clients:  # also where this test fails
                stack.cleanup.callback(client.stop)
            stack.receiver.wait_for(20)

            execute(
                primary.url(),
                "ALTER SYSTEM SET default_transaction_read_only = on",
                "SELECT pg_reload_conf()",
            )
            execute(standby.url(), "SELECT pg_promote()")
            forwarder.path = socket_of(standby)
            for _ in range(10):  # who takes a primary out of service ends what waits there for its standby
                execute(
                    primary.url(),
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'",
                )
                time.sleep(0.05)
            back_soon_and_nothing_lost(stack, clients)
            assert "Traceback" not in dispatcher.output


def back_soon_and_nothing_lost(stack: Stack, clients: list[Client]) -> None:
    """Check what clients and receiver see after a switch that was made a moment ago."""
    switched, arrived = time.monotonic(), len(stack.receiver.received)

    def accepted_again() -> bool:
        return any(
            status == 200 and began > switched
            for client in clients
            for began, status, _took_s, _job_id in client.answers
        )

    wait_until(accepted_again, timeout=BACK_S, what="accepted again")
    # What was under way at the moment of the switch is not counted.
    wait_until(lambda: len(stack.receiver.received) > arrived + 3, timeout=BACK_S, what="sent again")
    time.sleep(2)
    for client in clients:
        client.stop()
    answers = Counter(status for client in clients for _, status, _, _ in client.answers)
    assert set(answers) <= {200, 503}, answers
    accepted = set().union(*(client.accepted for client in clients))
    assert len(accepted) > 20
    wait_until(
        lambda: accepted <= {received.json["job_id"] for received in stack.receiver.received},
        timeout=40,
        what="every accepted job reported",
    )
    by_job = Counter(
        (received.json["job_id"], verify(received.body, received.headers, SECRET).id)
        for received in stack.receiver.received
    )
    assert len({job_id for job_id, _ in by_job}) == len(by_job), "one webhook-id for each job"
    assert count(stack, sa.select(sa.func.count(Event.id))) == len(accepted)


class FollowingRedis(redis.Redis):
    """A host's client that follows a failover, made as docs/operations.rst says."""

    @classmethod
    def from_url(cls, url: str, **options: Any) -> FollowingRedis:
        """Return a client that opens a new connection where the old one leads to a replica."""
        options["retry"] = Retry(ConstantBackoff(0.2), 25)
        options["retry_on_error"] = [ConnectionError, ReadOnlyError]
        return cast(FollowingRedis, super().from_url(url, **options))


class Supervised:
    """A stock worker that is started again whenever it ends, as under systemd."""

    def __init__(self, url: str) -> None:
        self._url, self._ended = url, threading.Event()
        self._thread = threading.Thread(target=self._keep_running)

    def _keep_running(self) -> None:
        while not self._ended.is_set():
            follow = ("--connection-class", f"{__name__}.FollowingRedis")
            with rq_worker(self._url, worker_class="rq.SimpleWorker", options=follow) as worker:
                while worker.popen.poll() is None and not self._ended.wait(0.05):
                    pass

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_exc: object) -> None:
        self._ended.set()
        self._thread.join(30)


def test_a_failover_of_redis_under_load_is_five_seconds_and_loses_nothing(sqlite_url: str) -> None:
    with (
        valkey_server(save="", appendonly="no") as first,
        valkey_server(save="", appendonly="no", replicaof=f"127.0.0.1 {first.port}") as second,
        Forwarder(first.port) as forwarder,
        redis.Redis.from_url(first.url) as old,
        redis.Redis.from_url(second.url) as new,
    ):
        url = f"redis://127.0.0.1:{forwarder.port}/0"
        wait_until(lambda: new.info("replication")["master_link_status"] == "up", what="replication")
        with running_stack(url, sqlite_url, new, TEST_REDIS=FollowingRedis) as stack, Supervised(url):
            dispatcher = stack.start_dispatcher()
            clients = [Client(stack, pause_s=0.05) for _ in range(3)]
            for client in clients:  # also where this test fails
                stack.cleanup.callback(client.stop)
            stack.receiver.wait_for(20)

            old.execute_command("FAILOVER")  # type: ignore[no-untyped-call]
            wait_until(lambda: new.info("replication")["role"] == "master", what="the replica to take over")
            forwarder.path = second.port
            back_soon_and_nothing_lost(stack, clients)
            assert old.info("replication")["role"] == "slave"
            assert "Traceback" not in dispatcher.output
