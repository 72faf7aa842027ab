"""From the end of a job to the receiver, at a rate that one worker holds."""

from __future__ import annotations

import time

import rq

from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from tests.servers import rq_worker, wait_until

from .harness import Report, Size, percentile
from .installation import KINDS, Installation, servers
from .payload import SECRET
from .receiver import RunningReceiver, receiver

RATE = 20


def register_endpoint(installation: Installation, url: str) -> str:
    """Store an endpoint as a request does, and return the dotted name of its success callback."""
    state = installation.state
    checked = state.url_policy.check_url(url)
    endpoint = register(
        state.database,
        state.cipher,
        NewEndpoint(url=checked.url, host=checked.host_key, secret=SECRET),
        namespace=state.namespace,
        reserved_job_id=None,
    )
    return f"flask_rq_webhooks.callbacks.success.{endpoint}"


def end_to_end(size: Size) -> Report:
    """Run 20 jobs a second, a stock forking worker and one dispatcher, and time each delivery."""
    report = Report(f"End of the job to received, {RATE} jobs a second, forking Worker")
    with servers() as some, receiver(1) as target:
        for kind, name in KINDS.items():
            latencies = _latencies_ms(some.installation(kind), target, size["count"])
            p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
            report.data[name] = {"p50": p50, "p95": percentile(latencies, 0.95), "p99": p99}
            report.add(f"{name}: p50", p50, "ms", promise="latency", at_most=25)
            report.add(f"{name}: p99", p99, "ms", promise="latency", at_most=150)
    return report


def _latencies_ms(installation: Installation, target: RunningReceiver, count: int) -> list[float]:
    callback = register_endpoint(installation, target.url(name="latency"))
    queue = rq.Queue("default", connection=installation.redis)
    target.ask("/reset")
    with installation.dispatcher() as dispatcher, rq_worker(installation.redis_url):
        dispatcher.wait_for_output("started")
        begin = time.monotonic() + 1
        for number in range(count):
            time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
            queue.enqueue_call("benchmarks.tasks.nothing", on_success=rq.Callback(callback), result_ttl=60)
        wait_until(lambda: target.ask("/count") >= count, timeout=60, what="all deliveries")
        installation.wait_until_recorded(count)
    target.check(count)
    return [seconds * 1000 for seconds in target.ask("/latencies")[RATE:]]
