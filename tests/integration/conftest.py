"""An opened database with our tables, on every supported kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flask_rq_webhooks.storage.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Give an empty database with our tables."""
    opened = Database(database_url)
    opened.create_tables()
    yield opened
    opened.dispose()
