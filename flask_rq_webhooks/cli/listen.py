"""``flask rq-webhooks listen``: a receiver for development that prints and verifies webhooks.

Uses the standard library and our own receiver helper; needs no app and no database.
"""

from __future__ import annotations

import http.server
import json
from collections.abc import Sequence
from datetime import datetime

import click

from ..errors import SignatureError
from ..receiver import ALL_SCHEMES, verify
from .terminal import cleaned, echo, of_port

#: Maximum bytes of a body that are read.
MAX_BODY_BYTES = 16 * 2**20


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8900, show_default=True, type=click.IntRange(0, 65535), help="0 for any free port."
)
@click.option("--secret", "secrets", multiple=True, help="Verify with this secret; may be repeated.")
@click.option("--header-prefix", default="X-Webhook", show_default=True, help="HEADER_PREFIX of the sender.")
@click.option(
    "--status", default=200, show_default=True, type=click.IntRange(200, 599), help="Status of the answers."
)
def listen(host: str, port: int, secrets: tuple[str, ...], header_prefix: str, status: int) -> None:
    """Receive webhooks, print and verify them (for development)."""
    handler = _handler(secrets, header_prefix=header_prefix, status=status)
    try:
        server = http.server.ThreadingHTTPServer((host, port), handler)
    except OSError as exc:
        raise click.ClickException(of_port(exc, host, port)) from exc
    with server:
        shown_host = f"[{host}]" if ":" in host else host
        echo(f"Listening on http://{shown_host}:{server.server_address[1]}/ (Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            echo("")


def _handler(
    secrets: Sequence[str], *, header_prefix: str, status: int
) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            try:
                length = min(int(self.headers.get("Content-Length", 0)), MAX_BODY_BYTES)
            except ValueError:
                self.send_error(400)
                return
            body = self.rfile.read(max(0, length))
            headers = list(self.headers.items())
            for line in describe(self.path, headers, body, secrets, header_prefix=header_prefix):
                echo(line)
            answer = b"" if status in (204, 304) else b"{}"
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(answer)
            self.close_connection = True

        def log_message(self, *_args: object) -> None:
            """Log nothing: requests are printed already."""

    return Handler


def describe(
    path: str,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    secrets: Sequence[str],
    *,
    header_prefix: str = "X-Webhook",
) -> list[str]:
    """Return the lines printed for one request. Untrusted text is escaped."""
    by_name = {name.lower(): value for name, value in headers}
    event = by_name.get(f"{header_prefix.lower()}-event", "no event header")
    lines = [f"{datetime.now():%H:%M:%S} POST {path}  {event}  {len(body)} bytes"]
    lines += [
        f"  {name}: {value}"
        for name, value in headers
        if name.lower().startswith(("webhook-", header_prefix.lower() + "-"))
    ]
    if secrets:
        try:
            verified = verify(
                body, dict(headers), list(secrets), header_prefix=header_prefix, schemes=ALL_SCHEMES
            )
            lines.append(f"  verified ({verified.scheme})")
        except SignatureError as exc:
            lines.append(f"  NOT VERIFIED: {exc}")
    elif any(name in by_name for name in ("webhook-signature", f"{header_prefix.lower()}-signature")):
        lines.append("  signed; give --secret to verify")
    else:
        lines.append("  not signed")
    try:
        text = json.dumps(json.loads(body), indent=2)
    except ValueError:
        text = cleaned(body.decode("utf-8", "backslashreplace"))
    lines += [f"  {line}" for line in text.splitlines()]
    return [cleaned(line) for line in lines]
