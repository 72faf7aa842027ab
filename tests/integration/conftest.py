"""An opened database with our tables, and an app's state, on every supported kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.database import Database
from tests.integration.hosts import Host
from tests.pipeline import open_state


@pytest.fixture
def make_host(sqlite_url: str, redis_url: str) -> Iterator[Callable[..., Host]]:
    """Give a function that makes host apps; all are closed at the end."""
    hosts: list[Host] = []

    def make(**config: Any) -> Host:
        hosts.append(Host(sqlite_url, redis_url, **config))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    return make_host()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Give an empty database with our tables."""
    opened = Database(database_url)
    opened.create_tables()
    yield opened
    opened.dispose()


@pytest.fixture
def state(database_url: str, redis_url: str) -> Iterator[State]:
    """Give the state of an app with the settings of tests, on an empty database."""
    with open_state(database_url, redis_url) as opened:
        yield opened
