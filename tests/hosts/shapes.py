"""Five hosts, cut down to their shape: how each builds its app, its views, its queue and its pages.

Each function takes the settings a deployment has, and returns the app and a request that enqueues
``tests.hosts.jobs.build`` for a run called ``basin-7``. What flask_rq_webhooks needs is marked with ``# +``;
it is what the documentation says, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import redis
import rq
from flask import Blueprint, Flask, current_app, g, jsonify, request
from flask.views import MethodView
from flask_classful import FlaskView, route
from flask_sqlalchemy import SQLAlchemy
from jinja2 import BaseLoader, ChoiceLoader, DictLoader, Environment
from rq.job import Job
from webargs import fields
from webargs.flaskparser import use_kwargs

from flask_rq_webhooks import RQWebhooks
from tests.hosts import jobs

Settings = Mapping[str, Any]
#: The app, and (path, JSON body) of the request that enqueues.
Shape = tuple[Flask, tuple[str, dict[str, Any]]]


def tutorial(settings: Settings) -> Shape:
    """A factory, extensions at module level, the queue on the app: ``app.task_queue``."""
    db = SQLAlchemy()
    webhooks = RQWebhooks(db=db, instrument_rq=True)  # +
    blueprint = Blueprint("main", __name__)

    @blueprint.post("/export_posts")
    @webhooks.accepts_webhook  # +
    def export_posts() -> Any:
        job = current_app.task_queue.enqueue(jobs.build, "basin-7")  # type: ignore[attr-defined]
        return {"task": job.id}, 202

    def create_app() -> Flask:
        app = Flask("tutorial")
        app.config.from_mapping(settings)
        db.init_app(app)
        webhooks.init_app(app)  # +
        app.redis = redis.Redis.from_url(app.config["REDIS_URL"])  # type: ignore[attr-defined]
        app.task_queue = rq.Queue("default", connection=app.redis)  # type: ignore[attr-defined]
        app.register_blueprint(blueprint)
        return app

    return create_app(), ("/export_posts", {})


def production_api(settings: Settings) -> Shape:
    """A large API of MethodViews behind authentication, with an error shape of its own."""
    app = Flask("production_api")
    app.config.from_mapping(settings)
    db = SQLAlchemy(app)
    webhooks = RQWebhooks(app, db=db, instrument_rq=True)  # +
    queue = rq.Queue("default", connection=redis.Redis.from_url(app.config["REDIS_URL"]))

    def authenticated(view: Callable[..., Any]) -> Callable[..., Any]:
        def check(*args: Any, **kwargs: Any) -> Any:
            g.user = request.headers.get("X-User", "someone")
            return view(*args, **kwargs)

        return check

    class Resource(MethodView):
        decorators = [authenticated]

    class Simulations(Resource):
        def get(self, runid: str) -> Any:
            return jsonify(runid=runid)

        @webhooks.accepts_webhook(jobs=[jobs.build])  # +
        def post(self, runid: str) -> Any:
            queue.enqueue(jobs.returns_nothing, "a mail to the administrators")
            job = queue.enqueue_call(jobs.build, (runid,), timeout=3600)
            return jsonify(Success=True, job_id=job.id), 201

    app.add_url_rule("/api/runs/<runid>/simulations", view_func=Simulations.as_view("simulations"))

    @webhooks.error_envelope  # +
    def envelope(code: str, message: str, details: dict[str, list[str]], status: int) -> Any:
        return jsonify(Success=False, Error=message, details=details)

    return app, ("/api/runs/basin-7/simulations", {"wet": True})


def classful_webargs(settings: Settings) -> Shape:
    """Flask-Classful views whose bodies go through webargs, which refuses unknown fields."""
    app = Flask("classful")
    app.config.from_mapping(settings)
    db = SQLAlchemy(app)
    webhooks = RQWebhooks(app, db=db, instrument_rq=True)  # +
    queue = rq.Queue("default", connection=redis.Redis.from_url(app.config["REDIS_URL"]))

    class SensorView(FlaskView):  # type: ignore[misc]
        route_base = "/sensors"

        @route("/<runid>/schedules/trigger", methods=["POST"])  # type: ignore[untyped-decorator]
        @webhooks.accepts_webhook  # +
        @use_kwargs({"start": fields.Str(required=True), "hours": fields.Int()}, location="json")
        def trigger(self, runid: str, start: str, hours: int = 24) -> Any:
            job = queue.enqueue(jobs.build, runid, start=start, hours=hours)
            return {"status": "PROCESSED", "schedule": job.id}

    SensorView.register(app)
    return app, ("/sensors/basin-7/schedules/trigger", {"start": "2024-01-01", "hours": 6})


class QueryJobs:
    """A BI tool's job layer: it makes jobs by itself, deduplicates them, and hides RQ from its callers."""

    def __init__(self, connection: redis.Redis, webhooks: RQWebhooks) -> None:
        self._connection = connection
        self._webhooks = webhooks

    def submit(self, query: str, runid: str) -> Job:
        key = f"query_hash_job:{query}"
        known = self._connection.get(key)
        if known is not None:
            job = Job.fetch(known.decode(), connection=self._connection)
        else:
            job = Job.create(
                jobs.build, (query,), connection=self._connection, origin="default", meta={"runid": runid}
            )
            rq.Queue("default", connection=self._connection).enqueue_job(job)
            self._connection.set(key, job.id)
        self._webhooks.watch(job)  # +
        return job


def bi_job_layer(settings: Settings) -> Shape:
    app = Flask("bi")
    app.config.from_mapping(settings)
    db = SQLAlchemy(app)
    webhooks = RQWebhooks(app, db=db)  # +
    manager = QueryJobs(redis.Redis.from_url(app.config["REDIS_URL"]), webhooks)

    @app.post("/api/query_results")
    @webhooks.accepts_webhook  # +
    def run_query() -> Any:
        job = manager.submit(request.get_json()["query"], "basin-7")
        return {"job": {"id": job.id, "status": 1}}

    return app, ("/api/query_results", {"query": "SELECT count(*) FROM events"})


class BlindLoader(BaseLoader):
    """Finds the portal's own templates only, whichever blueprint asks."""

    def __init__(self, templates: dict[str, str]) -> None:
        self._own = DictLoader(templates)

    def get_source(self, environment: Environment, template: str) -> Any:
        return self._own.get_source(environment, template)


LAYOUT = """<!doctype html><html><head><title>{% block title %}Portal{% endblock %}</title>
{% block head %}{% endblock %}</head><body><nav>PORTAL</nav>{% block content %}{% endblock %}</body></html>"""


def data_portal(settings: Settings) -> Shape:
    """A portal with a layout of its own, and an environment whose loader asks no blueprint."""

    class Portal(Flask):
        def create_global_jinja_loader(self) -> Any:
            return BlindLoader({"portal/base.html": LAYOUT})

    app = Portal("portal")
    app.config.from_mapping(settings, RQ_WEBHOOKS_BASE_TEMPLATE="portal/base.html")  # +
    db = SQLAlchemy(app)
    webhooks = RQWebhooks(app, db=db, instrument_rq=True)  # +
    webhooks.authorize(lambda permission, **what: True)  # +
    # A loader that does not know blueprints is given ours beside its own.
    ours = app.blueprints["rq_webhooks"].jinja_loader  # +
    app.jinja_env.loader = ChoiceLoader([app.jinja_env.loader, ours])  # type: ignore[list-item]  # +

    @app.post("/api/3/action/xloader_submit")
    @webhooks.accepts_webhook  # +
    def xloader_submit() -> Any:
        queue = rq.Queue("default", connection=redis.Redis.from_url(app.config["REDIS_URL"]))
        job = queue.enqueue(jobs.build, "basin-7")
        return {"success": True, "result": {"task_id": job.id}}

    return app, ("/api/3/action/xloader_submit", {"resource_id": "r"})


SHAPES: dict[str, Callable[[Settings], Shape]] = {
    "factory tutorial": tutorial,
    "production API": production_api,
    "Flask-Classful and webargs": classful_webargs,
    "BI job layer": bi_job_layer,
    "data portal": data_portal,
}
