"""Several dispatcher processes under one command: start them, watch them, restart and stop them.

The parent sends nothing and opens no connection. Each child executes the parent's command line afresh, so
that no connection, thread or lock is inherited. A pipe from child to parent carries heartbeats; when the
parent is gone, the child notices at its next heartbeat and shuts down gracefully. The process that systemd
started, be it a single dispatcher or a parent, reports to systemd (``Type=notify``, ``WatchdogSec=``); this
needs no dependency.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from ..errors import ConfigurationError

logger = logging.getLogger(__name__)

#: Environment variable that holds the file descriptor of the child's end of the pipe.
PIPE_VARIABLE = "RQ_WEBHOOKS_WORKER_PIPE"
#: Seconds without a heartbeat after which a child that had started is killed and restarted.
HUNG_S = 120.0
#: Seconds after which a child counts as healthy: its pause before the next restart is the shortest again.
HEALTHY_S = 60.0
#: First and longest pause before a child is restarted, seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
#: Seconds between checks of the children.
LOOK_S = 0.2


def available_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_command() -> list[str]:
    """Return the command line that started this process.

    :raises ConfigurationError: when it was not the command ``rq-webhooks worker``, for example in a test:
        executing it again would do something else.
    """
    arguments = sys.orig_argv[1:]
    if "rq-webhooks" not in arguments or "worker" not in arguments:
        raise ConfigurationError(
            "--processes works from a shell only, as it executes its own command line again; this process "
            f"was started as {sys.orig_argv!r}. Start several workers with --processes 1 instead."
        )
    return [sys.executable, *arguments]


def life_signs() -> Callable[[], bool]:
    """Return the function a dispatcher calls at each heartbeat to report to the parent process or to systemd.

    The function returns ``False`` when the dispatcher should stop, because its parent is gone.
    """
    if PIPE_VARIABLE not in os.environ:
        return _SystemdNotifier().alive
    pipe = int(os.environ.pop(PIPE_VARIABLE))

    def alive() -> bool:
        try:
            os.write(pipe, b".")
        except OSError:
            logger.warning("The parent process is gone; stopping.")
            return False
        return True

    return alive


def is_child() -> bool:
    """Return whether this process was started by a parent of :class:`Supervisor`."""
    return PIPE_VARIABLE in os.environ


class _SystemdNotifier:
    """Tell systemd that the service is ready, and then that it is alive.

    Source: sd_notify(3).
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._ready = False

    def alive(self) -> bool:
        self._send("WATCHDOG=1" if self._ready else "READY=1")
        self._ready = True
        return True

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.sendto(text.encode(), address)
        except OSError as exc:
            logger.warning("systemd could not be notified at %r: %s", self._address, exc)
            self._address = ""


@dataclass(slots=True)
class _Child:
    """A slot for one dispatcher process, whichever process fills it at the moment.

    :param pipe: read end of the heartbeat pipe; ``None`` while there is no process.
    :param alive_at: monotonic time of the last heartbeat, or of the start until there is one, so that a
        process that hangs while starting is replaced as well.
    :param pause_s: seconds to wait before the next restart.
    """

    number: int
    process: subprocess.Popen[bytes] | None = None
    pipe: int | None = None
    started_at: float = 0.0
    alive_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    restart_at: float = 0.0


class Supervisor:
    """Keep *count* dispatcher processes running until stopped.

    SIGTERM and SIGINT stop the children gracefully; a second signal cuts that short, as with a single one.

    :param command: what each child executes.
    :param burst: the children end by themselves and are not restarted.
    """

    def __init__(self, command: Sequence[str], count: int, *, burst: bool = False) -> None:
        self._command = list(command)
        self._burst = burst
        self._children = [_Child(number) for number in range(1, count + 1)]
        self._selector = selectors.DefaultSelector()
        self._signals = 0
        self._handed_on = 0
        self._ever_alive = False
        self._systemd = _SystemdNotifier()
        self._notified_at = 0.0

    def run(self) -> int:
        """Run until stopped; return the exit code.

        If no child ever reaches its first heartbeat, nothing is restarted (a wrong setting stays wrong), and
        the exit code is that of the last child. A signal, such as one sent when the machine is out of memory
        or ours to a hanging child, says nothing about settings.
        """
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        logger.info("Starting %d dispatcher processes.", len(self._children))
        worst = 0
        try:
            for child in self._children:
                self._start(child)
            while any(child.process for child in self._children) or self._may_restart(worst):
                for key, _ in self._selector.select(LOOK_S):
                    self._read(key.data)
                self._hand_on_signals()
                now = time.monotonic()
                for child in self._children:
                    if child.process is None:
                        if self._may_restart(worst) and now >= child.restart_at:
                            self._start(child)
                        continue
                    code = child.process.poll()
                    if code is not None:
                        worst = code or worst
                        self._ended(child, code, now, restarts=self._may_restart(worst))
                    elif now - child.alive_at > HUNG_S:
                        logger.error("Process %d (pid %d) hangs; killed.", child.number, child.process.pid)
                        child.process.kill()
                        child.alive_at = now  # it has ended by the next look
                self._notify(now)
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        logger.info("All dispatcher processes have stopped.")
        if self._ever_alive and not self._burst:
            return 0
        return 1 if worst < 0 else worst

    def _may_restart(self, worst: int) -> bool:
        return not self._signals and not self._burst and (self._ever_alive or worst <= 0)

    def _start(self, child: _Child) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        environment[PIPE_VARIABLE] = str(write_end)
        try:
            # Its own process group: Ctrl-C in a terminal reaches only the parent, which forwards it once.
            child.process = subprocess.Popen(  # noqa: S603  (our own command line)
                self._command,
                env=environment,
                pass_fds=[write_end],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        finally:
            os.close(write_end)
        child.pipe = read_end
        child.alive_at = child.started_at = time.monotonic()
        self._selector.register(read_end, selectors.EVENT_READ, child)

    def _read(self, child: _Child) -> None:
        if child.pipe is None:
            return
        if os.read(child.pipe, 4096):
            child.alive_at = time.monotonic()
            self._ever_alive = True
        else:
            self._close_pipe(child)

    def _ended(self, child: _Child, code: int, now: float, *, restarts: bool) -> None:
        self._close_pipe(child)
        pid = child.process.pid if child.process else 0
        child.process = None
        if self._signals or self._burst:
            return
        if now - child.started_at >= HEALTHY_S:
            child.pause_s = FIRST_PAUSE_S
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        then = f"in {child.pause_s:.0f} s" if restarts else "only if another one gets ready"
        logger.error(
            "Process %d (pid %d) %s. The others take over what it had claimed. Next start %s.",
            child.number, pid, how, then,
        )  # fmt: skip
        child.restart_at = now + child.pause_s
        child.pause_s = min(child.pause_s * 2, LONGEST_PAUSE_S)

    def _close_pipe(self, child: _Child) -> None:
        if child.pipe is not None:
            self._selector.unregister(child.pipe)
            os.close(child.pipe)
            child.pipe = None

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _hand_on_signals(self) -> None:
        while self._handed_on < self._signals:
            self._handed_on += 1
            self._systemd.stopping()
            for child in self._children:
                if child.process is not None:
                    child.process.send_signal(signal.SIGTERM)

    def _notify(self, now: float) -> None:
        if self._signals or now - self._notified_at < 1 or not self._ever_alive:
            return
        self._notified_at = now
        self._systemd.alive()

    def _end_all(self) -> None:
        """Terminate the children that are still running when the parent itself fails."""
        for child in self._children:
            if child.process is not None:
                child.process.terminate()
        for child in self._children:
            if child.process is not None:
                child.process.wait()
            self._close_pipe(child)
        self._selector.close()
