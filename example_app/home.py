"""The page at ``/``: submit a job, choose how its receiver behaves, and watch the webhook arrive.

``make demo`` starts the receiver and names it in ``EXAMPLE_RECEIVER_URL`` and ``EXAMPLE_RECEIVER_SECRET``.
The page works without JavaScript; with it, it renews itself without being loaded again.

A visitor may see the webhooks of the runs that were submitted from the same browser: their ids are in the
session, and ``may`` in :mod:`example_app.app` looks there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import requests
from flask import Blueprint, abort, current_app, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from rq import Queue

from flask_rq_webhooks import RQWebhooks

from . import jobs, model

#: Runs a browser's session remembers; a cookie has little room.
REMEMBERED_RUNS = 20


class Choice(NamedTuple):
    """One radio button: its label and what it stands for."""

    label: str
    value: Any


JOBS = {
    "success": Choice("Summarise the land use: succeeds", jobs.build_landuse_rq),
    "failure": Choice("Read a broken weather table: fails", jobs.build_climate_rq),
    "killed": Choice("Is killed in the middle, as if memory had run out", jobs.be_killed_rq),
}
RECEIVERS = {
    "good": Choice("Accepts the webhook at once", ""),
    "flaky": Choice("Answers 503 twice, then accepts", "?fail=2"),
    "hangs": Choice("Takes the request and never answers", "?hang=1"),
}
STATES = {
    "waiting": "The job has not ended yet.",
    "pending": "The webhook is waiting for its next attempt.",
    "sending": "The webhook is being sent.",
    "succeeded": "The webhook was delivered.",
    "exhausted": "The webhook was given up: no attempts are left. An operator can send it again.",
    "canceled": "An operator canceled the webhook.",
}
#: Delivery statuses that change by themselves.
UNFINISHED = {"waiting", "pending", "sending"}


def make_blueprint(
    webhooks: RQWebhooks, prepare: Callable[[str, str], Any], job_facts: Callable[[str], dict[str, Any]]
) -> Blueprint:
    """Return the pages.

    :param prepare: stores a new run (id, configuration) and returns its directory.
    :param job_facts: returns what RQ knows of a job, by its id.
    """
    pages = Blueprint("home", __name__)

    @pages.get("/")
    def form() -> ResponseReturnValue:
        """Show the form."""
        return _form()

    @pages.post("/")
    def submit() -> ResponseReturnValue:
        """Enqueue the chosen job with a webhook to the chosen receiver."""
        if not _receiver_url():
            abort(404)
        job_name, receiver_name = request.form.get("job", ""), request.form.get("receiver", "")
        if job_name not in JOBS or receiver_name not in RECEIVERS:
            return _form("Choose a job and a receiver."), 400
        runid = f"try-{secrets.token_hex(4)}"
        directory = prepare(runid, "plain")
        if job_name == "failure":
            shutil.copy(model.DATA / "broken_climate.csv", directory / "climate.csv")
        with jobs.connect() as connection:
            # These fields are what a client sends with its request; here the page's own server makes them.
            job = webhooks.enqueue_with_webhook(
                Queue("default", connection=connection),
                JOBS[job_name].value,
                (runid,),
                timeout=jobs.TIMEOUT,
                runid=runid,
                payload={
                    "webhook_url": f"{_receiver_url()}/hooks/{runid}{RECEIVERS[receiver_name].value}",
                    "webhook_secret": os.environ.get("EXAMPLE_RECEIVER_SECRET", ""),
                },
            )
        session["runs"] = [*session.get("runs", []), runid][-REMEMBERED_RUNS:]
        return redirect(url_for("home.progress", runid=runid, job_id=job.id), code=303)

    @pages.get("/submitted/<runid>/<job_id>")
    def progress(runid: str, job_id: str) -> ResponseReturnValue:
        """Show one job and its webhook as they are now."""
        # What flask_rq_webhooks offers to templates; it asks `may` first.
        webhook_of_job = cast("Callable[[str], Any]", current_app.jinja_env.globals["rq_webhooks_job"])
        webhook = webhook_of_job(job_id)
        if webhook is None:
            abort(404)
        status = webhook["delivery_status"]
        return render_template(
            "progress.html",
            runid=runid,
            job=job_facts(job_id),
            webhook=webhook,
            state=STATES[status],
            ended=status not in UNFINISHED,
            arrivals=_arrivals(runid),
        )

    return pages


def _form(problem: str = "") -> str:
    return render_template(
        "home.html", jobs=JOBS, receivers=RECEIVERS, available=bool(_receiver_url()), problem=problem
    )


def _receiver_url() -> str:
    return os.environ.get("EXAMPLE_RECEIVER_URL", "")


def _arrivals(runid: str) -> list[dict[str, Any]]:
    """Return what the receiver got for one run, oldest first; nothing while it does not answer."""
    with requests.Session() as client:
        client.trust_env = False  # no proxy between two processes of one machine
        try:
            received = client.get(f"{_receiver_url()}/received.json", timeout=2).json()
        except requests.RequestException:
            return []
    mine = [arrival for arrival in received if arrival["path"] == f"/hooks/{runid}"]
    return [{**arrival, "text": json.dumps(json.loads(arrival["body"]), indent=2)} for arrival in mine]
