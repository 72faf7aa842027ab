"""``flask rq-webhooks endpoints …``: standing endpoints, which receive events of every job."""

from __future__ import annotations

from typing import Any

import click
from flask.cli import AppGroup

from ..protocol.urls import redact_url
from ..state import get_state
from ..storage.queries import EndpointView, list_endpoints, shallow
from ..storage.standing_endpoints import ROTATION_GRACE_S
from ..web import operations
from ..web.api_schemas import RotateInput
from ..web.forms import header_pairs
from .terminal import as_json, echo, echo_json

#: Fields that ``list --json`` omits: headers are secret, the kind is always the same.
_NOT_LISTED = frozenset({"headers", "kind", "trace", "updated_at"})


@click.group(cls=AppGroup)
def endpoints() -> None:
    """Standing endpoints: receivers that get events of every job."""


@endpoints.command("list")
@click.option("--tenant", help="Of this tenant.")
@as_json
def list_command(tenant: str | None, json_wanted: bool) -> None:
    """List standing endpoints, newest first."""
    database, cursor = get_state().database, None
    listed: list[dict[str, Any]] = []
    while True:
        page = list_endpoints(database, tenant=tenant, cursor=cursor, limit=100)
        for endpoint in page.items:
            if json_wanted:
                listed.append(_as_json(endpoint))
            else:
                echo(_line(endpoint))
        cursor = page.cursor
        if cursor is None:
            break
    if json_wanted:
        echo_json(listed)


@endpoints.command()
@click.argument("url")
@click.option(
    "--event", "events", multiple=True,
    help="Event type; may be repeated; '*' for all. Every outcome of a job by default.",
)  # fmt: skip
@click.option(
    "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Custom header; may be repeated."
)
@click.option("--secret", help="Signing secret; generated and printed once if omitted.")
@click.option("--format", help="Payload format; the app's by default.")
@click.option("--timeout", "timeout_s", type=float, help="Timeout of an attempt, in seconds.")
@click.option("--attempts", "max_attempts", type=int, help="Maximum attempts.")
@click.option("--retry-schedule", metavar="SECONDS,…", help="Delays between attempts; the app's by default.")
@click.option("--retry-statuses", metavar="STATUS,…", help="Statuses to retry, such as 429,5xx; no others.")
@click.option("--description", help="Description for operators.")
@click.option("--only-tenant", help="Only events of this tenant, which does not see the endpoint.")
def create(events: tuple[str, ...], headers: tuple[str, ...], **options: Any) -> None:
    """Create a standing endpoint that sends to URL."""
    state = get_state()
    try:
        pairs = header_pairs(headers)
    except ValueError as exc:
        raise click.UsageError(f"--header: {exc}") from None
    raw = {**options, "headers": pairs or None, "events": list(events) or None}
    raw = {name: value for name, value in raw.items() if value is not None}
    created = operations.create(state, operations.checked(operations.endpoint_schema(state), raw))
    echo(created.endpoint_id)
    if created.generated:
        echo(f"secret {created.secret} (shown only now)")


@endpoints.command()
@click.argument("endpoint_id", metavar="ID")
@click.option("--secret", help="New signing secret; generated and printed once if omitted.")
@click.option("--grace-hours", type=float, default=ROTATION_GRACE_S / 3600, show_default=True,
              help="Hours for which the old secret also signs.")  # fmt: skip
def rotate(endpoint_id: str, secret: str | None, grace_hours: float) -> None:
    """Give the endpoint ID a new secret."""
    raw = {"grace_s": grace_hours * 3600} | ({} if secret is None else {"secret": secret})
    chosen = operations.rotate(get_state(), endpoint_id, **operations.checked(RotateInput(), raw))
    echo(f"The old secret also signs for {grace_hours:g} h.")
    if secret is None:
        echo(f"secret {chosen} (shown only now)")


@endpoints.command()
@click.argument("endpoint_id", metavar="ID")
def enable(endpoint_id: str) -> None:
    """Let the endpoint ID get deliveries again."""
    operations.enable(get_state(), endpoint_id)
    echo(f"Enabled. `flask rq-webhooks recover --endpoint {endpoint_id}` sends what it missed.")


@endpoints.command()
@click.argument("endpoint_id", metavar="[ID]", required=False)
@click.option("--tenant", help="All endpoints of this tenant instead.")
def disable(endpoint_id: str | None, tenant: str | None) -> None:
    """Stop the endpoint ID from getting new deliveries."""
    if (endpoint_id is None) == (tenant is None):
        raise click.UsageError("Name an endpoint's ID, or a tenant with --tenant.")
    if tenant is not None:
        echo(f"{operations.disable_tenant(get_state(), tenant)} endpoints disabled.")
        return
    assert endpoint_id is not None  # noqa: S101  (one of the two)
    operations.disable(get_state(), endpoint_id)
    echo(f"Disabled. `flask rq-webhooks cancel --endpoint {endpoint_id}` cancels what is pending.")


@endpoints.command()
@click.argument("endpoint_id", metavar="ID")
@click.confirmation_option(prompt="Delete the endpoint with all its deliveries?")
def delete(endpoint_id: str) -> None:
    """Delete the endpoint ID with its deliveries and attempts."""
    state, deleted = get_state(), False
    while not deleted:  # each call deletes as many deliveries as it may
        deleted = operations.delete(state, endpoint_id)
    echo("Deleted.")


def _as_json(endpoint: EndpointView) -> dict[str, Any]:
    listed = shallow(endpoint) | {"url": redact_url(endpoint.url)}
    return {name: value for name, value in listed.items() if name not in _NOT_LISTED}


def _line(endpoint: EndpointView) -> str:
    status = "enabled" if endpoint.enabled else f"disabled ({endpoint.disabled_reason or 'unknown'})"
    events = "every outcome" if endpoint.events is None else ",".join(endpoint.events)
    description = f"  {endpoint.description}" if endpoint.description else ""
    whose = f"  tenant {endpoint.tenant}" if endpoint.tenant else ""
    only = f"  only tenant {endpoint.only_tenant}" if endpoint.only_tenant else ""
    return f"{endpoint.id}  {endpoint.host}  {status}  {endpoint.format}  {events}{whose}{only}{description}"
