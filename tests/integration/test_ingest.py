"""From real outbox entries and real job hashes to events in SQL."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
import rq

from flask_rq_webhooks import signals
from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.observe.ingest import PATIENCE_S, Ingest
from flask_rq_webhooks.observe.outcomes import Outcome
from flask_rq_webhooks.observe.publisher import Publisher, occurrence_of_loss
from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.queue.job_reader import read_endings
from flask_rq_webhooks.queue.outbox_entry import confirm_entry
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import confirm
from flask_rq_webhooks.storage.events import IngestItem
from flask_rq_webhooks.storage.models import Watch
from tests.pipeline import add_endpoint, deliveries, enqueue, events, open_state, rows, work
from tests.servers import wait_until

URL = "http://127.0.0.1:9/hook"


@pytest.fixture
def state(database_url: str, redis_url: str) -> Iterator[State]:
    with open_state(database_url, redis_url, max_payload_bytes=4096) as opened:
        yield opened


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def ingest_of(state: State, **options: Any) -> Ingest:
    return Ingest(
        state, consumer="tests", publisher=options.pop("publisher", None) or Publisher(state), **options
    )


def append(state: State, kind: str, endpoint_id: str, **fields: Any) -> dict[str, Any]:
    """Append a valid entry and return it."""
    now = datetime.now(UTC)
    begun = format_time(now - timedelta(seconds=1))
    error = {"type": "ValueError", "message": "told", "traceback": "t"} if kind == "failure" else None
    entry: dict[str, Any] = {
        "v": 1, "kind": kind, "endpoint": endpoint_id, "job_id": str(uuid.uuid4()), "run": begun,
        "at": now.timestamp(), "func": "tests.jobs.add", "queue": "default", "created_at": begun,
        "enqueued_at": begun, "started_at": begun, "runid": None, "retries_left": None, "result": None,
        "result_truncated": False, "error": error, **fields,
    }  # fmt: skip
    state.outbox.append(entry)
    return entry


def set_hash(state: State, entry: dict[str, Any], status: str) -> None:
    """Write the fields of a job's hash that matter here."""
    fields = {
        "status": status,
        "created_at": entry["created_at"],
        "enqueued_at": entry["run"],
        "success_callback_name": f"flask_rq_webhooks.callbacks.success.{entry['endpoint']}",
    }
    state.redis.hset(f"rq:job:{entry['job_id']}", mapping=fields)


def payload(event: Any) -> Any:
    return json.loads(event.payload)


def test_committed_job_becomes_one_event_and_its_delivery(state: State) -> None:
    endpoint_id = add_endpoint(state, URL, runid="basin-7")
    job_id = enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)

    assert ingest_of(state).run_once(block_ms=1) == 1

    (event,) = events(state)
    assert (event.type, event.job_id, event.source) == ("job.success", job_id, "callback")
    (delivery,) = deliveries(state)
    body = json.loads(delivery.body)
    assert body["result"] == 3
    assert body["runid"] == "basin-7"
    assert body["id"] == delivery.event_id == event.id
    assert delivery.status == "pending"
    assert state.outbox.length() == 0


def test_run_is_reported_once_however_often_its_entry_is_read(state: State) -> None:
    endpoint_id = add_endpoint(state, URL)
    entry = append(state, "success", endpoint_id)
    set_hash(state, entry, "finished")
    for _ in range(2):
        state.outbox.append(entry)

    assert ingest_of(state).run_once(block_ms=1) == 3

    assert len(events(state)) == 1
    assert len(deliveries(state)) == 1


def test_uncommitted_job_is_waited_for_and_reported_as_committed(state: State) -> None:
    ingest = ingest_of(state)
    entry = append(state, "success", add_endpoint(state, URL))
    set_hash(state, entry, "started")

    ingest.run_once(block_ms=1)
    ingest.run_once(block_ms=1)
    assert events(state) == []
    assert state.outbox.length() == 1
    assert ingest.waiting == 1
    assert not ingest.is_idle()

    set_hash(state, entry, "finished")
    deadline = time.monotonic() + 1
    while not events(state) and time.monotonic() < deadline:
        ingest.run_once(block_ms=100)
    assert [event.type for event in events(state)] == ["job.success"]
    assert ingest.is_idle()


def test_commit_is_seen_within_milliseconds(state: State) -> None:
    ingest = ingest_of(state)
    entry = append(state, "success", add_endpoint(state, URL))
    set_hash(state, entry, "started")
    ingest.run_once(block_ms=1)
    set_hash(state, entry, "finished")

    began = time.monotonic()
    while ingest.waiting:
        ingest.run_once(block_ms=1000)
    assert time.monotonic() - began < 0.5


def test_others_write_while_a_commit_is_waited_for_and_nothing_seen_before_is_stored(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint_id = add_endpoint(state, URL)
    entry = append(state, "success", endpoint_id)
    set_hash(state, entry, "started")
    looks = 0

    def write() -> None:
        lost = occurrence_of_loss("other", Outcome(type="job.lost", run=entry["run"]), now=datetime.now(UTC))
        Publisher(state).publish([IngestItem(lost, (endpoint_id,))])

    def look(*args: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 2:
            other = threading.Thread(target=write, daemon=True)
            other.start()
            other.join(timeout=2)
            assert not other.is_alive(), "a writer was kept waiting"
            set_hash(state, entry, "finished")
        return read_endings(*args, **options)

    monkeypatch.setattr("flask_rq_webhooks.observe.ingest.read_endings", look)

    assert ingest_of(state).run_once(block_ms=1) == 1

    stored = sorted(events(state), key=lambda event: event.position)
    assert [event.type for event in stored] == ["job.lost", "job.success"] or not state.database.is_sqlite
    assert len({event.position for event in stored}) == len(deliveries(state)) == 2
    assert state.database.reads_freely, "it was not waited for in a transaction"


def test_uncommitted_for_too_long_is_parked_for_reconcile(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    ingest = ingest_of(state, clock=clock)
    endpoint_id = add_endpoint(state, URL)
    entry = append(state, "success", endpoint_id, result={"kept": True})
    set_hash(state, entry, "started")
    ingest.run_once(block_ms=1)
    clock.now += PATIENCE_S + 0.1

    with caplog.at_level(logging.WARNING):
        assert ingest.run_once(block_ms=1) == 1

    assert events(state) == []
    (watch,) = rows(state, Watch)
    assert (watch.job_id, watch.endpoint_id, watch.status) == (entry["job_id"], endpoint_id, "open")
    assert json.loads(watch.evidence)["result"] == {"kept": True}
    assert ingest.is_idle()
    assert entry["job_id"] in caplog.text


def test_success_that_rq_committed_as_failed_is_reported_as_failed(state: State) -> None:
    endpoint_id = add_endpoint(state, URL)
    job_id = enqueue(state, endpoint_id, "tests.jobs.fail", "dry", is_async=True)
    work(state.redis)
    ((_id, fields),) = state.redis.xrange(state.outbox.key)
    reported = json.loads(fields[b"entry"])
    state.redis.delete(state.outbox.key)
    state.outbox.append({**reported, "kind": "success", "error": None, "result": 5})

    ingest_of(state).run_once(block_ms=1)

    (event,) = events(state)
    assert (event.type, event.job_id) == ("job.failure", job_id)
    (delivery,) = deliveries(state)
    body = json.loads(delivery.body)
    assert (body["error"]["type"], body["error"]["message"]) == ("ValueError", "dry")
    assert "result" not in body


def test_retries_are_reported_only_to_those_who_ask(state: State) -> None:
    plain = add_endpoint(state, URL)
    asks = add_endpoint(state, URL, events=("job.retrying", "job.failure"))
    for endpoint_id in (plain, asks):
        enqueue(state, endpoint_id, "tests.jobs.fail", is_async=True, retry=rq.Retry(max=2))
    ingest = ingest_of(state)
    work(state.redis)
    while not ingest.is_idle():
        ingest.run_once(block_ms=10)

    reported: dict[str, list[str]] = {plain: [], asks: []}
    for delivery in deliveries(state):
        reported[delivery.endpoint_id].append(delivery.event_type)
    assert reported[plain] == ["job.failure"]
    assert sorted(reported[asks]) == ["job.failure", "job.retrying", "job.retrying"]


def test_earlier_run_of_a_requeued_job_is_reported_by_rqs_results(state: State) -> None:
    endpoint_id = add_endpoint(state, URL)
    job_id = enqueue(state, endpoint_id, "tests.jobs.fail", "first", is_async=True)
    work(state.redis)
    rq.job.Job.fetch(job_id, state.redis).requeue()

    ingest = ingest_of(state)
    ingest.run_once(block_ms=1)
    assert [event.type for event in events(state)] == ["job.failure"]
    work(state.redis)
    ingest.run_once(block_ms=1)
    assert [event.type for event in events(state)] == ["job.failure", "job.failure"]
    assert len({event.run_key for event in events(state)}) == 2


def test_word_stands_for_a_job_that_leaves_nothing(state: State) -> None:
    endpoint_id = add_endpoint(state, URL)
    job_id = enqueue(state, endpoint_id, "tests.jobs.add", 2, 2, is_async=True, result_ttl=0)
    work(state.redis)
    assert not state.redis.exists(f"rq:job:{job_id}")

    ingest_of(state).run_once(block_ms=1)

    (delivery,) = deliveries(state)
    assert json.loads(delivery.body)["result"] == 4


def test_malformed_entry_is_set_aside_and_holds_nothing_up(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    state.outbox.append({})  # makes the stream
    state.redis.xadd(state.outbox.key, {"entry": b"\x80\x04not json"})
    entry = append(state, "success", add_endpoint(state, URL))
    set_hash(state, entry, "finished")

    ingest_of(state).run_once(block_ms=1)

    assert [event.job_id for event in events(state)] == [entry["job_id"]]
    assert state.redis.xlen(state.outbox.rejected_key) == 2
    assert state.outbox.length() == 0
    assert state.outbox.rejected_key in caplog.text


class Refusing(Publisher):
    """Refuses one job, as a database does with a value it cannot hold."""

    def __init__(self, state: State, refused: str, error: Exception) -> None:
        super().__init__(state)
        self.refused = refused
        self.error = error

    def publish(self, items: Any, **options: Any) -> Any:
        if any(item.occurrence.job_id == self.refused for item in items):
            raise self.error
        return super().publish(items, **options)


def test_entry_that_cannot_be_stored_is_set_aside_alone(state: State) -> None:
    endpoint_id = add_endpoint(state, URL)
    entries = [append(state, "success", endpoint_id) for _ in range(5)]
    for entry in entries:
        set_hash(state, entry, "finished")
    refused = entries[2]["job_id"]

    ingest_of(state, publisher=Refusing(state, refused, ValueError("no column holds this"))).run_once(
        block_ms=1
    )

    assert {event.job_id for event in events(state)} == {entry["job_id"] for entry in entries} - {refused}
    ((_id, fields),) = state.redis.xrange(state.outbox.rejected_key)
    assert json.loads(fields[b"entry"])["job_id"] == refused
    assert b"no column holds this" in fields[b"why"]
    assert state.outbox.length() == 0


def test_nothing_leaves_the_stream_while_sql_is_away(state: State) -> None:
    entry = append(state, "success", add_endpoint(state, URL))
    set_hash(state, entry, "finished")
    away = Refusing(state, entry["job_id"], StorageUnavailableError())
    ingest = ingest_of(state, publisher=away)

    for _ in range(3):
        with pytest.raises(StorageUnavailableError):
            ingest.run_once(block_ms=1)
    assert state.outbox.length() == 1
    away.refused = ""
    assert ingest.run_once(block_ms=1) == 1
    assert len(events(state)) == 1
    assert state.outbox.length() == 0


def test_failing_scrub_function_loses_no_event_and_leaks_nothing(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    def scrub(_payload: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("a bug of the host")

    state.hooks.scrub_function = scrub
    entry = append(state, "success", add_endpoint(state, URL), result={"password": "hunter2"}, runid="r")
    set_hash(state, entry, "finished")

    ingest_of(state).run_once(block_ms=1)

    (event,) = events(state)
    (delivery,) = deliveries(state)
    assert b"hunter2" not in delivery.body
    assert "hunter2" not in event.payload
    assert json.loads(delivery.body)["runid"] == "r"
    assert "scrub function failed" in caplog.text


def test_failing_format_reports_at_least_how_the_job_ended(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_occurrence: Any, _context: Any) -> bytes:
        raise KeyError("a bug of the host")

    state.hooks.formats["broken"] = broken  # type: ignore[index]
    for name in ("broken", "unregistered"):
        endpoint_id = add_endpoint(state, URL, format=name)
        entry = append(state, "success", endpoint_id, result={"password": "hunter2"})
        set_hash(state, entry, "finished")

    ingest_of(state).run_once(block_ms=1)

    bodies = [json.loads(delivery.body) for delivery in deliveries(state)]
    assert [body["event"] for body in bodies] == ["job.success", "job.success"]
    assert [body["result"] for body in bodies] == [None, None]
    assert "'broken'" in caplog.text
    assert "'unregistered'" in caplog.text


def confirmation(state: State, endpoint_id: str, runs: dict[str, str], unseen: list[str]) -> dict[str, Any]:
    """Return the entry of a web process that could not confirm in SQL."""
    seal = state.cipher.encrypt(json.dumps([endpoint_id, runs, unseen]))
    return confirm_entry(endpoint_id, list(runs), seal=seal)


def test_report_of_a_lost_job_that_is_back_corrects_the_loss(state: State) -> None:
    endpoint_id = add_endpoint(state, URL)
    entry = append(state, "success", endpoint_id)
    lost = Outcome(type="job.lost", run=entry["run"], committed=False)
    Publisher(state).publish(
        [IngestItem(occurrence_of_loss(entry["job_id"], lost, now=datetime.now(UTC)), (endpoint_id,))]
    )
    set_hash(state, entry, "finished")

    ingest_of(state).run_once(block_ms=1)
    state.outbox.append(entry)
    ingest_of(state).run_once(block_ms=1)

    loss, correction = events(state)
    assert (loss.type, loss.supersedes) == ("job.lost", None)
    assert (correction.type, correction.supersedes) == ("job.success", loss.id)


def test_success_of_a_gone_job_waits_for_the_report_that_shows_its_retry(
    database_url: str, redis_url: str
) -> None:
    """Its worker died before the commit, RQ ran the job again, and nothing of it is left but two reports."""
    with open_state(database_url, redis_url, batch=1) as state:
        endpoint_id = add_endpoint(state, URL)
        now = datetime.now(UTC)
        first = append(state, "success", endpoint_id, retries_left=1)
        again = format_time(now - timedelta(milliseconds=300))
        job_id = first["job_id"]
        confirm(state.database, endpoint_id, existing=[job_id], unseen=[], reserved_job_id=None)
        append(
            state, "success", endpoint_id, job_id=job_id, retries_left=0, run=again,
            enqueued_at=again, started_at=again,
        )  # fmt: skip
        ingest = ingest_of(state)
        wait_until(lambda: ingest.run_once(block_ms=1) >= 0 and ingest.is_idle())
        assert {event.run_key: event.type for event in events(state)} == {
            f"{job_id}|{first['run']}|job.retrying": "job.retrying",
            f"{job_id}|{again}|end": "job.success",
        }


def test_confirmation_through_the_outbox_opens_the_watches(state: State) -> None:
    endpoint_id = add_endpoint(state, URL)
    run = format_time(datetime.now(UTC))
    state.outbox.append(confirmation(state, endpoint_id, {"seen": run, "on its way": run}, ["on its way"]))

    ingest_of(state).run_once(block_ms=1)

    found = {watch.job_id: (watch.status, watch.run) for watch in rows(state, Watch)}
    assert found == {"seen": ("open", run), "on its way": ("reserved", run)}
    assert state.outbox.length() == 0


def test_confirmation_without_a_seal_counts_only_for_jobs_that_carry_the_endpoint(
    state: State, redis_client: redis.Redis
) -> None:
    endpoint_id, other = add_endpoint(state, URL), add_endpoint(state, URL)
    created = format_time(datetime.now(UTC))
    callback = f"flask_rq_webhooks.callbacks.success.{endpoint_id}"
    carries = {"status": "queued", "created_at": created, "success_callback_name": callback}
    redis_client.hset("rq:job:carries", mapping=carries)
    redis_client.hset("rq:job:foreign", mapping={"status": "queued", "created_at": created})
    state.outbox.append(confirm_entry(endpoint_id, ["carries", "foreign", "absent"]))
    stolen = confirmation(state, other, {"absent": created}, [])["seal"]
    state.outbox.append(confirm_entry(endpoint_id, ["absent"], seal=stolen))
    state.outbox.append(confirm_entry(endpoint_id, ["absent"], seal="not one"))

    ingest_of(state).run_once(block_ms=1)

    assert [watch.job_id for watch in rows(state, Watch)] == ["carries"]
    assert state.outbox.length() == 0


def test_report_that_nothing_proves_is_set_aside(state: State, caplog: pytest.LogCaptureFixture) -> None:
    """A redis writer names a victim's endpoint for a job that never was."""
    clock = Clock()
    ingest = ingest_of(state, clock=clock)
    victim = add_endpoint(state, URL)
    forged = append(state, "success", victim)
    other = append(state, "success", add_endpoint(state, URL))
    set_hash(state, other, "finished")
    state.outbox.append({**other, "endpoint": victim})
    ingest.run_once(block_ms=1)
    clock.now += PATIENCE_S + 0.1

    ingest.run_once(block_ms=1)

    assert [(event.type, event.job_id) for event in events(state)] == [("job.success", other["job_id"])]
    assert [delivery.endpoint_id for delivery in deliveries(state)] == [other["endpoint"]]
    assert state.redis.xlen(state.outbox.rejected_key) == 2
    assert forged["job_id"] in caplog.text
    assert ingest.is_idle()


def test_report_before_its_confirmation_is_believed(state: State) -> None:
    """The second job of a request leaves nothing in Redis, and SQL was away when it was enqueued."""
    endpoint_id = add_endpoint(state, URL)
    ingest = ingest_of(state)
    entry = append(state, "success", endpoint_id)
    ingest.run_once(block_ms=1)
    assert events(state) == []
    state.outbox.append(confirmation(state, endpoint_id, {entry["job_id"]: entry["run"]}, [entry["job_id"]]))

    deadline = time.monotonic() + 2
    while not ingest.is_idle() and time.monotonic() < deadline:
        ingest.run_once(block_ms=20)

    assert [(event.type, event.job_id) for event in events(state)] == [("job.success", entry["job_id"])]


def test_listeners_hear_of_new_events_only(state: State) -> None:
    heard: list[dict[str, Any]] = []

    def listen(_app: Any, **what: Any) -> None:
        heard.append(what)

    entry = append(state, "failure", add_endpoint(state, URL))
    set_hash(state, entry, "failed")
    with signals.event_recorded.connected_to(listen, sender=state.app):
        ingest_of(state).run_once(block_ms=1)
        state.outbox.append(entry)
        ingest_of(state).run_once(block_ms=1)

    (event,) = events(state)
    assert heard == [{"event_id": event.id, "event_type": "job.failure", "job_id": entry["job_id"]}]
