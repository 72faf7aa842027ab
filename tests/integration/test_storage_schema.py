"""init-db: create what is missing, add what a newer version brings, change nothing else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import inspect, select, text

from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import dispatcher_alive
from flask_rq_webhooks.storage.models import Base, Delivery, Endpoint
from flask_rq_webhooks.storage.schema import missing_schema, upgrade_schema
from tests.servers import PostgresHandle, wait_until
from tests.storage_rows import deliver_to, new_endpoint, rows

TABLES = tuple(table.name for table in Base.metadata.sorted_tables)


@pytest.fixture
def empty(database_url: str) -> Database:
    database = Database(database_url)
    yield database  # type: ignore[misc]
    database.dispose()


def test_an_empty_database_gets_every_table(empty: Database) -> None:
    assert missing_schema(empty).tables == TABLES
    assert upgrade_schema(empty).tables == TABLES
    assert not missing_schema(empty)
    assert upgrade_schema(empty).lines() == []
    deliver_to(empty, "a.example")
    assert len(rows(empty, Delivery)) == 1


def test_columns_and_indexes_are_added_to_tables_with_rows(database: Database) -> None:
    deliver_to(database, "a.example")
    with database.write() as connection:
        connection.execute(text("DROP INDEX ix_rq_webhooks_delivery_type"))
        connection.execute(text("DROP INDEX ix_rq_webhooks_delivery_next"))
        connection.execute(text("DROP TABLE rq_webhooks_attempt"))
        for column in ("event_type", "attempts", "error_code", "created_at"):
            connection.execute(text(f"ALTER TABLE rq_webhooks_delivery DROP COLUMN {column}"))
    made = upgrade_schema(database)
    assert made.tables == ("rq_webhooks_attempt",)
    assert made.columns == tuple(
        f"rq_webhooks_delivery.{name}" for name in ("attempts", "created_at", "error_code", "event_type")
    )
    assert made.indexes == ("ix_rq_webhooks_delivery_next", "ix_rq_webhooks_delivery_type")
    assert made.lines()[0] == "table rq_webhooks_attempt"
    assert not missing_schema(database)
    (delivery,) = rows(database, Delivery)
    assert (delivery.attempts, delivery.event_type, delivery.error_code) == (0, "", None)
    assert delivery.created_at.year == 1970
    with database.read() as connection:
        indexes = {index["name"]: index for index in inspect(connection).get_indexes("rq_webhooks_delivery")}
    assert indexes["ix_rq_webhooks_delivery_next"]["dialect_options"], "it is a partial index"
    deliver_to(database, "b.example")


def test_a_flag_gets_its_default(database: Database) -> None:
    new_endpoint(database, kind="standing")
    with database.write() as connection:
        connection.execute(text("ALTER TABLE rq_webhooks_endpoint DROP COLUMN enabled"))
        connection.execute(text("ALTER TABLE rq_webhooks_endpoint DROP COLUMN format"))
    upgrade_schema(database)
    with database.read() as connection:
        assert connection.execute(select(Endpoint.enabled, Endpoint.format)).one() == (True, "job")


#: What customers brought, as the version before did not have it.
TENANT_COLUMNS = {"endpoint": ("tenant", "only_tenant"), "watch": ("tenant",), "event": ("tenant",),
                  "delivery": ("tenant",)}  # fmt: skip
TENANT_INDEXES = ("endpoint_tenant", "endpoint_operators", "event_tenant", "delivery_tenant",
                  "delivery_tenant_status")  # fmt: skip


def test_postgresql_is_written_to_while_columns_and_indexes_are_made(postgres: PostgresHandle) -> None:
    """A transaction that has written stays open all the time: a lock against writers would never be had."""
    database = Database(postgres.new_database())
    database.create_tables()
    deliver_to(database, "a.example")
    with database.write() as connection:
        for table, columns in TENANT_COLUMNS.items():
            for column in columns:
                connection.execute(text(f"ALTER TABLE rq_webhooks_{table} DROP COLUMN {column}"))
    assert set(missing_schema(database).indexes) == {f"ix_rq_webhooks_{name}" for name in TENANT_INDEXES}

    touch = text("UPDATE rq_webhooks_delivery SET attempts = attempts + 1")
    with ThreadPoolExecutor(1) as thread, database.engine.connect() as host:
        host.execute(touch)
        upgrade = thread.submit(upgrade_schema, database)
        wait_until(lambda: waiting(database, "ALTER TABLE%"), timeout=60)
        write_beside(database)
        assert not upgrade.done()
        host.commit()
        made = upgrade.result(60)
    assert len(made.columns) == 5
    assert len(made.indexes) == len(TENANT_INDEXES)
    assert not missing_schema(database)

    with database.write() as connection:
        connection.execute(text("DROP INDEX ix_rq_webhooks_delivery_tenant"))
    with ThreadPoolExecutor(1) as thread, database.engine.connect() as host:
        host.execute(touch)
        upgrade = thread.submit(upgrade_schema, database)
        wait_until(lambda: waiting(database, "CREATE INDEX CONCURRENTLY%"), timeout=60)
        write_beside(database)
        modes = select_all(database, "SELECT mode FROM pg_locks WHERE relation = "
                           "'rq_webhooks_delivery'::regclass AND pid <> pg_backend_pid()")  # fmt: skip
        assert set(modes) == {"RowExclusiveLock", "ShareUpdateExclusiveLock"}
        (builder,) = select_all(database, "SELECT pid FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX%'")
        select_all(database, f"SELECT pg_terminate_backend({builder})")
        with pytest.raises(StorageUnavailableError, match="delivery_tenant is not complete; run init-db"):
            upgrade.result(60)
        host.commit()
    invalid = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
    assert select_all(database, invalid) == ["ix_rq_webhooks_delivery_tenant"]
    assert missing_schema(database).indexes == ("ix_rq_webhooks_delivery_tenant",)
    assert upgrade_schema(database).lines() == ["index ix_rq_webhooks_delivery_tenant"]
    assert select_all(database, invalid) == []
    assert not missing_schema(database)
    database.dispose()


def select_all(database: Database, query: str) -> list[Any]:
    with database.read() as connection:
        return list(connection.execute(text(query)).scalars())


def waiting(database: Database, statement: str) -> bool:
    """Say whether a session waits for a lock with *statement*."""
    query = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE "
    return bool(select_all(database, f"{query} '{statement}' AND datname = current_database()"))


def write_beside(database: Database) -> None:
    """Write, with a limit that is far above what anybody may have to wait."""
    with database.write() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '20s'"))
        connection.execute(text("UPDATE rq_webhooks_delivery SET host = host WHERE attempts < 0"))


def test_several_processes_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(3)]
    made: list[int] = []
    threads = [
        threading.Thread(target=lambda own=own: made.append(len(upgrade_schema(own).tables)))
        for own in databases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in databases:
        own.dispose()
    assert sorted(made) == [0, 0, len(TABLES)]


def test_missing_tables_are_named_with_their_cure(empty: Database) -> None:
    with pytest.raises(StorageUnavailableError, match="init-db"):
        dispatcher_alive(empty)
    with pytest.raises(StorageUnavailableError, match="init-db"):
        new_endpoint(empty)
