"""The feed of events: an order the database decides, nothing lost, nothing twice."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.storage import models
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.feed import events_after
from flask_rq_webhooks.storage.models import Event
from flask_rq_webhooks.storage.queries import EventView, Page
from flask_rq_webhooks.storage.retention import prune
from tests.servers import PostgresHandle, wait_until
from tests.storage_rows import new_endpoint, occurrence, publish, render, rows, set_values


def jobs(page: Page[EventView]) -> list[str | None]:
    return [event.job_id for event in page.items]


class Client:
    """Follows the feed as an API client does."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.cursor: str | None = None
        self.seen: list[str | None] = []

    def poll(self) -> None:
        page = events_after(self._database, cursor=self.cursor, limit=7)
        self.cursor = page.cursor
        self.seen += jobs(page)

    def poll_to_the_end(self) -> list[str | None]:
        before = -1
        while len(self.seen) != before:
            before = len(self.seen)
            self.poll()
        return self.seen


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give a function that sets this process's clock off by some seconds, for ids."""
    real = time.time_ns
    return lambda seconds: monkeypatch.setattr(models.time, "time_ns", lambda: real() + int(seconds * 1e9))


def test_events_as_a_feed(database: Database) -> None:
    for number in range(5):
        publish(database, occurrence(f"job-{number}", runid=f"run-{number % 2}"))
    page = events_after(database, limit=2)
    assert jobs(page) == ["job-0", "job-1"]
    assert page.items[0].payload is not None
    page = events_after(database, cursor=page.cursor)
    assert jobs(page) == ["job-2", "job-3", "job-4"], "an event is in the feed as soon as it is stored"
    empty = events_after(database, cursor=page.cursor)
    assert (empty.items, empty.cursor) == ((), page.cursor)
    assert jobs(events_after(database, runid="run-1")) == ["job-1", "job-3"]
    assert jobs(events_after(database, event_type="job.lost")) == []
    assert jobs(events_after(database, event_type="job.success", limit=1)) == ["job-0"]


def test_events_of_one_batch_are_in_the_order_they_were_brought(database: Database) -> None:
    names = [f"job-{(number * 7919) % 30}" for number in range(30)]
    publish(database, *(occurrence(name) for name in names))
    assert Client(database).poll_to_the_end() == names


@pytest.mark.parametrize("seconds", [-60.0, 60.0])
def test_nothing_is_lost_when_the_clocks_of_dispatchers_differ(
    database: Database, skewed: Callable[[float], None], seconds: float
) -> None:
    client = Client(database)
    stored = []
    for number in range(6):
        skewed(seconds * (number % 2))
        stored.append(f"job-{number}")
        publish(database, occurrence(stored[-1]))
        client.poll()
    assert client.seen == stored


class Held:
    """An ingest that stays in its transaction, as on a machine that is slow, until it is let go."""

    def __init__(self, database: Database, job_id: str) -> None:
        self.endpoint_id = new_endpoint(database, job_id=job_id)
        self.inside = threading.Event()
        self._go = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(Database(database.url), job_id))
        self._thread.start()
        assert self.inside.wait(10)

    def _run(self, database: Database, job_id: str) -> None:
        def slow(*arguments: Any) -> bytes:
            self.inside.set()
            assert self._go.wait(30)
            return render(*arguments)

        publish(database, occurrence(job_id), render=slow)
        database.dispose()

    def let_go(self) -> None:
        self._go.set()
        self._thread.join(20)


@pytest.fixture
def opened(postgres: PostgresHandle) -> Database:
    database = Database(postgres.new_database())
    database.create_tables()
    return database


def test_the_feed_stops_before_a_transaction_that_is_still_open_and_nobody_waits(
    opened: Database, skewed: Callable[[float], None]
) -> None:
    client = Client(opened)
    publish(opened, occurrence("before"))
    client.poll()
    skewed(-60)
    held = Held(opened, "held")
    skewed(60)
    began = time.monotonic()
    for number in range(3):
        publish(opened, occurrence(f"later-{number}"))
        client.poll()
        time.sleep(0.4)
    assert time.monotonic() - began < 5, "an open transaction holds up no other dispatcher"
    assert client.seen == ["before"]
    time.sleep(max(0.0, began + 10 - time.monotonic()))
    client.poll()
    assert client.seen == ["before"]
    held.let_go()
    assert sorted(client.poll_to_the_end()) == ["before", "held", "later-0", "later-1", "later-2"]
    opened.dispose()


def test_a_transaction_held_open_on_sqlite_loses_nothing(
    sqlite_url: str, skewed: Callable[[float], None]
) -> None:
    """SQLite has one writer: the others wait, or try again as a dispatcher does."""
    database = Database(sqlite_url)
    database.create_tables()
    client = Client(database)
    publish(database, occurrence("before"))
    skewed(-60)
    held, began = Held(database, "held"), time.monotonic()
    skewed(60)

    def write() -> None:
        while True:
            with suppress(StorageUnavailableError):
                publish(database, occurrence("later"))
                return

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write)
        while time.monotonic() - began < 10:
            client.poll()
            time.sleep(0.5)
        assert client.seen == ["before"]
        assert not written.done()
        held.let_go()
        written.result(timeout=20)
    assert client.poll_to_the_end() == ["before", "held", "later"]
    database.dispose()


def test_a_long_transaction_of_the_host_does_not_hold_up_the_feed(opened: Database) -> None:
    other = sa.create_engine(opened.url)
    with other.begin() as connection:
        connection.execute(sa.text("CREATE TABLE of_the_host (id integer)"))
        publish(opened, occurrence("job-1"))
        assert jobs(events_after(opened)) == ["job-1"]
    other.dispose()
    opened.dispose()


@pytest.mark.slow_machine(reason="SQLite gives no turns: one of four writers may wait too long")
def test_many_writers_and_a_client_that_polls_all_the_time(database_url: str) -> None:
    mine = Database(database_url)
    mine.create_tables()
    client, wanted = Client(mine), 4 * 40
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        database = Database(mine.url)
        try:
            for number in range(40):
                publish(database, occurrence(f"{writer}-{number}"))
        except BaseException as exc:  # reported below
            failures.append(exc)
        database.dispose()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        client.poll()
    client.poll_to_the_end()
    mine.dispose()
    assert not failures
    assert len(client.seen) == len(set(client.seen)) == wanted


def test_the_order_goes_on_when_the_clock_of_the_database_was_set_back(database: Database) -> None:
    """After a failover another machine's clock counts."""
    client = Client(database)
    publish(database, occurrence("job-1"))
    (first,) = rows(database, Event)
    set_values(database, Event, first.id, position=first.position + 3_600_000_000)
    client.poll()
    for number in (2, 3):
        publish(database, occurrence(f"job-{number}"))
        client.poll()
    assert client.seen == ["job-1", "job-2", "job-3"]


def test_a_cursor_is_valid_when_everything_before_it_is_pruned(database: Database) -> None:
    client = Client(database)
    publish(database, occurrence("job-1"))
    client.poll()
    assert prune(database, datetime.now(UTC) + timedelta(hours=1)).events == 1
    publish(database, occurrence("job-2"))
    client.poll()
    assert client.seen == ["job-1", "job-2"]


def test_cursors_and_events_from_before_there_were_positions(database: Database) -> None:
    """An upgrade leaves old events at position 0; the cursor a client holds names an event."""
    for number in range(4):
        publish(database, occurrence(f"old-{number}"))
        time.sleep(0.002)  # ids of one millisecond have no order
    old = rows(database, Event)
    for event in old:
        set_values(database, Event, event.id, position=0)
    publish(database, occurrence("new"))
    client = Client(database)
    client.cursor = base64.urlsafe_b64encode(b"1" + old[1].id.encode()).decode().rstrip("=")
    assert client.poll_to_the_end() == ["old-2", "old-3", "new"]
    assert Client(database).poll_to_the_end() == ["old-0", "old-1", "old-2", "old-3", "new"]


def test_locks_of_the_feed_are_gone_after_a_transaction_that_failed(opened: Database) -> None:
    def broken(*_arguments: Any) -> bytes:
        raise RuntimeError("cannot be rendered")

    new_endpoint(opened, job_id="job-1")
    with pytest.raises(RuntimeError):
        publish(opened, occurrence("job-1"), render=broken)
    publish(opened, occurrence("job-2"))
    wait_until(lambda: jobs(events_after(opened)) == ["job-2"], timeout=2)
    opened.dispose()
