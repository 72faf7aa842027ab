"""init-db: create what is missing, add what a newer version brings, change nothing else."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import inspect, select, text

from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import dispatcher_alive
from flask_rq_webhooks.storage.models import Base, Delivery, Endpoint
from flask_rq_webhooks.storage.schema import missing_schema, upgrade_schema
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
