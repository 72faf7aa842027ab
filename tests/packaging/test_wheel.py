"""The wheel in an empty environment: nothing of the source tree is near."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import quickstart
from tests.servers import ROOT

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

PROJECT = Path(__file__).parent / "project"


def wheel() -> Path:
    """Return the one wheel ``make package`` left."""
    (found,) = (ROOT / "dist").glob("*.whl")
    return found


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run *command* with nothing of our environment but what finding programs takes."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the interpreter of an environment in which only the wheel was installed."""
    directory = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    interpreter = directory / "bin" / "python"
    # With our environment: it may say where packages come from.
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", wheel()], check=True)
    return interpreter


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a copy of the user's project, far from the source tree."""
    return Path(shutil.copytree(PROJECT, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__")))


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    with zipfile.ZipFile(wheel()) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "flask_rq_webhooks"
    files = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == files
    assert "flask_rq_webhooks/py.typed" in packed


def test_the_description_has_the_readme_without_its_pictures() -> None:
    with zipfile.ZipFile(wheel()) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert "What a client sends and receives" in text
    assert "docs/_static" not in text
    assert "docs/_static" in (ROOT / "README.rst").read_text()


def test_requirements_fit_together(python: Path, tmp_path: Path) -> None:
    done = run(python, "-m", "pip", "check", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_the_version_is_the_one_of_the_wheel(python: Path, tmp_path: Path) -> None:
    code = (
        "import flask_rq_webhooks, importlib.metadata as m; "
        "print(flask_rq_webhooks.__version__, m.version('flask-rq-webhooks'))"
    )
    done = run(python, "-c", code, cwd=tmp_path)
    of_wheel = wheel().name.split("-")[1]
    assert done.stdout.split() == [of_wheel, of_wheel], done.stderr
    # Semantic versioning, as PEP 440 writes it.
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", of_wheel)


def test_the_command_line_is_there(python: Path, project: Path) -> None:
    flask = python.parent / "flask"
    done = run(
        flask, "--app", "app", "rq-webhooks", "doctor", "--help", cwd=project, REDIS_URL="redis://127.0.0.1:1"
    )
    assert done.returncode == 0, done.stderr
    assert "rq-webhooks doctor" in done.stdout


def test_pages_and_static_files_are_there(python: Path, project: Path, redis_url: str) -> None:
    flask = python.parent / "flask"
    done = run(flask, "--app", "app", "rq-webhooks", "init-db", cwd=project, REDIS_URL=redis_url)
    assert done.returncode == 0, done.stderr
    done = run(python, "pages.py", cwd=project, REDIS_URL=redis_url)
    assert done.returncode == 0, done.stderr
    where, assets = done.stdout.splitlines()
    assert Path(where).is_relative_to(python.parents[1])
    assert "dashboard.css" in assets


def test_the_quickstart_in_an_empty_directory(python: Path, tmp_path: Path, redis_url: str) -> None:
    quickstart.follow(tmp_path, redis_url, python=str(python), python_path="")


def mypy(python: Path, project: Path, name: str) -> list[str]:
    """Return what the type checker says of one file of the project, with the installed package's types."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--no-error-summary",
         "--hide-error-context", "--no-pretty", "--config-file", "", "--cache-dir", project / "cache", name],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.splitlines()


def test_a_type_checker_accepts_correct_code(python: Path, project: Path) -> None:
    assert mypy(python, project, "app.py") == []


def test_a_type_checker_finds_mistakes(python: Path, project: Path) -> None:
    expected = {
        (str(number), code[1])
        for number, line in enumerate((project / "mistakes.py").read_text().splitlines(), 1)
        if (code := re.search(r"# mistake: (\S+)$", line))
    }
    found = [
        re.match(r"mistakes\.py:(\d+): error: .*\[(\S+)\]$", line)
        for line in mypy(python, project, "mistakes.py")
        if ": note: " not in line
    ]
    assert {(match[1], match[2]) for match in found if match} == expected
    assert all(found)
