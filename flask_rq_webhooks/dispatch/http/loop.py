"""An event loop in a daemon thread of its own, and what is handed to it in batches.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def fastest_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop: uvloop's, which takes a quarter less CPU, where it is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class LoopThread:
    """Run one event loop until told to stop.

    :param name: the thread's.
    :param loop: closed by :meth:`stop`.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # Debugging, which an environment variable turns on, shows whole requests in the log.
        self.loop.set_debug(False)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, **options: Any) -> T:
        """Run a coroutine in the loop's thread and return what it returns."""
        return asyncio.run_coroutine_threadsafe(function(*args, **options), self.loop).result()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def stop(self) -> None:
        """End the thread and close the loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
