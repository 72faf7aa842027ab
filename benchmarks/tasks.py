"""Jobs that do nothing. Light to import: forking workers import it in every job."""

from __future__ import annotations

import time
from typing import Any


def nothing(*_args: Any, **_kwargs: Any) -> dict[str, Any]:
    """Do nothing, and say when."""
    return {"ended": time.time()}
