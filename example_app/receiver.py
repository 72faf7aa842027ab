"""A client's side: an HTTP server that verifies what arrives and shows it.

``python -m example_app.receiver --secret S`` prints its URL. Give clients ``<URL>/hooks/<any name>`` as
``webhook_url``. With ``?fail=2`` the first two attempts of every event are answered with 503, with
``?hang=1`` none is answered. The page at ``/`` shows what arrived, ``/received.json`` gives the same to
programs.

It uses the standard library and :mod:`flask_rq_webhooks.receiver` only. A client needs to copy :func:`judge`.
"""

from __future__ import annotations

import argparse
import html
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from flask_rq_webhooks.errors import SignatureError
from flask_rq_webhooks.receiver import verify

#: Names and values as they came; as pairs, because a header that comes twice is a reason to refuse.
Headers = Sequence[tuple[str, str]]

#: More than our service sends by default, and a bound for everybody else.
MAX_BODY_BYTES = 2**20

#: Seconds after which a request that is never answered is let go; every sender gives up before.
HANG_S = 120.0

PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>Received webhooks</title>
  <style>
    :root {{ color-scheme: light dark; }}
    body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
    article {{ border: 1px solid #8886; border-radius: .5rem; padding: .75rem 1rem; margin: 1rem 0; }}
    h2 {{ font-size: 1rem; margin: 0; }}
    pre {{ overflow-x: auto; margin: .5rem 0 0; }}
  </style>
</head>
<body>
  <h1>Received webhooks: {count}</h1>
  {articles}
</body>
</html>
"""

ARTICLE = """<article>
    <h2>{event} · attempt {attempt} · answered {status} · {verdict}</h2>
    <code>{webhook_id}</code> on <code>{path}</code>
    <pre>{body}</pre>
  </article>"""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that arrived, and its answer.

    :param status: 0 for a request that is not answered.
    """

    at: float
    path: str
    webhook_id: str
    event: str
    attempt: str
    verified: bool
    problem: str | None
    status: int
    headers: dict[str, str]
    body: str


def judge(body: bytes, headers: Headers, secrets: Sequence[str]) -> str | None:
    """Return what is wrong with a request; ``None`` when one of *secrets* signed it just now."""
    try:
        verify(body, headers, secrets)
    except SignatureError as exc:
        return str(exc)
    return None


class Receiver(ThreadingHTTPServer):
    """The server and what it has received.

    :param port: 0 lets the kernel choose.
    :param secrets: any of them may have signed.
    """

    daemon_threads = True

    def __init__(self, port: int, secrets: Sequence[str]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.secrets = list(secrets)
        self.arrivals: list[Arrival] = []
        self._failed: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Return the address of the page."""
        return f"http://127.0.0.1:{self.server_port}"

    def receive(self, path: str, headers: Headers, body: bytes) -> int:
        """Keep one request and return the status to answer with.

        401 for a bad signature, 0 for no answer at all (``?hang=1``), 503 for as many attempts as ``?fail=``
        asks for, else 204.
        """
        problem = judge(body, headers, self.secrets)
        webhook_id = _first(headers, "webhook-id")
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        wanted = query.get("fail", ["0"])[0]
        failures = int(wanted) if wanted.isascii() and wanted.isdigit() else 0
        with self._lock:
            if problem is not None:
                status = 401
            elif "hang" in query:
                status = 0
            elif self._failed[webhook_id] < failures:
                self._failed[webhook_id] += 1
                status = 503
            else:
                status = 204
            self.arrivals.append(
                Arrival(
                    at=time.time(),
                    path=parts.path,
                    webhook_id=webhook_id,
                    event=_first(headers, "-event"),
                    attempt=_first(headers, "-attempt"),
                    verified=problem is None,
                    problem=problem,
                    status=status,
                    headers={name.lower(): value for name, value in headers},
                    body=body.decode("utf-8", errors="replace"),
                )
            )
        return status

    def page(self) -> str:
        """Return the page. Everything on it came from outside, so everything is escaped."""
        articles = [
            ARTICLE.format_map(
                {name: html.escape(str(value)) for name, value in asdict(arrival).items()}
                | {
                    "status": arrival.status or "nothing",
                    "verdict": "verified"
                    if arrival.verified
                    else f"refused: {html.escape(arrival.problem or '')}",
                    "body": html.escape(_indented(arrival.body)),
                }
            )
            for arrival in reversed(self.arrivals)
        ]
        return PAGE.format(count=len(articles), articles="\n  ".join(articles))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._answer(413, "text/plain", b"")
            return
        body = self.rfile.read(int(length))
        status = self.server.receive(self.path, self.headers.items(), body)
        if status:
            self._answer(status, "text/plain", b"")
        else:
            self.close_connection = True
            self.connection.settimeout(HANG_S)
            with suppress(OSError):
                self.connection.recv(1)  # returns when the sender has given up and closes the connection

    def do_GET(self) -> None:
        if self.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page().encode())
        elif self.path == "/received.json":
            arrivals = [asdict(arrival) for arrival in self.server.arrivals]
            self._answer(200, "application/json", json.dumps(arrivals).encode())
        else:
            self._answer(404, "text/plain", b"")

    def _answer(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the page shows more."""


def _first(headers: Headers, ending: str) -> str:
    # Header names have no case, and the sender chooses the first part of some (`X-Analysis-Event`).
    return next((value for name, value in headers if name.lower().endswith(ending)), "")


def _indented(body: str) -> str:
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except ValueError:
        return body


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--secret", action="append", required=True, help="what the webhooks are signed with")
    arguments = parser.parse_args()
    with Receiver(arguments.port, arguments.secret) as server:
        print(f"serving on {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
