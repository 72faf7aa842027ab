"""Several dispatcher processes on one database: nothing is claimed, sent or logged twice, or not at all.

The long form, with 20,000 deliveries each, is ``python -m benchmarks.many_dispatchers``.
"""

from __future__ import annotations

import pytest

from benchmarks.many_dispatchers import run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack_database_url", "dispatchers"), [("sqlite", 2), ("postgresql", 3)], indirect=["stack_database_url"]
)
def test_each_delivery_is_made_and_logged_exactly_once(
    stack_database_url: str, redis_url: str, dispatchers: int
) -> None:
    outcome = run(stack_database_url, redis_url, dispatchers=dispatchers, deliveries=2000)

    assert outcome.faults() == []
    assert sum(outcome.requests.values()) == 2000
    assert len(outcome.shares) == dispatchers, outcome.line()
