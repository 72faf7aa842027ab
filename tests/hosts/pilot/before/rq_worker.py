"""The service's workers: ``rq worker --worker-class rq_worker.WatershedWorker``."""

import socket

from rq import Worker


class WatershedWorker(Worker):
    """Write to the job where it runs and what became of it, and tell a status channel."""

    def perform_job(self, job, *args, **kwargs):
        job.meta["host"] = socket.gethostname()
        job.save()
        performed = super().perform_job(job, *args, **kwargs)
        self.connection.publish(
            "watershed:status", f"rq:{job.id} {'COMPLETED' if performed else 'EXCEPTION'}"
        )
        return performed

    def handle_job_failure(self, job, *args, **kwargs):
        job.meta["failed"] = True
        job.save()
        super().handle_job_failure(job, *args, **kwargs)
