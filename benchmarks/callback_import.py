"""What a job pays for our callbacks: their import in the work-horse, and one callback without the network.

RQ imports the callbacks inside every forked work-horse. Each sample is a fresh interpreter that has loaded
what ``rq worker`` loads and then forks, as the worker does, with bytecode, as pip installs it. Prints medians
of wall-clock and processor time; the promise is 1 ms or less.

Run: ``python benchmarks/callback_import.py [samples]``
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

SAMPLE = """
import os, time
import rq.cli.cli, rq.worker, rq.job, rq.queue, rq.results, rq.scheduler
reading, writing = os.pipe()
if os.fork() == 0:
    import colorsys  # the first import of a forked process pays for its copied memory, whatever it imports
    started, cpu_started = time.perf_counter(), time.process_time()
    import flask_rq_webhooks.callbacks
    import_s, import_cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    from rq.utils import import_attribute
    import redis
    class Stream:
        def xadd(self, *args, **kwargs):
            pass
    job = rq.job.Job(id="job-1", connection=redis.Redis())
    job.func_name, job.args, job.kwargs = "operator.add", ("basin-7",), {}
    job.enqueued_at = job.created_at
    started, cpu_started = time.perf_counter(), time.process_time()
    callback = import_attribute("flask_rq_webhooks.callbacks.success.epnnnnnnnn_all")
    callback(job, Stream(), {"peak": 12.5})
    call_s, call_cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    os.write(writing, f"{import_s} {import_cpu_s} {call_s} {call_cpu_s}".encode())
    os._exit(0)
os.wait()
print(os.read(reading, 100).decode())
"""


NAMES = ("import", "import, processor", "first callback without Redis", "first callback, processor")


def take_sample(bytecode: str) -> list[float]:
    """Return milliseconds, one for each of :data:`NAMES`.

    :param bytecode: folder for compiled modules.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE],
        capture_output=True,
        text=True,
        check=True,
        env={**env, "PYTHONPYCACHEPREFIX": bytecode},
    )
    return [float(seconds) * 1000 for seconds in done.stdout.split()]


def main(samples: int) -> None:
    """Take *samples* samples and print their medians."""
    with tempfile.TemporaryDirectory() as bytecode:
        take_sample(bytecode)  # compiles
        taken = [take_sample(bytecode) for _sample in range(samples)]
    for name, values in zip(NAMES, zip(*taken, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.2f} ms, fastest {min(values):.2f} ms of {samples}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
