"""Heartbeats, the pause switch, the reconcile lease and the namespace."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from flask_rq_webhooks.errors import ConfigurationError
from flask_rq_webhooks.storage import database as database_module
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import (
    dispatcher_alive,
    drop_reconcile_lease,
    forget_dead,
    heartbeat,
    pause,
    paused_since,
    resume,
    shared_namespace,
    sign_off,
    take_reconcile_lease,
)
from flask_rq_webhooks.storage.models import SHARED, Dispatcher
from tests.storage_rows import new_endpoint, row, rows, set_values


def test_the_namespace_is_made_up_once(database: Database) -> None:
    names: list[str] = []
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait()
        names.append(shared_namespace(database))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 4
    assert len(set(names)) == 1
    assert len(names[0]) == 8
    assert row(database, Dispatcher).namespace == names[0]


def test_heartbeats(database: Database) -> None:
    shared_namespace(database)
    assert not dispatcher_alive(database)
    heartbeat(database, "dsp_1", started=True)
    stored = row(database, Dispatcher, Dispatcher.id == "dsp_1")
    assert (stored.pid, stored.started_at is not None) == (os.getpid(), True)
    assert dispatcher_alive(database)
    set_values(database, Dispatcher, "dsp_1", heartbeat_at=datetime.now(UTC) - timedelta(seconds=40))
    assert not dispatcher_alive(database)
    heartbeat(database, "dsp_1", started=False)
    assert dispatcher_alive(database)
    assert row(database, Dispatcher, Dispatcher.id == "dsp_1").started_at == stored.started_at
    set_values(database, Dispatcher, "dsp_1", heartbeat_at=datetime.now(UTC) - timedelta(days=2))
    heartbeat(database, "dsp_2", started=True)
    assert forget_dead(database) == 1
    sign_off(database, "dsp_2")
    assert [one.id for one in rows(database, Dispatcher)] == [SHARED]


def test_pause_and_resume(database: Database) -> None:
    assert not paused_since(database)
    pause(database)
    since = paused_since(database)
    assert since is not None
    pause(database)
    assert paused_since(database) == since
    resume(database)
    assert not paused_since(database)


def test_one_dispatcher_at_a_time_reconciles(database: Database) -> None:
    assert take_reconcile_lease(database, "dsp_1", 30)
    assert not take_reconcile_lease(database, "dsp_2", 30)
    assert take_reconcile_lease(database, "dsp_1", 0.1), "it may extend its own"
    time.sleep(0.15)
    assert take_reconcile_lease(database, "dsp_2", 30)
    drop_reconcile_lease(database, "dsp_1")
    assert not take_reconcile_lease(database, "dsp_1", 30), "it was not its own to drop"
    drop_reconcile_lease(database, "dsp_2")
    assert take_reconcile_lease(database, "dsp_1", 30)
    sign_off(database, "dsp_1")
    assert take_reconcile_lease(database, "dsp_2", 30)


def test_an_old_sqlite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module.sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigurationError, match="3.35"):
        Database("sqlite://")


def test_an_in_memory_database_is_shared_by_all_threads() -> None:
    database = Database("sqlite:///:memory:")
    thread = threading.Thread(target=lambda: new_endpoint(database, job_id="job-1"))
    thread.start()
    thread.join()
    assert len(rows(database, Dispatcher)) == 0
    assert shared_namespace(database) == shared_namespace(database)
    database.dispose()


def test_an_in_memory_database_is_closed_when_no_thread_is_executing() -> None:
    database = Database("sqlite://")
    numbers = "WITH RECURSIVE s(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM s LIMIT 300000)"
    counted: list[int] = []
    begun = threading.Event()

    def read() -> None:
        with database.read() as connection:
            begun.set()
            counted.append(connection.execute(text(f"{numbers} SELECT max(n) FROM s")).scalar_one())

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    database.dispose()
    reader.join()
    assert counted == [300_000]
