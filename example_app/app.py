"""The host: a watershed-modelling service as such apps are written.

A module-level ``app`` that registers extensions through a method of its own, Flask-SQLAlchemy for its
runs, a Redis connection per request, plain ``rq.Queue`` objects. Webhooks add three things: the extension
object, one decorator per route that enqueues, and a function that says who may see what.

Settings come from the environment:

========================  ==================================================================
``REDIS_URL``             default ``redis://localhost:6379/0``
``EXAMPLE_DATABASE_URI``  default ``sqlite:///watershed.db`` in the instance folder
``EXAMPLE_RUNS_DIR``      where runs keep their files, default ``instance/runs``
``EXAMPLE_TOKEN``         bearer token of clients and operators, and what operators sign in with at
                          ``/login``; without it nobody is let in
``ALLOW_HTTP``            ``1`` lets webhooks go to ``http://`` receivers on this machine
``SECRET_KEY``            encrypts webhook secrets at rest; every process needs the same
========================  ==================================================================
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

from . import jobs


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
# `instrument_rq` lets the plain `rq.Queue` of existing code carry webhooks inside decorated views; `redis`
# gives webhooks the Redis of the queues, from whatever `jobs.connect` is then: tests replace it.
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
    MAX_CONTENT_LENGTH=4 * 2**20,
    SESSION_COOKIE_SAMESITE="Lax",
)
app.register_extension(db)
app.register_extension(webhooks)


@webhooks.authorize
def may(permission: str, **what: Any) -> bool:
    """Let operators see and do everything, and nobody else anything.

    They send the token, or have signed in with it. With Flask-Login or Flask-Security this is a line such as
    ``return current_user.is_authenticated and current_user.has_role("operator")``.
    """
    token = os.environ.get("EXAMPLE_TOKEN")
    if not token:
        return False
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return secrets.compare_digest(given.encode(), token.encode()) or secrets.compare_digest(
        session.get("operator", ""), _signed_in(token)
    )


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
    """Compute how much water the soils can hold; ``depth_factor`` scales their depth."""
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
    """Run the water balance of every hillslope: a root job that enqueues the others."""
    _prepare(runid, config)
    return _enqueue(jobs.run_wepp_rq, runid)


@app.post("/runs/<runid>/<config>/rq/api/hello_world")
@webhooks.accepts_webhook
def hello_world(runid: str, config: str) -> ResponseReturnValue:
    """Say hello, by a job that has RQ callbacks of its own."""
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
    """Let an operator in who knows the token."""
    token = os.environ.get("EXAMPLE_TOKEN")
    if request.method == "GET":
        return render_template("login.html", failed=False)
    given = request.form.get("token", "")
    if not token or not secrets.compare_digest(given.encode(), token.encode()):
        return render_template("login.html", failed=True), 403
    session["operator"] = _signed_in(token)
    return redirect(url_for("rq_webhooks.page_overview"), code=303)


@app.get("/rq/api/jobstatus/<job_id>")
def job_status(job_id: str) -> ResponseReturnValue:
    """Say what RQ says about a job."""
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


def _signed_in(token: str) -> str:
    # Not the token itself: the session's cookie is signed, but anybody who holds it can read it.
    return hmac.digest(token.encode(), b"operator", "sha256").hex()


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
        except NoSuchJobError:
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
