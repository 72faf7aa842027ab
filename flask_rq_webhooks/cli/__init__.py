"""``flask rq-webhooks …``: everything an operator does from a shell.

Owns words for people: options, progress, exit codes. What is done is in the layers below.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from flask.cli import AppGroup
from redis import RedisError

from ..dispatch.dispatcher import Dispatcher, reconcile_now
from ..dispatch.http import open_transport
from ..dispatch.request_builder import send_ping
from ..errors import RQWebhooksError
from ..observe.host_hooks import safe_render
from ..state import get_state
from ..storage import dispatchers
from ..storage.bulk import cancel, recover
from ..storage.crypto import rekey
from ..storage.filters import DeliveryFilter
from ..storage.retention import prune, resend
from ..storage.schema import upgrade_schema
from .doctor import examine
from .endpoint_commands import endpoints
from .listen import listen
from .options import MOMENT, as_json, echo_json, progress_to_stderr
from .route_commands import routes


class _Commands(AppGroup):
    """A group that turns our errors into one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RQWebhooksError as exc:
            raise click.ClickException(str(exc)) from exc
        except RedisError as exc:
            raise click.ClickException(f"Redis cannot be used: {type(exc).__name__}: {exc}") from exc


@click.group(name="rq-webhooks", cls=_Commands)
def cli() -> None:
    """Deliver webhooks for RQ jobs, and look after them."""


cli.add_command(endpoints)
cli.add_command(listen)
cli.add_command(routes)


@cli.command()
@click.option("--burst", is_flag=True, help="Stop as soon as nothing is left to deliver now.")
@click.option("--concurrency", type=click.IntRange(1, 1000), help="Requests in flight at once.")
def worker(burst: bool, concurrency: int | None) -> None:
    """Deliver webhooks until stopped (a dispatcher).

    SIGTERM and Ctrl-C finish what is in flight; a second one does not wait for it. Run as many as you
    like, on as many machines as you like.
    """
    _log_to_stderr()
    state = get_state()
    dispatcher = Dispatcher(state, concurrency=concurrency)
    # What was loaded so far lives as long as this process; the garbage collector need not look at it again
    # and again: several per cent of the CPU of a busy dispatcher.
    gc.collect()
    gc.freeze()
    dispatcher.run(burst=burst)


@cli.command("init-db")
def init_db() -> None:
    """Create our tables, or upgrade them; for hosts without Flask-Migrate."""
    made = upgrade_schema(get_state().database)
    for line in made.lines():
        click.echo(f"created {line}")
    click.echo("The tables are up to date.")


@cli.command()
@as_json
def doctor(json_wanted: bool) -> None:
    """Check everything a webhook depends on, say what to do about it; exit 1 if something is wrong."""
    found = []
    for finding in examine(get_state()):
        found.append(finding)
        if not json_wanted:
            click.echo(f"{finding.status:4} {finding.name}: {finding.text}")
    if json_wanted:
        echo_json([asdict(finding) for finding in found])
    if any(finding.status != "ok" for finding in found):
        raise SystemExit(1)


@cli.command()
@click.argument("url")
@click.option("--secret", help="Signs the ping; the server-wide secret, if there is one, otherwise.")
@click.option("--format", "payload_format", help="Payload format; the app's default otherwise.")
def trigger(url: str, secret: str | None, payload_format: str | None) -> None:
    """Send one webhook.ping to URL, under the same policy as every delivery, and say what came back."""
    state = get_state()
    transport = open_transport(state.settings, state.url_policy, concurrency=1)
    try:
        ping = send_ping(url, state=state, transport=transport, secret=secret, payload_format=payload_format)
    finally:
        transport.close(wait=True)
    result = ping.result
    signed = "signed" if "webhook-signature" in ping.request.headers else "not signed"
    click.echo(f"sent {ping.request.headers['webhook-id']} ({len(ping.request.body)} bytes, {signed})")
    if result.status_code is not None:
        click.echo(f"answer {result.status_code} after {result.duration_ms:.0f} ms")
    if result.error_code is not None:
        click.echo(f"error {result.error_code}: {result.error_detail}")
    if result.response_body:
        click.echo(f"body {result.response_body[:500]!r}")
    if result.status_code is None or not 200 <= result.status_code < 300:
        raise SystemExit(1)


@cli.command("resend")
@click.argument("delivery_id", metavar="ID")
def resend_command(delivery_id: str) -> None:
    """Make the delivery ID due now, whatever became of it before: same event id, same bytes."""
    status = resend(get_state().database, delivery_id)
    if status is None:
        raise click.ClickException(f"There is no delivery {delivery_id!r}.")
    click.echo("An attempt is under way." if status == "sending" else "Due now.")


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--since", type=MOMENT, help="Made at this time or later: ISO 8601, or an age such as 24h."
        ),
        click.option("--until", type=MOMENT, help="Made before this time."),
        click.option("--endpoint", "endpoint_id", help="Of this endpoint."),
        click.option("--status", "statuses", multiple=True, help="With this status; may be repeated."),
        click.option("--host", help="To this host."),
        click.option("--event-type", help="Of this event type."),
        click.option("--job", "job_id", help="Of this job."),
        click.option("--runid", help="Of this run."),
        click.option("--all", "everything", is_flag=True, help="Needed where no other option is given."),
    ):
        command = option(command)
    return command


def _filter(everything: bool, statuses: tuple[str, ...], **options: Any) -> DeliveryFilter:
    known = {"pending", "sending", "succeeded", "exhausted", "canceled"}
    if unknown := sorted(set(statuses) - known):
        raise click.UsageError(f"Unknown status {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    if not everything and not statuses and not any(value is not None for value in options.values()):
        raise click.UsageError("Say which deliveries are meant, or --all.")
    return DeliveryFilter(statuses=statuses or None, **options)


@cli.command("recover")
@_filter_options
def recover_command(everything: bool, statuses: tuple[str, ...], **options: Any) -> None:
    """Make deliveries due again: exhausted and canceled ones, unless --status says otherwise."""
    state = get_state()
    done = recover(
        state.database,
        _filter(everything, statuses, **options),
        render=safe_render(state),
        max_attempts=state.settings.max_attempts,
        progress=progress_to_stderr,
    )
    click.echo(f"{done} deliveries are due now.")


@cli.command("cancel")
@_filter_options
def cancel_command(everything: bool, statuses: tuple[str, ...], **options: Any) -> None:
    """Cancel deliveries that are not finished."""
    chosen = _filter(everything, statuses, **options)
    done = cancel(get_state().database, chosen, progress=progress_to_stderr)
    click.echo(f"{done} deliveries canceled.")


@cli.command()
def pause() -> None:
    """Stop all sending, on every dispatcher. Jobs are still watched, webhooks still accepted."""
    dispatchers.pause(get_state().database)
    click.echo("Paused. What is claimed already is sent; `flask rq-webhooks resume` goes on.")


@cli.command()
def resume() -> None:
    """Go on sending."""
    dispatchers.resume(get_state().database)
    click.echo("Sending goes on.")


@cli.command("reconcile")
def reconcile_command() -> None:
    """Look once for endings that no callback reported, and tell of them."""
    _log_to_stderr()
    report = reconcile_now(get_state())
    if report is None:
        raise click.ClickException("A dispatcher is doing it at this moment; there is nothing left to do.")
    click.echo(f"{report.looked_at} watches looked at, {sum(report.reported.values())} endings told.")
    for event_type, count in sorted(report.reported.items()):
        click.echo(f"  {event_type}: {count}")


@cli.command("prune")
@click.option(
    "--days", type=click.IntRange(1), help="Keep what ended within so many days; RETENTION_DAYS otherwise."
)
def prune_command(days: int | None) -> None:
    """Delete what ended long ago. Dispatchers do it every hour."""
    state = get_state()
    older_than = datetime.now(UTC) - timedelta(days=days or state.settings.retention_days)
    pruned = prune(state.database, older_than, progress=progress_to_stderr)
    click.echo(
        f"Deleted {pruned.deliveries} deliveries, {pruned.events} events, {pruned.watches} watches and "
        f"{pruned.endpoints} endpoints from before {older_than:%Y-%m-%d %H:%M} UTC."
    )


@cli.command("rekey")
def rekey_command() -> None:
    """Encrypt all secrets and headers anew with the first key; then older keys may go."""
    state = get_state()
    done = rekey(state.database, state.cipher, progress=progress_to_stderr)
    click.echo(f"{done} values are encrypted with the first key.")


def _log_to_stderr() -> None:
    """Show our log where nobody has configured logging."""
    package = logging.getLogger("flask_rq_webhooks")
    if not package.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO and package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
