"""Which routes of an app enqueue RQ jobs, and whether a webhook can go with them.

What a test-suite has observed (:func:`flask_rq_webhooks.testing.observe_routes`) is the truth. Beside it the
source of a view is read, and that of the functions it calls: one level deep, and nothing is run. The report
says what is certain by one of the two, and "cannot tell" otherwise.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import inspect
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import rq
import rq.decorators
from flask import Flask
from flask.views import MethodView

from ..queue.job_callbacks import Queue, is_instrumented
from .decorator import accepts_webhooks

#: Methods of a queue that enqueue; the last two take a job that may have been made elsewhere.
ENQUEUING = frozenset({"enqueue", "enqueue_at", "enqueue_call", "enqueue_in", "enqueue_many"})
BY_HAND = frozenset({"enqueue_job", "schedule_job"})
#: Our own, which need no attached queue.
HELPERS = frozenset({"enqueue_with_webhook", "watch"})

_PACKAGE = __name__.partition(".")[0]
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_NOT_READ = (OSError, TypeError, SyntaxError, ValueError)  # no source, or a lambda within something else


@dataclass(frozen=True, slots=True)
class Place:
    """One place in the source that enqueues, or may.

    :param call: what the source says, such as ``q.enqueue_call``.
    :param through: the function between the view and the place, empty for the view itself.
    :param certain: whether it enqueues for sure, and it is known whether a webhook goes with the job.
    :param covered: whether ``accepts_webhook`` or a helper of ours stands before it.
    :param plain: whether it is an ``rq.Queue`` and not ours, which carries a webhook only if instrumented.
    """

    call: str
    file: str
    line: int
    through: str = ""
    certain: bool = True
    covered: bool = False
    helper: bool = False
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One rule of an app, with those of its HTTP methods that share the same code.

    :param view: Flask's endpoint name.
    :param decorated: whether the view itself accepts webhooks.
    :param complete: whether every function of the app's own that it calls was read.
    :param observed: the jobs tests saw, as ``observe_routes`` saves them; ``None``: no test called it.
    """

    rule: str
    methods: tuple[str, ...]
    view: str
    decorated: bool
    complete: bool
    places: tuple[Place, ...] = ()
    observed: tuple[dict[str, Any], ...] | None = None

    @property
    def webhook(self) -> str:
        """Return ``"decorator"`` or ``"helper"`` where jobs carry webhooks, or what is wrong.

        ``"missing"``: it enqueues, and no webhook can go with it. ``"unattached"``: it is decorated, and
        its queue carries none. ``"unknown"``: neither tests nor source tell. ``"none"``: nothing that
        enqueues was seen.
        """
        if self.observed:
            found = {job["webhook"] for job in self.observed}
        else:
            found = {_judged(place) for place in self.places if place.certain}
        for word in ("missing", "unattached", "decorator", "helper"):
            if word in found:
                return word
        if self.observed is None and (self.decorated or self.places or not self.complete):
            return "unknown"
        return "none"

    @property
    def place(self) -> Place | None:
        """Return the place that says most about :attr:`webhook`."""
        return min(
            self.places,
            key=lambda place: (not place.certain, _judged(place) != self.webhook, bool(place.through)),
            default=None,
        )


def _judged(place: Place) -> str:
    if place.helper:
        return "helper"
    if not place.covered:
        return "missing"
    return "unattached" if place.plain and not is_instrumented() else "decorator"


def survey(app: Flask) -> list[Route]:
    """Return every route of *app* but ours and static files, in the order of its rules."""
    routes = []
    for rule in app.url_map.iter_rules():
        view = app.view_functions.get(rule.endpoint)
        if view is None or rule.endpoint.rpartition(".")[2] == "static":
            continue
        if str(getattr(view, "__module__", "")).partition(".")[0] == _PACKAGE:
            continue
        shown = sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
        for methods, function, owner in _functions(view, shown):
            decorated = any(accepts_webhooks(layer) for layer in (view, function))
            reading = _Reading(own_package=app.import_name.partition(".")[0])
            reading.read(function, owner, covered=decorated)
            routes.append(
                Route(
                    str(rule),
                    tuple(methods),
                    rule.endpoint,
                    decorated or reading.decorated,
                    reading.complete,
                    tuple(reading.places),
                )
            )
    return routes


def _functions(view: Any, methods: list[str]) -> Iterator[tuple[list[str], Any, type | None]]:
    """Give (HTTP methods, function, its class) of one view."""
    cls = next((c for layer in _layers(view) if (c := getattr(layer, "view_class", None))), None)
    if cls is None:
        yield methods, view, None
    elif issubclass(cls, MethodView):
        for method in methods:
            if hasattr(cls, method.lower()):
                yield [method], getattr(cls, method.lower()), cls
    else:
        yield methods, getattr(cls, "dispatch_request", None), cls


def _layers(function: Any) -> Iterator[Any]:
    """Give *function* and what it wraps by ``functools.wraps``, partials and bound methods."""
    while function is not None:
        yield function
        names = ("__wrapped__", "func", "__func__")
        function = next((inner for name in names if (inner := _attribute(function, name)) is not None), None)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute of *value* without asking a ``LocalProxy`` for a request."""
    return None if type(value).__name__ == "LocalProxy" else getattr(value, name, None)


# -- reading ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reading:
    """What the source of one view says."""

    own_package: str
    places: list[Place] = field(default_factory=list)
    complete: bool = True
    decorated: bool = False
    _seen: set[Any] = field(default_factory=set)

    def read(self, function: Any, owner: type | None, *, covered: bool, through: str = "") -> None:
        """Add what *function* does; *through* names it where it is not the view itself."""
        for layer in _layers(function):
            if accepts_webhooks(layer):
                covered = True
                self.decorated = self.decorated or not through
        *_, innermost = _layers(function)
        if not inspect.isroutine(innermost):
            innermost = inspect.getattr_static(type(innermost), "__call__", None)
        if innermost in self._seen:
            return
        self._seen.add(innermost)
        definition = _definition(innermost) if self._is_own(innermost) else None
        if definition is None:
            self.complete = False
            return
        names = _Names(innermost, owner, definition)
        for node in _inside(definition):
            if isinstance(node, ast.Call):
                self._call(node, names, innermost, covered=covered, through=through)

    def _call(
        self, node: ast.Call, names: _Names, function: types.FunctionType, *, covered: bool, through: str
    ) -> None:
        called = node.func
        line = function.__code__.co_firstlineno + node.lineno - 1
        kind = names.infer(called)
        if isinstance(called, ast.Attribute):
            base = names.infer(called.value)
            is_queue = _is_queue(base)
            by_hand = called.attr in BY_HAND and not (node.args and _is_call_of(node.args[0], "create_job"))
            found = Place(
                ast.unparse(called), function.__code__.co_filename, line, through,
                # A job made elsewhere carries nothing, even if the view is decorated.
                certain=is_queue and not (by_hand and covered), covered=covered,
                plain=is_queue and not issubclass(_class_of(base), Queue),
            )  # fmt: skip
            if called.attr in HELPERS and _class_of(base).__module__ == f"{_PACKAGE}.extension":
                self.places.append(Place(found.call, found.file, line, through, covered=True, helper=True))
                return
            unclear = base is None or base.instance_of is _Unclear
            if called.attr in ENQUEUING | BY_HAND and (is_queue or unclear):
                self.places.append(found)
                return
            if called.attr == "delay" and (unclear or _is_rq_delay(kind)):
                self.places.append(
                    Place(found.call, found.file, line, through, not unclear, covered, plain=True)
                )
                return
        if kind is None or kind.value is None:
            # A name from nowhere, or a method of something that the host's own code returned.
            base = names.infer(called.value) if isinstance(called, ast.Attribute) else None
            if isinstance(called, ast.Name) or (base is not None and base.instance_of is _Unclear):
                self.complete = False
            return
        target, owner = kind.value, kind.owner
        if isinstance(target, type):
            target, owner = inspect.getattr_static(target, "__init__", None), target
        if not any(map(self._is_own, _layers(target))):
            return
        passes_on = any(isinstance(arg, ast.Starred) for arg in node.args) and any(
            keyword.arg is None for keyword in node.keywords
        )
        if not through:  # what passes on every argument is a decorator: the same level
            self.read(target, owner, covered=covered, through="" if passes_on else _dotted(target))
        elif target not in self._seen:
            self.complete = False

    def _is_own(self, function: Any) -> bool:
        """Say whether *function* is the host's: neither of an installed package nor of this one."""
        if not isinstance(getattr(function, "__code__", None), types.CodeType):
            return False
        package = str(getattr(function, "__module__", "")).partition(".")[0]
        return package == self.own_package or not (package == _PACKAGE or _is_installed(function))


def _is_installed(function: Any) -> bool:
    *_, innermost = _layers(function)
    file = str(getattr(getattr(innermost, "__code__", None), "co_filename", _INSTALLED[0]))
    return file.startswith(_INSTALLED) or "site-packages" in Path(file).parts


def _definition(function: Any) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except _NOT_READ:
        return None
    if isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return tree.body[0]
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    return lambdas[0] if len(lambdas) == 1 else None


def _inside(definition: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[ast.AST]:
    """Return the nodes that a call runs: not those of decorators and defaults."""
    body: list[Any] = definition.body if isinstance(definition.body, list) else [definition.body]
    return [node for part in body for node in ast.walk(part)]


class _Unclear:
    """Stands for the class of what a host's own function returns without saying so."""


@dataclass(frozen=True, slots=True)
class _Known:
    """An object the source names, or some instance of *instance_of*."""

    value: Any = None
    instance_of: type | None = None
    owner: type | None = None


class _Names:
    """The names one function can see, as far as its source says what they are."""

    def __init__(
        self,
        function: types.FunctionType,
        owner: type | None,
        node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda,
    ) -> None:
        self._globals = {**vars(builtins), **function.__globals__}
        self._names: dict[str, _Known | None] = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not filled yet
                self._names[name] = _Known(cell.cell_contents)
        hints = _hints(function)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._names.update((argument.arg, _instance(hints.get(argument.arg))) for argument in arguments)
        if owner is not None and arguments:
            self._names[arguments[0].arg] = _Known(instance_of=owner)
        for inner in _inside(node):
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                self._names[inner.targets[0].id] = self.infer(inner.value)
            elif isinstance(inner, ast.withitem) and isinstance(inner.optional_vars, ast.Name):
                self._names[inner.optional_vars.id] = self.infer(inner.context_expr)
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                self._names[inner.name] = _Known(instance_of=object)  # its body is read where it stands
            elif isinstance(inner, ast.ImportFrom):
                package = str(function.__globals__.get("__package__") or "")
                name = importlib.util.resolve_name("." * inner.level + (inner.module or ""), package)
                found = vars(sys.modules[name]) if name in sys.modules else {}
                for imported in inner.names:
                    self._names[imported.asname or imported.name] = _known(found.get(imported.name))

    def infer(self, node: ast.expr) -> _Known | None:
        """Return what an expression is, as far as that can be known without running it."""
        if isinstance(node, ast.Name):
            if node.id in self._names:
                return self._names[node.id]
            return _known(self._globals.get(node.id))
        if isinstance(node, ast.Constant | ast.Dict | ast.List | ast.Set | ast.Tuple | ast.JoinedStr):
            return _Known(instance_of=object)
        if isinstance(node, ast.Await):
            return self.infer(node.value)
        if isinstance(node, ast.Attribute):
            base = self.infer(node.value)
            if base is None:
                return None
            if isinstance(base.value, types.ModuleType):
                return _known(vars(base.value).get(node.attr))
            if base.instance_of is None and node.attr == "delay":
                return _known(_attribute(base.value, "delay"))
            cls = _class_of(base)
            member = inspect.getattr_static(cls, node.attr, None)
            return _Known(member, owner=cls) if inspect.isroutine(member) else None
        if isinstance(node, ast.Call):
            called = self.infer(node.func)
            if called is None or called.value is None:
                return None
            if isinstance(called.value, type):
                return _Known(instance_of=called.value)
            own = inspect.isroutine(called.value) and not _is_installed(called.value)
            return _instance(_hints(called.value).get("return")) or (
                _Known(instance_of=_Unclear) if own else None
            )
        return None


def _known(value: Any) -> _Known | None:
    return None if value is None else _Known(value)


def _hints(function: Any) -> dict[str, Any]:
    *_, innermost = _layers(function)
    try:
        return get_type_hints(innermost)
    except Exception:  # whatever the names of a host's annotations lead to
        return {}


def _instance(hint: Any) -> _Known | None:
    if get_origin(hint) is not None and get_args(hint):  # an iterator behind @contextmanager
        hint = get_args(hint)[0]
    return _Known(instance_of=hint) if isinstance(hint, type) else None


def _class_of(known: _Known | None) -> type:
    if known is None:
        return object
    if known.instance_of is not None:
        return known.instance_of
    return known.value if isinstance(known.value, type) else type(known.value)


def _is_queue(known: _Known | None) -> bool:
    return issubclass(_class_of(known), rq.Queue)


def _is_rq_delay(known: _Known | None) -> bool:
    """Say whether it is what RQ's ``@job`` puts on a function."""
    code = getattr(None if known is None else known.value, "__code__", None)
    return code is not None and code.co_filename == rq.decorators.__file__


def _is_call_of(node: ast.expr, attribute: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute


def _dotted(function: Any) -> str:
    *_, innermost = _layers(function)
    return f"{innermost.__module__}.{innermost.__qualname__}"
