"""``flask rq-webhooks routes``: which routes enqueue jobs that no webhook can be asked for.

Owns the table, the JSON and the exit status. The reading is :mod:`flask_rq_webhooks.accept.route_report`'s.
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

from ..accept.route_report import Place, Route, survey

_WORDS = {
    "decorator": "yes",
    "helper": "yes, by helper",
    "missing": "MISSING",
    "unattached": "PLAIN QUEUE",
    "none": "-",
}


@click.command()
@click.option("--all", "everything", is_flag=True, help="Routes that enqueue nothing, too.")
@click.option("--check", is_flag=True, help="Exit 1 if a route enqueues, or may enqueue, without a webhook.")
@click.option(
    "--ignore", "ignored", multiple=True, metavar="VIEW",
    help="View name that needs no webhook; may be repeated.",
)  # fmt: skip
@click.option(
    "--observed", "files", multiple=True, metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What testing.observe_routes saved; may be repeated.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_appcontext
def routes(
    everything: bool, check: bool, ignored: tuple[str, ...], files: tuple[Path, ...], as_json: bool
) -> None:
    """List the routes that enqueue RQ jobs, and whether clients can ask for a webhook there.

    It reads the source of views and of the functions they call, and runs none of it, though it imports what
    views import; Redis and SQL are not needed, nor that the extension is initialised. "may" means that it
    looks like it: a queue whose class cannot be told from the source, or a function that is mentioned, not
    called. What it cannot see: methods of objects whose class is not plain from the source, names made at run
    time, packages that are not the app's own. --observed adds what a test-suite has really seen.

    Exit status: 0, also where webhooks are missing; with --check 1 then; 2 for bad options.
    """
    found = survey(current_app)
    for file in files:
        found = _with_observed(found, _read_observed(file))
    if unknown := sorted(set(ignored) - {route.view for route in found}):
        raise click.UsageError(f"--ignore: there is no view {unknown[0]!r}.")
    missing = [route for route in found if route.missing is not None and route.view not in ignored]
    shown = [route for route in found if everything or route.webhook != "none"]
    if as_json:
        click.echo(json.dumps([_as_json(route, ignored) for route in shown], indent=2))
    else:
        for line in _table(shown, ignored):
            click.echo(line)
        enqueuing = sum(route.webhook != "none" for route in found)
        click.echo(
            f"{len(found)} routes, {enqueuing} enqueue or may, {len(missing)} of them without a webhook."
        )
    if check and missing:
        raise SystemExit(1)


def _read_observed(file: Path) -> list[dict[str, Any]]:
    try:
        jobs = json.loads(file.read_text())
        if not all({"view", "rule", "method", "func", "webhook"} <= job.keys() for job in jobs):
            raise ValueError("not what observe_routes saves")
    except (ValueError, TypeError, AttributeError) as exc:
        raise click.UsageError(f"--observed {file}: {exc}.") from exc
    return list(jobs)


def _with_observed(found: list[Route], jobs: Sequence[dict[str, Any]]) -> list[Route]:
    merged = []
    for route in found:
        seen = [
            Place(
                f"observed: {job['func']}", "", 0,
                covered=job["webhook"] != "missing", helper=job["webhook"] == "helper",
                plain=job["webhook"] == "unattached",
            )
            for job in jobs
            if (job["view"], job["rule"]) == (route.view, route.rule) and job["method"] in route.methods
        ]  # fmt: skip
        merged.append(replace(route, places=tuple(dict.fromkeys([*route.places, *seen]))))
    return merged


def _table(shown: Sequence[Route], ignored: Sequence[str]) -> list[str]:
    rows = [("ROUTE", "METHODS", "VIEW", "WEBHOOK", "ENQUEUES")]
    for route in shown:
        word = "ignored" if route.missing and route.view in ignored else _WORDS[route.webhook]
        rows.append((route.rule, ",".join(route.methods), route.view, word, _explained(route)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


def _plainest(route: Route) -> Place | None:
    return route.missing or min(
        route.places, key=lambda place: (not place.certain, len(place.through)), default=None
    )


def _explained(route: Route) -> str:
    place = _plainest(route)
    if place is None:
        if not route.readable:
            return "no source of the app's own"
        return "nothing that can be seen" if route.decorated else ""
    text = place.call if place.certain else f"may: {place.call}"
    if place.file:
        text += f" ({_relative(place.file)}:{place.line})"
    return text + "".join(f" < {name}" for name in reversed(place.through))


def _relative(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


def _as_json(route: Route, ignored: Sequence[str]) -> dict[str, Any]:
    place = _plainest(route)
    return {
        "rule": route.rule,
        "methods": list(route.methods),
        "view": route.view,
        "webhook": route.webhook,
        "ignored": route.view in ignored,
        "enqueues": "no" if place is None else "yes" if place.certain else "may",
        "places": [asdict(place) | {"through": list(place.through)} for place in route.places],
    }
