"""What webhook fields may say, and how it is said when they may not."""

from __future__ import annotations

from typing import Any

import pytest

from flask_rq_webhooks.accept.request_schema import WebhookRequest, load_webhook
from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.errors import InvalidWebhookError
from flask_rq_webhooks.protocol.urls import UrlPolicy

URL = "https://hooks.example.com/in"
POLICY = UrlPolicy()
FORMATS = ("job", "standard", "task")


def load(fields: dict[str, Any], policy: UrlPolicy = POLICY, **config: Any) -> WebhookRequest:
    settings = load_settings({f"RQ_WEBHOOKS_{key}": value for key, value in config.items()}, environ={})
    return load_webhook({"webhook_url": URL, **fields}, settings=settings, url_policy=policy, formats=FORMATS)


def reasons(fields: dict[str, Any], **config: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidWebhookError) as caught:
        load(fields, **config)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return caught.value.details


def test_url_alone() -> None:
    assert load({}) == WebhookRequest(url=URL, host="hooks.example.com", format="job")


def test_everything() -> None:
    loaded = load(
        {
            "webhook_url": "https://HOOKS.example.com:8443/in?a=b#c",
            "webhook_secret": "  spaces are part of it\t",
            "webhook_headers": {"Authorization": "Bearer x", "X-Own": ""},
            "sign_payload": True,
            "webhook_events": ["job.success", "job.blocked", "job.success"],
            "webhook_format": "standard",
            "webhook_reference": "x" * 256,
            "webhook_timeout": 2.5,
            "webhook_retry_count": 12,
            "unknown": object(),
        }
    )

    assert loaded == WebhookRequest(
        url="https://hooks.example.com:8443/in?a=b",
        host="hooks.example.com:8443",
        secret="  spaces are part of it\t",
        headers={"Authorization": "Bearer x", "X-Own": ""},
        sign_payload=True,
        events=("job.success", "job.blocked"),
        format="standard",
        reference="x" * 256,
        timeout_s=2.5,
        max_attempts=12,
    )
    assert "spaces" not in repr(loaded)
    assert "Bearer" not in repr(loaded)


@pytest.mark.parametrize(
    ("field", "text", "attribute", "value"),
    [
        ("sign_payload", "true", "sign_payload", True),
        ("sign_payload", "0", "sign_payload", False),
        ("webhook_events", "job.success, job.failure", "events", ("job.success", "job.failure")),
        ("webhook_events", '["job.stopped"]', "events", ("job.stopped",)),
        ("webhook_headers", '{"A": "b"}', "headers", {"A": "b"}),
        ("webhook_headers", "{}", "headers", {}),
        ("webhook_timeout", "1.5", "timeout_s", 1.5),
        ("webhook_retry_count", "3", "max_attempts", 3),
    ],
)
def test_text_of_forms(field: str, text: str, attribute: str, value: Any) -> None:
    assert getattr(load({field: text, "webhook_secret": "s"}), attribute) == value


@pytest.mark.parametrize("field", ["webhook_secret", "webhook_headers", "sign_payload", "webhook_events"])
def test_null_is_as_if_absent(field: str) -> None:
    assert load({field: None}) == load({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("webhook_url", None),
        ("webhook_url", ""),
        ("webhook_url", 7),
        ("webhook_url", True),
        ("webhook_url", [URL]),
        ("webhook_url", {"url": URL}),
        ("webhook_url", "http://hooks.example.com/"),
        ("webhook_url", "https://user:password@hooks.example.com/"),
        ("webhook_url", "https://127.0.0.1/"),
        ("webhook_url", "https://localhost/"),
        ("webhook_url", "https://hooks.example.com/\ud800"),
        ("webhook_secret", ""),
        ("webhook_secret", "x" * 513),
        ("webhook_secret", "é" * 257),
        ("webhook_secret", "\ud800"),
        ("webhook_secret", 7),
        ("webhook_headers", "not json"),
        ("webhook_headers", "[" * 100_000),
        ("webhook_headers", ["A", "b"]),
        ("webhook_headers", {"Host": "x"}),
        ("webhook_headers", {"webhook-id": "x"}),
        ("webhook_headers", {"X-Webhook-Signature": "x"}),
        ("webhook_headers", {"A": "b\r\nC: d"}),
        ("webhook_headers", {"A": 1}),
        ("sign_payload", "perhaps"),
        ("sign_payload", 2),
        ("webhook_events", []),
        ("webhook_events", ""),
        ("webhook_events", ["job.finished"]),
        ("webhook_events", ["webhook.ping"]),
        ("webhook_events", [7]),
        ("webhook_events", {"job.success": True}),
        ("webhook_format", "xml"),
        ("webhook_format", 7),
        ("webhook_reference", "x" * 257),
        ("webhook_reference", "NUL \0"),
        ("webhook_reference", "\udfff"),
        ("webhook_reference", 7),
        ("webhook_timeout", 0),
        ("webhook_timeout", -1),
        ("webhook_timeout", 15.1),
        ("webhook_timeout", float("nan")),
        ("webhook_timeout", float("inf")),
        ("webhook_timeout", "soon"),
        ("webhook_timeout", True),
        ("webhook_retry_count", 0),
        ("webhook_retry_count", 13),
        ("webhook_retry_count", 2.5),
        ("webhook_retry_count", True),
        ("webhook_retry_count", "many"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_refused(field: str, value: Any) -> None:
    details = reasons({field: value})

    assert list(details) == [field]
    assert details[field]
    assert all(isinstance(why, str) and why for why in details[field])


def test_every_bad_field_is_named_at_once_and_the_secret_is_not_repeated() -> None:
    secret = "s3cret" * 100
    details = reasons({"webhook_url": "ftp://x/", "webhook_secret": secret, "webhook_timeout": "x"})

    assert set(details) == {"webhook_url", "webhook_secret", "webhook_timeout"}
    assert "s3cret" not in repr(details)


def test_bounds_come_from_the_settings() -> None:
    assert load({"webhook_timeout": 30}, TIMEOUT=30).timeout_s == 30
    assert "at most 2." in reasons({"webhook_timeout": 3}, TIMEOUT=2, CONNECT_TIMEOUT=1)["webhook_timeout"][0]
    assert "1 to 3." in reasons({"webhook_retry_count": 4}, RETRY_SCHEDULE=[1, 2])["webhook_retry_count"][0]
    assert load({}, FORMAT="task").format == "task"


def test_signing_needs_a_secret_of_somebody() -> None:
    assert load({"sign_payload": True, "webhook_secret": "own"}).sign_payload is True
    assert load({"sign_payload": True}, SIGNING_SECRET="server's").sign_payload is True
    assert load({"sign_payload": False}).sign_payload is False
    assert list(reasons({"sign_payload": True})) == ["sign_payload"]


def test_domains_that_are_allowed() -> None:
    policy = UrlPolicy(allowed_domains=["example.com"])

    assert load({}, policy).host == "hooks.example.com"
    with pytest.raises(InvalidWebhookError) as caught:
        load({"webhook_url": "https://example.org/"}, policy)
    assert "allowed domains" in caught.value.details["webhook_url"][0]
