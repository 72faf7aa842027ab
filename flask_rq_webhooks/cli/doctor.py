"""``flask rq-webhooks doctor``: what a webhook depends on, looked at one by one.

Every check says what is wrong and what to do. Changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from sqlalchemy import select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..errors import RQWebhooksError, StorageUnavailableError
from ..queue.redis_database import database_name
from ..storage.dispatchers import ALIVE_S, dispatcher_alive, paused_since
from ..storage.models import Endpoint, Secret
from ..storage.schema import missing_schema

if TYPE_CHECKING:
    from ..state import State

#: Seconds two clocks may differ before receivers refuse our timestamps, or leases go wrong.
CLOCKS_S = 5.0
#: The oldest Redis with what the outbox needs (``XAUTOCLAIM``).
MINIMUM_REDIS = (6, 2)
#: Seconds an entry of the outbox may wait; a living dispatcher takes it within one.
UNREAD_S = 60.0
#: Stored values that are decrypted for a look at the keys: the oldest and the newest.
_SAMPLE = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    :param status: ``"ok"``, ``"FAIL"``, or ``"skip"`` for a check that needs one that failed.
    :param text: one line; where something is wrong, with what to do.
    """

    name: str
    status: str
    text: str


class _WrongError(Exception):
    """A check found something wrong."""


def examine(state: State) -> Iterator[Finding]:
    """Run every check; one that needs another that failed says so instead."""
    # What cannot be relied on → what failed first.
    failed: dict[str, str] = {}
    for name, needs, check in _CHECKS:
        root = next((failed[need] for need in needs if need in failed), None)
        if root is not None:
            failed[name] = root
            yield Finding(name, "skip", f"not checked; first mend what `{root}` says.")
            continue
        try:
            yield Finding(name, "ok", check(state))
            continue
        except (_WrongError, RQWebhooksError) as exc:
            text = str(exc)
        except RedisError as exc:
            text = f"Redis refused ({type(exc).__name__}: {exc}); allow our user these commands."
        except SQLAlchemyError as exc:
            text = f"the database refused ({type(exc).__name__}: {exc}); allow our user to use our tables."
        failed[name] = name
        yield Finding(name, "FAIL", " ".join(text.split()))


def _settings(state: State) -> str:
    if not state.settings.enabled:
        raise _WrongError(
            "RQ_WEBHOOKS_ENABLED is off, so no webhooks are accepted; set it to True (it is read from "
            "WEBHOOKS_ENABLED in the environment, too)."
        )
    return f"webhooks are accepted; served under {state.settings.url_prefix or '/'}"


def _redis(state: State) -> str:
    name = database_name(state.redis)
    try:
        facts = state.redis.info()
    except (AuthenticationError, RecursionError) as exc:
        # redis-py 5 calls itself without end where a password is wanted and none was given.
        why = exc if isinstance(exc, AuthenticationError) else "a password is wanted"
        raise _WrongError(
            f"{name} refuses us ({why}); correct user name and password in {_redis_source(state)}."
        ) from exc
    except NoPermissionError as exc:
        raise _WrongError(f"{name} allows our user too little ({exc}); give it the rights of RQ.") from exc
    except RedisError as exc:
        raise _WrongError(
            f"{name} does not answer ({type(exc).__name__}: {exc}); start it, or correct "
            f"{_redis_source(state)}."
        ) from exc
    version = str(facts.get("redis_version", "0"))
    major, minor, *_ = [int(part) for part in version.split(".")[:2]] + [0, 0]
    if (major, minor) < MINIMUM_REDIS:
        raise _WrongError(f"version {version} is too old; install Redis 6.2 or newer, or any Valkey.")
    if facts.get("role") == "slave":
        raise _WrongError(f"{name} is a replica, which takes no writes; name its primary.")
    if state.redis.get_encoder().decode_responses:
        raise _WrongError(
            "the client decodes what it reads (decode_responses=True), and RQ cannot read its jobs so; make "
            "it without, for RQ and for us."
        )
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    if int(facts.get("maxmemory", 0)) and policy.startswith("allkeys"):
        raise _WrongError(
            f"with maxmemory-policy {policy} {name} throws away jobs and our outbox when its memory is "
            "full; run `CONFIG SET maxmemory-policy noeviction`, and write it into its configuration."
        )
    return f"{name}, version {version}"


def _redis_source(state: State) -> str:
    return "what RQWebhooks(redis=...) gets" if state.redis_is_given else "RQ_WEBHOOKS_REDIS_URL"


def _sql(state: State) -> str:
    where = "RQ_WEBHOOKS_DATABASE_URI"
    if state.settings.database_uri is None:
        bind_key = state.settings.bind_key
        where = f"SQLALCHEMY_BINDS[{bind_key!r}]" if bind_key else "SQLALCHEMY_DATABASE_URI"
    try:
        with state.database.read() as connection:
            connection.execute(select(1)).scalar_one()
    except ModuleNotFoundError as exc:
        raise _WrongError(
            f"{where} needs the driver {exc.name!r}, which is not installed; for PostgreSQL run `pip install "
            "'flask-rq-webhooks[postgres]'` and begin the URL with postgresql+psycopg://."
        ) from exc
    except ArgumentError as exc:
        # Without its text, which may hold the URL with its password.
        raise _WrongError(
            f"{where} is not usable ({type(exc).__name__}); write it as "
            "postgresql+psycopg://user:password@host/database or sqlite:///file."
        ) from None
    except StorageUnavailableError as exc:
        raise _WrongError(f"{str(exc).rstrip('.')}; start the database, or correct {where}.") from exc
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
    cipher = state.cipher  # also where nothing is stored yet
    with state.database.read() as connection:
        stored: list[str] = []
        for column, key in ((Secret.secret, Secret.id), (Endpoint.headers, Endpoint.id)):
            for order in (key.asc(), key.desc()):
                query = select(column).where(column.is_not(None)).order_by(order).limit(_SAMPLE)
                stored += [text for text in connection.execute(query).scalars() if text is not None]
    for text in stored:
        cipher.decrypt(text)
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
    function = state.hooks.authorize_function
    if function is None:
        raise _WrongError(
            "none is registered, so status, API and dashboard answer 403; register one with "
            "@webhooks.authorize."
        )
    if inspect.iscoroutinefunction(function):
        raise _WrongError(
            "it is `async def`, which is not waited for, so everything is answered 403; make it a plain "
            "`def` that returns True or False."
        )
    return "registered"


def _queues(state: State) -> str:
    queues, workers = state.redis.scard("rq:queues"), state.redis.scard("rq:workers")
    if not queues:
        return (
            f"no RQ queue is in {database_name(state.redis)} yet; if your jobs are elsewhere, correct "
            f"{_redis_source(state)}"
        )
    return f"{queues} RQ queues and {workers} RQ workers are in {database_name(state.redis)}"


def _outbox(state: State) -> str:
    rejected = state.redis.xlen(state.outbox.rejected_key)
    if rejected:
        raise _WrongError(
            f"{rejected} entries were set aside as unusable; look at them with `XRANGE "
            f"{state.outbox.rejected_key} - +`, and `DEL` that key when done."
        )
    waiting = state.outbox.length()
    if waiting >= state.settings.outbox_maxlen:
        raise _WrongError(
            f"{waiting} entries wait and the stream is full, so older ones are trimmed and left to "
            "reconcile; start `flask rq-webhooks worker` with this Redis and database, or see its log."
        )
    waited_s = _oldest_entry_s(state)
    if waited_s > UNREAD_S:
        raise _WrongError(
            f"{waiting} entries wait, the oldest for {waited_s:.0f} s, so no dispatcher reads them, or too "
            "few do; start `flask rq-webhooks worker` with this Redis and database, or see its log."
        )
    return f"{waiting} entries wait"


def _oldest_entry_s(state: State) -> float:
    entries: Any = state.redis.xrange(state.outbox.key, count=1)
    if not entries:
        return 0.0
    entry_id = entries[0][0]
    milliseconds = int((entry_id if isinstance(entry_id, str) else entry_id.decode()).partition("-")[0])
    seconds, microseconds = state.redis.time()
    return float(seconds) + float(microseconds) / 1e6 - milliseconds / 1000


#: Name, what it needs to be right, and the check: what it needs stands above it.
_CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[State], str]], ...] = (
    ("settings", (), _settings),
    ("redis", (), _redis),
    ("sql", (), _sql),
    ("tables", ("sql",), _tables),
    ("keys", ("tables",), _keys),
    ("dispatcher", ("tables",), _dispatcher),
    ("clock", ("sql", "redis"), _clock),
    ("permission function", (), _permission),
    ("queue database", ("redis",), _queues),
    ("outbox", ("redis", "tables"), _outbox),
)
