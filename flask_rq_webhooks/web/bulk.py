"""Recover and cancel by filter, and delete an endpoint with all it has: as much as one request may do.

Owns the bound: so many deliveries and so much time, then the caller is told what is left and how to go on.
Pages and API share it; the command line has all the time it needs and does not come here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..observe.host_hooks import safe_render
from ..state import State
from ..storage import bulk, endpoints
from ..storage.bulk import Step
from ..storage.filters import DeliveryFilter

#: Deliveries that one request changes at most, and how many in one transaction.
AT_MOST, PER_PART = 1000, 500
#: Seconds after which a request begins nothing further.
ENOUGH_S = 2.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What one request did.

    :param done: deliveries.
    :param cursor: where the next request goes on; ``None`` when everything is done.
    :param remaining: deliveries that are left, up to ``COUNT_CAP`` and one more; ``None`` where nobody knows,
        because they are still to be made.
    """

    done: int
    cursor: str | None = None
    remaining: int | None = 0


def recover_some(state: State, where: DeliveryFilter, cursor: str | None) -> Progress:
    """Make deliveries due again; see :func:`~flask_rq_webhooks.storage.bulk.recover_part`.

    :param cursor: of the request before.
    :raises CursorError: when *cursor* is not one of ours.
    """
    render = safe_render(state)

    def step(*, cursor: str | None, at_most: int) -> bulk.Part:
        return bulk.recover_part(
            state.database,
            where,
            render=render,
            max_attempts=state.settings.max_attempts,
            cursor=cursor,
            at_most=at_most,
        )

    done, cursor = _some(step, cursor)
    if cursor is None:
        return Progress(done)
    return Progress(done, cursor, bulk.left_to_recover(state.database, where, cursor))


def cancel_some(state: State, where: DeliveryFilter, cursor: str | None) -> Progress:
    """Cancel deliveries; see :func:`~flask_rq_webhooks.storage.bulk.cancel_part`.

    :param cursor: of the request before.
    :raises CursorError: when *cursor* is not one of ours.
    """

    def step(*, cursor: str | None, at_most: int) -> bulk.Part:
        return bulk.cancel_part(state.database, where, cursor=cursor, at_most=at_most)

    done, cursor = _some(step, cursor)
    if cursor is None:
        return Progress(done)
    return Progress(done, cursor, bulk.left_to_cancel(state.database, where, cursor))


def delete_endpoint_some(state: State, endpoint_id: str) -> bool | None:
    """Delete a standing endpoint, or as many of its deliveries as time allows.

    :returns: see :func:`~flask_rq_webhooks.storage.endpoints.delete_standing_part`.
    """
    began = time.monotonic()
    deleted = endpoints.delete_standing_part(state.database, endpoint_id)
    while deleted is False and time.monotonic() - began < ENOUGH_S:
        deleted = endpoints.delete_standing_part(state.database, endpoint_id)
    return deleted


def _some(step: Step, cursor: str | None) -> tuple[int, str | None]:
    began = time.monotonic()
    part = step(cursor=cursor, at_most=PER_PART)
    done = part.done
    while part.cursor is not None and done < AT_MOST and time.monotonic() - began < ENOUGH_S:
        part = step(cursor=part.cursor, at_most=min(PER_PART, AT_MOST - done))
        done += part.done
    return done, part.cursor
