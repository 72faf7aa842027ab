"""Time a claim against 10,000 and 1,000,000 due deliveries over 1,000 hosts, and show its query plan.

``python benchmarks/claim_plan.py [--rows 10000 1000000] [--hosts 1000] [--database sqlite postgresql]``

Rows are written by SQL alone; claims are those of a dispatcher with 64 free places. Each figure is the
median of many claims, each given back (outside the clock) so that the number of due rows stays.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sqlalchemy import Executable, text  # noqa: E402

from flask_rq_webhooks.storage import claims  # noqa: E402
from flask_rq_webhooks.storage.claims import claim_due, next_due_in, release
from flask_rq_webhooks.storage.database import Database  # noqa: E402
from tests.servers import postgres_server  # noqa: E402

KINDS = ["sqlite", "postgresql"]
PADDED = {
    "sqlite": "substr('000000000' || CAST({n} AS integer), -10)",
    "postgresql": "right('000000000' || ({n}), 10)",
}
AGO = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-' || ({rows} - n) || ' seconds')",
    "postgresql": "now() - ({rows} - n) * interval '1 second'",
}
SERIES = {
    "sqlite": "(WITH RECURSIVE s(n) AS (VALUES (0) UNION ALL SELECT n + 1 FROM s WHERE n < {last}) "
    "SELECT n FROM s)",
    "postgresql": "generate_series(0, {last}) AS s(n)",
}
BODY = {"sqlite": "zeroblob(300)", "postgresql": "decode(repeat('20', 300), 'hex')"}


def fill(
    database: Database,
    rows: int,
    hosts: int,
    *,
    analyze: bool,
    first: int = 0,
    endpoints: Sequence[tuple[str, str]] = (),
) -> None:
    """Write *rows* due deliveries over *hosts* endpoints.

    :param first: number of the first one; other than 0, the endpoints are there already.
    :param endpoints: ids and hosts of endpoints to use, *hosts* of them.
    """
    sql = _Sql(database, rows, hosts, first)
    if endpoints:
        sql.endpoint, sql.host = (
            f"(SELECT {column} FROM bench_endpoint WHERE number = mod(n, {hosts}))"
            for column in ("id", "host")
        )
    with database.write() as connection:
        if endpoints:
            connection.execute(
                text("CREATE TEMPORARY TABLE bench_endpoint (number integer PRIMARY KEY, id text, host text)")
            )
            connection.execute(
                text("INSERT INTO bench_endpoint VALUES (:number, :id, :host)"),
                [{"number": n, "id": id_, "host": host} for n, (id_, host) in enumerate(endpoints)],
            )
        elif not first:
            connection.exec_driver_sql(sql.endpoints())
        connection.exec_driver_sql(sql.events())
        connection.exec_driver_sql(sql.deliveries())
    if analyze:
        settle(database)


def fill_history(database: Database, rows: int, hosts: int) -> None:
    """Write *rows* deliveries that have succeeded, with an attempt each."""
    sql = _Sql(database, rows, hosts, 0)
    with database.write() as connection:
        for statement in (sql.endpoints(), sql.events(), sql.deliveries(done=True), sql.attempts()):
            connection.exec_driver_sql(statement)


def settle(database: Database) -> None:
    """Let the database do now what it would do soon after so many new rows."""
    if database.is_sqlite:
        with closing(sqlite3.connect(str(database.engine.url.database), isolation_level=None)) as sqlite:
            sqlite.execute("ANALYZE")
            sqlite.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
        connection.execute(text("CHECKPOINT"))


class _Sql:
    """Statements that write many rows without Python."""

    def __init__(self, database: Database, rows: int, hosts: int, first: int) -> None:
        kind = "sqlite" if database.is_sqlite else "postgresql"
        self._id = PADDED[kind].format(n=f"(n + {first})")
        number = PADDED[kind].format(n=f"mod(n, {hosts})")
        self.endpoint, self.host = f"'ep_' || {number}", f"'h' || {number}"
        self._ago = AGO[kind].format(rows=rows)
        self._body = BODY[kind]
        self._hosts = SERIES[kind].format(last=hosts - 1)
        self._rows = SERIES[kind].format(last=rows - 1)

    def endpoints(self) -> str:
        return f"""INSERT INTO rq_webhooks_endpoint (id, kind, url, host, scope, format, sign_payload,
            enabled, failures, created_at, updated_at)
            SELECT {self.endpoint}, 'job', 'https://x.example/', {self.host}, 'job', 'job',
            false, true, 0, CURRENT_TIMESTAMP, CURRENT_TIMESTAMP FROM {self._hosts}"""

    def events(self) -> str:
        return f"""INSERT INTO rq_webhooks_event (id, type, job_id, source, payload, occurred_at, created_at)
            SELECT 'evt_' || {self._id}, 'job.success', 'job-' || n, 'callback', '{{}}', CURRENT_TIMESTAMP,
            CURRENT_TIMESTAMP FROM {self._rows}"""

    def deliveries(self, *, done: bool = False) -> str:
        state = "'succeeded', 1, NULL" if done else f"'pending', 0, {self._ago}"
        return f"""INSERT INTO rq_webhooks_delivery (id, event_id, endpoint_id, host, event_type, "trigger",
            body, max_attempts, status, attempts, next_attempt_at, finished_at, created_at)
            SELECT 'dlv_' || {self._id}, 'evt_' || {self._id}, {self.endpoint}, {self.host}, 'job.success',
            'scheduled', {self._body}, 12, {state},
            {self._ago if done else "NULL"}, CURRENT_TIMESTAMP FROM {self._rows}"""

    def attempts(self) -> str:
        return f"""INSERT INTO rq_webhooks_attempt (id, delivery_id, number, "trigger", status, status_code,
            started_at, duration_ms, request_headers, response_headers, response_body)
            SELECT 'att_' || {self._id}, 'dlv_' || {self._id}, 1, 'scheduled', 'succeeded', 200,
            CURRENT_TIMESTAMP, 12.5, '{{}}', '{{}}', {self._body} FROM {self._rows}"""


def measure(database: Database, claims: int, limit: int, in_flight: dict[str, int]) -> list[float]:
    """Return the seconds that each of *claims* claims took."""
    took = []
    for _ in range(claims):
        started = time.perf_counter()
        claimed = claim_due(database, limit=limit, per_host=8, in_flight=in_flight, lease_s=45)
        took.append(time.perf_counter() - started)
        assert len(claimed) == limit
        release(database, claimed)
    return took


def plan(database: Database) -> str:
    """Return the plan of a claim, as the database explains it."""
    parameters: dict[str, Any] = {
        "limit": 64, "per_host": 8, "in_flight": "{}", "window": claims.WINDOW, "after": "",
        "lease_id": "lea_x",
    }  # fmt: skip
    statement: Executable
    if database.is_sqlite:
        statement = text("EXPLAIN QUERY PLAN " + claims._CLAIM_SQLITE.text)
        parameters |= {"now": "2999-01-01", "lease_until": "2999-01-01"}
    else:
        statement = text("EXPLAIN (ANALYZE, BUFFERS OFF) " + str(claims._CLAIM_POSTGRESQL.element))
        parameters["lease_s"] = 45.0
    with database.write(durable=False, in_order=True) as connection:  # as a claim
        undone = connection.begin_nested()
        rows = connection.execute(statement, parameters).all()
        undone.rollback()
    return "\n".join(str(row[-1]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--claims", type=int, default=100)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--database", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--no-analyze", dest="analyze", action="store_false", help="as right after a burst")
    parser.add_argument("--plan", action="store_true", help="print the query plan, too")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(postgres_server()) if "postgresql" in options.database else None
        for kind in options.database:
            databases = {}
            for rows in options.rows:
                path = f"sqlite:///{folder / str(rows)}.db"
                databases[rows] = Database(
                    path if server is None or kind == "sqlite" else server.new_database()
                )
                stack.callback(databases[rows].dispose)
                databases[rows].create_tables()
                fill(databases[rows], rows, options.hosts, analyze=options.analyze)
            compare(kind, databases, options)


def compare(kind: str, databases: dict[int, Database], options: argparse.Namespace) -> None:
    """Claim from each database in turn, so that whatever else the machine does is the same for all."""
    took: dict[int, list[float]] = {rows: [] for rows in databases}
    crowded: dict[int, list[float]] = {rows: [] for rows in databases}
    full = {f"h{number:010}": 8 for number in range(0, options.hosts, 5)}
    for round_number in range(options.claims // 10 + 1):
        for rows, database in databases.items():
            seconds = measure(database, 10, options.limit, {})
            busy_seconds = measure(database, 10, options.limit, full)
            if round_number:  # the first round warms up
                took[rows] += seconds
                crowded[rows] += busy_seconds
    medians = {}
    for rows, database in databases.items():
        started = time.perf_counter()
        next_due_in(database)
        due_ms = (time.perf_counter() - started) * 1000
        medians[rows] = statistics.median(took[rows]) * 1000
        p95_ms = sorted(took[rows])[int(len(took[rows]) * 0.95)] * 1000
        print(
            f"{kind}: {rows:>9,} due over {options.hosts:,} hosts: claim of {options.limit} p50 "
            f"{medians[rows]:.2f} ms, p95 {p95_ms:.2f} ms; every fifth host full p50 "
            f"{statistics.median(crowded[rows]) * 1000:.2f} ms; next_due_in {due_ms:.2f} ms",
            flush=True,
        )
        if options.plan:
            print(plan(database))
    print(f"{kind}: ratio {max(medians.values()) / medians[min(medians)]:.2f}", flush=True)


if __name__ == "__main__":
    main()
