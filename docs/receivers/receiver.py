#!/usr/bin/env python3
"""A webhook receiver with nothing but the Python standard library. Copy it and change ``handle``.

    WEBHOOK_SECRET='the secret you registered' PORT=8080 python3 receiver.py

While you change the secret, put the old one into WEBHOOK_OLD_SECRET: both are accepted.
"""

import base64
import binascii
import hashlib
import hmac
import http.server
import json
import os
import re
import time

SECRETS = [os.environ[name] for name in ("WEBHOOK_SECRET", "WEBHOOK_OLD_SECRET") if os.environ.get(name)]
TOLERANCE_S = 300
MAX_BODY_BYTES = 1024 * 1024

# The same webhook can come more than once, with the same id. A real receiver keeps the ids in its database.
seen_ids = set()


def handle(webhook):
    """Do what you want to do with it. Answer quickly: longer work belongs into a queue."""
    print(json.dumps(webhook, sort_keys=True), flush=True)


def key_of(secret):
    """Return the bytes to sign with: ``whsec_`` is followed by base64, other secrets are text."""
    if secret.startswith("whsec_"):
        encoded = secret.removeprefix("whsec_").rstrip("=")
        try:
            return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True) or secret.encode()
        except binascii.Error:
            pass
    return secret.encode()


def is_genuine(event_id, timestamp, signatures, body):
    """Say whether the sender knew one of our secrets, and that not long ago."""
    if not re.fullmatch(r"[!-\-/-~]{1,256}", event_id) or not re.fullmatch(r"0|[1-9][0-9]{0,11}", timestamp):
        return False
    if abs(time.time() - int(timestamp)) > TOLERANCE_S:
        return False
    signed = f"{event_id}.{timestamp}.".encode("ascii") + body
    genuine = False
    for secret in SECRETS:
        digest = hmac.new(key_of(secret), signed, hashlib.sha256).digest()
        expected = b"v1," + base64.b64encode(digest)
        for signature in signatures.split(" "):
            # compare_digest takes as long for a wrong signature as for a right one.
            if hmac.compare_digest(expected, signature.encode("latin-1")):
                genuine = True
    return genuine


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 30

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            return self.answer(413)
        # The bytes as they came: parsing and writing JSON again would change them.
        body = self.rfile.read(int(length))
        event_id = self.headers.get("webhook-id", "")
        if not is_genuine(
            event_id,
            self.headers.get("webhook-timestamp", ""),
            self.headers.get("webhook-signature", ""),
            body,
        ):
            return self.answer(401)
        if event_id not in seen_ids:
            handle(json.loads(body))
            # After the work: if it fails, the sender tries again.
            seen_ids.add(event_id)
        # Any 2xx says "got it"; 5xx asks for another attempt, 410 for none ever again.
        return self.answer(204)

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    if not SECRETS:
        raise SystemExit("Set WEBHOOK_SECRET to the secret you registered the webhook with.")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
