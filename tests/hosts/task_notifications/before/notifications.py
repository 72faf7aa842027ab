"""Webhooks about tasks."""

import hashlib
import hmac
import json
import os
from datetime import UTC, datetime
from urllib.parse import urlsplit

import requests

ALLOWED = [domain for domain in os.environ.get("ALLOWED_WEBHOOK_DOMAINS", "").split(",") if domain]


def is_allowed(url):
    host = urlsplit(url).hostname or ""
    return not ALLOWED or any(host == domain or host.endswith(f".{domain}") for domain in ALLOWED)


def build_body(task_id, name, timestamp, *, result=None, error=None):
    payload = {
        "event_type": "task.failed" if error else "task.completed",
        "timestamp": timestamp,
        "task": {"id": task_id, "name": name, "status": "FAILURE" if error else "SUCCESS"},
    }
    payload |= {"error": error} if error else {"result": result}
    return json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()


def signature(body):
    secret = os.environ["WEBHOOK_SIGNING_SECRET"].encode()
    return "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()


def notify(url, task_id, name, *, result=None, error=None, sign=False):
    timestamp = datetime.now(UTC).isoformat()
    body = build_body(task_id, name, timestamp, result=result, error=error)
    headers = {"Content-Type": "application/json", "User-Agent": "Guardrails-Webhook/1.0"}
    if sign:
        headers |= {"X-Guardrails-Signature": signature(body), "X-Guardrails-Timestamp": timestamp}
    for _ in range(3):
        try:
            requests.post(url, data=body, headers=headers, timeout=10).raise_for_status()
            return
        except requests.RequestException:
            continue
