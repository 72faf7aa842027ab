"""What a request pays: the decorated route with a webhook and without, against the same route undecorated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from .harness import Options, Report, percentile
from .installation import Installation, servers

#: 127.0.0.1, where nobody listens and nobody is asked: nothing is delivered here.
FIELDS = {"webhook_url": "http://127.0.0.1:9/hook", "webhook_secret": "the secret of one client"}


def routes(options: Options) -> Report:
    """Measure the three requests in turns, through the test client."""
    report = Report("What a request pays (test client, view enqueues one job)")
    count = options.scaled(1500, 400)
    with servers() as some:
        for kind in ("sqlite", "postgresql"):
            installation = some.installation(kind)
            times = _measure(installation, count)
            installation.redis.flushdb()
            report.data[kind] = times
            plain, with_webhook = times["plain"]["p50"], times["with webhook"]["p50"]
            more, unused_us = with_webhook - plain, (times["without"]["p50"] - plain) * 1000
            report.add(
                f"{kind}: undecorated p50 {plain:.2f} ms, p95 {times['plain']['p95']:.2f}; with webhook "
                f"p50 {with_webhook:.2f}, p95 {times['with webhook']['p95']:.2f}",
                f"+{more:.2f} ms",
                target="<= 2.5 ms",
                holds=more <= 2.5,
            )
            report.data[kind]["unused_us"] = unused_us
    unused = _unused_us(options)
    report.add(
        "decorated, no webhook_url: more than undecorated",
        f"+{unused:.0f} µs",
        target="<= 50",
        holds=unused <= 50,
    )
    return report


def _measure(installation: Installation, count: int) -> dict[str, Any]:
    client = installation.app.test_client()
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: client.post("/plain", json={"a": 1}),
        "without": lambda: client.post("/decorated", json={"a": 1}),
        "with webhook": lambda: client.post("/decorated", json={"a": 1, **FIELDS}),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count):
        for name, call in calls.items():
            started = time.perf_counter()
            response = call()
            elapsed = (time.perf_counter() - started) * 1000
            assert response.status_code == 200
            assert response.headers.get("Webhook-Registered") == ("true" if name == "with webhook" else None)
            if number >= count // 10:
                took[name].append(elapsed)
    return {
        name: {"p50": statistics.median(some), "p95": percentile(some, 0.95)} for name, some in took.items()
    }


def _unused_us(options: Options) -> float:
    from .request_overhead import small_json_us

    plain, decorated = small_json_us(options.scaled(6000, 2000))
    return decorated - plain
