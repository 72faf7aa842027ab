"""The host app in view: everything that a grown Flask app has around a line that enqueues.

A module-global app with its own ``register_extension``, hooks around ``enqueue`` and ``enqueue_call`` that
save the job's meta, blueprints whose error handlers log and raise again, errors as HTTP 200, a global CSRF
check, a prefix behind a proxy, payloads whose leftovers become keyword arguments of jobs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
import rq
from flask import Blueprint, Flask, jsonify, request
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from flask_wtf import CSRFProtect
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_rq_webhooks import RQWebhooks
from tests.hosts import jobs

logger = logging.getLogger(__name__)

SITE_PREFIX = "/weppcloud"
TIMEOUT = 216_000


class Host(Flask):
    def register_extension(self, extension: Any) -> None:
        extension.init_app(self)


class LoggedBlueprint(Blueprint):
    """Log whatever a view raises, and raise it again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_error_handler(Exception, self.log_and_raise)

    def log_and_raise(self, exc: Exception) -> ResponseReturnValue:
        logger.error("%s failed: %r", request.path, exc)
        raise exc


def parse_request_payload() -> dict[str, Any]:
    """Read a JSON object, else the form; trim texts and collapse lists of one."""
    payload = request.get_json(silent=True)
    if not isinstance(payload, dict):
        payload = request.form.to_dict(flat=False)
    cleaned = {}
    for key, value in payload.items():
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        cleaned[key] = value.strip() if isinstance(value, str) else value
    return cleaned


def error_factory(message: str) -> ResponseReturnValue:
    return jsonify({"Success": False, "Error": message})


@contextmanager
def enqueue_hooks() -> Iterator[None]:
    """Wrap ``enqueue`` and ``enqueue_call`` of every queue, twice, as two parts of the host do."""

    def saving(name: str, value: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(self: rq.Queue, *args: Any, **kwargs: Any) -> Any:
            job = original(self, *args, **kwargs)
            job.meta[name] = value
            job.save_meta()
            return job

        return wrapper

    originals = rq.Queue.enqueue, rq.Queue.enqueue_call
    for name, value in (("auth_actor", "user:7"), ("audit", "yes")):
        rq.Queue.enqueue = saving(name, value, rq.Queue.enqueue)  # type: ignore[method-assign]
        rq.Queue.enqueue_call = saving(name, value, rq.Queue.enqueue_call)  # type: ignore[method-assign]
    try:
        yield
    finally:
        rq.Queue.enqueue, rq.Queue.enqueue_call = originals  # type: ignore[method-assign]


def create_host(database_url: str, redis_url: str, **config: Any) -> tuple[Flask, RQWebhooks]:
    """Build the app; the real one does this at import."""
    app = Host("watershed")
    app.config.update(
        SECRET_KEY="tests",
        SQLALCHEMY_DATABASE_URI=database_url,
        RQ_WEBHOOKS_REDIS_URL=redis_url,
        SITE_PREFIX=SITE_PREFIX,
        **config,
    )
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1, x_prefix=1)  # type: ignore[method-assign]
    db = SQLAlchemy(app)
    csrf = CSRFProtect(app)
    webhooks = RQWebhooks(db=db, instrument_rq=True)
    app.register_extension(webhooks)

    @webhooks.authorize
    def may(permission: str, **what: Any) -> bool:
        return True

    @webhooks.error_envelope
    def envelope(code: str, message: str, details: dict[str, Any], status: int) -> Any:
        return {"Success": False, "Error": message, "Code": code, "Details": details}

    @contextmanager
    def queue() -> Iterator[rq.Queue]:
        with redis.Redis.from_url(redis_url) as connection:
            yield rq.Queue("default", connection=connection)

    routes = LoggedBlueprint("rq_api", __name__)

    @routes.post("/runs/<runid>/<config>/rq/api/build_landuse")
    @csrf.exempt
    @webhooks.accepts_webhook
    def build_landuse(runid: str, config: str) -> Any:
        """Pass leftovers of the payload on to the job."""
        options = parse_request_payload()
        try:
            with queue() as q:
                job = q.enqueue_call(jobs.build, (runid,), options, timeout=TIMEOUT)
        except Exception as exc:
            return error_factory(f"enqueue failed: {exc}")
        return {"Success": True, "job_id": job.id}

    @routes.post("/runs/<runid>/<config>/rq/api/call/<name>")
    @csrf.exempt
    @webhooks.accepts_webhook
    def call(runid: str, config: str, name: str) -> Any:
        with queue() as q:
            job = q.enqueue(getattr(jobs, name), runid, job_timeout=TIMEOUT)
        return jsonify(Success=True, job_id=job.id), 202

    @routes.post("/runs/<runid>/<config>/rq/api/async/<name>")
    @csrf.exempt
    @webhooks.accepts_webhook
    async def call_async(runid: str, config: str, name: str) -> Any:
        with queue() as q:
            job = q.enqueue(getattr(jobs, name), runid)
        return {"Success": True, "job_id": job.id}

    @routes.post("/rq/api/batch")
    @csrf.exempt
    @webhooks.accepts_webhook
    def batch() -> Any:
        """Take a bare JSON list of runs."""
        ids = []
        with queue() as q:
            for runid in request.get_json():
                ids.append(q.enqueue_call(jobs.build, (runid,)).id)
        return jsonify(job_ids=ids)

    @routes.post("/runs/<runid>/<config>/rq/api/upload")
    @csrf.exempt
    @webhooks.accepts_webhook
    def upload(runid: str, config: str) -> Any:
        size = len(request.files["dem"].read())
        with queue() as q:
            job = q.enqueue_call(jobs.build, (runid,), {"size": size, **parse_request_payload()})
        return {"Success": True, "job_id": job.id}

    @routes.post("/runs/<runid>/<config>/rq/api/broken")
    @csrf.exempt
    @webhooks.accepts_webhook
    def broken(runid: str, config: str) -> Any:
        with queue() as q:
            q.enqueue(jobs.build, runid)
        raise LookupError(f"{runid} has no watershed")

    @routes.post("/runs/<runid>/<config>/rq/api/form")
    @webhooks.accepts_webhook
    def form(runid: str, config: str) -> Any:
        """Come from the host's own page, with its CSRF token."""
        with queue() as q:
            job = q.enqueue_call(
                jobs.build, (runid,), {k: v for k, v in request.form.items() if k != "csrf_token"}
            )
        return {"Success": True, "job_id": job.id}

    @app.get("/token")
    def token() -> str:
        from flask_wtf.csrf import generate_csrf

        return str(generate_csrf())

    app.register_blueprint(routes)
    return app, webhooks
