"""Any value becomes JSON: what it becomes, that nothing raises, and that the work is bounded."""

from __future__ import annotations

import enum
import json
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, ClassVar, NoReturn
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq.timeouts import JobTimeoutException

from flask_rq_webhooks.protocol.json_safe import MAX_DEPTH, MAX_TEXT, dumps_capped, safe_text, to_json_safe


class Colour(enum.Enum):
    RED = "red"
    BOX = (1, 2)


class Level(enum.IntEnum):
    HIGH = 3


@dataclass
class Point:
    x: int
    y: Any
    tags: list[str] = field(default_factory=list)
    kind: ClassVar[str] = "point"


Pair = namedtuple("Pair", "left right")


class Text(str):
    def __str__(self) -> str:
        raise RuntimeError("no")

    def __getitem__(self, key: Any) -> NoReturn:
        raise RuntimeError("no")

    def __len__(self) -> NoReturn:
        raise RuntimeError("no")


class Shouting:
    def __str__(self) -> str:
        return "HELLO"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (-0.5, -0.5),
        ("grün", "grün"),
        (float("nan"), None),
        (float("inf"), None),
        (-float("inf"), None),
        ({"a": (1, 2, [3])}, {"a": [1, 2, [3]]}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(list, k=[1]), {"k": [1]}),
        (Pair(1, "r"), [1, "r"]),
        ({1: "one", 2.5: "x", None: 0, False: "no"}, {"1": "one", "2.5": "x", "null": 0, "false": "no"}),
        ({(1, 2): "tuple", UUID(int=1): "uuid"}, {"[1,2]": "tuple", str(UUID(int=1)): "uuid"}),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset("ba"), ["a", "b"]),
        ({1, "a", None, (2, 3)}, [None, 1, [2, 3], "a"]),
        (b"\x00\xff", "<bytes length=2>"),
        (bytearray(3), "<bytes length=3>"),
        (memoryview(b"four"), "<bytes length=4>"),
        (datetime(2024, 1, 1, 12, tzinfo=UTC), "2024-01-01T12:00:00+00:00"),
        (datetime(2024, 1, 1, 12), "2024-01-01T12:00:00"),
        (date(2024, 1, 1), "2024-01-01"),
        (timedelta(minutes=1, milliseconds=500), 60.5),
        (Decimal("1.10"), "1.10"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (PurePosixPath("/runs/a"), "/runs/a"),
        (Colour.RED, "red"),
        (Colour.BOX, [1, 2]),
        (Level.HIGH, 3),
        (Point(1, Point(2, None)), {"x": 1, "y": {"x": 2, "y": None, "tags": []}, "tags": []}),
        (Shouting(), "HELLO"),
        (ValueError("why"), "why"),
        (Text("plain"), "plain"),
        (1j, "1j"),
        (range(3), "range(0, 3)"),
        ("\udc80x", "\\udc80x"),
        (1 << 4096, hex(1 << 4096)),
        (1 << 10**6, "<int of 1000001 bits>"),
    ],
    ids=lambda value: safe_text(
        type(value).__name__ if isinstance(value, set | frozenset | memoryview) else value, 30
    ),
)
def test_values(value: Any, expected: Any) -> None:
    converted = to_json_safe(value)
    assert converted == expected
    assert type(converted) is type(expected)


def test_results_are_plain_types_all_the_way_down() -> None:
    class Whole(int):
        pass

    class Real(float):
        pass

    converted = to_json_safe({Text("k"): [Text("v"), Whole(3), Real(0.5)]})
    assert converted == {"k": ["v", 3, 0.5]}
    (key, items), *_ = converted.items()
    assert [type(key), *map(type, items)] == [str, str, int, float]


def test_an_rq_job_becomes_its_id() -> None:
    from rq.job import Job

    class HostJob(Job):
        pass

    job = HostJob.__new__(HostJob)
    job._id = "job-7"
    assert to_json_safe({"child": job}) == {"child": "job-7"}


def test_numpy_scalars_are_known_by_the_shape_of_their_class() -> None:
    generic = type("generic", (), {"__module__": "numpy"})
    float32 = type("float32", (generic,), {"__module__": "numpy", "item": lambda self: 0.5})
    longdouble = type(
        "longdouble",
        (generic,),
        {"__module__": "numpy", "item": lambda self: self, "__str__": lambda self: "1.5"},
    )
    datetime64 = type(
        "datetime64",
        (generic,),
        {
            "__module__": "numpy",
            "item": lambda self: 1704067200000000000,
            "__str__": lambda self: "2024-01-01",
        },
    )
    assert to_json_safe([float32(), longdouble(), datetime64()]) == [0.5, "1.5", "2024-01-01"]


def test_generators_are_not_consumed() -> None:
    taken = []

    def numbers() -> Any:
        taken.append(1)
        yield 1

    assert to_json_safe(numbers()).startswith("<generator object")
    assert taken == []


def explode(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("boom")


class BrokenStr:
    __str__ = __repr__ = explode


class StrIsNoStr:
    def __str__(self) -> Any:
        return 5


class Bomb:
    """Every attribute access, comparison, hash and conversion fails."""

    __getattribute__ = __getattr__ = __str__ = __repr__ = __len__ = __iter__ = __bool__ = explode
    __eq__ = __hash__ = __format__ = __int__ = __float__ = __index__ = explode


def of_lying_class() -> Any:
    """Made in a function: pytest looks at every class and value of a module, and stumbles over these."""

    class LyingClass:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise RuntimeError("boom")

    return LyingClass()


def of_bomb_meta() -> Any:
    class BombMeta(type):
        __getattribute__ = __instancecheck__ = __subclasscheck__ = __eq__ = __str__ = __repr__ = explode
        __hash__ = type.__hash__

    class OfBombMeta(metaclass=BombMeta):
        pass

    return OfBombMeta()


class BombDict(dict[Any, Any]):
    items = keys = __iter__ = __len__ = __getitem__ = explode


class BombList(list[Any]):
    __iter__ = __len__ = __getitem__ = explode


class BombInt(int):
    __int__ = __index__ = __str__ = __repr__ = bit_length = __lt__ = explode


class BombFloat(float):
    __float__ = __str__ = __repr__ = __eq__ = __sub__ = explode


class BombZone(tzinfo):
    utcoffset = dst = tzname = explode


class BombError(Exception):
    __str__ = __repr__ = explode

    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("boom")


class RaisesBombError:
    def __str__(self) -> str:
        raise BombError


@dataclass
class BombField:
    good: int = 1

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("boom")


class FakeDataclass:
    __dataclass_fields__ = {"x": None}


class FakeJob:
    id = property(explode)


FakeJob.__name__ = "Job"
FakeJob.__module__ = "rq.job"


class Mutating:
    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __str__(self) -> str:
        self.owner[object()] = 1
        return "mutating"


class DeepRepr:
    def __str__(self) -> str:
        return str(DeepRepr())


def mutated_dict() -> Any:
    owner: dict[Any, Any] = {}
    owner["a"] = Mutating(owner)
    owner["b"] = 2
    return owner


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (BrokenStr(), "<unprintable BrokenStr: RuntimeError>"),
        (StrIsNoStr(), "<unprintable StrIsNoStr: TypeError>"),
        (Bomb(), "<unprintable Bomb: RuntimeError>"),
        (BombDict(a=1), {"a": 1}),
        (BombList([1]), [1]),
        (BombInt(5), 5),
        (BombFloat(0.5), 0.5),
        (datetime(2024, 1, 1, tzinfo=BombZone()), "<unprintable datetime: RuntimeError>"),
        (BombError(), "<unprintable BombError: RuntimeError>"),
        (RaisesBombError(), "<unprintable RaisesBombError: BombError>"),
        (BombField(), {"good": "<unprintable BombField: RuntimeError>"}),
        (FakeDataclass(), "<unprintable FakeDataclass: AttributeError>"),
        (FakeJob(), "<unprintable Job: RuntimeError>"),
        (mutated_dict(), "<dict not converted: RuntimeError>"),
        (DeepRepr(), "<unprintable DeepRepr: RecursionError>"),
    ],
    ids=lambda value: safe_text(type(value).__name__),
)
def test_broken_values_become_a_text_that_says_so(value: Any, expected: Any) -> None:
    assert to_json_safe(value) == expected
    assert to_json_safe([1, value, 2]) == [1, expected, 2]


@pytest.mark.parametrize(
    "make",
    [
        of_lying_class,
        of_bomb_meta,
        lambda: type(of_bomb_meta()),
        lambda: {BrokenStr(): 1},
        lambda: {of_bomb_meta(): 1},
        lambda: explode,
        lambda: types.SimpleNamespace(a=1),
        lambda: types.MappingProxyType({}),
        lambda: sys,
        lambda: NotImplemented,
        lambda: ...,
        lambda: type,
        lambda: object(),
        lambda: iter([]),
    ],
)
def test_odd_values_are_encodable_as_ascii_json(make: Callable[[], Any]) -> None:
    converted = to_json_safe([make()])
    text = json.dumps(converted, allow_nan=False)
    assert text.isascii()
    assert json.loads(text) == converted


def test_circular_and_deep_values() -> None:
    loop: dict[str, Any] = {"ok": 1}
    loop["self"] = [loop]
    assert to_json_safe(loop) == {"ok": 1, "self": ["<dict inside itself>"]}

    point = Point(1, None)
    point.y = [point]
    assert to_json_safe(point) == {"x": 1, "y": ["<Point inside itself>"], "tags": []}

    shared = [1]
    assert to_json_safe([shared, shared]) == [[1], [1]]

    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    converted = to_json_safe(deep)
    depth = 0
    while isinstance(converted, list):
        converted, depth = converted[0], depth + 1
    assert depth == MAX_DEPTH
    assert converted == "<list nested too deeply>"
    while deep:  # taken apart here: freeing it at once is recursive
        deep = deep.pop()


def test_at_the_edge_of_the_stack() -> None:
    def down() -> Any:
        try:
            return down()
        except RecursionError:
            return to_json_safe({"a": [Point(1, 2)]})

    assert down() is not None


def test_long_texts_of_objects_are_cut_and_texts_are_not() -> None:
    class Long:
        def __str__(self) -> str:
            return "x" * (MAX_TEXT + 1)

    assert to_json_safe(Long()) == "x" * (MAX_TEXT - 3) + "..."
    assert to_json_safe("x" * (MAX_TEXT + 1)) == "x" * (MAX_TEXT + 1)


@pytest.mark.parametrize("error", [JobTimeoutException, SystemExit, BaseException], ids=lambda e: e.__name__)
def test_an_order_to_stop_ends_the_conversion_instead_of_calling_more_foreign_code(
    error: type[BaseException],
) -> None:
    calls = []

    class Slow:
        def __str__(self) -> str:
            calls.append(self)
            raise error("stop")

    value = [Slow() for _ in range(5)]
    assert to_json_safe(value) == f"<list not converted: {error.__name__}>"
    assert len(calls) == 1
    assert dumps_capped(value, 1000) == (None, True)
    assert safe_text(value[0]) == f"<Slow not converted: {error.__name__}>"


def test_rq_s_alarm_is_not_spent_on_one_slow_object() -> None:
    class Slow:
        def __str__(self) -> str:
            time.sleep(5)
            return "late"

    def out_of_time(number: int, frame: Any) -> NoReturn:
        raise JobTimeoutException("Task exceeded maximum timeout value")

    before = signal.signal(signal.SIGALRM, out_of_time)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        assert dumps_capped([Slow(), Slow()], 1000) == (None, True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit], ids=lambda e: e.__name__)
def test_ctrl_c_passes_through(error: type[BaseException]) -> None:
    class Slow:
        def __str__(self) -> str:
            raise error

    with pytest.raises(error):
        to_json_safe([Slow()])


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        15,
        -1,
        128,
        10**30,
        0.5,
        1e300,
        "",
        "é",
        "\U0001f600",
        [],
        [[]],
        [1, 2],
        {},
        {"a": 1, "b": {}},
        {1, 2},
    ],
    ids=repr,
)
def test_the_cap_is_exact(value: Any) -> None:
    size = len(json.dumps(to_json_safe(value), separators=(",", ":")))
    assert dumps_capped(value, size) == (to_json_safe(value), False)
    assert dumps_capped(value, size - 1) == (None, True)


def test_too_large_values_are_not_converted_wholly() -> None:
    calls = []

    class Counting:
        def __str__(self) -> str:
            calls.append(1)
            return "x" * 10

    value = [Counting()] * 1_000_000
    assert dumps_capped(value, 1000) == (None, True)
    assert len(calls) < 100

    # A thousand million items: converted wholly, this test would run into its time limit.
    for huge in ("x" * 50_000_000, [0] * 20_000_000, [[[0] * 1000] * 1000] * 1000):
        assert dumps_capped(huge, 2**16) == (None, True)
    assert to_json_safe([[[0] * 1000] * 1000] * 1000) == "<list too large>"


def test_a_small_thing_repeated_often_is_bounded() -> None:
    laughs: Any = "ha"
    for _ in range(40):
        laughs = [laughs, laughs]
    assert dumps_capped(laughs, 2**18) == (None, True)


def test_safe_text() -> None:
    assert safe_text("abcdef", 5) == "ab..."
    assert safe_text("abcdef", 6) == "abcdef"
    assert safe_text("abcdef", 2) == ".."
    assert safe_text(BrokenStr()) == "<unprintable BrokenStr: RuntimeError>"
    assert safe_text("\ud800") == "\\ud800"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_json_stays_as_it_is(value: Any) -> None:
    assert to_json_safe(value) == value


anything = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.floats(),
        st.text(st.characters()),
        st.binary(),
        st.decimals(),
        st.datetimes(timezones=st.none() | st.timezones()),
        st.timedeltas(),
        st.fractions(),
        st.uuids(),
        st.complex_numbers(),
        st.builds(BrokenStr),
        st.builds(Bomb),
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters()) | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(anything, st.integers(0, 200))
def test_anything_is_converted_once_and_for_all(value: Any, cap: int) -> None:
    converted = to_json_safe(value)
    text = json.dumps(converted, allow_nan=False, separators=(",", ":"))
    assert text.isascii()
    json.dumps(converted, ensure_ascii=False).encode()  # no half of a pair is left
    assert to_json_safe(converted) == converted
    capped, truncated = dumps_capped(value, cap)
    assert truncated == (len(text) > cap)
    assert capped == (None if truncated else converted)


def test_the_import_costs_nothing_an_rq_worker_has_not_paid() -> None:
    code = textwrap.dedent(
        """
        import sys
        import rq.worker
        import flask_rq_webhooks.protocol
        before = set(sys.modules)
        import flask_rq_webhooks.protocol.json_safe
        print(sorted(set(sys.modules) - before))
        """
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['flask_rq_webhooks.protocol.json_safe']"
