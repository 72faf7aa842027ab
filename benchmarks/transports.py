"""What one request costs: the transport and the limit, alternately, and nothing of the pipeline.

``python -m benchmarks.transports [COUNT [ROUNDS]]``: COUNT requests per contender and round to eight instant
receivers, 64 at once. CPU time of the sending process, median of the rounds; what the machine does meanwhile
hardly shows in it, but does in the rate.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.dispatch.http import AttemptRequest, AttemptResult, open_transport
from flask_rq_webhooks.protocol.urls import UrlPolicy

from . import limit
from .payload import body_of
from .receiver import receiver

CONCURRENCY = 64
HOSTS = 8
#: As many are handed over at once as a dispatcher hands over.
BATCH = 500
_HEADERS = {
    "Content-Type": "application/json",
    "User-Agent": "flask-rq-webhooks/benchmark",
    "webhook-id": "evt_01JD3Z0000000000000000000",
    "webhook-timestamp": "1700000000",
    "X-Webhook-Event": "job.success",
    "X-Webhook-Delivery": "dlv_01JD3Z0000000000000000000",
    "X-Webhook-Attempt": "1",
    "webhook-signature": "v1," + "a" * 44,
    "X-Webhook-Signature": "sha256=" + "a" * 64,
    "X-Webhook-Timestamp": "1700000000",
}


def send(count: int, urls: list[str]) -> None:
    """Send *count* requests through the transport that a dispatcher makes."""
    settings = load_settings({}, {})
    body = body_of("a job")
    endless = itertools.cycle(urls)
    with open_transport(settings, UrlPolicy(allow_http=True), concurrency=CONCURRENCY) as transport:
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            batch = Batch(size)
            for _ in range(size):
                request = AttemptRequest(
                    url=next(endless), headers=_HEADERS, body=body, timeout_s=15, connect_timeout_s=5
                )
                transport.submit(request).add_done_callback(batch.note)
            batch.ended.wait()
            assert all(result.status_code == 200 for result in batch.results)


class Batch:
    """Results that are waited for together, as a dispatcher does."""

    def __init__(self, size: int) -> None:
        self.results: list[AttemptResult] = []
        self.ended = threading.Event()
        self._size = size

    def note(self, future: Future[AttemptResult]) -> None:
        self.results.append(future.result())
        if len(self.results) == self._size:
            self.ended.set()


def measure(name: str, count: int) -> tuple[float, float]:
    """Return CPU in microseconds per request and requests per second, without starting up."""
    with receiver(HOSTS) as target:

        def run(so_many: int) -> None:
            if name == "limit":
                limit.main(CONCURRENCY, so_many, target.urls())
            else:
                send(so_many, target.urls())

        run(200)
        cpu, wall = time.process_time(), time.perf_counter()
        run(count)
        return 1e6 * (time.process_time() - cpu) / count, count / (time.perf_counter() - wall)


def main(count: int, rounds: int) -> None:
    """Measure in a process of its own each, in turns, and print the medians."""
    names = ("limit", "ours")
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.transports", "--one", name, str(count)],
                capture_output=True,
                text=True,
                check=True,
            )
            cpu, rate = map(float, done.stdout.split())
            measured[name].append((cpu, rate))
    for name, values in measured.items():
        cpus, rates = zip(*values, strict=True)
        cpu, rate = statistics.median(cpus), statistics.median(rates)
        print(f"{name:10} {cpu:6.0f} µs of CPU a request {rate:8.0f} requests a second")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(*measure(sys.argv[2], int(sys.argv[3])))
    else:
        main(*(int(argument) for argument in (sys.argv[1:] + ["5000", "5"][len(sys.argv) - 1 :])))
