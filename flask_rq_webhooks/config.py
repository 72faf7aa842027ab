"""The settings: one table, read once per app into one frozen object.

Every setting is ``app.config["RQ_WEBHOOKS_<NAME>"]``. Where the app does not set it, the environment
variables named in the table are asked in order, then the default stands. The table is also the source
of the configuration page of the documentation.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigurationError
from .version import __version__

PREFIX = "RQ_WEBHOOKS_"

#: Seconds between attempts: one more attempt than entries. The first three catch a restart, the rest
#: spread over three days (Standard Webhooks, "Deliverability and reliability").
DEFAULT_RETRY_SCHEDULE: tuple[float, ...] = (
    1, 2, 4, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400,
)  # fmt: skip

#: HTTP statuses worth another attempt, beside network errors and timeouts.
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


def _texts(value: Any) -> tuple[str, ...]:
    items = _items(value)
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError("expected a list of non-empty strings")
    return tuple(items)


def _networks(value: Any) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(item) for item in _items(value))


def _ports(value: Any) -> tuple[int, ...]:
    port = _integer(1, 65535)
    return tuple(port(item) for item in _items(value))


def _statuses(value: Any) -> tuple[int, ...]:
    status = _integer(300, 599)
    return tuple(status(item) for item in _items(value))


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


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _signing_secret(value: Any) -> str:
    text = _text(value)
    if len(text.encode()) > 512:
        raise ValueError("expected at most 512 bytes")
    return text


def _header_prefix(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,63}", text) or text.endswith("-"):
        raise ValueError("expected letters, digits and inner hyphens, such as 'X-Webhook'")
    if text.lower() == "webhook":
        raise ValueError("webhook-* names are those of Standard Webhooks, which are always sent")
    return text


def _header_value(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"[\x21-\x7e](?:[\x20-\x7e]{0,254}[\x21-\x7e])?", text):
        raise ValueError("expected printable ASCII")
    return text


def _url_prefix(value: Any) -> str:
    text = _text(value)
    if not text.startswith("/") or (text.endswith("/") and text != "/"):
        raise ValueError("expected a path that starts with '/' and does not end with one")
    return text


def _redis_url(value: Any) -> str:
    text = _text(value)
    if not text.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("expected a URL that starts with redis://, rediss:// or unix://")
    return text


def _proxy_url(value: Any) -> str:
    text = _text(value)
    if not text.startswith(("http://", "https://")):
        raise ValueError("expected a URL that starts with http:// or https://")
    return text


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.

    :param name: key without ``RQ_WEBHOOKS_``.
    :param parse: turns a value from ``app.config`` or the environment into the typed value, or raises
        :exc:`ValueError` with what was expected.
    :param default: typed value.
    :param env: environment variables asked in this order.
    :param about: one sentence for the documentation.
    :param parse_env: where the environment speaks another language than the setting.
    """

    name: str
    parse: Callable[[Any], Any]
    default: Any
    about: str
    env: tuple[str, ...] = ()
    parse_env: Callable[[str], Any] | None = None


SETTINGS: tuple[Setting, ...] = (
    Setting("ENABLED", _boolean, True, "Off: fields are stripped, nothing is registered; accepted deliveries go on.",
            ("WEBHOOKS_ENABLED", "WEPPCLOUD_WEBHOOKS_ENABLED")),
    Setting("REDIS_URL", _redis_url, "redis://localhost:6379/0", "The Redis or Valkey database RQ uses.",
            ("REDIS_URL", "CELERY_BROKER_URL")),
    Setting("ATTACH", _choice("requested", "all"), "requested",
            "Which jobs carry our callbacks: those a webhook was asked for, or all this app enqueues."),
    Setting("OUTBOX_MAXLEN", _integer(100), 100_000, "Entries kept in the outbox stream while no dispatcher runs."),
    Setting("DATABASE_URI", _optional(_text), None, "SQLAlchemy URL of our tables; default: the host's database."),
    Setting("BIND_KEY", _optional(_text), None, "Flask-SQLAlchemy bind whose database holds our tables."),
    Setting("TIMEOUT", _seconds, 15.0, "Total deadline of one attempt, seconds.", ("WEPPCLOUD_WEBHOOK_TIMEOUT",)),
    Setting("CONNECT_TIMEOUT", _seconds, 5.0, "Deadline for name look-up and connecting, seconds."),
    Setting("RETRY_SCHEDULE", _schedule, DEFAULT_RETRY_SCHEDULE, "Delays between attempts, seconds.",
            ("WEPPCLOUD_WEBHOOK_RETRY_COUNT",), _schedule_of_total_attempts),
    Setting("RETRY_STATUSES", _statuses, DEFAULT_RETRY_STATUSES, "HTTP statuses that are tried again."),
    Setting("SIGNING_SECRET", _optional(_signing_secret), None,
            "Server-wide secret, used where a request says sign_payload and brings no secret.",
            ("WEBHOOK_SIGNING_SECRET",)),
    Setting("ALLOWED_DOMAINS", _texts, (), "Only these domains and their sub-domains; empty: every public host.",
            ("ALLOWED_WEBHOOK_DOMAINS",)),
    Setting("RATE_LIMIT_PER_MINUTE", _integer(0), 0, "Attempts per destination host and minute; 0: no limit.",
            ("WEBHOOK_RATE_LIMIT_PER_MINUTE",)),
    Setting("RATE_LIMIT_POLICY", _choice("defer", "drop"), "defer",
            "Over the limit: wait for the next minute, or give the delivery up."),
    Setting("ALLOW_HTTP", _boolean, False,
            "Development: http:// and loopback addresses become possible, and http:// to ALLOW_NETWORKS."),
    Setting("ALLOW_NETWORKS", _networks, (), "Private networks (CIDR) that may be reached."),
    Setting("DENY_NETWORKS", _networks, (), "Public networks (CIDR) that may not be reached."),
    Setting("BLOCKED_PORTS", _ports, (), "Destination ports that may not be reached."),
    Setting("ALLOW_NAT64", _boolean, False, "Judge 64:ff9b::/96 by its embedded IPv4 address instead of refusing it."),
    Setting("MAX_WAITING_PER_HOST", _integer(0), 0, "Unfinished deliveries per destination host; 0: no limit."),
    Setting("PROXY_URL", _optional(_proxy_url), None, "Egress proxy; it, not we, then pins addresses."),
    Setting("FORMAT", _text, "job", "Payload format where a request names none."),
    Setting("TRACEBACK", _choice("full", "last", "none"), "full", "How much of a traceback a failure payload carries."),
    Setting("INCLUDE_RESULT", _boolean, True, "Whether success payloads carry the job's result."),
    Setting("MAX_PAYLOAD_BYTES", _integer(4096, 2**20), 262_144, "Larger results are left out and marked."),
    Setting("HEADER_PREFIX", _header_prefix, "X-Webhook", "First part of the X-Webhook-* header names."),
    Setting("USER_AGENT", _header_value, f"flask-rq-webhooks/{__version__}", "User-Agent of every request sent."),
    Setting("TRANSPORT", _choice("requests", "aiohttp"), "requests",
            "How bytes travel; \"aiohttp\" needs the extra flask-rq-webhooks[fast]."),
    Setting("CONCURRENCY", _integer(1, 1000), 64, "Requests in flight per dispatcher process."),
    Setting("CONCURRENCY_PER_HOST", _integer(1, 1000), 8, "Requests in flight per host and dispatcher process."),
    Setting("BATCH", _integer(1, 10_000), 500, "Rows or entries per transaction or read."),
    Setting("ENCRYPTION_KEYS", _texts, (),
            "Keys for secrets and headers at rest, newest first; default: derived from SECRET_KEY."),
    Setting("RECONCILE_INTERVAL", _seconds, 15.0, "Seconds between looks for endings nobody reported."),
    Setting("CLEAN_ABANDONED", _boolean, False,
            "Clean RQ's registries ourselves: finds lost hosts in about 90 s, runs failure callbacks here."),
    Setting("CHILD_META_PREFIX", _text, "jobs:", "Keys of job.meta that name child jobs."),
    Setting("DISABLE_AFTER", _integer(1), 100, "Consecutive failed attempts that disable a standing endpoint."),
    Setting("RETENTION_DAYS", _integer(1), 30, "Days that finished deliveries and their events are kept."),
    Setting("URL_PREFIX", _url_prefix, "/webhooks", "Where the blueprint is mounted."),
    Setting("DASHBOARD", _boolean, True, "Whether the HTML pages are served."),
    Setting("BASE_TEMPLATE", _optional(_text), None, "Template the pages extend; default: our own."),
    Setting("PUBSUB_URL", _optional(_redis_url), None, "Redis for status notices; default: none are published."),
    Setting("PUBSUB_CHANNEL", _text, "{runid}:webhook", "Channel of the status notices."),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one app, typed and checked. One attribute per row of :data:`SETTINGS`."""

    enabled: bool
    redis_url: str = field(repr=False)
    attach: str
    outbox_maxlen: int
    database_uri: str | None = field(repr=False)
    bind_key: str | None
    timeout: float
    connect_timeout: float
    retry_schedule: tuple[float, ...]
    retry_statuses: tuple[int, ...]
    signing_secret: str | None = field(repr=False)
    allowed_domains: tuple[str, ...]
    rate_limit_per_minute: int
    rate_limit_policy: str
    allow_http: bool
    allow_networks: tuple[Network, ...]
    deny_networks: tuple[Network, ...]
    blocked_ports: tuple[int, ...]
    allow_nat64: bool
    max_waiting_per_host: int
    proxy_url: str | None = field(repr=False)
    format: str
    traceback: str
    include_result: bool
    max_payload_bytes: int
    header_prefix: str
    user_agent: str
    transport: str
    concurrency: int
    concurrency_per_host: int
    batch: int
    encryption_keys: tuple[str, ...] = field(repr=False)
    reconcile_interval: float
    clean_abandoned: bool
    child_meta_prefix: str
    disable_after: int
    retention_days: int
    url_prefix: str
    dashboard: bool
    base_template: str | None
    pubsub_url: str | None = field(repr=False)
    pubsub_channel: str

    @property
    def max_attempts(self) -> int:
        """Return the total number of attempts the retry schedule allows."""
        return len(self.retry_schedule) + 1


#: Settings whose value never appears in an error message.
_SECRET_NAMES = {"SIGNING_SECRET", "ENCRYPTION_KEYS", "REDIS_URL", "DATABASE_URI", "PROXY_URL", "PUBSUB_URL"}


def load_settings(config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check every setting.

    :param config: the app's config.
    :param environ: the environment; the process's own by default.
    :raises ConfigurationError: naming key, value and what was expected, for the first bad setting, an
        unknown ``RQ_WEBHOOKS_`` key, or settings that contradict each other.
    """
    environ = os.environ if environ is None else environ
    known = {PREFIX + setting.name for setting in SETTINGS}
    for key in config:
        if isinstance(key, str) and key.startswith(PREFIX) and key not in known:
            raise ConfigurationError(
                f"{key} is not a setting of flask_rq_webhooks; see the configuration page."
            )
    values: dict[str, Any] = {}
    for setting in SETTINGS:
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
    return settings


def _read(setting: Setting, config: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    key = PREFIX + setting.name
    if key in config:
        return _parse(setting, setting.parse, key, config[key])
    for variable in setting.env:
        if environ.get(variable):
            parse = setting.parse_env or setting.parse
            return _parse(setting, parse, f"environment variable {variable}", environ[variable])
    return setting.default


def _parse(setting: Setting, parse: Callable[[Any], Any], source: str, value: Any) -> Any:
    try:
        return parse(value)
    except (ValueError, TypeError) as exc:
        shown = "the value (not shown)" if setting.name in _SECRET_NAMES else repr(value)
        reason = (
            "it was refused" if setting.name in _SECRET_NAMES and "expected" not in str(exc) else str(exc)
        )
        raise ConfigurationError(
            f"{source} is {shown}, which is not usable: {reason}. {setting.about} Default: {setting.default!r}."
        ) from (None if setting.name in _SECRET_NAMES else exc)
