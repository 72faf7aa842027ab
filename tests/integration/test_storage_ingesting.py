"""An occurrence becomes an event and its deliveries, exactly once."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from flask_rq_webhooks.protocol.events import (
    JOB_FAILURE,
    JOB_LOST,
    JOB_RETRYING,
    SOURCE_APPLICATION,
    WEBHOOK_PING,
    Occurrence,
    format_time,
)
from flask_rq_webhooks.protocol.payloads import occurrence_from_json
from flask_rq_webhooks.storage import bulk_insert
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.endpoints import confirm
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.storage.models import Delivery, Event, Watch
from flask_rq_webhooks.storage.reported_runs import ParkedReport, park_reports
from flask_rq_webhooks.storage.standing_endpoints import disable_standing, enable_standing
from tests.storage_rows import MAX_ATTEMPTS, new_endpoint, occurrence, publish, row, rows, statements_of


def test_event_and_delivery_of_a_watched_job(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1", reference="ref", host="a.example:8443")
    what = occurrence("job-1")
    (reported,) = publish(database, what)
    event, delivery, watch = row(database, Event), row(database, Delivery), row(database, Watch)
    assert (reported.event_id, reported.type, reported.job_id) == (event.id, "job.success", "job-1")
    assert (reported.created, reported.deliveries) == (True, 1)
    assert (event.type, event.job_id, event.run_key) == ("job.success", "job-1", what.run_key)
    assert occurrence_from_json(event.payload) == replace(what, sequence=1)
    assert (delivery.event_id, delivery.endpoint_id) == (event.id, endpoint_id)
    assert delivery.body == json.dumps([event.id, "job.success", "job-1", "ref", {"answer": 42}]).encode()
    assert (delivery.status, delivery.attempts, delivery.max_attempts) == ("pending", 0, MAX_ATTEMPTS)
    assert (delivery.host, delivery.event_type) == ("a.example:8443", "job.success")
    assert delivery.next_attempt_at <= datetime.now(UTC)
    assert (watch.status, watch.run) == ("settled", what.run)


def test_telling_again_changes_nothing(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1")
    item = IngestItem(occurrence("job-1"), (endpoint_id,))
    (first,) = publish(database, item)
    before = rows(database, Event), rows(database, Delivery), rows(database, Watch)
    (second,) = publish(database, item)
    (third,) = publish(
        database, replace(item, occurrence=replace(item.occurrence, type=JOB_LOST, result=None))
    )
    assert (second.event_id, second.created, second.deliveries) == (first.event_id, False, 0)
    assert (third.event_id, third.type, third.created) == (first.event_id, "job.success", False)
    assert (rows(database, Event), rows(database, Delivery)) == before[:2]
    assert [watch.id for watch in rows(database, Watch)] == [watch.id for watch in before[2]]


def sequences(database: Database, job_id: str = "job-1") -> list[int | None]:
    stored = rows(database, Event, Event.job_id == job_id)
    stored.sort(key=lambda event: event.position)
    return [occurrence_from_json(event.payload).sequence for event in stored]


def test_events_of_a_job_are_numbered(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1")
    first = occurrence("job-1", begun_s_ago=60)
    retried = replace(first, type=JOB_RETRYING, result=None)
    (reported,) = publish(database, IngestItem(retried, (endpoint_id,)))
    publish(database, IngestItem(retried, (endpoint_id,)), occurrence("another"))
    ended = occurrence("job-1")
    publish(database, ended, replace(ended, type=JOB_FAILURE, result=None, supersedes=reported.event_id))
    publish(database, occurrence(None, type="run.archived", source=SOURCE_APPLICATION, result=None))
    assert sequences(database) == [1, 2, 3]
    assert sequences(database, "another") == [1]


def test_two_dispatchers_never_number_alike(database: Database) -> None:
    def store(first: int) -> None:
        for number in range(first, 20, 2):
            publish(database, *(occurrence(f"job-{n}", begun_s_ago=number + 1) for n in (number % 3, 1)))

    threads = [threading.Thread(target=store, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job_id in ("job-0", "job-1", "job-2"):
        found = sequences(database, job_id)
        assert sorted(found) == list(range(1, len(found) + 1)), job_id


def test_one_run_twice_in_one_batch(database: Database) -> None:
    first, second = new_endpoint(database), new_endpoint(database)
    what = occurrence("job-1")
    reported = publish(
        database,
        IngestItem(what, (first,)),
        IngestItem(replace(what, type=JOB_FAILURE, result=None), (first, second)),
    )
    assert [(event.event_id, event.created, event.deliveries) for event in reported] == [
        (reported[0].event_id, True, 2),
        (reported[0].event_id, False, 0),
    ]
    assert row(database, Event).type == "job.success"
    assert {delivery.endpoint_id for delivery in rows(database, Delivery)} == {first, second}


def test_an_endpoint_named_later_gets_its_delivery_from_what_was_stored(database: Database) -> None:
    first = new_endpoint(database, job_id="job-1")
    standing = new_endpoint(database, kind="standing")
    what = occurrence("job-1")
    publish(database, replace(what, source="reconciled", result=None))
    late = new_endpoint(database, reference="late")
    new_endpoint(database, kind="standing")
    (reported,) = publish(database, IngestItem(what, (late,)))
    assert (reported.created, reported.deliveries) == (False, 1)
    deliveries = {delivery.endpoint_id: delivery for delivery in rows(database, Delivery)}
    assert set(deliveries) == {first, standing, late}
    assert json.loads(deliveries[late].body) == [reported.event_id, "job.success", "job-1", "late", None]


def test_several_endpoints_hear_once_each(database: Database) -> None:
    named = new_endpoint(database, job_id="job-1")
    watching = new_endpoint(database, job_id="job-1")
    new_endpoint(database, job_id="job-2")
    (reported,) = publish(database, IngestItem(occurrence("job-1"), (named, named)))
    assert reported.deliveries == 2
    assert {delivery.endpoint_id for delivery in rows(database, Delivery)} == {named, watching}


def test_a_later_run_is_reported_to_settled_watches_and_not_to_closed_ones(database: Database) -> None:
    settled = new_endpoint(database, job_id="job-1")
    closed = new_endpoint(database, job_id="job-1")
    confirm(database, closed, existing=[], unseen=[], reserved_job_id="job-1")
    publish(database, occurrence("job-1", begun_s_ago=0.5))
    second = occurrence("job-1")
    (reported,) = publish(database, second)
    assert reported.deliveries == 1
    assert {delivery.endpoint_id for delivery in rows(database, Delivery)} == {settled}
    assert row(database, Watch, Watch.endpoint_id == settled).run == second.run
    assert row(database, Watch, Watch.endpoint_id == closed).status == "closed"


def test_a_run_begun_before_the_registration_counts_only_for_those_named(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1")
    early = occurrence("job-1", begun_s_ago=5)
    (reported,) = publish(database, early)
    assert (reported.created, reported.deliveries) == (True, 0)
    (again,) = publish(database, IngestItem(early, (endpoint_id,)))
    assert (again.created, again.deliveries) == (False, 1)


def test_a_run_within_the_clock_skew_counts(database: Database) -> None:
    new_endpoint(database, job_id="job-1")
    (reported,) = publish(database, occurrence("job-1", begun_s_ago=0.7))
    assert reported.deliveries == 1


def test_the_run_itself_shows_when_it_began(database: Database) -> None:
    new_endpoint(database, job_id="job-1")
    long_ago = format_time(datetime.now(UTC) - timedelta(hours=1))
    reported = publish(
        database,
        occurrence("job-1", enqueued_at=None, run=f"created:{long_ago}"),
    )
    assert reported[0].deliveries == 0


def test_an_older_run_reported_late_does_not_hide_a_newer_one(database: Database) -> None:
    new_endpoint(database, job_id="job-1")
    older, newer = occurrence("job-1", begun_s_ago=0.5), occurrence("job-1")
    publish(database, newer)
    publish(database, older)
    assert row(database, Watch).run == newer.run
    assert len(rows(database, Delivery)) == 2


def test_unknown_endpoints_are_ignored_and_logged(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    known = new_endpoint(database)
    with caplog.at_level(logging.WARNING):
        reported = publish(
            database,
            IngestItem(occurrence("job-1"), ("epforeign_123",)),
            IngestItem(occurrence("job-2"), (known,)),
            IngestItem(occurrence("job-3"), ("eptesttest_all",)),
        )
    assert [event.deliveries for event in reported] == [0, 1, 0]
    assert [record.args for record in caplog.records] == [("epforeign_123", "job-1")]


def test_a_callback_makes_the_watch_that_was_never_confirmed(database: Database) -> None:
    endpoint_id = new_endpoint(database)
    what = occurrence("job-1")
    publish(database, IngestItem(what, (endpoint_id,)))
    watch = row(database, Watch)
    assert (watch.endpoint_id, watch.job_id, watch.status, watch.run) == (
        endpoint_id, "job-1", "settled", what.run,
    )  # fmt: skip


def test_jobs_without_endpoint_are_watched_once(database: Database) -> None:
    for begun_s_ago in (2, 1):
        publish(database, IngestItem(occurrence("job-1", begun_s_ago=begun_s_ago), ("eptesttest_all",)))
    watch = row(database, Watch)
    assert (watch.endpoint_id, watch.job_id, watch.status) == (None, "job-1", "settled")
    assert watch.run == rows(database, Event)[-1].run_key.split("|")[1]


@pytest.mark.parametrize(
    ("events", "event_type", "wanted"),
    [
        (None, "job.success", True),
        (None, "job.lost", True),
        (None, "job.retrying", False),
        (None, "model.published", False),
        (("job.failure",), "job.success", False),
        (("job.failure", "job.retrying"), "job.retrying", True),
        (("model.published",), "model.published", True),
        (("*",), "model.published", True),
        (("*",), "job.blocked", True),
        ((), "job.success", False),
    ],
)
def test_who_hears_of_which_type(
    database: Database, events: tuple[str, ...] | None, event_type: str, wanted: bool
) -> None:
    new_endpoint(database, kind="standing", events=events)
    bound = new_endpoint(database, events=events)
    (reported,) = publish(database, IngestItem(occurrence("job-1", type=event_type), (bound,)))
    assert reported.deliveries == (2 if wanted else 0)


def test_standing_endpoints_hear_of_application_events_each_time(database: Database) -> None:
    new_endpoint(database, kind="standing", events=("model.published",))
    what = Occurrence(
        type="model.published", occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION, data={"id": 1}
    )
    assert [event.deliveries for event in publish(database, what, what)] == [1, 1]
    assert len(rows(database, Event)) == 2


def test_a_disabled_standing_endpoint_gets_nothing_new(database: Database) -> None:
    standing = new_endpoint(database, kind="standing")
    disable_standing(database, standing)
    assert publish(database, occurrence("job-1"))[0].deliveries == 0
    enable_standing(database, standing)
    assert publish(database, occurrence("job-2"))[0].deliveries == 1


def test_a_ping_goes_to_the_named_endpoint_only(database: Database) -> None:
    new_endpoint(database, kind="standing", events=("*",))
    pinged = new_endpoint(database, kind="standing", events=("job.failure",))
    ping = Occurrence(type=WEBHOOK_PING, occurred_at=datetime.now(UTC), source=SOURCE_APPLICATION)
    publish(database, IngestItem(ping, (pinged,)))
    assert row(database, Delivery).endpoint_id == pinged


def test_scopes_are_kept_apart(database: Database) -> None:
    tree = new_endpoint(database, job_id="job-1", scope="tree")
    single = new_endpoint(database, job_id="job-1")
    what = occurrence("job-1")
    publish(database, IngestItem(what, (tree, single)))
    assert row(database, Delivery).endpoint_id == single
    assert row(database, Watch, Watch.endpoint_id == tree).status == "reserved"
    publish(database, IngestItem(replace(what, scope="tree", jobs={"finished": 2}), (tree,)))
    assert [delivery.endpoint_id for delivery in rows(database, Delivery)] == [single, tree]
    assert row(database, Watch, Watch.endpoint_id == tree).status == "settled"


def test_what_is_not_terminal_leaves_the_watch_open(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1", events=("job.retrying",))
    confirm(database, endpoint_id, existing=["job-1"], unseen=[], reserved_job_id="job-1")
    publish(database, occurrence("job-1", type=JOB_RETRYING))
    assert row(database, Watch).status == "open"
    assert row(database, Delivery).event_type == "job.retrying"


def test_a_correction_is_an_event_of_its_own(database: Database) -> None:
    new_endpoint(database, job_id="job-1")
    what = occurrence("job-1", type=JOB_FAILURE, result=None)
    (first,) = publish(database, what)
    correction = replace(what, type="job.success", supersedes=first.event_id)
    reported = [publish(database, correction)[0] for _ in range(2)]
    assert [(event.created, event.deliveries) for event in reported] == [(True, 1), (False, 0)]
    assert rows(database, Event)[-1].supersedes == first.event_id


def test_the_endpoint_own_number_of_attempts_goes_first(database: Database) -> None:
    new_endpoint(database, job_id="job-1", max_attempts=3)
    publish(database, occurrence("job-1"))
    assert row(database, Delivery).max_attempts == 3


def test_a_render_that_raises_stores_nothing_of_the_batch(database: Database) -> None:
    good, bad = new_endpoint(database), new_endpoint(database, format="broken")

    def sometimes(endpoint: object, event_id: str, what: Occurrence) -> bytes:
        if endpoint.format == "broken":  # type: ignore[attr-defined]
            raise ZeroDivisionError
        return b"{}"

    items = [IngestItem(occurrence("job-1"), (good,)), IngestItem(occurrence("job-2"), (bad,))]
    with pytest.raises(ZeroDivisionError):
        publish(database, *items, render=sometimes)
    assert rows(database, Event) == []
    publish(database, items[0], render=sometimes)
    with pytest.raises(ZeroDivisionError):
        publish(database, items[1], render=sometimes)
    assert row(database, Event).job_id == "job-1"


def test_scrub_decides_what_is_stored_and_sent(database: Database) -> None:
    new_endpoint(database, job_id="job-1")
    seen: list[dict[str, object]] = []

    def scrub(payload: dict[str, object]) -> dict[str, object]:
        seen.append(dict(payload))
        return {**payload, "result": "gone", "event": "job.failure", "job_id": "other"}

    publish(database, occurrence("job-1", runid="run"), scrub=scrub)
    assert seen[0]["result"] == {"answer": 42}
    assert seen[0]["runid"] == "run"
    assert json.loads(row(database, Delivery).body)[1:] == ["job.success", "job-1", None, "gone"]
    stored = occurrence_from_json(row(database, Event).payload)
    assert (stored.type, stored.job_id, stored.result) == ("job.success", "job-1", "gone")


def test_scrub_in_place(database: Database) -> None:
    what = occurrence("job-1", type=JOB_FAILURE, result=None, error={"type": "E", "message": "secret"})

    def scrub(payload: dict[str, dict[str, str]]) -> None:
        payload["error"]["message"] = "***"

    publish(database, what, scrub=scrub)
    assert occurrence_from_json(row(database, Event).payload).error == {"type": "E", "message": "***"}
    assert what.error == {"type": "E", "message": "secret"}


def test_text_that_sql_cannot_hold(database: Database) -> None:
    (reported,) = publish(database, occurrence("job-1", runid="a\0b\ud800c"))
    assert reported.created
    assert row(database, Event).runid == "a\ufffdb?c"


def test_parked_evidence_opens_the_watch_and_an_ending_clears_it(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1")
    park_reports(
        database,
        [
            ParkedReport(endpoint_id, "job-1", '{"v": 1}'),
            ParkedReport(endpoint_id, "job-2", '{"v": 2}'),
            ParkedReport("eptesttest_all", "job-3", '{"v": 3}'),
            ParkedReport(None, "job-3", '{"v": 4}'),
            ParkedReport("epforeign_1", "job-4", "{}"),
            ParkedReport(endpoint_id, "job-5", "{}", needs_watch=True),
        ],
    )
    watches = {watch.job_id: watch for watch in rows(database, Watch)}
    assert {job_id: (w.endpoint_id, w.status, w.evidence) for job_id, w in watches.items()} == {
        "job-1": (endpoint_id, "open", '{"v": 1}'),
        "job-2": (endpoint_id, "open", '{"v": 2}'),
        "job-3": (None, "open", '{"v": 4}'),
    }
    publish(database, occurrence("job-1"))
    assert row(database, Watch, Watch.job_id == "job-1").evidence is None


def test_evidence_of_a_new_run_opens_a_settled_watch(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1")
    what = occurrence("job-1")
    publish(database, what)
    park_reports(database, [ParkedReport(endpoint_id, "job-1", "{}")])
    watch = row(database, Watch)
    assert (watch.status, watch.run, watch.evidence) == ("open", what.run, "{}")


@pytest.mark.slow_machine(reason="a writer waits five seconds at most for the two others")
def test_two_dispatchers_with_the_same_entries(database: Database) -> None:
    endpoint_id = new_endpoint(database)
    whats = [occurrence(f"job-{number}") for number in range(200)]
    items = [IngestItem(what, (endpoint_id,)) for what in whats]
    created: list[int] = []
    deliveries: list[int] = []
    start = threading.Barrier(3)

    def work(batch: list[IngestItem]) -> None:
        start.wait()
        for first in range(0, 200, 40):
            reported = publish(database, *batch[first : first + 40])
            created.append(sum(event.created for event in reported))
            deliveries.append(sum(event.deliveries for event in reported))

    threads = [
        threading.Thread(target=work, args=(batch,))
        for batch in (items, items[::-1], items[100:] + items[:100])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 15, "a thread raised"
    assert (sum(created), sum(deliveries)) == (200, 200)
    assert len(rows(database, Event)) == len(rows(database, Delivery)) == len(rows(database, Watch)) == 200


def test_more_items_than_one_statement_takes(database: Database) -> None:
    endpoint_id = new_endpoint(database)
    reported = publish(database, *[IngestItem(occurrence(f"job-{n}"), (endpoint_id,)) for n in range(2500)])
    assert sum(event.deliveries for event in reported) == 2500


def test_texts_of_any_script_and_bodies_of_any_bytes(database: Database) -> None:
    job_id, runid = "job-\u00e9\u4e2d\N{GRINNING FACE}\"\\'{}", "d\u00e9bit \u2028\x01\t\\N"
    new_endpoint(database, job_id=job_id)
    body = bytes(range(256))
    what = replace(occurrence(job_id), runid=runid, func="m\u00e9t\u00e9o.run", result={"\u0000": runid})
    (reported,) = ingest(database, [IngestItem(what)], render=lambda *_: body, max_attempts=3)
    event = row(database, Event)
    assert (reported.created, reported.deliveries) == (True, 1)
    assert (event.job_id, event.runid, event.run_key) == (job_id, runid, what.run_key)
    assert occurrence_from_json(event.payload) == replace(what, sequence=1)
    assert row(database, Delivery).body == body
    assert row(database, Watch).status == "settled"


def test_more_bytes_than_one_statement_takes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_insert, "_MAX_CHARACTERS", 3000)
    for number in range(12):
        new_endpoint(database, job_id=f"job-{number}")
    items = [IngestItem(occurrence(f"job-{number}")) for number in range(12)]
    bodies = iter([b"x" * 5000, *[b"y" * 700] * 11])
    reported = ingest(database, items, render=lambda *_: next(bodies), max_attempts=3)
    assert [event.deliveries for event in reported] == [1] * 12
    assert sorted(len(delivery.body) for delivery in rows(database, Delivery)) == [700] * 11 + [5000]


def test_statements_are_the_same_for_any_number_of_items(database: Database) -> None:
    """Drivers keep prepared statements, and one for each number of rows adds up to dozens of megabytes."""
    for number in range(1, 31):
        new_endpoint(database, job_id=f"job-{number}")
    numbers = iter(range(1, 31))
    seen: list[set[str]] = []
    for size in (3, 2, 5, 7, 4, 9):
        with statements_of(database) as statements:
            publish(database, *[occurrence(f"job-{next(numbers)}") for _ in range(size)])
        seen.append(set(statements))
    assert seen[0]
    assert all(statements == seen[0] for statements in seen[1:])
