"""SECURITY 7, 8: what an answer comes to does not depend on how it was cut, nor on what follows it."""

from __future__ import annotations

import re

import pytest

from flask_rq_webhooks.dispatch.http import MAX_HEADER_BYTES
from tests.security.attackers import Attacker, after_request
from tests.security.conftest import Send

OK = b"HTTP/1.1 200 OK\r\n"
SURPLUS = {
    "body": OK + b"Content-Length: 2\r\n\r\nokextra",
    "empty-body": OK + b"Content-Length: 0\r\n\r\nok",
    "chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nextra",
    "newline": OK + b"Content-Length: 2\r\n\r\nok\r\n",
    "half-a-head": OK + b"Content-Length: 2\r\n\r\nokHTTP/1.1 500 No\r\nX-A: ",
    "another-answer": OK + b"Content-Length: 2\r\n\r\nokHTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
    "connection-close": OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nokextra",
    "no-content": b"HTTP/1.1 204 No\r\n\r\n<p>thank you</p>",
    "no-content-interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n<p>thank you</p>",
    "interim": b"HTTP/1.1 103 Early\r\nX-A: b\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nokextra",
}


@pytest.fixture
def send(send_over_either: Send) -> Send:
    return send_over_either


@pytest.mark.parametrize("answer", SURPLUS.values(), ids=SURPLUS)
@pytest.mark.parametrize("cut", [None, 16, 40])
def test_what_follows_an_answer_does_not_matter(send: Send, answer: bytes, cut: int | None) -> None:
    pieces = [answer] if cut is None else [piece for piece in (answer[:cut], answer[cut:]) if piece]
    with Attacker(after_request(*pieces, pause_s=0.005)) as attacker:
        result = send(attacker.url)
    final = re.findall(rb"HTTP/1.1 (20[04]) ", answer)[0]
    assert (result.status_code, result.error_code) == (int(final), None)
    empty = final == b"204" or b"Content-Length: 0\r\n\r\nok" in answer
    assert result.response_body == (b"" if empty else b"ok")


@pytest.mark.parametrize("status", [b"204", b"304", b"100"])
def test_a_status_is_only_in_the_status_line(send: Send, status: bytes) -> None:
    pieces = OK, b"X-Count: " + status + b"\r\nContent-Length: 5\r\n\r\nhello"
    with Attacker(after_request(*pieces, pause_s=0.05)) as attacker:
        result = send(attacker.url, timeout_s=2)
    assert (result.status_code, result.error_code, result.response_body) == (200, None, b"hello")


NONSENSE = {
    "one": [OK + b"nonsense\r\nRetry-After: 7\r\n\r\nhello"],
    "line-later": [OK, b"nonsense\r\nRetry-After: 7\r\n\r\nhello"],
    "end-later": [OK + b"nonsense\r\nRetry-After: 7\r\n\r", b"\nhello"],
    "in-the-line": [OK + b"non", b"sense here\r\n", b"Content-Length: 0\r\n\r\n"],
    "after-interim": [b"HTTP/1.1 103 Early\r\n\r\n" + OK + b"nonsense\r\nRetry-After: 7\r\n\r\n"],
    "interim-first": [b"HTTP/1.1 103 Early\r\n\r\n", OK + b"nonsense\r\nRetry-After: 7\r\n\r\n"],
}


@pytest.mark.parametrize("pieces", NONSENSE.values(), ids=NONSENSE)
def test_lines_that_are_no_headers_do_not_matter_wherever_they_are_cut(
    send: Send, pieces: list[bytes]
) -> None:
    with Attacker(after_request(*pieces, pause_s=0.02)) as attacker:
        result = send(attacker.url)
    assert (result.status_code, result.error_code) == (200, None)


@pytest.mark.parametrize("chunk", [b"zz\r\nok\r\n", b"2\r\nokxx0\r\n\r\n"], ids=["bad-size", "bad-end"])
def test_a_chunk_that_is_none_does_not_wait_for_the_deadline(send: Send, chunk: bytes) -> None:
    pieces = OK + b"Transfer-Encoding: chunked\r\n\r\n", chunk
    with Attacker(after_request(*pieces, pause_s=0.02)) as attacker:
        result = send(attacker.url, timeout_s=30)
    assert result.error_code in ("reset", None)


def test_a_head_in_one_piece_is_bounded_and_its_body_is_not(send: Send) -> None:
    """The bound is looked at before parsing, and what is behind it is still the body's."""
    fits = OK + b"Content-Length: 200000\r\nX-A: " + b"a" * (MAX_HEADER_BYTES - 2000) + b"\r\n\r\n"
    with Attacker(after_request(fits + b"b" * 200_000)) as attacker:
        result = send(attacker.url)
        assert (result.status_code, result.error_code) == (200, None)
        assert set(result.response_body) == set(b"b")
    too_long = OK + (b"X-A: " + b"a" * 5000 + b"\r\n") * 14 + b"Content-Length: 0\r\n\r\n"
    with Attacker(after_request(too_long)) as attacker:
        assert send(attacker.url).error_code == "reset"
