"""``flask rq-webhooks …``: everything an operator does from a shell.

This package owns options, output and exit codes; the work is done in the layers below. This module has the
group and the commands that are one function each; :mod:`endpoint_commands` and :mod:`route_commands` have
more, :mod:`doctor` checks what webhooks depend on, :mod:`listen` is a receiver for development.
:mod:`terminal` is shared: times on the command line, safe output, errors as one sentence.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from flask.cli import AppGroup, ScriptInfo

from ..dispatch.dispatcher import Dispatcher, reconcile_now, wait_for_sql
from ..dispatch.http import open_transport
from ..dispatch.processes import Supervisor, is_child, life_signs, own_command
from ..dispatch.request_builder import send_ping
from ..state import EXTENSION_NAME, State, get_state
from ..storage.crypto import rekey
from ..storage.models import SENDING
from ..storage.retention import prune
from ..storage.schema import upgrade_schema
from ..storage.statistics import tenant_numbers
from ..web import operations
from ..web.api_schemas import EraseInput, ManyInput
from ..web.operations import InvalidInputError
from .doctor import examine
from .endpoint_commands import endpoints
from .listen import listen
from .route_commands import routes
from .terminal import (
    EXPLAINED,
    MOMENT,
    ProcessCount,
    as_json,
    cleaned,
    echo,
    echo_json,
    explain,
    progress_to_stderr,
)


class _Commands(AppGroup):
    """A group that reports errors in input, SQL and Redis in one sentence instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as exc:
            error = exc
        except InvalidInputError as exc:
            error = click.UsageError(str(exc))
            error.__cause__ = exc
        except EXPLAINED as exc:
            error = click.ClickException(explain(exc, _state(ctx)))
            error.__cause__ = exc
        text = "\n".join(cleaned(line) for line in error.message.splitlines())
        error.message = text  # type: ignore[misc]
        raise error


def _state(ctx: click.Context) -> State | None:
    """Return the app's state once a command, and with it its app context, has ended."""
    found, info = None, ctx.find_object(ScriptInfo)
    with suppress(Exception):  # an app that cannot be loaded has none
        found = None if info is None else info.load_app().extensions.get(EXTENSION_NAME)
    return found


@click.group(name="rq-webhooks", cls=_Commands)
def cli() -> None:
    """Deliver webhooks for RQ jobs, and operate them."""


cli.add_command(endpoints)
cli.add_command(listen)
cli.add_command(routes)


@cli.command()
@click.option("--burst", is_flag=True, help="Stop as soon as nothing is due.")
@click.option(
    "--concurrency", type=click.IntRange(1, 1000), help="Requests in flight at once, in each process."
)
@click.option(
    "--processes",
    type=ProcessCount(),
    default=1,
    show_default=True,
    help="Dispatcher processes to run and to restart when they die; auto: one for each processor.",
)
def worker(burst: bool, concurrency: int | None, processes: int) -> None:
    """Deliver webhooks until stopped (a dispatcher).

    Without --burst it waits for SQL and Redis where they cannot be reached.
    SIGTERM and Ctrl-C finish the requests in flight; a second one does not wait for them. Run as many
    workers as you like, on as many machines as you like.
    """
    _log_to_stderr()
    if processes > 1 and not is_child():
        raise SystemExit(Supervisor(own_command(), processes, burst=burst).run())
    on_alive = life_signs()
    if not burst:
        wait_for_sql(get_state(), on_alive)
    dispatcher = Dispatcher(get_state(), concurrency=concurrency, on_alive=on_alive)
    # What was loaded so far lives as long as this process, so the garbage collector need not look at it
    # again; hardly anything created later is part of a cycle, so it need not run often. Threads that wait for
    # the interpreter also ask for it less often. All this saves a tenth of the CPU of a busy dispatcher;
    # while reconcile passes over 100,000 jobs, one delivery in a hundred waits some milliseconds longer.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    sys.setswitchinterval(0.02)
    dispatcher.run(burst=burst)


@cli.command("init-db")
def init_db() -> None:
    """Create our tables, or upgrade them; for hosts without Flask-Migrate."""
    made = upgrade_schema(get_state().database)
    for line in made.lines():
        echo(f"created {line}")
    echo("The tables are up to date.")


@cli.command()
@as_json
def doctor(json_wanted: bool) -> None:
    """Check everything webhooks depend on and say how to fix it; exit 1 if something is wrong."""
    found = []
    for finding in examine(get_state()):
        found.append(finding)
        if not json_wanted:
            echo(f"{finding.status:4} {finding.name}: {finding.text}")
    if json_wanted:
        echo_json([asdict(finding) for finding in found])
    if any(finding.status != "ok" for finding in found):
        raise SystemExit(1)


@cli.command()
@click.argument("url")
@click.option("--secret", help="Signing secret; the server-wide secret, if any, by default.")
@click.option("--format", "payload_format", help="Payload format; the app's by default.")
def trigger(url: str, secret: str | None, payload_format: str | None) -> None:
    """Send one webhook.ping to URL, under the policy of every delivery, and print the response."""
    state = get_state()
    transport = open_transport(state.settings, state.url_policy, concurrency=1)
    try:
        ping = send_ping(url, state=state, transport=transport, secret=secret, payload_format=payload_format)
    finally:
        transport.close(wait=True)
    result = ping.result
    signed = "signed" if "webhook-signature" in ping.request.headers else "not signed"
    echo(f"sent {ping.request.headers['webhook-id']} ({len(ping.request.body)} bytes, {signed})")
    if result.status_code is not None:
        echo(f"answer {result.status_code} after {result.duration_ms:.0f} ms")
    if result.error_code is not None:
        echo(f"error {result.error_code}: {result.error_detail}")
    if result.response_body:
        echo(f"body {result.response_body[:500]!r}")
    if result.status_code is None or not 200 <= result.status_code < 300:
        raise SystemExit(1)


@cli.command()
@click.argument("delivery_id", metavar="ID")
def resend(delivery_id: str) -> None:
    """Make the delivery ID due now, whatever its status: same event id, same bytes."""
    status = operations.resend(get_state(), delivery_id)
    echo("An attempt is in progress." if status == SENDING else "Due now.")


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--since", type=MOMENT, help="Created at this time or later: ISO 8601, or an age: 24h."),
        click.option("--until", type=MOMENT, help="Created before this time."),
        click.option("--endpoint", "endpoint_id", help="To this endpoint."),
        click.option("--status", multiple=True, help="With this status; may be repeated."),
        click.option("--host", help="To this host."),
        click.option("--event-type", "event", help="Of this event type."),
        click.option("--job", "job_id", help="Of this job."),
        click.option("--runid", help="Of this run."),
        click.option("--tenant", help="To endpoints of this tenant."),
        click.option("--all", "all", is_flag=True, help="All deliveries, where no other option is given."),
    ):
        command = option(command)
    return command


def _change_many(action: Callable[..., operations.Progress], options: Mapping[str, Any]) -> int:
    """Run all parts of a change to many deliveries; return how many were changed."""
    raw = {name: value for name, value in options.items() if value}
    for name in ("since", "until"):
        if name in raw:
            raw[name] = raw[name].isoformat()
    state, where = get_state(), operations.delivery_filter(operations.checked(ManyInput(), raw))
    did = action(state, where)
    done = did.done
    while did.cursor is not None:
        progress_to_stderr(done)
        did = action(state, where, did.cursor)
        done += did.done
    return done


@cli.command()
@_filter_options
def recover(**options: Any) -> None:
    """Make deliveries due again: exhausted and canceled ones, unless --status says otherwise."""
    echo(f"{_change_many(operations.recover, options)} deliveries are due now.")


@cli.command()
@_filter_options
def cancel(**options: Any) -> None:
    """Cancel deliveries that are not finished."""
    echo(f"{_change_many(operations.cancel, options)} deliveries canceled.")


@cli.command()
@click.option("--job", "job_id", help="Of this job.")
@click.option("--runid", help="Of this run, and of requests with this runid.")
@click.option("--reference", help="Of requests with this webhook_reference.")
@click.option("--tenant", help="Of this tenant.")
def erase(**options: Any) -> None:
    """Erase bodies, results, answers and headers for good; ids, times and statuses stay in the log.

    Unfinished deliveries are canceled first. Jobs that have not ended are reported when they end; erase them
    again then.
    """
    values = operations.checked(EraseInput(), {name: value for name, value in options.items() if value})
    state = get_state()
    did = operations.erase(state, values)
    events, canceled = did.events, did.canceled
    while did.in_flight:
        progress_to_stderr(events)
        time.sleep(1)
        did = operations.erase(state, values)
        events, canceled = events + did.events, canceled + did.canceled
    echo(f"{events} events erased; {canceled} of their deliveries were unfinished and are canceled.")
    if did.running:
        echo(f"{did.running} jobs have not ended; erase again when they have.")


@cli.command()
@click.option("--hours", type=click.IntRange(1, 720), default=24, show_default=True, help="How far back.")
@as_json
def tenants(hours: int, json_wanted: bool) -> None:
    """List the tenants with recent failures or a backlog, most failures first."""
    found = tenant_numbers(get_state().database, hours=hours)
    if json_wanted:
        echo_json([asdict(one) for one in found])
        return
    for one in found:
        echo(f"{one.tenant}  {one.failures} exhausted  {one.backlog} unfinished")


@cli.command()
def pause() -> None:
    """Stop all sending, on every dispatcher. Jobs are still watched, webhooks still accepted."""
    operations.pause(get_state())
    echo("Paused. Requests in flight finish. `flask rq-webhooks resume` resumes sending.")


@cli.command()
def resume() -> None:
    """Resume sending."""
    operations.resume(get_state())
    echo("Sending is resumed.")


@cli.command("reconcile")
def reconcile_command() -> None:
    """Look once for jobs that ended without a callback report, and store their events."""
    _log_to_stderr()
    report = reconcile_now(get_state())
    if report is None:
        raise click.ClickException("A dispatcher is reconciling at this moment; there is nothing left to do.")
    echo(f"{report.looked_at} watches read, {sum(report.reported.values())} events stored.")
    for event_type, count in sorted(report.reported.items()):
        echo(f"  {event_type}: {count}")


@cli.command("prune")
@click.option("--days", type=click.IntRange(1), help="Days to keep; RETENTION_DAYS by default.")
def prune_command(days: int | None) -> None:
    """Delete what finished long ago. Dispatchers do it every hour."""
    state = get_state()
    older_than = datetime.now(UTC) - timedelta(days=days or state.settings.retention_days)
    pruned = prune(state.database, older_than, progress=progress_to_stderr)
    echo(
        f"Deleted {pruned.deliveries} deliveries, {pruned.events} events, {pruned.watches} watches and "
        f"{pruned.endpoints} endpoints from before {older_than:%Y-%m-%d %H:%M} UTC."
    )


@cli.command("rekey")
def rekey_command() -> None:
    """Encrypt all secrets and headers again with the first key, so that older keys can be removed."""
    state = get_state()
    done = rekey(state.database, state.cipher, progress=progress_to_stderr)
    echo(f"{done} values are encrypted with the first key.")


def _log_to_stderr() -> None:
    """Show our log if the app has not configured logging."""
    package = logging.getLogger("flask_rq_webhooks")
    if not package.hasHandlers():
        handler = logging.StreamHandler()
        layout = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(layout))
        package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO and package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
