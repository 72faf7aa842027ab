"""Walks over filtered deliveries: the same answer as one plain statement, in bounded steps."""

from __future__ import annotations

import itertools
import random

import pytest
from sqlalchemy import select

from flask_rq_webhooks.storage import filters
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.filters import DeliveryFilter
from flask_rq_webhooks.storage.models import Delivery
from flask_rq_webhooks.storage.queries import list_deliveries
from tests import storage_rows

HOSTS = ("one.example.com", "two.example.com")
STATUSES = ("pending", "succeeded", "exhausted")
TYPES = ("job.success", "job.failure")


@pytest.fixture
def filled(database: Database) -> Database:
    """Give 120 deliveries with every mixture of conditions, some of which never meet."""
    chance = random.Random(3)
    for number in range(6):
        storage_rows.deliver_to(database, HOSTS[number % 2], 20)
    for row in storage_rows.rows(database, Delivery):
        kind = chance.choice(TYPES)
        status = "succeeded" if kind == "job.success" else chance.choice(STATUSES)
        storage_rows.set_values(database, Delivery, row.id, event_type=kind, status=status)
    return database


def plain(database: Database, where: DeliveryFilter) -> list[str]:
    with database.read() as connection:
        query = select(Delivery.id).where(*where.conditions()).order_by(Delivery.id.desc())
        return list(connection.execute(query).scalars())


def mixed_filters(database: Database) -> list[DeliveryFilter]:
    rows = storage_rows.rows(database, Delivery)
    mixtures = [
        DeliveryFilter(host=host, event_type=kind, statuses=statuses, endpoint_id=endpoint_id)
        for host, kind, statuses, endpoint_id in itertools.product(
            (None, *HOSTS, "none"),
            (None, *TYPES),
            (None, ("pending",), ("pending", "exhausted"), STATUSES, ("sending", "canceled")),
            (None, rows[0].endpoint_id),
        )
    ]
    # A third of the 120, with every value of every condition, and none of them alone.
    return [DeliveryFilter(), *random.Random(4).sample(mixtures, 39)]


@pytest.mark.parametrize("enough_s", [60.0, 0.0], ids=["patient", "hasty"])
def test_pages_together_are_the_whole_list(
    filled: Database, monkeypatch: pytest.MonkeyPatch, enough_s: float
) -> None:
    monkeypatch.setattr(filters, "FIRST_WINDOW", 3)
    monkeypatch.setattr(filters, "WINDOW", 7)
    monkeypatch.setattr(filters, "ENOUGH_S", enough_s if enough_s else -1.0)
    for where in mixed_filters(filled):
        found: list[str] = []
        cursor = None
        for _ in range(200):
            page = list_deliveries(filled, where, cursor=cursor, limit=10)
            found += [item.id for item in page.items]
            assert enough_s == 0 or len(page.items) == 10 or page.cursor is None
            cursor = page.cursor
            if cursor is None:
                break
        assert cursor is None
        assert found == plain(filled, where), where


def test_conditions_that_never_meet_cost_no_more_than_a_window(
    filled: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "FIRST_WINDOW", 3)
    monkeypatch.setattr(filters, "WINDOW", 7)
    monkeypatch.setattr(filters, "ENOUGH_S", -1.0)
    with storage_rows.statements_of(filled) as statements:
        page = list_deliveries(
            filled, DeliveryFilter(host=HOSTS[0], event_type="job.success", statuses=("exhausted",))
        )
    assert page.items == ()
    assert page.cursor is not None
    # Three conditions compared, one window, and where it ended.
    asked = [statement for statement in statements if statement.startswith("SELECT")]
    assert len(asked) == 5, asked


def test_the_rarest_condition_leads(filled: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    row = storage_rows.rows(filled, Delivery)[0]
    storage_rows.set_values(filled, Delivery, row.id, event_type="model.published")
    monkeypatch.setattr(filters, "FIRST_WINDOW", 3)
    monkeypatch.setattr(filters, "ENOUGH_S", -1.0)
    page = list_deliveries(filled, DeliveryFilter(host=row.host, event_type="model.published"))
    assert [item.id for item in page.items] == [row.id]
    assert page.cursor is None
