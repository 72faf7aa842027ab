"""What a storm stops goes on, whatever the storm itself waits for."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import cast

import psutil
import pytest

from tests.chaos.field import Field
from tests.chaos.storm import Killer
from tests.servers import Process, wait_until


@pytest.mark.parametrize("stop_early", [False, True])
def test_a_stopped_dispatcher_goes_on_beside_the_killer(stop_early: bool) -> None:
    with Process("sleep", "60") as one, Process("sleep", "60") as other:
        processes = {"dispatcher-1": one, "dispatcher-2": other}
        field = SimpleNamespace(postgres=None, processes=processes, named=lambda kind: list(processes))
        killer = Killer(cast(Field, field), 1)

        def stopped() -> int:
            return sum(
                psutil.Process(each.pid).status() == psutil.STATUS_STOPPED for each in processes.values()
            )

        killer._stop_dispatcher(60 if stop_early else 0.5)  # and the killer waits: its run() is not there
        wait_until(lambda: stopped() == 1)
        killer._stop_dispatcher(60)
        time.sleep(0.1)
        assert stopped() == 1  # never all of them
        if stop_early:
            killer.stopping.set()
        wait_until(lambda: stopped() == 0, timeout=10)
