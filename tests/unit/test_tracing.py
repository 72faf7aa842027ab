"""W3C trace context, as the specification has it; and nothing of OpenTelemetry where nobody loaded it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flask_rq_webhooks import tracing

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.mark.parametrize(
    ("parent", "stored"),
    [
        (PARENT, PARENT),
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", f"00-{TRACE_ID}-{SPAN_ID}-03"),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01", PARENT),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-will-the-future-be", PARENT),
        (None, None),
        ("", None),
        (f"{PARENT}-more", None),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01.more", None),
        (f"ff-{TRACE_ID}-{SPAN_ID}-01", None),
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (PARENT.upper(), None),
        (f"{PARENT},{PARENT}", None),
        (f" {PARENT}", None),
        (f"{PARENT}\n", None),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-{'x' * 512}", None),
        (PARENT.replace("0af7", "٠af7"), None),
    ],
)
def test_a_traceparent_is_valid_or_dropped(parent: str | None, stored: str | None) -> None:
    assert tracing.checked(parent) == stored


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("a=1", "a=1"),
        ("rojo=00f0,  fw529a3039@dt=x y ,,", "rojo=00f0,fw529a3039@dt=x y"),
        ("A=1", ""),
        ("a=1,a=2", ""),
        ("a=1\r\nX-Evil: 1", ""),
        ("a=é", ""),
        ("a=", ""),
        (
            ",".join(f"a{number}={'x' * 96}" for number in range(40)),
            ",".join(f"a{n}={'x' * 96}" for n in range(5)),
        ),
    ],
)
def test_a_tracestate_is_valid_or_left_out(state: str, kept: str) -> None:
    trace = tracing.checked(PARENT, state)
    assert trace == (f"{PARENT} {kept}" if kept else PARENT)
    headers = tracing.headers_of(trace)
    assert headers["traceparent"][:36] == PARENT[:36]
    assert headers["traceparent"][36:52] != SPAN_ID
    assert headers["traceparent"][52:] == "-01"
    assert headers.get("tracestate", "") == kept


def test_errors_of_opentelemetry_reach_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError(name)

    monkeypatch.setitem(sys.modules, "opentelemetry.trace", Broken())
    with tracing.registering({"traceparent": PARENT}) as trace:
        assert trace == PARENT
    assert tracing.EventSpans().begin("evt", "job.success", "job", PARENT, None) == PARENT
    assert tracing.headers_of(PARENT, Broken())["traceparent"][:36] == PARENT[:36]
    tracing.end(Broken(), "timeout")


def test_nothing_of_opentelemetry_is_imported() -> None:
    # redis-py imports it where it is installed; here it is not, and we do not even ask for it.
    program = """
import importlib, pkgutil, sys
asked = []
class NotInstalled:
    def find_spec(name, path, target=None):
        if name.partition(".")[0] == "opentelemetry":
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            asked.append(frame.f_globals["__name__"])
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled)
import flask_rq_webhooks
for module in pkgutil.walk_packages(flask_rq_webhooks.__path__, "flask_rq_webhooks."):
    importlib.import_module(module.name)
assert flask_rq_webhooks.tracing.start("a", None, "CLIENT", {}) is None
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
print([name for name in asked if name.startswith("flask_rq_webhooks")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
