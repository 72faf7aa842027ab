"""CPU of one delivery, step by step, in one process: nothing runs beside the step that is measured.

CPU time, not wall time: what the machine does meanwhile hardly shows.
"""

from __future__ import annotations

import cProfile
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flask_rq_webhooks.dispatch.host_limits import RateLimiter
from flask_rq_webhooks.dispatch.http import AttemptRequest, AttemptResult, open_transport
from flask_rq_webhooks.dispatch.recorder import judge
from flask_rq_webhooks.dispatch.request_builder import build_request
from flask_rq_webhooks.observe.ingest import Ingest
from flask_rq_webhooks.observe.publisher import Publisher
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.attempts import AttemptRecord, record_attempts
from flask_rq_webhooks.storage.claims import ClaimedDelivery, claim_due

from .harness import Report, Size
from .installation import KINDS, Installation, servers
from .receiver import RunningReceiver, receiver

STEPS = ("ingest", "claim", "rate limit", "sign", "send", "record")
#: What one claim and one record take while a dispatcher of 64 is busy.
BATCH = 64


def stages(size: Size) -> Report:
    """Take deliveries through every step, one step after the other."""
    report = Report(f"CPU of one delivery by step, one process, 40 hosts, batches of {BATCH}")
    with servers() as some, receiver(40) as target:
        for kind, database in KINDS.items():
            installation = some.installation(kind)
            rounds = [_measure(installation, target, size["count"]) for _ in range(size["rounds"] + 1)]
            steps = {name: statistics.median(one[name] for one in rounds[1:]) for name in STEPS}
            report.data[database] = steps
            parts = ", ".join(f"{step} {value:.3f}" for step, value in steps.items())
            report.add(f"{database}: {parts}", sum(steps.values()), "ms")
            report.data[f"{database}, profile of ingest"] = _profile_of_ingest(
                installation, target, size["count"]
            )
        # The last installation is the one on PostgreSQL.
        report.data["bytes"] = {
            "sql": installation.bytes_per_delivery(),
            "outbox entry": _entry_bytes(installation, target),
        }
    return report


def _profile_of_ingest(installation: Installation, target: RunningReceiver, count: int) -> dict[str, float]:
    """Return the share of each package in the CPU of ingest."""
    installation.clear()
    installation.seed_outbox(count, target.urls())
    ingest = Ingest(installation.state, consumer="profile", publisher=Publisher(installation.state))
    profile = cProfile.Profile(time.process_time)
    left = count
    with profile:
        while left:
            left -= ingest.run_once(block_ms=0)
    profile.create_stats()
    return shares_by_package(profile.stats)


def shares_by_package(stats: Mapping[Any, Any]) -> dict[str, float]:
    """Return the share of each package in the time of a profile, the largest first.

    What is built in counts for who called it.
    """
    spent: Counter[str] = Counter()
    for (file, _line, _name), (_calls, _primitive, own, _with_callees, callers) in stats.items():
        if file != "~" or not callers:
            spent[_package(file)] += own
            continue
        for (caller, _caller_line, _caller_name), figures in callers.items():
            spent[_package(caller)] += figures[2]
    whole = sum(spent.values())
    return {package: seconds / whole for package, seconds in spent.most_common()}


def _package(file: str) -> str:
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    if "flask_rq_webhooks" in parts:
        return "flask_rq_webhooks"
    return "json" if "json" in parts[-2:-1] else "Python"


def _entry_bytes(installation: Installation, target: RunningReceiver) -> float:
    """Return the Redis memory of one entry in the outbox."""
    installation.clear()
    installation.seed_outbox(1000, target.urls())
    used = installation.redis.memory_usage(installation.state.outbox.key, samples=0)
    assert used is not None
    return used / 1000


class _Clock:
    """CPU of this process by step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - began


def _measure(installation: Installation, target: RunningReceiver, count: int) -> dict[str, float]:
    installation.clear()
    target.ask("/reset")
    installation.seed_outbox(count, target.urls())
    state, clock = installation.state, _Clock()
    settings = state.settings
    ingest = Ingest(state, consumer="bench", publisher=Publisher(state))
    limiter = RateLimiter(state.redis, settings.rate_limit_per_minute, namespace=state.namespace)
    left = count
    while left:
        with clock.step("ingest"):
            left -= ingest.run_once(block_ms=0)
    transport = open_transport(settings, state.url_policy, concurrency=BATCH)
    try:
        left = count
        while left:
            with clock.step("claim"):
                claimed = claim_due(state.database, limit=BATCH, per_host=8, in_flight={}, lease_s=45)
            with clock.step("rate limit"):
                for delivery in claimed:
                    limiter.wait_s(delivery.host)
            with clock.step("sign"):
                now = datetime.now(UTC)
                requests = [build_request(delivery, state=state, now=now) for delivery in claimed]
            with clock.step("send"):
                results = [future.result() for future in [transport.submit(one) for one in requests]]
            with clock.step("record"):
                records = [_record(state, *parts) for parts in zip(claimed, requests, results, strict=True)]
                record_attempts(state.database, records, dispatcher_id="dsp_bench", disable_after=100)
            left -= len(claimed)
    finally:
        transport.close(wait=True)
        limiter.close()
    installation.wait_until_recorded(count)
    target.check(count)
    return {name: 1000 * seconds / count for name, seconds in clock.spent.items()}


def _record(
    state: State, delivery: ClaimedDelivery, request: AttemptRequest, result: AttemptResult
) -> AttemptRecord:
    assert result.status_code == 200, result
    return judge(state, delivery, request, result)
