"""What RQ has committed: the only reader of RQ's keys.

Reads fields of job hashes and entries of result streams, many jobs in one round trip, on every supported RQ
version. Never unpickles what is not plain data, never changes anything, and never uses RQ's registries,
whose reading methods clean them. Works with clients that decode and with those that do not.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import re
import zlib
from base64 import b64decode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, Final
from uuid import UUID

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from rq.job import Job
from rq.results import Result

from ..protocol.events import format_time, parse_time
from ..protocol.worker_errors import CALL

#: Jobs per pipeline: keeps one round trip, and its answer, of a reasonable size.
_CHUNK = 500
#: Jobs per transaction: the server answers nobody else meanwhile.
_TRANSACTION = 100
#: RQ keeps the last ten results of a job.
_RESULTS = 10
#: Bytes of a traceback text, and of a pickled result, that are looked at.
_MAX_EXC_BYTES, _MAX_VALUE_BYTES = 2**20, 8 * 2**20

_FIELDS = (
    "status", "created_at", "enqueued_at", "started_at", "ended_at", "origin", "description", "retries_left",
    "success_callback_name", "failure_callback_name", "stopped_callback_name", "exc_info",
)  # fmt: skip
#: Those that say how a run ended.
_ENDING_FIELDS = ("status", "created_at", "enqueued_at", "ended_at", "retries_left", "exc_info")
_CALLBACK_FIELDS = ("success_callback_name", "failure_callback_name", "stopped_callback_name")
_TOKEN = re.compile(r"flask_rq_webhooks\.callbacks\.(?:success|failure|stopped)\.(ep[0-9a-z]+_[0-9a-z]+)")
_CALL = re.compile(CALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One job's hash. Times are aware UTC.

    :param exists: whether there is a hash at all.
    :param status: RQ's word: ``"queued"``, ``"started"``, ``"finished"``, ``"failed"``, ``"stopped"``,
        ``"canceled"``, ``"deferred"``, ``"scheduled"``, ``"created"``, from RQ 3 also
        ``"ready_to_enqueue"`` and ``"rate_limited"``.
    :param run: identity of the current run, as the callbacks write it.
    :param func: dotted name of the function, where RQ's own description shows it.
    :param retries_left: ``None`` where the job was enqueued without ``Retry``.
    :param tokens: ids of the endpoints its callbacks report to.
    :param exc: traceback text in the hash: RQ before 2.0 keeps the one of an abandoned job only there.
    :param results: RQ's results of the job at the same moment, oldest first; ``None`` where they were not
        asked for.
    """

    job_id: str
    exists: bool
    status: str | None = None
    run: str | None = None
    created_at: datetime | None = None
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    queue: str | None = None
    func: str | None = None
    retries_left: int | None = None
    tokens: frozenset[str] = frozenset()
    exc: str | None = None
    results: tuple[JobResult, ...] | None = None


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


class _Unknown(Enum):
    UNKNOWN = "unknown"

    def __repr__(self) -> str:
        return "UNKNOWN"


#: A return value that is not kept any more, or that only its own program could read.
UNKNOWN: Final = _Unknown.UNKNOWN

#: RQ's ``Result.Type``: 4 and 5 are of RQ 2; 5 is a job that returned ``Retry`` too often.
_RESULT_TYPES = {"1": "success", "2": "failure", "3": "stopped", "4": "retried", "5": "failure"}


def read_jobs(redis: Redis, job_ids: Sequence[str], *, results: bool = False) -> dict[str, JobState]:
    """Return the state of each job, in one pipelined round trip (per 500 jobs).

    :param results: also read each job's results, in one transaction with its hash. What is judged together
        has to be of one moment: between two reads a retry may begin and end.
    :raises redis.RedisError: when Redis cannot be asked.
    """
    return _read_states(redis, job_ids, _FIELDS, results=results)


def read_endings(redis: Redis, job_ids: Sequence[str], *, results: bool = False) -> dict[str, JobState]:
    """Return of each job's state what says how its run ended; the rest is as if it were not there.

    For those who look at very many jobs: half of the work of :func:`read_jobs`.

    :param results: see :func:`read_jobs`.
    :raises redis.RedisError: when Redis cannot be asked.
    """
    return _read_states(redis, job_ids, _ENDING_FIELDS, results=results)


def _read_states(
    redis: Redis, job_ids: Sequence[str], fields: Sequence[str], *, results: bool
) -> dict[str, JobState]:
    # Encoded here, once, and not by the client for every job.
    names = [name.encode() for name in fields]
    states = {}
    if results:
        for job_id, values, entries in _read_moments(redis, job_ids, names):
            state = _state(job_id, dict(zip(fields, values, strict=True)))
            states[job_id] = replace(state, results=tuple(_results(entries)))
        return states
    for chunk, answers in _pipelined(redis, job_ids, lambda job_id: ("HMGET", Job.key_for(job_id), *names)):
        for job_id, values in zip(chunk, answers, strict=True):
            states[job_id] = _state(job_id, dict(zip(fields, values, strict=True)))
    return states


def read_results(redis: Redis, job_ids: Sequence[str]) -> dict[str, list[JobResult]]:
    """Return what RQ keeps of each job's results, oldest first, without their return values.

    :raises redis.RedisError: when Redis cannot be asked.
    """
    results = {}
    for chunk, answers in _pipelined(redis, job_ids, _last_results):
        for job_id, entries in zip(chunk, answers, strict=True):
            results[job_id] = _results(entries)
    return results


def read_result_value(redis: Redis, job_id: str) -> Any:
    """Return the return value of a job's latest success, or :data:`UNKNOWN`.

    Only plain values are read: texts, numbers, containers, dates, ``Decimal``, ``UUID``, paths. A pickle
    that names any other class would run code of the job's program, chosen by whoever writes to Redis.

    :raises redis.RedisError: when Redis cannot be asked.
    """
    ((_chunk, (entries,)),) = _pipelined(redis, [job_id], _last_results)
    for _entry_id, raw in entries or []:  # newest first
        fields = _fields(raw)
        if _text(fields.get("type")) != "1":
            continue
        if "return_value" not in fields:  # RQ leaves None out
            return None
        return _value(fields["return_value"])
    return UNKNOWN


def read_callback_names(redis: Redis, keys: Sequence[str]) -> list[frozenset[str] | None]:
    """Return, for each key of a job's hash, which endpoints its callbacks report to; ``None`` where there
    is no hash.

    :raises redis.RedisError: when Redis cannot be asked.
    """
    fields = (*_CALLBACK_FIELDS, "created_at")
    found: list[frozenset[str] | None] = []
    for _chunk, answers in _pipelined(redis, keys, lambda key: ("HMGET", key, *fields)):
        for values in answers:
            exists = any(value is not None for value in values)
            found.append(_tokens(values[:-1]) if exists else None)
    return found


# -- databases ----------------------------------------------------------------------------------------------


def redis_identity(connection: Redis) -> str | None:
    """Return what tells one Redis database from all others: the server's run id and the database number.

    A restarted server has a new one, so it is good for comparing, not for keeping.

    :returns: ``None`` where the server does not tell (an ACL or a proxy forbids ``INFO``, fakeredis).
    :raises redis.RedisError: when Redis cannot be reached.
    """
    try:
        run_id = connection.info("server").get("run_id")
    except RedisConnectionError:
        raise
    except (ResponseError, NotImplementedError):
        return None
    return f"{run_id}/{_database_number(connection)}" if run_id else None


def redis_parameters(connection: Redis) -> tuple[Any, ...]:
    """Return what *connection* was told to connect to; equal for two clients of one database.

    Unequal ones may still lead to one database, by another name.
    """
    pool = connection.connection_pool
    kwargs = pool.connection_kwargs
    database = _database_number(connection)
    if kwargs.get("server") is not None:  # fakeredis: the object that holds the data
        return ("fake", id(kwargs["server"]), database)
    manager = getattr(pool, "sentinel_manager", None)
    if manager is not None:
        sentinels = sorted(redis_parameters(sentinel) for sentinel in manager.sentinels)
        return ("sentinel", getattr(pool, "service_name", None), tuple(sentinels), database)
    if kwargs.get("path"):
        return ("unix", kwargs["path"], database)
    host = str(kwargs.get("host") or "localhost").lower()
    if host in ("127.0.0.1", "::1"):
        host = "localhost"
    return ("tcp", host, int(kwargs.get("port") or 6379), database)


def database_name(connection: Redis) -> str:
    """Return a name of the database for people, without user name and password."""
    kind, where, *more = redis_parameters(connection)
    database = more[-1]
    if kind == "tcp":
        return f"redis://{where}:{more[0]}/{database}"
    if kind == "fake":
        return f"fakeredis server {where:#x}, database {database}"
    return f"{kind} {where}, database {database}"


def _database_number(connection: Redis) -> int:
    return int(connection.connection_pool.connection_kwargs.get("db") or 0)


# -- reading ------------------------------------------------------------------------------------------------


def _pipelined(redis: Redis, items: Sequence[str], command: Any) -> Iterable[tuple[Sequence[str], list[Any]]]:
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        with redis.pipeline(transaction=False) as pipeline:
            for item in chunk:
                # Undecoded even where the client decodes: a compressed traceback is no text.
                pipeline.execute_command(*command(item), NEVER_DECODE=True)  # type: ignore[no-untyped-call]
            yield chunk, pipeline.execute()


def _read_moments(
    redis: Redis, job_ids: Sequence[str], names: Sequence[bytes]
) -> Iterable[tuple[str, list[Any], Any]]:
    """Give the fields and the last results of each job, both of one moment."""
    for start in range(0, len(job_ids), _TRANSACTION):
        chunk = job_ids[start : start + _TRANSACTION]
        with redis.pipeline(transaction=True) as pipeline:
            for job_id in chunk:
                pipeline.execute_command("HMGET", Job.key_for(job_id), *names)  # type: ignore[no-untyped-call]
                pipeline.execute_command(*_last_results(job_id))  # type: ignore[no-untyped-call]
            # The answers of a transaction come as one: undecoded all together, or not at all.
            undecoded = functools.partial(pipeline.parse_response, NEVER_DECODE=True)
            pipeline.parse_response = undecoded  # type: ignore[method-assign]
            answers = pipeline.execute()
        yield from zip(chunk, answers[::2], answers[1::2], strict=True)


def _last_results(job_id: str) -> tuple[Any, ...]:
    return ("XREVRANGE", _results_key(job_id), "+", "-", "COUNT", _RESULTS)


def _results_key(job_id: str) -> Any:
    return Result.get_key(job_id)  # type: ignore[no-untyped-call]


def _state(job_id: str, fields: dict[str, Any]) -> JobState:
    if all(value is None for value in fields.values()):
        return JobState(job_id=job_id, exists=False)
    created_at, enqueued_at = _moment(fields["created_at"]), _moment(fields["enqueued_at"])
    description = _CALL.match(_text(fields.get("description")) or "")
    return JobState(
        job_id=job_id,
        exists=True,
        status=_text(fields["status"]) or None,
        run=_run(created_at, enqueued_at),
        created_at=created_at,
        enqueued_at=enqueued_at,
        started_at=_moment(fields.get("started_at")),
        ended_at=_moment(fields["ended_at"]),
        queue=_text(fields.get("origin")) or None,
        func=description[0] if description else None,
        retries_left=_count(fields["retries_left"]),
        tokens=_tokens([fields.get(name) for name in _CALLBACK_FIELDS]),
        exc=_inflated(fields["exc_info"]),
    )


def _run(created_at: datetime | None, enqueued_at: datetime | None) -> str | None:
    if enqueued_at is not None:
        return format_time(enqueued_at)
    return f"created:{format_time(created_at)}" if created_at is not None else None


def _tokens(names: Iterable[Any]) -> frozenset[str]:
    return frozenset(token for name in names for token in _TOKEN.findall(_text(name) or ""))


def _results(entries: Any) -> list[JobResult]:
    """Return the results in the answer to :func:`_last_results`, oldest first."""
    found = (_result(entry_id, _fields(fields)) for entry_id, fields in reversed(entries or []))
    return [result for result in found if result is not None]


def _result(entry_id: Any, fields: dict[str, Any]) -> JobResult | None:
    kind = _RESULT_TYPES.get(_text(fields.get("type")) or "")
    if kind is None:
        return None
    milliseconds = int((_text(entry_id) or "").partition("-")[0])
    encoded = fields.get("exc_string")
    return JobResult(
        type=kind,
        at=datetime.fromtimestamp(milliseconds // 1000, UTC) + timedelta(milliseconds=milliseconds % 1000),
        exc=_inflated(_from_base64(encoded)) if encoded else None,
        started_at=_unix_moment(fields.get("execution_started_at")),
        ended_at=_unix_moment(fields.get("execution_ended_at")),
    )


def _fields(raw: Any) -> dict[str, Any]:
    pairs = raw.items() if isinstance(raw, dict) else zip(raw[::2], raw[1::2], strict=False)
    return {_text(name) or "": value for name, value in pairs}


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


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
    try:
        return b64decode(value, validate=True)
    except ValueError:
        return None


def _inflated(value: Any) -> str | None:
    """Return a traceback as RQ compressed it, or as old releases wrote it."""
    if not value:
        return None
    data = value.encode() if isinstance(value, str) else value
    try:
        # Bounded: a few bytes may inflate to gigabytes.
        data = zlib.decompressobj().decompress(data, _MAX_EXC_BYTES)
    except zlib.error:
        data = data[:_MAX_EXC_BYTES]
    return str(data.decode("utf-8", "replace"))


# -- return values ------------------------------------------------------------------------------------------

_PLAIN: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("datetime", "datetime"): datetime,
    ("datetime", "date"): date,
    ("datetime", "time"): time,
    ("datetime", "timedelta"): timedelta,
    ("datetime", "timezone"): timezone,
    ("decimal", "Decimal"): Decimal,
    ("uuid", "UUID"): UUID,
    # As their texts: nothing but the text is wanted.
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts).replace("//", "/", 1),
    ("pathlib", "PurePosixPath"): lambda *parts: "/".join(parts).replace("//", "/", 1),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PLAIN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain value") from None


def _value(encoded: Any) -> Any:
    data = _from_base64(encoded)
    if data is None or len(data) > _MAX_VALUE_BYTES:
        return UNKNOWN
    try:
        if data[:1] == b"\x80":  # a pickle of any protocol RQ uses
            return _PlainUnpickler(io.BytesIO(data)).load()
        return json.loads(data)  # rq.serializers.JSONSerializer
    except Exception:  # noqa: BLE001  pickle documents that anything may be raised
        return UNKNOWN
