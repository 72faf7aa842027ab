"""Read plain data from pickles that anybody who can write to Redis may have written.

``pickle.load`` is never called on them. ``pickletools.genops`` splits a pickle into opcodes, and the small
machine here builds strings, numbers, dates and containers from them. It imports nothing, calls nothing that a
pickle names, and returns no class: the constructors below are our own functions. Whatever is not plain data
becomes :data:`UNKNOWN`. Work and memory are bounded: see :data:`MAX_BYTES` and :data:`MAX_STEPS`.

RQ's ``JSONSerializer`` writes JSON instead; :func:`load_plain` reads that too.
"""

from __future__ import annotations

import json
import pickletools
import re
import zlib
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final
from uuid import UUID

from ..protocol.json_safe import dumps_capped

#: Maximum bytes of a pickle, and of JSON. Each byte of a string may take four bytes of memory.
MAX_BYTES, MAX_JSON_BYTES = 4 * 2**20, 2**20
#: Maximum opcodes executed, which limits the number of objects: about 0.2 s and 15 MB.
MAX_STEPS = 200_000
#: Steps charged for a set: an empty one takes four times the memory of a list or dict.
_SET_STEPS = 4
#: Maximum keys and set members whose hashes can be made to collide: n of them take n² comparisons.
_MAX_WEAK_KEYS = 1000
#: Maximum values within one tuple used as a key: each level of shared tuples doubles the cost of hashing it.
_MAX_KEY_VALUES = 64

#: Maximum bytes of the JSON of a job's progress.
MAX_PROGRESS_BYTES = 4096

#: How RQ's own description of a job begins.
_CALL = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+(?=\()")


class _Unknown(Enum):
    UNKNOWN = "unknown"

    def __repr__(self) -> str:
        return "UNKNOWN"


#: A value that is no longer stored, or that only its own program could read.
UNKNOWN: Final = _Unknown.UNKNOWN


class _UnsafeError(Exception):
    """The pickle does something that no pickle of plain data does, or does too much."""


def load_plain(raw: bytes, *, whole: bool = False) -> Any:
    """Return what *raw* contains, with :data:`UNKNOWN` in place of each value that is not plain data.

    :param raw: written by RQ's pickle or JSON serializer; already decompressed.
    :param whole: return :data:`UNKNOWN` for the whole value if any part of it is unknown.
    :returns: :data:`UNKNOWN` if *raw* is broken, too large or does what plain data does not need.
    """
    try:
        if raw[:1] != b"\x80":
            return json.loads(raw) if len(raw) <= MAX_JSON_BYTES else UNKNOWN
        if len(raw) > MAX_BYTES:
            return UNKNOWN
        machine = _Machine()
        value = machine.run(raw)
    # A broken pickle may raise nearly anything, both in `genops` and in the constructors.
    except Exception:  # noqa: BLE001
        return UNKNOWN
    return UNKNOWN if whole and machine.met_unknown else value


def plain_call(data: bytes, description: str | None = None) -> tuple[str | None, Any]:
    """Return a job's function name and its first positional argument, without importing what they name.

    :param data: the job's call as RQ serialized it.
    :param description: RQ's own description begins with the name; used if *data* cannot be read.
    :returns: ``None`` for what is not known. The argument is a plain value or :data:`UNKNOWN`.
    """
    call = load_plain(data)
    if isinstance(call, tuple | list) and len(call) == 4 and isinstance(call[0], str):
        name, _instance, arguments, _keywords = call
        return name, arguments[0] if isinstance(arguments, tuple | list) and arguments else None
    match = _CALL.match(description or "")
    return (match[0] if match else None), None


def progress_in(meta: bytes | None, key: str) -> Any:
    """Return the value under *key* in a job's meta, JSON-safe; ``None`` if it has no such key.

    A value that cannot be read or takes more than :data:`MAX_PROGRESS_BYTES` counts as none.
    """
    # Both serializers write an ordinary key unchanged.
    if not meta or (key.isidentifier() and key.isascii() and key.encode() not in meta):
        return None
    values = load_plain(meta)
    value = values.get(key, UNKNOWN) if isinstance(values, dict) else UNKNOWN
    return None if value is UNKNOWN else dumps_capped(value, MAX_PROGRESS_BYTES)[0]


def inflated(value: bytes, limit: int = MAX_BYTES) -> bytes:
    """Return *value* decompressed, or unchanged if RQ did not compress it.

    :param limit: maximum bytes; a few compressed bytes may expand to gigabytes, so the rest is cut off.
    """
    try:
        return zlib.decompressobj().decompress(value, limit)
    except zlib.error:
        return value[:limit]


# -- constructors -------------------------------------------------------------------------------------------


def _dated(kind: Any) -> Callable[..., Any]:
    """Return a constructor that builds a :mod:`datetime` type from the bytes in that type's pickles."""

    def dated(state: Any, *zone: Any) -> Any:
        if type(state) is not bytes or not all(isinstance(part, timezone) for part in zone):
            raise _UnsafeError
        return kind(state, *zone)

    return dated


def _timedelta(*parts: Any) -> timedelta:
    if any(type(part) is not int for part in parts):
        raise _UnsafeError
    return timedelta(*parts)


def _timezone(offset: Any, name: Any = None) -> timezone:
    if not isinstance(offset, timedelta) or not (name is None or type(name) is str):
        raise _UnsafeError
    if name is None:
        return timezone(offset) if offset else UTC
    return timezone(offset, name)


def _decimal(text: Any) -> Decimal:
    if type(text) is not str or len(text) > 300:
        raise _UnsafeError
    return Decimal(text)


def _path(kind: Callable[..., Any]) -> Callable[..., str]:
    """Return a constructor that returns only the path's text."""

    def path(*parts: Any) -> str:
        if any(type(part) is not str for part in parts) or sum(map(len, parts)) > 4096:
            raise _UnsafeError
        return str(kind(*parts))

    return path


# These return their argument itself: with copies, a pickle could duplicate a large value for four bytes.


def _bytearray(content: Any = b"") -> bytes:
    if type(content) is not bytes:  # a number would allocate as many bytes
        raise _UnsafeError
    return content


def _deque(items: Any = (), _maxlen: Any = None) -> list[Any]:
    if type(items) is list:
        return items
    if items != ():
        raise _UnsafeError
    return []


def _dict(items: Any = None, *_more: Any) -> dict[Any, Any]:
    # OrderedDict(), Counter({...}), defaultdict(factory).
    return items if type(items) is dict else {}


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


_POSIX, _WINDOWS = _path(PurePosixPath), _path(PureWindowsPath)
_PATHS = {
    "Path": _POSIX, "PosixPath": _POSIX, "PurePath": _POSIX, "PurePosixPath": _POSIX,
    "WindowsPath": _WINDOWS, "PureWindowsPath": _WINDOWS,
}  # fmt: skip

#: (module, name) that a pickle may name → what is called instead. Python 3.13 moved the path classes.
_CONSTRUCTORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): _complex,
    ("datetime", "datetime"): _dated(datetime),
    ("datetime", "date"): _dated(date),
    ("datetime", "time"): _dated(time),
    ("datetime", "timedelta"): _timedelta,
    ("datetime", "timezone"): _timezone,
    ("decimal", "Decimal"): _decimal,
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _dict,
    ("collections", "deque"): _deque,
    **{(module, name): path for module in ("pathlib", "pathlib._local") for name, path in _PATHS.items()},
}
_SETS: dict[tuple[str, str], Callable[[list[Any]], Any]] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
#: Created by NEWOBJ and filled by BUILD in its own way; nothing else may be filled.
_UUID = ("uuid", "UUID")


# -- the machine --------------------------------------------------------------------------------------------


class _Global:
    """Just the name that a pickle gave: it cannot be called."""

    __slots__ = ("path",)

    def __init__(self, module: Any, name: Any) -> None:
        self.path = (module, name) if type(module) is str and type(name) is str else ("", "")


_MARK = object()
#: Opcodes whose argument, as ``genops`` reads it, is the value.
_VALUES = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
        "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    )
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_PUTS, _GETS = frozenset(("PUT", "BINPUT", "LONG_BINPUT")), frozenset(("GET", "BINGET", "LONG_BINGET"))


class _Machine:
    """The stack machine that executes pickles, for plain data only."""

    def __init__(self) -> None:
        self.met_unknown = False
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._weak_keys = 0

    def run(self, raw: bytes) -> Any:
        """Return the value that *raw* describes.

        :raises Exception: if it describes none.
        """
        stack, memo = self._stack, self._memo
        argument: Any
        for opcode, argument, _position in pickletools.genops(raw):
            self._spend(1)
            name = opcode.name
            if name in _VALUES:
                stack.append(argument)
            elif name == "MEMOIZE":
                memo[len(memo)] = self._top()
            elif name in _PUTS:
                memo[argument] = self._top()  # a dict: an index of four billion takes no extra space
            elif name in _GETS:
                stack.append(memo[argument])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "STOP":
                return self._value(stack.pop())
            elif name not in ("PROTO", "FRAME"):
                # Opcodes not in the table (DUP, extension codes, buffers) occur in no pickle of plain data.
                _OPCODES[name](self, argument)
        raise _UnsafeError

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise _UnsafeError

    # -- the stack ------------------------------------------------------------------------------------

    def _value(self, item: Any) -> Any:
        """Return *item* as a value; a bare name becomes :data:`UNKNOWN`."""
        if item is _MARK:
            raise _UnsafeError
        if item is UNKNOWN or isinstance(item, _Global):
            self.met_unknown = True
            return UNKNOWN
        return item

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise _UnsafeError
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise _UnsafeError
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return [self._value(item) for item in items]

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(self._value(item))
        items.reverse()
        return items

    # -- containers -----------------------------------------------------------------------------------

    def _new_dict(self) -> None:
        items = self._pop_to_mark()
        self._stack.append({})
        self._set_items(items)

    def _new_set(self, kind: Any, items: list[Any]) -> None:
        self._spend(_SET_STEPS)
        self._stack.append(kind(self._key(item) for item in items))

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        elif target is not UNKNOWN:
            raise _UnsafeError

    def _add_items(self) -> None:
        items, target = self._pop_to_mark(), self._top()
        if type(target) is not set:
            raise _UnsafeError
        target.update(self._key(item) for item in items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if target is UNKNOWN:
            return
        if type(target) is not dict or len(items) % 2:
            raise _UnsafeError
        for key, item in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = item

    def _key(self, key: Any) -> Any:
        """Return *key*, which is about to be hashed, if hashing it is cheap.

        The author of the pickle cannot choose the hashes of strings and bytes, and hardly any two floats or
        small integers share one. Tuples, large integers, decimals and UUIDs can be made to collide.
        """
        kind = type(key)
        if kind is str or kind is bytes or kind is float or (kind is int and key.bit_length() < 61):
            return key
        self._weak_keys += 1
        if self._weak_keys > _MAX_WEAK_KEYS:
            raise _UnsafeError
        values = [key]
        for seen, value in enumerate(values):  # the list grows during the loop
            if seen >= _MAX_KEY_VALUES:
                raise _UnsafeError
            if isinstance(value, tuple | frozenset):
                if len(value) > _MAX_KEY_VALUES:
                    raise _UnsafeError
                values.extend(value)
            elif isinstance(value, int) and value.bit_length() > 4096:
                raise _UnsafeError
        return key

    # -- names, calls and objects ---------------------------------------------------------------------

    def _call(self, count: int) -> None:
        """Replace a name and its arguments by what our constructor for that name returns for them."""
        if len(self._stack) < count:
            raise _UnsafeError
        called = self._stack[-count]
        self._stack[-count] = None
        _called, arguments, *_keywords = self._pop(count)
        self._stack.append(self._made(called, arguments))

    def _made(self, called: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:
            raise _UnsafeError
        path = called.path if isinstance(called, _Global) else ("", "")
        if path == _UUID:
            return UUID(int=0)  # BUILD sets its number
        if path in _SETS:
            return _SETS[path](self._members(arguments))
        constructor = _CONSTRUCTORS.get(path)
        # A defaultdict's factory is a name and has no influence on the content.
        if constructor is None or (UNKNOWN in arguments and constructor is not _dict):
            return self._value(UNKNOWN)
        value = constructor(*arguments)
        if type(value) is str:
            self._spend(len(value) // 64)
        return value

    def _members(self, arguments: tuple[Any, ...]) -> list[Any]:
        """Return the members of a set in the form that protocols before 4 write."""
        (items,) = arguments or ([],)
        if type(items) is not list:
            raise _UnsafeError
        self._spend(_SET_STEPS + len(items))
        return [self._key(item) for item in items]

    def _build(self) -> None:
        (state,) = self._pop(1)
        target = self._top()
        if type(target) is UUID and type(state) is dict:
            number = state.get("int")
            if type(number) is not int or not 0 <= number < 2**128:
                raise _UnsafeError
            # It may already be in the memo, so it is modified, not replaced.
            object.__setattr__(target, "int", number)
        elif target is not UNKNOWN and not isinstance(target, _Global):
            raise _UnsafeError

    def _name(self, module: Any, name: Any) -> None:
        self._stack.append(_Global(module, name))

    def _unknown(self, _dropped: Any = None) -> None:
        self._stack.append(self._value(UNKNOWN))


#: The action for each opcode, given the machine and the opcode's argument.
_OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda machine, _: machine._stack.pop(),
    "POP_MARK": lambda machine, _: machine._pop_to_mark(),
    "EMPTY_TUPLE": lambda machine, _: machine._stack.append(()),
    "TUPLE1": lambda machine, _: machine._stack.append(tuple(machine._pop(1))),
    "TUPLE2": lambda machine, _: machine._stack.append(tuple(machine._pop(2))),
    "TUPLE3": lambda machine, _: machine._stack.append(tuple(machine._pop(3))),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._pop_to_mark())),
    "LIST": lambda machine, _: machine._stack.append(machine._pop_to_mark()),
    "DICT": lambda machine, _: machine._new_dict(),
    "EMPTY_SET": lambda machine, _: machine._new_set(set, []),
    "FROZENSET": lambda machine, _: machine._new_set(frozenset, machine._pop_to_mark()),
    "APPEND": lambda machine, _: machine._extend(machine._pop(1)),
    "APPENDS": lambda machine, _: machine._extend(machine._pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine._add_items(),
    "SETITEM": lambda machine, _: machine._set_items(machine._pop(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine._name(*argument.partition(" ")[::2]),
    "STACK_GLOBAL": lambda machine, _: machine._name(*machine._pop(2)),
    "REDUCE": lambda machine, _: machine._call(2),
    "NEWOBJ": lambda machine, _: machine._call(2),
    "NEWOBJ_EX": lambda machine, _: machine._call(3),
    "BUILD": lambda machine, _: machine._build(),
    "INST": lambda machine, _: machine._unknown(machine._pop_to_mark()),
    "OBJ": lambda machine, _: machine._unknown(machine._pop_to_mark()),
    "PERSID": lambda machine, _: machine._unknown(),
    "BINPERSID": lambda machine, _: machine._unknown(machine._pop(1)),
}
