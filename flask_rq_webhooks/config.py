"""The settings: one frozen dataclass, read once per app.

Every setting is ``app.config["RQ_WEBHOOKS_<NAME>"]``. Where the app does not set it, the environment
variables in the field's metadata are read in order, then the default stands. The configuration page of the
documentation is generated from the same metadata.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from .errors import ConfigurationError
from .version import __version__

logger = logging.getLogger(__name__)

PREFIX = "RQ_WEBHOOKS_"

#: Seconds between attempts; there is one attempt more than entries. The first three cover a restart, the
#: rest are spread over three days (Standard Webhooks, "Deliverability and reliability").
DEFAULT_RETRY_SCHEDULE: tuple[float, ...] = (
    1, 2, 4, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400,
)  # fmt: skip

#: HTTP statuses worth another attempt, in addition to network errors and timeouts.
DEFAULT_RETRY_STATUSES: tuple[int, ...] = (408, 409, 425, 429, *range(500, 600))

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise ValueError("expected true or false")


def _integer(minimum: int, maximum: int | None = None) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("expected a whole number")
        number = int(value)
        if number < minimum or (maximum is not None and number > maximum):
            raise ValueError(f"expected a whole number from {minimum} to {maximum or 'any'}")
        return number

    return parse


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected seconds")
    number = float(value)
    if not 0 < number <= 86400:
        raise ValueError("expected seconds, more than 0 and at most 86400")
    return number


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, Sequence | set | frozenset | range):
        return list(value)
    raise ValueError("expected a list")


def _all(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple(parse(item) for item in _items(value))


def _schedule(value: Any) -> tuple[float, ...]:
    delays = tuple(float(item) for item in _items(value))
    if len(delays) > 100 or not all(0 < delay <= 30 * 86400 for delay in delays):
        raise ValueError("expected at most 100 delays in seconds, each more than 0 and at most 30 days")
    return delays


def _schedule_of_total_attempts(value: str) -> tuple[float, ...]:
    attempts = _integer(1, len(DEFAULT_RETRY_SCHEDULE) + 1)(value)
    return DEFAULT_RETRY_SCHEDULE[: attempts - 1]


def _choice(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError("expected one of " + ", ".join(repr(item) for item in allowed))
        return str(value)

    return parse


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a non-empty string")
    return value


_texts = _all(_text)


def _signing_secret(value: Any) -> str:
    text = _text(value)
    if len(text.encode()) > 512:
        raise ValueError("expected at most 512 bytes")
    return text


def _matching(pattern: str, expected: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        text = _text(value)
        if not re.fullmatch(pattern, text, re.DOTALL):
            raise ValueError(f"expected {expected}")
        return text

    return parse


_header_prefix = _matching(
    r"(?!(?i:webhook)$)[A-Za-z](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?",
    "letters, digits and inner hyphens, such as 'X-Webhook', and not webhook, which begins the names of "
    "Standard Webhooks",
)
_header_name = _matching(
    r"(?!(?i:webhook-|content-))[A-Za-z][A-Za-z0-9-]{0,99}",
    "the name of a header, not one of webhook-* or Content-*",
)
_header_value = _matching(r"[\x21-\x7e](?:[\x20-\x7e]{0,254}[\x21-\x7e])?", "printable ASCII")
_url_prefix = _matching("/|/.*[^/]", "a path that starts with '/' and does not end with one")
_proxy_url = _matching("https?://.*", "a URL that starts with http:// or https://")


def _redis_url(value: Any) -> str:
    url = _text(value)
    try:
        Redis.from_url(url).connection_pool.make_connection()  # does not connect
    except TypeError as exc:  # for example an option of Celery's; the text names it
        raise ValueError(f"expected options that redis-py knows after the '?': {exc}") from exc
    except (ValueError, RedisError) as exc:
        raise ValueError(
            "expected a URL that starts with redis://, rediss:// or unix://, of one server"
        ) from exc
    return url


def _client_certs(value: Any) -> tuple[tuple[str, str, str], ...]:
    if value == ():
        return ()
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping of host names to (certificate file, key file)")
    certs: list[tuple[str, str, str]] = []
    for host, files in value.items():
        pair = tuple(files) if isinstance(files, Sequence) and not isinstance(files, str) else ()
        if not isinstance(host, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", host):
            raise ValueError(f"{host!r} is not a host name; write it like 'hooks.example.com', without port")
        if len(pair) != 2 or not all(isinstance(file, str) and file for file in pair):
            raise ValueError(f"{host!r} needs (certificate file, key file), not {files!r}")
        certs.append((host.lower().rstrip("."), pair[0], pair[1]))
    return tuple(certs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is known of one setting besides its name and type.

    :param name: key without ``RQ_WEBHOOKS_``.
    :param group: section of the configuration page.
    :param parse: turns a value from ``app.config`` or the environment into the typed value, or raises
        :exc:`ValueError` with what was expected.
    :param default: typed value. Where it is ``None``, ``None`` can be set too and is not parsed.
    :param about: one sentence for the documentation.
    :param config_key: key of ``app.config`` that is asked next; other extensions may use it too.
    :param env: environment variables asked after that, in this order.
    :param shared_env: those of them that other programs use for purposes of their own. A value that is not
        usable is ignored with a warning.
    :param parse_env: for the environment, where its values mean something else.
    :param secret: whether the value never appears in an error message.
    """

    name: str = ""
    group: str
    parse: Callable[[Any], Any]
    default: Any
    about: str
    config_key: str | None = None
    env: tuple[str, ...] = ()
    shared_env: bool = False
    parse_env: Callable[[str], Any] | None = None
    secret: bool = False


def _setting(group: str, parse: Callable[[Any], Any], default: Any, about: str, **more: Any) -> Any:
    """Return the field of one setting; the parameters are those of :class:`Setting`."""
    described = Setting(group=group, parse=parse, default=default, about=about, **more)
    return field(default=default, repr=not described.secret, metadata={"setting": described})


# Groups of settings, by what a reader of the configuration page wants to do.
_start = partial(_setting, "start")
_destinations = partial(_setting, "destinations")
_retries = partial(_setting, "retries")
_privacy = partial(_setting, "privacy")
_dashboard = partial(_setting, "dashboard")
_scale = partial(_setting, "scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one app, typed and checked. A new setting is one field here."""

    enabled: bool = _start(
        _boolean,
        True,
        "Whether webhooks are accepted. Accepted deliveries continue when it is off.",
        env=("WEBHOOKS_ENABLED", "WEPPCLOUD_WEBHOOKS_ENABLED"),
    )
    redis_url: str = _start(
        _redis_url,
        "redis://localhost:6379/0",
        "The Redis or Valkey database RQ uses.",
        env=("REDIS_URL", "CELERY_BROKER_URL"),
        shared_env=True,
        config_key="REDIS_URL",
        secret=True,
    )
    database_uri: str | None = _start(
        _text, None, "SQLAlchemy URL of our tables; default: the host's database.", secret=True
    )
    bind_key: str | None = _start(_text, None, "Flask-SQLAlchemy bind whose database holds our tables.")
    encryption_keys: tuple[str, ...] = _start(
        _texts,
        (),
        "Keys for secrets and headers at rest, newest first; default: derived from SECRET_KEY.",
        secret=True,
    )
    attach: str = _start(
        _choice("requested", "all"),
        "requested",
        "Which jobs carry our callbacks: those a webhook was asked for, or all this app enqueues.",
    )
    url_prefix: str = _start(_url_prefix, "/webhooks", "Where the blueprint is mounted.")

    allowed_domains: tuple[str, ...] = _destinations(
        _texts,
        (),
        "Only these domains and their sub-domains; empty: every public host.",
        env=("ALLOWED_WEBHOOK_DOMAINS",),
    )
    allow_http: bool = _destinations(
        _boolean,
        False,
        "Development: http:// and loopback addresses become possible, and http:// to ALLOW_NETWORKS.",
    )
    allow_networks: tuple[Network, ...] = _destinations(
        _all(ipaddress.ip_network), (), "Private networks (CIDR) that may be reached."
    )
    deny_networks: tuple[Network, ...] = _destinations(
        _all(ipaddress.ip_network), (), "Public networks (CIDR) that may not be reached."
    )
    blocked_ports: tuple[int, ...] = _destinations(
        _all(_integer(1, 65535)), (), "Destination ports that may not be reached."
    )
    allow_nat64: bool = _destinations(
        _boolean, False, "Judge 64:ff9b::/96 by its embedded IPv4 address instead of refusing it."
    )
    proxy_url: str | None = _destinations(
        _proxy_url, None, "Egress proxy; it, not we, then pins addresses.", secret=True
    )
    ca_file: str | None = _destinations(
        _text,
        None,
        "PEM file of certificate authorities that receivers may use, in addition to the public ones.",
    )
    client_certs: tuple[tuple[str, str, str], ...] = _destinations(
        _client_certs,
        (),
        "Client certificates: host name to (certificate file, key file); shown to that host and no other.",
    )
    header_prefix: str = _destinations(
        _header_prefix, "X-Webhook", "First part of the X-Webhook-* header names."
    )
    signature_header: str | None = _destinations(
        _header_name,
        None,
        "Full name of the sha256= signature's header; default: <prefix>-Signature.",
    )
    timestamp_header: str | None = _destinations(
        _header_name, None, "Full name of that signature's time; default: <prefix>-Timestamp."
    )
    user_agent: str = _destinations(
        _header_value, f"flask-rq-webhooks/{__version__}", "User-Agent of every request sent."
    )
    signing_secret: str | None = _destinations(
        _signing_secret,
        None,
        "Server-wide secret, used where a request says sign_payload and brings no secret.",
        env=("WEBHOOK_SIGNING_SECRET",),
        shared_env=True,
        secret=True,
    )
    signing_keys: tuple[str, ...] = _destinations(
        _texts,
        (),
        "Ed25519 keys (whsk_…): the first signs every delivery, the public halves of all are at /keys.",
        secret=True,
    )
    format: str = _destinations(_text, "job", "Payload format where a request names none.")

    timeout: float = _retries(
        _seconds, 15.0, "Total deadline of one attempt, seconds.", env=("WEPPCLOUD_WEBHOOK_TIMEOUT",)
    )
    connect_timeout: float = _retries(_seconds, 5.0, "Deadline for name look-up and connecting, seconds.")
    retry_schedule: tuple[float, ...] = _retries(
        _schedule,
        DEFAULT_RETRY_SCHEDULE,
        "Delays between attempts, seconds.",
        env=("WEPPCLOUD_WEBHOOK_RETRY_COUNT",),
        parse_env=_schedule_of_total_attempts,
    )
    retry_statuses: tuple[int, ...] = _retries(
        _all(_integer(300, 599)), DEFAULT_RETRY_STATUSES, "HTTP statuses that are tried again."
    )
    disable_after: int = _retries(
        _integer(1), 100, "Consecutive failed attempts that disable a standing endpoint."
    )
    reconcile_interval: float = _retries(
        _seconds, 15.0, "Seconds between passes that find endings without a callback."
    )
    clean_abandoned: bool = _retries(
        _boolean,
        False,
        "Clean RQ's registries: finds lost hosts in about 90 s; the dispatcher runs failure callbacks.",
    )
    child_meta_prefix: str = _retries(_text, "jobs:", "Keys of job.meta that name child jobs.")
    progress_interval: float | None = _retries(
        _seconds,
        None,
        "Least seconds between two job.progress of a job; default: RECONCILE_INTERVAL.",
    )
    progress_meta_key: str = _retries(_text, "progress", "Key of job.meta that holds a job's progress.")

    traceback: str = _privacy(
        _choice("full", "last", "none"), "full", "How much of a traceback a failure payload carries."
    )
    include_result: bool = _privacy(_boolean, True, "Whether success payloads carry the job's result.")
    max_payload_bytes: int = _privacy(
        _integer(4096, 2**20), 262_144, "Larger results are left out and marked."
    )
    payload_retention_hours: int | None = _privacy(
        _integer(1),
        None,
        "Hours after which bodies and answers of finished deliveries are erased; default: kept with the log.",
    )
    retention_days: int = _privacy(
        _integer(1), 30, "Days that finished deliveries and their events are kept."
    )

    dashboard: bool = _dashboard(_boolean, True, "Whether the HTML pages are served.")
    base_template: str | None = _dashboard(_text, None, "Template the pages extend; default: our own.")
    portal_base_template: str | None = _dashboard(
        _text, None, "Template the customers' pages extend; default: our own."
    )
    pubsub_url: str | None = _dashboard(
        _redis_url, None, "Redis for status notices; default: none are published.", secret=True
    )
    pubsub_channel: str = _dashboard(_text, "{runid}:webhook", "Channel of the status notices.")

    concurrency: int = _scale(_integer(1, 1000), 64, "Requests in flight per dispatcher process.")
    concurrency_per_host: int = _scale(
        _integer(1, 1000), 8, "Requests in flight per host and dispatcher process."
    )
    rate_limit_per_minute: int = _scale(
        _integer(0),
        0,
        "Attempts per destination host and minute; 0: no limit.",
        env=("WEBHOOK_RATE_LIMIT_PER_MINUTE",),
        shared_env=True,
    )
    rate_limit_policy: str = _scale(
        _choice("defer", "drop"),
        "defer",
        "Over the limit: wait for the next minute, or give the delivery up.",
    )
    max_waiting_per_host: int = _scale(
        _integer(0), 0, "Unfinished deliveries per destination host; 0: no limit."
    )
    max_endpoints_per_tenant: int = _scale(_integer(1), 20, "Standing endpoints that one tenant may have.")
    batch: int = _scale(_integer(1, 10_000), 500, "Rows or entries per transaction or read.")
    outbox_maxlen: int = _scale(
        _integer(100), 100_000, "Entries kept in the outbox stream while no dispatcher runs."
    )

    @property
    def max_attempts(self) -> int:
        """Return the total number of attempts the retry schedule allows."""
        return len(self.retry_schedule) + 1


#: Every setting in the order of the class, for the documentation and for tests.
SETTINGS: tuple[Setting, ...] = tuple(
    replace(row.metadata["setting"], name=row.name.upper()) for row in fields(Settings)
)

#: Settings of earlier releases → what to do instead.
_REMOVED = {
    "TRANSPORT": "The aiohttp transport was removed: remove the setting, and run a second dispatcher process "
    "where one does not keep up."
}


def load_settings(
    config: Mapping[str, Any], environ: Mapping[str, str] | None = None, *, has_redis: bool = False
) -> Settings:
    """Read and check every setting.

    :param config: the app's config.
    :param environ: the environment; the process's own by default.
    :param has_redis: whether the app gave a Redis client: then nothing but its own setting names another.
    :raises ConfigurationError: naming key, value and what was expected, for the first bad setting, an
        unknown ``RQ_WEBHOOKS_`` key, or settings that contradict each other.
    """
    environ = os.environ if environ is None else environ
    known = {PREFIX + setting.name for setting in SETTINGS}
    for key in config:
        if isinstance(key, str) and key.startswith(PREFIX) and key not in known:
            why = _REMOVED.get(key.removeprefix(PREFIX), "See the configuration page.")
            raise ConfigurationError(f"{key} is not a setting of flask_rq_webhooks. {why}")
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        if has_redis and setting.name == "REDIS_URL":
            setting = replace(setting, config_key=None, env=())
        values[setting.name.lower()] = _read(setting, config, environ)
    settings = Settings(**values)
    if settings.database_uri is not None and settings.bind_key is not None:
        raise ConfigurationError(
            f"{PREFIX}DATABASE_URI and {PREFIX}BIND_KEY are both set; keep the one that names our database."
        )
    if settings.connect_timeout > settings.timeout:
        raise ConfigurationError(
            f"{PREFIX}CONNECT_TIMEOUT ({settings.connect_timeout:g} s) is longer than {PREFIX}TIMEOUT "
            f"({settings.timeout:g} s), the total deadline; lower it."
        )
    if settings.signing_secret is not None and PREFIX + "SIGNING_SECRET" not in config:
        logger.warning("%s", SECRET_FROM_ENVIRONMENT)
    return settings


#: Logged at the start, and shown by ``doctor``.
SECRET_FROM_ENVIRONMENT = (
    "The server-wide signing secret is taken from the environment variable WEBHOOK_SIGNING_SECRET: clients "
    "that ask for sign_payload get webhooks signed with it. If it is the secret of webhooks that this app "
    f"receives, set {PREFIX}SIGNING_SECRET = None in app.config; otherwise set {PREFIX}SIGNING_SECRET to it."
)


def _read(setting: Setting, config: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    key = PREFIX + setting.name
    if key in config:
        return _parse(setting, setting.parse, key, config[key])
    sources = [(f"app.config[{setting.config_key!r}]", config.get(setting.config_key or ""))]
    sources += [(f"environment variable {name}", environ.get(name)) for name in setting.env]
    for source, value in sources:
        try:
            if value:
                return _parse(setting, setting.parse_env or setting.parse, source, value)
        except ConfigurationError as exc:
            if not setting.shared_env:
                raise
            logger.warning("%s It is ignored; set %s.", exc, key)
    return setting.default


def _parse(setting: Setting, parse: Callable[[Any], Any], source: str, value: Any) -> Any:
    try:
        return None if value is None is setting.default else parse(value)
    except (ValueError, TypeError) as exc:
        shown = "the value (not shown)" if setting.secret else repr(value)
        reason = "it was refused" if setting.secret and "expected" not in str(exc) else str(exc)
        raise ConfigurationError(
            f"{source} is {shown}, which is not usable: {reason}. {setting.about} Default: {setting.default!r}."
        ) from (None if setting.secret else exc)
