"""``accepts_webhook``: the decorator for a view whose clients may ask for a webhook.

This module owns the order of the steps in one request (read, register, view, confirm) and the responses when
it cannot continue. It does not know how fields are found (:mod:`.request_fields`), checked
(:mod:`.request_schema`) and stored (:mod:`.register`).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from flask import Response, current_app, g, has_app_context, has_request_context, request

from ..errors import ConfigurationError, InvalidWebhookError, RQWebhooksError, StorageUnavailableError
from ..protocol.events import JOB_TYPES, run_of
from ..queue.job_callbacks import Attachment, current_attachment, make_token, name_of, was_handed_over
from ..state import EXTENSION_NAME, State, get_state
from .register import DestinationBusyError, confirm_later, load, promise, register, same_database, subscribe
from .request_fields import Asked, asked_in_request
from .tenants import subscriber_in_request

logger = logging.getLogger(__name__)

View = TypeVar("View", bound=Callable[..., Any])
Jobs = Sequence[str | Callable[..., Any]] | Callable[[str], bool]

#: Where an app context keeps its jobs that are reported to standing endpoints only, and how many it keeps.
_CREATED, MAX_CREATED = "_rq_webhooks_created", 100
#: Seconds after which a client may try again.
RETRY_UNAVAILABLE_S, RETRY_BUSY_S = 5, 60

#: Packages whose decorators parse the body. Above ours they would see our fields, and most refuse unknown
#: fields; so if one is there, the fields are taken out before the view is called.
PARSERS = frozenset({"apiflask", "flask_openapi3", "flask_pydantic", "flask_smorest", "webargs"})

_MARK = "_rq_webhooks_accepts"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    events: tuple[str, ...] | None
    scope: str
    runid: str | None
    chosen: Callable[[str], bool] | None
    body: bool
    hide: str


def accepts_webhook(
    view: View,
    *,
    events: Sequence[str] | None = None,
    scope: str = "job",
    runid: str | None = "runid",
    jobs: Jobs | None = None,
    fields: str = "all",
    hide: str = "all",
) -> View:
    """Let the clients of *view* ask for a webhook for the jobs it enqueues.

    The view may be sync or async, a function or a method of a ``MethodView``. Called within another decorated
    view, it acts as an ordinary function: its jobs belong to the webhook of the outer view. The parameters
    are those of :meth:`~flask_rq_webhooks.RQWebhooks.accepts_webhook`.

    :raises ConfigurationError: for an unknown value of an option.
    """
    options = _Options(
        events=_checked_events(events),
        scope=_checked("scope", scope, ("job", "tree")),
        runid=runid,
        chosen=_chooser(jobs),
        body=_checked("fields", fields, ("all", "headers")) == "all",
        hide=_checked("hide", hide, ("all", "parsed")),
    )
    wrapper: Any
    if inspect.iscoroutinefunction(view):

        @functools.wraps(view)
        async def async_wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = _begin(options, kwargs)
            if begun is None:
                return await view(*args, **kwargs)
            if isinstance(begun, Response):
                return begun
            with begun:
                return await view(*args, **kwargs)

        wrapper = async_wrapper
    else:

        @functools.wraps(view)
        def sync_wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = _begin(options, kwargs)
            if begun is None:
                return view(*args, **kwargs)
            if isinstance(begun, Response):
                return begun
            with begun:
                return view(*args, **kwargs)

        wrapper = sync_wrapper
    setattr(wrapper, _MARK, options)
    return cast(View, wrapper)


def accepts_webhooks(function: Callable[..., Any]) -> bool:
    """Return whether *function* is decorated; decorators above that use ``functools.wraps`` keep the mark."""
    return _MARK in getattr(function, "__dict__", {})


def answer_invalid(exc: InvalidWebhookError) -> Response:
    """Return the 400 for webhook fields that are not acceptable; 429 if they may be acceptable later."""
    if isinstance(exc, DestinationBusyError):
        response = _error("too_many_waiting", str(exc), exc.details, 429)
        response.headers["Retry-After"] = str(RETRY_BUSY_S)
        return response
    return _error("invalid_webhook", str(exc), exc.details, 400)


def answer_unavailable(exc: StorageUnavailableError) -> Response:
    """Return the 503 for a webhook that cannot be registered now."""
    logger.error("A webhook could not be registered, its request was refused: %s", exc)
    response = _error(
        "webhooks_unavailable", "Webhooks cannot be registered now; nothing was enqueued.", {}, 503
    )
    response.headers["Retry-After"] = str(RETRY_UNAVAILABLE_S)
    return response


def _error(code: str, message: str, details: dict[str, list[str]], status: int) -> Response:
    render = get_state().hooks.error_envelope_function
    if render is None:
        body: Any = {"error": {"code": code, "message": message, "details": details}}
    else:
        body = render(code, message, details, status)
    response = current_app.make_response(body)
    response.status_code = status
    return response


def _begin(
    options: _Options, view_arguments: dict[str, Any]
) -> AbstractContextManager[None] | Response | None:
    """Read the request's webhook fields and register its webhook.

    :returns: the context manager in which to run the view; ``None`` if it is to run as if undecorated; a
        response if it is not to run at all.
    """
    if current_attachment.get() is not None:
        return None
    asked = asked_in_request()
    if asked is None:
        return None
    asked.decorated = True
    try:
        fields = asked.fields(body=options.body, hide=options.hide)
        state = get_state()
        if fields is None:
            return _begin_subscribed(state, asked, options, view_arguments)
        wanted = load(state, fields)
        if wanted is None:
            return None
        asked.attachment = register(
            state,
            wanted,
            events=options.events,
            scope=options.scope,
            runid=_runid(options, view_arguments),
            ignores_argument=options.runid is None,
            chosen=options.chosen,
        )
    except InvalidWebhookError as exc:
        return answer_invalid(exc)
    except StorageUnavailableError as exc:
        return answer_unavailable(exc)
    return promise(state, asked.attachment, asked)


def _begin_subscribed(
    state: State, asked: Asked, options: _Options, view_arguments: Mapping[str, Any]
) -> AbstractContextManager[None] | None:
    """Register the webhook of a request without a URL, if its caller has subscribed once for all requests."""
    subscriber = subscriber_in_request(state)
    if subscriber is None:
        return None
    tenant, wanted = subscriber
    asked.attachment = subscribe(
        state, tenant, events=wanted, scope=options.scope, runid=_runid(options, view_arguments),
        ignores_argument=options.runid is None, chosen=options.chosen,
    )  # fmt: skip
    return None if asked.attachment is None else promise(state, asked.attachment, asked)


def _runid(options: _Options, view_arguments: Mapping[str, Any]) -> Any:
    return {**(request.view_args or {}), **view_arguments}.get(options.runid or "")


# -- parsers above ------------------------------------------------------------------------------------------


def take_fields_before_parsers() -> None:
    """Take the webhook fields out of a request whose view has a parser above ``accepts_webhook``.

    Called before every request of the app; for most requests, it does only two look-ups.
    """
    view = current_app.view_functions.get(request.endpoint or "")
    options = None if view is None else _options_below_parser(view, request.method)
    if options is not None:
        asked = asked_in_request()
        assert asked is not None  # noqa: S101  (in a request)
        with suppress(InvalidWebhookError):  # raised again in the view's wrapper, which answers it
            asked.fields(body=options.body, hide=options.hide)


@functools.lru_cache(maxsize=4096)
def _options_below_parser(view: Callable[..., Any], method: str) -> _Options | None:
    parsed = False
    for layer in _layers(view, method):
        names = getattr(layer, "__globals__", {})
        if names is globals():
            return cast(_Options, getattr(layer, _MARK)) if parsed else None
        parsed = parsed or str(names.get("__name__")).partition(".")[0] in PARSERS
    return None


def _layers(view: Any, method: str) -> Iterator[Any]:
    """Yield a view and what it wraps; for a view class, also the method behind it."""
    cls = getattr(view, "view_class", None)
    for function in (view, getattr(cls, method.lower(), None)):
        while function is not None:
            yield function
            function = getattr(function, "__wrapped__", None)


# -- options ------------------------------------------------------------------------------------------------


def _checked_events(events: Sequence[str] | None) -> tuple[str, ...] | None:
    if events is None:
        return None
    if isinstance(events, str) or not events or not JOB_TYPES.issuperset(events):
        raise ConfigurationError(
            f"accepts_webhook(events={events!r}): expected a list of some of {', '.join(sorted(JOB_TYPES))}."
        )
    return tuple(dict.fromkeys(events))


def _checked(option: str, value: str, known: tuple[str, str]) -> str:
    if value not in known:
        raise ConfigurationError(
            f"accepts_webhook({option}={value!r}): expected {known[0]!r} or {known[1]!r}."
        )
    return value


def _chooser(jobs: Jobs | None) -> Callable[[str], bool] | None:
    if jobs is None or callable(jobs):
        return jobs
    if isinstance(jobs, str) or not jobs or not all(isinstance(job, str) or callable(job) for job in jobs):
        raise ConfigurationError(
            f"accepts_webhook(jobs={jobs!r}): expected a list of functions or their names, or a function "
            "that is given a dotted name and returns whether its jobs are reported."
        )
    names = frozenset(name_of(job) for job in jobs)
    return lambda name: name in names or name.rpartition(".")[2] in names


# -- ATTACH="all" -------------------------------------------------------------------------------------------


def attachment_for_current_app() -> Attachment | None:
    """Return the attachment, without an endpoint, of all jobs if ``RQ_WEBHOOKS_ATTACH`` is ``"all"``."""
    if not has_app_context() or EXTENSION_NAME not in current_app.extensions:
        return None
    state = get_state()
    if state.settings.attach != "all" or not state.settings.enabled:
        return None
    return Attachment(
        endpoint_id=None,
        token=make_token(f"ep{state.namespace}_all", state.settings.outbox_maxlen),
        same_database=same_database(state),
        on_created=_note_created,
    )


def _note_created(job: Any) -> None:
    created = g.setdefault(_CREATED, [])
    created.append(job)
    if len(created) >= MAX_CREATED:
        watch_created()
    elif not has_request_context():  # such an app context may last for days
        _watch_later([job], [])


def watch_created(_error: BaseException | None = None) -> None:
    """Let ingest watch the jobs of this app context that are reported to standing endpoints only."""
    if jobs := g.pop(_CREATED, None):
        _watch_later(jobs, [job.id for job in jobs if was_handed_over(job)])


def _watch_later(jobs: Sequence[Any], seen: Sequence[str]) -> None:
    runs = {job.id: run_of(job.enqueued_at, job.created_at) for job in jobs}
    unseen = [job_id for job_id in runs if job_id not in seen]
    state = get_state()
    try:
        confirm_later(state, f"ep{state.namespace}_all", seen, unseen, runs)
    except RQWebhooksError:
        logger.exception("Jobs %r are not watched; standing endpoints get what callbacks report.", list(runs))
