"""RQ's committed state as we read it, against RQ's own writing of it."""

from __future__ import annotations

import decimal
import pathlib
import pickle
import uuid
import zlib
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
import rq
from rq.job import Job, JobStatus

from flask_rq_webhooks.protocol.events import format_time
from flask_rq_webhooks.queue.job_callbacks import Attachment, Queue, current_attachment
from flask_rq_webhooks.queue.job_reader import (
    JobRecord,
    probe_jobs,
    read_jobs,
    read_result_value,
    read_results,
)
from flask_rq_webhooks.queue.safe_pickle import UNKNOWN
from tests import jobs
from tests.pipeline import work

CREATED_AT = "2026-01-02T03:04:05.000006Z"
ENDPOINT = "epnnnnnnnn_" + "0" * 26


@pytest.fixture(params=[False, True], ids=["bytes", "decoded"])
def reader(request: pytest.FixtureRequest, redis_url: str) -> Iterator[redis.Redis]:
    """Give the client that reads; RQ itself writes through another one."""
    connection = redis.Redis.from_url(redis_url, decode_responses=request.param)
    yield connection
    connection.close()


def aware(moment: datetime | None) -> datetime | None:
    """RQ before 2.0 hands out naive UTC."""
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def test_absent_job(reader: redis.Redis) -> None:
    assert read_jobs(reader, ["nothing"]) == {}
    assert read_results(reader, ["nothing"]) == {"nothing": []}
    assert read_jobs(reader, []) == {}
    assert read_results(reader, []) == {}


def test_queued_job(reader: redis.Redis, redis_client: redis.Redis) -> None:
    reset = current_attachment.set(Attachment(ENDPOINT, f"{ENDPOINT}~250"))
    job = Queue("low", connection=redis_client).enqueue(
        jobs.add, 1, 2, retry=rq.Retry(3), on_success=rq.Callback(jobs.note_success)
    )
    current_attachment.reset(reset)

    state = read_jobs(reader, [job.id])[job.id]

    enqueued_at = aware(job.enqueued_at)
    assert enqueued_at is not None
    assert state == JobRecord(
        job_id=job.id,
        status="queued",
        run=format_time(enqueued_at),
        created_at=aware(job.created_at),
        enqueued_at=enqueued_at,
        queue="low",
        func="tests.jobs.add",
        retries_left=3,
        tokens=frozenset({ENDPOINT}),
    )


def test_job_without_callbacks_and_with_its_own_description(
    reader: redis.Redis, redis_client: redis.Redis
) -> None:
    job = rq.Queue("default", connection=redis_client).enqueue(jobs.add, 1, 2, description="Add (1 and 2)")
    state = read_jobs(reader, [job.id])[job.id]
    assert (state.tokens, state.func, state.retries_left) == (frozenset(), "tests.jobs.add", None)


def test_names_that_chain_several_endpoints(reader: redis.Redis, redis_client: redis.Redis) -> None:
    other = "epmmmmmmmm_" + "1" * 26
    name = f"flask_rq_webhooks.callbacks.success.{ENDPOINT}.flask_rq_webhooks.callbacks.success.{other}.a.b"
    job = rq.Queue("default", connection=redis_client).enqueue(jobs.add, on_success=rq.Callback(name))
    assert read_jobs(reader, [job.id])[job.id].tokens == {ENDPOINT, other}


@pytest.mark.parametrize("status", [status.value for status in JobStatus])
def test_every_status_of_this_rq(status: str, reader: redis.Redis, redis_client: redis.Redis) -> None:
    job = rq.Queue("default", connection=redis_client).enqueue(jobs.add)
    job.set_status(JobStatus(status))
    assert read_jobs(reader, [job.id])[job.id].status == status


def test_scheduled_and_deferred_jobs_have_no_enqueued_at(
    reader: redis.Redis, redis_client: redis.Redis
) -> None:
    queue = rq.Queue("default", connection=redis_client)
    first = queue.enqueue(jobs.add)
    deferred = queue.enqueue(jobs.add, depends_on=first)
    scheduled = queue.enqueue_in(timedelta(hours=1), jobs.add)

    states = read_jobs(reader, [deferred.id, scheduled.id])

    assert [state.status for state in states.values()] == ["deferred", "scheduled"]
    for job in (deferred, scheduled):
        created_at = aware(job.created_at)
        assert created_at is not None
        assert states[job.id].run == f"created:{format_time(created_at)}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_finished_and_failed_jobs(reader: redis.Redis, redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    queue = rq.Queue("default", connection=client)
    before = datetime.now(UTC)
    good, bad = queue.enqueue(jobs.same, {"peak": 12.5}), queue.enqueue(jobs.fail, "h\u00f6lle")
    again = queue.enqueue(jobs.fail, retry=rq.Retry(1))
    work(client)

    ids = [good.id, bad.id, again.id]
    states, results = read_jobs(reader, ids), read_results(reader, ids)

    assert [state.status for state in states.values()] == ["finished", "failed", "failed"]
    assert all(
        state.ended_at and state.started_at and state.ended_at >= state.started_at
        for state in states.values()
    )
    assert [[result.type for result in found] for found in results.values()][:2] == [["success"], ["failure"]]
    (result,) = results[bad.id]
    assert before - timedelta(seconds=1) < result.at <= datetime.now(UTC)
    assert result.exc is not None
    assert result.exc.rstrip().endswith("ValueError: h\u00f6lle")
    assert read_result_value(reader, good.id) == {"peak": 12.5}
    assert read_result_value(reader, bad.id) is UNKNOWN
    assert states[again.id].retries_left == 0

    for job_id, found in results.items():  # as RQ itself reads them
        of_rq = Job.fetch(job_id, connection=client).results()
        assert [result.exc for result in found] == [result.exc_string for result in reversed(of_rq)]
        assert [result.at for result in found] == [aware(result.created_at) for result in reversed(of_rq)]
    client.close()


@pytest.mark.skipif(not hasattr(rq.results.Result.Type, "RETRIED"), reason="this RQ cannot return Retry")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_returned_retries(reader: redis.Redis, redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    job = rq.Queue("default", connection=client).enqueue(jobs.same, rq.Retry(1))
    work(client)

    types = [result.type for result in read_results(reader, [job.id])[job.id]]
    assert types == ["retried", "failure"]
    assert read_jobs(reader, [job.id])[job.id].status == "failed"
    client.close()


def test_results_of_no_known_kind_are_passed_over(reader: redis.Redis, redis_client: redis.Redis) -> None:
    key = "rq:results:job-1"
    redis_client.xadd(key, {"type": "9"})
    redis_client.xadd(key, {"no": "type"})
    redis_client.xadd(key, {"type": "2", "exc_string": "*** no base64 ***"})
    redis_client.xadd(key, {"type": "2", "exc_string": b64encode(b"not compressed").decode()})
    redis_client.xadd(key, {"type": "2", "exc_string": b64encode(zlib.compress(b"x" * 2**24)).decode()})

    found = read_results(reader, ["job-1"])["job-1"]

    assert [result.type for result in found] == ["failure"] * 3
    assert [result.exc for result in found[:2]] == [None, "not compressed"]
    assert len(found[2].exc or "") == 2**20


def test_traceback_in_the_hash_as_rq_1_keeps_it(reader: redis.Redis, redis_client: redis.Redis) -> None:
    redis_client.hset(
        "rq:job:job-1",
        mapping={"created_at": CREATED_AT, "status": "failed", "exc_info": zlib.compress(b"Moved to failed")},
    )
    assert read_jobs(reader, ["job-1"])["job-1"].exc == "Moved to failed"


def test_hash_full_of_nonsense(reader: redis.Redis, redis_client: redis.Redis) -> None:
    nonsense = {
        "status": b"\xff",
        "created_at": CREATED_AT.encode(),
        "enqueued_at": b"",
        "retries_left": b"many",
        "origin": b"",
        "exc_info": b"\x00\xff",
        "success_callback_name": b"flask_rq_webhooks.callbacks.success.",
    }
    redis_client.hset("rq:job:job-1", mapping=nonsense)
    state = read_jobs(reader, ["job-1"])["job-1"]
    assert (state.run, state.enqueued_at, state.retries_left) == (f"created:{CREATED_AT}", None, None)
    assert (state.queue, state.tokens) == (None, frozenset())


def test_broken_hashes_are_reported_and_hold_no_other_up(
    reader: redis.Redis, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    good = rq.Queue("default", connection=redis_client).enqueue(jobs.add).id
    a_set, no_time, heartbeat = (f"{name}-{good}" for name in ("a-set", "no-time", "late-heartbeat"))
    redis_client.sadd(f"rq:job:{a_set}", "x")
    redis_client.hset(f"rq:job:{no_time}", mapping={"status": "queued", "created_at": "yesterday"})
    redis_client.hset(f"rq:job:{heartbeat}", mapping={"last_heartbeat": CREATED_AT})
    redis_client.set(f"rq:results:{a_set}", "no stream")

    ids = [a_set, no_time, heartbeat, good]
    for _twice in range(2):
        states = read_jobs(reader, ids)

        assert list(states) == [good]
        assert set(states.unreadable) == {a_set, no_time}
        assert read_results(reader, ids) == {job_id: [] for job_id in ids}
        assert read_result_value(reader, a_set) is UNKNOWN
    assert [probe is None for probe in probe_jobs(reader, ids)] == [True, False, True, False]
    assert caplog.text.count("is set aside") == 2  # once each


@pytest.mark.parametrize(
    "time", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999Z", "2026-13-01T00:00:00.000000Z"]
)
def test_impossible_times_are_as_if_they_were_not_there(
    time: str, reader: redis.Redis, redis_client: redis.Redis
) -> None:
    fields = {"status": "finished", "created_at": CREATED_AT, "enqueued_at": time, "ended_at": time}
    redis_client.hset("rq:job:job-1", mapping=fields)
    state = read_jobs(reader, ["job-1"])["job-1"]
    assert (state.enqueued_at, state.ended_at) == (None, None)


def test_result_with_an_impossible_id_is_passed_over(reader: redis.Redis, redis_client: redis.Redis) -> None:
    redis_client.xadd("rq:results:job-1", {"type": "1"})
    redis_client.xadd("rq:results:job-1", {"type": "2"}, id="18446744073709551615-1")
    assert [result.type for result in read_results(reader, ["job-1"])["job-1"]] == ["success"]


def test_thousands_of_jobs(reader: redis.Redis, redis_client: redis.Redis) -> None:
    queue = rq.Queue("default", connection=redis_client)
    made = queue.enqueue_many([rq.Queue.prepare_data(jobs.add)] * 1200)
    ids = [job.id for job in made] + ["nothing"]

    states = read_jobs(reader, ids)

    assert list(states) == ids[:-1]
    assert len(states) == 1200


# -- return values ------------------------------------------------------------------------------------------


def keep(client: redis.Redis, value: bytes | None) -> None:
    fields: dict[Any, Any] = {"type": "1"}
    if value is not None:
        fields["return_value"] = b64encode(value).decode()
    client.xadd("rq:results:job-1", fields)


class Elsewhere:
    """A class of the job's program."""


ran: list[str] = []


class RunsCode:
    def __reduce__(self) -> Any:
        return (ran.append, ("code",))


PLAIN = [
    None,
    True,
    3,
    2.5,
    "text",
    b"bytes",
    (1, [2, {"three": {4}}]),
    frozenset({1}),
    datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    datetime(2026, 1, 2),
    timedelta(seconds=5),
    decimal.Decimal("1.5"),
    uuid.UUID(int=7),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_return_values_are_read(value: Any, reader: redis.Redis, redis_client: redis.Redis) -> None:
    keep(redis_client, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    assert read_result_value(reader, "job-1") == value


@pytest.mark.parametrize("path", ["/data/basin-7", "data/basin-7", "/", "."])
def test_paths_are_read_as_text(path: str, reader: redis.Redis, redis_client: redis.Redis) -> None:
    keep(redis_client, pickle.dumps(pathlib.PurePosixPath(path)))
    assert read_result_value(reader, "job-1") == path


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Elsewhere()),
        pickle.dumps(RunsCode()),
        b"\x80",
        b"",
        b"\x80\x04garbage",
        b"x" * (9 * 2**20),
    ],
    ids=["a class", "code", "cut", "empty", "garbage", "huge"],
)
def test_other_return_values_stay_unknown(
    data: bytes, reader: redis.Redis, redis_client: redis.Redis
) -> None:
    keep(redis_client, data)
    assert read_result_value(reader, "job-1") is UNKNOWN
    assert ran == []


def test_return_value_by_rqs_json_serializer(reader: redis.Redis, redis_client: redis.Redis) -> None:
    keep(redis_client, b'{"peak": 12.5}')
    assert read_result_value(reader, "job-1") == {"peak": 12.5}


def test_latest_success_counts(reader: redis.Redis, redis_client: redis.Redis) -> None:
    keep(redis_client, pickle.dumps("old"))
    keep(redis_client, None)
    redis_client.xadd("rq:results:job-1", {"type": "2"})
    assert read_result_value(reader, "job-1") is None
    assert read_result_value(reader, "nothing") is UNKNOWN
