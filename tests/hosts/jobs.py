"""Jobs of the host apps: what they return and how they enqueue others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import rq
from rq.job import get_current_job


def build(runid: str, **options: Any) -> dict[str, Any]:
    return {"runid": runid, "options": options}


def returns_tuple(runid: str) -> tuple[str, int, Path]:
    return runid, 3, Path("/data") / runid


def returns_path(runid: str) -> Path:
    return Path("/data") / runid


def returns_nothing(runid: str) -> None:
    """Return None."""


def returns_job(runid: str) -> rq.job.Job:
    """Enqueue another job and return it, as roots of trees do."""
    job = get_current_job()
    assert job is not None
    child = rq.Queue("default", connection=job.connection).enqueue(build, runid)
    job.meta["jobs:0,func:build"] = child.id
    job.save()
    return child


def fails(runid: str) -> None:
    raise RuntimeError(f"no rain over {runid}")


def pid() -> int:
    return os.getpid()
