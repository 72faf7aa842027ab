"""Fork the tests' processes from one that has imported the libraries: saves each a second of CPU.

Run by :class:`tests.servers.Zygote` as ``python -m tests.zygote FD``. Each message on the socket *FD* is one
process to start: JSON, and with it the file descriptors of its output and of a pipe that gets its exit code.
The end of the socket kills all that are left.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

MAX_MESSAGE_BYTES = 256 * 1024


#: What nearly every process of the tests imports.
MODULES = (
    "flask.cli",
    "flask_migrate",
    "flask_rq_webhooks.cli",
    "flask_rq_webhooks.dispatch.dispatcher",
    "flask_rq_webhooks.web.blueprint",
    "psycopg",
    "rq.cli",
    "rq.cron",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite",
    "werkzeug.serving",
)


def preload() -> None:
    """Import the libraries, and what they and Flask's commands look up among all that is installed."""
    for module in MODULES:
        with suppress(ImportError):  # an older RQ has no rq.cron, and not every environment Flask-Migrate
            importlib.import_module(module)
    for command in importlib.metadata.entry_points(group="flask.commands"):
        command.load()
    gc.freeze()  # what is imported stays: no collection of it, at the end of a process neither


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each message.

    :returns: the message, in the new process; ``None`` when the socket ended.
    """
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _events in selector.select():
                if key.fileobj is woken:
                    woken.recv(4096)
                    reap(statuses)
                    continue
                message, fds, _flags, _address = socket.recv_fds(control, MAX_MESSAGE_BYTES, 2)
                if not message:
                    for pid in statuses:
                        os.kill(pid, signal.SIGKILL)
                    return None
                output, status = fds
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
                    selector.close()
                    for left in (woken, wake, control):
                        left.close()
                    for fd in (status, *statuses.values()):
                        os.close(fd)
                    become(output)
                    wanted: dict[str, Any] = json.loads(message)
                    return wanted
                os.close(output)
                statuses[pid] = status
                control.send(str(pid).encode())


def reap(statuses: dict[int, int]) -> None:
    """Write the wait status of each process that ended into its pipe."""
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            fd = statuses.pop(pid)
            os.write(fd, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(fd)


def become(output: int) -> None:
    """Print into *output*, read nothing."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, standard)
    os.close(nothing)
    os.close(output)


def main() -> None:
    preload()
    control = socket.socket(fileno=int(sys.argv[1]))
    wanted = serve(control)
    if wanted is None:
        return
    if wanted["own_group"]:
        os.setsid()
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    time.tzset()
    # Instead of our folder and our PYTHONPATH, which is one folder.
    sys.path[:2] = [wanted["cwd"], *wanted["env"]["PYTHONPATH"].split(os.pathsep)]
    sys.argv = ["-m", *wanted["arguments"]]
    sys.orig_argv = [sys.executable, "-m", wanted["module"], *wanted["arguments"]]
    runpy.run_module(wanted["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
