"""The first migration guide, done: a plain host, three pilot routes, all routes, and back.

The diffs are those the documentation shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
import sqlalchemy as sa
from rq.job import Job

from flask_rq_webhooks.receiver import verify
from tests.hosts.copies import HostCopy, Web
from tests.servers import ROOT, Receiver

pytest.importorskip("flask_migrate")

SECRET = "a long random secret"
TOKENS = {"USER_TOKEN": "the-user", "OPERATOR_TOKEN": "the-operator"}
USER = {"Authorization": "Bearer the-user"}
RUN = "/runs/basin/disturbed"

#: Every route that enqueues, with what its clients send.
CALLS: dict[str, Any] = {
    "fetch_dem": {"extent": [1, 2, 3, 4]},
    "build_channels": {"csa": " 5 "},
    "set_outlet": {"lng": -117.5, "lat": 46.5},
    "build_subcatchments": {},
    "build_landuse": {"cover": ["forest"]},
    "build_soils": {"depth": 2},
    "build_climate": {"years": 7},
    "run_wepp": {},
    "run_ash": {"fire_date": "2024-08-01"},
    "run_omni": {"scenarios": ["thinning", "fire"]},
    "run_batch": ["one", "two"],
    "archive": {"comment": "done"},
    "fork": {"new_runid": "copy"},
    "export_dss": {},
    "delete": {},
}
PILOTS = ("build_landuse", "run_wepp", "archive")


def call(web: Web, name: str, **fields: Any) -> requests.Response:
    """Call one route, with webhook fields where some are given."""
    body, headers = CALLS[name], dict(USER)
    if name == "delete":
        web.post(f"{RUN}/create", {}, **USER)
    if name == "run_batch":
        headers |= {f"X-{field.replace('_', '-').title()}": value for field, value in fields.items()}
        return web.post("/rq/api/run_batch", body, **headers)
    return web.post(f"{RUN}/rq/api/{name}", {**body, **fields}, **headers)


def job_ids(response: requests.Response) -> list[str]:
    content = response.json()
    assert content["Success"] is True, content
    return list(content["job_ids"]) if "job_ids" in content else [content["job_id"]]


def seen_by_a_client(response: requests.Response) -> dict[str, Any]:
    """Return everything of an answer that may not change: all but ids and the date."""
    identifier = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    headers = {name: value for name, value in response.headers.items() if name != "Date"}
    return {"status": response.status_code, "headers": headers, "body": identifier.sub("ID", response.text)}


def in_redis(client: redis.Redis, job_id: str) -> dict[str, Any]:
    """Return everything of a job that may not change."""
    job = Job.fetch(job_id, connection=client)
    stored = client.hgetall(f"rq:job:{job_id}")
    return {
        "call": (job.func_name, job.args, job.kwargs),
        "options": (job.origin, job.timeout, job.description, job.meta),
        "fields": sorted(stored),
        "callbacks": sorted(name for name in stored if b"callback" in name),
    }


def everything(web: Web, client: redis.Redis) -> dict[str, Any]:
    """Call every route as clients do that know nothing of webhooks; return what they and RQ see."""
    found: dict[str, Any] = {}
    for name in CALLS:
        response = call(web, name)
        found[name] = seen_by_a_client(response), [in_redis(client, job_id) for job_id in job_ids(response)]
    bad = web.post(f"{RUN}/rq/api/set_outlet", {"lng": "x"}, **USER)
    shown = requests.get(f"{web.url}{RUN}/", headers=USER, timeout=10)
    status = requests.get(f"{web.url}/rq/api/jobstatus/none", headers=USER, timeout=10)
    refused = web.post(f"{RUN}/rq/api/archive", {})
    found["others"] = [seen_by_a_client(response) for response in (bad, shown, status, refused)]
    found["audit"] = client.lrange("watershed:enqueued", 0, -1)
    client.flushdb()
    return found


def rows(url: str, table: str) -> int:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            return int(connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())
    finally:
        engine.dispose()


def tables(url: str) -> set[str]:
    engine = sa.create_engine(url)
    try:
        return {name for name in sa.inspect(engine).get_table_names() if name.startswith("rq_webhooks_")}
    finally:
        engine.dispose()


def added_lines(diff: Path) -> dict[str, list[str]]:
    """Return the lines a diff adds, by file; it must remove none."""
    added: dict[str, list[str]] = {}
    for line in diff.read_text().splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ b/")
            added[file] = []
        elif line.startswith("+"):
            added[file].append(line[1:])
        else:
            assert not line.startswith("-") or line.startswith("--- "), line
    return added


def test_the_diffs_add_one_line_per_route_and_touch_no_task() -> None:
    pilot = added_lines(ROOT / "tests/hosts/pilot/1-pilot.diff")
    rest = added_lines(ROOT / "tests/hosts/pilot/2-all.diff")

    routes = {"routes/build.py", "routes/run.py", "routes/project.py"}
    assert set(pilot) == routes | {"app.py", "webhooks.py"}
    assert set(rest) == routes
    assert pilot["app.py"] == ["from webhooks import webhooks", "app.register_extension(webhooks)"]
    for file in routes:
        imported, decorator = pilot[file]
        assert imported == "from webhooks import webhooks"
        assert decorator.startswith("@webhooks.accepts_webhook")
    assert {line for lines in rest.values() for line in lines} == {"@webhooks.accepts_webhook"}
    assert sum(map(len, rest.values())) == len(CALLS) - len(PILOTS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pilot_then_all_then_back(tmp_path: Path, redis_url: str, redis_client: redis.Redis) -> None:
    with HostCopy("pilot", tmp_path, redis_url, **TOKENS) as host, Receiver() as receiver:
        database = host.environment["DATABASE_URL"]
        plain = host.files()
        fields = {"webhook_url": receiver.url, "webhook_secret": SECRET}

        # The host as it is, and what there is to do.
        *_, routes, table = host.flask(
            "db init", "db migrate -m runs", "db upgrade", "rq-webhooks routes --json", "rq-webhooks routes"
        )
        assert undecorated(routes) == set(CALLS)
        assert shown_in_the_guide() <= {" ".join(line.split()) for line in table.splitlines()}
        web = host.start_web().wait()
        before = everything(web, redis_client)
        web.process.stop()

        # Three routes. Switched off, nothing has changed, whatever clients ask for.
        host.apply("1-pilot.diff")
        web = host.start_web(WEPPCLOUD_WEBHOOKS_ENABLED="0")
        *migrated, routes, check = host.flask(
            "db migrate -m webhooks", "db upgrade", "rq-webhooks routes --json", "rq-webhooks routes --check"
        )
        assert migrated[-1].endswith("exit 0\n")
        assert undecorated(routes) == set(CALLS) - set(PILOTS)
        assert check.endswith("exit 1\n")
        assert len(tables(database)) == 7
        web.wait()
        assert everything(web, redis_client) == before
        response = call(web, "build_landuse", **fields)
        assert response.headers["Webhook-Registered"] == "false"
        (job_id,) = job_ids(response)
        off = in_redis(redis_client, job_id)
        assert off["callbacks"] == before["build_landuse"][1][0]["callbacks"]
        assert off["call"] == before["build_landuse"][1][0]["call"]  # the job does not get the fields either
        assert rows(database, "rq_webhooks_endpoint") == 0
        redis_client.flushdb()
        web.process.stop()

        # Switched on: the pilots deliver, everything else is as it was.
        web = host.start_web().wait()
        assert everything(web, redis_client) == before
        worker = host.start_worker("--worker-class", "rq_worker.WatershedWorker")
        dispatcher = host.start_dispatcher()
        asked = {}
        for name in CALLS:
            response = call(web, name, **fields)
            if name in PILOTS:
                assert response.headers["Webhook-Registered"] == "true", name
                (asked[name],) = job_ids(response)
            else:
                assert "Webhook-Registered" not in response.headers, name
                for job_id in job_ids(response):
                    assert in_redis(redis_client, job_id)["callbacks"] == before[name][1][0]["callbacks"]
        assert rows(database, "rq_webhooks_endpoint") == len(PILOTS)
        reported = by_job(receiver.wait_for(len(PILOTS)))
        assert set(reported) == set(asked.values())
        assert reported[asked["build_landuse"]]["result"] == {
            "runid": "basin",
            "options": {"cover": "forest"},
        }
        assert reported[asked["archive"]]["result"] == "basin.zip"
        tree = reported[asked["run_wepp"]]
        assert (tree["event"], tree["scope"], tree["jobs"]) == ("job.success", "tree", {"finished": 5})
        web.process.stop()

        # All routes.
        host.apply("2-all.diff")
        web = host.start_web()
        (check,) = host.flask("rq-webhooks routes --check")
        assert " 0 of them without a webhook; 0 cannot be judged" in check
        assert check.endswith("exit 0\n")
        web.wait()
        receiver.received.clear()
        expected: list[str] = []
        for name in CALLS:
            response = call(web, name, **fields)
            assert response.headers["Webhook-Registered"] == "true", name
            expected += job_ids(response)
        reported = by_job(receiver.wait_for(len(expected)))
        assert set(reported) == set(expected)
        bad = call(web, "run_ash", webhook_url="http://10.0.0.1/")
        assert (bad.status_code, bad.json()["Success"]) == (400, False)
        assert list(bad.json()["Details"]) == ["webhook_url"]

        # Back, with jobs waiting that were enqueued before: the old code, the workers as they are.
        worker.stop()
        waiting = [job_ids(call(web, name, **fields))[0] for name in ("run_ash", "fork", "archive")]
        dispatcher.stop()
        web.process.stop()
        host.apply("2-all.diff", reverse=True)
        host.apply("1-pilot.diff", reverse=True)
        assert host.files() == plain
        left_over = str(ROOT / "docs" / "migration" / "left_over.py")
        assert "queued: 3\n" in host.run(left_over)
        gone = str(_without_the_package(tmp_path))
        bare = host.start_worker("--burst", "--max-jobs", "1", PYTHONPATH=gone)
        assert bare.wait() == 0
        assert "Invalid attribute name: flask_rq_webhooks.callbacks" in bare.output
        assert host.start_worker("--burst", "--worker-class", "rq_worker.WatershedWorker").wait() == 0
        statuses = [Job.fetch(job_id, connection=redis_client).get_status() for job_id in waiting]
        assert statuses == ["failed", "finished", "finished"]  # the first met a worker without the package
        assert "queued" not in host.run(left_over)
        (downgraded,) = host.flask("db downgrade")
        assert downgraded.endswith("exit 0\n")
        assert tables(database) == set()


def shown_in_the_guide() -> set[str]:
    """Return the lines of the table that the guide shows, whatever their columns' widths."""
    page = (ROOT / "docs" / "migration" / "host-app.rst").read_text()
    block = page.split("$ flask --app app rq-webhooks routes\n")[1].split("\n\n")[0]
    lines = {" ".join(line.split()) for line in block.splitlines()} - {"..."}
    assert len(lines) >= 4
    return lines


def undecorated(routes: str) -> set[str]:
    """Return the routes that `flask rq-webhooks routes --json` calls missing, by the view's last name."""
    listed = json.loads(routes.removesuffix("exit 0\n"))
    return {route["view"].rpartition(".")[2] for route in listed if route["webhook"] == "missing"}


def by_job(received: list[Any]) -> dict[str, Any]:
    """Verify what was received and return the payloads by job."""
    for one in received:
        verify(one.body, one.headers, SECRET)
    return {one.json["job_id"]: one.json for one in received}


def _without_the_package(folder: Path) -> Path:
    """Return a PYTHONPATH on which importing the package fails as if it were not installed."""
    shadow = folder / "shadow"
    shadow.mkdir()
    (shadow / "flask_rq_webhooks.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'flask_rq_webhooks'\")\n"
    )
    return shadow
