"""Deliveries that a dispatcher stores and sends itself: stored as claimed, under the rules of every claim."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from flask_rq_webhooks.dispatch import sender as sender_module
from flask_rq_webhooks.dispatch.http import AttemptRequest, AttemptResult
from flask_rq_webhooks.dispatch.sender import Sender
from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.observe import publisher as publisher_module
from flask_rq_webhooks.observe.ingest import Ingest
from flask_rq_webhooks.observe.publisher import Publisher
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.claims import claim_due, free_expired_leases
from flask_rq_webhooks.storage.dispatchers import pause
from tests.integration.test_host_shares import HangsBut, sender_of
from tests.pipeline import add_endpoint, deliveries, enqueue

HOST = "127.0.0.9:9"


@pytest.fixture
def transport() -> HangsBut:
    return HangsBut("nobody answers")


@pytest.fixture
def sender(state: State, transport: HangsBut, monkeypatch: pytest.MonkeyPatch) -> Sender:
    """Give a sender that has looked and found nothing due, a moment ago however slow the machine is."""
    monkeypatch.setattr(sender_module, "LONGEST_SLEEP_S", 60.0)
    idle = sender_of(state, transport, 64)
    assert idle.advance() > 0
    return idle


def ingest(state: State, sender: Sender | None, count: int = 1, host: str = HOST) -> None:
    """Store deliveries of *count* jobs that have ended, in one batch."""
    for number in range(count):
        enqueue(state, add_endpoint(state, f"http://{host}/in"), "tests.jobs.add", 1, number)
    Ingest(state, consumer="test", publisher=Publisher(state, sender=sender)).run_once(block_ms=1)


def statuses(state: State) -> Counter[str]:
    return Counter(delivery.status for delivery in deliveries(state))


def test_it_is_stored_as_claimed_and_sent_after_the_commit(
    state: State, sender: Sender, transport: HangsBut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_claim(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("nothing is to be claimed")

    def submit(request: AttemptRequest) -> Future[AttemptResult]:
        found.extend(deliveries(state))  # on another connection, which sees what is committed
        return HangsBut.submit(transport, request)

    found: list[Any] = []
    monkeypatch.setattr(sender_module, "claim_due", no_claim)
    monkeypatch.setattr(transport, "submit", submit)
    ingest(state, sender)
    assert transport.hosts == [HOST]
    (delivery,) = found
    assert delivery.status == "sending"
    lease = delivery.lease_until.replace(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(seconds=30) < lease <= timedelta(seconds=46), "as long as that of a claim"
    assert sender.advance() > 0
    assert transport.hosts == [HOST]


def test_it_is_left_to_the_thread_that_sends_while_that_is_at_it(
    state: State, sender: Sender, transport: HangsBut
) -> None:
    with sender._turn:
        ingest(state, sender)
        assert statuses(state) == {"sending": 1}
        assert transport.hosts == []
        assert sender._woken.is_set()
    sender.advance()
    assert transport.hosts == [HOST]


def test_whoever_dies_with_it_loses_it_by_its_lease(state: State, sender: Sender) -> None:
    ingest(state, sender)
    with state.database.write() as connection:
        connection.exec_driver_sql(
            "UPDATE rq_webhooks_delivery SET lease_until = '2001-01-01 00:00:00.000000'"
        )
    assert free_expired_leases(state.database) == 1
    (claimed,) = claim_due(state.database, limit=9, per_host=8, in_flight={}, lease_s=45)
    assert claimed.number == 1


def test_no_host_gets_more_places_than_it_may_have(state: State, sender: Sender, transport: HangsBut) -> None:
    ingest(state, sender, 12)
    assert statuses(state) == {"sending": 8, "pending": 4}
    sender.advance()
    ingest(state, sender, 2)
    sender.advance()
    assert len(transport.hosts) == 8
    assert statuses(state) == {"sending": 8, "pending": 6}


def test_it_overtakes_none_of_its_host_and_waits_for_no_other(
    state: State, sender: Sender, transport: HangsBut
) -> None:
    ingest(state, None, 12)
    sender.wake()
    sender.advance()
    oldest = {delivery.id for delivery in deliveries(state)}
    ingest(state, sender, 1, host="127.0.0.8:9")
    ingest(state, sender, 1)
    fresh = [delivery for delivery in deliveries(state) if delivery.id not in oldest]
    assert {delivery.host: delivery.status for delivery in fresh} == {
        HOST: "pending", "127.0.0.8:9": "sending",
    }  # fmt: skip


def test_it_is_claimed_in_its_turn_while_others_are_due(state: State, sender: Sender) -> None:
    ingest(state, None)
    sender.wake()  # it has not looked yet
    ingest(state, sender, host="127.0.0.8:9")
    assert statuses(state) == {"pending": 2}


def test_none_is_stored_as_claimed_while_a_claim_is_under_way(
    state: State, sender: Sender, transport: HangsBut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claim_meanwhile(*args: Any, **options: Any) -> Any:
        claimed = claim_due(*args, **options)
        monkeypatch.setattr(sender_module, "claim_due", claim_due)
        assert not offered.take_place(HOST)
        ingest(state, sender, 4)
        return claimed

    offered = sender.offer()
    assert offered is not None
    ingest(state, None, 6)
    monkeypatch.setattr(sender_module, "claim_due", claim_meanwhile)
    sender.wake()
    sender.advance()
    assert statuses(state) == {"sending": 6, "pending": 4}
    sender.advance()
    assert len(transport.hosts) == 8


def test_nothing_is_sent_while_sending_is_paused(state: State, sender: Sender, transport: HangsBut) -> None:
    pause(state.database)
    ingest(state, sender)
    sender.advance()
    assert statuses(state) == {"pending": 1}
    assert transport.hosts == []


@pytest.mark.parametrize("committed", [True, False], ids=["answer-lost", "rolled-back"])
def test_a_transaction_that_failed_keeps_no_place(
    state: State, sender: Sender, transport: HangsBut, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publisher_module.ingest

    def fail(*args: Any, **options: Any) -> Any:
        if committed:
            real(*args, **options)
        else:
            assert options["claim"].take_place(HOST)
            options["claim"].hosts["dlv_1"] = HOST
        raise StorageUnavailableError("the connection broke")

    monkeypatch.setattr(publisher_module, "ingest", fail)
    with pytest.raises(StorageUnavailableError):
        ingest(state, sender)
    monkeypatch.setattr(publisher_module, "ingest", real)
    ingest(state, sender, 9)
    for _ in range(3):
        sender.advance()
    assert len(transport.hosts) == 8
    assert statuses(state) == {"sending": 8, "pending": 1 + committed}


def test_what_was_not_sent_at_the_end_is_free_at_once(state: State, sender: Sender) -> None:
    with sender._turn:
        ingest(state, sender)
    waited: list[bool] = []
    sender.finish(hurry=lambda: waited.append(True) or len(waited) > 20)
    assert statuses(state) == {"pending": 1}
    assert not waited, "nothing is in flight, so there is nothing to wait for"
