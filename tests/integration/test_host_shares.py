"""Hosts that fail share a part of the places, so that one stranger's names hold up nobody (SECURITY 24)."""

from __future__ import annotations

from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from flask_rq_webhooks.dispatch import host_limits
from flask_rq_webhooks.dispatch.dispatcher import Dispatcher
from flask_rq_webhooks.dispatch.host_limits import RateLimiter
from flask_rq_webhooks.dispatch.http import AttemptRequest, AttemptResult
from flask_rq_webhooks.dispatch.pubsub import Notices
from flask_rq_webhooks.dispatch.recorder import Recorder
from flask_rq_webhooks.dispatch.sender import Sender
from flask_rq_webhooks.observe.ingest import Ingest
from flask_rq_webhooks.observe.publisher import Publisher
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.attempts import latest_outcomes
from flask_rq_webhooks.storage.models import Delivery
from tests.pipeline import add_endpoint, enqueue, rows
from tests.servers import Receiver


class HangsBut:
    """Answers one host at once, and no other ever."""

    def __init__(self, healthy: str) -> None:
        self._healthy = healthy
        self.hosts: list[str] = []
        self.waiting: list[Future[AttemptResult]] = []

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        future: Future[AttemptResult] = Future()
        future.set_running_or_notify_cancel()
        host = request.url.split("/")[2]
        self.hosts.append(host)
        if host == self._healthy:
            future.set_result(AttemptResult(started_at=datetime.now(UTC), duration_ms=1.0, status_code=204))
        else:
            self.waiting.append(future)
        return future


def sender_of(state: State, transport: Any, concurrency: int = 16) -> Sender:
    return Sender(
        state,
        transport=transport,
        limiter=RateLimiter(state.redis, 0),
        recorder=Recorder(state, notices=Notices.from_settings(state.settings), dispatcher_id="dsp_1"),
        concurrency=concurrency,
    )


def add_due(state: State, count: int, url: str) -> None:
    """Make *count* deliveries due, to ``{number}`` in *url*."""
    for number in range(count):
        enqueue(state, add_endpoint(state, url.format(number=number)), "tests.jobs.add", 1, 2)
    ingest = Ingest(state, consumer="test", publisher=Publisher(state))
    while not ingest.is_idle():
        ingest.run_once(block_ms=1)


@pytest.fixture
def _nothing_hangs_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a slow machine from letting requests in flight grow old."""
    monkeypatch.setattr(host_limits, "HANGING_S", 600.0)


@pytest.mark.usefixtures("_nothing_hangs_yet")
def test_new_hosts_have_half_of_the_places_while_no_host_fails(state: State) -> None:
    add_due(state, 30, "http://127.0.1.{number}:9/")
    transport = HangsBut("127.0.0.1:9")
    sender = sender_of(state, transport)
    for _ in range(3):
        sender.wake()
        sender.advance()
    assert len(transport.hosts) == 8
    waiting = [row for row in rows(state, Delivery) if row.status == "pending"]
    assert len(waiting) == 22
    soon = datetime.now(UTC) + timedelta(seconds=0.1)
    assert all(row.next_attempt_at <= soon for row in waiting), "none is put off for long"


def test_a_new_host_does_not_wait_for_new_hosts_that_hang(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_limits, "HANGING_S", 0.0)  # what is in flight hangs
    add_due(state, 5, "http://127.0.1.{number}:9/")
    transport = HangsBut("127.0.0.1:9")
    sender = sender_of(state, transport)
    sender.advance()
    assert len(transport.hosts) == 5, "more than a quarter of the places"
    add_due(state, 1, "http://127.0.0.1:9/")
    sender.wake()
    sender.advance()
    assert "127.0.0.1:9" in transport.hosts


@pytest.mark.usefixtures("_nothing_hangs_yet")
def test_hosts_that_never_succeeded_share_a_quarter_of_the_places(state: State) -> None:
    """SECURITY 24."""
    add_due(state, 30, "http://127.0.1.{number}:9/")
    transport = HangsBut("127.0.0.1:9")
    sender = sender_of(state, transport)
    failed = AttemptResult(started_at=datetime.now(UTC), duration_ms=1.0, error_code="timeout")
    sender._hosts.note("127.0.3.1:9", failed)
    for _ in range(20):
        sender.wake()
        sender.advance()
    assert len(transport.hosts) == 4
    waiting = [row for row in rows(state, Delivery) if row.status == "pending"]
    assert len(waiting) == 26
    assert {row.attempts for row in waiting} == {0}, "no attempt is spent"
    assert sender.idle_since is None, "they are still to be sent"
    add_due(state, 1, "http://127.0.0.1:9/")
    sender.wake()
    sender.advance()
    assert "127.0.0.1:9" not in transport.hosts, "nobody knows it yet"


@pytest.mark.usefixtures("_nothing_hangs_yet")
def test_hosts_that_fail_share_half_of_the_places_and_the_others_are_served(state: State) -> None:
    """SECURITY 24, and what a dispatcher knows after a restart."""
    proven = [f"127.0.2.{number}:9" for number in range(30)]
    sender = sender_of(state, HangsBut(""))
    sender._hosts.restore({host: False for host in proven} | {"127.0.0.1:9": True})
    transport = sender._transport = HangsBut("127.0.0.1:9")
    add_due(state, 30, "http://127.0.2.{number}:9/")
    add_due(state, 30, "http://127.0.1.{number}:9/")
    for _ in range(20):
        sender.wake()
        sender.advance()
    assert len(transport.hosts) == 8
    assert sum(host.startswith("127.0.1.") for host in transport.hosts) <= 4
    add_due(state, 5, "http://127.0.0.1:9/{number}")
    sender.wake()
    sender.advance()
    assert transport.hosts.count("127.0.0.1:9") == 5


def test_a_restart_knows_which_hosts_succeeded(state: State, receiver: Receiver) -> None:
    add_due(state, 1, receiver.url)
    Dispatcher(state).run(burst=True)
    assert latest_outcomes(state.database, 100) == {f"127.0.0.1:{receiver.port}": True}
