"""The quickstart works from the source tree; ``tests/packaging`` follows it in an empty environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import quickstart
from tests.servers import ROOT


@pytest.mark.slow
def test_quickstart(tmp_path: Path, redis_url: str) -> None:
    quickstart.follow(tmp_path, redis_url, python_path=str(ROOT))
