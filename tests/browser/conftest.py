"""One browser for the run; what is missing skips tests, except where CI promises it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

if not os.environ.get("CI"):
    pytest.importorskip("selenium", reason="selenium is not installed")

from tests.browser.chromium import Missing, find_axe, find_chromium, open_chromium  # noqa: E402


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    try:
        find_chromium()
    except Missing as exc:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have a browser: {exc}")
        pytest.skip(str(exc))
    with open_chromium() as driver:
        yield driver


@pytest.fixture(scope="session")
def axe() -> str:
    """Give the source of axe-core; empty where npm cannot get it, which one test of its own says."""
    try:
        return find_axe()
    except Missing as exc:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have axe-core: {exc}")
        return ""
