"""The client's side: verifies what it is told of tasks, and prints it. It stays as it is."""

import hashlib
import hmac
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

SECRET = os.environ["WEBHOOK_SIGNING_SECRET"].encode()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        expected = "sha256=" + hmac.new(SECRET, body, hashlib.sha256).hexdigest()
        given = self.headers.get("X-Guardrails-Signature", "")
        sent = datetime.fromisoformat(self.headers.get("X-Guardrails-Timestamp", "1970-01-01T00:00:00+00:00"))
        recent = abs(datetime.now(UTC) - sent) < timedelta(minutes=5)
        verified = hmac.compare_digest(given, expected) and recent
        self.send_response(200 if verified else 401)
        self.end_headers()
        if verified:
            payload = json.loads(body)
            print(json.dumps([payload["event_type"], payload["task"], body.decode()]), flush=True)

    def log_message(self, *args):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
