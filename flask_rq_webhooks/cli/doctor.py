"""``flask rq-webhooks doctor``: check what webhooks depend on, one by one.

Every check says what is wrong and how to fix it. Changes nothing. The checks of the app itself are in
:mod:`.host_checks`, the sentences about SQL and Redis in :mod:`.failures`.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..config import PREFIX, SECRET_FROM_ENVIRONMENT
from ..dispatch.http import NAT64_WAIT_S, Lookups, find_nat64, system_resolver
from ..queue.job_callbacks import SameDatabase, databases_elsewhere
from ..queue.outbox import age_of_oldest, missing_reports
from ..queue.redis_database import database_name
from ..storage.crypto import stored_samples
from ..storage.dispatchers import ALIVE_S, dispatcher_alive, paused_since
from ..storage.schema import missing_schema
from . import host_checks
from .failures import EXPLAINED, explain, redis_source
from .host_checks import WrongError

if TYPE_CHECKING:
    from ..state import State

#: Seconds two clocks may differ before receivers refuse our timestamps, or leases go wrong.
CLOCKS_S = 5.0
#: The oldest Redis with what the outbox needs (``XAUTOCLAIM``).
MINIMUM_REDIS = (6, 2)
#: Seconds an entry of the outbox may wait; a living dispatcher takes it within one.
UNREAD_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    :param status: ``"ok"``, ``"FAIL"``, or ``"skip"`` for a check that needs one that failed.
    :param text: one line; where something is wrong, with what to do.
    """

    name: str
    status: str
    text: str


def examine(state: State) -> Iterator[Finding]:
    """Run every check; one that needs another that failed says so instead."""
    # What cannot be relied on → what failed first.
    failed: dict[str, str] = {}
    for name, needs, check in _CHECKS:
        root = next((failed[need] for need in needs if need in failed), None)
        if root is not None:
            failed[name] = root
            yield Finding(name, "skip", f"skipped: fix the `{root}` check first.")
            continue
        try:
            yield Finding(name, "ok", check(state))
            continue
        except WrongError as exc:
            text = str(exc)
        except EXPLAINED as exc:
            text = explain(exc, state)
        failed[name] = name
        yield Finding(name, "FAIL", " ".join(text.split()))


def _settings(state: State) -> str:
    if not state.settings.enabled:
        raise WrongError(
            "RQ_WEBHOOKS_ENABLED is off, so no webhooks are accepted; set it to True (it is read from "
            "WEBHOOKS_ENABLED in the environment, too)."
        )
    served = f"webhooks are accepted; served under {state.settings.url_prefix or '/'}"
    if state.settings.signing_secret is not None and f"{PREFIX}SIGNING_SECRET" not in state.app.config:
        return f"{served}. {SECRET_FROM_ENVIRONMENT}"
    return served


def _redis(state: State) -> str:
    name, facts = database_name(state.redis), state.redis.info()
    version = str(facts.get("redis_version", "0"))
    major, minor, *_ = [int(part) for part in version.split(".")[:2]] + [0, 0]
    if (major, minor) < MINIMUM_REDIS:
        raise WrongError(f"version {version} is too old; install Redis 6.2 or newer, or any Valkey.")
    if facts.get("role") == "slave":
        raise WrongError(f"{name} is a replica, which takes no writes; name its primary.")
    if state.redis.get_encoder().decode_responses:
        raise WrongError(
            "the client has decode_responses=True, with which RQ cannot read its jobs; create it without, "
            "for RQ and for us."
        )
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    if int(facts.get("maxmemory", 0)) and policy.startswith("allkeys"):
        raise WrongError(
            f"with maxmemory-policy {policy} {name} deletes jobs and our outbox when its memory is "
            "full; run `CONFIG SET maxmemory-policy noeviction`, and write it into its configuration."
        )
    return f"{name}, version {version}"


def _sql(state: State) -> str:
    database, url = state.database, state.database.url
    with database.read() as connection:
        database.now(connection)
        slow = database.is_sqlite and not database.in_memory and not connection.info["rq_webhooks_wal"]
    found = f"{url.get_backend_name()}, database {url.database or '(in memory)'}"
    if not slow:
        return found
    return (
        f"{found}; not in WAL mode, so that processes wait for each other: a registration takes 15.5 ms "
        f"instead of 6.8, a claim 18 ms instead of 3.8 (measured); to change it, for the host as well, run "
        f"`sqlite3 {shlex.quote(url.database or '')} 'PRAGMA journal_mode=WAL'`"
    )


def _tables(state: State) -> str:
    missing = missing_schema(state.database)
    if missing:
        raise WrongError(
            f"missing: {', '.join(missing.lines())}; run `flask rq-webhooks init-db`, or your migrations."
        )
    return "complete and of this version"


def _keys(state: State) -> str:
    cipher = state.cipher  # also where nothing is stored yet
    stored = stored_samples(state.database)
    for text in stored:
        cipher.decrypt(text)
    return f"the key decrypts what is stored ({len(stored)} samples)" if stored else "nothing is stored yet"


def _dispatcher(state: State) -> str:
    if not dispatcher_alive(state.database):
        raise WrongError(
            f"no heartbeat for {ALIVE_S:.0f} s, so nothing is delivered; start `flask rq-webhooks worker`."
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
            raise WrongError(
                f"the clock of {name} and this machine's are {abs(off_s):.0f} s apart; receivers refuse "
                "timestamps that are off, so synchronise them (NTP)."
            )
    return f"SQL {sql_off_s:+.2f} s, Redis {redis_off_s:+.2f} s from this machine"


def _queues(state: State) -> str:
    elsewhere = databases_elsewhere(SameDatabase(state.redis), vars(state.app), state.app.extensions)
    if elsewhere:
        raise WrongError(
            f"this app has queues in {', '.join(elsewhere)}, but we use {database_name(state.redis)}: jobs "
            f"there run without webhooks; correct {redis_source(state)}."
        )
    queues, workers = state.redis.scard("rq:queues"), state.redis.scard("rq:workers")
    if not queues:
        return (
            f"no RQ queue is in {database_name(state.redis)} yet; if your jobs are elsewhere, correct "
            f"{redis_source(state)}"
        )
    return f"{queues} RQ queues and {workers} RQ workers are in {database_name(state.redis)}"


def _outbox(state: State) -> str:
    rejected = state.outbox.rejected()
    if rejected:
        raise WrongError(
            f"{rejected} malformed entries were set aside; read them with `XRANGE "
            f"{state.outbox.rejected_key} - +`, and `DEL` that key afterwards."
        )
    silent = state.outbox.silent_callbacks()
    if silent:
        raise WrongError(" ".join(missing_reports(state.outbox, silent)))
    waiting = state.outbox.length()
    if waiting >= state.settings.outbox_maxlen:
        raise WrongError(
            f"{waiting} entries wait and the stream is full, so older ones are trimmed and left to "
            "reconcile; start `flask rq-webhooks worker` with this Redis and database, or see its log."
        )
    waited_s = age_of_oldest(state.redis, state.outbox.key) or 0.0
    if waited_s > UNREAD_S:
        raise WrongError(
            f"{waiting} entries wait, the oldest for {waited_s:.0f} s, so no dispatcher reads them, or too "
            "few do; start `flask rq-webhooks worker` with this Redis and database, or see its log."
        )
    return f"{waiting} entries wait"


def _network(state: State) -> str:
    if state.settings.proxy_url is not None:
        return "receivers are reached through RQ_WEBHOOKS_PROXY_URL, which decides about addresses"
    prefixes = find_nat64(Lookups(system_resolver, limit=1), time.monotonic() + NAT64_WAIT_S)
    if not prefixes:
        return "no NAT64 found"
    named = ", ".join(map(str, prefixes))
    if state.settings.allow_nat64:
        return f"NAT64 with the prefix {named}, which RQ_WEBHOOKS_ALLOW_NAT64 lets receivers be reached by"
    if not _has_ipv4():
        raise WrongError(
            f"this machine has no IPv4, and with NAT64 (prefix {named}) receivers that have IPv4 only are "
            "refused; set RQ_WEBHOOKS_ALLOW_NAT64 to True."
        )
    return f"NAT64 with the prefix {named}; receivers that have IPv4 only are reached by IPv4"


def _has_ipv4() -> bool:
    """Say whether this machine has a route to public IPv4 addresses; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.0.170", 443))
        except OSError:
            return False
    return True


#: Name, the checks above that it needs, and the check.
_CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[State], str]], ...] = (
    ("settings", (), _settings),
    ("redis", (), _redis),
    ("sql", (), _sql),
    ("tables", ("sql",), _tables),
    ("keys", ("tables",), _keys),
    ("dispatcher", ("tables",), _dispatcher),
    ("clock", ("sql", "redis"), _clock),
    ("permission function", (), host_checks.permission_function),
    ("routes", (), host_checks.routes),
    ("layout", (), host_checks.layout),
    ("sessions", (), host_checks.sessions),
    ("queue database", ("redis",), _queues),
    ("outbox", ("redis", "tables"), _outbox),
    ("network", (), _network),
)
