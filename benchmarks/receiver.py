"""A fast receiver in a process of its own, so that it takes no time from what is measured.

``python -m benchmarks.receiver HOSTS`` listens on ``127.0.0.1`` … ``127.0.0.HOSTS``, all on one port, and
prints it. A POST to ``/<ms>/…`` is answered after so many milliseconds, one to ``/hang`` never. ``GET`` asks:
``/count``, ``/arrivals``, ``/latencies``, ``/hosts``, ``/checked``, ``/reset``. Requests are kept as they
came and looked at when ``/checked`` is asked for, so that checking them takes no time from a run.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import hashlib
import hmac
import http.client
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flask_rq_webhooks.errors import SignatureError
from flask_rq_webhooks.receiver import verify
from tests.servers import Process

from .payload import SECRET

#: Requests kept for the check; a longer run is checked by its first ones.
KEPT = 80_000

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"


class Ledger:
    """What arrived: monotonic times, and per host the number and the last time."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> dict[str, Any]:
        self.arrivals = array.array("d")
        self.latencies: list[dict[str, Any]] = []
        self.hosts: dict[str, list[float]] = {}
        self.kept: list[tuple[bytes, bytes]] = []
        return {}

    def note(self, host: str, path: bytes, head: bytes, body: bytes) -> None:
        now = time.monotonic()
        self.arrivals.append(now)
        if len(self.kept) < KEPT:
            self.kept.append((head, body))
        entry = self.hosts.setdefault(host, [0, 0.0])
        entry[0] += 1
        entry[1] = now
        if path.startswith(b"/0/latency"):
            arrived, event = time.time(), json.loads(body)
            ended = event["result"]["ended"]
            self.latencies.append({"job_id": event["job_id"], "ended": ended, "arrived": arrived})

    def answer(self, question: str) -> Any:
        if question == "/count":
            return len(self.arrivals)
        if question == "/reset":
            return self.reset()
        return {
            "/arrivals": lambda: list(self.arrivals),
            "/latencies": lambda: self.latencies,
            "/hosts": lambda: self.hosts,
            "/checked": lambda: checked(self.kept),
        }[question]()


def checked(requests: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Return how many requests there are, how many differ, and how many are signed, and signed rightly."""
    ids, signed, wrong = set(), 0, []
    for head, body in requests:
        lines = head.decode("latin-1").split("\r\n")[1:]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        ids.add(headers.get("x-webhook-delivery") or hashlib.sha256(body).hexdigest())
        try:
            signed += is_signed(headers, body)
        except SignatureError as exc:
            wrong.append(str(exc))
    return {"requests": len(requests), "distinct": len(ids), "signed": signed, "wrong": wrong[:3]}


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    """Say whether a request is signed.

    :raises SignatureError: when it is, and not with the one secret.
    """
    if "webhook-signature" in headers or "x-webhook-signature" in headers:
        if "webhook-id" in headers:
            verify(body, headers, SECRET, tolerance=86_400)
        plain = {"X-Webhook-Signature": headers["x-webhook-signature"]}
        verify(body, plain, SECRET, schemes=("sha256",))
        return True
    if "django-webhook-signature-v1" in headers:
        text = headers["django-webhook-request-timestamp"].encode() + b":" + body
        expected = hmac.new(SECRET.encode(), text, hashlib.sha256).hexdigest()
        if headers["django-webhook-signature-v1"] != expected:
            raise SignatureError("django-webhook's signature is wrong")
        return True
    return False


class Connection(asyncio.Protocol):
    """Just enough HTTP/1.1."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._host = transport.get_extra_info("sockname")[0]
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            at = head.lower().find(b"\r\ncontent-length:")
            length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            method, path = head.split(b" ", 2)[:2]
            self._respond(method, path, head, body)

    def _respond(self, method: bytes, path: bytes, head: bytes, body: bytes) -> None:
        if method == b"GET":
            content = json.dumps(self._ledger.answer(path.decode())).encode()
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
            )
            return
        self._ledger.note(self._host, path, head, body)
        if path == b"/hang":
            return
        delay_ms = int(path.split(b"/", 2)[1])
        if delay_ms:
            self._loop.call_later(delay_ms / 1000, self._transport.write, _OK)
        else:
            self._transport.write(_OK)


async def serve(hosts: int) -> None:
    loop, ledger, port = asyncio.get_running_loop(), Ledger(), 0
    for number in range(1, hosts + 1):
        server = await loop.create_server(lambda: Connection(ledger), f"127.0.0.{number}", port, backlog=1024)
        port = server.sockets[0].getsockname()[1]
    print(f"listening on {port}", flush=True)
    await asyncio.Event().wait()


@dataclass
class RunningReceiver:
    """A receiver to ask."""

    port: int
    hosts: int
    pid: int

    def url(self, host: int = 0, *, delay_ms: int = 0, name: str = "hook") -> str:
        return f"http://127.0.0.{host % self.hosts + 1}:{self.port}/{delay_ms}/{name}"

    def urls(self, *, hosts: int | None = None, delay_ms: int = 0) -> list[str]:
        return [self.url(host, delay_ms=delay_ms) for host in range(hosts or self.hosts)]

    @property
    def hanging_url(self) -> str:
        return f"http://127.0.0.{self.hosts}:{self.port}/hang"

    def ask(self, question: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", question)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def check(self, count: int, *, signed: bool = True, distinct: bool = True) -> None:
        """Fail unless exactly *count* requests have come, none twice, each rightly signed.

        :param signed: ``False`` for those who do not sign.
        :param distinct: ``False`` for those who send one body over and over.
        """
        arrived, seen = self.ask("/count"), self.ask("/checked")
        assert arrived == count, f"{arrived} requests for {count} deliveries"
        assert not seen["wrong"], seen
        assert seen["signed"] == (seen["requests"] if signed else 0), seen
        assert not distinct or seen["distinct"] == seen["requests"], seen


@contextmanager
def receiver(hosts: int = 40) -> Iterator[RunningReceiver]:
    """Start a receiver that listens on so many addresses."""
    with Process("python", "-m", "benchmarks.receiver", str(hosts)) as process:
        process.wait_for_output("listening on")
        yield RunningReceiver(int(process.output.split()[-1]), hosts, process.pid)


if __name__ == "__main__":
    gc.disable()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(int(sys.argv[1])))
