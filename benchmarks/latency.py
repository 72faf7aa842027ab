"""From the end of a job to the receiver, at a rate that one worker holds, and where the time goes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rq

from flask_rq_webhooks import _steps
from flask_rq_webhooks.queue.outbox import Outbox
from flask_rq_webhooks.storage.endpoints import NewEndpoint, register
from tests.servers import rq_worker, wait_until

from .harness import Report, Size, percentile
from .installation import KINDS, Installation, servers
from .payload import SECRET
from .receiver import RunningReceiver, receiver

RATE = 20
#: What a delivery goes through, in this order.
STAGES = ("callback", "outbox read", "RQ's commit", "confirmed", "SQL", "first byte")


def register_endpoint(installation: Installation, url: str, job_id: str | None = None) -> str:
    """Store an endpoint as a request does, and return the dotted name of its success callback.

    :param job_id: of the first job of the request, which is watched then.
    """
    state = installation.state
    checked = state.url_policy.check_url(url)
    endpoint = register(
        state.database,
        state.cipher,
        NewEndpoint(url=checked.url, host=checked.host_key, secret=SECRET),
        namespace=state.namespace,
        reserved_job_id=job_id,
    )
    return f"flask_rq_webhooks.callbacks.success.{endpoint}"


def note_steps(path: str) -> None:
    """Write into a file when this process, a dispatcher, reaches each step."""
    file = open(path, "a", buffering=1)  # noqa: SIM115  (until the process ends)

    def note(step: str, entries: Mapping[str, float] | None = None) -> None:
        file.write(json.dumps([step, time.time(), entries or {}]) + "\n")

    def read(self: Outbox, *args: Any, **options: Any) -> Any:
        found = read_entries(self, *args, **options)
        if found:
            note("read", {one.entry.job_id: one.entry.at for one in found if one.entry is not None})
        return found

    read_entries = Outbox.read
    Outbox.read = read  # type: ignore[method-assign]
    _steps.install(note)


def end_to_end(size: Size) -> Report:
    """Run 20 jobs a second, a stock forking worker and one dispatcher, and time each delivery."""
    report = Report(f"End of the job to received, {RATE} jobs a second, forking Worker")
    rounds: dict[str, list[list[list[float]]]] = {name: [] for name in KINDS.values()}
    with servers() as some, receiver(1) as target:
        installations = {name: some.installation(kind) for kind, name in KINDS.items()}
        for _ in range(size["rounds"]):
            for name, installation in installations.items():
                rounds[name].append(_ends(installation, target, size["count"]))
    for name, measured in rounds.items():
        latencies = [[1000 * (times[-1] - times[0]) for times in ends] for ends in measured]
        p50, p95, p99 = ([percentile(one, share) for one in latencies] for share in (0.5, 0.95, 0.99))
        stages = {
            stage: statistics.median(
                1000 * (times[number + 1] - times[number]) for ends in measured for times in ends
            )
            for number, stage in enumerate(STAGES)
        }
        report.data[name] = {
            "p50": statistics.median(p50),
            "p95": statistics.median(p95),
            "p99": statistics.median(p99),
            "stages": stages,
        }
        report.add(f"{name}: p50", p50, "ms", promise="latency", at_most=7)
        report.add(f"{name}: p99", p99, "ms", promise="latency", at_most=25)
    return report


def _ends(installation: Installation, target: RunningReceiver, count: int) -> list[list[float]]:
    """Return for each delivery when its job ended, and when each stage did."""
    installation.clear()
    url = target.url(name="latency")
    job_ids = [str(uuid.uuid4()) for _ in range(count)]
    callbacks = [register_endpoint(installation, url, job_id) for job_id in job_ids]
    queue = rq.Queue("default", connection=installation.redis)
    target.ask("/reset")
    with tempfile.NamedTemporaryFile() as file:
        with installation.dispatcher(steps=file.name) as dispatcher, rq_worker(installation.redis_url):
            dispatcher.wait_for_output("started")
            begin = time.monotonic() + 1
            for number, job_id in enumerate(job_ids):
                time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
                report = rq.Callback(callbacks[number])
                queue.enqueue_call(
                    "benchmarks.tasks.nothing", on_success=report, result_ttl=600, job_id=job_id
                )
            wait_until(lambda: target.ask("/count") >= count, timeout=60, what="all deliveries")
            installation.wait_until_recorded(count)
        steps = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    target.check(count)
    return [_ends_of(installation, one, steps) for one in target.ask("/latencies")[RATE:]]


def _ends_of(installation: Installation, arrival: Mapping[str, Any], steps: Sequence[Any]) -> list[float]:
    """Return when the job of *arrival* ended, and when each stage did.

    What Redis stamped is known to the millisecond; half of one is added. Of a step the last one before the
    arrival counts.
    """
    job_id, arrived = arrival["job_id"], arrival["arrived"]
    read, appended = next((at, entries[job_id]) for _step, at, entries in steps if job_id in entries)
    ((result_id, _result),) = installation.redis.xrevrange(f"rq:results:{job_id}", count=1)
    committed = int(result_id.partition(b"-")[0]) / 1000
    reached = {step: at for step, at, _entries in steps if at < arrived}
    confirmed, stored = reached["entries read"], reached["delivery claimed"]
    return [arrival["ended"], appended + 0.0005, read, committed + 0.0005, confirmed, stored, arrived]
