"""What a request pays: the decorated route with a webhook and without, against the same route undecorated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select

from flask_rq_webhooks.storage.models import Endpoint, Watch

from .harness import Report, Size, blocks, percentile
from .installation import KINDS, Installation, servers
from .request_overhead import LARGE_JSON, SMALL_JSON, json_turns_us

#: 127.0.0.1, where nothing listens: nothing is delivered here.
FIELDS = {"webhook_url": "http://127.0.0.1:9/hook", "webhook_secret": "the secret of one client"}


def routes(size: Size) -> Report:
    """Measure the three requests in turns, through the test client."""
    report = Report("What a request pays (test client, the view enqueues one job)")
    with servers() as some:
        for kind, database in KINDS.items():
            took = _measure(some.installation(kind), size["count"])
            parts = {name: blocks(times, size["rounds"]) for name, times in took.items()}
            report.data[kind] = {
                name: {"p50": statistics.median(times), "p95": percentile(times, 0.95)}
                for name, times in took.items()
            }
            plain, mine = report.data[kind]["plain"], report.data[kind]["with webhook"]
            report.add(
                f"{database}: undecorated {plain['p50']:.2f} ms, with a webhook {mine['p50']:.2f} ms "
                f"(p95 {plain['p95']:.2f} and {mine['p95']:.2f}); more",
                [more - less for more, less in zip(parts["with webhook"], parts["plain"], strict=True)],
                "ms",
                promise="route",
                at_most=1.2 if kind == "sqlite" else 1.8,
            )
    for words, body in (("small JSON body", SMALL_JSON), ("100 kB JSON body", LARGE_JSON)):
        turns = json_turns_us(body, size["unused"])
        report.data[words] = turns
        plain = statistics.median(turn[0] for turn in turns)
        report.add(
            f"no webhook_url, {words}: undecorated {plain:,.0f} µs; more",
            [decorated - plain for plain, decorated in turns],
            "µs",
            promise="route-unused",
            at_most=50,
        )
    return report


def _measure(installation: Installation, count: int) -> dict[str, list[float]]:
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
    with installation.state.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(Endpoint)).scalar_one() == count
        confirmed = select(func.count()).select_from(Watch).where(Watch.status == "open")
        assert connection.execute(confirmed).scalar_one() == count
    assert installation.redis.llen("rq:queue:routes") == 3 * count
    return took
