"""``flask rq-webhooks endpoints …``: standing endpoints, which hear of every job."""

from __future__ import annotations

from typing import Any, NoReturn

import click
from flask.cli import AppGroup

from ..errors import InvalidWebhookError
from ..protocol.headers import validate_secret
from ..protocol.signatures import generate_secret
from ..protocol.urls import redact_url
from ..state import get_state
from ..storage.endpoints import (
    ROTATION_GRACE_S,
    NewEndpoint,
    create_standing,
    delete_standing,
    disable_standing,
    enable_standing,
    rotate_secret,
)
from ..storage.queries import EndpointView, list_endpoints
from ..web.operations import EndpointFormError, checked_values, header_pairs
from .options import as_json, echo_json

#: What ``list --json`` tells of an endpoint, beside its redacted URL.
_TOLD = (
    "id", "host", "description", "events", "scope", "format", "runid", "reference", "timeout_s",
    "max_attempts", "sign_payload", "secrets", "enabled", "disabled_at", "disabled_reason", "failures",
    "failing_since", "created_at",
)  # fmt: skip


@click.group(cls=AppGroup)
def endpoints() -> None:
    """Standing endpoints: receivers that hear of every job."""


@endpoints.command("list")
@as_json
def list_command(json_wanted: bool) -> None:
    """List standing endpoints, newest first."""
    database, cursor = get_state().database, None
    told: list[dict[str, Any]] = []
    while True:
        page = list_endpoints(database, cursor=cursor, limit=100)
        for endpoint in page.items:
            if json_wanted:
                told.append(_told(endpoint))
            else:
                click.echo(_line(endpoint))
        cursor = page.cursor
        if cursor is None:
            break
    if json_wanted:
        echo_json(told)


@endpoints.command()
@click.argument("url")
@click.option(
    "--event", "events", multiple=True, help="Event type; may be repeated; '*' for all. Default: endings."
)
@click.option(
    "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Custom header; may be repeated."
)
@click.option("--secret", help="Signs; one is made up and shown otherwise.")
@click.option("--format", "payload_format", help="Payload format; the app's default otherwise.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds an attempt may take.")
@click.option("--attempts", type=click.IntRange(1, 101), help="Attempts in all.")
@click.option("--description", help="For people.")
def create(
    url: str,
    events: tuple[str, ...],
    headers: tuple[str, ...],
    secret: str | None,
    payload_format: str | None,
    timeout: float | None,
    attempts: int | None,
    description: str | None,
) -> None:
    """Make a standing endpoint that sends to URL."""
    state = get_state()
    made_up = secret is None
    try:
        pairs = header_pairs(headers)
    except ValueError as exc:
        raise click.UsageError(f"--header: {exc}") from None
    raw = {
        "url": url,
        "secret": generate_secret() if secret is None else secret,
        "headers": pairs or None,
        "events": list(events) or None,
        "format": payload_format,
        "timeout_s": timeout,
        "max_attempts": attempts,
        "description": description,
    }
    try:
        values = checked_values(
            state, {name: value for name, value in raw.items() if value is not None}, creating=True
        )
    except EndpointFormError as exc:
        reasons = [f"{name}: {' '.join(why)}" for name, why in exc.errors.items()]
        raise click.UsageError("\n".join(reasons)) from exc
    chosen = values["secret"]
    endpoint_id = create_standing(
        state.database, state.cipher, NewEndpoint(kind="standing", **values), namespace=state.namespace
    )
    click.echo(endpoint_id)
    if made_up:
        click.echo(f"secret {chosen} (shown only now)")


@endpoints.command()
@click.argument("endpoint_id", metavar="ID")
@click.option("--secret", help="The new secret; one is made up and shown otherwise.")
@click.option("--grace-hours", type=click.FloatRange(0), default=ROTATION_GRACE_S / 3600, show_default=True,
              help="Hours the old secret goes on signing beside it.")  # fmt: skip
def rotate(endpoint_id: str, secret: str | None, grace_hours: float) -> None:
    """Give the endpoint ID a new secret."""
    state = get_state()
    chosen = generate_secret() if secret is None else _checked_secret(secret)
    if not rotate_secret(state.database, state.cipher, endpoint_id, chosen, grace_s=grace_hours * 3600):
        _missing(endpoint_id)
    click.echo(f"The old secret goes on signing for {grace_hours:g} h.")
    if secret is None:
        click.echo(f"secret {chosen} (shown only now)")


@endpoints.command()
@click.argument("endpoint_id", metavar="ID")
def enable(endpoint_id: str) -> None:
    """Let the endpoint ID get deliveries again."""
    if not enable_standing(get_state().database, endpoint_id):
        _missing(endpoint_id)
    click.echo(f"Enabled. `flask rq-webhooks recover --endpoint {endpoint_id}` sends what it missed.")


@endpoints.command()
@click.argument("endpoint_id", metavar="ID")
def disable(endpoint_id: str) -> None:
    """Stop the endpoint ID from getting new deliveries."""
    if not disable_standing(get_state().database, endpoint_id):
        _missing(endpoint_id)
    click.echo(f"Disabled. `flask rq-webhooks cancel --endpoint {endpoint_id}` cancels what still waits.")


@endpoints.command()
@click.argument("endpoint_id", metavar="ID")
@click.confirmation_option(prompt="Delete the endpoint with all its deliveries?")
def delete(endpoint_id: str) -> None:
    """Delete the endpoint ID with its deliveries and attempts."""
    if not delete_standing(get_state().database, endpoint_id):
        _missing(endpoint_id)
    click.echo("Deleted.")


def _told(endpoint: EndpointView) -> dict[str, Any]:
    told = {name: getattr(endpoint, name) for name in _TOLD}
    return {"url": redact_url(endpoint.url), **told}


def _line(endpoint: EndpointView) -> str:
    status = "enabled" if endpoint.enabled else f"disabled ({endpoint.disabled_reason or 'unknown'})"
    events = "endings" if endpoint.events is None else ",".join(endpoint.events)
    description = f"  {endpoint.description}" if endpoint.description else ""
    return f"{endpoint.id}  {endpoint.host}  {status}  {endpoint.format}  {events}{description}"


def _checked_secret(secret: str) -> str:
    try:
        return validate_secret(secret)
    except InvalidWebhookError as exc:
        # Without the cause: it may hold the secret.
        raise click.UsageError(" ".join(why for reasons in exc.details.values() for why in reasons)) from None


def _missing(endpoint_id: str) -> NoReturn:
    raise click.ClickException(f"There is no standing endpoint {endpoint_id!r}.")
