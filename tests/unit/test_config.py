"""The settings table: defaults, precedence, and errors that name key, value and fix."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Any

import pytest

from flask_rq_webhooks.config import PREFIX, SETTINGS, Settings, load_settings
from flask_rq_webhooks.errors import ConfigurationError
from flask_rq_webhooks.version import __version__

#: What an app without any configuration gets. Written down here, so that a changed default is seen.
DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "redis_url": "redis://localhost:6379/0",
    "attach": "requested",
    "outbox_maxlen": 100_000,
    "database_uri": None,
    "bind_key": None,
    "timeout": 15.0,
    "connect_timeout": 5.0,
    "retry_schedule": (1, 2, 4, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
    "retry_statuses": (408, 409, 425, 429, *range(500, 600)),
    "signing_secret": None,
    "allowed_domains": (),
    "rate_limit_per_minute": 0,
    "rate_limit_policy": "defer",
    "allow_http": False,
    "allow_networks": (),
    "deny_networks": (),
    "blocked_ports": (),
    "allow_nat64": False,
    "ca_file": None,
    "client_certs": (),
    "max_waiting_per_host": 0,
    "proxy_url": None,
    "format": "job",
    "traceback": "full",
    "include_result": True,
    "max_payload_bytes": 262_144,
    "header_prefix": "X-Webhook",
    "signature_header": None,
    "timestamp_header": None,
    "signing_keys": (),
    "payload_retention_hours": None,
    "progress_interval": None,
    "progress_meta_key": "progress",
    "user_agent": f"flask-rq-webhooks/{__version__}",
    "concurrency": 64,
    "concurrency_per_host": 8,
    "batch": 500,
    "max_endpoints_per_tenant": 20,
    "encryption_keys": (),
    "reconcile_interval": 15.0,
    "clean_abandoned": False,
    "child_meta_prefix": "jobs:",
    "disable_after": 100,
    "retention_days": 30,
    "url_prefix": "/webhooks",
    "dashboard": True,
    "base_template": None,
    "portal_base_template": None,
    "pubsub_url": None,
    "pubsub_channel": "{runid}:webhook",
}


def load(**config: Any) -> Settings:
    return load_settings({PREFIX + name: value for name, value in config.items()}, {})


def test_defaults() -> None:
    assert dataclasses.asdict(load_settings({}, {})) == DEFAULTS
    assert load_settings({}, {}).max_attempts == 12


def test_one_attribute_per_row() -> None:
    assert [setting.name.lower() for setting in SETTINGS] == [
        field.name for field in dataclasses.fields(Settings)
    ]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_default_is_a_value_the_setting_accepts(setting: Any) -> None:
    settings = load_settings({PREFIX + setting.name: setting.default}, {})
    assert getattr(settings, setting.name.lower()) == setting.default
    assert setting.about.endswith(".")


#: Environment variable, its text, attribute, value.
ENVIRONMENT: list[tuple[str, str, str, Any]] = [
    ("WEBHOOKS_ENABLED", "false", "enabled", False),
    ("WEPPCLOUD_WEBHOOKS_ENABLED", "0", "enabled", False),
    ("REDIS_URL", "redis://cache:6379/5", "redis_url", "redis://cache:6379/5"),
    ("CELERY_BROKER_URL", "unix:///run/redis.sock", "redis_url", "unix:///run/redis.sock"),
    ("WEPPCLOUD_WEBHOOK_TIMEOUT", "20", "timeout", 20.0),
    ("WEPPCLOUD_WEBHOOK_RETRY_COUNT", "3", "retry_schedule", (1, 2)),
    ("WEPPCLOUD_WEBHOOK_RETRY_COUNT", "1", "retry_schedule", ()),
    ("WEBHOOK_SIGNING_SECRET", "s3cret", "signing_secret", "s3cret"),
    ("ALLOWED_WEBHOOK_DOMAINS", "a.example, b.example", "allowed_domains", ("a.example", "b.example")),
    ("WEBHOOK_RATE_LIMIT_PER_MINUTE", "60", "rate_limit_per_minute", 60),
]


@pytest.mark.parametrize(("variable", "text", "attribute", "value"), ENVIRONMENT)
def test_environment(variable: str, text: str, attribute: str, value: Any) -> None:
    assert getattr(load_settings({}, {variable: text}), attribute) == value


def test_every_environment_variable_is_tested_above() -> None:
    assert {row[0] for row in ENVIRONMENT} == {variable for setting in SETTINGS for variable in setting.env}


def test_environment_variables_are_asked_in_the_order_of_the_table() -> None:
    both = {"CELERY_BROKER_URL": "redis://second/0", "REDIS_URL": "redis://first/0"}
    assert load_settings({}, both).redis_url == "redis://first/0"
    both["REDIS_URL"] = ""
    assert load_settings({}, both).redis_url == "redis://second/0"


def test_app_config_beats_the_environment() -> None:
    environ = {"WEBHOOK_RATE_LIMIT_PER_MINUTE": "60", "WEBHOOKS_ENABLED": "1"}
    settings = load_settings({"RQ_WEBHOOKS_RATE_LIMIT_PER_MINUTE": 0, "RQ_WEBHOOKS_ENABLED": False}, environ)
    assert settings.rate_limit_per_minute == 0  # a false value is a value
    assert settings.enabled is False


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_RATE_LIMIT_PER_MINUTE", "7")
    assert load_settings({}).rate_limit_per_minute == 7


def test_networks_become_networks() -> None:
    settings = load(ALLOW_NETWORKS=["10.1.0.0/16"], DENY_NETWORKS="2001:4860::/32, 8.8.8.0/24")
    assert settings.allow_networks == (ipaddress.ip_network("10.1.0.0/16"),)
    assert settings.deny_networks == (
        ipaddress.ip_network("2001:4860::/32"),
        ipaddress.ip_network("8.8.8.0/24"),
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ENABLED", "perhaps", "true or false"),
        ("ATTACH", "some", "'requested', 'all'"),
        ("OUTBOX_MAXLEN", 1, "from 100"),
        ("TIMEOUT", 0, "more than 0"),
        ("TIMEOUT", "soon", "soon"),
        ("TIMEOUT", True, "seconds"),
        ("TIMEOUT", float("nan"), "more than 0"),
        ("RETRY_SCHEDULE", [0], "more than 0"),
        ("RETRY_SCHEDULE", [1] * 101, "at most 100"),
        ("RETRY_SCHEDULE", 5, "a list"),
        ("RETRY_STATUSES", [200], "from 300 to 599"),
        ("RATE_LIMIT_PER_MINUTE", -1, "from 0"),
        ("RATE_LIMIT_PER_MINUTE", 1.5, "whole number"),
        ("RATE_LIMIT_PER_MINUTE", False, "whole number"),
        ("RATE_LIMIT_POLICY", "wait", "'defer', 'drop'"),
        ("ALLOWED_DOMAINS", [""], "a non-empty string"),
        ("ALLOW_NETWORKS", ["10.0.0.1/8"], "10.0.0.1/8"),
        ("DENY_NETWORKS", "example.com", "example.com"),
        ("BLOCKED_PORTS", [0], "from 1 to 65535"),
        ("BLOCKED_PORTS", [65536], "from 1 to 65535"),
        ("BLOCKED_PORTS", [True], "whole number"),
        ("TRACEBACK", "some", "'full', 'last', 'none'"),
        ("MAX_PAYLOAD_BYTES", 10, "from 4096"),
        ("HEADER_PREFIX", "X-Webhook-", "inner hyphens"),
        ("HEADER_PREFIX", "X Webhook", "inner hyphens"),
        ("USER_AGENT", "bad\r\nX: y", "printable ASCII"),
        ("CONCURRENCY", 0, "from 1"),
        ("URL_PREFIX", "webhooks", "starts with '/'"),
        ("URL_PREFIX", "/webhooks/", "does not end"),
        ("RETENTION_DAYS", None, "whole number"),
    ],
)
def test_error_names_key_value_and_what_was_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"RQ_WEBHOOKS_{name} is {value!r}")
    assert expected in message
    assert "Default:" in message


def test_error_from_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigurationError, match="environment variable WEBHOOKS_ENABLED is 'perhaps'"):
        load_settings({}, {"WEBHOOKS_ENABLED": "perhaps"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SIGNING_SECRET", "t0p" * 200),
        ("REDIS_URL", "tcp://:t0p@cache"),
        ("PROXY_URL", "socks5://user:t0p@proxy"),
        ("PUBSUB_URL", "http://:t0p@cache"),
        ("ENCRYPTION_KEYS", ["t0p", ""]),
        ("DATABASE_URI", b"postgresql://u:t0p@db/x"),
    ],
)
def test_error_does_not_show_a_secret(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(**{name: value})
    assert f"RQ_WEBHOOKS_{name}" in str(caught.value)
    assert "t0p" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_error_of_a_secret_setting_still_says_what_was_expected() -> None:
    with pytest.raises(ConfigurationError, match="REDIS_URL is the value .* starts with redis://"):
        load(REDIS_URL="cache:6379")


def test_repr_of_the_settings_hides_secrets() -> None:
    settings = load(
        SIGNING_SECRET="t0p-signing",
        ENCRYPTION_KEYS=["t0p-key"],
        REDIS_URL="redis://:t0p-redis@cache/0",
        DATABASE_URI="postgresql://u:t0p-database@db/x",
        PROXY_URL="http://u:t0p-proxy@proxy",
        PUBSUB_URL="redis://:t0p-pubsub@cache/2",
    )
    assert "t0p" not in repr(settings)


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="RQ_WEBHOOKS_TIMOUT is not a setting"):
        load(TIMOUT=3)


def test_a_removed_setting_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ConfigurationError, match="RQ_WEBHOOKS_TRANSPORT is not a setting.*second dispatcher"):
        load(TRANSPORT="aiohttp")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CELERY_BROKER_URL", "amqp://guest:t0p@rabbit//"),
        ("CELERY_BROKER_URL", "sqs://"),
        ("REDIS_URL", "sentinel://:t0p@one:26379"),
        ("REDIS_URL", "redis+sentinel://one:26379/mymaster"),
        ("REDIS_URL", "cache:6379"),
        ("REDIS_URL", "redis://one:t0p@h:6379,redis://two:6379"),
        ("REDIS_URL", "redis://:t0p@[::1/0"),
        ("CELERY_BROKER_URL", "rediss://:t0p@one/0?ssl_cert_reqs=CERT_SOME"),
        ("CELERY_BROKER_URL", "redis://:t0p@one/0?visibility_timeout=3600"),
    ],
)
def test_redis_variable_of_another_program_is_passed_over(
    variable: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_settings({}, {variable: value}).redis_url == "redis://localhost:6379/0"
    assert f"environment variable {variable}" in caplog.text
    assert "ignored; set RQ_WEBHOOKS_REDIS_URL" in caplog.text
    assert "t0p" not in caplog.text
    both = {"REDIS_URL": "sentinel://one", "CELERY_BROKER_URL": "redis://second/0"}
    assert load_settings({}, both).redis_url == "redis://second/0"


def test_rate_limit_in_the_words_of_another_program_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    assert load_settings({}, {"WEBHOOK_RATE_LIMIT_PER_MINUTE": "10/minute"}).rate_limit_per_minute == 0
    assert "'10/minute', which is not usable" in caplog.text
    assert "ignored; set RQ_WEBHOOKS_RATE_LIMIT_PER_MINUTE" in caplog.text


def test_no_redis_variable_is_read_where_the_app_gave_a_client_or_an_url(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"REDIS_URL": "sentinel://one", "CELERY_BROKER_URL": "amqp://rabbit"}
    assert load_settings({"REDIS_URL": "memcached://x"}, environ, has_redis=True).redis_url
    config = {"RQ_WEBHOOKS_REDIS_URL": "redis://mine/1"}
    assert load_settings(config, environ).redis_url == "redis://mine/1"
    assert caplog.text == ""


def test_redis_url_of_the_app_is_read_before_the_environment(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"REDIS_URL": "redis://environment/1"}
    assert load_settings({"REDIS_URL": "redis://app/2"}, environ).redis_url == "redis://app/2"
    assert load_settings({"REDIS_URL": "sentinel://x"}, environ).redis_url == "redis://environment/1"
    assert "app.config['REDIS_URL']" in caplog.text


def test_signing_secret_of_the_environment_is_named_once_and_can_be_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"WEBHOOK_SIGNING_SECRET": "t0p"}
    assert load_settings({}, environ).signing_secret == "t0p"
    assert caplog.text.count("WEBHOOK_SIGNING_SECRET") == 1
    assert "RQ_WEBHOOKS_SIGNING_SECRET = None" in caplog.text
    assert "t0p" not in caplog.text
    caplog.clear()
    assert load_settings({"RQ_WEBHOOKS_SIGNING_SECRET": None}, environ).signing_secret is None
    assert load_settings({"RQ_WEBHOOKS_SIGNING_SECRET": "own"}, environ).signing_secret == "own"
    assert caplog.text == ""


def test_keys_of_others_are_left_alone() -> None:
    assert load_settings({"RQ_REDIS_URL": "redis://other", "SECRET_KEY": "x"}, {}).timeout == 15


def test_two_databases_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="RQ_WEBHOOKS_DATABASE_URI and RQ_WEBHOOKS_BIND_KEY"):
        load(DATABASE_URI="sqlite://", BIND_KEY="webhooks")


def test_connect_deadline_beyond_the_total_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"RQ_WEBHOOKS_CONNECT_TIMEOUT \(5 s\).*lower it"):
        load(TIMEOUT=2)
    assert load(TIMEOUT=2, CONNECT_TIMEOUT=2).connect_timeout == 2


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().timeout = 3  # type: ignore[misc]


def test_client_certificates_are_files_by_host() -> None:
    settings = load_settings(
        {"RQ_WEBHOOKS_CLIENT_CERTS": {"Hooks.Bank.example.": ("/etc/c.pem", "/etc/k.pem")}}, {}
    )
    assert settings.client_certs == (("hooks.bank.example", "/etc/c.pem", "/etc/k.pem"),)


@pytest.mark.parametrize(
    "value",
    [
        "a",
        ["a"],
        {"https://a.example": ("c", "k")},
        {"a.example": "c"},
        {"a.example": ("c",)},
        {1: ("c", "k")},
    ],
)
def test_other_client_certificates_are_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="CLIENT_CERTS"):
        load_settings({"RQ_WEBHOOKS_CLIENT_CERTS": value}, {})
