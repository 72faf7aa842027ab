"""Job functions that end in every way RQ knows, and the plain callbacks people write today."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any
from urllib.request import Request, urlopen

from rq import Retry
from rq.job import get_current_job

from tests.acceptance.tasks import return_deadly_result as return_deadly_result


def succeed(value: Any = 42) -> Any:
    return value


def fail(message: str = "no rain data") -> None:
    raise ValueError(message)


def run_for(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


def ignore_everything(seconds: float) -> str:
    """Go on, whatever is raised in here; only SIGKILL ends it early."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(BaseException):
            time.sleep(seconds)
    return "done"


def leave_system() -> None:
    sys.exit(3)


def return_retry() -> Retry:
    return Retry(max=1)


def kill_own_work_horse() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_at_once(code: int) -> None:
    os._exit(code)


def fail_first() -> str:
    """Fail in the first run and succeed in later ones."""
    job = get_current_job()
    assert job is not None
    if job.connection.incr(f"runs:{job.id}") == 1:
        raise ValueError("the first time")
    return "the second time"


# -- a user's own callbacks -------------------------------------------------------------------------------


def raise_on_success(job: Any, connection: Any, result: Any) -> None:
    raise LookupError("the user's own on_success")


def _post(job: Any, connection: Any, word: str) -> None:
    """Tell the receiver as a plain callback does; it is handed the address through Redis."""
    url = connection.get("plain-receiver").decode()
    body = json.dumps({"job_id": job.id, "word": word}).encode()
    with urlopen(Request(url, data=body, headers={"Content-Type": "application/json"}), timeout=5):
        return


def post_success(job: Any, connection: Any, result: Any) -> None:
    _post(job, connection, "success")


def post_failure(job: Any, connection: Any, *exc_info: Any) -> None:
    _post(job, connection, "failure")


def post_stopped(job: Any, connection: Any) -> None:
    _post(job, connection, "stopped")
