"""The sdist, unpacked: all that is under version control, and the demo runs from it."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.servers import ROOT

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(900)]

#: What the demo's environment must not inherit from the one the tests run in.
OURS = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV")


def sdist() -> Path:
    """Return the one sdist ``make package`` left."""
    (found,) = (ROOT / "dist").glob("*.tar.gz")
    return found


def test_the_sdist_holds_what_is_under_version_control() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: nothing says what is under version control")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    with tarfile.open(sdist()) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(listed.stdout.splitlines()) - packed == set()


def test_nothing_built_is_in_the_sdist() -> None:
    with tarfile.open(sdist()) as archive:
        names = archive.getnames()
    built = ("/__pycache__", ".pyc", "/docs/_build", "/.venv", ".db", "/node_modules", "/.hypothesis")
    assert [name for name in names if any(part in name for part in built)] == []


def test_the_demo_runs_from_the_sdist(tmp_path: Path) -> None:
    # Not tarfile: how it wants to be asked differs between patch releases of Python 3.11.
    subprocess.run(["tar", "-xzf", sdist(), "-C", tmp_path], check=True)
    (tree,) = tmp_path.iterdir()
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        ["make", "demo"],
        cwd=tree, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "demo: 3 of 3 webhooks delivered and verified"
