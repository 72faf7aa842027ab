"""The extras: the page on installation knows each of them, and every package in them is used."""

from __future__ import annotations

import ast
import configparser
import re
from importlib.metadata import packages_distributions

from tests.servers import ROOT

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")
EXTRAS = CONFIG["options.extras_require"]

#: Packages that are used without being imported → a file and what it says of them.
NOT_IMPORTED = {
    "asgiref": ("tests/integration/test_accepts_webhook.py", "async def"),  # Flask's, for async views
    "furo": ("docs/conf.py", 'html_theme = "furo"'),
    "mypy": ("Makefile", "$(BIN)/mypy"),
    "psycopg2-binary": ("tests/integration/test_postgres_hosts.py", "postgresql+psycopg2"),
    "pytest-cov": ("Makefile", "--cov-fail-under"),
    "pytest-flask": ("tests/integration/test_source_designs.py", "pytest-flask"),
    "pytest-rerunfailures": ("tests/conftest.py", "pytest.mark.flaky(reruns=1)"),
    "pytest-timeout": ("tests/chaos/test_kills.py", "pytest.mark.timeout("),
    "ruff": ("Makefile", "$(BIN)/ruff"),
    "types-requests": ("setup.cfg", "strict = true"),  # mypy reads it where `requests` is imported
}


def test_every_extra_is_documented() -> None:
    page = (ROOT / "docs" / "installation.rst").read_text()
    assert set(re.findall(r"``\[([a-z]+)\]``", page)) == set(EXTRAS)


def imported() -> set[str]:
    """Return the distributions of all modules that are imported in this repository."""
    folders = ("flask_rq_webhooks", "example_app", "tests", "benchmarks", "docs")
    modules: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    installed = packages_distributions()
    return {name.lower().replace("_", "-") for module in modules for name in installed.get(module, ())}


def test_every_package_of_the_extras_is_used() -> None:
    listed = {
        re.split(r"[\[><=~! ]", line)[0]
        for extra in EXTRAS.values()
        for line in extra.split()
        if not line.startswith("%")
    }
    assert len(listed) > 30
    assert listed - imported() == set(NOT_IMPORTED)
    for name, (path, text) in NOT_IMPORTED.items():
        assert text in (ROOT / path).read_text(), f"{name} is not used as {path} shows"
