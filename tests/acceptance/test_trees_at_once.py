"""Jobs of one tree that end in the same moment, in several workers, seen by two dispatchers."""

from __future__ import annotations

import time

import pytest

from flask_rq_webhooks.receiver import verify
from tests.acceptance.conftest import SECRET, Stack
from tests.servers import wait_until

DATABASES = ("sqlite", "postgresql")
WORKERS = 4
TREES = 3
INTERVAL_S = 0.5


@pytest.mark.parametrize("below", [True, False], ids=["children of one parent", "jobs of one request"])
def test_a_tree_is_reported_once_however_many_of_its_jobs_end_at_once(
    stack: Stack, below: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_SETTINGS", f'{{"RQ_WEBHOOKS_RECONCILE_INTERVAL": {INTERVAL_S}}}')
    for _ in range(WORKERS):
        stack.start_worker()
    for _ in range(2):
        stack.start_dispatcher().wait_for_output("started")
    roots = {}

    for number in range(TREES):
        name = f"tree-{number}"
        roots[name] = stack.submit(f"/trees/{name}", {"jobs": WORKERS, "below": below}).get_json()["roots"]
        # Every worker holds one of the jobs, and a root above them has ended.
        wait_until(lambda name=name: stack.redis.llen(f"{name}:there") == WORKERS, timeout=60)
        time.sleep(2 * INTERVAL_S)
        assert [one.json["runid"] for one in stack.receiver.received] == [f"tree-{n}" for n in range(number)]
        stack.redis.set(f"{name}:go", "1")
        stack.receiver.wait_for(number + 1, timeout=60)

    time.sleep(4 * INTERVAL_S)  # every dispatcher has looked again
    reported = {one.json["runid"]: one for one in stack.receiver.received}
    assert len(stack.receiver.received) == TREES
    assert set(reported) == set(roots)
    for name, one in reported.items():
        verify(one.body, one.headers, SECRET)
        assert (one.json["event"], one.json["scope"]) == ("job.success", "tree")
        assert one.json["jobs"] == {"finished": WORKERS + below}
        assert one.json["job_id"] in roots[name]
    stored = stack.stored().decode()
    assert stored.count("'tree|") == TREES
