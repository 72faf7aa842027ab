"""The host app: a watershed-modelling service.

It is written as many Flask apps are: a module-level ``app`` that registers extensions through a method of
its own, Flask-SQLAlchemy for its runs, a Redis connection per request, plain ``rq.Queue`` objects. Webhooks
add three things: the extension object, one decorator on each route that enqueues, and a function that says
who may see what. One more function names the customer who calls: each has endpoints of its own.

Settings come from the environment:

===========================  ==============================================================================
``REDIS_URL``                default ``redis://localhost:6379/0``
``EXAMPLE_DATABASE_URI``     default ``sqlite:///watershed.db`` in the instance folder
``EXAMPLE_RUNS_DIR``         directory with one directory per run; default ``instance/runs``
``EXAMPLE_TOKEN``            the operators' token: a bearer token, and the password of ``/login``; without it
                             nobody is an operator
``EXAMPLE_CUSTOMERS``        the customers' API keys, ``name=key`` separated by spaces: each is a bearer
                             token, and a password of ``/login``, which leads to the customer's portal
``EXAMPLE_RECEIVER_URL``     receiver of the page at ``/``; ``make demo`` sets it
``EXAMPLE_RECEIVER_SECRET``  the secret that receiver verifies with
``ALLOW_HTTP``               ``1`` lets webhooks go to ``http://`` receivers on this machine
``SECRET_KEY``               encrypts webhook secrets at rest; the same in every process
===========================  ==============================================================================
"""

from __future__ import annotations

import hmac
import os
import secrets
from datetime import UTC, datetime
from typing import Any, Protocol, cast

from flask import Flask, abort, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from flask_rq_webhooks import RQWebhooks

from . import home, jobs


class Extension(Protocol):
    """Any Flask extension."""

    def init_app(self, app: Flask, /) -> None:
        """Initialise *app*."""


class WatershedApp(Flask):
    """A Flask app that registers extensions the way it registers blueprints."""

    def register_extension(self, extension: Extension) -> None:
        """Initialise *extension* for this app."""
        extension.init_app(self)


class Base(DeclarativeBase):
    """Base of this app's own tables."""


db = SQLAlchemy(model_class=Base)
# `instrument_rq` attaches webhooks to the plain `rq.Queue` of existing code inside decorated views.
# `redis` is the Redis of the queues; a lambda, because tests replace `jobs.connect`.
webhooks = RQWebhooks(db=db, redis=lambda: jobs.connect(), instrument_rq=True)


class Run(Base):
    """One modelling run of a client."""

    __tablename__ = "run"

    runid: Mapped[str] = mapped_column(String(64), primary_key=True)
    config: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]


app = WatershedApp(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY", "only for the example"),
    SQLALCHEMY_DATABASE_URI=os.environ.get("EXAMPLE_DATABASE_URI", "sqlite:///watershed.db"),
    RQ_WEBHOOKS_ALLOW_HTTP=os.environ.get("ALLOW_HTTP", "0"),
    RQ_WEBHOOKS_PORTAL_BASE_TEMPLATE="customer.html",
    MAX_CONTENT_LENGTH=4 * 2**20,
    SESSION_COOKIE_SAMESITE="Lax",
)
app.register_extension(db)
app.register_extension(webhooks)


@webhooks.authorize
def may(permission: str, **what: Any) -> bool:
    """Let operators do everything, customers what is theirs, and visitors see the webhooks of their runs.

    Those are the runs that were submitted at ``/`` from the same browser. With Flask-Login or Flask-Security
    the first line is ``if current_user.has_role("operator"):``.
    """
    if is_operator():
        return True
    if permission == "own":
        return bool(what["tenant"] == customer())
    return permission == "status" and what.get("runid") in session.get("runs", [])


def is_operator() -> bool:
    """Return whether this request carries the operators' token, or a session that was opened with it."""
    token = os.environ.get("EXAMPLE_TOKEN")
    return _carries(token, "operator") if token else False


@webhooks.tenant
def customer() -> str | None:
    """Return the customer whose API key this request carries, or whose session was opened with it."""
    return next((name for name, key in _api_keys().items() if _carries(key, "customer")), None)


# -- routes that enqueue: one decorator each -----------------------------------------------------------


@app.post("/runs/<runid>/<config>/rq/api/build_landuse")
@webhooks.accepts_webhook
def build_landuse(runid: str, config: str) -> ResponseReturnValue:
    """Summarise the cover of the hillslopes."""
    _prepare(runid, config)
    return _enqueue(jobs.build_landuse_rq, runid)


@app.post("/runs/<runid>/<config>/rq/api/build_soils")
@webhooks.accepts_webhook
def build_soils(runid: str, config: str) -> ResponseReturnValue:
    """Compute how much water each soil can hold; ``depth_factor`` scales the soils' depth."""
    _prepare(runid, config)
    payload = parse_request_payload()
    try:
        depth_factor = float(payload.pop("depth_factor", 1))
    except (TypeError, ValueError):
        return {"Success": False, "Error": "depth_factor must be a number"}
    if payload:
        return {"Success": False, "Error": f"unknown fields: {', '.join(sorted(payload))}"}
    return _enqueue(jobs.build_soils_rq, runid, depth_factor)


@app.post("/runs/<runid>/<config>/rq/api/build_climate")
@webhooks.accepts_webhook
def build_climate(runid: str, config: str) -> ResponseReturnValue:
    """Read the weather; a multipart request may bring its own table as ``climate_file``."""
    directory = _prepare(runid, config)
    uploaded = request.files.get("climate_file")
    if uploaded is not None:
        uploaded.save(directory / "climate.csv")
    return _enqueue(jobs.build_climate_rq, runid)


@app.post("/runs/<runid>/<config>/rq/api/run_wepp")
@webhooks.accepts_webhook
def run_wepp(runid: str, config: str) -> ResponseReturnValue:
    """Run the water balance of every hillslope: a root job that enqueues one job for each."""
    _prepare(runid, config)
    return _enqueue(jobs.run_wepp_rq, runid)


@app.post("/runs/<runid>/<config>/rq/api/hello_world")
@webhooks.accepts_webhook
def hello_world(runid: str, config: str) -> ResponseReturnValue:
    """Say hello, with a job that has RQ callbacks of its own."""
    _prepare(runid, config)
    fail = bool(parse_request_payload().get("fail"))
    with jobs.connect() as connection:
        job = Queue("default", connection=connection).enqueue_call(
            jobs.hello_world_rq,
            (runid,),
            {"fail": fail},
            timeout=jobs.TIMEOUT,
            on_success=jobs.note_success,
            on_failure=jobs.note_failure,
        )
    return {"Success": True, "job_id": job.id}


# -- routes that do not -----------------------------------------------------------------------------------


@app.route("/login", methods=["GET", "POST"])
def login() -> ResponseReturnValue:
    """Sign in who knows the operators' token or an API key: by the form, or by a link of ``make demo``."""
    token = os.environ.get("EXAMPLE_TOKEN")
    given = request.values.get("token")
    if given is None:
        return render_template("login.html", failed=False)
    if any(secrets.compare_digest(given.encode(), key.encode()) for key in _api_keys().values()):
        session["customer"] = _session_proof(given)
        return redirect(url_for("rq_webhooks.portal.page_overview"), code=303)
    if not token or not secrets.compare_digest(given.encode(), token.encode()):
        return render_template("login.html", failed=True), 403
    session["operator"] = _session_proof(token)
    # From the link to the front page, from the form to the dashboard. Either way the token leaves the URL.
    page = "home.form" if request.method == "GET" else "rq_webhooks.page_overview"
    return redirect(url_for(page), code=303)


@app.get("/rq/api/jobstatus/<job_id>")
def job_status(job_id: str) -> ResponseReturnValue:
    """Return what RQ knows of a job."""
    return _job_facts(job_id)


@app.get("/runs/<runid>/<config>/jobs/<job_id>")
def job_page(runid: str, config: str, job_id: str) -> ResponseReturnValue:
    """Show one job of a run to a person."""
    return render_template("job.html", runid=runid, config=config, job=_job_facts(job_id))


def parse_request_payload() -> dict[str, Any]:
    """Return the fields of a JSON object or a form, trimmed, with one-element lists opened."""
    if request.is_json:
        payload = request.get_json(silent=True)
        fields = dict(payload) if isinstance(payload, dict) else {}
    else:
        fields = {name: request.form.getlist(name) for name in request.form}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        fields[name] = value.strip() if isinstance(value, str) else value
    return fields


def _api_keys() -> dict[str, str]:
    pairs = (text.partition("=") for text in os.environ.get("EXAMPLE_CUSTOMERS", "").split())
    return {name: key for name, _, key in pairs if key}


def _carries(token: str, role: str) -> bool:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return secrets.compare_digest(given.encode(), token.encode()) or secrets.compare_digest(
        session.get(role, ""), _session_proof(token)
    )


def _session_proof(token: str) -> str:
    # Not the token itself: a session cookie is signed, but its owner can read it.
    return hmac.digest(token.encode(), b"session", "sha256").hex()


def _prepare(runid: str, config: str) -> Any:
    try:
        directory = jobs.run_dir(runid)
    except ValueError as exc:
        abort(404, str(exc))
    if db.session.get(Run, runid) is None:
        db.session.add(Run(runid=runid, config=config, created_at=datetime.now(UTC)))
        db.session.commit()
    return directory


def _enqueue(function: Any, *args: Any) -> ResponseReturnValue:
    with jobs.connect() as connection:
        job = Queue("default", connection=connection).enqueue_call(function, args, timeout=jobs.TIMEOUT)
    return {"Success": True, "job_id": job.id}


def _job_facts(job_id: str) -> dict[str, Any]:
    with jobs.connect() as connection:
        try:
            job = Job.fetch(job_id, connection=connection)
        except (NoSuchJobError, ValueError):  # RQ refuses ids that can be none
            abort(404)
        status = cast(str, job.get_status(refresh=False))
        return {
            "id": job.id,
            "status": str(getattr(status, "value", status)),
            "function": job.func_name,
            "enqueued_at": job.enqueued_at.isoformat() if job.enqueued_at else None,
            "ended_at": job.ended_at.isoformat() if job.ended_at else None,
            "children": {name: child for name, child in job.meta.items() if name.startswith("jobs:")},
        }


@app.context_processor
def who_is_looking() -> dict[str, Any]:
    """Let templates ask whether an operator is looking, and which customer."""
    return {"operator": is_operator(), "customer": customer()}


app.register_blueprint(home.make_blueprint(webhooks, _prepare, _job_facts))
