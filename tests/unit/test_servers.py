"""What the tests' own servers rely on."""

from __future__ import annotations

import http.server
import socket

import pytest

from tests.servers import Process, free_port, wait_until


def test_a_failed_wait_tells_what_was_printed_meanwhile() -> None:
    with Process("python", "-c", "print('late')") as process:
        process.wait()
        with pytest.raises(AssertionError, match=r"^not within 0 s: printed: late$"):
            wait_until(lambda: False, timeout=0, what=lambda: f"printed: {process.output.strip()}")


def test_a_free_port_refuses_until_a_server_listens_and_after_it() -> None:
    address = ("127.0.0.1", free_port())
    for _ in range(2):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with http.server.HTTPServer(address, http.server.BaseHTTPRequestHandler):
            socket.create_connection(address).close()
