"""Views written in the many ways there are, most of which enqueue and some of which look as if they did."""

from __future__ import annotations

import functools
from typing import Any

from flask import Blueprint, Flask, current_app, request
from flask.views import MethodView, View

from flask_rq_webhooks import Queue as OurQueue
from flask_rq_webhooks import RQWebhooks
from tests.hosts import enqueueing, jobs
from tests.hosts.enqueueing import Runner, careless, enqueue_build, get_queue, logged, mailer, open_queue

webhooks = RQWebhooks()
queue = get_queue()


class Builds(MethodView):
    """GET reads, POST enqueues through a method of its own."""

    def get(self, runid: str) -> Any:
        return {"runid": runid}

    def post(self, runid: str) -> Any:
        return {"job_id": self.start(runid).id}

    def start(self, runid: str) -> Any:
        return get_queue().enqueue(jobs.build, runid)


class DecoratedBuilds(Builds):
    """Decorated as a whole."""

    decorators = [webhooks.accepts_webhook]


class HalfDecorated(Builds):
    """Decorated where it enqueues; the other method does so, too, undecorated."""

    @webhooks.accepts_webhook
    def post(self, runid: str) -> Any:
        return super().post(runid)

    def put(self, runid: str) -> Any:
        return {"job_id": self.start(runid).id}


class Classic(View):
    """A plain class-based view."""

    methods = ["POST"]

    def dispatch_request(self, runid: str) -> Any:
        return {"job_id": get_queue().enqueue(jobs.build, runid).id}


def create_app() -> Flask:
    """Build an app of every shape; the names of the views say what is expected of them."""
    app = Flask(__name__)
    api = Blueprint("api", __name__, url_prefix="/api")

    # -- what enqueues, plainly -------------------------------------------------------------------------

    @app.post("/missing/direct/<runid>")
    def missing_direct(runid: str) -> Any:
        q = OurQueue("default", connection=enqueueing.connection)
        return {"job_id": q.enqueue_call(jobs.build, (runid,)).id}

    @app.post("/missing/global/<runid>")
    def missing_global_queue(runid: str) -> Any:
        return {"job_id": queue.enqueue(jobs.build, runid).id}

    @app.post("/missing/context/<runid>")
    def missing_context(runid: str) -> Any:
        with open_queue() as q:
            return {"job_id": q.enqueue(jobs.build, runid).id}

    @app.post("/missing/imported/<runid>")
    def missing_imported_wrapper(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @app.post("/missing/module/<runid>")
    def missing_through_module(runid: str) -> Any:
        return {"job_id": enqueueing.enqueue_build(runid).id}

    @app.post("/missing/local-import/<runid>")
    def missing_local_import(runid: str) -> Any:
        from tests.hosts.enqueueing import enqueue_build as push

        return {"job_id": push(runid).id}

    @app.post("/missing/nested/<runid>")
    def missing_nested_helper(runid: str) -> Any:
        def go() -> Any:
            return enqueue_build(runid)

        return {"job_id": go().id}

    @app.post("/missing/partial-of/<runid>")
    def missing_partial_inside(runid: str) -> Any:
        push = functools.partial(enqueue_build, runid)
        return {"job_id": push().id}

    @app.post("/missing/async/<runid>")
    async def missing_async(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @app.post("/missing/delay/<runid>")
    def missing_delay(runid: str) -> Any:
        return {"job_id": enqueueing.delayed.delay(runid).id}

    @app.post("/missing/object/<runid>")
    def missing_object(runid: str) -> Any:
        runner = Runner(runid)
        return {"job_id": runner.start().id}

    @app.post("/missing/by-hand/<runid>")
    def missing_made_by_hand(runid: str) -> Any:
        return {"job_id": enqueueing.enqueue_job_made_by_hand(runid).id}

    app.add_url_rule(
        "/missing/lambda/<runid>",
        "missing_lambda",
        lambda runid: {"job_id": get_queue().enqueue(jobs.build, runid).id},
        methods=["POST"],
    )
    app.add_url_rule(
        "/missing/partial/<runid>",
        "missing_partial",
        functools.partial(_shared, "a note"),
        methods=["POST"],
    )
    app.add_url_rule("/missing/class/<runid>", view_func=Classic.as_view("missing_class"))
    app.add_url_rule("/missing/method-view/<runid>", view_func=Builds.as_view("missing_method_view"))
    app.add_url_rule("/half/<runid>", view_func=HalfDecorated.as_view("half_decorated"))

    @app.post("/missing/logged/<runid>")
    @logged
    def missing_logged(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @app.post("/missing/careless/<runid>")
    @careless
    def missing_careless(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @api.post("/<runid>")
    def missing_in_blueprint(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    # -- what looks like it -----------------------------------------------------------------------------

    @app.post("/may/current-app/<runid>")
    def may_current_app(runid: str) -> Any:
        return {"job_id": current_app.task_queue.enqueue(jobs.build, runid).id}  # type: ignore[attr-defined]

    @app.post("/may/untyped/<runid>")
    def may_untyped(runid: str) -> Any:
        q = enqueueing.untyped_queue()
        return {"job_id": q.enqueue(jobs.build, runid).id}

    @app.post("/may/mentioned/<runid>")
    def may_mentioned(runid: str) -> Any:
        return {"job_id": _call(enqueue_build, runid).id}

    # -- what has a webhook -----------------------------------------------------------------------------

    @app.post("/decorated/<runid>")
    @webhooks.accepts_webhook
    def decorated(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @app.post("/decorated/options/<runid>")
    @logged
    @webhooks.accepts_webhook(events=["job.success"])
    def decorated_below_another(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @app.post("/decorated/careless/<runid>")
    @careless
    @webhooks.accepts_webhook
    def decorated_below_careless(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @app.post("/decorated/async/<runid>")
    @webhooks.accepts_webhook
    async def decorated_async(runid: str) -> Any:
        return {"job_id": enqueue_build(runid).id}

    @app.post("/decorated/calls/<runid>")
    def decorated_view_called(runid: str) -> Any:
        return decorated(runid)

    app.add_url_rule(
        "/decorated/method-view/<runid>", view_func=DecoratedBuilds.as_view("decorated_method_view")
    )

    @app.post("/helper/<runid>")
    def helper(runid: str) -> Any:
        job = webhooks.enqueue_with_webhook(get_queue(), jobs.build, (runid,), payload=request.get_json())
        return {"job_id": job.id}

    # -- what enqueues nothing --------------------------------------------------------------------------

    @app.get("/none/<runid>")
    def none_reads(runid: str) -> Any:
        return {"runid": runid}

    @app.post("/none/mail/<runid>")
    def none_mail(runid: str) -> Any:
        return {"mailed": mailer.enqueue(runid)}

    @app.get("/none/describe/<runid>")
    def none_describe(runid: str) -> Any:
        return {"runid": Runner(runid).describe() if runid == "never" else runid}

    @app.get("/none/recursive/<int:number>")
    def none_recursive(number: int) -> Any:
        return {"number": _down(number)}

    # -- what cannot be seen, as the documentation says ---------------------------------------------------

    @app.post("/unseen/<runid>")
    def unseen_object(runid: str) -> Any:
        return {"job_id": Runner.for_run(runid).start().id}

    app.register_blueprint(api)
    return app


def _shared(note: str, runid: str) -> Any:
    return {"job_id": enqueue_build(runid, description=note).id}


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def _down(number: int) -> int:
    return 0 if number == 0 else _down(number - 1)
