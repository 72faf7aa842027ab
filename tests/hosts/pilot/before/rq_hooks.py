"""Two things the service does whenever a job is enqueued, from wherever."""

import functools
import logging

from auth import actor
from flask import has_request_context
from rq import Queue

logger = logging.getLogger(__name__)


def install_hooks():
    if getattr(Queue, "_watershed_hooks", False):
        return
    Queue.enqueue_call = _audited(Queue.enqueue_call)
    Queue.enqueue = _with_actor(Queue.enqueue)
    Queue.enqueue_call = _with_actor(Queue.enqueue_call)
    Queue._watershed_hooks = True


def _with_actor(original):
    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        job = original(self, *args, **kwargs)
        if has_request_context():
            job.meta["auth_actor"] = actor()
            job.save_meta()
        return job

    return wrapper


def _audited(original):
    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        job = original(self, *args, **kwargs)
        self.connection.lpush("watershed:enqueued", job.func_name)
        logger.info("enqueued %s as %s", job.func_name, job.id)
        return job

    return wrapper
