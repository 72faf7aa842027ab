"""Host apps in folders of their own, copied, changed by the diffs that the documentation shows, and run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests

from tests.servers import ROOT, Process, free_port, wait_until

HOSTS = ROOT / "tests" / "hosts"

#: Runs several ``flask`` commands in one process, and says how each of them ended.
_COMMANDS = """
import json, shlex, sys
from flask.cli import FlaskGroup
for command in sys.argv[1:]:
    print("$ flask " + command, flush=True)
    try:
        FlaskGroup().main(["--app", "app", *shlex.split(command)], prog_name="flask", standalone_mode=False)
        status = 0
    except SystemExit as exc:
        status = exc.code
    print(f"exit {status}", flush=True)
"""


class HostCopy:
    """A copy of ``tests/hosts/<name>/before`` and the processes that run in it.

    :param environment: what its processes get beside what every host needs.
    """

    def __init__(self, name: str, folder: Path, redis_url: str, **environment: str) -> None:
        self.source = HOSTS / name
        self.folder = folder / name
        shutil.copytree(
            self.source / "before",
            self.folder,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
        self.environment = {
            "SECRET_KEY": "only for tests",
            "DATABASE_URL": f"sqlite:///{folder / 'host.db'}",
            "REDIS_URL": redis_url,
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
            # For receivers on loopback; both would be settings of a staging system.
            "FLASK_RQ_WEBHOOKS_ALLOW_HTTP": "true",
            "FLASK_RQ_WEBHOOKS_RECONCILE_INTERVAL": "2",
            **environment,
        }
        self._cleanup = ExitStack()
        self._processes: list[Process] = []

    def apply(self, diff: str, *, reverse: bool = False) -> None:
        """Do what the documentation says: ``git apply``, or ``git apply -R``."""
        subprocess.run(
            ["git", "apply", *(["-R"] if reverse else []), str(self.source / diff)],
            cwd=self.folder,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(self.folder.parent)},
            check=True,
        )
        for cache in self.folder.rglob("__pycache__"):  # a file changed within a second may look unchanged
            shutil.rmtree(cache)

    def files(self) -> dict[str, str]:
        """Return the source of the copy as it is now."""
        return {
            str(path.relative_to(self.folder)): path.read_text()
            for path in sorted(self.folder.rglob("*.py"))
            if "migrations" not in path.parts
        }

    # -- processes --------------------------------------------------------------------------------------

    def run(self, *words: str, **environment: str) -> str:
        """Run a command in the folder to its end; return what it printed."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def flask(self, *commands: str, **environment: str) -> list[str]:
        """Run ``flask`` commands in one process; return what each printed, and its exit status."""
        output = self.run("-c", _COMMANDS, *commands, **environment)
        return [part.partition("\n")[2] for part in output.split("$ flask ")[1:]]

    def start(self, *words: str, **environment: str) -> Process:
        """Start a process that ends with the copy."""
        process = Process("python", *words, env={**self.environment, **environment}, cwd=self.folder)
        self._processes.append(process)
        return self._cleanup.enter_context(process)

    def start_web(self, module: str = "app", **environment: str) -> Web:
        port = str(free_port())
        command = ("-m", "flask", "--app", module, "run", "--port", port)
        return Web(self.start(*command, **environment), int(port))

    def start_worker(self, *options: str, **environment: str) -> Process:
        return self.start(
            "-m", "rq.cli", "worker", "--url", self.environment["REDIS_URL"], *options, **environment
        )

    def start_dispatcher(self, *commands: str) -> Process:
        """Start ``flask rq-webhooks worker``, after other commands in the same process; wait for those."""
        process = self.start("-c", _COMMANDS, *commands, "rq-webhooks worker")
        process.wait_for_output("$ flask rq-webhooks worker")
        return process

    def __enter__(self) -> HostCopy:
        return self

    def __exit__(self, *_exc: object) -> None:
        for process in self._processes:  # all at once: they need not wait for each other
            process.kill(signal.SIGTERM)
        self._cleanup.close()


class Web:
    """A web server process."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> Web:
        """Wait until it answers."""
        wait_until(self._answers, what=lambda: f"the web server: {self.process.output}")
        return self

    def _answers(self) -> bool:
        assert self.process.popen.poll() is None, self.process.output
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def post(self, path: str, body: Any = None, **headers: str) -> requests.Response:
        response = requests.post(
            f"{self.url}{path}",
            data=json.dumps(body),
            headers={"Content-Type": "application/json", **headers},
            timeout=30,
        )
        assert response.status_code < 500, response.text + self.process.output
        return response
