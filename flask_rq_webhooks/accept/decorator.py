"""``accepts_webhook``: what surrounds a view whose clients may ask for a webhook.

Owns the order of things in one request (read, register, view, confirm) and the answers when it cannot go on.
Knows nothing of how fields are found (:mod:`.fields`), checked (:mod:`.schemas`) and kept
(:mod:`.registering`).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, cast

from flask import Request, Response, after_this_request, current_app, has_request_context, request

from ..errors import ConfigurationError, InvalidWebhookError, StorageUnavailableError
from ..protocol.events import JOB_TYPES
from ..queue.job_callbacks import Attachment, current_attachment
from ..state import State, get_state
from .register import DestinationBusyError, confirm_webhook, mark_response, register_webhook
from .request_fields import take_fields
from .request_schema import WebhookRequest, load_webhook

logger = logging.getLogger(__name__)

View = TypeVar("View", bound=Callable[..., Any])

#: Seconds after which a client may try again.
RETRY_UNAVAILABLE_S, RETRY_BUSY_S = 5, 60

_ATTRIBUTE = "_rq_webhooks_asked"
_MARK = "_rq_webhooks_accepts"


def accepts_webhook(
    view: View, *, events: Sequence[str] | None = None, scope: str = "job", runid: str = "runid"
) -> View:
    """Let the clients of *view* ask for a webhook with the jobs it enqueues.

    The view may be sync or async, a function or a method of a ``MethodView``. Called within another
    decorated view it is an ordinary function: its jobs belong to the outer one's webhook.

    :param events: event types sent where the request names none; ``None`` for all terminal ones.
    :param scope: ``"job"``, or ``"tree"`` for one event about all jobs of the request and their children.
    :param runid: name of the view argument that holds the host's run id.
    :raises ConfigurationError: for unknown *events* or *scope*.
    """
    options = _Options(events=_checked_events(events), scope=_checked_scope(scope), runid=runid)

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

        setattr(async_wrapper, _MARK, True)
        return cast(View, async_wrapper)

    @functools.wraps(view)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begun = _begin(options, kwargs)
        if begun is None:
            return view(*args, **kwargs)
        if isinstance(begun, Response):
            return begun
        with begun:
            return view(*args, **kwargs)

    setattr(wrapper, _MARK, True)
    return cast(View, wrapper)


def accepts_webhooks(function: Callable[..., Any]) -> bool:
    """Say whether *function* is decorated; decorators above that use ``functools.wraps`` keep the mark."""
    return _MARK in getattr(function, "__dict__", {})


def has_read_fields() -> bool:
    """Say whether a decorated function has run in the current request."""
    return has_request_context() and hasattr(request, _ATTRIBUTE)


def answer_invalid(exc: InvalidWebhookError) -> Response:
    """Return the 400 for webhook fields that are not acceptable; 429 where only the time is wrong."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    events: tuple[str, ...] | None
    scope: str
    runid: str


class _Asked:
    """What one request asks for, and what became of it."""

    def __init__(self) -> None:
        #: ``None`` where nothing will be registered: webhooks are off, or the fields are bad.
        self.wanted: WebhookRequest | None = None
        self.registered = False

    def mark(self, response: Response) -> Response:
        return mark_response(response, registered=self.registered)


class _Promise:
    """The time in which jobs are attached: entered before the view, left when it is over in whatever way."""

    def __init__(self, state: State, asked: _Asked, attachment: Attachment) -> None:
        self._state = state
        self._asked = asked
        self._attachment = attachment
        self._token: Token[Attachment | None] | None = None

    def __enter__(self) -> None:
        self._token = current_attachment.set(self._attachment)

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _exception: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None  # noqa: S101  (entered before)
        current_attachment.reset(self._token)
        if confirm_webhook(self._state, self._attachment):
            self._asked.registered = True


def _begin(options: _Options, view_arguments: dict[str, Any]) -> _Promise | Response | None:
    """Read the request's webhook fields and register its webhook.

    :returns: ``None`` where the view is to run as if undecorated, an answer where it is not to run at all.
    """
    if not has_request_context() or current_attachment.get() is not None:
        return None
    # The request itself: what its proxy is told does not last.
    this_request = cast(Request, request._get_current_object())  # type: ignore[attr-defined]
    try:
        asked = _read(this_request)
        if asked is None or asked.wanted is None:
            return None
        state = get_state()
        runid = view_arguments.get(options.runid, (this_request.view_args or {}).get(options.runid))
        attachment = register_webhook(
            state,
            asked.wanted,
            events=options.events,
            scope=options.scope,
            runid=None if runid is None else str(runid).replace("\0", "\ufffd"),
        )
    except InvalidWebhookError as exc:
        return answer_invalid(exc)
    except StorageUnavailableError as exc:
        return answer_unavailable(exc)
    return _Promise(state, asked, attachment)


def _read(this_request: Request) -> _Asked | None:
    """Return what the request asks for; read once, also where several decorated functions run in turn."""
    try:
        return cast("_Asked | None", getattr(this_request, _ATTRIBUTE))
    except AttributeError:
        pass
    invalid = None
    try:
        fields = take_fields(this_request)
    except InvalidWebhookError as exc:
        fields, invalid = {}, exc
    if fields is None:
        setattr(this_request, _ATTRIBUTE, None)
        return None
    asked = _Asked()
    setattr(this_request, _ATTRIBUTE, asked)
    after_this_request(asked.mark)
    state = get_state()
    if not state.settings.enabled:
        return asked
    if invalid is not None:
        raise invalid
    asked.wanted = load_webhook(
        fields, settings=state.settings, url_policy=state.url_policy, formats=state.formats.keys()
    )
    return asked


def _checked_events(events: Sequence[str] | None) -> tuple[str, ...] | None:
    if events is None:
        return None
    if isinstance(events, str) or not events or not JOB_TYPES.issuperset(events):
        raise ConfigurationError(
            f"accepts_webhook(events={events!r}): expected a list of some of {', '.join(sorted(JOB_TYPES))}."
        )
    return tuple(dict.fromkeys(events))


def _checked_scope(scope: str) -> str:
    if scope not in ("job", "tree"):
        raise ConfigurationError(f"accepts_webhook(scope={scope!r}): expected 'job' or 'tree'.")
    return scope
