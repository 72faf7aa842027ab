"""Our connections to PostgreSQL: what they tell libpq and the server, and what an end of theirs means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from flask_rq_webhooks import StorageUnavailableError
from flask_rq_webhooks.storage import database as database_module
from flask_rq_webhooks.storage.crypto import Cipher
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import heartbeat
from flask_rq_webhooks.storage.endpoints import NewEndpoint, confirm, register, waiting_for_host
from flask_rq_webhooks.storage.models import Dispatcher, Endpoint, Secret, Watch
from tests.servers import PostgresHandle

ENDPOINT = NewEndpoint(url="https://hooks.example.com/in", host="hooks.example.com", secret="s")
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


def test_what_is_said_is_said_in_every_transaction(opened: Database) -> None:
    for _ in range(12):  # a driver may prepare what it has seen some times
        with opened.write(durable=False) as connection:
            assert connection.execute(sa.text("SHOW synchronous_commit")).scalar_one() == "off"
            assert connection.execute(SHOW).scalar_one() == "30s"
        with opened.write() as connection:
            assert connection.execute(sa.text("SHOW synchronous_commit")).scalar_one() == "on"
            assert connection.execute(SHOW).scalar_one() == "30s"


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


def _end_all_connections(url: str) -> None:
    """Let the server end every connection to the database but the one that asks for it, as a restart does."""
    other = Database(url)
    with other.engine.connect() as connection:
        mine = sa.text(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert connection.execute(mine).scalars().all() == [True]
    other.dispose()


def test_connection_that_died_while_it_rested_is_not_used(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "PING_AFTER_S", 0.0)
    _end_all_connections(str(opened.url.render_as_string(hide_password=False)))

    with opened.read() as connection:
        assert connection.execute(sa.select(sa.func.count(Dispatcher.id))).scalar_one() == 0


def test_registration_survives_the_death_of_a_connection_used_a_moment_ago(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "PING_AFTER_S", 3600.0)
    url = str(opened.url.render_as_string(hide_password=False))
    _end_all_connections(url)
    with (
        pytest.raises(StorageUnavailableError),
        opened.write(single_statement=True, repeated=True) as connection,
    ):  # so nobody asked before
        connection.execute(sa.select(Dispatcher.id))

    with opened.read():
        pass
    _end_all_connections(url)
    assert waiting_for_host(opened, "hooks.example.com") == 0, "who does not try again asks before"
    heartbeat(opened, "dsp_1", started=True)
    _end_all_connections(url)
    endpoint_id = register(opened, Cipher(["key"]), ENDPOINT, namespace="nnnnnnnn", reserved_job_id="job-1")
    _end_all_connections(url)
    confirm(opened, endpoint_id, existing=["job-1"], unseen=[], reserved_job_id="job-1")

    with opened.read() as connection:
        assert connection.execute(sa.select(Endpoint.id)).scalars().all() == [endpoint_id]
        assert connection.execute(sa.select(Watch.job_id, Watch.status)).all() == [("job-1", "open")]


def test_registration_that_was_committed_before_its_connection_died_is_stored_once(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    execute = opened.engine.dialect.do_execute

    def execute_and_lose(cursor: Any, statement: str, *rest: Any) -> None:
        execute(cursor, statement, *rest)
        if "rq_webhooks_endpoint" in statement and statement.startswith("WITH") and not lost:
            lost.append(statement)
            cursor.connection.close()
            cursor.connection.execute("SELECT 1")  # raises as a lost one does

    monkeypatch.setattr(opened.engine.dialect, "do_execute", execute_and_lose)
    endpoint_id = register(opened, Cipher(["key"]), ENDPOINT, namespace="nnnnnnnn", reserved_job_id="job-1")

    assert len(lost) == 1
    with opened.read() as connection:
        assert connection.execute(sa.select(Endpoint.id)).scalars().all() == [endpoint_id]
        assert connection.execute(sa.select(Secret.endpoint_id)).scalars().all() == [endpoint_id]
        assert connection.execute(sa.select(Watch.job_id, Watch.status)).all() == [("job-1", "reserved")]


@pytest.mark.parametrize("jobs", [["job-1"], ["job-1", "job-2"]], ids=["one statement", "a transaction"])
def test_registration_and_its_confirmation_wait_for_the_disk(opened: Database, jobs: list[str]) -> None:
    with opened.write() as connection:
        connection.execute(sa.text("CREATE TABLE noted (job_id text, status text, setting text)"))
        connection.execute(
            sa.text(
                "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "INSERT INTO noted VALUES (NEW.job_id, NEW.status, current_setting('synchronous_commit')); "
                "RETURN NEW; END $$"
            )
        )
        connection.execute(
            sa.text(
                "CREATE TRIGGER noting AFTER INSERT OR UPDATE ON rq_webhooks_watch "
                "FOR EACH ROW EXECUTE FUNCTION note()"
            )
        )

    endpoint_id = register(opened, Cipher(["key"]), ENDPOINT, namespace="nnnnnnnn", reserved_job_id="job-1")
    confirm(opened, endpoint_id, existing=jobs, unseen=[], reserved_job_id="job-1")

    with opened.read() as connection:
        noted = connection.execute(sa.text("SELECT job_id, status, setting FROM noted")).all()
        assert connection.execute(sa.text("SHOW synchronous_commit")).scalar_one() == "on"
    assert noted == [("job-1", "reserved", "on"), *((job, "open", "on") for job in jobs)]
