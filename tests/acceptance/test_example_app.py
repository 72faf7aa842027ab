"""The example app as a client meets it: served over HTTP, stock worker, dispatcher, its own receiver."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import requests

from example_app import jobs
from example_app.receiver import Arrival, Receiver
from flask_rq_webhooks.protocol.signatures import body_signature
from tests.servers import Process, rq_worker, wait_until

SECRET = "what the client chose"
SHARED_SECRET = "what the analysis service and its clients share"
TOKEN = "what operators know"


@dataclass
class Service:
    """One served app and the receiver its webhooks go to."""

    url: str
    receiver: Receiver
    session: requests.Session

    def post(self, path: str, **options: Any) -> requests.Response:
        return self.session.post(self.url + path, timeout=20, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=20, **options)

    def arrivals(self, path: str, count: int = 1) -> list[Arrival]:
        """Wait for *count* requests on *path* of the receiver."""

        def found() -> list[Arrival]:
            return [arrival for arrival in list(self.receiver.arrivals) if arrival.path == path]

        wait_until(lambda: len(found()) >= count, timeout=40, what=f"{count} requests on {path}")
        return found()


@dataclass
class Example:
    """The watershed app, the analysis service, and the Redis they share."""

    app: Service
    analysis: Service
    redis_url: str
    runs_dir: Path


@pytest.fixture(scope="module")
def example(redis_server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    directory = tmp_path_factory.mktemp("example")
    environment = {
        "REDIS_URL": redis_server_url,
        "EXAMPLE_DATABASE_URI": f"sqlite:///{directory / 'watershed.db'}",
        "EXAMPLE_RUNS_DIR": str(directory / "runs"),
        "EXAMPLE_TOKEN": TOKEN,
        "ANALYSIS_DATABASE_URI": f"sqlite:///{directory / 'analysis.db'}",
        "ANALYSIS_SIGNING_SECRET": SHARED_SECRET,
        "ALLOW_HTTP": "1",
        "SECRET_KEY": "one for all processes",
    }
    with ExitStack() as cleanup:
        session = cleanup.enter_context(requests.Session())
        session.trust_env = False

        def start(path: str, secret: str) -> Service:
            server = cleanup.enter_context(
                Process("python", "-m", "example_app.serve", path, env=environment)
            )
            server.wait_for_output("serving on")
            found = re.search(r"serving on (\S+)", server.output)
            assert found is not None
            cleanup.enter_context(
                Process("python", "-m", "flask", "--app", path, "rq-webhooks", "worker", env=environment)
            )
            receiver = cleanup.enter_context(Receiver(0, [secret]))
            thread = threading.Thread(target=receiver.serve_forever, args=(0.05,))
            thread.start()
            cleanup.callback(thread.join)
            cleanup.callback(receiver.shutdown)
            return Service(found[1], receiver, session)

        app = start("example_app.app:app", SECRET)
        analysis = start("example_app.analysis:create_app", SHARED_SECRET)
        cleanup.enter_context(rq_worker(redis_server_url, env=environment))
        yield Example(app, analysis, redis_server_url, directory / "runs")
    client = redis.Redis.from_url(redis_server_url)
    client.flushdb()
    client.close()


def fields(service: Service, path: str) -> dict[str, str]:
    return {"webhook_url": service.receiver.url + path, "webhook_secret": SECRET}


def test_a_run_from_its_inputs_to_its_water_balance(example: Example) -> None:
    app = example.app
    for name in ("build_landuse", "build_soils", "build_climate"):
        response = app.post(f"/runs/blue-creek/plain/rq/api/{name}", json=fields(app, f"/hooks/{name}"))
        assert response.headers["Webhook-Registered"] == "true"
        (arrival,) = app.arrivals(f"/hooks/{name}")
        assert arrival.verified
        assert arrival.event == "job.success"
        payload = json.loads(arrival.body)
        assert payload["job_id"] == response.json()["job_id"]
        assert payload["runid"] == "blue-creek"
        assert payload["func"] == f"example_app.jobs.{name}_rq"
    assert payload["result"]["days"] == 365

    response = app.post("/runs/blue-creek/plain/rq/api/run_wepp", json=fields(app, "/hooks/run_wepp"))
    (arrival,) = app.arrivals("/hooks/run_wepp")
    runid, last_id = json.loads(arrival.body)["result"]
    assert runid == "blue-creek"
    summary_file = example.runs_dir / "blue-creek" / "summary.json"
    wait_until(summary_file.exists, what="the summary of the run")
    summary = wait_until(lambda: (text := summary_file.read_text()) and json.loads(text))
    assert summary["area_ha"] == 53.4
    assert 0 < summary["runoff_mm"] < summary["evapotranspiration_mm"] < summary["precipitation_mm"]

    children = app.get(f"/rq/api/jobstatus/{response.json()['job_id']}").json()["children"]
    assert sorted(children) == [
        *(f"jobs:{hillslope},func:run_hillslope_rq" for hillslope in range(1, 6)),
        "jobs:last,func:summarize_run_rq",
    ]
    assert children["jobs:last,func:summarize_run_rq"] == last_id
    page = app.get(f"/runs/blue-creek/plain/jobs/{response.json()['job_id']}").text
    assert all(child in page for child in children.values())


def test_an_uploaded_table_that_is_wrong_is_reported_as_failure(example: Example) -> None:
    app = example.app
    table = "date,precipitation_mm,tmin_c,tmax_c\n2023-01-01,0,5,-5\n"
    response = app.post(
        "/runs/frozen/plain/rq/api/build_climate",
        data=fields(app, "/hooks/frozen"),
        files={"climate_file": ("anything.csv", table)},
    )
    assert response.headers["Webhook-Registered"] == "true"
    (arrival,) = app.arrivals("/hooks/frozen")
    payload = json.loads(arrival.body)
    assert payload["event"] == "job.failure"
    assert payload["error"]["type"] == "InputError"
    assert payload["error"]["message"] == "climate.csv, line 2: tmin_c 5 is above tmax_c -5"
    assert "read_climate" in payload["error"]["traceback"]


def test_a_form_whose_webhook_fields_the_view_does_not_see(example: Example) -> None:
    app = example.app
    response = app.post(
        "/runs/deep/plain/rq/api/build_soils", data={**fields(app, "/hooks/deep"), "depth_factor": " 2 "}
    )
    assert response.json()["Success"] is True  # build_soils refuses fields it does not know
    (arrival,) = app.arrivals("/hooks/deep")
    assert json.loads(arrival.body)["result"]["capacity_mm"]["1"] == 324.0


def test_a_view_that_enqueues_nothing_says_so(example: Example) -> None:
    app = example.app
    body = {**fields(app, "/hooks/nothing"), "depth_factor": "deep"}
    response = app.post("/runs/none/plain/rq/api/build_soils", json=body)
    assert response.json() == {"Success": False, "Error": "depth_factor must be a number"}
    assert response.headers["Webhook-Registered"] == "false"


@pytest.mark.parametrize(
    ("fail", "event", "noted"), [(False, "success", "hello"), (True, "failure", "RuntimeError")]
)
def test_own_callbacks_run_as_before(example: Example, fail: bool, event: str, noted: str) -> None:
    app = example.app
    path = f"/hooks/hello-{event}"
    response = app.post("/runs/hello/plain/rq/api/hello_world", json={**fields(app, path), "fail": fail})
    (arrival,) = app.arrivals(path)
    assert arrival.event == f"job.{event}"
    client = redis.Redis.from_url(example.redis_url)
    lines = [line.decode() for line in client.lrange(jobs.GREETINGS_KEY, 0, -1)]
    client.close()
    (line,) = [line for line in lines if response.json()["job_id"] in line]
    assert line.startswith(f"{event} ")
    assert noted in line


def test_without_webhook_fields_nothing_is_different(example: Example) -> None:
    response = example.app.post("/runs/plain/plain/rq/api/hello_world", json={"fail": False})
    assert response.json()["Success"] is True
    assert "Webhook-Registered" not in response.headers


def test_the_receiver_fails_as_often_as_configured(example: Example) -> None:
    app = example.app
    response = app.post("/runs/flaky/plain/rq/api/build_landuse", json=fields(app, "/hooks/flaky?fail=1"))
    first, second = app.arrivals("/hooks/flaky", 2)
    assert (first.status, second.status) == (503, 204)
    assert first.webhook_id == second.webhook_id
    assert first.body == second.body
    assert (first.attempt, second.attempt) == ("1", "2")
    page = app.session.get(app.receiver.url + "/", timeout=10).text
    assert first.webhook_id in page
    assert "attempt 2 · answered 204 · verified" in page

    path = f"/webhooks/jobs/{response.json()['job_id']}"
    assert app.get(path).status_code == 403
    headers = {"Authorization": f"Bearer {TOKEN}"}
    status = wait_until(
        lambda: (answer := app.get(path, headers=headers).json())["delivery_status"] == "succeeded" and answer
    )
    (delivery,) = status["deliveries"]
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [503, 204]


def test_the_receiver_refuses_what_is_not_signed_with_its_secret(example: Example) -> None:
    receiver = example.app.receiver
    answer = example.app.session.post(
        receiver.url + "/hooks/forged", json={"event": "<b>job</b>"}, timeout=10
    )
    assert answer.status_code == 401
    (arrival,) = example.app.arrivals("/hooks/forged")
    assert not arrival.verified
    page = example.app.session.get(receiver.url + "/", timeout=10).text
    assert "&lt;b&gt;job&lt;/b&gt;" in page
    assert "<b>" not in page


def test_the_analysis_service_keeps_the_task_contract(example: Example) -> None:
    service = example.analysis
    response = service.post(
        "/api/v1/analyze/async",
        json={
            "flows": [3, 1.5, 2],
            "webhook_url": service.receiver.url + "/hooks/analysis",
            "sign_payload": True,
        },
    )
    assert response.status_code == 202
    assert response.headers["Webhook-Registered"] == "true"
    task_id = response.json()["task_id"]
    (arrival,) = service.arrivals("/hooks/analysis")
    assert arrival.verified
    assert arrival.event == "job.success"  # from X-Analysis-Event
    payload = json.loads(arrival.body)
    assert payload["event_type"] == "task.completed"
    assert payload["task"] == {"id": task_id, "name": "analyze_rq", "status": "SUCCESS"}
    assert payload["result"]["mean"] == pytest.approx(13 / 6)
    assert arrival.body == json.dumps(payload, sort_keys=True, separators=(",", ":"))
    assert arrival.headers["x-analysis-signature"] == body_signature(SHARED_SECRET, arrival.body.encode())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", arrival.headers["x-analysis-timestamp"])

    status = service.get(f"/webhooks/jobs/{task_id}").json()
    assert status["webhook_configured"] is True
    assert SHARED_SECRET not in json.dumps(status)


def test_the_analysis_service_refuses_a_list_of_no_numbers(example: Example) -> None:
    response = example.analysis.post("/api/v1/analyze/async", json={"flows": ["x"]})
    assert response.status_code == 422
