"""From the end of a job to the receiver, at a rate that one worker holds."""

from __future__ import annotations

import time

from flask_rq_webhooks.storage.registration import NewEndpoint, register
from tests.servers import rq_worker, wait_until

from .harness import Options, Report, percentile
from .installation import servers
from .payload import SECRET
from .receiver import receiver

RATE = 20


def end_to_end(options: Options) -> Report:
    """Run 20 jobs a second, stock forking worker and one dispatcher, and time each delivery."""
    report = Report(f"End of the job to received, {RATE} jobs a second")
    count = options.scaled(1200, 300)
    with servers() as some, receiver(1) as target:
        for kind in ("sqlite", "postgresql"):
            installation = some.installation(kind)
            state = installation.state
            checked = state.url_policy.check_url(target.url(name="latency"))
            endpoint = register(
                state.database, state.cipher,
                NewEndpoint(url=checked.url, host=checked.host_key, secret=SECRET),
                namespace=state.namespace, reserved_job_id=None,
            )  # fmt: skip
            callback = f"flask_rq_webhooks.callbacks.success.{endpoint}"
            import rq

            queue = rq.Queue("default", connection=installation.redis)
            target.ask("/reset")
            with installation.dispatcher() as dispatcher, rq_worker(installation.redis_url):
                dispatcher.wait_for_output("started")
                begin = time.monotonic() + 2
                for number in range(count):
                    time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
                    queue.enqueue_call(
                        "benchmarks.tasks.nothing", on_success=rq.Callback(callback), result_ttl=60
                    )
                wait_until(lambda: target.ask("/count") >= count, timeout=60, what="all deliveries")
            latencies = [seconds * 1000 for seconds in target.ask("/latencies")[RATE:]]
            p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
            report.data[kind] = {"p50": p50, "p95": percentile(latencies, 0.95), "p99": p99}
            report.add(f"{kind}: p50", f"{p50:.1f} ms", target="<= 25", holds=p50 <= 25)
            report.add(f"{kind}: p99", f"{p99:.1f} ms", target="<= 150", holds=p99 <= 150)
    return report
