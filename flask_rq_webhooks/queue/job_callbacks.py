"""Attach our callbacks to the jobs that are enqueued while a webhook is requested.

Hooks into ``Queue.create_job``, through which RQ creates every job that a queue enqueues, and records what is
known about the jobs created there; for most of them, that ``Queue.enqueue_job`` has written them. Does not
know about requests, SQL, or what an endpoint is.

The user's own callbacks keep their effect: ours run after them and carry their dotted path in our own name
(:mod:`flask_rq_webhooks.callbacks`). Nothing else about a job is changed, except that the first job without
an id gets one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import rq
from redis import Redis
from redis.exceptions import RedisError
from rq import Callback
from rq.job import Job

from ..callbacks import DEFAULT_MAXLEN
from ..errors import RQWebhooksError
from .job_reader import read_callback_names
from .outbox_entry import MAX_JOB_ID
from .redis_database import database_name, redis_identity, redis_parameters

logger = logging.getLogger(__name__)

#: Prefix of the dotted names. Stored in users' Redis: never rename.
CALLBACKS = "flask_rq_webhooks.callbacks"

_OPTIONS = {"on_success": "success", "on_failure": "failure", "on_stopped": "stopped"}
#: Position of ``job_id`` among the positional arguments of ``create_job``, the same in every RQ version.
_JOB_ID_POSITION = 9
#: Redis key for the name of the last database in which jobs were refused webhooks.
_REFUSED_KEY = "rq_webhooks:refused"


@dataclass(eq=False)
class Attachment:
    """What jobs created now are attached to.

    :param endpoint_id: id of the endpoint; ``None`` for jobs that are reported to standing endpoints only.
    :param token: the endpoint's part of the dotted name, see :func:`make_token`.
    :param reserved_job_id: id for the first job that is created without one.
    :param same_database: tells whether a queue's connection leads to the configured database, for example
        :class:`SameDatabase`.
    :param chosen: tells, given the dotted name of a job's function, whether to report it; ``None``: all.
    :param on_created: called with each attached job that no request asks for; must not raise.
    :param jobs: the attached jobs, in the order of creation. A created job is not necessarily enqueued.
    :param written: for each job with an id that no one else can use yet, whether RQ has written it.
    :param watched: ids of jobs that are reported although they do not carry our callbacks.
    :param passed_over: functions of the jobs that were not *chosen*.
    :param refused: whether a job could not be attached because of its id or its queue's database (logged).
    :param unfit_id: the last job id that our tables cannot hold.
    :param closed: whether the view has ended, so that nobody will look at *jobs* any more.
    """

    endpoint_id: str | None
    token: str
    reserved_job_id: str | None = None
    same_database: Callable[[Redis], bool] = lambda connection: True
    chosen: Callable[[str], bool] | None = None
    on_created: Callable[[Job], None] = lambda job: None
    jobs: list[Job] = field(default_factory=list)
    written: dict[str, bool] = field(default_factory=dict)
    watched: set[str] = field(default_factory=set)
    passed_over: list[str] = field(default_factory=list)
    refused: bool = False
    unfit_id: str | None = None
    closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _reserved_taken: bool = field(default=False, repr=False)

    def _take_reserved_id(self) -> str | None:
        with self._lock:
            if self._reserved_taken:
                return None
            self._reserved_taken = True
            return self.reserved_job_id

    def _give_reserved_id_back(self) -> None:
        with self._lock:
            self._reserved_taken = False


#: What the running request asks for. Visible in views, sync and async, and in the tasks they start.
current_attachment: ContextVar[Attachment | None] = ContextVar("rq_webhooks_attachment", default=None)

_default_attachment: Callable[[], Attachment | None] | None = None


def set_default_attachment(function: Callable[[], Attachment | None] | None) -> None:
    """Set what jobs are attached to while no request asks for a webhook (``RQ_WEBHOOKS_ATTACH="all"``).

    :param function: called for every job; its attachments do not collect jobs. ``None`` attaches nothing.
    """
    global _default_attachment
    _default_attachment = function


def make_token(endpoint: str, maxlen: int = DEFAULT_MAXLEN, *, ignores_argument: bool = False) -> str:
    """Return the endpoint's part of the dotted names.

    :param endpoint: endpoint id, or ``ep<namespace>_all``.
    :param maxlen: ``RQ_WEBHOOKS_OUTBOX_MAXLEN``.
    :param ignores_argument: whether the job's first argument must not be used as the name of its run.
    """
    if ignores_argument:
        return f"{endpoint}~{maxlen}n"
    return endpoint if maxlen == DEFAULT_MAXLEN else f"{endpoint}~{maxlen}"


# -- queues -------------------------------------------------------------------------------------------------


class Queue(rq.Queue):
    """A drop-in replacement for :class:`rq.Queue` whose jobs carry the webhook of the enqueuing request.

    Outside such a request it behaves exactly like :class:`rq.Queue`.
    """

    def create_job(self, *args: Any, **kwargs: Any) -> Job:
        """Create a job as RQ does, with our callbacks if a webhook is requested."""
        return _create_job(super().create_job, self, args, kwargs)

    def enqueue_job(self, *args: Any, **kwargs: Any) -> Job:
        """Enqueue a job as RQ does."""
        return _enqueue_job(super().enqueue_job, self, args, kwargs)


def attached(queue: rq.Queue) -> rq.Queue:
    """Return a copy of any queue that behaves like :class:`Queue`; *queue* itself is not changed."""
    twin = copy.copy(queue)
    twin.create_job = functools.partial(_create_twin_job, queue)  # type: ignore[method-assign]
    return twin


def is_attached(queue: rq.Queue) -> bool:
    """Return whether *queue* was made by :func:`attached`."""
    create = vars(queue).get("create_job")
    return isinstance(create, functools.partial) and create.func is _create_twin_job


def _create_twin_job(queue: rq.Queue, *args: Any, **kwargs: Any) -> Job:
    return _create_job(queue.create_job, queue, args, kwargs)


_instrument_lock = threading.Lock()
_instrumented = False


def instrument() -> None:
    """Make every :class:`rq.Queue` of this process behave like :class:`Queue`.

    Safe to call again, from any thread, and together with other wrappers around or inside this one. Replaces
    ``create_job``, which ``enqueue``, ``enqueue_call`` and all the others call, and ``enqueue_job``.
    """
    global _instrumented
    with _instrument_lock:
        _instrumented = True
        for name, function in (("create_job", _create_job), ("enqueue_job", _enqueue_job)):
            current = getattr(rq.Queue, name)
            if not _is_ours(inspect.unwrap(current, stop=_is_ours)):
                setattr(rq.Queue, name, _Instrumented(current, function))


def uninstrument() -> None:
    """Undo :func:`instrument`.

    If the host has put its own wrapper around ours since then, ours stays inside but has no effect.
    """
    global _instrumented
    with _instrument_lock:
        _instrumented = False
        for name in ("create_job", "enqueue_job"):
            current: Any = getattr(rq.Queue, name)
            if _is_ours(current):
                setattr(rq.Queue, name, current.__wrapped__)


def is_instrumented() -> bool:
    """Return whether plain :class:`rq.Queue` objects of this process carry webhooks."""
    return _instrumented


class _Instrumented:
    """A method of ``rq.Queue`` wrapped in our function; a descriptor, as functions are."""

    def __init__(self, original: Callable[..., Job], function: Callable[..., Job]) -> None:
        functools.update_wrapper(self, original)
        self.__wrapped__ = original
        self._function = function

    def __get__(self, queue: rq.Queue | None, owner: type | None = None) -> Callable[..., Job]:
        return self if queue is None else functools.partial(self, queue)

    def __call__(self, queue: rq.Queue, *args: Any, **kwargs: Any) -> Job:
        original = functools.partial(self.__wrapped__, queue)
        return self._function(original, queue, args, kwargs) if _instrumented else original(*args, **kwargs)


def _is_ours(method: Any) -> bool:
    return isinstance(method, _Instrumented)


# -- jobs ---------------------------------------------------------------------------------------------------


def _create_job(
    original: Callable[..., Job], queue: rq.Queue, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Job:
    requested = current_attachment.get()
    if requested is not None and requested.chosen is not None:
        name = name_of(args[0] if args else kwargs.get("func"))
        if not requested.chosen(name):
            requested.passed_over.append(name)
            requested = None
    attachment = requested if requested is not None else _default()
    job_id = args[_JOB_ID_POSITION] if len(args) > _JOB_ID_POSITION else kwargs.get("job_id")
    if (
        attachment is None
        or _is_attached(kwargs.get("on_success"), attachment)
        or is_unfit(job_id, attachment)
        or not _leads_to_database(attachment, queue.connection)
    ):
        return original(*args, **kwargs)
    kwargs = kwargs | {
        option: _chained(option, kind, attachment.token, kwargs.get(option))
        for option, kind in _OPTIONS.items()
    }
    reserved = None
    if len(args) > _JOB_ID_POSITION:
        if args[_JOB_ID_POSITION] is None and (reserved := attachment._take_reserved_id()):
            args = (*args[:_JOB_ID_POSITION], reserved, *args[_JOB_ID_POSITION + 1 :])
    elif kwargs.get("job_id") is None and (reserved := attachment._take_reserved_id()):
        kwargs["job_id"] = reserved
    job = None
    try:
        job = original(*args, **kwargs)
    finally:
        if job is None and reserved:  # refused by RQ; the next job may use the id
            attachment._give_reserved_id_back()
    if requested is not None:
        requested.jobs.append(job)
        if job_id is None:
            requested.written[job.id] = False
    else:
        attachment.on_created(job)
    return job


def _enqueue_job(
    original: Callable[..., Job], _queue: rq.Queue, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Job:
    job = original(*args, **kwargs)
    attachment = current_attachment.get()
    if attachment is not None and job.id in attachment.written:
        # If the caller passed no pipeline, RQ has executed its own.
        attachment.written[job.id] = (args[1] if len(args) > 1 else kwargs.get("pipeline")) is None
    return job


def why_unfit(job_id: Any) -> str | None:
    """Return why our tables and indexes cannot hold *job_id*, although RQ can; ``None`` if they can."""
    if not isinstance(job_id, str) or (len(job_id) <= MAX_JOB_ID and "\0" not in job_id):
        return None
    return f"Its id {job_id[:60]!r}… has {len(job_id)} characters. Use at most {MAX_JOB_ID}, and no NUL."


def is_unfit(job_id: Any, attachment: Attachment) -> bool:
    """Return whether our tables cannot hold *job_id*; log it only once if a job gets here several times."""
    why = why_unfit(job_id)
    if why is not None and attachment.unfit_id != job_id:
        attachment.refused, attachment.unfit_id = True, job_id
        logger.error("A job is enqueued without a webhook. %s", why)
    return why is not None


def name_of(func: Any) -> str:
    """Return the dotted name of a job's function, given as it is passed to a queue."""
    if isinstance(func, str):
        return func
    name = getattr(func, "__qualname__", type(func).__qualname__)
    return f"{getattr(func, '__module__', None) or 'builtins'}.{name}"


def _default() -> Attachment | None:
    if _default_attachment is None:
        return None
    try:
        return _default_attachment()
    except RQWebhooksError:
        # No webhook was requested here: the host's job is enqueued without one.
        logger.exception("A job is enqueued without webhook callbacks (RQ_WEBHOOKS_ATTACH is 'all').")
        return None


def _is_attached(callback: Any, attachment: Attachment) -> bool:
    """Return whether an outer layer (our :class:`Queue` over an instrumented one) has attached the job."""
    if not isinstance(callback, Callback) or not isinstance(callback.func, str):
        return False
    name = f"{CALLBACKS}.success.{attachment.token}"
    return callback.func == name or callback.func.startswith(f"{name}.")


def _chained(option: str, kind: str, token: str, callback: Any) -> Callback:
    """Return our callback, with the user's callback in its name and the user's timeout.

    Refuses what RQ refuses as a callback, with the same message, and gives the same warnings.
    """
    name = f"{CALLBACKS}.{kind}.{token}"
    if not callback:
        return Callback(name)
    if not isinstance(callback, Callback):
        warnings.warn(
            f"Passing a string or function for `{option}` is deprecated, pass `Callback` instead",
            DeprecationWarning,
            stacklevel=5,
        )
        callback = Callback(callback)
    return Callback(f"{name}.{callback.name}", timeout=callback.timeout)


# -- databases ----------------------------------------------------------------------------------------------


class SameDatabase:
    """Tell whether a connection leads to the configured Redis database.

    Compares run id and database number, so one server under two names counts as one. If a server hides its
    run id, both clients must use the same address.

    :param configured: a client for ``RQ_WEBHOOKS_REDIS_URL``.
    """

    def __init__(self, configured: Redis) -> None:
        self._configured = configured
        self._known: set[tuple[Any, ...]] = set()

    @property
    def configured_name(self) -> str:
        """Return the human-readable name of the configured database."""
        return database_name(self._configured)

    def note_refusal(self, name: str) -> None:
        """Record for ``doctor`` that jobs were enqueued in the database *name*; kept for a day."""
        try:
            self._configured.set(_REFUSED_KEY, name, ex=86400)
        except RedisError:
            logger.debug("The refusal could not be noted.", exc_info=True)

    def refusals(self) -> list[str]:
        """Return the name recorded last, if any, as a list."""
        name = self._configured.get(_REFUSED_KEY)
        return [_text(name)] if isinstance(name, str | bytes) else []

    def __call__(self, connection: Redis) -> bool:
        """Return whether *connection* leads to the configured database.

        :raises redis.RedisError: when the server of *connection* cannot be reached.
        """
        if connection.connection_pool is self._configured.connection_pool:
            return True
        parameters = redis_parameters(connection)
        if parameters in self._known:
            return True
        if parameters == redis_parameters(self._configured):
            self._known.add(parameters)
            return True
        identity = redis_identity(connection)
        try:
            # Not cached: a restarted server has a new run id.
            same = identity is not None and identity == redis_identity(self._configured)
        except RedisError:
            # The queue's server answers and the configured one does not, so their addresses differ at least.
            same = False
        if same:
            self._known.add(parameters)
        return same


_refused_databases: set[str] = set()


def databases_elsewhere(same_database: SameDatabase, *owners: Mapping[str, Any]) -> list[str]:
    """Return the names of other databases in which this app has queues or has recently enqueued jobs.

    :param owners: where the app keeps its queues, besides its loaded modules; a list, a mapping or an
        extension in there may hold them too.
    """
    found = set(same_database.refusals())
    modules = [value for module in list(sys.modules.values()) for value in list(vars(module).values())]
    kept = [value for owner in owners for value in owner.values()]
    # Check the exact types: another extension's proxy may fail outside its requests.
    kept += [vars(value) for value in kept if type(value).__dictoffset__]
    for value in (*modules, *kept):
        values = (
            value.values() if type(value) is dict else value if type(value) in (list, tuple, set) else [value]
        )
        for queue in list(values):
            try:
                if issubclass(type(queue), rq.Queue) and not same_database(queue.connection):
                    found.add(database_name(queue.connection))
            except RedisError:
                continue
    return sorted(found)


def _leads_to_database(attachment: Attachment, connection: Redis) -> bool:
    try:
        if attachment.same_database(connection):
            return True
    except RedisError:
        return True  # enqueuing is about to fail with its own error
    attachment.refused = True
    name = database_name(connection)
    if name not in _refused_databases:
        _refused_databases.add(name)
        logger.error(
            "Jobs are enqueued in %s, but flask_rq_webhooks is configured for %s. "
            "They run without webhooks. Set RQ_WEBHOOKS_REDIS_URL to the database your queues use.",
            name, getattr(attachment.same_database, "configured_name", "another database"),
        )  # fmt: skip
        if isinstance(attachment.same_database, SameDatabase):
            attachment.same_database.note_refusal(name)
    return False


# -- confirmation -------------------------------------------------------------------------------------------

#: Statuses that a job object has only after it was handed to RQ; every new one has ``queued``.
_HANDED_OVER = ("deferred", "scheduled", "ready_to_enqueue", "rate_limited")


def look_at_jobs(redis: Redis, attachment: Attachment, jobs: Iterable[Job]) -> tuple[list[str], list[str]]:
    """Find which of the jobs created under an attachment really exist, in one round trip at most.

    A created job may never have been enqueued: RQ refuses a duplicate (``unique=True``) only afterwards, and
    a pipeline may not have been executed yet. A hash without our endpoint belongs to an earlier job with the
    same id and is ignored, unless that job is watched. A job with an id of its own that RQ has written and
    that was handed over counts as existing without a look.

    :param jobs: some of :attr:`Attachment.jobs`.
    :returns: ids of the jobs that exist and will be reported, and ids of those without a hash.
    :raises redis.RedisError: when Redis cannot be asked.
    """
    unique = {job.id: job for job in jobs}
    existing = [id_ for id_, job in unique.items() if attachment.written.get(id_) and was_handed_over(job)]
    for job_id in existing:
        del unique[job_id]
    names = read_callback_names(redis, [_text(job.key) for job in unique.values()])
    unseen = []
    for job_id, endpoints in zip(unique, names, strict=True):
        if endpoints is None:
            unseen.append(job_id)
        elif attachment.endpoint_id in endpoints or job_id in attachment.watched:
            existing.append(job_id)
    return existing, unseen


def was_handed_over(job: Job) -> bool:
    """Return whether a job object shows that its job was enqueued, so it is on its way or already gone.

    ``enqueued_at`` is set before RQ sends anything; a status other than ``queued`` is set while it sends.
    """
    return job.enqueued_at is not None or job.get_status(refresh=False) in _HANDED_OVER


def _text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key
