"""Healthy hosts while one of ten hangs."""

from __future__ import annotations

import time

from .harness import Options, Report
from .installation import Installation, servers
from .receiver import RunningReceiver, receiver


def hanging(options: Options) -> Report:
    """Deliver to nine healthy hosts, with a tenth that never answers and without it."""
    each = options.scaled(1000, 200)
    report = Report(f"One of ten hosts hangs, {each:,} deliveries each, TIMEOUT = 15 s")
    with servers() as some, receiver(10) as target:
        installation = some.installation()
        factors = []
        for number in range(options.rounds):
            alone = _seconds(installation, target, each, hangs=False)
            beside = _seconds(installation, target, each, hangs=True)
            factors.append(beside / alone)
            report.data[f"round {number + 1}"] = {"without_s": alone, "with_s": beside}
    factor = sorted(factors)[len(factors) // 2]
    report.add("nine healthy hosts: time with the hanging one over time without",
               f"{factor:.2f}x", target="<= 1.2x", holds=factor <= 1.2)  # fmt: skip
    return report


def _seconds(installation: Installation, target: RunningReceiver, each: int, *, hangs: bool) -> float:
    installation.clear()
    target.ask("/reset")
    healthy = target.urls(hosts=9)
    urls = [*healthy, target.hanging_url] if hangs else healthy
    installation.seed_outbox(each * len(urls), urls)
    with installation.dispatcher() as dispatcher:
        dispatcher.wait_for_output("started")
        began = time.monotonic()
        while True:
            hosts = target.ask("/hosts")
            done = [hosts.get(f"127.0.0.{number}", [0, 0.0]) for number in range(1, 10)]
            if all(count >= each for count, _last in done):
                return max(last for _count, last in done) - began
            assert time.monotonic() - began < 300, hosts
            time.sleep(0.05)
