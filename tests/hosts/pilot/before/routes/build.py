"""Building a run: one route per step."""

import tasks
from auth import requires_token
from connections import TIMEOUT, redis_connection
from envelopes import error_factory, exception_factory, parse_request_payload, success_factory
from flask import Blueprint
from rq import Queue

build_routes = Blueprint("build", __name__, url_prefix="/runs/<runid>/<config>/rq/api")


@build_routes.post("/fetch_dem")
@requires_token
def fetch_dem(runid, config):
    try:
        payload = parse_request_payload()
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.fetch_dem_rq, (runid, payload.get("extent")), timeout=TIMEOUT)
    except Exception:
        return exception_factory("fetch_dem failed")
    return success_factory(job_id=job.id)


@build_routes.post("/build_channels")
@requires_token
def build_channels(runid, config):
    try:
        payload = parse_request_payload()
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.build_channels_rq, (runid,), payload, timeout=TIMEOUT)
    except Exception:
        return exception_factory("build_channels failed")
    return success_factory(job_id=job.id)


@build_routes.post("/set_outlet")
@requires_token
def set_outlet(runid, config):
    payload = parse_request_payload()
    try:
        lng, lat = float(payload["lng"]), float(payload["lat"])
    except (KeyError, ValueError):
        return error_factory("lng and lat must be numbers")
    with redis_connection() as connection:
        job = Queue("default", connection=connection).enqueue(tasks.set_outlet_rq, runid, lng, lat)
    return success_factory(job_id=job.id)


@build_routes.post("/build_subcatchments")
@requires_token
def build_subcatchments(runid, config):
    try:
        payload = parse_request_payload()
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.build_subcatchments_rq, (runid,), payload, timeout=TIMEOUT)
    except Exception:
        return exception_factory("build_subcatchments failed")
    return success_factory(job_id=job.id)


@build_routes.post("/build_landuse")
@requires_token
def build_landuse(runid, config):
    try:
        payload = parse_request_payload()
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.build_landuse_rq, (runid,), payload, timeout=TIMEOUT)
    except Exception:
        return exception_factory("build_landuse failed")
    return success_factory(job_id=job.id)


@build_routes.post("/build_soils")
@requires_token
def build_soils(runid, config):
    try:
        payload = parse_request_payload()
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.build_soils_rq, (runid,), payload, timeout=TIMEOUT)
    except Exception:
        return exception_factory("build_soils failed")
    return success_factory(job_id=job.id)


@build_routes.post("/build_climate")
@requires_token
def build_climate(runid, config):
    try:
        payload = parse_request_payload()
        with redis_connection() as connection:
            q = Queue("default", connection=connection)
            job = q.enqueue_call(tasks.build_climate_rq, (runid,), payload, timeout=TIMEOUT)
    except Exception:
        return exception_factory("build_climate failed")
    return success_factory(job_id=job.id)
