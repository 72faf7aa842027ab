"""The Celery app: Redis broker, no results."""

from __future__ import annotations

import os

import celery

app = celery.Celery("bench", broker=os.environ["BENCH_REDIS_URL"])
app.conf.update(
    task_ignore_result=True, broker_connection_retry_on_startup=True, worker_prefetch_multiplier=4
)
app.autodiscover_tasks(["django_webhook"])
