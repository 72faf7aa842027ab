"""PostgreSQL as hosts set it up: own ways to connect, schemas, poolers, roles, isolation levels, forks."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_rq_webhooks import RQWebhooks, StorageUnavailableError
from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.crypto import Cipher
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import heartbeat
from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from flask_rq_webhooks.storage.feed import events_after
from flask_rq_webhooks.storage.models import Endpoint, Event, Watch
from flask_rq_webhooks.storage.schema import missing_schema, upgrade_schema
from tests.servers import Forwarder, PostgresHandle, Process, execute, free_port, wait_until
from tests.storage_rows import attempt, claim, new_endpoint, occurrence, publish, rows

ENDPOINT = NewEndpoint(url="https://hooks.example.com/in", host="hooks.example.com", secret="s")


@pytest.fixture
def url(postgres: PostgresHandle) -> str:
    return postgres.new_database()


@pytest.fixture(autouse=True)
def _dispose_engines() -> Iterator[None]:
    """Close the connections of every engine, the hosts' included."""
    yield
    for thing in gc.get_objects():
        if issubclass(type(thing), sa.Engine):  # isinstance() may run code of other tests' objects
            thing.dispose()


def with_tables(url: str) -> None:
    database = Database(url)
    database.create_tables()
    database.dispose()


def host_app(url: str, redis_url: str, db: SQLAlchemy, **config: Any) -> Flask:
    app = Flask("host")
    app.config.update(SECRET_KEY="x", SQLALCHEMY_DATABASE_URI=url, RQ_WEBHOOKS_REDIS_URL=redis_url, **config)
    db.init_app(app)
    RQWebhooks(app, db=db)
    return app


def use(database: Database) -> None:
    """Go through the pipeline once: register, ingest, claim, record, read."""
    from flask_rq_webhooks.storage.attempts import record_attempts

    heartbeat(database, "dsp_1", started=True)
    new_endpoint(database, job_id="job-1")
    publish(database, occurrence("job-1"))
    (claimed,) = claim(database)
    recorded = record_attempts(database, [attempt(claimed)], dispatcher_id="dsp_1", disable_after=100)
    assert recorded.recorded == {claimed.id: "succeeded"}
    assert [event.job_id for event in events_after(database).items] == ["job-1"]


# -- the host's own ways to connect -------------------------------------------------------------------------


def where_we_are(app: Flask) -> tuple[str, str]:
    database = get_state(app).database
    with database.read() as connection:
        found = connection.execute(sa.text("SELECT current_schema(), current_setting('application_name')"))
        schema, name = found.one()
    return schema, name


def test_a_binds_own_connect_args_are_used_and_stay_with_it(url: str, redis_url: str, tmp_path: Path) -> None:
    execute(url, "CREATE SCHEMA hooks")
    bind = {"url": url, "connect_args": {"options": "-csearch_path=hooks", "application_name": "of the bind"}}
    app = host_app(
        f"sqlite:///{tmp_path / 'host.db'}", redis_url, SQLAlchemy(),
        SQLALCHEMY_BINDS={"hooks": bind}, RQ_WEBHOOKS_BIND_KEY="hooks",
    )  # fmt: skip
    assert where_we_are(app) == ("hooks", "of the bind")
    other = host_app(
        url, redis_url, SQLAlchemy(),
        SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"sslmode": "prefer"}},
        SQLALCHEMY_BINDS={"hooks": f"sqlite:///{tmp_path / 'hooks.db'}"}, RQ_WEBHOOKS_BIND_KEY="hooks",
    )  # fmt: skip
    with other.app_context():
        other.extensions["sqlalchemy"].create_all()
    use(get_state(other).database)


def test_a_creator_of_the_hosts_own_opens_our_connections(url: str, redis_url: str) -> None:
    """As the connectors of cloud databases are used: the URL says nothing."""
    calls: list[int] = []

    def creator() -> Any:
        calls.append(1)
        return psycopg.connect(url.replace("+psycopg", ""), application_name="by creator")

    app = host_app("postgresql+psycopg://", redis_url, SQLAlchemy(engine_options={"creator": creator}))
    assert where_we_are(app) == ("public", "by creator")
    assert calls
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
    use(get_state(app).database)


@pytest.mark.parametrize("when", ["before we connect", "after our first connection"])
def test_listeners_that_bring_a_token_or_set_up_a_session_count_for_us(
    url: str, redis_url: str, when: str
) -> None:
    db = SQLAlchemy()
    app = host_app(url, redis_url, db)
    database = get_state(app).database
    if when == "after our first connection":
        with database.read():
            pass
        database.dispose()
    with app.app_context():
        engine = db.engine

    @sa.event.listens_for(engine, "do_connect")
    def bring_token(_dialect: Any, _record: Any, _arguments: Any, parameters: Any) -> None:
        parameters["application_name"] = "with a token"

    @sa.event.listens_for(engine, "connect")
    def set_up(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.execute("CREATE TEMP TABLE of_the_session AS SELECT 1")
        dbapi_connection.commit()

    assert where_we_are(app)[1] == "with a token"
    with database.read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM of_the_session")).scalar_one() == 1
        raw: Any = connection.connection.driver_connection
        assert raw.info.get_parameters()["tcp_user_timeout"] == "5000", "our time limits, where it sets none"
    assert database.engine.pool is not engine.pool


# -- schemas --------------------------------------------------------------------------------------------


def test_tables_in_the_schema_of_the_hosts_metadata(url: str, redis_url: str) -> None:
    execute(url, "CREATE SCHEMA app", 'CREATE SCHEMA "Our Tenant"')
    db = SQLAlchemy(metadata=sa.MetaData(schema="app"))
    for _ in range(2):  # a factory may be called again with the same db
        app = host_app(url, redis_url, db)
    database = get_state(app).database
    assert len(missing_schema(database).tables) == 7
    with app.app_context():
        db.create_all()
    assert not missing_schema(database)
    use(database)
    renaming = {"execution_options": {"schema_translate_map": {"app": "Our Tenant"}}}
    other = host_app(url, redis_url, db, SQLALCHEMY_ENGINE_OPTIONS=renaming)
    assert len(upgrade_schema(get_state(other).database).tables) == 7
    use(get_state(other).database)
    with database.read() as connection:
        found = connection.execute(
            sa.text(
                "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename LIKE 'rq_webhooks%' ORDER BY 1"
            )
        )
        assert found.scalars().all() == ["Our Tenant", "app"]


def test_names_by_the_hosts_convention_are_known_again(url: str, redis_url: str) -> None:
    names = {
        "ix": "idx_%(table_name)s_%(column_0_name)s", "uq": "unq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s", "pk": "pk_%(table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }  # fmt: skip
    db = SQLAlchemy(metadata=sa.MetaData(naming_convention=names))
    app = host_app(url, redis_url, db)
    with app.app_context():
        db.create_all()
    database = get_state(app).database
    assert not missing_schema(database)
    assert not upgrade_schema(database)
    use(database)


# -- roles, isolation levels, time limits ---------------------------------------------------------------


def test_what_a_role_may_not_is_one_sentence_with_the_grant(postgres: PostgresHandle, url: str) -> None:
    execute(
        url,
        "DROP ROLE IF EXISTS guest",
        "CREATE ROLE guest LOGIN",
        "REVOKE CREATE ON SCHEMA public FROM public",
    )
    database = Database(sa.make_url(url).set(username="guest"))
    with pytest.raises(StorageUnavailableError, match="GRANT USAGE, CREATE ON SCHEMA public TO guest") as why:
        upgrade_schema(database)
    assert "\n" not in str(why.value)
    with_tables(url)
    with pytest.raises(StorageUnavailableError, match="GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES"):
        heartbeat(database, "dsp_1", started=True)
    database.dispose()
    execute(url, "DROP OWNED BY guest", "DROP ROLE guest")


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_another_default_isolation_level_fails_no_request(url: str, level: str) -> None:
    with_tables(url)
    name = sa.make_url(url).database
    execute(url, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level}'")
    database = Database(url)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for number in range(15):
                job_id = f"{worker}-{number}"
                register(database, Cipher(["key"]), ENDPOINT, namespace="nnnnnnnn", reserved_job_id=job_id)
                publish(database, occurrence(job_id))
                claim(database, limit=3)
                heartbeat(database, f"dsp_{worker % 2}", started=False)
        except BaseException as exc:  # reported below
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(rows(database, Event)) == 60
    database.dispose()


def test_a_statement_that_ran_out_of_time_is_not_now(url: str) -> None:
    with_tables(url)
    name = sa.make_url(url).database
    execute(url, f"ALTER DATABASE \"{name}\" SET statement_timeout = '200ms'")
    for driver in ("psycopg", "psycopg2"):
        database = Database(sa.make_url(url).set(drivername=f"postgresql+{driver}"))
        with psycopg.connect(url.replace("+psycopg", "")) as locker:
            locker.execute("LOCK TABLE rq_webhooks_endpoint IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(StorageUnavailableError, match="statement timeout"):
                new_endpoint(database)
        new_endpoint(database)
        database.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_server_that_turned_read_only_is_left_and_found_again(url: str, driver: str) -> None:
    with_tables(url)
    name = sa.make_url(url).database
    database = Database(sa.make_url(url).set(drivername=f"postgresql+{driver}"))
    new_endpoint(database)
    execute(url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    with database.engine.connect() as connection:  # as on the server that this socket leads to
        connection.execute(sa.text("SET default_transaction_read_only = on"))
        connection.commit()
    with pytest.raises(StorageUnavailableError, match="read-only transaction"):
        new_endpoint(database)
    with database.read() as connection:
        assert connection.execute(sa.select(sa.func.count(Endpoint.id))).scalar_one() == 1
    execute(
        url,
        "SET default_transaction_read_only = off",
        f'ALTER DATABASE "{name}" RESET default_transaction_read_only',
    )
    new_endpoint(database)
    assert len(rows(database, Endpoint)) == 2
    database.dispose()


def test_everything_works_with_psycopg2(url: str) -> None:
    database = Database(sa.make_url(url).set(drivername="postgresql+psycopg2"))
    database.create_tables()
    use(database)
    missing = Database(sa.make_url(url).set(drivername="postgresql+psycopg2", database="nowhere"))
    for other in (missing, Database("postgresql+psycopg2://x@127.0.0.1:1/x")):
        with pytest.raises(StorageUnavailableError):
            heartbeat(other, "dsp_1", started=True)
    execute(url, "DROP TABLE rq_webhooks_dispatcher")
    with pytest.raises(StorageUnavailableError, match="init-db"):
        heartbeat(database, "dsp_1", started=True)
    database.dispose()


# -- PgBouncer ------------------------------------------------------------------------------------------


@contextmanager
def pgbouncer(url: str, folder: Path) -> Iterator[str]:
    """Run a PgBouncer in transaction mode with two server connections; give the URL through it."""
    binary = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("pgbouncer is not installed; .ci/run installs it")
        pytest.skip("pgbouncer is not installed")
    target, port = sa.make_url(url), free_port()
    with Forwarder(f"{target.query['host']}/.s.PGSQL.5432") as forwarder:
        yield from _pgbouncer(binary, target, forwarder.port, port, folder)


def _pgbouncer(binary: str, target: sa.URL, server_port: int, port: int, folder: Path) -> Iterator[str]:
    (folder / "bouncer.ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={server_port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = trust\npool_mode = transaction\n"
        f"default_pool_size = 2\nlogfile = {folder / 'bouncer.log'}\n"
        f"auth_file = {folder / 'users'}\n"
    )
    (folder / "users").write_text(f'"{target.username}" ""\n')
    for path in (folder, *folder.iterdir()):
        path.chmod(0o777)
    as_nobody = ["--user", "nobody"] if os.geteuid() == 0 else []  # it refuses to run as root
    through = f"postgresql+psycopg://{target.username}@127.0.0.1:{port}/{target.database}"
    with Process(binary, *as_nobody, str(folder / "bouncer.ini")) as process:
        wait_until(lambda: _answers(through), timeout=15, what=lambda: process.output)
        yield through


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url.replace("+psycopg", ""), connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize("noticed", ["when we connect", "by the error"])
def test_behind_a_transaction_pooler_nothing_is_prepared(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rqw-bouncer-"))  # the folders of pytest are closed to others
    try:
        with pgbouncer(url, folder) as through:
            with_tables(url)
            if noticed == "by the error":  # a pooler that passes the server's process id on
                monkeypatch.setattr(
                    psycopg.ConnectionInfo, "backend_pid",
                    property(lambda info: _Same()),
                )  # fmt: skip
            databases = [Database(through) for _ in range(3)]
            errors: list[str] = []

            def work(worker: int) -> None:
                database = databases[worker]
                for number in range(40):
                    for _try in range(20):
                        try:
                            if number % 2:
                                register(
                                    database, Cipher(["key"]), ENDPOINT,
                                    namespace="nnnnnnnn", reserved_job_id=f"{worker}-{number}",
                                )  # fmt: skip
                            else:
                                publish(database, occurrence(f"{worker}-{number}"))
                            break
                        except StorageUnavailableError as exc:
                            errors.append(str(exc))

            threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(rows(databases[0], Watch)) == 60
            assert len(rows(databases[0], Event)) == 60
            # Each database meets the error at most once for each of its pooled connections.
            assert len(errors) <= (0 if noticed == "when we connect" else 6), errors
            said = [record for record in caplog.records if "without prepared statements" in record.message]
            assert 1 <= len(said) <= 3, "once for each of our engines"
            for database in databases:
                database.dispose()
    finally:
        shutil.rmtree(folder)


class _Same(int):
    """A process id that equals every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


# -- forks ----------------------------------------------------------------------------------------------

FORKED = """
import ctypes, os, sys
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.dispatchers import heartbeat

database = Database(sys.argv[1])
database.create_tables()
heartbeat(database, "dsp_parent", started=True)
children = []
for number in range(4):
    pid = ctypes.PyDLL(None).fork()  # as uWSGI does it, without Python's hooks
    if pid == 0:
        try:
            for _ in range(40):
                heartbeat(database, f"dsp_{number}", started=True)
            os._exit(0)
        except BaseException as exc:
            print(type(exc).__name__, exc, flush=True)
            os._exit(1)
    children.append(pid)
for _ in range(40):
    heartbeat(database, "dsp_parent", started=False)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


def test_a_fork_without_hooks_shares_no_connection(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[0, 0, 0, 0]\n", done.stdout + done.stderr
    assert done.stderr == ""
