"""Imports go down only, and each library has its room: SQL in storage, Redis and RQ in queue, Flask above."""

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
    "tracing": 0,
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
    "callbacks": {"protocol.job_errors", "protocol.json_safe", "queue.safe_pickle", "tracing"},
    "receiver": {"protocol.signatures", "errors"},
    # The names of the package, loaded on first use; `version` is all it really imports.
    "__init__": {"version", "errors", "extension", "queue.job_callbacks"},
}


#: Library → the rooms that use it. Any module may import it for annotations, and ``redis.exceptions``.
ROOMS = {
    "sqlalchemy": {"storage"},
    "redis": {"queue"},
    "rq": {"queue"},
    "flask": {"accept", "web", "cli"},
    "flask_sqlalchemy": set(),
    "requests": {"dispatch"},
}

#: Single modules that use one more library, and why.
SEAMS = {
    ("config", "redis"): "checks that URLs are such that its client reads",
    ("state", "redis"): "makes the client for RQ_WEBHOOKS_REDIS_URL",
    ("state", "flask"): "belongs to an app",
    ("extension", "flask"): "is registered with an app",
    ("testing", "flask"): "is for tests of an app",
    ("receiver", "flask"): "offers a decorator to Flask receivers",
    ("callbacks", "rq"): "runs in RQ's work-horse",
    ("dispatch.pubsub", "redis"): "publishes on a Redis of its own",
    ("dispatch.host_limits", "redis"): "counts through the limits library",
    ("accept.register", "rq"): "enqueues on queues the host gives it",
    ("accept.route_report", "rq"): "recognises what enqueues",
    ("observe.publisher", "rq"): "knows RQ's word for a result that cannot be pickled",
}

#: The one module outside of queue that sends commands to Redis: it asks the server about itself.
ASKS_REDIS = {"cli.doctor"}

#: At most so many modules, `__init__` not counted, of at most so many lines: smaller is easier to read.
MODULES = 90
LINES = 500


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


def source_of(module: str) -> str:
    return (ROOT / PACKAGE).joinpath(*module.split(".")).with_suffix(".py").read_text()


def test_imports_go_down_only() -> None:
    assert [line for module in modules() for line in violations(module, source_of(module))] == []


def test_every_module_has_a_rank() -> None:
    first_parts = {module.split(".")[0] for module in modules()}
    assert first_parts - RANKS.keys() - ALONE.keys() == set()


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("protocol.urls", "from ..storage import models", ["protocol.urls:1 imports storage.models"]),
        (
            "protocol.urls",
            "from ..storage.models import Event",
            ["protocol.urls:1 imports storage.models"],
        ),
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


def libraries_of(source: str) -> Iterator[tuple[int, str]]:
    """Give (line, library) for every import of one of ``ROOMS`` that is not for annotations or exceptions."""
    tree = ast.parse(source)
    for_annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_annotations:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in names:
            if name.split(".")[0] in ROOMS and name != "redis.exceptions":
                yield node.lineno, name.split(".")[0]


def redis_commands_of(source: str) -> Iterator[int]:
    """Give the line of every call such as ``state.redis.xlen(…)``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Attribute) and owner.attr == "redis":
                yield node.lineno


def foreign(module: str, source: str) -> list[str]:
    room = module.split(".")[0]
    found = [
        f"{module}:{line} imports {library}"
        for line, library in libraries_of(source)
        if room not in ROOMS[library] and (module, library) not in SEAMS
    ]
    if room not in ROOMS["redis"] and module not in ASKS_REDIS:
        found += [f"{module}:{line} sends a command to Redis" for line in redis_commands_of(source)]
    return found


def test_modules_are_few_and_short() -> None:
    files = [path for path in (ROOT / PACKAGE).rglob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MODULES
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > LINES} == {}


def test_libraries_are_used_in_their_rooms() -> None:
    assert [line for module in modules() for line in foreign(module, source_of(module))] == []


@pytest.mark.parametrize(("module", "library"), SEAMS)
def test_every_seam_is_needed(module: str, library: str) -> None:
    assert library in {found for _line, found in libraries_of(source_of(module))}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("web.api", "import sqlalchemy", ["web.api:1 imports sqlalchemy"]),
        ("cli.doctor", "def f():\n    from sqlalchemy import select", ["cli.doctor:2 imports sqlalchemy"]),
        ("observe.ingest", "from sqlalchemy.exc import DBAPIError", ["observe.ingest:1 imports sqlalchemy"]),
        ("web.monitoring", "from redis import Redis", ["web.monitoring:1 imports redis"]),
        ("web.monitoring", "from redis.exceptions import RedisError", []),
        ("storage.claims", "import redis.asyncio", ["storage.claims:1 imports redis"]),
        ("dispatch.sender", "from rq.job import Job", ["dispatch.sender:1 imports rq"]),
        ("dispatch.sender", "if TYPE_CHECKING:\n    from rq.job import Job", []),
        ("observe.ingest", "from flask import Blueprint", ["observe.ingest:1 imports flask"]),
        ("storage.models", "import flask_sqlalchemy", ["storage.models:1 imports flask_sqlalchemy"]),
        ("web.monitoring", "n = self._state.redis.xlen(key)", ["web.monitoring:1 sends a command to Redis"]),
        ("queue.outbox", "from redis import Redis\nstate.redis.xlen(key)", []),
        ("web.api", "from flask import Blueprint", []),
        ("storage.claims", "from sqlalchemy import text", []),
    ],
)
def test_a_planted_import_is_refused(module: str, source: str, expected: list[str]) -> None:
    assert foreign(module, source) == expected
