"""SQLite files: the host's stays as the host made it, ours is in WAL mode."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_rq_webhooks import RQWebhooks, StorageUnavailableError
from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.storage.attempts import record_attempts
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.models import Delivery, Event
from tests.storage_rows import attempt, claim, new_endpoint, occurrence, publish, rows


def journal_mode(path: Path) -> str:
    connection = sqlite3.connect(path)
    mode: str = connection.execute("PRAGMA journal_mode").fetchone()[0]
    connection.close()
    return mode


def work(database: Database) -> None:
    new_endpoint(database, job_id="job-1")
    publish(database, occurrence("job-1"))
    (claimed,) = claim(database)
    record_attempts(database, [attempt(claimed)], dispatcher_id="dsp_1", disable_after=100)


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, "delete"),
        ({"RQ_WEBHOOKS_DATABASE_URI": "sqlite:///{folder}/host.db"}, "delete"),
        (
            {"SQLALCHEMY_BINDS": {"hooks": "sqlite:///{folder}/host.db"}, "RQ_WEBHOOKS_BIND_KEY": "hooks"},
            "delete",
        ),
    ],
    ids=["the host's database", "the same file by our own setting", "a bind"],
)
def test_the_hosts_file_keeps_its_journal_mode(tmp_path: Path, settings: dict[str, Any], mode: str) -> None:
    """``cp host.db`` stays a whole back-up, as it was before."""

    def here(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: here(one) for key, one in value.items()}
        return value.format(folder=tmp_path) if isinstance(value, str) else value

    path, db, app = tmp_path / "host.db", SQLAlchemy(), Flask("host")
    app.config.update(here(settings), SECRET_KEY="x", SQLALCHEMY_DATABASE_URI=f"sqlite:///{path}")
    db.init_app(app)
    RQWebhooks(app, db=db)
    database = get_state(app).database
    database.create_tables()
    work(database)
    assert journal_mode(path) == mode
    shutil.copy(path, tmp_path / "copy.db")
    copy = Database(f"sqlite:///{tmp_path / 'copy.db'}")
    assert [delivery.status for delivery in rows(copy, Delivery)] == ["succeeded"]
    copy.dispose()
    database.dispose()


def test_the_hosts_own_wal_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "host.db"
    sqlite3.connect(path).execute("PRAGMA journal_mode=WAL").connection.close()
    database = Database(f"sqlite:///{path}", own_file=False)
    database.create_tables()
    work(database)
    assert journal_mode(path) == "wal"
    database.dispose()


def test_our_own_file_is_in_wal_mode(tmp_path: Path) -> None:
    app, db = Flask("host"), SQLAlchemy()
    app.config.update(
        SECRET_KEY="x",
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'host.db'}",
        RQ_WEBHOOKS_DATABASE_URI=f"sqlite:///{tmp_path / 'ours.db'}",
    )
    db.init_app(app)
    RQWebhooks(app, db=db)
    database = get_state(app).database
    database.create_tables()
    assert journal_mode(tmp_path / "ours.db") == "wal"
    database.dispose()


def test_a_writer_of_the_host_is_waited_for_without_wal(tmp_path: Path) -> None:
    path = tmp_path / "host.db"
    database = Database(f"sqlite:///{path}", own_file=False, connect_args={"timeout": 0.2})
    database.create_tables()
    host = sqlite3.connect(path, isolation_level=None)
    host.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageUnavailableError, match="locked"):
        publish(database, occurrence("job-1"))
    host.execute("COMMIT")
    host.close()
    publish(database, occurrence("job-1"))
    assert len(rows(database, Event)) == 1
    with database.read() as connection:
        assert connection.execute(sa.text("PRAGMA busy_timeout")).scalar_one() == 200
    database.dispose()


def test_a_file_that_may_not_be_written_is_one_sentence_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "host.db"
    database = Database(f"sqlite:///{path}", own_file=False)
    database.create_tables()
    database.dispose()
    read_only = Database(f"sqlite:///file:{path}?mode=ro&uri=true", own_file=False)
    with pytest.raises(StorageUnavailableError, match="the right to write the file and its folder"):
        publish(read_only, occurrence("job-1"))
    nowhere = Database(f"sqlite:///{tmp_path / 'none' / 'host.db'}", own_file=False)
    with pytest.raises(StorageUnavailableError, match="unable to open"):
        publish(nowhere, occurrence("job-1"))
    read_only.dispose()
