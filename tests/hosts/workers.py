"""Workers of the host apps: subclasses that write to the job while it runs."""

from __future__ import annotations

from typing import Any

import rq
from rq.job import Job


class SavingMixin:
    """Save the whole job before it is performed, and stale meta over it whenever it has ended.

    Arguments differ between the versions of RQ and are passed through.
    """

    def perform_job(self, job: Job, *args: Any, **kwargs: Any) -> bool:
        stale = Job.fetch(job.id, connection=job.connection)
        job.meta["worker"] = "saving"
        job.save()
        performed: bool = super().perform_job(job, *args, **kwargs)  # type: ignore[misc]
        stale.meta = {"worker": "saving", "overwritten": True}
        stale.save_meta()
        return performed

    def handle_job_success(self, job: Job, *args: Any, **kwargs: Any) -> None:
        job.meta["succeeded"] = True
        job.save()
        super().handle_job_success(job, *args, **kwargs)  # type: ignore[misc]

    def handle_job_failure(self, job: Job, *args: Any, **kwargs: Any) -> None:
        job.meta["failed"] = True
        job.save()
        super().handle_job_failure(job, *args, **kwargs)  # type: ignore[misc]


class SavingWorker(SavingMixin, rq.Worker):
    """Forks a work-horse per job."""


class SavingSimpleWorker(SavingMixin, rq.SimpleWorker):
    """Performs jobs itself."""
