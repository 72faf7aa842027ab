"""Several dispatchers on one database: is anything claimed, sent or logged twice, or not at all?

``python -m benchmarks.many_dispatchers`` delivers 20,000 webhooks each with 2, 3 and 4 dispatchers on
PostgreSQL and with 2 on SQLite, each a process, to real receivers. It exits 1 if anything happened other
than once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa

from flask_rq_webhooks.protocol.events import Occurrence
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage.events import IngestItem, ingest
from flask_rq_webhooks.storage.models import Attempt, Delivery, Event
from tests.acceptance.host_app import create_app, db
from tests.pipeline import add_endpoint
from tests.servers import Process, Received, Receiver, postgres_server, valkey_server, wait_until

#: Destination hosts; each is a receiver on a port of its own.
HOSTS = 16
FLASK = ("python", "-m", "flask", "--app", "tests.acceptance.host_app")


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    :param requests: received, by (delivery, attempt).
    :param attempts: logged, by delivery.
    :param shares: attempts by dispatcher.
    """

    wanted: int
    requests: Counter[tuple[str, str]]
    events: Counter[str]
    attempts: Counter[str]
    statuses: Counter[str]
    shares: Counter[str]
    log: str
    took_s: float

    def line(self) -> str:
        """Return the figures for people."""
        return (
            f"{sum(self.requests.values()):,} requests for {self.wanted:,} deliveries, "
            f"{sum(self.attempts.values()):,} attempts logged in {self.took_s:.1f} s "
            f"({self.wanted / self.took_s:.0f}/s), shares {sorted(self.shares.values(), reverse=True)}: "
            f"{'; '.join(self.faults()) or 'each exactly once'}"
        )

    def faults(self) -> list[str]:
        """Return what happened other than once."""
        found = []
        for name, counted in (("request", self.requests), ("event", self.events), ("attempt", self.attempts)):
            if len(counted) != self.wanted:
                found.append(f"{len(counted)} of {self.wanted} {name}s")
            if repeated := [key for key, count in counted.items() if count > 1]:
                found.append(f"{len(repeated)} {name}s more than once, such as {repeated[0]}")
        if self.statuses != Counter({"succeeded": self.wanted}):
            found.append(f"deliveries are {dict(self.statuses)}")
        for bad in ("ERROR", "Traceback", "lease that had run out"):
            if bad in self.log:
                found.append(f"{bad!r} in the dispatchers' logs")
        return found


def fill(state: State, receivers: list[Receiver], deliveries: int) -> None:
    """Store *deliveries* events, each with one delivery, turn by turn over the receivers."""
    endpoints = [add_endpoint(state, receiver.url) for receiver in receivers]
    began = datetime.now(UTC) - timedelta(hours=1)
    for first in range(0, deliveries, 500):
        items = [
            IngestItem(
                Occurrence(
                    type="job.success",
                    occurred_at=began,
                    source="callback",
                    job_id=f"job-{number}",
                    run=f"2026-01-01T00:00:00.{number:06}Z",
                    result={"number": number},
                ),
                endpoint_ids=(endpoints[number % len(endpoints)],),
            )
            for number in range(first, min(first + 500, deliveries))
        ]
        ingest(state.database, items, render=state.render, max_attempts=state.settings.max_attempts)


def run(database_url: str, redis_url: str, *, dispatchers: int, deliveries: int) -> Outcome:
    """Deliver *deliveries* webhooks with so many dispatcher processes, started together."""
    app = create_app({"SQLALCHEMY_DATABASE_URI": database_url, "RQ_WEBHOOKS_REDIS_URL": redis_url})
    state = get_state(app)
    state.database.create_tables()
    environment = {"TEST_DATABASE_URL": database_url, "TEST_REDIS_URL": redis_url}
    with ExitStack() as stack:
        stack.callback(_close, state)
        receivers = [stack.enter_context(Receiver()) for _ in range(HOSTS)]
        fill(state, receivers, deliveries)
        started = time.monotonic()
        processes = [
            stack.enter_context(Process(*FLASK, "rq-webhooks", "worker", env=environment))
            for _ in range(dispatchers)
        ]

        def unfinished() -> int:
            with state.database.read() as connection:
                return int(
                    connection.execute(
                        sa.select(sa.func.count()).where(Delivery.status.in_(["pending", "sending"]))
                    ).scalar_one()
                )

        wait_until(
            lambda: sum(len(receiver.received) for receiver in receivers) >= deliveries,
            timeout=60 + deliveries / 20,
            what="every webhook to arrive",
        )
        wait_until(lambda: unfinished() == 0, timeout=60, what="every attempt to be recorded")
        took_s = time.monotonic() - started
        time.sleep(1.5)  # anything claimed twice would arrive now
        for process in processes:
            assert process.stop() == 0, process.output
        received = [each for receiver in receivers for each in receiver.received]
        return _outcome(state, deliveries, received, "".join(p.output for p in processes), took_s)


def _outcome(state: State, wanted: int, received: list[Received], log: str, took_s: float) -> Outcome:
    with state.database.read() as connection:
        logged = connection.execute(sa.select(Attempt.delivery_id, Attempt.dispatcher_id)).all()
        statuses = connection.execute(sa.select(Delivery.status)).scalars().all()
        events = connection.execute(sa.select(Event.id)).scalars().all()
    sent = Counter(each.headers["webhook-id"] for each in received)
    return Outcome(
        wanted=wanted,
        requests=Counter(
            (each.headers["X-Webhook-Delivery"], each.headers["X-Webhook-Attempt"]) for each in received
        ),
        events=sent if set(sent) == set(events) else Counter(events) + sent,
        attempts=Counter(row.delivery_id for row in logged),
        statuses=Counter(statuses),
        shares=Counter(row.dispatcher_id for row in logged),
        log=log,
        took_s=took_s,
    )


def _close(state: State) -> None:
    state.database.dispose()
    state.redis.close()
    with state.app.app_context():
        for engine in db.engines.values():
            engine.dispose()


@contextmanager
def databases() -> Iterator[dict[str, Callable[[], str]]]:
    """Give a function per kind of database that returns the URL of an empty one."""
    with tempfile.TemporaryDirectory() as folder, postgres_server() as server:
        numbers = iter(range(1000))
        yield {
            "postgresql": server.new_database,
            "sqlite": lambda: f"sqlite:///{Path(folder) / f'{next(numbers)}.db'}",
        }


def main() -> None:
    """Run and print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deliveries", type=int, default=20_000)
    parser.add_argument("--postgresql", type=int, nargs="*", default=[2, 3, 4], metavar="DISPATCHERS")
    parser.add_argument("--sqlite", type=int, nargs="*", default=[2], metavar="DISPATCHERS")
    options = parser.parse_args()
    failed = False
    with databases() as new, valkey_server() as valkey:
        for kind in ("postgresql", "sqlite"):
            for dispatchers in getattr(options, kind):
                outcome = run(new[kind](), valkey.url, dispatchers=dispatchers, deliveries=options.deliveries)
                failed = failed or bool(outcome.faults())
                print(f"{kind}, {dispatchers} dispatchers: {outcome.line()}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
