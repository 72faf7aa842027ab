"""Pickles of the host's Redis: nothing they name is called, and work and memory are bounded."""

from __future__ import annotations

import collections
import datetime
import decimal
import pathlib
import pickle
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from flask_rq_webhooks.queue.safe_pickle import UNKNOWN, load_plain, plain_call

P = b"\x80\x04"
#: (MEMOIZE, then BINGET of it): what the memo gives back again and again.
SHARED = b")\x94"


def nested_by_memo(depth: int) -> bytes:
    return SHARED + b"".join(b"h%c\x86\x94" % index for index in range(depth))


def colliding(keys: str, count: int = 60_000) -> bytes:
    """Return a dict whose keys all have the same hash."""
    modulus = 2**61 - 1
    numbers = (k * modulus for k in range(1, count + 1))
    if keys == "ints":
        items = (pickle.dumps(number, 2)[2:-1] for number in numbers)
    else:
        items = (b"X%s%sR" % (struct.pack("<I", len(str(n))), str(n).encode()) for n in numbers)
        items = (b"h\x00" + item[:-1] + b"\x85R" for item in items)
    start = b"}" if keys == "ints" else b"cdecimal\nDecimal\n\x940}"
    return P + start + b"(" + b"".join(item + b"N" for item in items) + b"u."


#: Read in a process of their own: an attack that works may never release the interpreter's lock.
ATTACKS = {
    "60 nested tuples as a key, by DUP": b"\x80\x04}" + b")" + b"2\x86" * 60 + b"K\x01s.",
    "60 nested tuples as a key, by the memo": P + b"}" + nested_by_memo(60) + b"K\x01s.",
    "nested frozensets of tuples": P + b"}" + b")" + b"(2\x86\x91" * 60 + b"K\x01s.",
    "Counter patched through BUILD": b"\x80\x02ccollections\nCounter\n(N}U\x08__init__K\x01stb.",
    "BUILD with slots on an instance": P + b"cuuid\nUUID\n)\x81(N}\x8c\x03intK\x07stb.",
    "LONG_BINPUT of 4 GB": P + b"Nr\xff\xff\xff\xff.",
    "PUT in text of 10 digits": P + b"Np9999999999\n.",
    "bytearray of 6 GB": P + b"cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 6 * 2**30) + b"\x85R.",
    "BYTEARRAY8 that says 6 GB": P + b"\x96" + struct.pack("<Q", 6 * 2**30) + b".",
    "BINBYTES8 that says 6 GB": P + b"\x8e" + struct.pack("<Q", 6 * 2**30) + b".",
    "BINUNICODE8 that says 6 GB": P + b"\x8d" + struct.pack("<Q", 6 * 2**30) + b"x.",
    "FRAME that says 6 GB": P + b"\x95" + struct.pack("<Q", 6 * 2**30) + b"N.",
    "LONG4 that says 2 GB": P + b"\x8b\xff\xff\xff\x7f\x01.",
    "INT of a million digits": P + b"I" + b"9" * 10**6 + b"\n.",
    "LONG of a million digits": P + b"L" + b"9" * 10**6 + b"L\n.",
    "ints that collide": colliding("ints"),
    "decimals that collide": colliding("decimals"),
    "lists without end": P + b"]" * 4_000_000 + b".",
    "sets without end": P + b"\x8f" * 4_000_000 + b".",
    "dicts in the memo": P + b"}\x94" * 2_000_000 + b".",
    "DUP without end": P + b"N" + b"2" * 4_000_000 + b".",
    "copies of a long list": P + b"](" + b"N" * 90_000 + b"e\x94ccollections\ndeque\n\x94"
    + b"h\x01h\x00\x85R" * 25_000 + b"t.",
    "copies of a long list as sets": P + b"](" + b"N" * 50_000 + b"e\x94cbuiltins\nset\n\x94"
    + b"h\x01h\x00\x85R" * 25_000 + b"t.",
    "copies of long bytes": P + b"B" + struct.pack("<I", 2**21) + b"x" * 2**21 + b"\x94"
    + b"cbuiltins\nbytearray\n\x94"
    + b"h\x01h\x00\x85R" * 25_000 + b"0.",
    "copies of a long path": P + b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"\x94"
    + b"cpathlib\nPosixPath\n\x94"
    + b"h\x01h\x00\x85R" * 25_000 + b"0.",
    "a list in itself": P + b"]\x94h\x00a.",
    "a tower of a million lists": P + b"]" * 99_000 + b"a" * 98_999 + b".",
    "decimal with a large exponent": P + b"cdecimal\nDecimal\n\x8c\x0b1e999999999\x85R.",
    "a command": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "extension code": P + b"\x82\x01.",
    "JSON of empty lists": b"[" + b"[]," * 1_300_000 + b"[]]",
    "JSON nested deeply": b"[" * 1_000_000,
    "JSON of a long number": b"9" * 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_pickle_takes_long_or_much_memory(attack: bytes) -> None:
    script = """
        import resource, sys, time
        from flask_rq_webhooks.protocol.json_safe import dumps_capped
        from flask_rq_webhooks.queue.safe_pickle import load_plain
        raw = sys.stdin.buffer.read()
        load_plain(b"\\x80\\x04N.")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        dumps_capped(load_plain(raw), 2**18)
        took = time.process_time() - began
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        print(took, grown_mb)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=attack,
        capture_output=True,
        timeout=30,
        check=True,
    )
    took, grown_mb = map(float, done.stdout.split())
    assert took < 3
    assert grown_mb < 30


def test_nothing_of_the_interpreter_is_changed() -> None:
    before = dict(vars(collections.Counter))
    assert load_plain(ATTACKS["Counter patched through BUILD"]) is UNKNOWN
    assert dict(vars(collections.Counter)) == before
    assert collections.Counter("aab")["a"] == 2


class OfTheProgram:
    def __init__(self) -> None:
        self.name = "basin"


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -5, 2**70, 1.5, None, True], "b": ("x", "é", "\U0001f30d"), 3: {4, 5}, (1, 2): "pair"},
        [datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC), datetime.date(2026, 1, 2)],
        [datetime.time(1, 2, 3), datetime.timedelta(days=-1, seconds=5)],
        datetime.timezone(datetime.timedelta(hours=2), "x"),
        [decimal.Decimal("1.50"), uuid.UUID(int=2**100), complex(1, 2)],
        {uuid.UUID(int=7): 1, datetime.date(2026, 1, 2): 2},
        [[]] * 3,
        list(range(50_000)),
        {f"key-{number}": number / 3 for number in range(20_000)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_data_is_read_as_it_was_written(value: Any, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol), whole=True) == value


def test_containers_of_the_standard_library_become_plain_ones() -> None:
    value = [
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        collections.defaultdict(list, b=[2]),
        collections.deque([1, 2], maxlen=5),
        frozenset({1}),
    ]
    expected = [{"a": 1}, {"a": 2, "b": 1}, {"b": [2]}, [1, 2], frozenset({1})]
    assert load_plain(pickle.dumps(value, 5)) == expected


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_every_python_become_their_texts(module: str) -> None:
    named = f"c{module}\nPosixPath\n".encode()
    assert load_plain(P + named + b"(\x8c\x01/\x8c\x04data\x8c\x07basin-7tR.") == "/data/basin-7"
    assert load_plain(pickle.dumps(pathlib.PurePosixPath("."))) == "."
    assert load_plain(pickle.dumps(pathlib.PureWindowsPath("c:/data/basin"))) == r"c:\data\basin"


def test_what_is_no_plain_data_becomes_unknown_and_the_rest_is_kept() -> None:
    raw = pickle.dumps(("tests.jobs.run", None, ("basin-7", OfTheProgram()), {"x": OfTheProgram()}))
    assert load_plain(raw) == ("tests.jobs.run", None, ("basin-7", UNKNOWN), {"x": UNKNOWN})
    assert load_plain(raw, whole=True) is UNKNOWN
    assert plain_call(raw) == ("tests.jobs.run", "basin-7")


def test_a_number_that_cost_a_minute_is_read_at_once() -> None:
    tracemalloc.start()
    began = time.process_time()
    assert load_plain(P + b"Nr\xff\xff\xff\xff.") is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    assert time.process_time() - began < 1
    tracemalloc.stop()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_pickle_that_was_cut_is_unknown(cut: int) -> None:
    raw = pickle.dumps({"a": [1, "x", datetime.date(2026, 1, 2)]}, 4)
    read: Callable[[bytes], Any] = load_plain
    assert read(raw[:-cut]) is UNKNOWN
