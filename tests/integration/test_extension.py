"""The extension object on the shapes of host apps that exist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rq
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from redis import Redis

from flask_rq_webhooks import ConfigurationError, RQWebhooks
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage import models
from tests.acceptance import tasks

URL = "https://hooks.example.com/in"


@pytest.fixture
def opened() -> Iterator[list[Flask]]:
    """Collect apps whose connections are closed at the end."""
    apps: list[Flask] = []
    yield apps
    for app in apps:
        state = app.extensions.get("rq_webhooks")
        if state is not None:
            for name in ("database", "redis"):
                if name in state._built:
                    getattr(state, name).dispose() if name == "database" else state.redis.close()
        if "sqlalchemy" in app.extensions:
            with app.app_context():
                for engine in app.extensions["sqlalchemy"].engines.values():
                    engine.dispose()


def make_app(opened: list[Flask], **config: Any) -> Flask:
    app = Flask("host")
    app.config.update(SECRET_KEY="tests", **config)
    opened.append(app)
    return app


def test_two_apps_in_one_process_keep_their_settings_tables_and_entries_apart(
    opened: list[Flask], redis_url: str, tmp_path: Path
) -> None:
    db = SQLAlchemy()
    webhooks = RQWebhooks(db=db, instrument_rq=True)
    webhooks.authorize(lambda permission, **what: True)
    states: list[State] = []
    for name, prefix in (("one", "/webhooks"), ("two", "/hooks")):
        app = make_app(
            opened,
            SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / name}.db",
            RQ_WEBHOOKS_REDIS_URL=redis_url,
            RQ_WEBHOOKS_URL_PREFIX=prefix,
            RQ_WEBHOOKS_USER_AGENT=f"app-{name}",
        )
        db.init_app(app)
        webhooks.init_app(app)
        state = get_state(app)
        state.database.create_tables()
        states.append(state)

        @app.post("/job")
        @webhooks.accepts_webhook
        def enqueue() -> Any:
            connection = Redis.from_url(redis_url)
            job = rq.Queue(is_async=False, connection=connection).enqueue(tasks.add, 1, 2)
            connection.close()
            return {"job_id": job.id}

    first, second = states
    assert first.settings.user_agent == "app-one"
    assert second.settings.user_agent == "app-two"
    assert first.namespace != second.namespace

    response = first.app.test_client().post("/job", json={"webhook_url": URL})

    assert response.headers["Webhook-Registered"] == "true"
    assert first.outbox.length() == 1
    assert second.outbox.length() == 0
    job_id = response.get_json()["job_id"]
    configured = first.app.test_client().get(f"/webhooks/jobs/{job_id}").get_json()["webhook_configured"]
    foreign = second.app.test_client().get(f"/hooks/jobs/{job_id}").get_json()
    assert configured is True
    assert foreign == {"job_id": job_id, "webhook_configured": False}
    webhooks.uninstrument_rq()


def test_host_that_registers_extensions_itself_and_binds_db_first(
    opened: list[Flask], sqlite_url: str
) -> None:
    class Host(Flask):
        def register_extension(self, extension: Any) -> None:
            extension.init_app(self)

    app = Host("host")
    opened.append(app)
    app.config.update(SECRET_KEY="tests", SQLALCHEMY_DATABASE_URI=sqlite_url)
    db = SQLAlchemy(app)
    app.register_extension(RQWebhooks(db=db))

    with app.app_context():
        db.create_all()
        tables = set(sa.inspect(db.engine).get_table_names())

    assert {table.name for table in models.Base.metadata.sorted_tables} <= tables


def test_db_may_be_initialised_after_us(opened: list[Flask], sqlite_url: str) -> None:
    app = make_app(opened, SQLALCHEMY_DATABASE_URI=sqlite_url)
    db = SQLAlchemy()
    RQWebhooks(app, db)
    db.init_app(app)

    assert str(get_state(app).database.url) == sqlite_url


def test_tables_in_the_hosts_metadata_have_plain_column_types(opened: list[Flask]) -> None:
    app = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://")
    db = SQLAlchemy(app)
    RQWebhooks(app, db)

    ours = [table for table in db.metadata.sorted_tables if table.name.startswith("rq_webhooks_")]

    assert len(ours) == 7
    for table in ours:
        for column in table.columns:
            assert type(column.type).__module__.startswith("sqlalchemy."), column


def test_in_memory_host_gets_an_in_memory_database_of_our_own(opened: list[Flask]) -> None:
    app = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://")
    db = SQLAlchemy(app)
    RQWebhooks(app, db)

    database = get_state(app).database
    with database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(models.Event)).scalar() == 0
    with app.app_context():
        assert database.engine is not db.engine


def test_bind_key_names_the_database(opened: list[Flask], tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    app = make_app(
        opened,
        SQLALCHEMY_DATABASE_URI="sqlite://",
        SQLALCHEMY_BINDS={"hooks": other},
        RQ_WEBHOOKS_BIND_KEY="hooks",
    )
    db = SQLAlchemy(app)
    RQWebhooks(app, db)

    assert str(get_state(app).database.url) == other
    with app.app_context():
        db.create_all()
        assert "rq_webhooks_event" in sa.inspect(db.engines["hooks"]).get_table_names()
        assert "rq_webhooks_event" not in sa.inspect(db.engine).get_table_names()


def test_works_without_flask_sqlalchemy(opened: list[Flask], sqlite_url: str) -> None:
    app = make_app(opened, RQ_WEBHOOKS_DATABASE_URI=sqlite_url)
    RQWebhooks(app)

    assert str(get_state(app).database.url) == sqlite_url


def test_unknown_database_is_an_error_that_says_what_to_set(opened: list[Flask]) -> None:
    app = make_app(opened)
    RQWebhooks(app)

    with pytest.raises(ConfigurationError, match="RQ_WEBHOOKS_DATABASE_URI"):
        _ = get_state(app).database


def test_missing_bind_is_an_error_that_names_it(opened: list[Flask]) -> None:
    app = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://", RQ_WEBHOOKS_BIND_KEY="nowhere")
    RQWebhooks(app, SQLAlchemy(app))

    with pytest.raises(ConfigurationError, match="'nowhere'"):
        _ = get_state(app).database


def test_second_init_app_is_refused(opened: list[Flask]) -> None:
    app = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://")
    webhooks = RQWebhooks(app, SQLAlchemy(app))

    with pytest.raises(ConfigurationError, match="already initialised"):
        webhooks.init_app(app)


def test_bad_setting_stops_init_app_and_changes_nothing(opened: list[Flask]) -> None:
    app = make_app(opened, RQ_WEBHOOKS_TIMEOUT="soon")

    with pytest.raises(ConfigurationError, match=r"RQ_WEBHOOKS_TIMEOUT is 'soon'"):
        RQWebhooks(app)

    assert "rq_webhooks" not in app.extensions
    assert "rq_webhooks" not in app.blueprints


def test_unknown_default_format_is_refused_unless_registered_before(opened: list[Flask]) -> None:
    app = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://", RQ_WEBHOOKS_FORMAT="own")
    webhooks = RQWebhooks(db=SQLAlchemy(app))

    with pytest.raises(ConfigurationError, match="'own'"):
        webhooks.init_app(app)
    webhooks.payload_format("own")(lambda payload: {"about": payload["event"]})
    webhooks.init_app(app)

    assert "own" in get_state(app).formats


def test_own_payload_format_may_not_replace_ours() -> None:
    webhooks = RQWebhooks()

    with pytest.raises(ConfigurationError, match="'job'"):
        webhooks.payload_format("job")(lambda payload: payload)


def test_redis_may_be_a_client_or_a_function(opened: list[Flask], redis_client: Redis) -> None:
    first = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://")
    second = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://")
    RQWebhooks(first, SQLAlchemy(first), redis=redis_client)
    RQWebhooks(second, SQLAlchemy(second), redis=lambda: redis_client)

    assert get_state(first).redis is redis_client
    assert get_state(second).redis is redis_client


def test_application_event_needs_a_type_of_its_own(opened: list[Flask]) -> None:
    app = make_app(opened, SQLALCHEMY_DATABASE_URI="sqlite://")
    webhooks = RQWebhooks(app, SQLAlchemy(app))

    with app.app_context():
        for bad in ("job.success", "webhook.ping", "Nodots", "with space.x", ""):
            with pytest.raises(ValueError, match="application event type"):
                webhooks.send(bad, {})
        event_id = webhooks.send("model.published", {"name": "basin"}, runid="r1")

    with get_state(app).database.read() as connection:
        row = connection.execute(sa.select(models.Event.id, models.Event.type, models.Event.runid)).one()
    assert tuple(row) == (event_id, "model.published", "r1")
