"""``make demo``: every part on this machine, and three webhooks from request to receiver.

Starts an embedded Valkey, the example app on SQLite, a stock ``rq worker``, the dispatcher and a receiver;
then submits a job that succeeds, one that fails, and one whose receiver fails twice first, and prints what
happens when. With a terminal attached everything keeps running until Ctrl-C.

The processes end when this one ends, even when it is killed: see :class:`Guard`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import requests

from .model import DATA

#: Each has an API key, and endpoints of its own.
CUSTOMERS = ("acme", "umbra")

ROOT = Path(__file__).resolve().parent.parent

#: Seconds for a part to come up, and for all webhooks to arrive: far more than they need.
START_DEADLINE = 30.0
DELIVERY_DEADLINE = 45.0

#: Reads lines from its standard input: ``+pid`` for a process to watch, ``-pid`` for one that has ended.
#: When the launcher is gone, however it ends, that input ends too: then it kills those processes and their
#: descendants (a work-horse is in a session of its own, so no process group holds them all) and removes the
#: directory. Parents are stopped first, so that none forks while the list is made.
GUARD = r"""
import os, shutil, signal, subprocess, sys

def send(pid, what):
    try:
        os.kill(pid, what)
    except OSError:
        pass

def parents():
    try:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        return [tuple(map(int, line.split())) for line in listed.splitlines()]
    except OSError:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    found.append((int(name), int(file.read().rpartition(")")[2].split()[1])))
            except OSError:
                pass
        return found

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
roots = set()
for line in sys.stdin:
    (roots.add if line[0] == "+" else roots.discard)(int(line[1:]))
if roots:
    for pid in roots:
        send(pid, signal.SIGSTOP)
    doomed, table = set(roots), parents()
    while True:
        more = {pid for pid, parent in table if parent in doomed} - doomed
        if not more:
            break
        for pid in more:
            send(pid, signal.SIGSTOP)
        doomed |= more
        table = parents()
    for pid in doomed:
        send(pid, signal.SIGKILL)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class DemoError(Exception):
    """The demo did not go as it should."""


class Guard:
    """A process that ends the others when the launcher is gone, even by SIGKILL.

    :param directory: removed then, too.
    """

    def __init__(self, directory: Path) -> None:
        reading, self._writing = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(directory)], stdin=reading, start_new_session=True
        )
        os.close(reading)

    def watch_myself(self) -> None:
        """Be watched. Called in a child between fork and exec, so that there is no moment without a watch."""
        os.write(self._writing, b"+%d\n" % os.getpid())

    def forget(self, pid: int) -> None:
        """Leave *pid* alone: it has ended, and the number may soon be somebody else's."""
        os.write(self._writing, b"-%d\n" % pid)

    def release(self) -> None:
        """Let the guard do its work now, and wait for it."""
        os.close(self._writing)
        self._process.wait()


@dataclass
class Part:
    """One running process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        """Return what the process has printed until now."""
        return self.log.read_text(errors="replace")


@dataclass
class Parts:
    """The processes of the demo, in the order they were started; ends them in the reverse order.

    :param directory: for logs, sockets and databases.
    :param environment: of every process.
    """

    directory: Path
    environment: Mapping[str, str]
    running: list[Part] = field(default_factory=list)

    def __enter__(self) -> Parts:
        self._guard = Guard(self.directory)
        return self

    def __exit__(self, *_exc: object) -> None:
        for part in reversed(self.running):
            if part.process.poll() is None:
                part.process.send_signal(signal.SIGTERM)
                # What does not end in time is left to the guard, which knows how to end its children too.
                with suppress(subprocess.TimeoutExpired):
                    part.process.wait(5)
            if part.process.poll() is not None:
                self._guard.forget(part.process.pid)
        self._guard.release()
        for part in self.running:
            part.process.wait()

    def start(self, name: str, *command: str, ready: str) -> str:
        """Start one process and wait until it has printed *ready*; return what that pattern's group holds.

        :raises DemoError: when it ends or stays silent.
        """
        log = self.directory / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the launcher, which ends the parts in order
                preexec_fn=self._guard.watch_myself,  # safe: the launcher has one thread
            )
        part = Part(name, process, log)
        self.running.append(part)
        deadline = time.monotonic() + START_DEADLINE
        while True:
            found = re.search(ready, part.output())
            if found is not None:
                return found.group(found.lastindex or 0)
            if process.poll() is not None:
                raise DemoError(f"the {name} ended with exit code {process.returncode}")
            if time.monotonic() > deadline:
                raise DemoError(f"the {name} was not ready within {START_DEADLINE:g} s")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise when a process has ended by itself.

        :raises DemoError: naming it.
        """
        for part in self.running:
            if part.process.poll() is not None:
                raise DemoError(f"the {part.name} ended with exit code {part.process.returncode}")

    def print_logs(self) -> None:
        """Print what every process has printed."""
        for part in self.running:
            print(f"\n--- log of the {part.name} ---\n{part.output()}", file=sys.stderr)


class Timeline:
    """Prints what happened, each fact once, with the seconds since the first."""

    def __init__(self) -> None:
        self._began = time.time()
        self._printed: set[tuple[str, str]] = set()

    def print_new(self, facts: Sequence[tuple[float, str, str]], *, older_than_s: float = 0.0) -> None:
        """Print the facts (when, which job, what) that were not printed before, oldest first.

        :param older_than_s: leave younger ones for the next time: what happened in between may be known by
            then, from one of the other jobs.
        """
        until = time.time() - older_than_s
        for at, name, what in sorted(facts):
            if at <= until and (name, what) not in self._printed:
                self._printed.add((name, what))
                print(f"{max(0.0, at - self._began):7.2f} s  {name:8} {what}", flush=True)


@dataclass
class Submission:
    """One job with a webhook, and the expected outcome."""

    name: str
    path: str
    hook: str
    event: str
    attempts: int
    request: dict[str, Any]
    job_id: str = ""
    at: float = 0.0

    def facts(
        self, status: Mapping[str, Any], arrivals: Sequence[Mapping[str, Any]]
    ) -> list[tuple[float, str, str]]:
        """Return what the status route and the receiver report about this job."""
        found = [(self.at, self.name, f"submitted: {self.path}, job {self.job_id}")]
        for event in status.get("events", []):
            if event.get("ended_at") or event.get("occurred_at"):
                found.append(
                    (
                        _unix(event.get("ended_at") or event["occurred_at"]),
                        self.name,
                        f"ended: {event['type']}",
                    )
                )
        for delivery in status.get("deliveries", []):
            for attempt in delivery.get("attempts", []):
                answer = attempt.get("status_code") or attempt.get("error_code")
                found.append(
                    (
                        _unix(attempt["started_at"]),
                        self.name,
                        f"attempt {attempt['number']}: {attempt['status']}, answered {answer}",
                    )
                )
        for arrival in arrivals:
            if arrival["path"] == self.hook and arrival["verified"] and arrival["status"] == 204:
                found.append(
                    (arrival["at"], self.name, f"verified by the receiver ({arrival['webhook_id']})")
                )
        return found

    def arrived(self, arrivals: Sequence[Mapping[str, Any]]) -> bool:
        """Say whether the receiver has what was promised: verified, the right event, after so many tries."""
        mine = [arrival for arrival in arrivals if arrival["path"] == self.hook]
        return (
            len(mine) == self.attempts
            and all(arrival["verified"] and arrival["event"] == self.event for arrival in mine)
            and len({arrival["webhook_id"] for arrival in mine}) == 1
            and [arrival["status"] for arrival in mine] == [503] * (self.attempts - 1) + [204]
            and json.loads(mine[-1]["body"])["job_id"] == self.job_id
        )


@dataclass
class Demo:
    """The running demo: where the parts are, and the three jobs."""

    app_url: str
    receiver_url: str
    token: str
    secret: str
    session: requests.Session

    def submissions(self) -> list[Submission]:
        """Return the three jobs: as JSON, as multipart with a broken weather table, as a form."""
        with (DATA / "broken_climate.csv").open("rb") as file:
            broken = file.read()
        return [
            Submission(
                "success", "build_landuse", "/hooks/success", "job.success", 1,
                {"json": self._fields("/hooks/success")},
            ),
            Submission(
                "failure", "build_climate", "/hooks/failure", "job.failure", 1,
                {"data": self._fields("/hooks/failure"), "files": {"climate_file": ("climate.csv", broken)}},
            ),
            Submission(
                "flaky", "build_soils", "/hooks/flaky", "job.success", 3,
                {"data": {**self._fields("/hooks/flaky?fail=2"), "depth_factor": "0.8"}},
            ),
        ]  # fmt: skip

    def _fields(self, hook: str) -> dict[str, str]:
        return {"webhook_url": self.receiver_url + hook, "webhook_secret": self.secret}

    def submit(self, submission: Submission) -> None:
        """Send one job request.

        :raises DemoError: when the app did not enqueue it with the webhook.
        """
        # One run per job, so that the broken weather harms no other.
        url = f"{self.app_url}/runs/demo-{submission.name}/plain/rq/api/{submission.path}"
        submission.at = time.time()
        response = self.session.post(url, timeout=10, **submission.request)
        if response.status_code != 200 or response.headers.get("Webhook-Registered") != "true":
            raise DemoError(f"POST {url} answered {response.status_code}: {response.text[:500]}")
        submission.job_id = response.json()["job_id"]

    def status(self, job_id: str) -> dict[str, Any]:
        """Return what the status route says about one job's webhook."""
        response = self.session.get(
            f"{self.app_url}/webhooks/jobs/{job_id}",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=10,
        )
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    def arrivals(self) -> list[dict[str, Any]]:
        """Return what the receiver has received."""
        response = self.session.get(f"{self.receiver_url}/received.json", timeout=10)
        answer: list[dict[str, Any]] = response.json()
        return answer

    def run(self, check: Callable[[], None]) -> int:
        """Submit the three jobs, print what happens, return how many webhooks were delivered and verified.

        :param check: called again and again; raises when it makes no sense to go on.
        """
        timeline = Timeline()
        submissions = self.submissions()
        for submission in submissions:
            self.submit(submission)
        deadline = time.monotonic() + DELIVERY_DEADLINE
        while True:
            check()
            arrivals = self.arrivals()
            statuses = {submission.name: self.status(submission.job_id) for submission in submissions}
            facts = [fact for one in submissions for fact in one.facts(statuses[one.name], arrivals)]
            timeline.print_new(facts, older_than_s=0.5)
            done = [
                submission
                for submission in submissions
                if submission.arrived(arrivals)
                and statuses[submission.name]["delivery_status"] == "succeeded"
            ]
            if len(done) == len(submissions) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        timeline.print_new(facts)
        print("\nWhat the status route says about the last one:")
        print(json.dumps(statuses[submissions[-1].name], indent=2))
        return len(done)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description="Run every part on this machine and show three webhooks.")
    parser.add_argument(
        "--serve",
        action=argparse.BooleanOptionalAction,
        default=sys.stdin.isatty() and sys.stdout.isatty(),
        help="keep everything running afterwards; default: with a terminal attached",
    )
    serve: bool = parser.parse_args().serve
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    # Short, because the path of a Unix socket may not be longer than 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="rqw-"))
    try:
        return run(directory, serve=serve)
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(directory: Path, *, serve: bool) -> int:
    """Start the parts in *directory*, run the demo, end the parts; return the exit code."""
    token, secret = secrets.token_urlsafe(18), secrets.token_urlsafe(24)
    environment = _environment(directory, token)
    began = time.monotonic()
    with Parts(directory, environment) as parts:
        try:
            print("Starting Valkey, the app, the receiver, an RQ worker and the dispatcher ...", flush=True)
            parts.start("valkey", "example_app.valkey", str(directory / "valkey"), ready="serving on")
            url = r"serving on (http://\S+)"
            receiver_url = parts.start("receiver", "example_app.receiver", f"--secret={secret}", ready=url)
            environment |= {"EXAMPLE_RECEIVER_URL": receiver_url, "EXAMPLE_RECEIVER_SECRET": secret}
            app_url = parts.start("app", "example_app.serve", "example_app.app:app", ready=url)
            parts.start(
                "worker",
                "rq.cli",
                "worker",
                "--url",
                environment["REDIS_URL"],
                "default",
                ready="istening on",
            )
            parts.start(
                "dispatcher", "flask", "--app", "example_app.app", "rq-webhooks", "worker", ready="ispatch"
            )
            print(f"... all running after {time.monotonic() - began:.1f} s\n", flush=True)
            with requests.Session() as session:
                session.trust_env = False  # a proxy has no business on loopback
                verified = Demo(app_url, receiver_url, token, secret, session).run(parts.check)
        except (DemoError, requests.RequestException) as exc:
            parts.print_logs()
            print(f"\ndemo: {exc}", file=sys.stderr)
            return 1
        if verified != 3:
            parts.print_logs()
        if serve:
            keys = dict(pair.split("=", 1) for pair in environment["EXAMPLE_CUSTOMERS"].split())
            customers = "".join(
                f"  {f'customer {name}':<14} {app_url}/login?token={key}\n" for name, key in keys.items()
            )
            print(
                f"\nStill running:\n"
                f"  example app    {app_url}/login?token={token}\n"
                f"                 submit a job, watch its webhook; this link signs you in to the dashboard\n"
                f"  dashboard      {app_url}/webhooks/\n"
                f"{customers}"
                f"  receiver       {receiver_url}/\n"
                f"  status, JSON   curl -H 'Authorization: Bearer {token}' {app_url}/webhooks/jobs/<job id>\n"
                f"Ctrl-C ends everything.\n"
            )
        print(f"demo: {verified} of 3 webhooks delivered and verified", flush=True)
        if serve:
            try:
                while True:
                    parts.check()
                    time.sleep(0.5)
            except DemoError as exc:
                parts.print_logs()
                print(f"\ndemo: {exc}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print("\nStopping ...")
        return 0 if verified == 3 else 1


def _environment(directory: Path, token: str) -> dict[str, str]:
    (directory / "valkey").mkdir()
    # Nothing of the caller's own set-up may steer the demo.
    ours = ("RQ_", "FLASK_", "WEBHOOK", "WEPPCLOUD_", "ALLOWED_WEBHOOK", "CELERY_", "EXAMPLE_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "REDIS_URL": f"unix://{directory / 'valkey' / 'valkey.sock'}?db=0",
        "EXAMPLE_DATABASE_URI": f"sqlite:///{directory / 'demo.db'}",
        "EXAMPLE_RUNS_DIR": str(directory / "runs"),
        "EXAMPLE_TOKEN": token,
        "EXAMPLE_CUSTOMERS": " ".join(f"{name}={secrets.token_urlsafe(18)}" for name in CUSTOMERS),
        "SECRET_KEY": secrets.token_urlsafe(32),
        "ALLOW_HTTP": "1",
        # Short, so that one can watch a receiver that hangs until the end.
        "WEPPCLOUD_WEBHOOK_TIMEOUT": "5",
        "WEPPCLOUD_WEBHOOK_RETRY_COUNT": "4",
    }


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that `with` blocks end the parts in order.
    raise SystemExit(128 + number)


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    sys.exit(main())
