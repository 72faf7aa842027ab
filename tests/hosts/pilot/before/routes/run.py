"""Running the model, one run or many."""

import tasks
from auth import requires_token
from connections import TIMEOUT, redis_connection
from envelopes import exception_factory, parse_request_payload, success_factory
from flask import Blueprint, request
from rq import Queue

run_routes = Blueprint("run", __name__)


@run_routes.post("/runs/<runid>/<config>/rq/api/run_wepp")
@requires_token
def run_wepp(runid, config):
    try:
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.run_wepp_rq, (runid,), timeout=TIMEOUT)
    except Exception:
        return exception_factory("run_wepp failed")
    return success_factory(job_id=job.id)


@run_routes.post("/runs/<runid>/<config>/rq/api/run_ash")
@requires_token
def run_ash(runid, config):
    try:
        payload = parse_request_payload()
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.run_ash_rq, (runid, payload.get("fire_date")), timeout=TIMEOUT)
    except Exception:
        return exception_factory("run_ash failed")
    return success_factory(job_id=job.id)


@run_routes.post("/runs/<runid>/<config>/rq/api/run_omni")
@requires_token
def run_omni(runid, config):
    try:
        scenarios = request.get_json()["scenarios"]
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.run_omni_rq, (runid, scenarios), timeout=TIMEOUT)
    except Exception:
        return exception_factory("run_omni failed")
    return success_factory(job_id=job.id)


@run_routes.post("/rq/api/run_batch")
@requires_token
def run_batch():
    """Take a bare JSON list of runs."""
    job_ids = []
    with redis_connection() as connection:
        q = Queue("default", connection=connection)
        for runid in request.get_json():
            job_ids.append(q.enqueue_call(tasks.run_batch_rq, (runid,), timeout=TIMEOUT).id)
    return success_factory(job_ids=job_ids)
