"""Abandoned jobs: their RQ status is ``started``, but their worker is gone (``CLEAN_ABANDONED``).

Decides when RQ cleans its registry. RQ decides how the jobs end and which callbacks run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from redis import Redis
from rq.registry import StartedJobRegistry
from rq.serializers import DefaultSerializer, JSONSerializer

from ..protocol.events import CLOCK_SKEW
from .job_reader import job_key
from .outbox import server_time
from .safe_pickle import inflated

logger = logging.getLogger(__name__)


def end_abandoned(redis: Redis, queues: Iterable[str]) -> int:
    """Let RQ end the jobs of *queues* whose worker is gone; it runs their failure callbacks in this process.

    :returns: how many queues with such jobs were cleaned.
    """
    if threading.current_thread() is not threading.main_thread():
        # In other threads RQ before 3.0 raises, and 3.0 never runs the callback.
        logger.warning("Abandoned jobs are cleaned in the main thread only; this pass leaves them.")
        return 0
    cleaned = 0
    for queue in sorted(queues):
        serializer = DefaultSerializer if _uses_pickle(redis, queue) else JSONSerializer
        registry = StartedJobRegistry(queue, connection=redis, serializer=serializer)
        if not registry.get_expired_job_ids():
            continue
        try:
            registry.cleanup()
        except Exception:
            # A host's own failure callback may raise anything; RQ before 3.0 does not catch it.
            logger.exception("Cleaning the registry of started jobs of the queue %r failed.", queue)
        else:
            cleaned += 1
    return cleaned


def expired_jobs(redis: Redis, queue: str) -> set[str]:
    """Return the started jobs of *queue* whose worker sends no heartbeat and that RQ has not cleaned yet."""
    key = StartedJobRegistry(queue, connection=redis).key
    # Workers write these times according to their own clocks.
    until = (server_time(redis) - CLOCK_SKEW).timestamp()
    expired = _job_ids(redis.zrangebyscore(key, "-inf", until))
    return expired - _job_ids(redis.zrangebyscore(key, f"({until}", "+inf")) if expired else expired


def _job_ids(entries: Any) -> set[str]:
    """Return the job ids in *entries*: these are ``<job id>``, since RQ 2 ``<job id>:<execution id>``."""
    texts = [entry.decode("utf-8", "replace") if isinstance(entry, bytes) else entry for entry in entries]
    return {id_ for text in texts for id_ in (text, text.rpartition(":")[0]) if id_}


def _uses_pickle(redis: Redis, queue: str) -> bool:
    """Return whether the started jobs of *queue* were written by RQ's default serializer.

    Checks one of them; ``True`` if there is none to check.
    """
    for job_id in _job_ids(redis.zrange(StartedJobRegistry(queue, connection=redis).key, 0, 0)):
        data: Any = redis.execute_command("HGET", job_key(job_id), "data", NEVER_DECODE=True)  # type: ignore[no-untyped-call]
        if data:
            return inflated(data, 1) in (b"\x80", b"")
    return True
