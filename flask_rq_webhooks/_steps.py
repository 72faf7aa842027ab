"""Named steps of the pipeline, for tests that kill a process exactly there.

In our own code, a process calls :func:`reached` at each point of the table "What a SIGKILL costs".
Unless a test installed a hook, that is one comparison. This module imports nothing and decides nothing.

================  ===================================================================================
registered        the endpoint is stored, the view has not run
enqueued          the view has run, its jobs are not confirmed
confirmed         the jobs are confirmed, the response is not sent
entries read      callbacks' reports were taken from the stream, nothing is stored
event stored      event and deliveries are stored and not handed to the sender; the entries are still in the
                  stream, or the watches are as reconcile found them
delivery claimed  a lease is taken, nothing is sent
attempt made      the receiver has answered, nothing is recorded
attempt recorded  the attempt is recorded
newer stored      a transaction holds newer progress or an ending, and older deliveries are still to be sent
older canceled    they are canceled in the same transaction, which is not committed
reconcile found   endings without a report were found, nothing is stored
================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[str], None] | None = None


def install(hook: Callable[[str], None] | None) -> None:
    """Call *hook* with the name of every step this process reaches; ``None`` removes it."""
    global _hook
    _hook = hook


def reached(step: str) -> None:
    """Report that this process has reached *step*."""
    if _hook is not None:
        _hook(step)
