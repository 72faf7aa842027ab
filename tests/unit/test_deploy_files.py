"""The files that the documentation gives operators: their commands and names are ones that exist."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from flask_rq_webhooks.cli import cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
UNITS = sorted(path.name for path in DEPLOY.glob("*.service"))


def command_of(words: list[str]) -> click.Command | None:
    """Return the command of ours in a command line, ``None`` where it runs something else."""
    if "rq-webhooks" not in words:
        return None
    command: click.Command = cli
    rest = words[words.index("rq-webhooks") + 1 :]
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest)  # refuses options it does not know
    return command


@pytest.mark.parametrize("name", UNITS)
def test_units(name: str) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / name)
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program.startswith("/srv/app/.venv/bin/")
    command_of(words)
    assert ("app-worker.env" in service["EnvironmentFile"]) == ("worker@" in name)
    assert f"/etc/systemd/system/{name}" in (DEPLOY / name).read_text()


def test_compose_file() -> None:
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"web", "worker", "dispatcher", "migrate", "valkey", "postgres"}
    assert command_of(shlex.split(services["dispatcher"]["command"])) is cli.commands["worker"]
    assert command_of(shlex.split(services["migrate"]["command"])) is cli.commands["init-db"]
    assert "environment" not in services["worker"], "workers need no key and no database"
    assert {"SECRET_KEY", "DATABASE_URL", "REDIS_URL"} == services["dispatcher"]["environment"].keys()


def test_alerts_name_metrics_that_exist() -> None:
    documented = set(re.findall(r"``(rq_webhooks_\w+)", (ROOT / "docs" / "metrics.rst").read_text()))
    source = (ROOT / "flask_rq_webhooks" / "web" / "monitoring.py").read_text()
    alerts = re.findall(r"rq_webhooks_\w+", (DEPLOY / "alerts.yml").read_text())
    assert len(alerts) >= 6
    for name in alerts:
        assert name in documented
        assert name.removeprefix("rq_webhooks_") in source


def test_the_pages_show_all_of_them() -> None:
    page = (ROOT / "docs" / "operations.rst").read_text()
    assert set(re.findall(r"literalinclude:: deploy/(\S+)", page)) == {path.name for path in DEPLOY.iterdir()}
