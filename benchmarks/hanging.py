"""Healthy hosts while one of ten hangs."""

from __future__ import annotations

import time

from .harness import Report, Size
from .installation import Installation, servers
from .receiver import RunningReceiver, receiver

HOSTS = 10


def hanging(size: Size) -> Report:
    """Deliver to nine healthy hosts, with a tenth that never answers and without it."""
    each = size["each"]
    report = Report(f"One of {HOSTS} hosts hangs, {each:,} deliveries each, TIMEOUT = 15 s")
    with servers() as some, receiver(HOSTS) as target:
        installation = some.installation()
        pairs: list[tuple[float, float]] = []
        for number in range(size["rounds"]):
            pair = {
                hangs: _seconds(installation, target, each, hangs=hangs)
                for hangs in ((False, True) if number % 2 == 0 else (True, False))
            }
            pairs.append((pair[False], pair[True]))
    report.data["ours"] = [{"without_s": alone, "with_s": beside} for alone, beside in pairs]
    report.add(
        "time of nine healthy hosts with the hanging one over that without it",
        [beside / alone for alone, beside in pairs],
        "x",
        promise="hanging",
        at_most=1.2,
    )
    return report


def _seconds(installation: Installation, target: RunningReceiver, each: int, *, hangs: bool) -> float:
    installation.clear()
    target.ask("/reset")
    healthy = target.urls(hosts=HOSTS - 1)
    urls = [*healthy, target.hanging_url] if hangs else healthy
    installation.seed_outbox(each * len(urls), urls)
    with installation.dispatcher() as dispatcher:
        dispatcher.wait_for_output("started")
        began = time.monotonic()
        while True:
            hosts = target.ask("/hosts")
            done = [hosts.get(f"127.0.0.{number}", [0, 0.0]) for number in range(1, HOSTS)]
            if all(count >= each for count, _last in done):
                break
            assert time.monotonic() - began < 300, hosts
            time.sleep(0.05)
        installation.wait_until_recorded(each * (HOSTS - 1))
        dispatcher.kill()  # asked to stop, it would wait for the host that hangs
    assert [count for count, _last in done] == [each] * (HOSTS - 1), hosts
    return float(max(last for _count, last in done)) - began
