"""One delivery passes through few modules: these are what a reader of the pipeline reads."""

from __future__ import annotations

from tests.trace_pipeline import trace_one_delivery

MOST_MODULES = 42


def test_one_delivery_passes_through_few_modules() -> None:
    trace = trace_one_delivery()
    assert {"accept.decorator", "callbacks", "observe.ingest", "storage.claims"} <= set(trace.modules)
    assert {"dispatch.http.client", "dispatch.recorder", "storage.attempts"} <= set(trace.modules)
    assert len(trace.modules) <= MOST_MODULES, "\n".join(trace.modules)
