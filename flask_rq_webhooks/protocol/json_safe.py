"""Convert any Python value to JSON, without ever raising, and with bounded work.

Converts results and error texts. Runs inside users' forked work-horses, once per job, so it imports only
what RQ has already loaded and recognises everything else (dataclasses, numpy, RQ jobs) by the shape of its
class. It must not know what the values are for.

Conversions:

====================================  ===================================================================
``None``, ``bool``, finite numbers    themselves; NaN and infinities ``null``; integers beyond 2048 bits
                                      a hexadecimal string, since many JSON parsers refuse the number
``str``                               itself; lone surrogates as the text ``\\udc80``
``dict``                              object; a key that is not a string becomes its JSON as a string
``list``, ``tuple``                   array
``set``, ``frozenset``                array, sorted
``bytes`` and similar types           ``"<bytes length=1234>"``, never their content
``datetime``, ``date``, ``time``      ISO 8601
``timedelta``                         seconds
``Enum``                              its value
dataclass                             object of its fields
numpy scalar                          its Python number (``datetime64`` its text)
RQ ``Job``                            its id
anything else                         ``str()``: ``Path``, ``UUID``, ``Decimal``, …; cut at 10,000 characters
====================================  ===================================================================

A value nested deeper than 50 levels, a container that contains itself, and an object that cannot be
converted to text are replaced by a note in angle brackets; the values around them are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from enum import Enum
from functools import partial
from typing import Any

#: Maximum depth of nested containers; deeper ones are cut off. Common JSON parsers stop at 64.
MAX_DEPTH = 50
#: Maximum characters kept of the text of an object that is not itself a string.
MAX_TEXT = 10_000
#: Maximum bytes of JSON that :func:`to_json_safe` produces.
MAX_BYTES = 4 * 2**20

_MAX_INT_BITS = 2048

# Read through the descriptors of ``type`` itself, which a metaclass cannot override.
_mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__
_module_of: Callable[[type], Any] = type.__dict__["__module__"].__get__
_namespace_of: Callable[[type], Mapping[str, Any]] = type.__dict__["__dict__"].__get__

#: Stands for a value that is best shown by its ``str()``.
_ITS_TEXT = object()


class _TooLarge(Exception):  # noqa: N818  (a jump, not an error anyone sees)
    """The JSON would be longer than the budget."""


class _Interrupted(Exception):  # noqa: N818
    """The process was asked to stop while foreign code ran; no more foreign code may be called."""


def to_json_safe(value: Any) -> Any:
    """Return *value* as plain ``dict``, ``list``, ``str``, ``int``, ``float``, ``bool`` and ``None``.

    Never raises, whatever the value does. A value of more than :data:`MAX_BYTES` becomes one string that
    says so; use :func:`dumps_capped` if the caller must notice that. Only an operator's Ctrl-C
    (:exc:`KeyboardInterrupt`) and the end of a coroutine (:exc:`GeneratorExit`) pass through.

    :param value: anything. Generators and iterators are not consumed, and files are not read.
    """
    try:
        return _convert(value, MAX_BYTES)
    except _TooLarge:
        return f"<{_class_name(value)} too large>"
    except _Interrupted as exc:
        return f"<{_class_name(value)} not converted: {exc}>"


def dumps_capped(value: Any, max_bytes: int) -> tuple[Any, bool]:
    """Return *value* JSON-safe and ``False``, or ``None`` and ``True`` if it is too large.

    All or nothing: a truncated result would be taken for the whole. The work stops as soon as the limit is
    exceeded, however large the value is. A value whose own code was interrupted (RQ's job timeout,
    ``sys.exit``) counts as too large, because its text would be arbitrary.

    :param value: anything, already converted or not.
    :param max_bytes: limit for the compact ASCII JSON of the value.
    """
    try:
        safe = _convert(value, max_bytes)
        size = len(json.dumps(safe, separators=(",", ":"), allow_nan=False))
    except (_TooLarge, _Interrupted, MemoryError):
        return None, True
    return (safe, False) if size <= max_bytes else (None, True)


def safe_text(value: Any, max_chars: int = MAX_TEXT) -> str:
    """Return ``str(value)``, cut to *max_chars*, or a text that names the class if that fails.

    Like :func:`to_json_safe`, never raises, whatever the value does.

    :param value: anything; a class name, a message, an exception.
    """
    try:
        return _text(value, max_chars)
    except _Interrupted as exc:
        return _clean(f"<{_class_name(value)} not converted: {exc}>", max_chars)


def _convert(value: Any, budget: int) -> Any:
    """Convert within *budget*, and also catch what our own guards cannot foresee.

    RQ ends a job or callback that exceeds its time by an exception from a signal handler, which can arrive
    between any two instructions here, and a value near the interpreter's stack limit can fail anywhere.
    """
    converter = _Converter(budget)
    try:
        return converter.convert(value, 0)
    except (_TooLarge, _Interrupted):
        raise
    except RecursionError:
        return f"<{_class_name(value)} not converted: RecursionError>"
    except Exception as exc:
        raise _Interrupted(_class_name(exc)) from exc


class _Converter:
    """One conversion: the remaining budget, and the containers being converted."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.open: set[int] = set()

    def spend(self, amount: int) -> None:
        """Count *amount* bytes of JSON, never more than are really written.

        :raises _TooLarge: when the budget is used up.
        """
        self.budget -= amount
        if self.budget < 0:
            raise _TooLarge

    def convert(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            self.spend(4)
            return value
        if kind is int or issubclass(kind, int):
            return self.integer(int.__index__(value))
        if issubclass(kind, float):
            number = float.__pos__(value)
            self.spend(3)
            return number if number - number == 0 else None
        if issubclass(kind, str):
            # Cut before copying: one character more than fits is enough to be too large.
            return self.string(str.__getitem__(value, slice(0, max(self.budget, 0) + 1)))
        if issubclass(kind, dict | list | tuple | set | frozenset):
            return self.container(value, depth)
        if issubclass(kind, bytes):
            return self.string(f"<bytes length={bytes.__len__(value)}>")
        if issubclass(kind, bytearray):
            return self.string(f"<bytes length={bytearray.__len__(value)}>")
        return self.object(value, depth)

    def integer(self, number: int) -> int | str:
        if number.bit_length() > _MAX_INT_BITS:
            if number.bit_length() > 4 * MAX_TEXT:
                return self.string(f"<int of {number.bit_length()} bits>")
            return self.string(hex(number))
        # One digit holds less than 4 bits.
        self.spend(max(1, number.bit_length() // 4))
        return number

    def string(self, text: str) -> str:
        text = _clean(text, None)
        self.spend(len(text) + 2)
        return text

    def container(self, value: Any, depth: int) -> Any:
        marker = id(value)
        if marker in self.open:
            return self.string(f"<{_class_name(value)} inside itself>")
        if depth >= MAX_DEPTH:
            return self.string(f"<{_class_name(value)} nested too deeply>")
        self.spend(2)
        self.open.add(marker)
        try:
            kind = type(value)
            if issubclass(kind, dict):
                return self.mapping(dict.items(value), depth)
            if issubclass(kind, set | frozenset):
                base: Any = set if issubclass(kind, set) else frozenset
                return _sorted(self.items(base.__iter__(value), depth))
            return self.items((list if issubclass(kind, list) else tuple).__iter__(value), depth)
        except RuntimeError as exc:
            # Foreign code or another thread changed the container during the conversion.
            return self.string(f"<{_class_name(value)} not converted: {_class_name(exc)}>")
        finally:
            self.open.discard(marker)

    def items(self, values: Iterable[Any], depth: int) -> list[Any]:
        converted: list[Any] = []
        for item in values:
            # Count the comma; the budget stops a list of any length.
            if converted:
                self.spend(1)
            converted.append(self.convert(item, depth + 1))
        return converted

    def mapping(self, pairs: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for key, item in pairs:
            self.spend(1)
            converted[self.key(key, depth)] = self.convert(item, depth + 1)
        return converted

    def key(self, key: Any, depth: int) -> str:
        if type(key) is str:
            return self.string(key)
        safe = self.convert(key, depth + 1)
        if isinstance(safe, str):
            return safe
        # The way json.dumps writes numbers, true, false and null as keys; the same for containers.
        return json.dumps(safe, separators=(",", ":"), allow_nan=False)

    def object(self, value: Any, depth: int) -> Any:
        """Convert a value that is not one of JSON's own types; guard the calls into its code."""
        marker = id(value)
        if marker in self.open:
            return self.string(f"<{_class_name(value)} inside itself>")
        self.open.add(marker)
        try:
            replaced = _guarded(_replacement, value)
            if replaced is _ITS_TEXT or type(replaced) is type(value):
                return self.string(_text(value, MAX_TEXT))
            # Count a level: objects may be replaced by one another without end.
            return self.convert(replaced, depth + 1)
        finally:
            self.open.discard(marker)


def _replacement(value: Any) -> Any:
    """Return the replacement for *value*, or :data:`_ITS_TEXT`."""
    kind = type(value)
    if issubclass(kind, Enum):
        return value._value_
    if issubclass(kind, datetime | date | time):
        return value.isoformat()
    if issubclass(kind, timedelta):
        return timedelta.total_seconds(value)
    if issubclass(kind, memoryview):
        return f"<bytes length={value.nbytes}>"
    bases = _mro_of(kind)
    for base in bases:
        name, module = _name_of(base), _module_of(base)
        if name == "Job" and module == "rq.job":
            return value.id
        if name == "generic" and module == "numpy":
            has_unit = any(_name_of(other) in ("datetime64", "timedelta64") for other in bases)
            return _ITS_TEXT if has_unit else value.item()
        fields = _namespace_of(base).get("__dataclass_fields__")
        if type(fields) is dict:
            # Take only real fields: the table also lists class and init-only variables.
            return {
                name: _guarded(partial(_attribute, name), value)
                for name, field in fields.items()
                if field._field_type.name == "_FIELD"
            }
    return _ITS_TEXT


def _attribute(name: str, owner: Any) -> Any:
    return getattr(owner, name)


def _guarded(function: Callable[[Any], Any], value: Any) -> Any:
    """Return ``function(value)``, which may run any code, or a text that says why there is no value.

    :raises _Interrupted: when the process was asked to stop in the meantime. RQ's timeouts come from a
        one-shot alarm: if one were taken for a broken ``__str__``, it would be used up and the next slow
        object would hang the worker forever. ``SystemExit`` in a work-horse can only come from the value
        itself and would turn a good job into a failed one; a SimpleWorker records the stop before raising it.
    """
    try:
        return function(value)
    except BaseException as exc:
        kind = type(exc)
        if issubclass(kind, KeyboardInterrupt | GeneratorExit | _Interrupted):
            raise
        if not issubclass(kind, Exception) or any(
            _module_of(base) == "rq.timeouts" for base in _mro_of(kind)
        ):
            raise _Interrupted(_class_name(exc)) from exc
        return f"<unprintable {_class_name(value)}: {_class_name(exc)}>"


def _text(value: Any, max_chars: int) -> str:
    text: str = _guarded(lambda owner: str.__str__(str(owner)), value)
    return _clean(text, max_chars)


def _class_name(value: Any) -> str:
    return _clean(_name_of(type(value)), 100)


def _clean(text: str, max_chars: int | None) -> str:
    """Return *text* as valid Unicode, cut to *max_chars* with an ellipsis at its end."""
    if max_chars is not None and len(text) > max_chars:
        text = text[: max(max_chars - 3, 0)] + "..."[:max_chars]
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def _sorted(items: list[Any]) -> list[Any]:
    try:
        return sorted(items)
    except TypeError:
        return sorted(items, key=lambda item: (type(item).__name__, json.dumps(item, sort_keys=True)))
