"""Which routes of an app enqueue RQ jobs, read from the source of their views.

Owns the reading: from a rule to its functions, from a function to what it calls, from a call to "this
enqueues". Nothing is run. Knows nothing of requests, of webhooks that were asked for, and of how the
answer is shown (:mod:`flask_rq_webhooks.cli.route_commands`).

What it cannot see, and therefore does not claim: methods of objects whose class is not plain from the
source, names that are made at run time, and packages that are not the host's own.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import logging
import sys
import sysconfig
import tokenize
import types
from collections.abc import Generator, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import rq
import rq.decorators
from flask import Flask
from flask.views import MethodView

from ..queue.job_callbacks import Queue, is_instrumented
from .decorator import accepts_webhooks

logger = logging.getLogger(__name__)

#: Methods of a queue that enqueue.
ENQUEUING = frozenset(
    {
        "enqueue",
        "enqueue_at",
        "enqueue_call",
        "enqueue_in",
        "enqueue_job",
        "enqueue_many",
        "schedule_job",
    }
)
#: Our own helper, which needs no decorator.
HELPER = "enqueue_with_webhook"

_PACKAGE = str(Path(__file__).resolve().parents[1])
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_SITE = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True)
class Place:
    """One place where a job is enqueued, or may be.

    :param call: what the source says, such as ``q.enqueue_call``.
    :param through: dotted names of the functions between the view and the place.
    :param certain: whether it is an RQ queue for sure, and is reached by calls only.
    :param covered: whether ``accepts_webhook`` or our helper stands before it.
    :param plain: whether it is an ``rq.Queue`` and not ours, which carries a webhook only if instrumented.
    """

    call: str
    file: str
    line: int
    through: tuple[str, ...] = ()
    certain: bool = True
    covered: bool = False
    helper: bool = False
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One rule of an app, with those of its HTTP methods that share the same code.

    :param view: Flask's endpoint name.
    :param decorated: whether the view itself accepts webhooks.
    :param readable: whether there was any source to read.
    :param instrumented: whether plain RQ queues carry webhooks.
    """

    rule: str
    methods: tuple[str, ...]
    view: str
    decorated: bool
    readable: bool
    places: tuple[Place, ...] = ()
    instrumented: bool = True

    @property
    def missing(self) -> Place | None:
        """Return the plainest place that enqueues without a webhook, ``None`` where there is none."""
        bare = (
            place
            for place in self.places
            if not place.covered or (place.plain and not place.helper and not self.instrumented)
        )
        return min(
            bare, key=lambda place: (place.covered, not place.certain, len(place.through)), default=None
        )

    @property
    def webhook(self) -> str:
        """Return ``"decorator"``, ``"helper"``, or what is wrong: ``"missing"``, ``"unattached"``.

        The last is a decorated view with a plain queue. ``"none"`` where nothing is enqueued.
        """
        if self.missing is not None:
            return "unattached" if self.missing.covered else "missing"
        if self.decorated or any(place.covered and not place.helper for place in self.places):
            return "decorator"
        return "helper" if self.places else "none"


#: Packages that are the host's although they may be installed: the one the app itself is in.
_own_packages: ContextVar[frozenset[str]] = ContextVar("rq_webhooks_own_packages", default=frozenset())


def survey(app: Flask) -> list[Route]:
    """Return every route of *app* but ours and static files, in the order of its rules.

    Modules that views import when they run are imported.
    """
    token = _own_packages.set(frozenset({app.import_name.partition(".")[0]}))
    try:
        return _survey(app)
    finally:
        _own_packages.reset(token)


def _survey(app: Flask) -> list[Route]:
    reader = _Reader()
    ours = f"{_PACKAGE}/"
    routes = []
    for rule in app.url_map.iter_rules():
        view = app.view_functions.get(rule.endpoint)
        if view is None or rule.endpoint == "static" or rule.endpoint.endswith(".static"):
            continue
        if any(_file(function).startswith(ours) for function in _innermost(view)):
            continue
        shown = sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
        for methods, functions in _entries(view, shown):
            places: dict[Place, None] = {}
            readable = False
            decorated = any(_is_decorated(function) for function, _ in functions)
            for function, owner in functions:
                for place in reader.places(function, owner=owner, covered=decorated):
                    places[place] = None
                readable = readable or any(reader.readable(layer) for layer in _layers(function))
            routes.append(
                Route(
                    str(rule), tuple(methods), rule.endpoint, decorated, readable, tuple(places),
                    instrumented=is_instrumented(),
                )
            )  # fmt: skip
    return routes


# -- from a rule to functions -------------------------------------------------------------------------------


def _entries(view: Any, methods: list[str]) -> Iterator[tuple[list[str], list[tuple[Any, type | None]]]]:
    """Give (HTTP methods, [(function, its class)]) of one view."""
    cls = next(
        (c for layer in _layers(view) if (c := getattr(layer, "__dict__", {}).get("view_class"))), None
    )
    if cls is None:
        yield methods, [(view, None)]
    elif issubclass(cls, MethodView):
        for method in methods:
            function = _static(cls, method.lower())
            if function is not None:
                yield [method], [(view, None), (function, cls)]
    else:
        yield methods, [(view, None), (_static(cls, "dispatch_request"), cls)]


def _layers(function: Any) -> Iterator[Any]:
    """Give *function* and what it wraps: by ``functools.wraps``, partials, bound methods, or a closure.

    The closure counts for wrappers of installed packages only; what host code does with its own is read.
    """
    waiting, seen = [function], set()
    while waiting:
        layer = waiting.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        kind = type(layer)
        if issubclass(kind, functools.partial | functools.partialmethod):
            waiting.append(layer.func)
            continue
        if issubclass(kind, types.MethodType | classmethod | staticmethod):
            waiting.append(layer.__func__)
            continue
        if not issubclass(kind, types.FunctionType):
            call = _static(kind, "__call__")
            if type(call) is types.FunctionType and _is_followed(call):
                waiting.append(call)
            continue
        yield layer
        wrapped = layer.__dict__.get("__wrapped__")
        if wrapped is not None:
            waiting.append(wrapped)
        elif not _is_followed(layer):
            waiting.extend(value for value in _closure(layer).values() if _is_function(value))


def _innermost(view: Any) -> list[Any]:
    return [layer for layer in _layers(view) if "__wrapped__" not in layer.__dict__]


def _is_decorated(function: Any) -> bool:
    return any(accepts_webhooks(layer) for layer in _layers(function))


# -- from a function to places ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    """An object the source names."""

    value: Any
    owner: type | None = None


@dataclass(frozen=True, slots=True)
class _Instance:
    """Some instance of a class."""

    cls: type


_Inferred = _Known | _Instance | None


@dataclass(slots=True)
class _Body:
    """What one function does: places of its own, and the functions it calls or mentions."""

    places: list[Place] = field(default_factory=list)
    callees: list[tuple[Any, type | None, bool]] = field(default_factory=list)


class _Reader:
    """Reads every file and every function once."""

    def __init__(self) -> None:
        self._functions: dict[str, dict[tuple[str, int], list[_Function]]] = {}
        # By function, not by its code: what it calls may be in its closure.
        self._bodies: dict[tuple[types.FunctionType, type | None], _Body] = {}

    def readable(self, function: Any) -> bool:
        """Say whether there is source of *function*."""
        return bool(self._nodes(function))

    def places(
        self, function: Any, *, owner: type | None, covered: bool, through: tuple[str, ...] = (),
        certain: bool = True, seen: set[Any] | None = None,
    ) -> Iterator[Place]:  # fmt: skip
        """Give every place that *function* reaches.

        :param covered: whether the way until here accepts webhooks.
        :param through: functions on the way until here, without the view itself.
        """
        seen = set() if seen is None else seen
        layers = list(_layers(function))
        for layer in layers:
            covered = covered or accepts_webhooks(layer)
            if not _is_followed(layer) or (layer, covered, certain) in seen:
                continue
            seen.add((layer, covered, certain))
            body = self._body(layer, owner)
            for place in body.places:
                yield Place(
                    place.call, place.file, place.line, through,
                    certain=place.certain and certain, covered=place.covered or covered, helper=place.helper,
                    plain=place.plain,
                )  # fmt: skip
            for callee, callee_owner, called in body.callees:
                if any(callee is inner for inner in layers):
                    continue  # a decorator's wrapper calls what it wraps: its turn comes
                yield from self.places(
                    callee,
                    owner=callee_owner,
                    covered=covered,
                    through=(*through, _dotted(callee)),
                    certain=certain and called,
                    seen=seen,
                )

    def _body(self, function: types.FunctionType, owner: type | None) -> _Body:
        key = function, owner
        if key not in self._bodies:
            self._bodies[key] = body = _Body()
            for node in self._nodes(function):
                _Scope(function, owner, node).read_into(body)
        return self._bodies[key]

    def _nodes(self, function: Any) -> list[_Function]:
        code = function.__code__
        if code.co_filename not in self._functions:
            self._functions[code.co_filename] = _parse(code.co_filename)
        return self._functions[code.co_filename].get((code.co_name, code.co_firstlineno), [])


_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def _parse(file: str) -> dict[tuple[str, int], list[_Function]]:
    """Return the functions of a file by name and first line, as code objects give them."""
    try:
        with tokenize.open(file) as source:
            tree = ast.parse(source.read())
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[tuple[str, int], list[_Function]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.setdefault((node.name, first), []).append(node)
        elif isinstance(node, ast.Lambda):
            # Two lambdas on one line cannot be told apart: both are read.
            found.setdefault(("<lambda>", node.lineno), []).append(node)
    return found


class _Scope:
    """The names one function can see, as far as its source says what they are."""

    def __init__(self, function: types.FunctionType, owner: type | None, node: _Function) -> None:
        self._function = function
        self._node = node
        self._names: dict[str, _Inferred] = {}
        self._mentioned: set[int] = set()
        arguments = [*node.args.posonlyargs, *node.args.args]
        self._locals = {argument.arg for argument in [*arguments, *node.args.kwonlyargs]}
        if owner is not None and arguments:
            self._names[arguments[0].arg] = _Instance(owner)
        for argument in arguments:
            if argument.annotation is not None and isinstance(
                known := self._infer_annotation(argument.annotation), _Known
            ):
                self._names[argument.arg] = _instance_of(known.value)

    def read_into(self, body: _Body) -> None:
        """Add what the function does to *body*; functions inside it belong to it."""
        nodes = [inner for statement in self._statements() for inner in ast.walk(statement)]
        for _ in range(2):  # a name may be made of one that is bound further down the tree
            for inner in nodes:
                self._learn(inner)
        called = {id(inner.func) for inner in nodes if isinstance(inner, ast.Call)}
        for inner in nodes:
            if isinstance(inner, ast.Call) and _name_of(inner.func) in ENQUEUING | {HELPER}:
                # What is handed to a queue runs in a worker, where no request is.
                arguments = [*inner.args, *(keyword.value for keyword in inner.keywords)]
                self._mentioned.update(id(argument) for argument in arguments)
        for inner in nodes:
            if isinstance(inner, ast.Attribute | ast.Name) and id(inner) not in self._mentioned:
                self._read(inner, body, called=id(inner) in called)

    def _statements(self) -> list[ast.AST]:
        # Decorators and defaults are not run by a request.
        return [self._node.body] if isinstance(self._node, ast.Lambda) else list(self._node.body)

    def _read(self, node: ast.Attribute | ast.Name, body: _Body, *, called: bool) -> None:
        file, line = self._function.__code__.co_filename, node.lineno
        if isinstance(node, ast.Attribute):
            base = self.infer(node.value)
            text = _shortened(node)
            if node.attr == HELPER:
                body.places.append(Place(text, file, line, certain=called, covered=True, helper=True))
                return
            if _is_rq_delay(base, node.attr):
                body.places.append(Place(text, file, line, certain=called, plain=True))
                return
            if node.attr in ENQUEUING and (base is None or _is_queue(base) or not self._followed(node)):
                body.places.append(
                    Place(text, file, line, certain=called and _is_queue(base), plain=_is_plain_queue(base))
                )
                return
        inferred = self.infer(node)
        if isinstance(inferred, _Known):
            function = inferred.value
            if called and _is_class(function):
                inferred = _Known(_static(function, "__init__"), function)
            if _is_bound_enqueue(function):
                body.places.append(Place(ast.unparse(node), file, line, certain=called))
            elif _is_function(inferred.value) and any(map(_is_followed, _layers(inferred.value))):
                body.callees.append((inferred.value, inferred.owner, called))

    def _followed(self, node: ast.Attribute) -> bool:
        inferred = self.infer(node)
        return isinstance(inferred, _Known) and any(map(_is_followed, _layers(inferred.value)))

    # -- what names are ---------------------------------------------------------------------------------

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._bind(node.targets[0], node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            self._bind(node.target, node.value)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._bind(node.optional_vars, node.context_expr)
        elif isinstance(node, ast.Import):
            for name in node.names:
                module = _module(name.name)
                if name.asname is None:
                    self._names[name.name.partition(".")[0]] = _known(_module(name.name.partition(".")[0]))
                else:
                    self._names[name.asname] = _known(module)
        elif isinstance(node, ast.ImportFrom):
            package = self._function.__globals__.get("__package__") or ""
            origin = _module("." * node.level + (node.module or ""), package)
            for name in node.names:
                self._names[name.asname or name.name] = _known(_attribute_of_module(origin, name.name))

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = self.infer(value)

    def infer(self, node: ast.expr) -> _Inferred:
        """Return what an expression is, as far as that can be told without running it."""
        if isinstance(node, ast.Name):
            return self._lookup(node.id)
        if isinstance(node, ast.Attribute):
            base = self.infer(node.value)
            if isinstance(base, _Instance):
                return _member(base.cls, node.attr)
            if isinstance(base, _Known):
                if type(base.value) is types.ModuleType:
                    return _known(_attribute_of_module(base.value, node.attr))
                if _is_class(base.value):
                    return _member(base.value, node.attr)
                return _member(type(base.value), node.attr)
        if isinstance(node, ast.Call):
            return self._returned(node)
        if isinstance(node, ast.Await):
            return self.infer(node.value)
        return None

    def _infer_annotation(self, node: ast.expr) -> _Inferred:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._lookup(node.value)
        return self.infer(node)

    def _lookup(self, name: str) -> _Inferred:
        if name in self._names:
            return self._names[name]
        if name in self._locals:
            return None
        closure = _closure(self._function)
        if name in closure:
            return _known(closure[name])
        return _known(self._function.__globals__.get(name))

    def _returned(self, node: ast.Call) -> _Inferred:
        called = self.infer(node.func)
        if not isinstance(called, _Known):
            return None
        if called.value is functools.partial and node.args:
            return self.infer(node.args[0])
        if _is_class(called.value):
            return _Instance(called.value)
        for layer in _layers(called.value) if _is_function(called.value) else ():
            try:
                hint = get_type_hints(layer).get("return")
            except (NameError, TypeError, AttributeError, SyntaxError, ValueError, ImportError):
                continue
            if get_origin(hint) in (Iterator, Generator, Iterable):  # behind @contextmanager
                hint = get_args(hint)[0]
            return _instance_of(hint)
        return None


def _known(value: Any) -> _Known | None:
    return None if value is None else _Known(value)


def _instance_of(value: Any) -> _Instance | None:
    return _Instance(value) if _is_class(value) else None


def _member(cls: type, name: str) -> _Known | None:
    """Return a function of a class; its other members are not known before it runs."""
    member = _static(cls, name)
    return _Known(member, cls) if _is_function(member) else None


def _module(name: str, package: str | None = None) -> types.ModuleType | None:
    """Return a module that a function imports, as the function itself would."""
    try:
        return importlib.import_module(name, package)
    except Exception as exc:  # whatever the host's own modules raise
        logger.warning("%s, which a view imports, cannot be imported here: %r", name, exc)
        return None


def _attribute_of_module(module: types.ModuleType | None, name: str) -> Any:
    if module is None:
        return None
    try:
        return getattr(module, name)
    except (AttributeError, ImportError):
        return sys.modules.get(f"{module.__name__}.{name}")


# -- what objects are; never by isinstance, which asks a LocalProxy for a request ------------------------


def _static(cls: type, name: str) -> Any:
    return inspect.getattr_static(cls, name, None)


def _is_class(value: Any) -> bool:
    return issubclass(type(value), type)


def _is_function(value: Any) -> bool:
    return issubclass(
        type(value),
        types.FunctionType | types.MethodType | functools.partial | classmethod | staticmethod,
    )


def _is_queue(inferred: _Inferred) -> bool:
    if isinstance(inferred, _Instance):
        return issubclass(inferred.cls, rq.Queue)
    return isinstance(inferred, _Known) and issubclass(type(inferred.value), rq.Queue)


def _is_plain_queue(inferred: _Inferred) -> bool:
    if inferred is None or not _is_queue(inferred):
        return False
    cls = inferred.cls if isinstance(inferred, _Instance) else type(inferred.value)
    return not issubclass(cls, Queue)


def _is_rq_delay(base: _Inferred, name: str) -> bool:
    """Say whether ``base.name`` is what RQ's ``@job`` puts on a function."""
    if name != "delay" or not isinstance(base, _Known) or type(base.value) is not types.FunctionType:
        return False
    delay = base.value.__dict__.get("delay")
    return type(delay) is types.FunctionType and delay.__code__.co_filename == rq.decorators.__file__


def _is_bound_enqueue(value: Any) -> bool:
    """Say whether *value* is a queue's own method, kept somewhere: ``enqueue = queue.enqueue``."""
    while issubclass(type(value), functools.partial):
        value = value.func
    return (
        type(value) is types.MethodType
        and issubclass(type(value.__self__), rq.Queue)
        and value.__name__ in ENQUEUING
    )


def _is_followed(function: Any) -> bool:
    """Say whether *function* is the host's: neither of an installed package nor of this one."""
    file = _file(function)
    if not file or file.startswith((f"{_PACKAGE}/", "<")):
        return False
    if str(getattr(function, "__module__", "")).partition(".")[0] in _own_packages.get():
        return True
    return not _SITE.intersection(Path(file).parts) and not file.startswith(_INSTALLED)


def _file(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return code.co_filename if type(code) is types.CodeType else ""


def _closure(function: Any) -> dict[str, Any]:
    values = {}
    cells = getattr(function, "__closure__", None) or ()
    for name, cell in zip(function.__code__.co_freevars if cells else (), cells, strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return values


def _shortened(node: ast.Attribute) -> str:
    """Return the source of *node*, without arguments on the way."""
    if isinstance(node.value, ast.Call):
        return f"{ast.unparse(node.value.func)}(...).{node.attr}"
    return ast.unparse(node)


def _name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ""


def _dotted(function: Any) -> str:
    for layer in _layers(function):
        return f"{layer.__module__}.{layer.__qualname__}"
    return repr(function)
