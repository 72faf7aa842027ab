"""SECURITY 7, 8: response heads are read as :mod:`http.client` reads them, or more strictly."""

from __future__ import annotations

import http.client
import io
import random
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flask_rq_webhooks.dispatch.http.wire_format import BoundedResponse

LINES = [
    b"Content-Length: 2", b"content-length:2", b"Content-Length: 2 ", b"Content-Length: 02",
    b"Content-Length: +2", b"Content-Length: 2, 2", b"Content-Length: ", b"Content-Length: -1",
    b"Content-Length : 2", b"Content-Length: 1_0",
    b"Content-Length: \xb2", b"Transfer-Encoding: chunked", b"transfer-encoding:\tChunked ",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: ", b"Transfer-Encoding: identity",
    b"Transfer-Encoding:\r\n chunked", b"Content-Length:\r\n\t2", b"Connection: close",
    b"CONNECTION: Keep-Alive",
    b"Connection: upgrade, close", b"X-A: b", b"X-A:", b"X-A: b\r\n c", b" X-A: b",
    b"\tContent-Length: 2", b": b",
    b"X A: b", b"nonsense", b"X-A: a\rContent-Length: 5", b"X-A: \x00\x7f\xff",
    b"X-A: a\x0bContent-Length: 5",
    b"X-A: a\x85Content-Length: 5", b"X-\xe9: b", b"X(A): b", b"From me: b", b" ", b"\t ",
]  # fmt: skip
STATUS_LINES = [
    b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 200", b"HTTP/1.1  503 a b", b"HTTP/1.1 204 No",
    b"HTTP/1.1 304 No",
    b"HTTP/1.1 101 Switching", b"HTTP/1.9 200 OK", b"HTTP/2 200 OK", b"HTTP/1.1 99 OK", b"HTTP/1.1 2000 OK",
    b"HTTP/1.1 200OK", b"HTTP/1.1 -200 OK", b"ICY 200 OK", b"http/1.1 200 OK", b"HTTP/1.1", b"",
    b"HTTP/1.1 200\tOK",
]  # fmt: skip
INTERIM = [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\r\nContent-Length: 9\r\n\r\n"]
BODIES = [b"", b"ok", b"okHTTP/1.1 500 No\r\n\r\n", b"2\r\nok\r\n0\r\n\r\n", b"2\nok\n0\n\n", b"\n\nok"]


def as_http_client_reads_it(data: bytes) -> tuple[int, bool, bool | int | None, bool]:
    """Return status, whether the end is in doubt, the body's length, and whether another may follow."""
    response = http.client.HTTPResponse(
        cast(Any, SimpleNamespace(makefile=lambda _: io.BytesIO(data))), method="POST"
    )
    response.begin()
    while 100 <= response.status < 200 and response.status != 101:
        response.headers = cast(Any, None)
        response.begin()
    lengths = response.headers.get_all("content-length", [])
    codings = [coding.strip().lower() for coding in response.headers.get_all("transfer-encoding", [])]
    is_chunked = codings == ["chunked"]
    length: bool | int | None = True if is_chunked else response.length
    is_doubtful = bool(
        response.msg.defects
        or response.msg.get_payload()
        or len(lengths) > 1
        or (lengths and not re.fullmatch(r"[ \t]*[0-9]{1,18}[ \t]*", lengths[0]))
        or (codings and not is_chunked)
    )
    closes = response._check_close() or is_doubtful or bool(lengths and codings) or response.status == 101
    if response.status < 200 or response.status in (204, 304):
        length = 0
    return response.status, is_doubtful, length, not closes and length is not None


def as_we_read_it(data: bytes, cuts: random.Random) -> tuple[int, bool, bool | int | None, bool]:
    left = bytearray(data)

    def recv(size: int) -> bytes:
        size = min(size, cuts.choice((1, 2, 7, 10_000)))
        piece = bytes(left[:size])
        del left[:size]
        return piece

    response = BoundedResponse(
        cast(Any, SimpleNamespace(recv=recv)), cast(Any, SimpleNamespace(answered=False))
    )
    response.read_head()
    length = True if response._is_chunked else response._length
    return response.status, response._is_doubtful, length, not response._will_close and length is not None


@pytest.mark.parametrize("seed", range(20))
def test_no_head_is_read_otherwise_than_by_http_client_unless_more_strictly(seed: int) -> None:
    chance = random.Random(seed)
    accepted = 0
    for _ in range(500):
        data = b"".join(chance.choices([b"", *INTERIM], [8, 1, 1]))
        data += chance.choice(STATUS_LINES if chance.random() < 0.3 else STATUS_LINES[:1])
        for line in chance.sample(LINES, chance.randrange(5)):
            data += chance.choices([b"\r\n", b"\n", b"\r\r\n"], [20, 3, 1])[0] + line
        data += chance.choices([b"\r\n\r\n", b"\n\n", b"\r\n", b""], [20, 2, 1, 1])[0] + chance.choice(BODIES)
        try:
            expected = as_http_client_reads_it(data)
        except (http.client.HTTPException, ValueError):
            expected = None
        try:
            seen = as_we_read_it(data, chance)
        except http.client.HTTPException:
            continue  # as malformed: never wrong
        assert expected is not None, data
        assert seen[0] == expected[0], data
        assert seen[1] or not expected[1], data
        assert seen[1] or seen[2] == expected[2], data
        assert expected[3] or not seen[3], data
        accepted += not seen[1]
    assert accepted > 100  # it does not pass by refusing everything


def test_plain_heads_are_believed() -> None:
    plain = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\nX-A: b\r\n\r\nok"
    assert as_we_read_it(plain, random.Random(1)) == as_http_client_reads_it(plain) == (200, False, 2, True)
    chunks = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert (
        as_we_read_it(chunks, random.Random(1)) == as_http_client_reads_it(chunks) == (201, False, True, True)
    )


def test_spaces_without_end_take_no_time() -> None:
    head = b"HTTP/1.1 200 OK\r\n" + b"X:" + b" \t" * 30_000 + b"b\r\n\r\n"
    assert as_we_read_it(head, random.Random(1))[:2] == (200, False)
