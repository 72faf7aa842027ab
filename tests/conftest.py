"""Servers shared by the whole run, an empty database for every test, and a leak check."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask
import pytest
import redis
from hypothesis import HealthCheck, settings
from werkzeug.routing import Rule

from tests.servers import PostgresHandle, Receiver, postgres_server, valkey_server

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

REDIS_URL = os.environ.get("RQ_WEBHOOKS_TEST_REDIS_URL")
DATABASE_URL = os.environ.get("RQ_WEBHOOKS_TEST_DATABASE_URL")

#: Folders whose tests take seconds each, the longest first: they run first, so that no process is left with
#: them at the end.
LONG = ("chaos", "multimachine", "browser", "acceptance")
#: Of these, each test goes to whichever process is free: they share nothing, or only the run's servers.
SPLIT = (
    "tests/chaos/",
    "tests/multimachine/",
    "tests/acceptance/test_pipeline.py",
    "tests/acceptance/test_dispatcher_kills.py",
    "tests/acceptance/test_postgres_outage.py",
    "tests/acceptance/test_processes.py",
)

# How long an example takes is no finding: tests may run beside others on a busy machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def compile_url_builders_once() -> None:
    """Let rules of the same text share the function that builds their URLs.

    Werkzeug compiles two functions for each rule of each app; that is half the time it takes to make an app,
    and the tests make the same routes a thousand times. A function depends on the text alone, unless the rule
    has defaults.
    """
    compile_builder = Rule._compile_builder
    compiled: dict[tuple[Any, ...], Any] = {}

    def remembered(rule: Rule, append_unknown: bool = True) -> Any:
        if rule.defaults:
            return compile_builder(rule, append_unknown)
        key = (rule.rule, *rule._trace, append_unknown)
        if key not in compiled:
            compiled[key] = compile_builder(rule, append_unknown)
        return compiled[key]

    Rule._compile_builder = remembered  # type: ignore[method-assign]


compile_url_builders_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long folders first; give a second try to tests marked ``slow_machine``, and to no other."""
    for item in items:
        for marker in item.iter_markers("slow_machine"):
            if not marker.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: slow_machine needs reason=")
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(
        key=lambda item: LONG.index(item.path.parent.name) if item.path.parent.name in LONG else len(LONG)
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Hand out files in this order, and what is in ``SPLIT`` test by test."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None

    class LongFirst(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(SPLIT) else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return LongFirst(config, log)


@pytest.fixture(autouse=True)
def _no_leaked_context() -> Iterator[None]:
    """Fail a test that leaves an app or request context behind."""
    yield
    assert not flask.has_app_context(), "an app context was left pushed"


@pytest.fixture(scope="session")
def redis_server_url() -> Iterator[str]:
    """Give the URL of a running server: an operator's, or one of our own."""
    if REDIS_URL:
        client = redis.Redis.from_url(REDIS_URL)
        assert client.dbsize() == 0, "RQ_WEBHOOKS_TEST_REDIS_URL names a database that is not empty"
        client.close()
        yield REDIS_URL
        return
    with valkey_server() as server:
        yield server.url


@pytest.fixture
def redis_url(redis_server_url: str) -> Iterator[str]:
    """Give the URL of an empty Redis database."""
    yield redis_server_url
    client = redis.Redis.from_url(redis_server_url)
    client.flushdb()
    client.close()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresHandle]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'host.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the URL of an empty database, once per supported kind."""
    if request.param == "sqlite":
        yield str(request.getfixturevalue("sqlite_url"))
    elif DATABASE_URL:
        yield DATABASE_URL
    else:
        with request.getfixturevalue("postgres").lent_database() as url:
            yield url


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        yield server
