"""The wire contracts, byte for byte; what is cut when a payload is too large; the stored form."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_rq_webhooks.protocol.events import JOB_TYPES, Occurrence
from flask_rq_webhooks.protocol.payloads import (
    FORMATS,
    RenderContext,
    Rendered,
    as_rendered,
    custom_format,
    job_payload,
    occurrence_from_json,
    occurrence_to_json,
)

AT = datetime(2024, 1, 1, tzinfo=UTC)
TRACEBACK = (
    "Traceback (most recent call last):\n"
    '  File "/app/worker.py", line 10, in perform\n'
    "    return job()\n"
    '  File "/app/jobs.py", line 3, in run\n'
    '    raise ValueError("no soil")\n'
    "ValueError: no soil\n"
)
ERROR = {"type": "ValueError", "message": "no soil", "traceback": TRACEBACK}

SUCCESS = Occurrence(
    type="job.success",
    occurred_at=AT,
    source="callback",
    job_id="j1",
    run="2023-12-31T23:59:00.000000Z",
    runid="own-run",
    func="host.jobs.build_soils_rq",
    queue="default",
    enqueued_at=AT - timedelta(minutes=1),
    started_at=AT - timedelta(seconds=30, microseconds=1),
    ended_at=AT,
    result={"b": [1, 2.5, None], "a": "grün"},
)
FAILURE = replace(SUCCESS, type="job.failure", result=None, error=ERROR)
APPLICATION = Occurrence(
    type="run.archived", occurred_at=AT, source="application", runid="own-run", data={"size": 3}
)
PING = Occurrence(type="webhook.ping", occurred_at=AT, source="application", data={})
CONTEXT = RenderContext(
    event_id="evt_1", runid=None, reference=None, traceback="full", include_result=True, max_bytes=262144
)

JOB_TAIL = (
    '"id":"evt_1","func":"host.jobs.build_soils_rq","queue":"default",'
    '"enqueued_at":"2023-12-31T23:59:00.000000Z","started_at":"2023-12-31T23:59:29.999999Z",'
    '"ended_at":"2024-01-01T00:00:00.000000Z","source":"callback","reference":null'
)


def of_type(event_type: str) -> Occurrence:
    return replace(SUCCESS, type=event_type, result=None)


def render(name: str, occurrence: Occurrence, **context: Any) -> str:
    return as_rendered(FORMATS[name](occurrence, replace(CONTEXT, **context))).body.decode("ascii")


def test_job_success() -> None:
    assert render("job", SUCCESS) == (
        '{"event":"job.success","job_id":"j1","runid":"own-run","timestamp":1704067200.0,'
        '"result":{"b":[1,2.5,null],"a":"gr\\u00fcn"},' + JOB_TAIL + "}"
    )


def test_job_failure() -> None:
    assert render("job", FAILURE) == (
        '{"event":"job.failure","job_id":"j1","runid":"own-run","timestamp":1704067200.0,'
        f'"error":{{"type":"ValueError","message":"no soil","traceback":{json.dumps(TRACEBACK)}}},'
        + JOB_TAIL
        + "}"
    )


@pytest.mark.parametrize(
    "event_type", ["job.stopped", "job.canceled", "job.lost", "job.retrying", "job.blocked"]
)
def test_other_endings_have_neither_result_nor_error(event_type: str) -> None:
    assert render("job", of_type(event_type)) == (
        f'{{"event":"{event_type}","job_id":"j1","runid":"own-run","timestamp":1704067200.0,' + JOB_TAIL + "}"
    )


def test_the_error_of_a_retry_is_reported() -> None:
    payload = job_payload(replace(of_type("job.retrying"), error=ERROR), CONTEXT)
    assert payload["error"] == ERROR
    assert list(payload)[4] == "error"


def test_a_result_of_none_is_there_and_a_failure_without_error_has_one() -> None:
    assert job_payload(of_type("job.success"), CONTEXT)["result"] is None
    assert job_payload(of_type("job.failure"), CONTEXT)["error"] == {
        "type": "Unknown",
        "message": "The job failed; RQ has kept no error.",
        "traceback": "",
    }


def test_the_endpoints_runid_and_the_reference() -> None:
    payload = job_payload(SUCCESS, replace(CONTEXT, runid="theirs", reference="r-7"))
    assert (payload["runid"], payload["reference"]) == ("theirs", "r-7")
    assert job_payload(replace(SUCCESS, runid=None), CONTEXT)["runid"] is None


def test_a_correction_and_a_tree_come_last() -> None:
    occurrence = replace(
        SUCCESS, supersedes="evt_0", scope="tree", jobs={"finished": 3, "failed": 0}, source="reconciled"
    )
    payload = job_payload(occurrence, CONTEXT)
    assert list(payload)[-5:] == ["source", "reference", "supersedes", "scope", "jobs"]
    assert (payload["supersedes"], payload["scope"], payload["jobs"]) == (
        "evt_0",
        "tree",
        {"finished": 3, "failed": 0},
    )


@pytest.mark.parametrize(
    ("traceback", "shown"),
    [
        ("full", TRACEBACK),
        (
            "last",
            '  File "/app/jobs.py", line 3, in run\n    raise ValueError("no soil")\nValueError: no soil\n',
        ),
        ("none", None),
    ],
)
@pytest.mark.parametrize("name", ["job", "standard"])
def test_traceback_setting(name: str, traceback: str, shown: str | None) -> None:
    payload = json.loads(render(name, FAILURE, traceback=traceback))
    assert payload.get("data", payload)["error"] == {
        "type": "ValueError",
        "message": "no soil",
        "traceback": shown,
    }


def test_the_last_of_a_traceback_without_frames() -> None:
    killed = {"type": "x", "message": "", "traceback": "Moved to FailedJobRegistry\nWork-horse terminated\n"}
    payload = job_payload(replace(FAILURE, error=killed), replace(CONTEXT, traceback="last"))
    assert payload["error"]["traceback"] == "Work-horse terminated"


def test_the_task_format_never_carries_a_traceback() -> None:
    assert "/app/" not in render("task", FAILURE)


@pytest.mark.parametrize("name", ["job", "task", "standard"])
def test_include_result_off(name: str) -> None:
    text = render(name, SUCCESS, include_result=False)
    assert '"result":null' in text
    assert "truncated" not in text


def test_application_events_and_pings_in_job_format() -> None:
    assert render("job", APPLICATION) == (
        '{"event":"run.archived","job_id":null,"runid":"own-run","timestamp":1704067200.0,"data":{"size":3},'
        '"id":"evt_1","source":"application","reference":null}'
    )
    assert render("job", PING) == (
        '{"event":"webhook.ping","job_id":null,"runid":null,"timestamp":1704067200.0,"data":{},'
        '"id":"evt_1","source":"application","reference":null}'
    )


def test_task_success() -> None:
    assert render("task", SUCCESS) == (
        '{"event_type":"task.completed","result":{"a":"gr\\u00fcn","b":[1,2.5,null]},'
        '"task":{"id":"j1","name":"build_soils_rq","status":"SUCCESS"},"timestamp":"2024-01-01T00:00:00.000000Z"}'
    )


def test_task_failure() -> None:
    assert render("task", FAILURE) == (
        '{"error":"no soil","event_type":"task.failed",'
        '"task":{"id":"j1","name":"build_soils_rq","status":"FAILURE"},"timestamp":"2024-01-01T00:00:00.000000Z"}'
    )


@pytest.mark.parametrize(
    ("event_type", "reported", "status", "error"),
    [
        ("job.stopped", "task.cancelled", "REVOKED", "The job was stopped."),
        ("job.canceled", "task.cancelled", "REVOKED", "The job was canceled."),
        (
            "job.lost",
            "task.failed",
            "FAILURE",
            "The job is gone from Redis without a recorded ending; its outcome is unknown.",
        ),
        ("job.failure", "task.failed", "FAILURE", "The job failed; RQ has kept no error."),
        ("job.retrying", "task.retrying", "RETRY", "The job failed and will be tried again."),
        ("job.blocked", "task.blocked", "PENDING", "The job waits for a job that did not succeed."),
    ],
)
def test_task_words(event_type: str, reported: str, status: str, error: str) -> None:
    assert json.loads(render("task", of_type(event_type))) == {
        "event_type": reported,
        "timestamp": "2024-01-01T00:00:00.000000Z",
        "task": {"id": "j1", "name": "build_soils_rq", "status": status},
        "error": error,
    }


def test_every_job_type_has_task_words() -> None:
    for event_type in JOB_TYPES:
        assert json.loads(render("task", of_type(event_type)))["task"]["id"] == "j1"


def test_task_extras_only_where_there_are_any() -> None:
    payload = json.loads(render("task", replace(SUCCESS, supersedes="evt_0"), reference="r-7"))
    assert set(payload) == {"event_type", "timestamp", "task", "result", "reference", "supersedes"}
    assert json.loads(render("task", replace(SUCCESS, func=None)))["task"]["name"] is None
    assert json.loads(render("task", replace(SUCCESS, func="plain")))["task"]["name"] == "plain"


def test_application_events_in_task_and_standard_format() -> None:
    assert render("task", APPLICATION) == (
        '{"data":{"size":3},"event_type":"run.archived","timestamp":"2024-01-01T00:00:00.000000Z"}'
    )
    assert render("standard", APPLICATION) == (
        '{"type":"run.archived","timestamp":"2024-01-01T00:00:00.000000Z","data":{"size":3}}'
    )
    assert render("standard", PING) == (
        '{"type":"webhook.ping","timestamp":"2024-01-01T00:00:00.000000Z","data":{}}'
    )


def test_standard() -> None:
    assert render("standard", SUCCESS) == (
        '{"type":"job.success","timestamp":"2024-01-01T00:00:00.000000Z","data":{"job_id":"j1","runid":"own-run",'
        '"result":{"b":[1,2.5,null],"a":"gr\\u00fcn"},' + JOB_TAIL + "}}"
    )


# -- too large ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["job", "task", "standard"])
def test_a_result_that_does_not_fit_is_left_out_and_marked(name: str) -> None:
    large = replace(SUCCESS, result=["x" * 5000])
    exact = len(render(name, large))
    assert len(render(name, large, max_bytes=exact)) == exact
    text = render(name, large, max_bytes=exact - 1)
    payload = json.loads(text)
    payload = payload.get("data", payload)
    assert payload["result"] is None
    assert payload["result_truncated"] is True
    if name != "task":
        keys = list(payload)
        assert keys[keys.index("result") + 1] == "result_truncated"


def test_a_result_cut_off_in_the_worker_is_marked() -> None:
    payload = job_payload(replace(SUCCESS, result=None, result_truncated=True), CONTEXT)
    assert (payload["result"], payload["result_truncated"]) == (None, True)
    assert "result_truncated" not in job_payload(SUCCESS, CONTEXT)


@pytest.mark.parametrize("name", ["job", "task", "standard"])
def test_data_that_does_not_fit(name: str) -> None:
    payload = json.loads(render(name, replace(APPLICATION, data={"x": "y" * 9000}), max_bytes=4096))
    if name == "standard":
        assert payload["data"] == {"data_truncated": True}
    else:
        assert (payload["data"], payload["data_truncated"]) == (None, True)


@pytest.mark.parametrize("filling", ["x", "\n", "ü", "\U0001f600", '"'], ids=ascii)
def test_a_traceback_that_does_not_fit_keeps_its_end(filling: str) -> None:
    error = {**ERROR, "traceback": filling * 10_000 + TRACEBACK}
    text = render("job", replace(FAILURE, error=error), max_bytes=4096)
    assert len(text) <= 4096
    shown = json.loads(text)["error"]
    assert shown["traceback"].startswith("[cut]\n")
    assert shown["traceback"].endswith("\nValueError: no soil\n")
    assert shown["message"] == "no soil"


def test_only_as_much_of_a_traceback_is_cut_as_must_be() -> None:
    error = {**ERROR, "traceback": "x" * 10_000}
    text = render("job", replace(FAILURE, error=error), max_bytes=8000)
    assert len(text) in range(7990, 8001)


@pytest.mark.parametrize("name", ["job", "task", "standard"])
@pytest.mark.parametrize("field", ["message", "type", "runid", "func", "queue"])
def test_other_texts_are_cut_at_last(name: str, field: str) -> None:
    huge = "\U0001f600" * 50_000
    if field in ("message", "type"):
        occurrence = replace(FAILURE, error={**ERROR, field: huge})
    else:
        changes: dict[str, Any] = {field: huge}
        occurrence = replace(FAILURE, **changes)
    text = render(name, occurrence, max_bytes=4096, reference="ü" * 256)
    assert len(text) <= 4096
    payload = json.loads(text)
    assert json.dumps("j1") in text
    if name == "job":
        assert payload["error"]["traceback"].endswith("\nValueError: no soil\n")
        assert payload["reference"] == "ü" * 256


def test_a_traceback_gives_way_to_a_reference() -> None:
    error = {**ERROR, "traceback": "\U0001f600" * 10_000}
    text = render("job", replace(FAILURE, error=error), max_bytes=4096, reference="ü" * 256)
    assert len(text) <= 4096
    payload = json.loads(text)
    assert (payload["error"]["traceback"], payload["reference"]) == ("", "ü" * 256)


texts = st.text(st.characters(), max_size=3000)


@given(texts, texts, texts, st.integers(4096, 20_000), st.sampled_from(sorted(FORMATS)))
def test_payloads_always_fit(message: str, traceback: str, runid: str, max_bytes: int, name: str) -> None:
    occurrence = replace(
        FAILURE,
        runid=runid * 5,
        func=message * 3,
        queue=traceback,
        error={"type": message, "message": message * 9, "traceback": traceback * 9},
    )
    body = as_rendered(FORMATS[name](occurrence, replace(CONTEXT, max_bytes=max_bytes))).body
    assert len(body) <= max_bytes
    assert json.loads(body)


# -- values that are no JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_values_that_are_no_json_are_converted_rather_than_fatal(name: str) -> None:
    text = render(name, replace(SUCCESS, result={"a": float("nan"), "b": {1}, 3: "\ud800"}))
    payload = json.loads(text)
    assert payload.get("data", payload)["result"] == {"a": None, "b": [1], "3": "\\ud800"}


# -- custom formats --------------------------------------------------------------------------------------


def test_custom_formats() -> None:
    def minimal(payload: dict[str, Any]) -> dict[str, Any]:
        assert list(payload)[:4] == ["event", "job_id", "runid", "timestamp"]
        return {"ok": payload["event"] == "job.success", "ü": 1}

    assert custom_format(minimal)(SUCCESS, CONTEXT) == Rendered(b'{"ok":true,"\\u00fc":1}')
    assert custom_format(lambda payload: b"{}")(SUCCESS, CONTEXT) == Rendered(b"{}", "application/json")


@pytest.mark.parametrize(
    "returned", [None, "text", ["a"], 5, (b"",), ("text", "text/plain"), (b"", "a/b", "c"), [b"", "a/b"]]
)
def test_custom_formats_that_return_something_else(returned: Any) -> None:
    def wrong(payload: dict[str, Any]) -> Any:
        return returned

    with pytest.raises(TypeError, match="'wrong' returned .*; return a dict, bytes or"):
        custom_format(wrong)(SUCCESS, CONTEXT)


# -- the stored form -------------------------------------------------------------------------------------

times = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.timezones()).map(
    lambda moment: moment.astimezone(UTC)
)
maybe_text = st.none() | st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
occurrences = st.builds(
    Occurrence,
    type=st.sampled_from(sorted(JOB_TYPES)) | st.just("run.archived"),
    occurred_at=times,
    source=st.sampled_from(["callback", "reconciled", "application"]),
    job_id=maybe_text,
    run=maybe_text,
    runid=maybe_text,
    func=maybe_text,
    queue=maybe_text,
    enqueued_at=st.none() | times,
    started_at=st.none() | times,
    ended_at=st.none() | times,
    result=values,
    result_truncated=st.booleans(),
    error=st.none() | st.fixed_dictionaries(dict.fromkeys(ERROR, st.text())),
    scope=st.sampled_from(["job", "tree"]),
    jobs=st.none() | st.dictionaries(st.text(), st.integers(), max_size=3),
    supersedes=maybe_text,
    data=st.dictionaries(st.text(), values, max_size=3),
)


@given(occurrences)
def test_the_stored_form_comes_back_as_it_was(occurrence: Occurrence) -> None:
    text = occurrence_to_json(occurrence)
    assert text.isascii()
    assert occurrence_from_json(text) == occurrence


@given(occurrences, st.sampled_from(sorted(FORMATS)))
def test_a_stored_occurrence_renders_the_same_bytes(occurrence: Occurrence, name: str) -> None:
    again = occurrence_from_json(occurrence_to_json(occurrence))
    assert FORMATS[name](again, CONTEXT) == FORMATS[name](occurrence, CONTEXT)


def test_other_zones_are_stored_as_utc() -> None:
    occurrence = replace(SUCCESS, occurred_at=AT.astimezone(timezone(timedelta(hours=5))))
    assert occurrence_from_json(occurrence_to_json(occurrence)) == SUCCESS


def test_stored_forms_of_other_versions() -> None:
    text = '{"type":"job.success","source":"callback","occurred_at":"2024-01-01T00:00:00Z","new":1}'
    assert occurrence_from_json(text) == Occurrence(type="job.success", source="callback", occurred_at=AT)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"type":"x","source":"y"}', '{"type":1,"source":"y","occurred_at":""}',
     '{"type":"x","source":"y","occurred_at":"soon"}'],
)  # fmt: skip
def test_what_is_no_stored_form(text: str) -> None:
    with pytest.raises(ValueError):
        occurrence_from_json(text)


# -- cloudevents ------------------------------------------------------------------------------------------


def cloudevent(occurrence: Occurrence, context: RenderContext = CONTEXT) -> dict[str, Any]:
    rendered = as_rendered(FORMATS["cloudevents"](occurrence, context))
    assert rendered.content_type == "application/cloudevents+json"
    event = json.loads(rendered.body)
    assert isinstance(event, dict)
    return event


def test_cloudevents() -> None:
    event = cloudevent(SUCCESS)
    standard = json.loads(as_rendered(FORMATS["standard"](SUCCESS, CONTEXT)).body)
    assert event == {
        "specversion": "1.0",
        "id": "evt_1",
        "source": "urn:rq-webhooks:queue:default",
        "type": "job.success",
        "time": "2024-01-01T00:00:00.000000Z",
        "datacontenttype": "application/json",
        "data": standard["data"],
        "subject": "j1",
    }
    assert cloudevent(replace(SUCCESS, queue="a b/ü"))["source"] == "urn:rq-webhooks:queue:a%20b%2F%C3%BC"
    application = cloudevent(APPLICATION)
    assert (application["source"], application["data"]) == ("urn:rq-webhooks:application", {"size": 3})
    assert "subject" not in application  # empty strings are not allowed there


def test_cloudevents_are_cut_like_the_others() -> None:
    context = replace(CONTEXT, max_bytes=4096)
    event = cloudevent(replace(SUCCESS, result="x" * 5000), context)
    assert (event["data"]["result"], event["data"]["result_truncated"]) == (None, True)


# -- content types ----------------------------------------------------------------------------------------


def test_a_format_may_say_what_its_bytes_are() -> None:
    render = custom_format(
        lambda payload: (f"<{payload['event']}/>".encode(), "application/xml; charset=utf-8")
    )
    assert render(SUCCESS, CONTEXT) == Rendered(b"<job.success/>", "application/xml; charset=utf-8")
    assert as_rendered(b"{}") == Rendered(b"{}", "application/json")


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "xml",
        "a/b\r\nX: y",
        "a/b\n",
        "a/b; charset",
        "text/\u00e9",
        "a/b" + "c" * 126,
        5,
        None,
        b"a/b",
        "a /b",
    ],
)
def test_a_content_type_that_is_none(content_type: Any) -> None:
    with pytest.raises(ValueError, match="content type"):
        custom_format(lambda payload: (b"", content_type))(SUCCESS, CONTEXT)
