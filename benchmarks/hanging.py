"""Healthy hosts while others hang: one of ten, and a stranger's thousands."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.servers import wait_until

from .harness import Report, Size, percentile
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


#: Healthy hosts, and their deliveries a second, beside those of a stranger.
HONEST, RATE = 20, 20


def strangers(size: Size) -> Report:
    """Deliver to healthy hosts while thousands of hosts of one stranger hang, all of them due at once.

    The healthy ones have received before. A dispatcher that starts later, among the hanging ones, is measured
    as well: it has to know them from SQL.
    """
    report = Report(
        f"{size['hosts']:,} hosts of one stranger hang, {HONEST} healthy ones get {RATE} deliveries/s, "
        "SQLite, TIMEOUT = 15 s"
    )
    with servers() as some, receiver(HONEST) as target, deaf_listener() as port:
        installation = some.installation()
        healthy = [target.url(host, name="latency") for host in range(HONEST)]
        numbers = range(size["hosts"])
        hang = [f"http://127.1.{number // 250}.{1 + number % 250}:{port}/" for number in numbers]
        with installation.dispatcher() as dispatcher:
            dispatcher.wait_for_output("started")
            installation.seed_outbox(HONEST, healthy, result={"ended": time.time()})
            wait_until(lambda: target.ask("/count") >= HONEST, timeout=60, what="the first deliveries")
            installation.wait_until_recorded(HONEST)
            installation.seed_due(size["hosts"], hang)
            _tell(report, "all due at once", _latencies(installation, target, healthy, size["count"]))
            dispatcher.kill()
        with installation.dispatcher() as dispatcher:
            dispatcher.wait_for_output("started")
            _tell(report, "after a restart", _latencies(installation, target, healthy, size["count"]))
            dispatcher.kill()
    return report


@contextmanager
def deaf_listener() -> Iterator[int]:
    """Listen on every loopback address, let the kernel accept connections, and never read; give the port."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))  # noqa: S104  (127.0.0.0/8 is as far as it is asked)
        listener.listen(4096)
        yield listener.getsockname()[1]


def _latencies(
    installation: Installation, target: RunningReceiver, urls: list[str], count: int
) -> list[float]:
    """Return the seconds from the end of each job until it is received."""
    target.ask("/reset")
    begin = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
        installation.seed_outbox(1, [urls[number % len(urls)]], result={"ended": time.time()})
    wait_until(lambda: target.ask("/count") >= count, timeout=600, what="deliveries to healthy hosts")
    return [one["arrived"] - one["ended"] for one in target.ask("/latencies")]


def _tell(report: Report, when: str, latencies: list[float]) -> None:
    p50, p95 = percentile(latencies, 0.5), percentile(latencies, 0.95)
    report.data[when] = {"p50": p50, "p95": p95, "max": max(latencies)}
    report.add(f"{when}: p50", p50, "s")
    report.add(f"{when}: p95", p95, "s", promise="strangers", at_most=2)
