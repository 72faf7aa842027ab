"""``make demo``: three webhooks, and nothing left behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.servers import ROOT, wait_until

LAST_LINE = "demo: 3 of 3 webhooks delivered and verified"


@dataclass
class Launcher:
    """One demo process, recognised by a variable in its environment."""

    directory: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, *options: str) -> None:
        self.log = (self.directory / "output.txt").open("wb")
        self.temporary = self.directory / "tmp"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "example_app.demo", *options],
            cwd=ROOT,
            env={**os.environ, "MARK": self.mark, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    @property
    def output(self) -> str:
        return Path(self.log.name).read_text()

    def wait_for(self, text: str) -> None:
        wait_until(
            lambda: text in self.output or self.process.poll() is not None,
            timeout=60,
            what=f"{text!r} in the output",
        )
        assert text in self.output, self.output

    def processes(self) -> list[psutil.Process]:
        """Return every living process with our mark: the launcher, its parts, their children, the guard."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not self.processes(), timeout=20, what=f"the end of {self.processes()}")
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    # Not pytest's own directory: its long path leaves no room for the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="rqw-test-") as directory:
        launcher = Launcher(Path(directory))
        # What a shell runs in its background ignores SIGINT, and so would everything started from there.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield launcher
        signal.signal(signal.SIGINT, before)
        for process in launcher.processes():
            process.kill()
        launcher.process.wait()
        launcher.log.close()


@pytest.mark.slow
def test_three_webhooks_are_delivered_and_verified(launcher: Launcher) -> None:
    launcher.start()
    assert launcher.process.wait(90) == 0, launcher.output
    lines = launcher.output.splitlines()
    assert lines[-1] == LAST_LINE
    launcher.assert_nothing_left()

    def reported(name: str) -> list[str]:
        pattern = re.compile(rf" *[0-9]+\.[0-9]{{2}} s  {name} +(.*)")
        return [match[1] for line in lines if (match := pattern.fullmatch(line))]

    for name, ending in [("success", "ended: job.success"), ("failure", "ended: job.failure")]:
        submitted, ended, attempt, verified = reported(name)
        assert submitted.startswith("submitted: build_")
        assert ended == ending
        assert attempt == "attempt 1: succeeded, answered 204"
        assert verified.startswith("verified by the receiver (evt_")
    assert reported("flaky")[2:5] == [
        "attempt 1: failed, answered 503",
        "attempt 2: failed, answered 503",
        "attempt 3: succeeded, answered 204",
    ]
    assert '"delivery_status": "succeeded"' in launcher.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, "Starting"),
        (signal.SIGKILL, "submitted: build_landuse"),
        (signal.SIGKILL, LAST_LINE),
        (signal.SIGTERM, "submitted: build_landuse"),
        (signal.SIGTERM, LAST_LINE),
        (signal.SIGINT, LAST_LINE),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value.split()[0].strip(":"),
)
def test_nothing_is_left_running(launcher: Launcher, number: signal.Signals, moment: str) -> None:
    launcher.start("--serve")
    launcher.wait_for(moment)
    if moment == LAST_LINE:
        assert len(launcher.processes()) >= 7  # launcher, guard, and five parts
        assert "/webhooks/jobs/" in launcher.output
    launcher.process.send_signal(number)
    code = launcher.process.wait(30)
    launcher.assert_nothing_left()
    if number == signal.SIGINT:
        assert code == 0
    else:
        assert code == (-number if number == signal.SIGKILL else 128 + number)


def test_a_part_that_does_not_start_is_named_and_its_log_shown(launcher: Launcher) -> None:
    # The path of a Unix socket has an end.
    launcher.directory /= "d" * 120
    launcher.directory.mkdir()
    launcher.start()
    assert launcher.process.wait(60) == 1
    assert "--- log of the valkey ---" in launcher.output
    assert launcher.output.splitlines()[-1].startswith("demo: the valkey ended with exit code 1")
    launcher.assert_nothing_left()
