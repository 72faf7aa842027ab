"""The README's example is a real one: its signatures are those of its body."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flask_rq_webhooks.protocol.signatures import body_signature, standard_signature

README = (Path(__file__).resolve().parents[2] / "README.rst").read_text()


def header(name: str) -> str:
    found = re.search(rf"^    {name}: (.*)$", README, re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_signatures_are_those_of_the_body() -> None:
    secret = re.search(r'"webhook_secret": "([^"]+)"', README)
    payload = re.search(r'^    (\{"event".*?\})$', README, re.MULTILINE | re.DOTALL)
    assert secret is not None
    assert payload is not None
    body = json.dumps(json.loads(payload[1]), separators=(",", ":")).encode()
    assert header("X-Webhook-Signature") == body_signature(secret[1], body)
    assert header("webhook-signature") == standard_signature(
        secret[1], header("webhook-id"), int(header("webhook-timestamp")), body
    )
