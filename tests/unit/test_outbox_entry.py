"""What the outbox accepts as an entry: anyone who can write to Redis can write there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flask_rq_webhooks.errors import OutboxEntryError
from flask_rq_webhooks.protocol.json_safe import MAX_DEPTH as MAX_RESULT_DEPTH
from flask_rq_webhooks.protocol.json_safe import to_json_safe
from flask_rq_webhooks.queue.outbox_entry import (
    MAX_DEPTH,
    MAX_ENTRY_BYTES,
    OutboxEntry,
    confirm_entry,
    parse_entry,
)

ENDPOINT = "epnnnnnnnn_" + "0" * 26
MOMENT = "2026-01-02T03:04:05.678900Z"
ERROR = {"type": "ValueError", "message": "no such basin", "traceback": "ValueError: no such basin\n"}


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "v": 1,
        "kind": "success",
        "endpoint": ENDPOINT,
        "job_id": "job-1",
        "run": MOMENT,
        "at": 1767323045.25,
        "func": "tests.jobs.run",
        "queue": "default",
        "created_at": MOMENT,
        "enqueued_at": MOMENT,
        "started_at": None,
        "runid": "basin-7",
        "retries_left": None,
        "result": {"peak": [12.5, None, True]},
        "result_truncated": False,
        "error": None,
    } | changes


def raw(**changes: Any) -> bytes:
    return json.dumps(fields(**changes)).encode()


def test_a_success() -> None:
    entry = parse_entry(raw())

    assert entry == OutboxEntry(
        kind="success",
        endpoint=ENDPOINT,
        job_id="job-1",
        run=MOMENT,
        at=1767323045.25,
        func="tests.jobs.run",
        queue="default",
        created_at=MOMENT,
        enqueued_at=MOMENT,
        runid="basin-7",
        result={"peak": [12.5, None, True]},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "failure", "result": None, "error": ERROR, "retries_left": 2},
        {"kind": "stopped", "result": None, "run": f"created:{MOMENT}", "enqueued_at": None},
        {"endpoint": "epnnnnnnnn_all", "func": None, "queue": None, "runid": None, "created_at": None},
        {"result": None, "result_truncated": True, "at": 1767323045},
        {"result": "\u00e9 \U0001f30a \0"},
        {"job_id": "j" * 512},
    ],
)
def test_written_again_it_is_the_same(changes: dict[str, Any]) -> None:
    entry = parse_entry(raw(**changes))

    assert json.loads(entry.to_json()) == fields(**changes)
    assert parse_entry(entry.to_json().encode()) == entry


def test_a_request_to_confirm() -> None:
    text = json.dumps(confirm_entry(ENDPOINT, ["job-1", "job-2"])).encode()

    entry = parse_entry(text)

    assert entry == OutboxEntry(kind="confirm", endpoint=ENDPOINT, jobs=("job-1", "job-2"))
    assert parse_entry(entry.to_json().encode()) == entry


def test_the_deepest_result_a_callback_writes_is_accepted() -> None:
    value: Any = "bottom"
    for _level in range(100):
        value = [value]
    assert parse_entry(raw(result=to_json_safe(value))).result is not None
    assert MAX_RESULT_DEPTH < MAX_DEPTH


def nested(levels: int) -> bytes:
    return raw(result="HERE").replace(b'"HERE"', b"[" * levels + b"]" * levels)


BAD = {
    "empty": b"",
    "no JSON": b"entry",
    "a pickle": b"\x80\x04N.",
    "UTF-16": json.dumps(fields()).encode("utf-16"),
    "UTF-8": raw().replace(b"basin-7", "b\u00e9".encode()),
    "no UTF-8": raw().replace(b"basin-7", b"b\xff"),
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "text behind it": raw() + b"{}",
    "too long": raw(result="x" * MAX_ENTRY_BYTES),
    "a number of 5,000 digits": raw(result="HERE").replace(b'"HERE"', b"1" * 5000),
    "nested a little": nested(MAX_DEPTH),
    "nested a lot": nested(100_000),
    "nested in objects": raw(result="HERE").replace(b'"HERE"', b'{"a":' * 500 + b"1" + b"}" * 500),
    "same key twice": raw().replace(b'"v": 1', b'"v": 1, "v": 1'),
    "same key twice, deep down": raw(result="HERE").replace(b'"HERE"', b'{"a": 1, "a": 2}'),
    "NaN": raw(result=float("nan")),
    "Infinity": raw(result=[float("inf")]),
    "an infinite number": raw(result="HERE").replace(b'"HERE"', b"-1e999"),
    "half a surrogate pair": raw(result="\ud800"),
    "half a surrogate pair as key": raw(result={"\udfff": 1}),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_no_json_or_json_that_means_mischief(text: bytes) -> None:
    with pytest.raises(OutboxEntryError) as caught:
        parse_entry(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"v": 2}, "its version is 2, this release reads 1."),
        ({"v": True}, "its version is True"),
        ({"v": 1.0}, "its version is 1.0"),
        ({"v": "1"}, "its version is '1'"),
        ({"kind": "finished"}, "its kind 'finished' is unknown."),
        ({"kind": None}, "its kind None is unknown."),
        ({"kind": ["success"]}, "its kind ['success'] is unknown."),
        ({"more": 1}, "it has the unknown field 'more'."),
        ({"endpoint": "ep_1"}, "its endpoint 'ep_1' is no endpoint id."),
        ({"endpoint": f"{ENDPOINT}'; DROP TABLE"}, "is no endpoint id."),
        ({"endpoint": f"{ENDPOINT}\n"}, "is no endpoint id."),
        ({"endpoint": None}, "its endpoint None is no endpoint id."),
        ({"job_id": ""}, "'' is no job id."),
        ({"job_id": 7}, "7 is no job id."),
        ({"job_id": "a\0"}, "'a\\x00' is no job id."),
        ({"job_id": "j" * 513}, "is no job id."),
        ({"run": "now"}, "its run 'now' is not one."),
        ({"run": None}, "its run None is not one."),
        ({"run": "created:"}, "its run 'created:' is not one."),
        ({"run": "2026-01-02T03:04:05Z"}, "its run"),
        ({"run": "2026-01-02T03:04:05.678900+00:00"}, "its run"),
        ({"run": f"created:created:{MOMENT}"}, "its run"),
        ({"created_at": "2026-13-02T03:04:05.678900Z"}, "its created_at"),
        ({"enqueued_at": 1767323045}, "its enqueued_at 1767323045 is no time as RQ writes it."),
        ({"started_at": ""}, "its started_at '' is no time"),
        ({"at": None}, "its at None is no unix time."),
        ({"at": True}, "its at True is no unix time."),
        ({"at": 1e300}, "its at 1e+300 is no unix time."),
        ({"at": -1}, "its at -1 is no unix time."),
        ({"at": "1767323045"}, "its at '1767323045' is no unix time."),
        ({"func": 1}, "its func is no text"),
        ({"queue": ["default"]}, "its queue is no text"),
        ({"runid": "r" * 513}, "its runid is no text of at most 512 characters."),
        ({"runid": "a\0"}, "its runid is no text"),
        ({"retries_left": -1}, "its retries_left -1 is no count."),
        ({"retries_left": 1.0}, "its retries_left 1.0 is no count."),
        ({"retries_left": True}, "its retries_left True is no count."),
        ({"retries_left": 2**31}, "is no count."),
        ({"result_truncated": 1}, "its result_truncated 1 is not true or false."),
        ({"error": ERROR}, "a success has no error."),
        ({"kind": "stopped"}, "a stopped has no result."),
        ({"kind": "failure", "result": None}, "its error is not {type, message, traceback} in texts."),
        ({"kind": "failure", "result": None, "error": "x"}, "its error is not"),
        ({"kind": "failure", "result": None, "error": {"type": "x", "message": "y"}}, "its error is not"),
        ({"kind": "failure", "result": None, "error": ERROR | {"message": None}}, "its error is not"),
        ({"kind": "failure", "result": None, "error": ERROR | {"code": "1"}}, "its error is not"),
        ({"kind": "failure", "error": ERROR}, "a failure has no result."),
    ],
)
def test_wrong_fields(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(OutboxEntryError) as caught:
        parse_entry(raw(**changes))
    assert why in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", list(fields()))
def test_missing_fields(name: str) -> None:
    left = {key: value for key, value in fields().items() if key != name}
    with pytest.raises(OutboxEntryError):
        parse_entry(json.dumps(left).encode())


@pytest.mark.parametrize("jobs", [None, [], "job-1", [1], [""], {"job-1": 1}, ["job-1"] * 10_001])
def test_wrong_requests_to_confirm(jobs: Any) -> None:
    with pytest.raises(OutboxEntryError):
        parse_entry(json.dumps(confirm_entry(ENDPOINT, []) | {"jobs": jobs}).encode())
