"""Receivers that do not play by the rules: raw sockets on loopback, one thread per connection."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

Script = Callable[[socket.socket], None]

#: What a script ends with when the sender goes away, which is what most attacks come to.
_GONE = (OSError, ssl.SSLError)


class Attacker:
    """A TCP server that runs *script* on every connection.

    :param script: gets the accepted socket; the connection is closed when it returns.
    :param context: speak TLS.
    """

    #: Answer the first request of the first connection as a receiver should, and begin with the next.
    answers_first = False

    def __init__(self, script: Script, *, context: ssl.SSLContext | None = None) -> None:
        self._script = script
        self._context = context
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        with contextlib.suppress(*_GONE):
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            self._open.add(connection)
            if self.answers_first and self.connections == 1:
                read_request(connection)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            self._script(connection)
        self._open.discard(connection)
        connection.close()

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join(5)
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


def read_request(connection: socket.socket) -> bytes:
    """Read one request with its body; empty when the sender has closed the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ),
        0,
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def after_request(*chunks: bytes, pause_s: float = 0, forever: bool = False) -> Script:
    """Return a script that reads the request and then sends *chunks*, again and again if *forever*."""

    def script(connection: socket.socket) -> None:
        read_request(connection)
        while True:
            for chunk in chunks:
                connection.sendall(chunk)
                time.sleep(pause_s)
            if not forever:
                return

    return script


def then(first: bytes, rest: Script) -> Script:
    """Return a script that reads the request, sends *first* and goes on with *rest*."""

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(first)
        rest(connection)

    return script


def drip(data: bytes, pause_s: float = 0.05) -> Script:
    """Return a script that sends *data* byte by byte, without end if it is short."""

    def script(connection: socket.socket) -> None:
        while True:
            for byte in data:
                connection.sendall(bytes([byte]))
                time.sleep(pause_s)

    return script


def flood(data: bytes) -> Script:
    """Return a script that sends *data* without end, as fast as it is taken."""

    def script(connection: socket.socket) -> None:
        while True:
            connection.sendall(data)

    return script


def silence(connection: socket.socket) -> None:
    """Say nothing until the sender has gone."""
    while connection.recv(65536):
        pass


class MemoryGrowth:
    """Measure by how much the process's resident memory grows at most while the block runs."""

    def __init__(self) -> None:
        self._page = os.sysconf("SC_PAGE_SIZE")
        self.peak_mb = 0.0

    def _resident(self) -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * self._page

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.peak_mb = max(self.peak_mb, (self._resident() - self._before) / 1e6)

    def __enter__(self) -> MemoryGrowth:
        self._before = self._resident()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.peak_mb = max(self.peak_mb, (self._resident() - self._before) / 1e6)
        self._done.set()
        self._sampler.join()


@contextlib.contextmanager
def elapsed() -> Iterator[Callable[[], float]]:
    """Give a function that tells the seconds since the block began."""
    start = time.monotonic()
    yield lambda: time.monotonic() - start
