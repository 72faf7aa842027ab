"""A run as a whole: create, look at, copy, pack, delete."""

import tasks
from auth import requires_token
from connections import TIMEOUT, redis_connection
from envelopes import error_factory, parse_request_payload, success_factory
from flask import Blueprint
from models import Run, db
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job

project_routes = Blueprint("project", __name__)


@project_routes.post("/runs/<runid>/<config>/create")
@requires_token
def create(runid, config):
    db.session.merge(Run(runid=runid, config=config, readonly=False))
    db.session.commit()
    return success_factory(runid=runid)


@project_routes.get("/runs/<runid>/<config>/")
@requires_token
def show(runid, config):
    run = db.session.get(Run, runid)
    return (
        error_factory("no such run") if run is None else success_factory(runid=run.runid, config=run.config)
    )


@project_routes.get("/rq/api/jobstatus/<job_id>")
@requires_token
def jobstatus(job_id):
    with redis_connection() as connection:
        try:
            job = Job.fetch(job_id, connection=connection)
        except NoSuchJobError:
            return error_factory("no such job")
        return success_factory(id=job.id, status=job.get_status(refresh=False))


@project_routes.post("/runs/<runid>/<config>/rq/api/archive")
@requires_token
def archive(runid, config):
    return _enqueue(tasks.archive_rq, runid, parse_request_payload().get("comment"))


@project_routes.post("/runs/<runid>/<config>/rq/api/fork")
@requires_token
def fork(runid, config):
    return _enqueue(tasks.fork_rq, runid, parse_request_payload().get("new_runid", f"{runid}-copy"))


@project_routes.post("/runs/<runid>/<config>/rq/api/export_dss")
@requires_token
def export_dss(runid, config):
    return _enqueue(tasks.export_dss_rq, runid)


@project_routes.post("/runs/<runid>/<config>/rq/api/delete")
@requires_token
def delete(runid, config):
    """Delete the run's row at once and its files later."""
    run = db.session.get(Run, runid)
    if run is None:
        return error_factory("no such run")
    db.session.delete(run)
    answer = _enqueue(tasks.delete_rq, runid)
    db.session.commit()
    return answer


def _enqueue(function, *args):
    with redis_connection() as connection:
        job = Queue("default", connection=connection).enqueue_call(function, args, timeout=TIMEOUT)
    return success_factory(job_id=job.id)
