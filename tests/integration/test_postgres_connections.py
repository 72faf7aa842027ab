"""Our connections to PostgreSQL: what they tell libpq and the server, and what an end of theirs means."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flask_rq_webhooks import StorageUnavailableError
from flask_rq_webhooks.storage import database as database_module
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import heartbeat
from flask_rq_webhooks.storage.models import Dispatcher
from tests.servers import PostgresHandle

SHOW = sa.text("SHOW idle_in_transaction_session_timeout")


@pytest.fixture
def url(postgres: PostgresHandle) -> str:
    return postgres.new_database()


@pytest.fixture
def opened(url: str) -> Iterator[Database]:
    database = Database(url)
    database.create_tables()
    yield database
    database.dispose()


def test_only_our_transactions_are_ended_when_nobody_goes_on_with_them(opened: Database) -> None:
    with opened.write() as connection:
        assert connection.execute(SHOW).scalar_one() == "30s"
    # The session is as it was: behind a pooler it is the host's in the next moment.
    with opened.read() as connection:
        assert connection.execute(SHOW).scalar_one() == "0"
    with opened.write(single_statement=True) as connection:
        assert connection.execute(SHOW).scalar_one() == "0"


def test_transaction_nobody_goes_on_with_is_ended_and_lifts_its_locks(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "IDLE_IN_TRANSACTION_S", 1)
    heartbeat(opened, "dsp_one", started=True)
    another_machine = Database(opened.url)

    def left_alone() -> None:
        with opened.write() as connection:
            connection.execute(sa.select(Dispatcher).with_for_update())
            time.sleep(1.5)
            with another_machine.engine.connect() as other:
                other.execute(sa.text("SET LOCAL lock_timeout = '500ms'"))
                other.execute(sa.select(Dispatcher).with_for_update())
            connection.execute(sa.select(Dispatcher.id))

    with pytest.raises(StorageUnavailableError, match="cannot be used now"):
        left_alone()
    another_machine.dispose()
    heartbeat(opened, "dsp_two", started=True)  # the pool knows
    with opened.read() as connection:
        assert connection.execute(sa.select(sa.func.count(Dispatcher.id))).scalar_one() == 2


def test_vanished_servers_are_noticed_and_the_hosts_word_counts(url: str) -> None:
    for connect_args, expected in (({}, "5000"), ({"tcp_user_timeout": 20_000}, "20000")):
        database = Database(url, connect_args=connect_args)
        with database.read() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            parameters = driver.info.get_parameters()
        database.dispose()
        assert parameters["tcp_user_timeout"] == expected
        assert parameters["connect_timeout"] == "5"
        assert parameters["keepalives_idle"] == "5"
