"""What a job pays for our callbacks: their import, and one callback without the network.

Each sample is a fresh interpreter that has loaded what ``rq worker`` loads, with bytecode, as pip leaves it.
The promise is 1 ms or less for the import. RQ imports the callbacks inside the forked work-horse, where every
page of memory that is touched first has to be copied; so the same is measured in a fork as well. Importing
``flask_rq_webhooks.callbacks`` before the worker forks (in the file of ``rq worker --config``) saves it all.

Run: ``python benchmarks/callback_import.py [samples]``
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

SAMPLE = """
import os, sys, time
import rq.cli.cli, rq.worker, rq.job, rq.queue, rq.results, rq.scheduler
if sys.argv[1] == "fork" and os.fork():
    os.wait()
    os._exit(0)
import colorsys  # the first import of a fork pays for much memory, whatever it imports
started = time.perf_counter()
import flask_rq_webhooks.callbacks
import_s = time.perf_counter() - started
from rq.utils import import_attribute
import redis
class Stream:
    def xadd(self, *args, **kwargs):
        pass
job = rq.job.Job(id="job-1", connection=redis.Redis())
job.func_name, job.args, job.kwargs = "operator.add", ("basin-7",), {}
job.enqueued_at = job.created_at
started = time.perf_counter()
callback = import_attribute("flask_rq_webhooks.callbacks.success.epnnnnnnnn_all")
callback(job, Stream(), {"peak": 12.5})
print(import_s, time.perf_counter() - started, flush=True)
"""

NAMES = ("import", "first callback without Redis")


def take_sample(where: str, bytecode: str) -> list[float]:
    """Return milliseconds, one for each of :data:`NAMES`.

    :param where: ``"fork"`` or ``"worker"``.
    :param bytecode: folder for compiled modules.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, where],
        capture_output=True,
        text=True,
        check=True,
        env={**env, "PYTHONPYCACHEPREFIX": bytecode},
    )
    return [float(seconds) * 1000 for seconds in done.stdout.split()]


def main(samples: int) -> None:
    """Take *samples* samples and print their medians."""
    with tempfile.TemporaryDirectory() as bytecode:
        take_sample("worker", bytecode)  # compiles
        for where in ("worker", "fork"):
            taken = [take_sample(where, bytecode) for _sample in range(samples)]
            for name, values in zip(NAMES, zip(*taken, strict=True), strict=True):
                median, fastest = statistics.median(values), min(values)
                print(f"{where}: {name}: median {median:.2f} ms, fastest {fastest:.2f} ms of {samples}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
