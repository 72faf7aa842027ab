"""Time every page and every list of the API with a million deliveries, and look at their query plans.

``python benchmarks/pages.py [--rows 1000000] [--repeat 40] [--plans]``

PostgreSQL in its default configuration on this machine, the app called in-process: what is timed is all
that happens between a request and its answer, templates included, without the network. A month of
deliveries: one host gets 40 % of them, 2 % are exhausted, 1 % canceled, 1 % pending. Beside the times: the
median of this process's own processor time, and what the server says it spent on the statements of the
slowest request. Those two stay what they are where other work keeps the machine busy. The exit code is 1
when a p95 is above the limit, or a plan reads all of a large table.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sqlalchemy import Connection, event, text  # noqa: E402

from flask_rq_webhooks.protocol.events import Occurrence  # noqa: E402
from flask_rq_webhooks.protocol.payloads import occurrence_to_json  # noqa: E402
from flask_rq_webhooks.state import State  # noqa: E402
from flask_rq_webhooks.storage.dispatchers import heartbeat  # noqa: E402
from flask_rq_webhooks.storage.models import first_id_at  # noqa: E402
from flask_rq_webhooks.storage.queries import _cursor_of  # noqa: E402
from tests.dashboard_app import open_host  # noqa: E402
from tests.servers import postgres_server, valkey_server  # noqa: E402

LIMIT_MS = 150.0
HOSTS, ENDPOINTS, STANDING, SPAN = 300, 20_000, 20, timedelta(days=30)
LARGE = ("rq_webhooks_delivery", "rq_webhooks_attempt", "rq_webhooks_event")


def fill(state: State, rows: int) -> None:
    """Write a month of *rows* deliveries, by COPY."""
    chance = random.Random(1)
    now = datetime.now(UTC)
    prefix = "ep" + state.namespace
    heartbeat(state.database, "dsp_1", started=True)
    hosts = ["busy.example.com", *(f"host{number}.example.com" for number in range(HOSTS - 1))]
    endpoints = []
    for number in range(ENDPOINTS + STANDING):
        made = now - SPAN + SPAN * number / (ENDPOINTS + STANDING)
        host = hosts[0] if chance.random() < 0.4 else chance.choice(hosts)
        endpoints.append(
            (first_id_at(prefix, made), "standing" if number >= ENDPOINTS else "job", host, made)
        )
    moments = [now - SPAN + SPAN * number / rows for number in range(rows)]

    def endpoint_rows() -> Iterator[tuple[Any, ...]]:
        for endpoint_id, kind, host, made in endpoints:
            yield (endpoint_id, kind, f"https://{host}/hooks", host, "job", "job", False, True, 0, made, made)

    def event_rows() -> Iterator[tuple[Any, ...]]:
        payload = occurrence_to_json(
            Occurrence(type="job.success", source="callback", occurred_at=now, result="x" * 200)
        )
        for number, at in enumerate(moments):
            kind = "job.failure" if number % 20 == 0 else "job.success"
            yield (
                first_id_at("evt", at), kind, f"job-{number}|end", f"job-{number}", f"run-{number % 5000}",
                "callback", payload, at, at,
            )  # fmt: skip

    attempts: list[tuple[Any, ...]] = []

    def delivery_rows() -> Iterator[tuple[Any, ...]]:
        for number, at in enumerate(moments):
            # Near the delivery's own time, as requests are.
            near = endpoints[min(len(endpoints) - 1, number * ENDPOINTS // rows)]
            endpoint_id, _kind, host, _made = near if number % 4 else endpoints[-1 - number % STANDING]
            share = chance.random()
            status = (
                "pending" if share < 0.01 else "canceled" if share < 0.02 else "exhausted" if share < 0.04
                else "succeeded"
            )  # fmt: skip
            tries = 1 if status == "succeeded" and share < 0.9 else 2
            for attempt in range(tries):
                bad = status != "succeeded" or attempt < tries - 1
                began = at + timedelta(seconds=attempt)
                attempts.append(
                    (first_id_at("att", began)[:-1] + str(attempt), first_id_at("dlv", at), attempt + 1,
                     "scheduled", "failed" if bad else "succeeded", 503 if bad else 204, began,
                     chance.lognormvariate(4.6, 0.6), '{"Content-Type": "application/json"}', b"ok")
                )  # fmt: skip
            ended = None if status == "pending" else at + timedelta(seconds=tries)
            due = now + timedelta(seconds=chance.uniform(-30, 3600)) if status == "pending" else None
            yield (
                first_id_at("dlv", at), first_id_at("evt", at), endpoint_id, host,
                "job.failure" if number % 20 == 0 else "job.success", status, "scheduled", b"x" * 300, tries,
                12, due, 503 if status == "exhausted" else 204, at, ended,
            )  # fmt: skip

    tables: list[tuple[str, str, Callable[[], Iterator[tuple[Any, ...]]]]] = [
        ("endpoint", "id, kind, url, host, scope, format, sign_payload, enabled, failures, created_at, "
         "updated_at", endpoint_rows),
        ("event", "id, type, run_key, job_id, runid, source, payload, occurred_at, created_at", event_rows),
        ("delivery", 'id, event_id, endpoint_id, host, event_type, status, "trigger", body, attempts, '
         "max_attempts, next_attempt_at, status_code, created_at, finished_at", delivery_rows),
        ("attempt", 'id, delivery_id, number, "trigger", status, status_code, started_at, duration_ms, '
         "request_headers, response_body", lambda: iter(attempts)),
    ]  # fmt: skip
    connection = state.database.engine.raw_connection()
    try:
        cursor: Any = connection.cursor()
        for table, columns, made in tables:
            with cursor.copy(f"COPY rq_webhooks_{table} ({columns}) FROM STDIN") as copy:
                for row in made():
                    copy.write_row(row)
            connection.commit()
    finally:
        connection.close()
    with state.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        other.execute(text("VACUUM ANALYZE"))


def addresses(state: State, rows: int) -> dict[str, Callable[[random.Random], str]]:
    """Return how to ask for each page and list, with other parameters every time."""
    with state.database.read() as connection:
        ids = {
            table: connection.execute(
                text(f"SELECT id FROM rq_webhooks_{table} ORDER BY random() LIMIT 200")
            ).scalars().all()
            for table in ("delivery", "event")
        }  # fmt: skip
        ids["endpoint"] = connection.execute(
            text("SELECT id FROM rq_webhooks_endpoint WHERE kind = 'standing'")
        ).scalars().all()  # fmt: skip

    def cursor_of(chance: random.Random) -> str:
        return _cursor_of(chance.choice(ids["delivery"]))

    def host(chance: random.Random) -> str:
        return (
            "busy.example.com" if chance.random() < 0.5 else f"host{chance.randrange(HOSTS - 1)}.example.com"
        )

    def since(chance: random.Random) -> str:
        return f"{datetime.now(UTC) - SPAN * chance.random():%Y-%m-%dT%H:%M}"

    pages: dict[str, Callable[[random.Random], str]] = {
        "/": lambda chance: "/",
        "/?hours=168": lambda chance: "/?hours=168",
        "/?hours=720": lambda chance: "/?hours=720",
        "/deliveries": lambda chance: "/deliveries",
        "/deliveries?cursor=": lambda chance: f"/deliveries?cursor={cursor_of(chance)}",
        "/deliveries?until=": lambda chance: f"/deliveries?until={since(chance)}",
    }
    filters: dict[str, Callable[[random.Random], str]] = {
        "status=": lambda chance: (
            "status=" + chance.choice(["pending", "exhausted", "canceled", "succeeded"])
        ),
        "status=&status=": lambda chance: "status=pending&status=exhausted",
        "host=": lambda chance: "host=" + host(chance),
        "event=": lambda chance: "event=" + chance.choice(["job.failure", "job.success", "none.such"]),
        "job_id=": lambda chance: f"job_id=job-{chance.randrange(rows)}",
        "runid=": lambda chance: f"runid=run-{chance.randrange(5000)}",
        "endpoint_id=": lambda chance: "endpoint_id=" + chance.choice(ids["endpoint"]),
        "event_id=": lambda chance: "event_id=" + chance.choice(ids["event"]),
        "host=&status=exhausted": lambda chance: f"host={host(chance)}&status=exhausted",
        "endpoint_id=&status=pending": lambda chance: (
            f"endpoint_id={chance.choice(ids['endpoint'])}&status=pending"
        ),
        "event=&status=canceled": lambda chance: "event=job.failure&status=canceled",
        "host=&event=": lambda chance: f"host={host(chance)}&event=job.failure",
        "host=&since=": lambda chance: f"host={host(chance)}&since={since(chance)}",
        "host=none&status=succeeded": lambda chance: "host=none.example.com&status=succeeded",
        "endpoint_id=&host=other": lambda chance: (
            f"endpoint_id={chance.choice(ids['endpoint'])}&host=busy.example.com&status=canceled"
        ),
        "runid=&status=": lambda chance: f"runid=run-{chance.randrange(5000)}&status=succeeded",
    }  # fmt: skip
    for name, made in filters.items():
        pages[f"/deliveries?{name}"] = lambda chance, made=made: f"/deliveries?{made(chance)}"  # type: ignore[misc]
    pages |= {
        "/deliveries?q=": lambda chance: "/deliveries?q="
        + chance.choice(
            [f"job-{chance.randrange(rows)}", f"run-{chance.randrange(5000)}", host(chance), "nothing"]
        ),
        "/deliveries/<id>": lambda chance: f"/deliveries/{chance.choice(ids['delivery'])}",
        "/events/<id>": lambda chance: f"/events/{chance.choice(ids['event'])}",
        "/endpoints": lambda chance: "/endpoints",
        "/endpoints?kind=job": lambda chance: "/endpoints?kind=job",
        "/endpoints/<id>": lambda chance: f"/endpoints/{chance.choice(ids['endpoint'])}",
        "/api/deliveries": lambda chance: f"/api/deliveries?cursor={cursor_of(chance)}&limit=200",
        "/api/deliveries?status=": lambda chance: "/api/deliveries?status=exhausted,pending&limit=200",
        "/api/deliveries?host=": lambda chance: f"/api/deliveries?host={host(chance)}&limit=200",
        "/api/events": lambda chance: "/api/events?limit=200",
        "/api/events?runid=": lambda chance: f"/api/events?runid=run-{chance.randrange(5000)}",
        "/api/endpoints": lambda chance: "/api/endpoints?kind=job&limit=200",
        "/api/stats": lambda chance: "/api/stats?hours=720",
        "/jobs/<id>": lambda chance: f"/jobs/job-{chance.randrange(rows)}",
    }  # fmt: skip
    return pages


def scans(connection: Connection, statement: str, parameters: Any) -> tuple[list[str], str]:
    """Return which large tables the plan of a statement reads as a whole, and the plan."""
    rows = connection.exec_driver_sql("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) " + statement, parameters)
    plan = "\n".join(row[0] for row in rows)
    found = re.findall(rf"Seq Scan on ({'|'.join(LARGE)})\b", plan)
    return found, plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--plans", action="store_true", help="print the plan of every statement")
    options = parser.parse_args()
    failed = False
    with (
        postgres_server() as postgres,
        valkey_server() as valkey,
        open_host(postgres.new_database(), valkey.url, {"status", "read", "manage"}) as (app, state),
    ):
        began = time.perf_counter()
        fill(state, options.rows)
        print(f"{options.rows:,} deliveries written in {time.perf_counter() - began:.0f} s")
        client = app.test_client()
        seen: list[tuple[str, Any]] = []

        @event.listens_for(state.database.engine, "before_cursor_execute")
        def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
            seen.append((statement, parameters))

        print(f"{'ms':40} {'median':>8} {'p95':>8} {'worst':>8} {'own CPU':>8} {'SQL':>8}")
        for name, made in addresses(state, options.rows).items():
            chance = random.Random(name)
            took: list[float] = []
            busy: list[float] = []
            statements: list[tuple[str, Any]] = []
            for number in range(options.repeat + 3):
                address = "/webhooks" + made(chance)
                seen.clear()
                started, cpu = time.perf_counter(), time.thread_time()
                response = client.get(address)
                elapsed_ms = (time.perf_counter() - started) * 1000
                cpu_ms = (time.thread_time() - cpu) * 1000
                assert response.status_code in (200, 302), (address, response.status_code)
                if number >= 3:  # the first ones warm up
                    took.append(elapsed_ms)
                    busy.append(cpu_ms)
                statements = seen.copy() if not took or elapsed_ms == max(took) else statements
            took.sort()
            p95_ms = took[int(len(took) * 0.95)] if len(took) > 1 else took[0]
            bad = p95_ms > LIMIT_MS
            whole: set[str] = set()
            sql_ms = 0.0
            with state.database.engine.connect() as connection:
                for statement, parameters in statements:
                    if not statement.lstrip().upper().startswith("SELECT") or "pg_" in statement:
                        continue
                    found, plan = scans(connection, statement, parameters)
                    whole.update(found)
                    sql_ms += float(re.findall(r"Execution Time: ([\d.]+) ms", plan)[0])
                    if options.plans or found:
                        print(plan)
            failed = failed or bad or bool(whole)
            print(
                f"{name:40} {statistics.median(took):8.1f} {p95_ms:8.1f} {took[-1]:8.1f} "
                f"{statistics.median(busy):8.1f} {sql_ms:8.1f}"
                f"{'  over the limit' if bad else ''}{f'  reads all of {sorted(whole)}' if whole else ''}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
