"""Claim and record beside ten million deliveries of history, and what partitions would bring; PostgreSQL.

``python -m benchmarks.long_history [--rows 10000000] [--part 1000000]``

Takes half an hour and some 25 GB of disk, so ``make bench`` leaves it out. Claims are timed in turns, so that
whatever else the machine does is the same for all. The partitioned table has the name, the columns and the
indexes of ours, so the very same code claims and records. It lacks what PostgreSQL cannot have there: unique
constraints without the key of the partitions, and foreign keys to such columns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from sqlalchemy import Connection, text

from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.retention import prune

from .claim_plan import fill, fill_history, settle
from .harness import blocks
from .installation import Installation, servers
from .scale import BATCH, FEW, HOSTS, claim_and_record

ROUNDS, CLAIMS, PARTS = 5, 100, 10
#: Rows of a transaction that prunes.
PRUNED = 1000

#: What a reader of the pages and of the API waits for.
LISTS = {
    "newest 50 deliveries": "SELECT id FROM rq_webhooks_delivery ORDER BY id DESC LIMIT 50",
    "newest 50 of a host": (
        "SELECT id FROM rq_webhooks_delivery WHERE host = 'h0000000007' ORDER BY id DESC LIMIT 50"
    ),
    "attempts of a delivery": "SELECT * FROM rq_webhooks_attempt WHERE delivery_id = 'dlv_0000004711'",
}


def main() -> None:
    """Measure both, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000, help="deliveries of history")
    parser.add_argument("--part", type=int, default=1_000_000, help="deliveries of the partitioned table")
    options = parser.parse_args()
    with servers() as some:
        few, many = (some.installation("postgresql") for _ in range(2))
        history(few, many, options.rows)
        plain, parted = (some.installation("postgresql") for _ in range(2))
        partitions(plain, parted, options.part)


def history(few: Installation, many: Installation, rows: int) -> None:
    """Compare claim and record with a few rows and with *rows* of history; time lists and pruning."""
    began = time.monotonic()
    fill_history(many.state.database, rows, HOSTS)
    fill(many.state.database, FEW, HOSTS, analyze=True, first=rows)
    fill(few.state.database, FEW, HOSTS, analyze=True)
    say(f"{rows:,} deliveries of history ({size(many.state.database, whole=True)}), filled in {_s(began)}")
    took = in_turns({"few": few, "many": many})
    say_ratio(f"claim and record, {FEW:,} rows against {rows:,} of history", took["few"], took["many"])
    with many.state.database.read() as connection:
        for name, query in LISTS.items():
            times = [_timed(lambda query=query: connection.execute(text(query)).all()) for _ in range(40)]
            say(f"{name}: p95 {1000 * sorted(times)[37]:.1f} ms")


def partitions(plain: Installation, parted: Installation, rows: int) -> None:
    """Compare our table with one in ten partitions: claim and record, and getting rid of one tenth."""
    for installation in (plain, parted):
        fill_history(installation.state.database, rows, HOSTS)
    with parted.state.database.write() as connection:
        _partition(connection, rows)
    for installation in (plain, parted):
        fill(installation.state.database, FEW, HOSTS, analyze=True, first=rows)
    say(f"{rows:,} deliveries in one table ({size(plain.state.database)}), and in {PARTS} partitions "
        f"({size(parted.state.database)})")  # fmt: skip
    took = in_turns({"plain": plain, "parted": parted})
    say_ratio("claim and record, one table against partitions", took["plain"], took["parted"])
    database = plain.state.database
    with database.read() as connection:
        until = connection.execute(
            text("SELECT finished_at FROM rq_webhooks_delivery WHERE id = :id"), {"id": _id(rows // PARTS)}
        ).scalar_one()
    _say_cost("pruning a tenth", database, lambda: prune(database, until, batch=PRUNED))
    settle(database)
    say(f"  one table, after a vacuum: {size(database)}")

    def drop() -> None:
        with parted.state.database.write() as connection:
            connection.execute(
                text(f"DELETE FROM rq_webhooks_attempt WHERE delivery_id < '{_id(rows // PARTS)}'")
            )
            connection.execute(text("DROP TABLE bench_part_0"))

    _say_cost("dropping one partition, and deleting its attempts", parted.state.database, drop)
    settle(parted.state.database)
    say(f"  partitions: {size(parted.state.database)}")


def _partition(connection: Connection, rows: int) -> None:
    """Put the rows of our table into a partitioned one of the same name."""
    for statement in (
        "ALTER TABLE rq_webhooks_attempt DROP CONSTRAINT rq_webhooks_attempt_delivery_id_fkey",
        "ALTER TABLE rq_webhooks_delivery RENAME TO bench_old",
        "CREATE TABLE rq_webhooks_delivery (LIKE bench_old INCLUDING DEFAULTS) PARTITION BY RANGE (id)",
    ):
        connection.execute(text(statement))
    bounds = [_id(part * rows // PARTS) for part in range(1, PARTS)]
    edges = ["MINVALUE", *(f"'{bound}'" for bound in bounds), "MAXVALUE"]
    for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        connection.execute(
            text(f"CREATE TABLE bench_part_{number} PARTITION OF rq_webhooks_delivery "
                 f"FOR VALUES FROM ({low}) TO ({high})")
        )  # fmt: skip
    connection.execute(text("INSERT INTO rq_webhooks_delivery SELECT * FROM bench_old"))
    indexes = connection.execute(
        text("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'bench_old'")
    ).all()
    connection.execute(text("DROP TABLE bench_old CASCADE"))
    connection.execute(text("ALTER TABLE rq_webhooks_delivery ADD PRIMARY KEY (id)"))
    for name, definition in indexes:
        if not name.endswith("pkey"):
            words = definition.replace("bench_old", "rq_webhooks_delivery").replace("UNIQUE INDEX", "INDEX")
            connection.execute(text(words))


def in_turns(contenders: dict[str, Installation]) -> dict[str, list[float]]:
    """Return the seconds of each claim and record, by contender, taken in turns."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(CLAIMS + 5):
        for name, installation in contenders.items():
            seconds = claim_and_record(installation)
            if number >= 5:
                took[name].append(seconds)
    return took


def say_ratio(what: str, base: list[float], other: list[float]) -> None:
    """Print the rates and their ratio: the median of the rounds, the lowest and the highest."""
    ratios = sorted(
        short / long for short, long in zip(blocks(base, ROUNDS), blocks(other, ROUNDS), strict=True)
    )
    rates = [BATCH / statistics.median(times) for times in (base, other)]
    say(f"{what}: {rates[0]:,.0f}/s and {rates[1]:,.0f}/s: "
        f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} … {ratios[-1]:.2f}]")  # fmt: skip


def size(database: Database, *, whole: bool = False) -> str:
    """Return how large the table of deliveries is, or the whole database, with indexes."""
    query = "SELECT pg_database_size(current_database())" if whole else (
        "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' "
            "AND (relname = 'rq_webhooks_delivery' OR relname LIKE 'bench_part_%')"
    )  # fmt: skip
    with database.read() as connection:
        return f"{int(connection.execute(text(query)).scalar_one()) / 2**20:,.0f} MB"


def say(line: str) -> None:
    print(line, flush=True)


def _say_cost(what: str, database: Database, run: Callable[[], object]) -> None:
    """Print what *run* takes, and how much write-ahead log it makes."""
    position = text("SELECT pg_current_wal_insert_lsn() - '0/0'")
    with database.read() as connection:
        before = connection.execute(position).scalar_one()
    seconds = _timed(run)
    with database.read() as connection:
        written = int(connection.execute(position).scalar_one() - before) / 2**20
    say(f"{what}: {seconds:.2f} s, {written:,.0f} MB of write-ahead log")


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _id(number: int) -> str:
    return f"dlv_{number:010}"


def _s(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
