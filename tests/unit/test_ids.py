"""Ids: in the order of their making, and never the same in two processes."""

from __future__ import annotations

import os
import time

import pytest

from flask_rq_webhooks.storage.models import ALPHABET, new_id


def test_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_id("evt") for _ in range(1000)]
    assert len(set(ids)) == 1000
    time.sleep(0.002)
    later = new_id("evt")
    assert all(one < later for one in ids)
    assert all(set(one.removeprefix("evt_")) <= set(ALPHABET) and len(one) == 30 for one in ids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_processes_draw_ids_of_their_own() -> None:
    """What was drawn ahead is in the memory of all of them."""
    new_id("evt")
    ends: list[tuple[int, int]] = []
    for _ in range(2):
        read, written = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(written, "\n".join(new_id("evt")[-16:] for _ in range(100)).encode())
            finally:
                os._exit(0)
        os.close(written)
        ends.append((pid, read))
    random_parts = [new_id("evt")[-16:] for _ in range(100)]
    for pid, read in ends:
        with open(read) as pipe:
            random_parts += pipe.read().split()
        os.waitpid(pid, 0)
    assert len(random_parts) == len(set(random_parts)) == 300
