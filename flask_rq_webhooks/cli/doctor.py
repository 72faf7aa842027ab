"""``flask rq-webhooks doctor``: what a webhook depends on, looked at one by one.

Every check says what is wrong and what to do. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from redis import RedisError
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from ..capture.rq_state import database_name
from ..errors import RQWebhooksError
from ..storage.dispatchers import ALIVE_S, dispatcher_alive, paused_since
from ..storage.models import Endpoint, Secret
from ..storage.schema import missing_schema

if TYPE_CHECKING:
    from ..state import State

#: Seconds two clocks may differ before receivers refuse our timestamps, or leases go wrong.
CLOCKS_S = 5.0
#: The oldest Redis with what the outbox needs (``XAUTOCLAIM``).
MINIMUM_REDIS = (6, 2)
#: Stored values that are decrypted for a look at the keys: the oldest and the newest.
_SAMPLE = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    :param text: one line; where not *ok*, with what to do.
    """

    name: str
    ok: bool
    text: str


class _WrongError(Exception):
    """A check found something wrong."""


def examine(state: State) -> Iterator[Finding]:
    """Run every check, one that cannot be run because of an earlier one included."""
    checks: tuple[tuple[str, Callable[[State], str]], ...] = (
        ("redis", _redis),
        ("sql", _sql),
        ("tables", _tables),
        ("keys", _keys),
        ("dispatcher", _dispatcher),
        ("clock", _clock),
        ("permission function", _permission),
        ("queue database", _queues),
        ("outbox", _outbox),
    )
    for name, check in checks:
        try:
            yield Finding(name, True, check(state))
        except (_WrongError, RQWebhooksError) as exc:
            yield Finding(name, False, str(exc))
        except RedisError as exc:
            yield Finding(name, False, f"Redis cannot be asked: {type(exc).__name__}: {exc}")
        except SQLAlchemyError as exc:
            yield Finding(name, False, f"the database cannot be asked: {type(exc).__name__}: {exc}")


def _redis(state: State) -> str:
    try:
        version = str(state.redis.info("server").get("redis_version", "0"))
    except RedisError as exc:
        raise _WrongError(
            f"{database_name(state.redis)} does not answer ({type(exc).__name__}: {exc}); start it, or "
            "correct RQ_WEBHOOKS_REDIS_URL."
        ) from exc
    major, minor, *_ = [int(part) for part in version.split(".")[:2]] + [0, 0]
    if (major, minor) < MINIMUM_REDIS:
        raise _WrongError(f"version {version} is too old; Redis 6.2, or any Valkey, is needed.")
    return f"{database_name(state.redis)}, version {version}"


def _sql(state: State) -> str:
    with state.database.read() as connection:
        connection.execute(select(1)).scalar_one()
    url = state.database.url
    return f"{url.get_backend_name()}, database {url.database or '(in memory)'}"


def _tables(state: State) -> str:
    missing = missing_schema(state.database)
    if missing:
        raise _WrongError(
            f"missing: {', '.join(missing.lines())}; run `flask rq-webhooks init-db`, or your migrations."
        )
    return "complete and of this version"


def _keys(state: State) -> str:
    with state.database.read() as connection:
        stored: list[str] = []
        for column, key in ((Secret.secret, Secret.id), (Endpoint.headers, Endpoint.id)):
            for order in (key.asc(), key.desc()):
                query = select(column).where(column.is_not(None)).order_by(order).limit(_SAMPLE)
                stored += [text for text in connection.execute(query).scalars() if text is not None]
    for text in stored:
        state.cipher.decrypt(text)
    return f"the key opens what is stored ({len(stored)} samples)" if stored else "nothing is stored yet"


def _dispatcher(state: State) -> str:
    if not dispatcher_alive(state.database):
        raise _WrongError(
            f"none has shown a sign of life for {ALIVE_S:.0f} s, so nothing is delivered; start "
            "`flask rq-webhooks worker`."
        )
    since = paused_since(state.database)
    return "alive" if since is None else f"alive; all sending is paused since {since:%Y-%m-%d %H:%M} UTC"


def _clock(state: State) -> str:
    with state.database.read() as connection:
        sql_off_s = (state.database.now(connection) - datetime.now(UTC)).total_seconds()
    seconds, microseconds = state.redis.time()
    redis_off_s = seconds + microseconds / 1e6 - datetime.now(UTC).timestamp()
    for name, off_s in (("the SQL server", sql_off_s), ("Redis", redis_off_s)):
        if abs(off_s) > CLOCKS_S:
            raise _WrongError(
                f"the clock of {name} and this machine's are {abs(off_s):.0f} s apart; receivers refuse "
                "timestamps that are off, so synchronise them (NTP)."
            )
    return f"SQL {sql_off_s:+.2f} s, Redis {redis_off_s:+.2f} s from this machine"


def _permission(state: State) -> str:
    if state.hooks.authorize_function is None:
        raise _WrongError(
            "none is registered, so status, API and dashboard answer 403; register one with "
            "@webhooks.authorize."
        )
    return "registered"


def _queues(state: State) -> str:
    queues = state.redis.scard("rq:queues")
    if not queues:
        return (
            f"no RQ queue is in {database_name(state.redis)} yet; if your jobs are elsewhere, correct "
            "RQ_WEBHOOKS_REDIS_URL"
        )
    return f"{queues} RQ queues are in {database_name(state.redis)}"


def _outbox(state: State) -> str:
    rejected = state.redis.xlen(state.outbox.rejected_key)
    if rejected:
        raise _WrongError(
            f"{rejected} entries were set aside as unusable; look at them with `XRANGE "
            f"{state.outbox.rejected_key} - +`, and DEL that key when done."
        )
    waiting = state.outbox.length()
    if waiting >= state.settings.outbox_maxlen:
        raise _WrongError(
            f"{waiting} entries wait and the stream is full; older ones are trimmed and left to reconcile. "
            "Start more dispatchers, or see why they do not read."
        )
    return f"{waiting} entries wait"
