"""Broken set-ups, each with the one line by which ``doctor`` names it and says what to do."""

from __future__ import annotations

import json
import re
import shlex
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import rq
import sqlalchemy as sa
from click.testing import Result
from flask import Flask, g, redirect
from flask_sqlalchemy import SQLAlchemy
from jinja2 import DictLoader

from flask_rq_webhooks import RQWebhooks
from flask_rq_webhooks.cli.doctor import _CHECKS
from flask_rq_webhooks.queue.job_callbacks import SameDatabase
from flask_rq_webhooks.queue.redis_database import database_name
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage import dispatchers
from flask_rq_webhooks.storage.database import Database
from tests.dashboard_app import add_endpoint
from tests.servers import free_port, valkey_server

PASSWORD = "correct horse"
#: The module; the package has a command of the same name.
doctor_module = import_module("flask_rq_webhooks.cli.doctor")
NAMES = [name for name, _needs, _check in _CHECKS]


@pytest.fixture(autouse=True)
def _no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer doctor's look-up here: a test asks no name server."""
    monkeypatch.setattr(doctor_module, "system_resolver", lambda host, port: [])


@pytest.fixture(scope="module")
def own_redis_url() -> Iterator[str]:
    """Give a server of this module's own, whose configuration tests may change."""
    with valkey_server() as server:
        yield server.url


@dataclass
class Setup:
    """A set-up in which everything is right until a test breaks it, before the app is made or after.

    :param named: what the expected line is filled with.
    :param before: called with the app before the extension is initialised, *after* with its state.
    """

    config: dict[str, Any]
    redis: redis.Redis
    cleanup: ExitStack
    options: dict[str, Any] = field(default_factory=dict)
    authorize: Callable[..., Any] | None = lambda permission, **what: True  # noqa: E731
    app: Callable[[], Flask] = lambda: Flask("host")  # noqa: E731
    before: Callable[[Flask], None] | None = None
    named: dict[str, Any] = field(default_factory=dict)
    after: Callable[[State], None] | None = None

    def client(self, kind: type[redis.Redis], **options: Any) -> redis.Redis:
        made: redis.Redis = kind.from_url(self.config["RQ_WEBHOOKS_REDIS_URL"], **options)
        self.cleanup.callback(made.close)
        return made

    def configure_redis(self, **values: str) -> None:
        """Change the server's configuration until the end of the test."""
        for name, value in values.items():
            key = name.replace("_", "-")
            before = self.redis.config_get(key)[key]
            self.redis.config_set(key, value)
            self.cleanup.callback(self.redis.config_set, key, before)

    def run(self) -> Result:
        app = self.app()
        app.config.update(self.config)
        if self.before is not None:
            self.before(app)
        webhooks = RQWebhooks(app, **self.options)
        if self.authorize is not None:
            webhooks.authorize(self.authorize)
        state = get_state(app)
        self.cleanup.callback(lambda: state._built.get("redis") and state.redis.close())
        self.cleanup.callback(lambda: state._built.get("database") and state.database.dispose())
        if self.after is not None:
            self.after(state)
        return app.test_cli_runner().invoke(args=["rq-webhooks", "doctor"])


@pytest.fixture
def setup(own_redis_url: str, sqlite_url: str) -> Iterator[Setup]:
    database = Database(sqlite_url)
    database.create_tables()
    dispatchers.heartbeat(database, "dsp_x", started=True)
    database.dispose()
    with ExitStack() as cleanup:
        client = redis.Redis.from_url(own_redis_url)
        cleanup.callback(client.close)
        cleanup.callback(client.flushdb)
        yield Setup(
            config={
                "SECRET_KEY": "a key for tests only",
                "RQ_WEBHOOKS_DATABASE_URI": sqlite_url,
                "RQ_WEBHOOKS_REDIS_URL": own_redis_url,
            },
            redis=client,
            cleanup=cleanup,
            named={"redis": database_name(client)},
        )


def change_tables(setup: Setup, *statements: str) -> None:
    engine = sa.create_engine(setup.config["RQ_WEBHOOKS_DATABASE_URI"])
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


class ClockAhead(redis.Redis):
    """A server whose clock is wrong."""

    def time(self, **kwargs: Any) -> Any:
        seconds, microseconds = super().time(**kwargs)  # type: ignore[misc]
        return seconds + 90, microseconds


class Old(redis.Redis):
    """A server of another time."""

    def info(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().info(*args, **kwargs), "redis_version": "5.0.7"}  # type: ignore[dict-item]


class Replica(redis.Redis):
    """A server that follows another one."""

    def info(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().info(*args, **kwargs), "role": "slave"}  # type: ignore[dict-item]


# -- what may be broken -----------------------------------------------------------------------------------


def switched_off(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_ENABLED"] = False


def no_redis(setup: Setup) -> None:
    port = free_port()
    setup.config["RQ_WEBHOOKS_REDIS_URL"] = f"redis://127.0.0.1:{port}/0"
    setup.named["port"] = port


def no_password(setup: Setup) -> None:
    setup.configure_redis(requirepass=PASSWORD)


def wrong_password(setup: Setup) -> None:
    setup.configure_redis(requirepass=PASSWORD)
    setup.config["RQ_WEBHOOKS_REDIS_URL"] = setup.config["RQ_WEBHOOKS_REDIS_URL"].replace("//", "//:guessed@")


def wrong_password_of_a_given_client(setup: Setup) -> None:
    setup.configure_redis(requirepass=PASSWORD)
    setup.options["redis"] = setup.client(redis.Redis, password="guessed")


def too_few_rights(setup: Setup) -> None:
    setup.redis.acl_setuser("weak", enabled=True, passwords=[f"+{PASSWORD}"], commands=["+ping"], keys=["*"])
    setup.cleanup.callback(setup.redis.acl_deluser, "weak")
    setup.options["redis"] = setup.client(redis.Redis, username="weak", password=PASSWORD)


def old_redis(setup: Setup) -> None:
    setup.options["redis"] = setup.client(Old)


def replica(setup: Setup) -> None:
    setup.options["redis"] = setup.client(Replica)


def decoding_client(setup: Setup) -> None:
    setup.options["redis"] = setup.client(redis.Redis, decode_responses=True)


def evicting_redis(setup: Setup) -> None:
    setup.configure_redis(maxmemory="500mb", maxmemory_policy="allkeys-lru")


def no_database(setup: Setup) -> None:
    port = free_port()
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:{port}/db"


def no_database_of_the_host(setup: Setup) -> None:
    url = f"postgresql+psycopg://127.0.0.1:{free_port()}/db"
    setup.config |= {"SQLALCHEMY_DATABASE_URI": url, "RQ_WEBHOOKS_DATABASE_URI": None}


def no_database_named(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = None


def unusable_url(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = f"//{PASSWORD}@localhost/db"


def driver_missing(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = "postgresql+psycopg2cffi://localhost/db"


def host_database_not_initialised(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = None
    setup.options["db"] = SQLAlchemy()


def no_tables(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = setup.config["RQ_WEBHOOKS_DATABASE_URI"] + ".other"


def old_schema(setup: Setup) -> None:
    change_tables(
        setup,
        "DROP INDEX ix_rq_webhooks_delivery_host",
        "ALTER TABLE rq_webhooks_endpoint DROP COLUMN description",
    )


def no_key(setup: Setup) -> None:
    del setup.config["SECRET_KEY"]


def other_key(setup: Setup) -> None:
    def store(state: State) -> None:
        add_endpoint(state, secret="stored with the first key")
        state.app.config["SECRET_KEY"] = "another key"
        state._built.pop("cipher")

    setup.after = store


def no_dispatcher(setup: Setup) -> None:
    change_tables(setup, "UPDATE rq_webhooks_dispatcher SET heartbeat_at = '2024-01-01 00:00:00.000000'")


def clock_ahead(setup: Setup) -> None:
    setup.options["redis"] = setup.client(ClockAhead)


def nobody_authorizes(setup: Setup) -> None:
    setup.authorize = None


def authorized_later(setup: Setup) -> None:
    async def may(permission: str, **_what: Any) -> bool:
        return True

    setup.authorize = may


def rejected_entries(setup: Setup) -> None:
    def add(state: State) -> None:
        setup.redis.xadd(state.outbox.rejected_key, {"why": "a test"})
        setup.named["key"] = state.outbox.rejected_key

    setup.after = add


def unread_outbox(setup: Setup) -> None:
    def add(state: State) -> None:
        long_ago = datetime.now(UTC) - timedelta(minutes=10)
        setup.redis.xadd(state.outbox.key, {"entry": "{}"}, id=f"{int(long_ago.timestamp() * 1000)}-0")
        setup.redis.xadd(state.outbox.key, {"entry": "{}"})

    setup.after = add


def full_outbox(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_OUTBOX_MAXLEN"] = 1000

    def add(state: State) -> None:
        pipeline = setup.redis.pipeline()
        for _ in range(1000):
            pipeline.xadd(state.outbox.key, {"entry": "{}"})
        pipeline.execute()

    setup.after = add


def silent_callbacks(setup: Setup) -> None:
    setup.after = lambda state: state.outbox.note_silent_callbacks(3)


def _as_attribute(app: Any, queue: rq.Queue) -> None:
    app.task_queue = queue


def queue_elsewhere(setup: Setup, keep: Callable[[Any, rq.Queue], None] = _as_attribute) -> None:
    elsewhere = setup.client(redis.Redis)
    elsewhere.connection_pool.connection_kwargs["db"] = 7
    setup.named["elsewhere"] = database_name(elsewhere)

    setup.after = lambda state: keep(state.app, rq.Queue("tasks", connection=elsewhere))


def queues_in_an_extension(setup: Setup) -> None:
    def keep(app: Any, queue: rq.Queue) -> None:
        app.extensions["rq"] = SimpleNamespace(queues={"tasks": queue}, default=queue)

    queue_elsewhere(setup, keep)


def queues_in_a_dict(setup: Setup) -> None:
    queue_elsewhere(setup, lambda app, queue: setattr(app, "queues", {"tasks": queue}))


def jobs_were_refused(setup: Setup) -> None:
    setup.after = lambda state: SameDatabase(state.redis).note_refusal("redis://other:6379/0")


def uncallable(setup: Setup) -> None:
    setup.authorize = lambda permission: True


def no_sessions(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_ENCRYPTION_KEYS"] = [setup.config.pop("SECRET_KEY")]


def other_dialect(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = f"postgres://u:{PASSWORD}@localhost/db"


def unknown_bind(setup: Setup) -> None:
    setup.config |= {
        "RQ_WEBHOOKS_DATABASE_URI": None, "RQ_WEBHOOKS_BIND_KEY": "hooks",
        "SQLALCHEMY_DATABASE_URI": "sqlite://", "SQLALCHEMY_BINDS": {"other": "sqlite://"},
    }  # fmt: skip
    db = SQLAlchemy()
    setup.before = db.init_app
    setup.options["db"] = db


def no_folder_for_the_database(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_DATABASE_URI"] = "sqlite:////nonexistent/folder/host.db"


def no_such_redis_database(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_REDIS_URL"] += "9999"


def tls_to_a_plain_redis(setup: Setup) -> None:
    url = setup.config["RQ_WEBHOOKS_REDIS_URL"]
    setup.config["RQ_WEBHOOKS_REDIS_URL"] = url.replace("redis://", "rediss://") + "?socket_timeout=0.5"


def outbox_of_another_type(setup: Setup) -> None:
    setup.after = lambda state: setup.redis.set(state.outbox.key, "text") and None


# -- what may be wrong with the app: its routes and its layout


def template(setup: Setup, text: str, name: str = "layout.html") -> None:
    """Let pages appear in a layout of the host's."""
    setup.config["RQ_WEBHOOKS_BASE_TEMPLATE"] = "layout.html"

    def before(app: Flask) -> None:
        app.jinja_loader = DictLoader({name: text})

    setup.before = before


LAYOUT = "".join(f"{{% block {name} %}}{{% endblock %}}" for name in ("title", "head", "content"))


def misspelt_layout(setup: Setup) -> None:
    template(setup, LAYOUT, name="base.html")


def layout_without_parent(setup: Setup) -> None:
    template(setup, "{% extends 'theme/base.html' %}")


def layout_that_does_not_compile(setup: Setup) -> None:
    template(setup, LAYOUT + "\n{% if %}")


def layout_that_extends_itself(setup: Setup) -> None:
    template(setup, "{% extends 'layout.html' %}")


def layout_without_content(setup: Setup) -> None:
    template(
        setup, "{% block title %}{% endblock %}{% block head %}{% endblock %}{% block main %}{% endblock %}"
    )


def layout_without_head(setup: Setup) -> None:
    template(setup, "{% block title %}{% endblock %}{% block content %}{% endblock %}")


def layout_without_title(setup: Setup) -> None:
    template(setup, "{% block head %}{% endblock %}{% block content %}{% endblock %}")


def layout_that_fails_when_rendered(setup: Setup) -> None:
    template(setup, LAYOUT + "{{ url_for('no_such_view') }}")


def loader_without_blueprints(setup: Setup) -> None:
    def before(app: Flask) -> None:
        app.jinja_env.loader = DictLoader({})

    setup.before = before


def own_routes(app: Flask) -> None:
    app.add_url_rule("/webhooks/health", "own_health", lambda: "", methods=["GET"])
    app.add_url_rule("/webhooks/<source>", "inbound", lambda source: "", methods=["GET", "POST"])


def routes_before_ours(setup: Setup) -> None:
    setup.before = own_routes


def routes_after_ours(setup: Setup) -> None:
    setup.after = lambda state: own_routes(state.app)


def route_beside_ours(setup: Setup) -> None:
    setup.before = lambda app: app.add_url_rule("/webhooks/github/<event>", "github", lambda event: "")


def route_below_a_root_prefix(setup: Setup) -> None:
    setup.config["RQ_WEBHOOKS_URL_PREFIX"] = "/"
    setup.before = lambda app: app.add_url_rule("/health", "own_health", lambda: "")


QUEUES_ELSEWHERE = (
    "FAIL queue database: this app has queues in {elsewhere}, but we use {redis}: jobs "
    "there run without webhooks; correct RQ_WEBHOOKS_REDIS_URL."
)

#: How it is broken → the lines that FAIL. ``…`` stands for what a driver, a server or time makes of it.
BROKEN: dict[Callable[[Setup], None], str] = {
    switched_off: "FAIL settings: RQ_WEBHOOKS_ENABLED is off, so no webhooks are accepted; set it to True "
    "(it is read from WEBHOOKS_ENABLED in the environment, too).",
    no_redis: "FAIL redis: redis://localhost:{port}/0 does not answer (ConnectionError: …); start it, or "
    "correct RQ_WEBHOOKS_REDIS_URL.",
    no_password: "FAIL redis: {redis} refuses us (…); correct user name and password "
    "in RQ_WEBHOOKS_REDIS_URL.",
    wrong_password: "FAIL redis: {redis} refuses us (…invalid username-password pair…); correct user name "
    "and password in RQ_WEBHOOKS_REDIS_URL.",
    wrong_password_of_a_given_client: "FAIL redis: {redis} refuses us (…); correct user name and password in "
    "what RQWebhooks(redis=...) gets.",
    too_few_rights: "FAIL redis: {redis} allows our user too little (…no permissions to run the 'info' "
    "command…); give it the rights of RQ.",
    old_redis: "FAIL redis: version 5.0.7 is too old; install Redis 6.2 or newer, or any Valkey.",
    replica: "FAIL redis: {redis} is a replica, which takes no writes; name its primary.",
    decoding_client: "FAIL redis: the client has decode_responses=True, with which RQ cannot read its jobs; "
    "create it without, for RQ and for us.",
    evicting_redis: "FAIL redis: with maxmemory-policy allkeys-lru {redis} deletes jobs and our outbox "
    "when its memory is full; run `CONFIG SET maxmemory-policy noeviction`, and write it into its "
    "configuration.",
    no_database: "FAIL sql: The database of flask_rq_webhooks (postgresql+psycopg://u:***@127.0.0.1:…/db) "
    "cannot be used now: OperationalError: …; start the database, or correct RQ_WEBHOOKS_DATABASE_URI.",
    no_database_of_the_host: "FAIL sql: The database of flask_rq_webhooks (…) cannot be used now: …; start "
    "the database, or correct SQLALCHEMY_DATABASE_URI.",
    no_database_named: "FAIL sql: flask_rq_webhooks does not know its database; set "
    "RQ_WEBHOOKS_DATABASE_URI or SQLALCHEMY_DATABASE_URI, or pass db= to RQWebhooks.",
    unusable_url: "FAIL sql: RQ_WEBHOOKS_DATABASE_URI is not usable (ArgumentError); write it as "
    "postgresql+psycopg://user:password@host/database or sqlite:///file.",
    driver_missing: "FAIL sql: RQ_WEBHOOKS_DATABASE_URI needs the driver 'psycopg2cffi', which is not "
    "installed; for PostgreSQL run `pip install 'flask-rq-webhooks[postgres]'` and begin the URL with "
    "postgresql+psycopg://.",
    host_database_not_initialised: "FAIL sql: The SQLAlchemy object given to RQWebhooks is not initialised "
    "for this app; call db.init_app(app) before the first request, or set RQ_WEBHOOKS_DATABASE_URI.",
    no_tables: "FAIL tables: missing: table rq_webhooks_dispatcher, table …; run "
    "`flask rq-webhooks init-db`, or your migrations.",
    old_schema: "FAIL tables: missing: column rq_webhooks_endpoint.description, index "
    "ix_rq_webhooks_delivery_host; run `flask rq-webhooks init-db`, or your migrations.",
    no_key: "FAIL keys: …SECRET_KEY…RQ_WEBHOOKS_ENCRYPTION_KEYS…",
    other_key: "FAIL keys: A stored secret or header cannot be decrypted with any configured key. Nothing is "
    "lost: put the key it was stored with back, after the new one, in RQ_WEBHOOKS_ENCRYPTION_KEYS (or in "
    "SECRET_KEY_FALLBACKS, where keys are derived from SECRET_KEY), then run `flask rq-webhooks rekey`.",
    no_dispatcher: "FAIL dispatcher: no heartbeat for 30 s, so nothing is delivered; start "
    "`flask rq-webhooks worker`.",
    clock_ahead: "FAIL clock: the clock of Redis and this machine's are … s apart; receivers refuse "
    "timestamps that are off, so synchronise them (NTP).",
    nobody_authorizes: "FAIL permission function: none is registered, so status, API and dashboard answer "
    "403; register one with @webhooks.authorize.",
    authorized_later: "FAIL permission function: it is `async def`, which is not awaited, so every request "
    "is answered 403; make it a plain `def` that returns True or False.",
    silent_callbacks: "FAIL outbox: 3 jobs finished within an hour without a callback report in the outbox: "
    "it was not written, or was lost with Redis. See the workers' logs: a callback that could not append "
    "says why there.",
    queue_elsewhere: QUEUES_ELSEWHERE,
    queues_in_an_extension: QUEUES_ELSEWHERE,
    queues_in_a_dict: QUEUES_ELSEWHERE,
    jobs_were_refused: "FAIL queue database: this app has queues in redis://other:6379/0, but we use "
    "{redis}: jobs there run without webhooks; correct RQ_WEBHOOKS_REDIS_URL.",
    rejected_entries: "FAIL outbox: 1 malformed entries were set aside; read them with `XRANGE {key} - "
    "+`, and `DEL` that key afterwards.",
    unread_outbox: "FAIL outbox: 2 entries wait, the oldest for 60… s, so no dispatcher reads them, or too "
    "few do; start `flask rq-webhooks worker` with this Redis and database, or see its log.",
    uncallable: "FAIL permission function: it cannot be called as function(permission, job_id=…, runid=…) "
    "(…), "
    "so requests end with 500; define it as `def may(permission, **what)`.",
    no_sessions: "FAIL sessions: the app has no SECRET_KEY, so the forms of the pages answer 403; set "
    "one, or "
    "set RQ_WEBHOOKS_DASHBOARD to False.",
    other_dialect: "FAIL sql: RQ_WEBHOOKS_DATABASE_URI is not usable (no such dialect); write it as "
    "postgresql+psycopg://user:password@host/database or sqlite:///file.",
    unknown_bind: "FAIL sql: RQ_WEBHOOKS_BIND_KEY is 'hooks', but SQLALCHEMY_BINDS has no such bind.",
    no_folder_for_the_database: "FAIL sql: The database of flask_rq_webhooks "
    "(sqlite:////nonexistent/folder/host.db) cannot be used now: …unable to open database file; start the "
    "database, or correct RQ_WEBHOOKS_DATABASE_URI.",
    no_such_redis_database: "FAIL redis: … does not answer (…DB index is out of range…); start it, or "
    "correct "
    "RQ_WEBHOOKS_REDIS_URL.",
    tls_to_a_plain_redis: "FAIL redis: … does not answer (…); start it, or correct RQ_WEBHOOKS_REDIS_URL.",
    outbox_of_another_type: "FAIL outbox: …WRONGTYPE…",
    misspelt_layout: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE is 'layout.html', but there is no such "
    "template, "
    "so pages appear in our own layout; correct the name, or put the file into the app's templates folder.",
    layout_without_parent: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE is 'layout.html', but it extends "
    "'theme/base.html', which is missing, so pages appear in our own layout; correct the name, or put the "
    "file "
    "into the app's templates folder.",
    layout_that_does_not_compile: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE 'layout.html' cannot be compiled "
    "(layout.html, line 2: …), so pages appear in our own layout; correct it.",
    layout_that_extends_itself: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE 'layout.html' cannot be compiled "
    "(…the template extends itself), so pages appear in our own layout; correct it.",
    layout_without_content: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE 'layout.html' has no block 'content', so "
    "pages appear in our own layout; add {{% block content %}}{{% endblock %}} to it, …",
    layout_without_head: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE 'layout.html' has no block 'head', so their "
    "style is loaded from the page's body; add {{% block head %}}{{% endblock %}} to it, …",
    layout_without_title: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE 'layout.html' has no block 'title', so "
    "pages "
    "have no title of their own; add {{% block title %}}{{% endblock %}} to it, …",
    layout_that_fails_when_rendered: "FAIL layout: RQ_WEBHOOKS_BASE_TEMPLATE 'layout.html' cannot be "
    "rendered (BuildError: …no_such_view…), so pages appear in our own layout; correct it.",
    loader_without_blueprints: "FAIL layout: the app's Jinja loader does not find templates of "
    "blueprints, so "
    "its own templates cannot import rq_webhooks/_macros.html (our pages do without); let it be "
    "ChoiceLoader([yours, app.create_global_jinja_loader()]).",
    routes_before_ours: "FAIL routes: the app has routes of its own where ours are: /webhooks/health (ours, "
    "answered by 'own_health'), …set RQ_WEBHOOKS_URL_PREFIX to a path that is free, such as /rq-webhooks.",
    routes_after_ours: "FAIL routes: the app has routes of its own where ours are: …/webhooks/health (of "
    "'own_health', answered by us), …set RQ_WEBHOOKS_URL_PREFIX to a path that is free, such as "
    "/rq-webhooks.",
    route_beside_ours: "FAIL routes: the app has routes of its own where ours are: "
    "/webhooks/github/<event> (of "
    "'github'); set RQ_WEBHOOKS_URL_PREFIX to a path that is free, such as /rq-webhooks.",
    route_below_a_root_prefix: "FAIL routes: the app has routes of its own where ours are: /health (ours, "
    "answered by 'own_health'); set RQ_WEBHOOKS_URL_PREFIX to a path that is free, such as /rq-webhooks.",
    full_outbox: "FAIL outbox: 1000 entries wait and the stream is full, so older ones are trimmed and left "
    "to reconcile; start `flask rq-webhooks worker` with this Redis and database, or see its log.",
}


def lines_of(result: Result) -> dict[str, str]:
    """Return the lines by the name of the check; every check has one."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    found = {line[5:].partition(":")[0]: line for line in result.output.splitlines()}
    assert list(found) == NAMES, result.output
    return found


@pytest.mark.parametrize("break_it", list(BROKEN), ids=lambda function: function.__name__)
def test_doctor_names_what_is_broken_and_the_fix(setup: Setup, break_it: Callable[[Setup], None]) -> None:
    break_it(setup)
    result = setup.run()
    assert result.exit_code == 1
    lines = lines_of(result)
    failed = [line for line in lines.values() if line.startswith("FAIL")]
    pattern = ".*".join(re.escape(part) for part in BROKEN[break_it].format(**setup.named).split("…"))
    assert len(failed) == 1, failed
    assert re.fullmatch(pattern, failed[0]), failed[0]
    broken = failed[0][5:].partition(":")[0]
    for name, line in lines.items():
        # What cannot be known now points to the one line to begin with.
        assert line.startswith(("ok   ", "FAIL")) or line == (
            f"skip {name}: skipped: fix the `{broken}` check first."
        )
    assert PASSWORD not in result.output
    assert "guessed" not in result.output


def test_what_needs_something_broken_is_skipped(setup: Setup) -> None:
    no_redis(setup)
    no_tables(setup)
    lines = lines_of(setup.run())
    assert {name: line[:4].strip() for name, line in lines.items()} == {
        "settings": "ok", "redis": "FAIL", "sql": "ok", "tables": "FAIL", "keys": "skip",
        "dispatcher": "skip", "clock": "skip", "permission function": "ok", "routes": "ok", "layout": "ok",
        "sessions": "ok", "queue database": "skip",
        "outbox": "skip", "network": "ok",
    }  # fmt: skip
    assert lines["outbox"].endswith("fix the `redis` check first.")


def test_doctor_finds_nothing_on_a_healthy_host(setup: Setup) -> None:
    setup.after = lambda state: add_endpoint(state, secret="s", headers={"X-Key": "k"}) and None
    setup.redis.sadd("rq:queues", "rq:queue:default")
    setup.redis.sadd("rq:workers", "rq:worker:one")
    result = setup.run()
    assert result.exit_code == 0, result.output
    lines = lines_of(result)
    assert {line[:5] for line in lines.values()} == {"ok   "}
    assert lines["keys"] == "ok   keys: the key decrypts what is stored (4 samples)"
    assert lines["queue database"].startswith("ok   queue database: 1 RQ queues and 1 RQ workers are in ")


PROBE_ANSWER = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2a00:64:64::c000:aa", 443, 0, 0))]


@pytest.mark.parametrize(
    ("allowed", "has_ipv4", "line"),
    [
        (
            False,
            True,
            "ok   network: NAT64 with the prefix 2a00:64:64::/96; receivers that have IPv4 only are reached "
            "by IPv4",
        ),
        (
            True,
            False,
            "ok   network: NAT64 with the prefix 2a00:64:64::/96, which RQ_WEBHOOKS_ALLOW_NAT64 lets "
            "receivers be reached by",
        ),
        (
            False,
            False,
            "FAIL network: this machine has no IPv4, and with NAT64 (prefix 2a00:64:64::/96) receivers that "
            "have IPv4 only are refused; set RQ_WEBHOOKS_ALLOW_NAT64 to True.",
        ),
    ],
)
def test_nat64_is_named_with_its_prefix(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, allowed: bool, has_ipv4: bool, line: str
) -> None:
    monkeypatch.setattr(doctor_module, "system_resolver", lambda host, port: PROBE_ANSWER)
    monkeypatch.setattr(doctor_module, "_has_ipv4", lambda: has_ipv4)
    setup.config["RQ_WEBHOOKS_ALLOW_NAT64"] = allowed
    assert lines_of(setup.run())["network"] == line


def test_a_resolver_that_stalls_holds_doctor_up_for_a_second(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def stall(host: str, port: int) -> list[str]:
        released.wait(30)
        return []

    monkeypatch.setattr(doctor_module, "system_resolver", stall)
    try:
        began = time.monotonic()
        assert lines_of(setup.run())["network"] == "ok   network: no NAT64 found"
        assert time.monotonic() - began < 20
    finally:
        released.set()


def test_what_a_check_repeats_steers_no_terminal(setup: Setup) -> None:
    template(setup, LAYOUT + "{% include 'x\x1b[2J' %}")
    result = setup.run()
    assert result.exit_code == 1
    assert "(TemplateNotFound: x\\x1b[2J)" in lines_of(result)["layout"]
    assert result.output.replace("\n", "").isprintable()


def of_the_user(app: Flask) -> None:
    app.before_request(lambda: setattr(g, "user", {"name": "guest"}))


def login_first(app: Flask) -> None:
    app.before_request(lambda: redirect("/login"))


@pytest.mark.parametrize(
    ("needs", "layout", "may", "text"),
    [
        (of_the_user, "{{ g.user.name.upper() }}", True, "pages appear in 'layout.html'"),
        (of_the_user, "{{ g.user.team.name }}", False, "except for visitors who are not logged in"),
        (login_first, "{{ g.user.team.name }}", True, "the app requires a login first"),
    ],
    ids=["set by the app", "needs a login", "redirects"],
)
def test_a_layout_that_needs_a_login_is_no_alarm(
    setup: Setup, needs: Callable[[Flask], None], layout: str, may: bool, text: str
) -> None:
    template(setup, LAYOUT + layout)
    add_template = setup.before
    setup.authorize = lambda permission, **_what: may

    def before(app: Flask) -> None:
        assert add_template is not None
        add_template(app)
        needs(app)

    setup.before = before
    result = setup.run()
    assert result.exit_code == 0, result.output
    assert text in lines_of(result)["layout"]


def test_a_pause_and_an_empty_redis_are_reported_without_alarm(setup: Setup) -> None:
    setup.after = lambda state: dispatchers.pause(state.database)
    result = setup.run()
    assert result.exit_code == 0
    lines = lines_of(result)
    assert "all sending is paused since" in lines["dispatcher"]
    assert lines["queue database"].endswith("if your jobs are elsewhere, correct RQ_WEBHOOKS_REDIS_URL")


def test_findings_for_programs(setup: Setup) -> None:
    nobody_authorizes(setup)
    app = Flask("host")
    app.config.update(setup.config)
    RQWebhooks(app)
    result = app.test_cli_runner().invoke(args=["rq-webhooks", "doctor", "--json"])
    get_state(app).redis.close()
    get_state(app).database.dispose()
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert [finding["name"] for finding in found] == NAMES
    assert {finding["name"]: finding["status"] for finding in found}["permission function"] == "FAIL"
    assert all(set(finding) == {"name", "status", "text"} for finding in found)


def test_doctor_names_a_signing_secret_of_the_environment(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBHOOK_SIGNING_SECRET", "t0p")
    line = lines_of(setup.run())["settings"]
    assert line.startswith("ok")
    assert "RQ_WEBHOOKS_SIGNING_SECRET = None" in line
    assert "t0p" not in line


def test_every_way_to_be_broken_is_tried() -> None:
    assert len(BROKEN) >= 40


def test_a_host_that_chooses_routes_by_host_is_served(setup: Setup) -> None:
    setup.app = lambda: Flask("host", host_matching=True, static_host="static.example.com")
    result = setup.run()
    assert result.exit_code == 0, result.output
    assert "every host name (host_matching is on)" in lines_of(result)["routes"]


def test_routes_that_only_look_alike_are_no_clash(setup: Setup) -> None:
    def before(app: Flask) -> None:
        app.add_url_rule("/webhooks-of-ours/<source>", "inbound", lambda source: "")
        app.add_url_rule("/<path:page>", "everything_else", lambda page: "")

    setup.before = before
    assert lines_of(setup.run())["routes"] == "ok   routes: served under /webhooks"


def test_wal_is_recommended_for_a_file_of_the_host_without_it(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "the app.db"
    made = Database(f"sqlite:///{path}", own_file=False)
    made.create_tables()
    dispatchers.heartbeat(made, "dsp_x", started=True)
    made.dispose()
    del setup.config["RQ_WEBHOOKS_DATABASE_URI"]
    setup.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{path}"
    setup.before = lambda app: SQLAlchemy().init_app(app)

    result = setup.run()

    line = next(line for line in result.output.splitlines() if line.startswith("ok   sql: "))
    assert "a registration takes 15.5 ms instead of 6.8, a claim 18 ms instead of 3.8" in line
    command = line.partition("run `")[2].rstrip("`")
    assert command == f"sqlite3 '{path}' 'PRAGMA journal_mode=WAL'"
    assert "WAL" not in result.output.replace(line, "")

    with closing(sqlite3.connect(path)) as connection:
        connection.execute(shlex.split(command)[2])
    assert "WAL" not in setup.run().output
