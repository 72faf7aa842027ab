"""Hosts with Flask-Migrate: our tables are in their revisions, which need nothing of ours to run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.models import Base
from flask_rq_webhooks.storage.schema import missing_schema
from tests.servers import Process

OURS = {table.name for table in Base.metadata.sorted_tables}


class Migrated:
    """Runs ``flask db …`` for one host in one folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = environment

    def flask(self, *commands: str) -> str:
        """Run flask commands one after the other; return what they printed."""
        with Process(
            "python", "-m", "tests.hosts.migrated", *commands, cwd=self.folder, env=self.environment
        ) as process:
            status = process.wait()
            output = process.output
        assert status == 0, output
        return output

    def revisions(self) -> list[str]:
        folder = self.folder / "migrations" / "versions"
        return [
            path.read_text() for path in sorted(folder.glob("*.py"), key=lambda path: path.stat().st_mtime)
        ]


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Give a function that makes an empty database of a kind."""

    def make(kind: str) -> str:
        if kind == "sqlite":
            return f"sqlite:///{tmp_path / os.urandom(4).hex()}.db"
        return str(request.getfixturevalue("postgres").new_database())

    return make


def tables(url: str) -> set[str]:
    engine = sa.create_engine(url)
    try:
        return set(sa.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def rows(url: str, table: str) -> int:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            return int(connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())
    finally:
        engine.dispose()


def works(url: str) -> bool:
    """Say whether our code finds all it needs, and can write and read times there."""
    from flask_rq_webhooks.storage.dispatchers import dispatcher_alive, heartbeat, shared_namespace

    database = Database(url)
    try:
        assert missing_schema(database).lines() == []
        heartbeat(database, "dsp_test", started=True)
        return len(shared_namespace(database)) == 8 and dispatcher_alive(database)
    finally:
        database.dispose()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_revision_upgrade_check_downgrade(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    url = new_url(kind)
    host = Migrated(tmp_path, HOST_DATABASE_URL=url)
    # A host that has lived before us: its own table comes first, ours with a revision of their own.
    host.flask(
        "db init",
        "without-webhooks db migrate -m host",
        "without-webhooks db upgrade",
        "db migrate -m webhooks",
    )

    before, ours = host.revisions()
    assert "rq_webhooks" not in before
    assert set(re.findall(r"create_table\('(\w+)'", ours)) == OURS
    assert "flask_rq_webhooks" not in ours  # a revision outlives the package
    assert "drop_table('run')" not in ours

    assert "No new upgrade operations detected" in host.flask("db upgrade", "db check")
    assert tables(url) == OURS | {"run", "alembic_version"}
    assert works(url)

    host.flask("db downgrade")
    assert tables(url) == {"run", "alembic_version"}
    output = host.flask("db upgrade", "rq-webhooks init-db", "db check")
    assert "created" not in output
    assert "No new upgrade operations detected" in output
    assert works(url)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_bind_key_with_multidb(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    own, hooks = new_url(kind), new_url(kind)
    host = Migrated(tmp_path, HOST_DATABASE_URL=own, WEBHOOKS_BIND_URL=hooks)
    host.flask("db init --multidb", "db migrate -m all")

    (revision,) = host.revisions()
    for_hooks = revision.split("def upgrade_hooks()")[1].split("def downgrade_hooks()")[0]
    assert set(re.findall(r"create_table\('(\w+)'", for_hooks)) == OURS
    for_host = revision.split("def upgrade_()")[1].split("def downgrade_()")[0]
    assert re.findall(r"create_table\('(\w+)'", for_host) == ["run"]

    host.flask("db upgrade", "db check")
    assert tables(own) == {"run", "alembic_version"}
    assert tables(hooks) == OURS | {"alembic_version"}
    assert works(hooks)
    host.flask("db downgrade base")
    assert tables(hooks) == {"alembic_version"}


def test_bind_key_without_multidb_leaves_our_tables_to_init_db(
    new_url: Callable[[str], str], tmp_path: Path
) -> None:
    own, hooks = new_url("sqlite"), new_url("sqlite")
    host = Migrated(tmp_path, HOST_DATABASE_URL=own, WEBHOOKS_BIND_URL=hooks)
    output = host.flask("db init", "db migrate -m host", "db upgrade", "rq-webhooks init-db", "db check")
    assert "created table rq_webhooks_event" in output
    assert tables(own) == {"run", "alembic_version"}
    assert works(hooks)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_host_that_never_migrates(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    url = new_url(kind)
    host = Migrated(tmp_path, HOST_DATABASE_URL=url)

    first, again = host.flask("rq-webhooks init-db", "rq-webhooks init-db").split("$ flask")[1:]
    assert "created table rq_webhooks_delivery" in first
    assert "created" not in again
    assert "The tables are up to date." in again
    assert tables(url) == OURS
    assert works(url)
    assert rows(url, "rq_webhooks_dispatcher") == 2


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_host_that_begins_to_migrate_later(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """What init-db made is what the models say: autogenerate finds nothing to change in it."""
    url = new_url(kind)
    host = Migrated(tmp_path, HOST_DATABASE_URL=url)
    host.flask("rq-webhooks init-db", "db init", "db migrate -m host", "db upgrade", "db check")

    (revision,) = host.revisions()
    assert re.findall(r"create_table\('(\w+)'", revision) == ["run"]
    assert "rq_webhooks" not in revision


def test_upgrade_of_a_host_that_migrates_as_the_page_on_operations_says(
    new_url: Callable[[str], str], tmp_path: Path
) -> None:
    """The revision adds the columns; the indexes are left out of it and built by init-db."""
    url = new_url("postgresql")
    host = Migrated(tmp_path, HOST_DATABASE_URL=url)
    host.flask("db init", "db migrate -m first", "db upgrade")
    engine = sa.create_engine(url)
    with engine.begin() as connection:  # as the version before left it
        for table in ("endpoint", "watch", "event", "delivery"):
            connection.execute(sa.text(f"ALTER TABLE rq_webhooks_{table} DROP COLUMN tenant"))
        connection.execute(sa.text("ALTER TABLE rq_webhooks_endpoint DROP COLUMN only_tenant"))
    engine.dispose()
    host.flask("db migrate -m tenants")
    newest = max((tmp_path / "migrations" / "versions").glob("*.py"), key=lambda path: path.stat().st_mtime)
    lines = newest.read_text().splitlines()
    kept = [line for line in lines if not re.search("create_index.*ix_rq_webhooks_", line)]
    at = kept.index("def upgrade():")
    kept.insert(at + 1, "    op.execute(\"SET LOCAL lock_timeout = '1s'\")")
    assert len(lines) - len(kept) == 4
    newest.write_text("\n".join(kept) + "\n")

    output = host.flask("db upgrade", "rq-webhooks init-db", "db check")

    assert output.count("created index ix_rq_webhooks_") == 5
    assert "created column" not in output
    assert "No new upgrade operations detected" in output
    assert works(url)
