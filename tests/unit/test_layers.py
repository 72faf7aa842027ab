"""Imports go down only: from a layer to itself or to a lower one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "flask_rq_webhooks"
ROOT = Path(__file__).resolve().parents[2]

#: First path component below the package → rank.
RANKS = {
    "version": 0,
    "_steps": 0,
    "errors": 0,
    "config": 0,
    "signals": 0,
    "protocol": 1,
    "storage": 2,
    "queue": 3,
    "state": 4,
    "accept": 5,
    "observe": 5,
    "dispatch": 6,
    "web": 7,
    "extension": 8,
    "cli": 9,
    "testing": 9,
}

#: Outside the ranks: what runs in users' workers and receivers may use hardly anything.
ALONE = {
    "callbacks": {"protocol.worker_errors", "protocol.json_safe", "queue.safe_pickle"},
    "receiver": {"protocol.signatures", "errors"},
    # The names of the package, loaded on first use; `version` is all it really imports.
    "__init__": {"version", "errors", "extension", "queue.job_callbacks"},
}


def modules() -> list[str]:
    """Return every module of the package, dotted, without the package's own name."""
    folder = ROOT / PACKAGE
    return sorted(".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py"))


def imports_of(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Give (line, imported module of ours) for every import statement, also those inside functions."""
    package = [PACKAGE, *module.split(".")][:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from .queue import job_callbacks` names a module, `from .errors import X` a thing in one.
            targets = [_module_or_origin(origin, name.name) for name in node.names]
        else:
            continue
        for target in targets:
            if target == PACKAGE or target.startswith(PACKAGE + "."):
                yield node.lineno, target.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def _module_or_origin(origin: str, name: str) -> str:
    path = ROOT.joinpath(*origin.split("."), name)
    return f"{origin}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else origin


def rank(module: str) -> int:
    return RANKS[module.split(".")[0]]


def violations(module: str, source: str) -> list[str]:
    found = []
    for line, target in imports_of(module, source):
        if module in ALONE:
            # Naming a module that only type checkers import would be seen too; none does but __init__.
            allowed = target in ALONE[module]
        elif target in ALONE:
            allowed = target != "__init__"  # importing the package's own public names makes a cycle
        else:
            allowed = rank(target) <= rank(module)
        if not allowed:
            found.append(f"{module}:{line} imports {target}")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module: str) -> None:
    source = (ROOT / PACKAGE).joinpath(*module.split(".")).with_suffix(".py").read_text()
    assert violations(module, source) == []


def test_every_module_has_a_rank() -> None:
    first_parts = {module.split(".")[0] for module in modules()}
    assert first_parts - RANKS.keys() - ALONE.keys() == set()


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("protocol.retry", "from ..storage import models", ["protocol.retry:1 imports storage.models"]),
        ("protocol.retry", "from ..storage.models import Event", ["protocol.retry:1 imports storage.models"]),
        (
            "storage.models",
            "def f():\n    from ..queue import job_callbacks",
            ["storage.models:2 imports queue.job_callbacks"],
        ),
        ("observe.ingest", "import flask_rq_webhooks.web.api", ["observe.ingest:1 imports web.api"]),
        ("observe.ingest", "from .. import RQWebhooks", ["observe.ingest:1 imports __init__"]),
        ("callbacks", "from .errors import RQWebhooksError", ["callbacks:1 imports errors"]),
        ("callbacks", "from .protocol.json_safe import to_json_safe", []),
        ("web.api", "from ..storage import queries\nfrom .api_schemas import x\nimport flask", []),
        ("extension", "from .web import api, pages", []),
    ],
)
def test_the_walker_sees_upward_imports(module: str, source: str, expected: list[str]) -> None:
    assert violations(module, source) == expected
