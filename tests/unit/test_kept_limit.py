"""How many connections are kept for the next request."""

from __future__ import annotations

import resource

import pytest

from flask_rq_webhooks.dispatch.http.pool import most_kept


@pytest.mark.parametrize(
    ("files", "concurrency", "kept"),
    [
        (1024, 1, 32),
        (1024, 16, 64),
        (1024, 64, 128),
        (1024, 1000, 128),
        (100, 64, 32),
        (1_048_576, 64, 256),
        (resource.RLIM_INFINITY, 256, 1024),
    ],
)
def test_as_many_as_there_may_be_requests_and_files(
    monkeypatch: pytest.MonkeyPatch, files: int, concurrency: int, kept: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (files, 2**20))
    assert most_kept(concurrency) == kept
