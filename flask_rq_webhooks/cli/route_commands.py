"""``flask rq-webhooks routes``: list the routes that enqueue jobs without accepting a webhook.

This module owns table, JSON and exit status; :mod:`flask_rq_webhooks.accept.route_report` reads the views.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from flask import current_app
from flask.cli import with_appcontext

from ..accept.route_report import Route, survey
from .terminal import as_json, echo, echo_json

_WORDS = {
    "decorator": "yes",
    "helper": "yes, by helper",
    "missing": "MISSING",
    "unattached": "PLAIN QUEUE",
    "unknown": "cannot tell",
    "none": "-",
}


_MISSING = ("missing", "unattached")


@click.command()
@click.option("--all", "everything", is_flag=True, help="Every route, including those that cannot be judged.")
@click.option("--check", is_flag=True, help="Exit 1 if a route is known to enqueue without a webhook.")
@click.option(
    "--ignore", "ignored", multiple=True, metavar="VIEW",
    help="View that needs no webhook; may be repeated.",
)  # fmt: skip
@click.option(
    "--observed", "files", multiple=True, metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File saved by testing.observe_routes; may be repeated.",
)  # fmt: skip
@as_json
@with_appcontext
def routes(
    everything: bool, check: bool, ignored: tuple[str, ...], files: tuple[Path, ...], json_wanted: bool
) -> None:
    """List the routes that enqueue RQ jobs, and whether clients can ask for a webhook there.

    --observed takes what your tests observed; it overrides what the source suggests. The source of each view
    is read, and that of the functions it calls, one level deep. Nothing is run; Redis and SQL are not needed.
    "cannot tell" means that neither is conclusive: the source does not name an object's class, or the job is
    enqueued further down. Let your tests call such routes under testing.observe_routes.

    Exit status: 0, even if webhooks are missing, unless --check is given: then 1; 2 for bad options.
    """
    found = survey(current_app)
    if files:
        found = _with_observed(found, [job for file in files for job in _read_observed(file)])
    if unknown := sorted(set(ignored) - {route.view for route in found}):
        raise click.UsageError(f"--ignore: there is no view {unknown[0]!r}.")
    missing = [route for route in found if route.webhook in _MISSING and route.view not in ignored]
    shown = [route for route in found if everything or route.webhook not in ("none", "unknown")]
    unclear = sum(route.webhook == "unknown" for route in found)
    if json_wanted:
        echo_json([_as_json(route, ignored) for route in shown])
    else:
        for line in _table(shown, ignored):
            echo(line)
        enqueuing = sum(route.webhook not in ("none", "unknown") for route in found)
        echo(
            f"{len(found)} routes, {enqueuing} enqueue, {len(missing)} of them without a webhook; "
            f"{unclear} cannot be judged from tests or source (--all lists them)."
        )
    if check and missing:
        raise SystemExit(1)


def _read_observed(file: Path) -> list[dict[str, Any]]:
    try:
        jobs = json.loads(file.read_text())
        if not all({"view", "rule", "method", "func", "webhook"} <= job.keys() for job in jobs):
            raise ValueError("not a file of observe_routes")
    except (ValueError, TypeError, AttributeError) as exc:
        raise click.UsageError(f"--observed {file}: {exc}.") from exc
    return list(jobs)


def _with_observed(found: list[Route], jobs: Sequence[dict[str, Any]]) -> list[Route]:
    merged = []
    for route in found:
        seen = [
            job
            for job in jobs
            if (job["view"], job["rule"]) == (route.view, route.rule) and job["method"] in route.methods
        ]
        observed = tuple(job for job in seen if job["webhook"] != "none")
        merged.append(replace(route, observed=observed if seen else None))
    return merged


def _table(shown: Sequence[Route], ignored: Sequence[str]) -> list[str]:
    rows = [("ROUTE", "METHODS", "VIEW", "WEBHOOK", "ENQUEUES")]
    for route in shown:
        ignore = route.webhook in _MISSING and route.view in ignored
        word = "ignored" if ignore else _WORDS[route.webhook]
        rows.append((route.rule, ",".join(route.methods), route.view, word, _explained(route)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


def _explained(route: Route) -> str:
    if route.observed:
        jobs = [job for job in route.observed if job["webhook"] == route.webhook]
        return "observed: " + ", ".join(dict.fromkeys(job["func"] for job in jobs))
    place = route.place
    if place is None:
        return "" if route.webhook == "none" else "nothing found"
    text = f"{place.call if place.certain else f'may: {place.call}'} ({_relative(place.file)}:{place.line})"
    return f"{text} < {place.through}" if place.through else text


def _relative(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


def _as_json(route: Route, ignored: Sequence[str]) -> dict[str, Any]:
    enqueues = {"none": "no", "unknown": "cannot tell"}.get(route.webhook, "yes")
    return {
        "rule": route.rule,
        "methods": list(route.methods),
        "view": route.view,
        "webhook": route.webhook,
        "ignored": route.view in ignored,
        "enqueues": enqueues,
        "places": [asdict(place) for place in route.places],
        "observed": None if route.observed is None else list(route.observed),
    }
