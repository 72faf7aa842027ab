"""Standing endpoints: made by operators and tenants, changed, disabled, deleted.

Owns their rows and secrets. :func:`.endpoints.register` inserts the job-bound endpoints. Does not validate
URLs: callers have done so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, select, text, update

from ..errors import RQWebhooksError
from .crypto import Cipher
from .database import Database
from .endpoints import NewEndpoint, encrypted_headers, insertion, rows_of, secret_row
from .models import ALPHABET, Attempt, Delivery, Endpoint, Secret, encoded, new_id

#: Seconds for which a replaced secret keeps signing after its replacement.
ROTATION_GRACE_S = 86400.0


#: First key of the advisory lock held while an endpoint is created and a tenant's are counted; no other lock
#: of ours uses it.
CREATE_LOCK_CLASS = 0x7271_7771


class TenantLimitError(RQWebhooksError):
    """The tenant has as many endpoints as ``RQ_WEBHOOKS_MAX_ENDPOINTS_PER_TENANT`` allows."""


class ExistsError(Exception):
    """An endpoint was already created with the same idempotency key.

    :param endpoint_id: its id.
    """

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(f"The endpoint {endpoint_id} was made with this key.")
        self.endpoint_id = endpoint_id


def create_standing(
    database: Database,
    cipher: Cipher,
    endpoint: NewEndpoint,
    *,
    namespace: str,
    idempotency_key: str | None = None,
    at_most: int = 0,
) -> str:
    """Store a standing endpoint and return its id.

    :param at_most: standing endpoints that its tenant may have, including this one; 0 for no limit.
    :param idempotency_key: the endpoint's id is derived from it, so that only one is created, however many
        requests with it arrive at once. Such ids do not sort by time.
    :raises ExistsError: when an endpoint with this key exists.
    :raises TenantLimitError: when the tenant has *at_most* endpoints already.
    """
    if endpoint.kind != "standing":
        raise ValueError(f"expected kind 'standing', got {endpoint.kind!r}")
    endpoint_id = new_id("ep" + namespace)
    if idempotency_key is not None:
        # Keys contain no NUL. Two tenants may use the same key.
        owner = "" if endpoint.tenant is None else f"{endpoint.tenant}\0"
        number = int.from_bytes(blake2b((owner + idempotency_key).encode(), digest_size=17).digest())
        letters = (ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
        endpoint_id = f"ep{namespace}_{''.join(letters)}"
    with database.write() as connection:
        if not database.is_sqlite:  # which has one writer at a time
            one_at_a_time = text("SELECT pg_advisory_xact_lock(:class, hashtext(:owner))")
            connection.execute(one_at_a_time, {"class": CREATE_LOCK_CLASS, "owner": endpoint.tenant or ""})
        if connection.execute(select(Endpoint.id).where(Endpoint.id == endpoint_id)).first() is not None:
            raise ExistsError(endpoint_id)
        theirs = select(func.count()).where(Endpoint.tenant == endpoint.tenant, Endpoint.kind == "standing")
        limited = endpoint.tenant is not None and at_most
        if limited and connection.execute(theirs).scalar_one() >= at_most:
            raise TenantLimitError(f"At most {at_most} endpoints are possible; delete one first.")
        rows = rows_of(cipher, endpoint, endpoint_id, datetime.now(UTC))
        for statement, values in insertion(database, rows):
            connection.execute(statement, values)
    return endpoint_id


#: What :func:`update_standing` may change; other fields have their own functions, or are fixed.
CHANGEABLE = {one.name for one in fields(NewEndpoint)} - {"secret", "kind", "scope", "tenant", "trace"}


def update_standing(
    database: Database,
    cipher: Cipher,
    endpoint_id: str,
    changes: Mapping[str, Any],
    *,
    tenant: str | None = None,
) -> bool:
    """Change a standing endpoint. Waiting deliveries go to the new URL; their bytes do not change.

    :param changes: attributes of :class:`NewEndpoint`, those in :data:`CHANGEABLE`. ``url`` and ``host``
        go together.
    :param tenant: only an endpoint of this tenant, as in the functions below.
    :returns: whether there is such an endpoint.
    """
    unknown = set(changes) - CHANGEABLE
    if unknown:
        raise ValueError(f"cannot change {sorted(unknown)}")
    if ("url" in changes) != ("host" in changes):
        raise ValueError("url and host go together")
    values = encoded(changes)
    if "headers" in values:
        values["headers"] = encrypted_headers(cipher, values["headers"])
    with database.write() as connection:
        changed = connection.execute(
            update(Endpoint)
            .where(*_this_standing(endpoint_id, tenant))
            .values(**values, updated_at=database.clock())
        ).rowcount
        if changed and "host" in changes:
            waiting = update(Delivery).where(
                Delivery.endpoint_id == endpoint_id,
                Delivery.status == "pending",
                Delivery.host != changes["host"],
            )
            connection.execute(waiting.values(host=changes["host"]))
    return changed == 1


def rotate_secret(
    database: Database,
    cipher: Cipher,
    endpoint_id: str,
    secret: str,
    *,
    grace_s: float = ROTATION_GRACE_S,
    tenant: str | None = None,
) -> bool:
    """Give a standing endpoint a new secret; the old ones also sign for *grace_s* seconds.

    :returns: whether there is such an endpoint.
    """
    now = datetime.now(UTC)
    with database.write() as connection:
        # The update also makes concurrent rotations wait for each other.
        found = connection.execute(
            update(Endpoint).where(*_this_standing(endpoint_id, tenant)).values(updated_at=now)
        ).rowcount
        if not found:
            return False
        connection.execute(
            delete(Secret).where(Secret.endpoint_id == endpoint_id, Secret.expires_at <= database.clock())
        )
        connection.execute(
            update(Secret)
            .where(Secret.endpoint_id == endpoint_id, Secret.expires_at.is_(None))
            .values(expires_at=database.clock(grace_s))
        )
        connection.execute(insert(Secret).values(secret_row(cipher, secret, endpoint_id, now)))
    return True


def enable_standing(database: Database, endpoint_id: str, *, tenant: str | None = None) -> bool:
    """Let a standing endpoint get deliveries again, with its failures reset.

    What it missed is delivered by :func:`~.deliveries.recover_part`.

    :returns: whether there is such an endpoint.
    """
    return _set_enabled(database, _this_standing(endpoint_id, tenant), reason=None) == 1


def disable_standing(
    database: Database, endpoint_id: str, *, reason: str = "operator", tenant: str | None = None
) -> bool:
    """Stop a standing endpoint from getting new deliveries. Waiting ones are still sent.

    :returns: whether there is such an endpoint.
    """
    return _set_enabled(database, _this_standing(endpoint_id, tenant), reason=reason) == 1


def disable_tenant(database: Database, tenant: str) -> int:
    """Disable every standing endpoint of a tenant; return how many were enabled."""
    theirs: list[ColumnElement[bool]] = [
        Endpoint.tenant == tenant,
        Endpoint.kind == "standing",
        Endpoint.enabled.is_(True),
    ]
    return _set_enabled(database, theirs, reason="operator")


def delete_standing_part(
    database: Database, endpoint_id: str, *, at_most: int = 1000, tenant: str | None = None
) -> bool | None:
    """Disable a standing endpoint and delete some of its deliveries; with the last ones, the endpoint too.

    :param at_most: maximum number of deliveries, deleted in one transaction.
    :returns: whether it is deleted now; otherwise call again. ``None``: there is no such endpoint.
    """
    if not disable_standing(database, endpoint_id, reason="deleted", tenant=tenant):
        return None
    some = select(Delivery.id).where(Delivery.endpoint_id == endpoint_id).limit(at_most)
    with database.write() as connection:
        ids = connection.execute(some).scalars().all()
        if ids:
            connection.execute(delete(Attempt).where(Attempt.delivery_id.in_(ids)))
            connection.execute(delete(Delivery).where(Delivery.id.in_(ids)))
        if len(ids) == at_most:
            return False
        # In the transaction that saw no further delivery; one created in the meantime is deleted by cascade.
        connection.execute(delete(Endpoint).where(Endpoint.id == endpoint_id))
    return True


def _this_standing(endpoint_id: str, tenant: str | None) -> list[ColumnElement[bool]]:
    this: list[ColumnElement[bool]] = [Endpoint.id == endpoint_id, Endpoint.kind == "standing"]
    return this if tenant is None else [*this, Endpoint.tenant == tenant]


def _set_enabled(database: Database, which: Sequence[ColumnElement[bool]], *, reason: str | None) -> int:
    """Enable endpoints, or disable them for a *reason*; return how many there are."""
    enabled = reason is None
    with database.write(single_statement=True) as connection:
        changed = connection.execute(
            update(Endpoint)
            .where(*which)
            .values(
                enabled=enabled,
                disabled_reason=reason,
                disabled_at=None if enabled else func.coalesce(Endpoint.disabled_at, database.clock()),
                failures=0,
                failing_since=None,
                updated_at=database.clock(),
            )
        )
    return changed.rowcount
