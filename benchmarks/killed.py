"""How soon ``worker --processes 2`` is back at full speed after one was killed, and whether all arrives.

``python -m benchmarks.killed [--kind postgresql] [--count 60000] [--rounds 2]``

A backlog is worked off. After some seconds one child is killed, later the parent, which is started again at
once, as systemd would do it. *Full speed* is nine tenths of the median rate of the seconds before the kill,
held for a second. ``make bench`` leaves this out: what a killed process had in flight is sent again only
after its lease.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import psutil

from tests.servers import Process, wait_until

from .installation import Installation, servers
from .receiver import RunningReceiver, receiver

HOSTS = 40
#: Seconds at full speed before a kill.
BEFORE_S = 4.0
#: Seconds in which the rate has to be back; then the next kill follows.
AFTER_S = 10.0
#: Width of the window in which a rate is taken, and its step.
WINDOW_S, STEP_S = 1.0, 0.1


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--count", type=int, default=60_000, help="deliveries of a round")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with servers() as some, receiver(HOSTS) as target:
        installation = some.installation(options.kind, timeout=2.0, connect_timeout=2.0)
        for number in range(options.rounds):
            print(f"round {number + 1}", flush=True)
            one_round(installation, target, options.count)


def one_round(installation: Installation, target: RunningReceiver, count: int) -> None:
    """Kill a child, then the parent; print how long each was felt, and check what arrived."""
    installation.clear()
    target.ask("/reset")
    installation.seed_outbox(count, target.urls())
    first = start(installation)
    processes = [first]
    try:
        wait_until(lambda: target.ask("/count") > 100, timeout=60, what="the first deliveries")
        time.sleep(BEFORE_S)
        children = psutil.Process(first.pid).children()
        kills = [("child", time.monotonic())]
        children[0].kill()
        time.sleep(AFTER_S)
        kills.append(("parent", time.monotonic()))
        first.kill()
        processes.append(start(installation))
        time.sleep(AFTER_S)
        left = count - target.ask("/count")
        wait_until(lambda: target.ask("/checked")["distinct"] >= count, timeout=180, what="every delivery")
        arrivals = sorted(target.ask("/arrivals"))
        seen = target.ask("/checked")
        assert not seen["wrong"], seen
        assert seen["signed"] == seen["requests"], seen
        assert processes[-1].stop() == 0, processes[-1].output
    finally:
        for process in processes:
            process.__exit__(None, None, None)
    for who, at in kills:
        before = full_speed(arrivals, at)
        back_s = back_after_s(arrivals, at, 0.9 * before)
        print(f"  {who} killed at {before:,.0f}/s: nine tenths again after {back_s:.1f} s")
    print(f"  {len(arrivals):,} requests for {count:,} deliveries, each received; {len(arrivals) - count} "
          f"repeats; {left:,} were left when it was last looked", flush=True)  # fmt: skip


def start(installation: Installation) -> Process:
    """Start the command."""
    return installation.dispatcher("--processes", "2").__enter__()


def full_speed(arrivals: list[float], until: float) -> float:
    """Return the median of the rates before *until*, window by window."""
    ends = [until - number * STEP_S for number in range(int((BEFORE_S - WINDOW_S) / STEP_S))]
    return statistics.median(rate(arrivals, end - WINDOW_S) for end in ends)


def back_after_s(arrivals: list[float], since: float, wanted: float) -> float:
    """Return the seconds from *since* until a window with the rate *wanted* begins, after one without."""
    felt = False
    for number in range(int(AFTER_S / STEP_S)):
        begin = since + number * STEP_S
        if rate(arrivals, begin) < wanted:
            felt = True
        elif felt:
            return number * STEP_S
    return AFTER_S if felt else 0.0


def rate(arrivals: list[float], begin: float) -> float:
    """Return the arrivals a second of the window that starts at *begin*."""
    return sum(begin <= at < begin + WINDOW_S for at in arrivals) / WINDOW_S


if __name__ == "__main__":
    sys.exit(main())
