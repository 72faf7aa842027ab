"""``worker --processes N``: several dispatchers under one command, restarted, stopped and supervised."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from flask_rq_webhooks.dispatch import processes
from flask_rq_webhooks.dispatch.processes import own_command
from flask_rq_webhooks.errors import ConfigurationError
from flask_rq_webhooks.receiver import verify
from tests.acceptance.conftest import FLASK, SECRET, Stack
from tests.servers import Process, wait_until


def children_of(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def started(process: Process, count: int) -> None:
    wait_until(
        lambda: process.output.count("Dispatcher dsp_") >= count, timeout=60, what=lambda: process.output
    )


@pytest.mark.parametrize("stack_database_url", ["sqlite", "postgresql"], indirect=True)
def test_two_processes_deliver_and_stop_in_order(stack: Stack) -> None:
    parent = stack.start_dispatcher("--processes", "2")
    started(parent, 2)
    children = children_of(parent)
    stack.start_worker()
    for number in range(20):
        stack.call("add", number, 1)
    stack.receiver.wait_for(20, timeout=60)
    # Each line of the one log says which process wrote it.
    assert all(f"[{child.pid}]" in parent.output for child in children)

    assert parent.stop() == 0
    assert "All dispatcher processes have stopped." in parent.output
    assert parent.output.count(" stopped.\n") == 3, parent.output
    assert not any(child.is_running() for child in children)
    assert Counter(one.headers["webhook-id"] for one in stack.receiver.received).most_common(1)[0][1] == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("stack_database_url", ["postgresql"], indirect=True)
def test_parent_and_children_killed_at_random_lose_nothing(stack: Stack, count: int) -> None:
    parent = stack.start_dispatcher("--processes", "2")
    started(parent, 2)
    worker = stack.start_worker(worker_class="rq.SimpleWorker")
    chosen = random.Random(5)
    killed: Counter[str] = Counter()
    jobs = set()
    for number in range(count):
        jobs.add(stack.call("add", number, 1))
        if number % (count // 11) == count // 22:
            children = children_of(parent)
            victim = chosen.choice(["parent", *children])
            if victim == "parent":
                killed["parent"] += 1
                parent.kill()
                parent = stack.start_dispatcher("--processes", "2")  # as systemd does
            else:
                killed["child"] += 1
                victim.kill()
    assert killed["parent"] >= 1
    assert killed["child"] >= 1
    received = stack.receiver.received

    def missing() -> str:
        lost = jobs - {one.json["job_id"] for one in received}
        stored = [row for row in stack.stored().decode().splitlines() if any(job in row for job in lost)]
        return "\n".join(["these endings to arrive:", *sorted(lost), *stored, parent.output[-5000:]])

    # What a killed process had in flight is sent again after its lease.
    wait_until(
        lambda: len({one.headers["webhook-id"] for one in received}) >= count, timeout=120, what=missing
    )
    ids: dict[str, set[str]] = {}
    bodies: dict[str, set[bytes]] = {}
    for one in received:
        verify(one.body, one.headers, SECRET)
        assert one.json["event"] == "job.success"
        ids.setdefault(one.json["job_id"], set()).add(one.headers["webhook-id"])
        bodies.setdefault(one.headers["webhook-id"], set()).add(one.body)
    assert ids.keys() == jobs
    assert all(len(one) == 1 for one in ids.values())
    assert all(len(one) == 1 for one in bodies.values())
    wait_until(lambda: len(children_of(parent)) == 2, timeout=60, what="both processes to be back")
    assert parent.stop() == 0
    assert worker.popen.poll() is None


def test_children_stop_when_their_parent_is_killed(stack: Stack) -> None:
    parent = stack.start_dispatcher("--processes", "2")
    started(parent, 2)
    children = children_of(parent)
    parent.kill(signal.SIGKILL)
    _gone, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert parent.output.count("The parent process is gone; stopping.") == 2


def test_a_wrong_setting_ends_the_command(redis_url: str, sqlite_url: str) -> None:
    environment = {"TEST_DATABASE_URL": sqlite_url, "TEST_REDIS_URL": redis_url}
    with Process(*FLASK, "rq-webhooks", "worker", "--processes", "2", env=environment) as process:
        # The tables do not exist.
        assert process.wait(60) != 0
        assert "init-db" in process.output


@pytest.mark.parametrize("options", [(), ("--processes", "2")], ids=["one", "two"])
def test_systemd_learns_that_it_is_ready_and_alive(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    # An address is at most 108 bytes long.
    monkeypatch.chdir(tmp_path)
    address = tmp_path / "n" if len(str(tmp_path)) < 100 else Path("n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))
        process = stack.start_dispatcher(*options)
        assert systemd.recv(100) == b"READY=1"
        assert "Dispatcher dsp_" in process.output
        assert systemd.recv(100) == b"WATCHDOG=1"
        assert process.stop() == 0


def test_only_a_command_line_of_ours_is_executed_again() -> None:
    with pytest.raises(ConfigurationError, match="works from a shell only"):
        own_command()


@pytest.mark.parametrize("value", ["0", "65", "-1", "many", "1.5", ""])
def test_numbers_of_processes_that_are_refused(stack: Stack, value: str) -> None:
    result = stack.app.test_cli_runner().invoke(args=["rq-webhooks", "worker", "--processes", value])
    assert result.exit_code == 2
    assert "neither a number from 1 to 64 nor auto" in result.output


def test_a_child_killed_before_any_was_ready_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = """
import os, pathlib, signal, sys
try:
    pathlib.Path(sys.argv[1]).touch(exist_ok=False)
except FileExistsError:
    os.write(int(os.environ["RQ_WEBHOOKS_WORKER_PIPE"]), b".")
    os.kill(os.getppid(), signal.SIGTERM)
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with caplog.at_level(logging.INFO, processes.logger.name):
        code = processes.Supervisor([sys.executable, "-c", command, str(tmp_path / "died")], 1).run()
    assert code == 0
    assert [text.partition(" (")[0] for text in caplog.messages] == [
        "Starting 1 dispatcher processes.", "Process 1", "All dispatcher processes have stopped.",
    ]  # fmt: skip
    assert "was killed by signal 9" in caplog.text


@pytest.mark.slow
def test_a_hanging_child_is_replaced(stack: Stack) -> None:
    with Process(
        "python", "-c",
        "import sys; from flask_rq_webhooks.dispatch import processes; processes.HUNG_S = 15;"
        "sys.orig_argv = ['python', '-m', 'flask', '--app', 'tests.acceptance.host_app', 'rq-webhooks',"
        " 'worker', '--processes', '2']; sys.argv = sys.orig_argv[2:];"
        "from flask.cli import main; main()",
        env=stack.environment,
    ) as parent:  # fmt: skip
        started(parent, 2)
        victim = children_of(parent)[0]
        os.kill(victim.pid, signal.SIGSTOP)
        started(parent, 3)
        assert f"(pid {victim.pid}) hangs; killed." in parent.output
        wait_until(lambda: len(children_of(parent)) == 2, timeout=30, what="two children")
        assert parent.stop() == 0
