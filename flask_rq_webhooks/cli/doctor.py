"""``flask rq-webhooks doctor``: check what webhooks depend on, one by one.

Every check says what is wrong and how to fix it. No check changes anything.
"""

from __future__ import annotations

import inspect
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateNotFound, TemplateSyntaxError, nodes
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.routing.exceptions import RequestRedirect

from ..config import PREFIX, SECRET_FROM_ENVIRONMENT
from ..dispatch.http import NAT64_WAIT_S, Lookups, find_nat64, system_resolver
from ..queue.job_callbacks import SameDatabase, databases_elsewhere
from ..queue.outbox import age_of_oldest, missing_reports
from ..queue.redis_database import database_name
from ..storage.crypto import stored_samples
from ..storage.dispatchers import ALIVE_S, dispatcher_alive, paused_since
from ..storage.schema import missing_schema
from ..web.blueprint import HOST_PART, is_allowed, own_tenant
from ..web.monitoring import STUCK_S
from ..web.page_frame import layout_setting, render
from .terminal import EXPLAINED, explain, redis_source

if TYPE_CHECKING:
    from ..state import State

#: Seconds by which two clocks may differ before receivers refuse our timestamps, or leases go wrong.
CLOCKS_S = 5.0
#: The oldest Redis version that has what the outbox needs (``XAUTOCLAIM``).
MINIMUM_REDIS = (6, 2)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    :param status: ``"ok"``, ``"FAIL"``, or ``"skip"`` for a check that depends on a failed one.
    :param text: one line; if something is wrong, it says what to do.
    """

    name: str
    status: str
    text: str


def examine(state: State) -> Iterator[Finding]:
    """Run every check; one that depends on a failed check says so instead."""
    # Failed or skipped check → the check that failed first.
    failed: dict[str, str] = {}
    for name, needs, check in _CHECKS:
        root = next((failed[need] for need in needs if need in failed), None)
        if root is not None:
            failed[name] = root
            yield Finding(name, "skip", f"skipped: fix the `{root}` check first.")
            continue
        try:
            yield Finding(name, "ok", check(state))
        except (WrongError, *EXPLAINED) as exc:
            failed[name] = name
            text = str(exc) if isinstance(exc, WrongError) else explain(exc, state)
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
    cipher = state.cipher  # checked even if nothing is stored yet
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
    if waited_s > STUCK_S:
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
    """Return whether this machine has a route to public IPv4 addresses; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.0.170", 443))
        except OSError:
            return False
    return True


# -- the app itself ---------------------------------------------------------------------------------------

#: Blocks of a layout, and the consequence if a layout lacks one.
BLOCKS = {
    "content": "pages appear in our own layout",
    "head": "their style is loaded from the page's body",
    "title": "pages have no title of their own",
}

#: A sample path part that fits a converter, by the converter's name.
_SAMPLES = {"int": "1", "float": "1.5", "uuid": "12345678-1234-5678-1234-567812345678", "path": "a/b"}
_PART = re.compile(r"<(?:(\w+)(?:\((.*?)\))?:)?\w+>")

_PREFIX = "rq_webhooks."


class WrongError(Exception):
    """A check found something wrong; its text says what, and how to fix it."""


def permission_function(state: State) -> str:
    """Check the function registered with ``@webhooks.authorize``."""
    function = state.hooks.authorize_function
    if function is None:
        raise WrongError(
            "none is registered, so status, API and dashboard answer 403; register one with "
            "@webhooks.authorize."
        )
    if inspect.iscoroutinefunction(function):
        raise WrongError(
            "it is `async def`, which is not awaited, so every request is answered 403; make it a plain "
            "`def` that returns True or False."
        )
    try:
        inspect.signature(function).bind("status", job_id=None, runid=None)
    except TypeError as exc:
        raise WrongError(
            f"it cannot be called as function(permission, job_id=…, runid=…) ({exc}), so requests end with "
            "500; define it as `def may(permission, **what)`."
        ) from None
    except ValueError:  # a built-in without a signature
        pass
    return "registered"


def sessions(state: State) -> str:
    """Check that the forms of the pages can carry a token against forged requests."""
    if not state.settings.dashboard:
        return "the dashboard is off"
    if state.app.secret_key:
        return "forms of the pages carry a token"
    if state.settings.encryption_keys:
        raise WrongError(
            "the app has no SECRET_KEY, so the forms of the pages answer 403; set one, or set "
            "RQ_WEBHOOKS_DASHBOARD to False."
        )
    return "the app has no SECRET_KEY; see `keys`"


# -- routes -----------------------------------------------------------------------------------------------


def routes(state: State) -> str:
    """Check that no route of the app answers in place of one of ours, or lies among them."""
    url_map, prefix = state.app.url_map, state.settings.url_prefix.rstrip("/")
    rules = list(url_map.iter_rules())
    ours = [rule for rule in rules if rule.endpoint.startswith(_PREFIX)]
    # With the prefix "/", every route of the app lies there, and only one that hides another is wrong.
    lying = [
        rule for rule in rules
        if prefix and not rule.endpoint.startswith(_PREFIX) and f"{rule.rule}/".startswith(f"{prefix}/")
    ]  # fmt: skip
    hidden = [
        f"{rule.rule} (ours, answered by {other!r})"
        for rule in ours
        for other in _answering(url_map, rule)
        if not other.startswith(_PREFIX)
    ]
    hidden += [
        f"{rule.rule} (of {rule.endpoint!r}, answered by us)"
        for rule in rules
        if not rule.endpoint.startswith(_PREFIX)
        and any(other.startswith(_PREFIX) for other in _answering(url_map, rule))
    ]
    hidden += [f"{rule.rule} (of {rule.endpoint!r})" for rule in lying if rule.rule not in " ".join(hidden)]
    if hidden:
        shown = ", ".join(dict.fromkeys(hidden[:5])) + (", …" if len(hidden) > 5 else "")
        raise WrongError(
            f"the app has routes of its own where ours are: {shown}; set RQ_WEBHOOKS_URL_PREFIX to a path "
            "that is free, such as /rq-webhooks."
        )
    where = " of every host name (host_matching is on)" if url_map.host_matching else ""
    return f"served under {prefix or '/'}{where}"


def _answering(url_map: Map, rule: Rule) -> Iterator[str]:
    """Yield the view names that answer a path of *rule*, one for each of its methods."""
    path = _PART.sub(lambda part: _sample(part[1], part[2]), rule.rule)
    host = "localhost" if rule.host in (None, "", f"<{HOST_PART}>") else _PART.sub("localhost", rule.host)
    adapter = url_map.bind(host, subdomain=None if url_map.host_matching else rule.subdomain)
    for method in sorted((rule.methods or {"GET"}) - {"HEAD", "OPTIONS"}):
        try:
            yield adapter.match(path, method=method)[0]
        except (RequestRedirect, HTTPException):
            continue  # for example, one of the app's own converters accepts no sample


def _sample(converter: str | None, arguments: str | None) -> str:
    if converter == "any" and arguments:
        return arguments.split(",")[0].strip(" \"'")
    return _SAMPLES.get(converter or "", "sample")


# -- layout -----------------------------------------------------------------------------------------------


def layout(state: State) -> str:
    """Check that the templates of the app and ours find each other."""
    if not state.settings.dashboard:
        return "the dashboard is off"
    try:
        state.app.jinja_env.get_template("rq_webhooks/_macros.html")
    except TemplateNotFound:
        raise WrongError(
            "the app's Jinja loader does not find templates of blueprints, so its own templates cannot "
            "import rq_webhooks/_macros.html (our pages do without); let it be ChoiceLoader([yours, "
            "app.create_global_jinja_loader()])."
        ) from None
    shown = _layout(state, portal=False)
    if state.settings.portal_base_template is None:
        return shown
    return f"{shown}; in the portal {_layout(state, portal=True)}"


def _layout(state: State, *, portal: bool) -> str:
    setting, base = layout_setting(state, portal=portal)
    if base is None:
        return "pages appear in our own layout"
    try:
        blocks = _blocks(state.app.jinja_env, base)
    except TemplateNotFound as exc:
        missing = (
            "there is no such template" if exc.name == base else f"it extends {exc.name!r}, which is missing"
        )
        raise WrongError(
            f"{setting} is {base!r}, but {missing}, so pages appear in our own layout; "
            "correct the name, or put the file into the app's templates folder."
        ) from None
    except TemplateSyntaxError as exc:
        raise WrongError(
            f"{setting} {base!r} cannot be compiled ({exc.name}, line {exc.lineno}: "
            f"{exc.message}), so pages appear in our own layout; correct it."
        ) from None
    for block, consequence in BLOCKS.items():
        if blocks is not None and block not in blocks:
            raise WrongError(
                f"{setting} {base!r} has no block {block!r}, so {consequence}; add "
                f"{{% block {block} %}}{{% endblock %}} to it, or name a template that extends it and has "
                "the blocks title, head and content."
            )
    return _rendered(state, setting, base, portal=portal)


def _rendered(state: State, setting: str, base: str, *, portal: bool) -> str:
    """Render a page in the layout, as it is for a visitor who is not logged in."""
    text = f"pages appear in {base!r}"
    path = f"{state.settings.url_prefix.rstrip('/')}/{'portal/' if portal else ''}"
    with state.app.test_request_context(path):
        allowed = False
        try:
            if state.app.preprocess_request() is not None:
                return f"{text}; not rendered here, as the app requires a login first"
            allowed = own_tenant(state) is not None if portal else is_allowed(state, "read")
            render(state, "unavailable.html", tenant="any" if portal else None, strict=True)
        except Exception as exc:  # the host's layout and what it calls may raise anything
            why = f"{type(exc).__name__}: {exc}"
            if allowed:
                raise WrongError(
                    f"{setting} {base!r} cannot be rendered ({why}), so pages appear in our "
                    "own layout; correct it."
                ) from None
            # It may depend on a login, and no user is logged in here.
            return f"{text}, except for visitors who are not logged in ({why})"
    return text


def _blocks(templates: Environment, name: str) -> set[str] | None:
    """Return the names of the blocks of a template and of those it extends.

    :returns: ``None`` if it extends a template whose name is only known when it is rendered.
    """
    found: set[str] = set()
    seen: set[str] = set()
    while name not in seen:  # a template may extend itself
        seen.add(name)
        assert templates.loader is not None  # noqa: S101  (see environment)
        source, file_name, _current = templates.loader.get_source(templates, name)
        tree = templates.parse(source, name, file_name)
        found |= {block.name for block in tree.find_all(nodes.Block)}
        parent = tree.find(nodes.Extends)
        if parent is None:
            return found
        if not isinstance(parent.template, nodes.Const):
            return None
        name = parent.template.value
    raise TemplateSyntaxError("the template extends itself", 1, name)


#: Name, the checks above that it needs, and the check.
_CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[State], str]], ...] = (
    ("settings", (), _settings),
    ("redis", (), _redis),
    ("sql", (), _sql),
    ("tables", ("sql",), _tables),
    ("keys", ("tables",), _keys),
    ("dispatcher", ("tables",), _dispatcher),
    ("clock", ("sql", "redis"), _clock),
    ("permission function", (), permission_function),
    ("routes", (), routes),
    ("layout", (), layout),
    ("sessions", (), sessions),
    ("queue database", ("redis",), _queues),
    ("outbox", ("redis", "tables"), _outbox),
    ("network", (), _network),
)
