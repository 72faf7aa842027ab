"""What is remembered of trees: which jobs belong to one, and how they were when last seen.

Owns the statements behind :mod:`~flask_rq_webhooks.observe.job_trees`. Knows nothing of Redis:
its callers say what RQ has. A member of a tree, a job found below its roots, has a watch of the status
:data:`~flask_rq_webhooks.storage.models.MEMBER`, which keeps the member's last known status as its
``evidence``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import bindparam, func, select, update

from .bulk_insert import chunks_of, insert_or_update, one_of
from .database import Database
from .models import CLOSED, MEMBER, OPEN, RESERVED, SETTLED, Endpoint, Watch, new_id


@dataclass(frozen=True, slots=True)
class TreeRow:
    """One job of a tree as SQL remembers it.

    :param root: whether a request enqueued it itself; the others were found below.
    :param last_status: of a member, when it was last seen.
    """

    watch_id: str
    endpoint_id: str
    job_id: str
    status: str
    run: str | None
    root: bool
    last_status: str | None
    missing_passes: int
    created_at: datetime


def open_trees(database: Database, *, after: str = "", limit: int = 200) -> list[str]:
    """Return ids of endpoints with a tree that was not reported yet, by id."""
    query = _OPEN.where(Watch.endpoint_id > after).order_by(Watch.endpoint_id).limit(limit)
    with database.read() as connection:
        return [endpoint_id for endpoint_id in connection.execute(query).scalars() if endpoint_id is not None]


def open_trees_of(database: Database, job_ids: Collection[str]) -> list[str]:
    """Return the same for those trees that jobs are known to be part of, by id."""
    found: set[str] = set()
    query = _OPEN.where(one_of(database, Watch.job_id, "jobs"))
    for chunk in chunks_of(sorted(job_ids)):
        with database.read() as connection:
            found.update(row.endpoint_id for row in connection.execute(query, {"jobs": chunk}))
    return sorted(found)


_OPEN = (
    select(Watch.endpoint_id)
    .join(Endpoint, Endpoint.id == Watch.endpoint_id)
    .where(
        Watch.status.in_([OPEN, RESERVED, MEMBER]),
        Endpoint.scope == "tree",
        Endpoint.kind != "standing",
    )
    .distinct()
)


def load_trees(database: Database, endpoint_ids: Sequence[str]) -> dict[str, list[TreeRow]]:
    """Return the known jobs of each tree, in the order in which they became known."""
    trees: dict[str, list[TreeRow]] = {endpoint_id: [] for endpoint_id in endpoint_ids}
    for chunk in chunks_of(sorted(trees)):
        query = (
            select(
                Watch.id, Watch.endpoint_id, Watch.job_id, Watch.status, Watch.run, Watch.evidence,
                Watch.missing_passes, Watch.created_at, Watch.confirmed_at,
            )
            .where(Watch.endpoint_id.in_(chunk), Watch.status != CLOSED)
            .order_by(Watch.id)
        )  # fmt: skip
        with database.read() as connection:
            for row in connection.execute(query):
                root = row.status != MEMBER
                trees[row.endpoint_id].append(
                    TreeRow(
                        row.id, row.endpoint_id, row.job_id, row.status, row.run, root,
                        None if root else row.evidence, row.missing_passes, row.created_at,
                    )
                )  # fmt: skip
    return trees


def remember_members(
    database: Database,
    endpoint_id: str,
    *,
    found: Mapping[str, str],
    changed: Mapping[str, str],
) -> None:
    """Note jobs found below a root, so that the tree is known when the root's own record is gone.

    :param found: new members: job id → status.
    :param changed: known members that changed: watch id → status.
    """
    if not found and not changed:
        return
    now = datetime.now(UTC)
    with database.write() as connection:
        tenant = select(Endpoint.tenant).where(Endpoint.id == endpoint_id).scalar_subquery()
        rows = [
            {"id": new_id("wat"), "endpoint_id": endpoint_id, "job_id": job_id, "status": MEMBER,
             "evidence": status, "missing_passes": 0, "created_at": now, "tenant": tenant}
            for job_id, status in sorted(found.items())
        ]  # fmt: skip
        for chunk in chunks_of(rows):
            connection.execute(
                # A member of a tree that was reported and began again.
                insert_or_update(
                    database, Watch, chunk,
                    index=("job_id", "endpoint_id"),
                    changes={"status": MEMBER, "settled_at": None},
                    where=Watch.status == CLOSED,
                )
            )  # fmt: skip
        if changed:
            connection.execute(
                update(Watch)
                .where(Watch.id == bindparam("watch"), Watch.status == MEMBER)
                .values(evidence=bindparam("status_seen")),
                [{"watch": watch_id, "status_seen": status} for watch_id, status in sorted(changed.items())],
            )


def settle_tree(
    database: Database, endpoint_id: str, *, run: str, runs: Mapping[str, str], now: datetime | None = None
) -> None:
    """Note that a tree was reported: its roots are settled, its members need no look any more.

    :param run: the run the tree was reported under, of roots that nothing else is known of.
    :param runs: job id → the run a root was in.
    """
    now = now or datetime.now(UTC)
    of_tree = Watch.endpoint_id == endpoint_id
    with database.write() as connection:
        roots = update(Watch).where(of_tree, Watch.status.in_([OPEN, RESERVED]))
        settled = {"status": SETTLED, "settled_at": now, "missing_passes": 0, "recheck_at": now}
        for job_id, current in sorted(runs.items()):
            connection.execute(roots.where(Watch.job_id == job_id).values(run=current, **settled))
        connection.execute(roots.values(run=func.coalesce(Watch.run, run), **settled))
        connection.execute(
            update(Watch).where(of_tree, Watch.status == MEMBER).values(status=CLOSED, settled_at=now)
        )
