"""What customers cost: the look of a decorated route, fan-out among many, lists, and the upgrade to them."""

from __future__ import annotations

import random
import re
import statistics
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flask import request
from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, event, insert, text
from werkzeug.test import EnvironBuilder

from flask_rq_webhooks.observe.publisher import Publisher
from flask_rq_webhooks.protocol.events import Occurrence
from flask_rq_webhooks.protocol.payloads import occurrence_to_json
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from flask_rq_webhooks.storage.events import IngestItem
from flask_rq_webhooks.storage.models import SUBSCRIBED, Endpoint, UTCDateTime, first_id_at, new_id
from flask_rq_webhooks.storage.queries import _cursor_of
from flask_rq_webhooks.storage.schema import missing_schema, upgrade_schema
from tests.dashboard_app import open_host
from tests.storage_rows import occurrence

from .claim_plan import fill_history
from .harness import Report, Size, blocks, percentile
from .installation import KINDS, Installation, servers
from .request_overhead import SMALL_JSON
from .route import FIELDS
from .scale import HOSTS

#: Endpoints of one tenant: the default of ``RQ_WEBHOOKS_MAX_ENDPOINTS_PER_TENANT``.
OWN = 20
#: Requests in one go where they are asked at a steady rate.
BURST = 10
#: Every tenant's deliveries were made over this time.
SPAN = timedelta(days=30)
LARGE = ("delivery", "attempt", "event")
HEADER = "X-Tenant"


def add_endpoints(state: State, owners: list[str]) -> None:
    """Write one enabled standing endpoint for each of *owners*."""
    now = datetime.now(UTC)
    rows = [
        {"id": new_id("ep" + state.namespace), "kind": "standing",
         "url": f"https://host{number % 300}.example/", "host": f"host{number % 300}.example",
         "scope": "job", "format": "job", "sign_payload": False,
         "enabled": True, "failures": 0, "created_at": now, "updated_at": now, "tenant": owner}
        for number, owner in enumerate(owners)
    ]  # fmt: skip
    with state.database.write() as connection:
        for start in range(0, len(rows), 1000):
            connection.execute(insert(Endpoint), rows[start : start + 1000])
    if not state.database.is_sqlite:
        with state.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            other.execute(text("VACUUM ANALYZE"))


# -- the look -----------------------------------------------------------------------------------------------


def look(size: Size) -> Report:
    """Ask a decorated route at a steady rate, by callers who have no endpoint, and by one who has."""
    report = Report(
        f"A decorated route without webhook_url, {size['rate']} requests a second in bursts of {BURST}, "
        f"{size['seconds']} s"
    )
    cases = (
        ("nobody has an endpoint", 0, 50.0),
        (f"others have {size['others']:,} endpoints", size["others"], 200.0),
    )
    with servers() as some:
        for kind, database in KINDS.items():
            for words, others, bound in cases:
                installation = some.installation(kind)
                add_endpoints(installation.state, [f"tenant {number // OWN}" for number in range(others)])
                took, looks_us = _asked(installation, size["rate"], size["seconds"])
                busy = {turn: statistics.mean(cpu for _, cpu in times) for turn, times in took.items()}
                wall = {turn: [us for us, _ in times] for turn, times in took.items()}
                report.data[f"{kind}, {words}"] = {"looks": looks_us} | {
                    turn: {
                        "p50": statistics.median(times),
                        "p99": percentile(times, 0.99),
                        "busy": busy[turn],
                    }
                    for turn, times in wall.items()
                }
                more = [mine - less for mine, less in zip(wall["with tenants"], wall["plain"], strict=True)]
                name = f"{database}, {words}: more than undecorated, "
                report.add(name + "median", blocks(more, size["rounds"]), "µs", promise="look", at_most=bound)
                report.add(
                    name + "mean of the processor time, looks included",
                    busy["with tenants"] - busy["plain"] + looks_us, "µs", promise="look", at_most=bound,
                )  # fmt: skip
                report.add(
                    f"{database}, {words}: of these for customers, mean",
                    busy["with tenants"] - busy["decorated"] + looks_us, "µs",
                )  # fmt: skip
            own, by_url = _registered(installation, size["count"])
            report.add(
                f"{database}, the caller has an endpoint: time of the request against one with webhook_url",
                [mine / theirs for mine, theirs in zip(own, by_url, strict=True)],
                "x",
            )
    return report


def _asked(
    installation: Installation, rate: int, seconds: int
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Ask a view that parses a body in turns: undecorated, decorated, and in an app with customers.

    :returns: microseconds by the clock and of processor time for each; and of the looks' threads a request.
    """
    hooks: Any = installation.state.hooks

    def tenant() -> str | None:
        return request.headers.get(HEADER) or None

    def view() -> str:
        return str(len(request.get_json()))

    decorated = hooks.accepts_webhook(view)
    took: dict[str, list[tuple[float, float]]] = {"plain": [], "decorated": [], "with tenants": []}
    begin, elsewhere = time.perf_counter(), time.process_time() - time.thread_time()
    for number in range(rate * seconds // BURST):
        time.sleep(max(0.0, begin + number * BURST / rate - time.perf_counter()))
        # The first one after a rest is slow whatever it does, and does not count.
        for turn in ("", *[turn for turn in list(took)[:: 1 if number % 2 else -1] for _ in range(BURST)]):
            hooks.tenant_function = tenant if turn == "with tenants" else None
            builder = EnvironBuilder(method="POST", data=SMALL_JSON, content_type="application/json")
            environ = builder.get_environ() | {"HTTP_X_TENANT": f"stranger {len(took['plain']) % 500}"}
            asked = decorated if turn in ("decorated", "with tenants") else view
            with installation.app.request_context(environ):
                cpu, began = time.thread_time(), time.perf_counter()
                asked()
                ended = time.perf_counter()
                if turn:
                    took[turn].append(((ended - began) * 1e6, (time.thread_time() - cpu) * 1e6))
    looks_us = (time.process_time() - time.thread_time() - elsewhere) * 1e6 / (rate * seconds)
    hooks.tenant_function = tenant
    return {turn: times[5:] for turn, times in took.items()}, looks_us


def _registered(installation: Installation, count: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of requests by a caller who has subscribed, and of those with a URL."""
    client = installation.app.test_client()
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(count):
        for turn, (tenant, fields) in enumerate((("tenant 7", {}), ("", FIELDS))):
            began = time.perf_counter()
            response = client.post("/decorated", json={"a": 1, **fields}, headers={HEADER: tenant})
            took[turn].append((time.perf_counter() - began) * 1000)
            assert response.headers["Webhook-Registered"] == "true"
    return blocks(took[0], 5), blocks(took[1], 5)


# -- fan-out ------------------------------------------------------------------------------------------------


def fan_out(size: Size) -> Report:
    """Store one job's ending for the endpoints of its tenant, alone and among many of others."""
    report = Report(f"One event to {OWN} endpoints of its tenant: {size['others']:,} of others beside them")
    with servers() as some:
        for kind, database in KINDS.items():
            few, many = (some.installation(kind) for _ in range(2))
            add_endpoints(few.state, ["tenant 0"] * OWN)
            add_endpoints(many.state, [f"tenant {number // OWN}" for number in range(size["others"] + OWN)])
            took: tuple[list[float], list[float]] = ([], [])
            for number in range(size["count"] + 10):
                for times, installation in zip(took, (few, many), strict=True):
                    times.append(_publish(installation.state, number))
            parts = [blocks(times[10:], size["rounds"]) for times in took]
            report.data[kind] = {"few ms": statistics.median(took[0]), "many ms": statistics.median(took[1])}
            report.add(
                f"{database}: {statistics.median(took[0]):.1f} ms with {OWN} in all; the cost among many",
                [many_ms / few_ms for few_ms, many_ms in zip(*parts, strict=True)],
                "x",
                promise="fan-out",
                at_most=1.3,
            )
    return report


def _publish(state: State, number: int) -> float:
    """Return the milliseconds of storing the ending of a job whose caller has subscribed once."""
    job_id = f"job-{number}"
    endpoint = NewEndpoint(url="", host="", kind=SUBSCRIBED, tenant="tenant 0")
    endpoint_id = register(
        state.database, state.cipher, endpoint, namespace=state.namespace, reserved_job_id=job_id
    )
    began = time.perf_counter()
    (stored,) = Publisher(state).publish([IngestItem(occurrence(job_id), endpoint_ids=(endpoint_id,))])
    elapsed = (time.perf_counter() - began) * 1000
    assert stored.deliveries == OWN, stored
    return elapsed


# -- lists --------------------------------------------------------------------------------------------------


def fill(state: State, tenants: int, each: int) -> datetime:
    """Write *each* deliveries of *tenants* tenants, made in turns, so that no tenant's rows are adjacent.

    :returns: the end of the time they were made in.
    """
    own = [f"tenant {number // OWN}" for number in range(tenants * OWN)]
    add_endpoints(state, own)
    now, sqlite = datetime.now(UTC), state.database.is_sqlite
    metadata = MetaData()
    rounds = Table("bench_round", metadata, Column("number", Integer), Column("at", UTCDateTime),
                   Column("stem", String))  # fmt: skip
    owners = Table("bench_owner", metadata, Column("number", Integer), Column("name", String),
                   Column("tail", String))  # fmt: skip
    payload = occurrence_to_json(
        Occurrence(type="job.success", source="callback", occurred_at=now, result="x" * 200)
    )
    with state.database.write() as connection:
        metadata.create_all(connection)
        moments = [now - SPAN + SPAN * number / each for number in range(each)]
        connection.execute(
            insert(rounds),
            [
                {"number": number, "at": at, "stem": first_id_at("", at)[1:11]}
                for number, at in enumerate(moments)
            ],
        )
        connection.execute(
            insert(owners),
            [
                {"number": number, "name": f"tenant {number}", "tail": f"{number:016d}"}
                for number in range(tenants)
            ],
        )
        number = f"(r.number * {tenants} + o.number)"
        chance = f"({number} % 10007 * 7919 % 100)"
        status = (f"CASE WHEN {chance} = 0 THEN 'pending' WHEN {chance} = 1 THEN 'canceled' "
                  f"WHEN {chance} < 4 THEN 'exhausted' ELSE 'succeeded' END")  # fmt: skip
        kind = f"CASE WHEN {number} % 20 = 0 THEN 'job.failure' ELSE 'job.success' END"
        every = "FROM bench_round r CROSS JOIN bench_owner o ORDER BY r.number, o.number"
        statements = [
            "INSERT INTO rq_webhooks_event (id, type, run_key, job_id, runid, source, payload, occurred_at, "
            f"created_at, position, tenant) SELECT 'evt_' || r.stem || o.tail, {kind}, 'job-' || {number} || "
            f"'|end', 'job-' || {number}, 'run-' || ({number} % 5000), 'callback', '{payload}', r.at, r.at, "
            f"{number} + 1, o.name {every}",
            "INSERT INTO rq_webhooks_delivery (id, event_id, endpoint_id, host, event_type, status, "
            '"trigger", body, attempts, max_attempts, next_attempt_at, created_at, finished_at, tenant) '
            f"SELECT 'dlv_' || r.stem || o.tail, 'evt_' || r.stem || o.tail, e.id, e.host, {kind}, {status}, "
            f"'scheduled', '{'x' * 300}', 1, 12, CASE WHEN {chance} = 0 THEN r.at END, r.at, "
            f"CASE WHEN {chance} > 0 THEN r.at END, o.name FROM bench_round r CROSS JOIN "
            f"bench_owner o JOIN bench_endpoint e ON e.tenant = o.name AND e.turn = r.number % {OWN} "
            "ORDER BY r.number, o.number",
            "INSERT INTO rq_webhooks_attempt (id, delivery_id, number, \"trigger\", status, status_code, "
            "started_at, duration_ms, request_headers, response_body) SELECT 'att_' || r.stem || o.tail, "
            f"'dlv_' || r.stem || o.tail, 1, 'scheduled', CASE WHEN {number} % 10 = 0 THEN 'failed' ELSE "
            f"'succeeded' END, 200, r.at, {number} % 700, '{{}}', 'ok' {every}",
        ]  # fmt: skip
        connection.execute(text(
            "CREATE TABLE bench_endpoint AS SELECT id, host, tenant, row_number() OVER (PARTITION BY tenant "
            "ORDER BY id) - 1 AS turn FROM rq_webhooks_endpoint"
        ))  # fmt: skip
        for statement in statements:
            connection.exec_driver_sql(statement.replace("%", "%%") if not sqlite else statement)
        for name in ("bench_endpoint", "bench_owner", "bench_round"):
            connection.execute(text(f"DROP TABLE {name}"))
    if not sqlite:
        with state.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            other.execute(text("VACUUM ANALYZE"))
    return now


def own_lists(
    state: State, tenants: int, each: int, now: datetime
) -> dict[str, Callable[[random.Random], tuple[str, str]]]:
    """Return how to ask for each list of a tenant: a tenant and an address, others every time."""
    rows = tenants * each

    def of(*queries: str, path: str = "api/deliveries") -> Callable[[random.Random], tuple[str, str]]:
        def made(chance: random.Random) -> tuple[str, str]:
            number = chance.randrange(rows)
            owner = number % tenants
            at = now - SPAN + SPAN * (number // tenants) / each
            known = {
                "job": f"job-{number}", "run": f"run-{number % 5000}", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}",
                "host": f"host{(owner * OWN + number // tenants % OWN) % 300}.example",
                "status": chance.choice(["succeeded", "exhausted", "canceled", "pending"]),
                "id": f"{first_id_at('', at)[1:11]}{owner:016d}", "endpoint": _one_endpoint(state, owner),
                "delivery": _cursor_of(f"dlv_{first_id_at('', at)[1:11]}{owner:016d}"),
            }  # fmt: skip
            query = "&".join(chance.choice(queries).split()).format(**known) if queries else ""
            return f"tenant {owner}", f"/webhooks/{path.format(**known)}?{query}"

        return made

    return {
        "deliveries": of("limit=200"),
        "deliveries, further on": of("cursor={delivery} limit=200"),
        "deliveries by status": of("status={status}", "status=pending,exhausted"),
        "deliveries by host": of("host={host}"),
        "deliveries by event": of("event=job.failure", "event=job.success", "event=none.such"),
        "deliveries by endpoint": of("endpoint_id={endpoint}"),
        "deliveries by job": of("job_id={job}"),
        "deliveries by run": of("runid={run}"),
        "deliveries of an event": of("event_id=evt_{id}"),
        "deliveries of a time": of("since={time}", "until={time}"),
        "deliveries by several": of(
            "status={status} host={host}", "endpoint_id={endpoint} status=exhausted",
            "event=job.failure since={time}", "runid={run} status=succeeded",
        ),
        "endpoints": of("limit=200", path="api/endpoints"),
        "events": of("limit=200", path="api/events"),
        "events by type": of("type=job.failure", "type=job.success", "type=none.such", path="api/events"),
        "events by run": of("runid={run}", path="api/events"),
        "numbers": of("hours=24", "hours=720", path="api/stats"),
        "a delivery": of(path="api/deliveries/dlv_{id}"),
        "portal, overview": of("", "hours=168", path="portal/"),
        "portal, deliveries": of("", "status={status}", "q={job}", "q={host}", "event=job.failure",
                                 path="portal/deliveries"),
        "portal, a delivery": of(path="portal/deliveries/dlv_{id}"),
        "portal, an event": of(path="portal/events/evt_{id}"),
        "portal, endpoints": of(path="portal/endpoints"),
        "portal, an endpoint": of(path="portal/endpoints/{endpoint}"),
    }  # fmt: skip


_endpoints: dict[str, dict[str, str]] = {}


def _one_endpoint(state: State, owner: int) -> str:
    known = _endpoints.get(state.namespace)
    if known is None:
        with state.database.read() as connection:
            rows = connection.execute(
                text("SELECT tenant, max(id) FROM rq_webhooks_endpoint GROUP BY tenant")
            )
            known = _endpoints[state.namespace] = {tenant: one for tenant, one in rows}
    return known[f"tenant {owner}"]


class Statements:
    """The statements that an app executes, and whether their plans read more than they should."""

    def __init__(self, state: State) -> None:
        self.seen: list[tuple[str, Any]] = []
        event.listen(state.database.engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.lstrip().upper().startswith("SELECT") and "pg_" not in statement:
            self.seen.append((statement, parameters))

    def faults(self, connection: Connection, at_most: int) -> list[str]:
        """Return the plans that read a large table as a whole, or discard more than *at_most* of its rows."""
        found = []
        for statement, parameters in dict(self.seen).items():
            rows = connection.exec_driver_sql(
                "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) " + statement, parameters
            )
            plan = "\n".join(row[0] for row in rows)
            whole = re.search(rf"Seq Scan on rq_webhooks_({'|'.join(LARGE)})\b", plan)
            discarded = [int(count) for count in re.findall(r"Rows Removed by \w+(?: \w+)*: (\d+)", plan)]
            if whole or max(discarded, default=0) > at_most:
                found.append(f"{statement}\n{plan}")
        return found


def lists(size: Size) -> Report:
    """Time every list of a tenant among many others, and look at the plans; PostgreSQL."""
    tenants, each = size["tenants"], size["each"]
    report = Report(f"Lists of a tenant, {tenants:,} tenants with {each:,} deliveries each, PostgreSQL")
    allowed = {"own"}
    with servers() as some, open_host(some.postgres.new_database(), some.valkey(), allowed) as (app, state):
        hooks: Any = state.hooks
        hooks.tenant(lambda: request.headers.get(HEADER))
        asked = own_lists(state, tenants, each, fill(state, tenants, each))
        statements = Statements(state)
        asked["tenants, for operators"] = lambda chance: ("", "/webhooks/api/tenants")
        client = app.test_client()
        bad: set[str] = set()
        busy_p95: dict[str, float] = {}
        for name, made in asked.items():
            allowed.add("read") if "operators" in name else None
            chance = random.Random(name)
            took, busy = [], []
            for number in range(size["repeat"] + 3):
                tenant, address = made(chance)
                statements.seen.clear()
                began, spent = time.perf_counter(), _spent(state)
                response = client.get(address, headers={HEADER: tenant} if tenant else {})
                took.append((time.perf_counter() - began) * 1000)
                busy.append((_spent(state) - spent) * 1000)
                assert response.status_code in (200, 302), (address, response.text)
                if number % 10 == 3:
                    with state.database.engine.connect() as connection:
                        faults = statements.faults(connection, 60_000 if "operators" in name else 2 * each)
                    bad |= {f"{name}:\n{fault}" for fault in faults}
            p95 = percentile(took[3:], 0.95)
            report.data[name] = {"p50": statistics.median(took[3:]), "p95": p95,
                                 "busy": statistics.median(busy[3:])}  # fmt: skip
            busy_p95[name] = report.add(
                f"{name}: p95 {p95:,.0f} ms, busy", percentile(busy[3:], 0.95), "ms"
            ).value
        slowest = max(busy_p95, key=lambda name: busy_p95[name])
        report.add(
            f"The slowest of {len(asked)} lists and pages, *{slowest}*, processor time in all, p95",
            busy_p95[slowest], "ms", promise="lists", at_most=150,
        )  # fmt: skip
        slowest = max(asked, key=lambda name: report.data[name]["p95"])
        report.add(
            f"The slowest by the clock, *{slowest}*, p95", report.data[slowest]["p95"], "ms", promise="lists",
            at_most=150,
        )  # fmt: skip
        _take_back(state)
        _upgrade(report, "PostgreSQL", state, tenants * each)
    assert not bad, "\n\n".join(sorted(bad))
    return report


def _spent(state: State) -> float:
    """Return the seconds of processor time that this thread and the database's processes have used."""
    total = time.thread_time()
    pids = _backends.get(state.namespace)
    if pids is None:
        with state.database.read() as connection:
            query = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
            pids = _backends[state.namespace] = list(connection.execute(query).scalars())
    return total + sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


_backends: dict[str, list[int]] = {}


# -- the upgrade --------------------------------------------------------------------------------------------


def upgrade(size: Size) -> Report:
    """Bring SQLite tables of the version before customers up to date while somebody writes.

    PostgreSQL's are measured with the lists, which need the same rows.
    """
    report = Report(f"init-db with {size['rows']:,} deliveries, SQLite")
    with servers() as some:
        state = some.installation("sqlite").state
        _take_back(state)
        fill_history(state.database, size["rows"], HOSTS)
        _upgrade(report, "SQLite", state, size["rows"])
    return report


def _take_back(state: State) -> None:
    """Make the tables what they were before there were customers."""
    before = {"endpoint": ("tenant", "only_tenant"), "watch": ("tenant",), "event": ("tenant",),
              "delivery": ("tenant",)}  # fmt: skip
    with state.database.write() as connection:
        for index in ("endpoint_tenant", "endpoint_operators", "event_tenant", "delivery_tenant",
                      "delivery_tenant_status"):  # fmt: skip
            connection.execute(text(f"DROP INDEX ix_rq_webhooks_{index}"))
        for table, columns in before.items():
            for column in columns:
                connection.execute(text(f"ALTER TABLE rq_webhooks_{table} DROP COLUMN {column}"))


def _upgrade(report: Report, database: str, state: State, rows: int) -> None:
    writes: list[float] = []
    done = threading.Event()

    def write() -> None:
        while not done.wait(0.005):
            began = time.perf_counter()
            with state.database.write() as connection:
                connection.execute(text(
                    "UPDATE rq_webhooks_delivery SET attempts = attempts + 1 WHERE id = (SELECT max(id) FROM "
                    "rq_webhooks_delivery)"
                ))  # fmt: skip
            writes.append((time.perf_counter() - began) * 1000)

    writer = threading.Thread(target=write)
    writer.start()
    began = time.perf_counter()
    try:
        made = upgrade_schema(state.database)
        took = time.perf_counter() - began
    finally:
        done.set()
        writer.join()
    assert len(made.columns) == 5
    assert not missing_schema(state.database)
    report.data[f"upgrade, {database}"] = {"s": took, "writes": len(writes), "p99": percentile(writes, 0.99)}
    report.add(f"{database}: init-db with {rows:,} deliveries, seconds of 60", took / 60, "share",
               promise="upgrade", at_most=1.0)  # fmt: skip
    report.add(f"{database}: the longest of {len(writes):,} writes meanwhile", max(writes), "ms",
               promise="upgrade", at_most=1500 if database == "PostgreSQL" else 10_000)  # fmt: skip
