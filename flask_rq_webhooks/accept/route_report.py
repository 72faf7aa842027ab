"""Find out which routes of an app enqueue RQ jobs, and whether these jobs can have a webhook.

What a test suite has observed (:func:`flask_rq_webhooks.testing.observe_routes`) is the truth. In addition,
the source of a view and of the functions it calls is read, one level deep; nothing is run. The report says
what one of the two establishes with certainty, and "cannot tell" otherwise.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import rq
import rq.decorators
from flask import Flask
from flask.views import MethodView

from ..queue.job_callbacks import Queue, is_instrumented
from .decorator import accepts_webhooks

#: Methods of a queue that enqueue; the last two take a job that may have been created elsewhere.
ENQUEUING = frozenset({"enqueue", "enqueue_at", "enqueue_call", "enqueue_in", "enqueue_many"})
BY_HAND = frozenset({"enqueue_job", "schedule_job"})
#: Our own methods, which need no attached queue.
HELPERS = frozenset({"enqueue_with_webhook", "watch"})

_PACKAGE = __name__.partition(".")[0]
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_NOT_READ = (OSError, TypeError, SyntaxError, ValueError)  # no source, or a lambda within something else


@dataclass(frozen=True, slots=True)
class Place:
    """One place in the source that enqueues a job, or may enqueue one.

    :param call: the call as the source has it, such as ``q.enqueue_call``.
    :param through: the function through which the view reaches this place; empty for the view itself.
    :param certain: whether it certainly enqueues, and it is known whether the job gets a webhook.
    :param covered: whether ``accepts_webhook`` or one of our helpers comes before it.
    :param plain: whether the queue is an ``rq.Queue``, not ours; it carries a webhook only if instrumented.
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
    """One URL rule of an app, with those of its HTTP methods that share the same code.

    :param view: Flask's endpoint name.
    :param decorated: whether the view itself accepts webhooks.
    :param complete: whether every one of the app's own functions that it calls was read.
    :param observed: the jobs that tests saw, as saved by ``observe_routes``; ``None`` if no test called it.
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
        """Return ``"decorator"`` or ``"helper"`` if jobs carry webhooks, or else what is wrong.

        ``"missing"``: it enqueues jobs that cannot have a webhook. ``"unattached"``: it is decorated, but
        its queue carries no webhook. ``"unknown"``: neither tests nor source tell. ``"none"``: nothing that
        enqueues was found.
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
    """Return every route of *app* except ours and static files, in the order of its URL rules."""
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
    """Yield (HTTP methods, function, its class) of one view."""
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
    """Yield *function* and what it wraps through ``functools.wraps``, partials and bound methods."""
    while function is not None:
        yield function
        names = ("__wrapped__", "func", "__func__")
        function = next((inner for name in names if (inner := _attribute(function, name)) is not None), None)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute of *value*; for a ``LocalProxy``, ``None``, as it might need a request."""
    return None if type(value).__name__ == "LocalProxy" else getattr(value, name, None)


# -- reading ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reading:
    """What was found in the source of one view."""

    own_package: str
    places: list[Place] = field(default_factory=list)
    complete: bool = True
    decorated: bool = False
    _seen: set[Any] = field(default_factory=set)

    def read(self, function: Any, owner: type | None, *, covered: bool, through: str = "") -> None:
        """Add what is found in *function*; *through* names it if it is not the view itself."""
        if any(map(accepts_webhooks, _layers(function))):
            covered = True
            self.decorated = self.decorated or not through
        innermost = _innermost(function)
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
        code = innermost.__code__
        for node in _inside(definition):
            if isinstance(node, ast.Call):
                line = code.co_firstlineno + node.lineno - 1
                place = Place(ast.unparse(node.func), code.co_filename, line, through, covered=covered)
                found = _enqueuing(node, names, place)
                if found is not None:
                    self.places.append(found)
                else:
                    self._follow(node, names, place)

    def _follow(self, node: ast.Call, names: _Names, place: Place) -> None:
        """Read the function that is called, or note that it cannot be read."""
        target = names.infer(node.func)
        owner = _class_of(names.infer(node.func.value)) if isinstance(node.func, ast.Attribute) else None
        if target is None or isinstance(target, _Some):
            # An unknown name, or a method of something that the host's own code returned.
            if isinstance(node.func, ast.Name) or owner is _Unclear:
                self.complete = False
            return
        if isinstance(target, type):
            target, owner = inspect.getattr_static(target, "__init__", None), target
        if not any(map(self._is_own, _layers(target))):
            return
        passes_on = any(isinstance(arg, ast.Starred) for arg in node.args) and any(
            keyword.arg is None for keyword in node.keywords
        )
        if not place.through:  # a function that passes on all arguments is a decorator: same level
            name = _innermost(target)
            through = "" if passes_on else f"{name.__module__}.{name.__qualname__}"
            self.read(target, owner, covered=place.covered, through=through)
        elif target not in self._seen:
            self.complete = False

    def _is_own(self, function: Any) -> bool:
        """Return whether *function* is the host's: not from an installed package, nor from this one."""
        if not isinstance(getattr(function, "__code__", None), types.CodeType):
            return False
        package = str(getattr(function, "__module__", "")).partition(".")[0]
        return package == self.own_package or not (package == _PACKAGE or _is_installed(function))


def _enqueuing(node: ast.Call, names: _Names, place: Place) -> Place | None:
    """Return *place* completed with what a method call shows; ``None`` if the call enqueues nothing."""
    if not isinstance(node.func, ast.Attribute):
        return None
    method, base = node.func.attr, names.infer(node.func.value)
    cls, unclear = _class_of(base), base is None or _class_of(base) is _Unclear
    is_queue = issubclass(cls, rq.Queue)
    if method in HELPERS and cls.__module__ == f"{_PACKAGE}.extension":
        return replace(place, covered=True, helper=True)
    if method in ENQUEUING | BY_HAND and (is_queue or unclear):
        # A job created elsewhere carries no webhook, even if the view is decorated.
        made = method in BY_HAND and not (node.args and _creates_job(node.args[0]))
        plain = is_queue and not issubclass(cls, Queue)
        return replace(place, certain=is_queue and not (made and place.covered), plain=plain)
    # The method that RQ's @job adds to a function.
    code = getattr(names.infer(node.func), "__code__", None)
    is_delay = code is not None and code.co_filename == rq.decorators.__file__
    if method == "delay" and (unclear or is_delay):
        return replace(place, certain=not unclear, plain=True)
    return None


def _creates_job(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "create_job"
    )


def _innermost(function: Any) -> Any:
    *_, innermost = _layers(function)
    return innermost


def _is_installed(function: Any) -> bool:
    file = str(getattr(getattr(_innermost(function), "__code__", None), "co_filename", _INSTALLED[0]))
    return file.startswith(_INSTALLED) or "site-packages" in Path(file).parts


def _definition(function: Any) -> _Definition | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except _NOT_READ:
        return None
    if isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return tree.body[0]
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    return lambdas[0] if len(lambdas) == 1 else None


def _inside(definition: _Definition) -> list[ast.AST]:
    """Return the nodes that a call executes, without those of decorators and defaults."""
    body: list[Any] = definition.body if isinstance(definition.body, list) else [definition.body]
    return [node for part in body for node in ast.walk(part)]


# -- names --------------------------------------------------------------------------------------------------


class _Unclear:
    """Stands for the unknown class of what a host's own function returns without a return annotation."""


@dataclass(frozen=True, slots=True)
class _Some:
    """Some instance of a class, if the source does not name the object itself."""

    cls: type


class _Names:
    """The names one function can see, mapped to objects, to :class:`_Some`, or to ``None`` if unknown."""

    def __init__(self, function: types.FunctionType, owner: type | None, node: _Definition) -> None:
        self._names: dict[str, Any] = {**vars(builtins), **function.__globals__}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not filled yet
                self._names[name] = cell.cell_contents
        hints = _hints(function)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._names.update((argument.arg, _instance(hints.get(argument.arg))) for argument in arguments)
        if owner is not None and arguments:
            self._names[arguments[0].arg] = _Some(owner)
        for inner in _inside(node):
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                self._names[inner.targets[0].id] = self.infer(inner.value)
            elif isinstance(inner, ast.withitem) and isinstance(inner.optional_vars, ast.Name):
                self._names[inner.optional_vars.id] = self.infer(inner.context_expr)
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                self._names[inner.name] = _Some(object)  # its body is read in place
            elif isinstance(inner, ast.ImportFrom):
                package = str(function.__globals__.get("__package__") or "")
                name = importlib.util.resolve_name("." * inner.level + (inner.module or ""), package)
                found = vars(sys.modules[name]) if name in sys.modules else {}
                for imported in inner.names:
                    self._names[imported.asname or imported.name] = found.get(imported.name)

    def infer(self, node: ast.expr) -> Any:
        """Return the value of an expression, as far as it can be known without running it."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Await):
            return self.infer(node.value)
        if isinstance(node, ast.Attribute):
            base = self.infer(node.value)
            if base is None:
                return None
            if isinstance(base, types.ModuleType):
                return vars(base).get(node.attr)
            if node.attr == "delay" and not isinstance(base, _Some):
                return _attribute(base, "delay")
            member = inspect.getattr_static(_class_of(base), node.attr, None)
            return member if inspect.isroutine(member) else None
        if isinstance(node, ast.Call):
            called = self.infer(node.func)
            if isinstance(called, type):
                return _Some(called)
            if called is None or isinstance(called, _Some):
                return None
            own = inspect.isroutine(called) and not _is_installed(called)
            return _instance(_hints(called).get("return")) or (_Some(_Unclear) if own else None)
        literal = ast.Constant | ast.Dict | ast.List | ast.Set | ast.Tuple | ast.JoinedStr
        return _Some(object) if isinstance(node, literal) else None


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(_innermost(function))
    except Exception:  # a host's annotations may raise anything
        return {}


def _instance(hint: Any) -> _Some | None:
    if get_origin(hint) is not None and get_args(hint):  # an iterator behind @contextmanager
        hint = get_args(hint)[0]
    return _Some(hint) if isinstance(hint, type) else None


def _class_of(known: Any) -> type:
    if known is None:
        return object
    if isinstance(known, _Some):
        return known.cls
    return known if isinstance(known, type) else type(known)
