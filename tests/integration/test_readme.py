"""The README's lines of integration, run as they stand in an app that has what they take for granted."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import click
import pytest
import redis
from flask import Flask
from flask.testing import FlaskClient
from flask_sqlalchemy import SQLAlchemy

from flask_rq_webhooks import RQWebhooks
from flask_rq_webhooks.cli import cli
from flask_rq_webhooks.state import get_state
from tests.jobs import add
from tests.servers import ROOT

README = (ROOT / "README.rst").read_text()


def integration() -> str:
    found = re.search(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README, re.MULTILINE)
    assert found is not None
    return textwrap.dedent(found[1])


@pytest.fixture
def client(sqlite_url: str, redis_url: str, redis_client: redis.Redis) -> Iterator[FlaskClient]:
    app = Flask("host")
    app.config.update(
        SECRET_KEY="a key for tests only", SQLALCHEMY_DATABASE_URI=sqlite_url, RQ_WEBHOOKS_REDIS_URL=redis_url
    )
    host: dict[str, Any] = {
        "app": app,
        "db": SQLAlchemy(app),
        "redis": redis_client,
        "build_rq": add,
        "current_user": SimpleNamespace(may=lambda permission, **what: permission == "read"),
    }
    exec(integration(), host)
    assert isinstance(host["webhooks"], RQWebhooks)
    state = get_state(app)
    state.database.create_tables()
    yield app.test_client()
    state.database.dispose()
    state.redis.close()


def test_the_route_takes_a_webhook_and_the_dashboard_is_open_to_whom_may_says(client: FlaskClient) -> None:
    request = re.search(r'^    POST (\S+)\n    (\{"webhook_url".*\})$', README, re.MULTILINE)
    assert request is not None
    response = client.post(request[1], data=request[2], content_type="application/json")
    assert response.status_code == 200, response.text
    assert response.headers["Webhook-Registered"] == "true"

    assert client.get("/webhooks/").status_code == 200
    assert client.get(f"/webhooks/jobs/{response.get_json()['job_id']}").status_code == 403


def test_it_is_ten_lines() -> None:
    statements = ast.parse(integration()).body
    lines = [line for line in integration().splitlines() if line.strip()]
    assert len(statements) == 5
    assert len(lines) <= 12


def test_the_commands_are_there() -> None:
    commands = re.findall(r"^ +flask --app app rq-webhooks ([a-z-]+)", README, re.MULTILINE)
    assert len(commands) >= 3
    context = click.Context(cli)
    assert [name for name in commands if cli.get_command(context, name) is None] == []
