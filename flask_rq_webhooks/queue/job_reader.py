"""What RQ has committed: the only reader of RQ's hashes and results.

Reads fields of job hashes and entries of result streams, many jobs in one round trip, on every supported RQ
version. Works with clients that decode responses and with those that do not. Changes nothing, and never uses
RQ's registries, because reading them also cleans them. ``Job.fetch`` would import and call whatever a Redis
writer names; :mod:`~flask_rq_webhooks.queue.safe_pickle` reads calls, meta and return values instead.

One broken job never stops the others: a key of another type, or a hash that RQ cannot have written, is
logged once and reported in :attr:`Jobs.unreadable`.
"""

from __future__ import annotations

import functools
import logging
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from redis import Redis
from rq.job import Job
from rq.results import Result

from ..callbacks import run_name
from ..protocol.events import parse_time, run_of
from ..protocol.json_safe import safe_text
from .safe_pickle import MAX_BYTES, UNKNOWN, inflated, load_plain, plain_call

logger = logging.getLogger(__name__)

#: Jobs per pipeline: keeps one round trip at a reasonable size.
_CHUNK = 500
#: Jobs per transaction: the server answers nobody else in the meantime.
_TRANSACTION = 100
#: RQ keeps the last ten results of a job.
_RESULTS = 10
#: Bytes read of a traceback text; maximum characters of the name of a function, a queue or a run.
_MAX_EXC_BYTES, MAX_NAME = 2**20, 512
#: How many unreadable jobs are remembered, so that each is logged only once.
_MAX_LOGGED = 10_000

_PROBE_FIELDS = ("status", "enqueued_at", "created_at", "origin")
#: Fields that suffice if a run ended as its callback reported, and fields that suffice for every run.
_REPORTED_FIELDS = ("status", "created_at", "enqueued_at", "ended_at", "meta")
_ENDING_FIELDS = (*_REPORTED_FIELDS, "retries_left", "exc_info")
_CALLBACK_FIELDS = ("success_callback_name", "failure_callback_name", "stopped_callback_name")
_FIELDS = (
    *_ENDING_FIELDS, *_CALLBACK_FIELDS, "started_at", "origin", "description",
    "dependency_ids", "dependency_id", "allow_dependency_failures", "data",
)  # fmt: skip
_TOKEN = re.compile(r"flask_rq_webhooks\.callbacks\.(?:success|failure|stopped)\.(ep[0-9a-z]+_[0-9a-z]+)")
#: The names of jobs whose first argument does not name their run.
_IGNORES_ARGUMENT = re.compile(r"flask_rq_webhooks\.callbacks\.[a-z]+\.ep[0-9a-z]+_[0-9a-z]+~[0-9]+n(?:\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """One entry of a job's results.

    :param type: ``"success"``, ``"failure"``, ``"stopped"`` or ``"retried"`` (the job returned ``Retry``).
    :param at: when it was committed, on Redis' clock, to the millisecond.
    :param exc: traceback text of a failure.
    :param started_at: when the execution began, on the worker's clock; RQ 2.10 and newer.
    :param ended_at: the run's ``ended_at``, exactly as in the job's hash at that commit; RQ 2.10 and newer.
    """

    type: str
    at: datetime
    exc: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None


# Not frozen: creating a frozen one takes three times as long, for every entry.
@dataclass(slots=True, kw_only=True)
class JobRecord:
    """One existing job's hash. Times are aware UTC.

    :param status: RQ's own status: ``"queued"``, ``"started"``, ``"finished"``, ``"failed"``, ``"stopped"``,
        ``"canceled"``, ``"deferred"``, ``"scheduled"``, ``"created"``, since RQ 3 also
        ``"ready_to_enqueue"`` and ``"rate_limited"``.
    :param run: identity of the current run, see :func:`~flask_rq_webhooks.protocol.events.run_key`.
    :param func: dotted name of the function, if the call or RQ's own description shows it.
    :param runid: what a callback would call the run, see :func:`~flask_rq_webhooks.callbacks.run_name`.
    :param retries_left: ``None`` if the job was enqueued without ``Retry``.
    :param tokens: ids of the endpoints its callbacks report to.
    :param exc: traceback text in the hash: RQ before 2.0 keeps that of an abandoned job only there.
    :param meta: as RQ serialized it, see :func:`~.safe_pickle.progress_in`.
    :param children: ids in meta under the requested prefix.
    :param results: the job's results at the same moment, oldest first; ``None`` if not requested.
    """

    job_id: str
    status: str | None
    run: str
    created_at: datetime
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    queue: str | None = None
    func: str | None = None
    runid: str | None = None
    retries_left: int | None = None
    dependency_ids: tuple[str, ...] = ()
    allow_dependency_failures: bool = False
    exc: str | None = None
    tokens: frozenset[str] = frozenset()
    meta: bytes | None = None
    children: tuple[str, ...] = ()
    results: tuple[JobResult, ...] | None = None


class Jobs(dict[str, JobRecord]):
    """The jobs that exist, by id.

    :ivar unreadable: job id → why its key cannot be read; such a job is not in the dict itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unreadable: dict[str, str] = {}


#: RQ's ``Result.Type``; 4 and 5 belong to RQ 2, and 5 is a job that returned ``Retry`` too often.
_RESULT_TYPES = {"1": "success", "2": "failure", "3": "stopped", "4": "retried", "5": "failure"}


def read_jobs(
    redis: Redis, job_ids: Iterable[str], *, results: bool = False, child_prefix: str | None = None
) -> Jobs:
    """Return the jobs that exist, in one pipelined round trip (per 500 jobs).

    :param results: also read each job's results, in one transaction with its hash. Data judged together must
        be from the same moment: between two reads a retry may begin and end.
    :param child_prefix: also read the children named in meta under keys with this prefix.
    :raises redis.RedisError: when Redis cannot be asked.
    """
    return _read(redis, job_ids, _FIELDS, results=results, child_prefix=child_prefix)


def read_endings(redis: Redis, job_ids: Iterable[str], *, results: bool = False) -> Jobs:
    """Return the jobs that exist, with only the fields that say how the run ended.

    For ingest, which reads very many jobs: a third of the work of :func:`read_jobs`, with its parameters.

    :param results: also read the results; without them, retries left and traceback are not read either.
    """
    return _read(redis, job_ids, _ENDING_FIELDS if results else _REPORTED_FIELDS, results=results)


def probe_jobs(redis: Redis, job_ids: Sequence[str]) -> list[tuple[bytes, bytes, bytes] | None]:
    """Return status, run and queue of many jobs, undecoded and as cheaply as possible; ``None`` if absent.

    The run is ``enqueued_at``, or empty for a job that has not been enqueued yet.
    """
    if not job_ids:
        return []
    prefix = job_key("")
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.execute_command("HMGET", prefix + job_id, *_PROBE_FIELDS)  # type: ignore[no-untyped-call]
        answers = _executed(pipeline)
    return [
        # A late heartbeat leaves a hash without `created_at`; an error occurs again in `read_jobs`.
        None
        if isinstance(answer, Exception) or answer[2] is None
        else (_bytes(answer[0]), _bytes(answer[1]), _bytes(answer[3]))
        for answer in answers
    ]


def any_exists(redis: Redis, job_ids: Sequence[str]) -> bool:
    """Return whether any of the jobs has a hash: one command for all, at a tenth of the cost of a probe."""
    prefix = job_key("")
    return bool(job_ids) and bool(redis.exists(*[prefix + job_id for job_id in job_ids]))


def read_statuses(redis: Redis, job_ids: Iterable[str]) -> dict[str, str | None]:
    """Return the status of each job, ``None`` for absent ones, in one round trip."""
    ids = list(dict.fromkeys(job_ids))
    return {id_: probe and _text(probe[0]) for id_, probe in zip(ids, probe_jobs(redis, ids), strict=True)}


def read_results(redis: Redis, job_ids: Sequence[str]) -> dict[str, list[JobResult]]:
    """Return what RQ keeps of each job's results, oldest first, without their return values."""
    results = {}
    for chunk, answers in _pipelined(redis, job_ids, _last_results):
        for job_id, entries in zip(chunk, answers, strict=True):
            results[job_id] = _results(job_id, entries)
    return results


def read_result_value(redis: Redis, job_id: str) -> Any:
    """Return the return value of a job's latest success, or :data:`~.safe_pickle.UNKNOWN`.

    Only plain values are read: strings, numbers, containers, dates, ``Decimal``, ``UUID``, paths as strings.
    """
    ((_chunk, (entries,)),) = _pipelined(redis, [job_id], _last_results)
    for _entry_id, raw in [] if isinstance(entries, Exception) else entries or []:  # newest first
        fields = _fields(raw)
        if _text(fields.get("type")) == "1":
            if "return_value" not in fields:  # RQ omits None
                return None
            data = _from_base64(fields["return_value"])
            return UNKNOWN if data is None else load_plain(data, whole=True)
    return UNKNOWN


def read_callback_names(redis: Redis, keys: Sequence[str]) -> list[frozenset[str] | None]:
    """Return, for each key of a job hash, which endpoints its callbacks report to; ``None`` if no hash.

    :raises redis.RedisError: when Redis cannot be asked.
    """
    fields = (*_CALLBACK_FIELDS, "created_at")
    found: list[frozenset[str] | None] = []
    for _chunk, answers in _pipelined(redis, keys, lambda key: ("HMGET", key, *fields)):
        for values in answers:
            exists = not isinstance(values, Exception) and any(value is not None for value in values)
            found.append(_tokens(values[:-1]) if exists else None)
    return found


def read_metas(redis: Redis, job_ids: Sequence[str]) -> list[bytes | None]:
    """Return the meta of each job as RQ serialized it, for :func:`~.safe_pickle.progress_in`."""
    metas: list[bytes | None] = []
    for _chunk, answers in _pipelined(redis, job_ids, lambda job_id: ("HGET", job_key(job_id), "meta")):
        metas += [None if isinstance(meta, Exception) else _bytes(meta) or None for meta in answers]
    return metas


def read_dependents(redis: Redis, job_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return, for each job, the ids of the jobs that wait for it, in one round trip."""
    if not job_ids:
        return {}
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.smembers(Job.dependents_key_for(job_id))
        answers = _executed(pipeline)
    return {
        job_id: [] if isinstance(members, Exception) else sorted(_text(member) or "" for member in members)
        for job_id, members in zip(job_ids, answers, strict=True)
    }


def job_key(job_id: str) -> str:
    """Return the key of a job's hash, under RQ's own prefix."""
    return _text(Job.key_for(job_id)) or ""


# -- reading ------------------------------------------------------------------------------------------------


def _read(
    redis: Redis,
    job_ids: Iterable[str],
    fields: Sequence[str],
    *,
    results: bool,
    child_prefix: str | None = None,
) -> Jobs:
    jobs = Jobs()
    # Encode once here instead of letting the client do it for every job.
    names = [name.encode() for name in fields]
    for job_id, values, entries in _answers(redis, list(dict.fromkeys(job_ids)), names, results=results):
        try:
            if isinstance(values, Exception):
                raise values
            found = tuple(_results(job_id, entries)) if results else None
            record = _record(job_id, dict(zip(fields, values, strict=True)), found, child_prefix)
        except Exception as exc:
            jobs.unreadable[job_id] = f"{type(exc).__name__}: {safe_text(exc, 200)}"
            _log_once(job_id, f"its hash cannot be read ({jobs.unreadable[job_id]})")
        else:
            if record is not None:
                jobs[job_id] = record
    return jobs


def _answers(
    redis: Redis, job_ids: Sequence[str], names: Sequence[bytes], *, results: bool
) -> Iterable[tuple[str, Any, Any]]:
    """Yield the fields of each job, and its last results if requested, both from the same moment."""
    if not results:
        for chunk, answers in _pipelined(redis, job_ids, lambda job_id: ("HMGET", job_key(job_id), *names)):
            yield from ((job_id, values, None) for job_id, values in zip(chunk, answers, strict=True))
        return
    for start in range(0, len(job_ids), _TRANSACTION):
        chunk = job_ids[start : start + _TRANSACTION]
        with redis.pipeline(transaction=True) as pipeline:
            for job_id in chunk:
                pipeline.execute_command("HMGET", job_key(job_id), *names)  # type: ignore[no-untyped-call]
                pipeline.execute_command(*_last_results(job_id))  # type: ignore[no-untyped-call]
            # A transaction's answers arrive as one, so either all are undecoded or none.
            undecoded = functools.partial(pipeline.parse_response, NEVER_DECODE=True)
            pipeline.parse_response = undecoded  # type: ignore[method-assign]
            answers = _executed(pipeline)
        yield from zip(chunk, answers[::2], answers[1::2], strict=True)


def _pipelined(
    redis: Redis, items: Sequence[str], command: Callable[[str], tuple[Any, ...]]
) -> Iterable[tuple[Sequence[str], list[Any]]]:
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        with redis.pipeline(transaction=False) as pipeline:
            for item in chunk:
                # Undecoded even if the client decodes: a compressed traceback is not text.
                pipeline.execute_command(*command(item), NEVER_DECODE=True)  # type: ignore[no-untyped-call]
            yield chunk, _executed(pipeline)


def _executed(pipeline: Any) -> list[Any]:
    """Return the answers; an error about a single key takes the place of its answer, others are raised."""
    answers: list[Any] = pipeline.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
            raise answer
    return answers


_logged: dict[str, None] = {}


def _log_once(job_id: str, why: str) -> None:
    if job_id not in _logged:
        if len(_logged) >= _MAX_LOGGED:
            _logged.clear()
        _logged[job_id] = None
        logger.error("Job %r is set aside: %s. The other jobs are not affected.", job_id[:512], why)


def _record(
    job_id: str, fields: dict[str, Any], results: tuple[JobResult, ...] | None, child_prefix: str | None
) -> JobRecord | None:
    if fields["created_at"] is None:  # a late heartbeat leaves a hash without it
        return None
    created_at, enqueued_at = _moment(fields["created_at"]), _moment(fields["enqueued_at"])
    if created_at is None:
        raise ValueError(f"created_at is {_text(fields['created_at'])!r:.80}, not a time as RQ writes it")
    record = JobRecord(
        job_id=job_id,
        status=_text(fields["status"]) or None,
        run=run_of(enqueued_at, created_at),
        created_at=created_at,
        enqueued_at=enqueued_at,
        ended_at=_moment(fields["ended_at"]),
        meta=_bytes(fields["meta"]) or None,
        results=results,
    )
    if "exc_info" in fields:
        record.retries_left = _count(fields["retries_left"])
        record.exc = _inflated_text(fields["exc_info"])
    if "data" in fields:
        record.started_at = _moment(fields["started_at"])
        record.queue = _name(_text(fields["origin"]))
        record.func, record.runid, record.children = _call(fields, child_prefix)
        record.dependency_ids = _dependencies(fields)
        record.allow_dependency_failures = fields["allow_dependency_failures"] == b"1"
        record.tokens = _tokens(fields[name] for name in _CALLBACK_FIELDS)
    return record


def _call(fields: dict[str, Any], child_prefix: str | None) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the function's name, the job's name for its run, and its children."""
    data = inflated(fields["data"]) if fields["data"] else b""
    func, argument = plain_call(data, (_text(fields["description"]) or "")[:1000])
    if any(_IGNORES_ARGUMENT.match(_text(fields.get(name)) or "") for name in _CALLBACK_FIELDS):
        argument = None
    meta = load_plain(fields["meta"]) if fields["meta"] else None
    if not isinstance(meta, dict):
        meta = {}
    children = _children(meta, child_prefix) if child_prefix is not None else ()
    return _name(func), _name(run_name(meta.get("runid"), argument)), children


def _name(text: Any) -> str | None:
    """Return *text* as callbacks report it, in a form that SQL and a PostgreSQL index can hold."""
    return safe_text(text.replace("\0", ""), MAX_NAME) or None if isinstance(text, str) else None


def _tokens(names: Iterable[Any]) -> frozenset[str]:
    return frozenset(token for name in names for token in _TOKEN.findall(_text(name) or ""))


def _dependencies(fields: dict[str, Any]) -> tuple[str, ...]:
    if fields.get("dependency_ids"):
        ids = load_plain(fields["dependency_ids"])
        if isinstance(ids, list):
            return tuple(item for item in ids if _is_job_id(item))
    dependency_id = _text(fields.get("dependency_id"))
    return (dependency_id,) if dependency_id else ()


def _is_job_id(item: Any) -> bool:
    """Return whether *item* can be a job's id, one that can be looked up in Redis and SQL."""
    return isinstance(item, str) and 0 < len(item) <= MAX_NAME and _name(item) == item


def _children(meta: dict[Any, Any], prefix: str) -> tuple[str, ...]:
    children: list[str] = []
    for key, value in meta.items():
        if isinstance(key, str) and key.startswith(prefix):
            ids = value if isinstance(value, list | tuple | set) else [value]
            children += [item for item in ids if _is_job_id(item)]
    return tuple(dict.fromkeys(children))


def _last_results(job_id: str) -> tuple[Any, ...]:
    key = Result.get_key(job_id)  # type: ignore[no-untyped-call]
    return ("XREVRANGE", key, "+", "-", "COUNT", _RESULTS)


def _results(job_id: str, entries: Any) -> list[JobResult]:
    """Return the results in the answer to the command of :func:`_last_results`, oldest first."""
    if isinstance(entries, Exception):
        _log_once(job_id, f"its results cannot be read ({entries})")
        return []
    found = (_result(job_id, entry) for entry in reversed(entries or []))
    return [result for result in found if result is not None]


def _result(job_id: str, entry: Any) -> JobResult | None:
    try:
        entry_id, raw = entry
        fields = _fields(raw)
        kind = _RESULT_TYPES.get(_text(fields.get("type")) or "")
        if kind is None:
            return None
        milliseconds = int((_text(entry_id) or "").partition("-")[0])
        committed = datetime.fromtimestamp(milliseconds // 1000, UTC)
        encoded = fields.get("exc_string")
        return JobResult(
            type=kind,
            at=committed + timedelta(milliseconds=milliseconds % 1000),
            exc=_inflated_text(_from_base64(encoded)) if encoded else None,
            started_at=_unix_moment(fields.get("execution_started_at")),
            ended_at=_unix_moment(fields.get("execution_ended_at")),
        )
    except (ValueError, OverflowError, OSError, TypeError) as exc:
        _log_once(job_id, f"one of its results cannot be read ({exc})")
        return None


def pairs_in(answer: Any) -> Iterable[tuple[Any, Any]]:
    """Return the names and values of a map answer, whatever the protocol version's response shape."""
    return answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=False)


def _fields(raw: Any) -> dict[str, Any]:
    return {_text(name) or "": value for name, value in pairs_in(raw)}


# -- values -------------------------------------------------------------------------------------------------


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""


def _moment(value: Any) -> datetime | None:
    try:
        return parse_time(_text(value) or "")
    except ValueError:
        return None


def _unix_moment(value: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(float(value), UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _count(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _from_base64(value: Any) -> bytes | None:
    """Return *value* decoded; ``None`` if it is not base64, or too long."""
    if len(value) > 2 * MAX_BYTES:
        return None
    try:
        return b64decode(value, validate=True)
    except ValueError:
        return None


def _inflated_text(value: Any) -> str | None:
    """Return a traceback text, whether RQ compressed it or, as old releases do, did not."""
    return inflated(_bytes(value), _MAX_EXC_BYTES).decode("utf-8", "replace") if value else None
