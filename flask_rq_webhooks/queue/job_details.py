"""What RQ keeps beside the fields :mod:`~flask_rq_webhooks.queue.job_reader` reads for every callback.

Owns the further reads reconcile and trees need: a cheap probe of many jobs, dependencies, dependents,
children in meta, the call's name and run id. Nothing here runs code of a pickle: meta and calls are loaded
by an unpickler that knows plain data types only, and puts a placeholder where anything else is (RQ's own
``Job.fetch`` would import and call whatever a Redis writer names). Decides nothing.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from redis import Redis
from rq.job import Job
from rq.registry import StartedJobRegistry

from ..protocol.json_safe import safe_text
from .job_reader import JobResult, JobState, read_jobs

#: Bytes of a call or of meta that are still looked into.
MAX_PICKLE_BYTES = 8 * 2**20
#: Characters of what a job calls its run.
MAX_RUN_NAME = 512
#: Jobs per pipeline.
_CHUNK = 500

_PROBE_FIELDS = ("status", "enqueued_at", "created_at", "origin")
_DETAIL_FIELDS = (
    "repeat_intervals", "dependency_ids", "dependency_id", "allow_dependency_failures", "data", "meta",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One existing job, with what ties it to others.

    :param run: identity of the current run, see :func:`~flask_rq_webhooks.protocol.events.run_key`.
    :param runid: what a callback would call the run: ``meta["runid"]``, else the first argument if a text.
    :param repeats: whether the job was enqueued with ``Repeat``.
    :param tokens: endpoint ids its callbacks carry.
    :param exc: text of a failure that RQ 1.16 keeps in the hash.
    :param children: ids in meta under the prefix asked for.
    :param results: RQ's results of the job at the moment of its state; empty where they were not asked for.
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
    repeats: bool = False
    dependency_ids: tuple[str, ...] = ()
    allow_dependency_failures: bool = False
    exc: str | None = None
    tokens: frozenset[str] = frozenset()
    children: tuple[str, ...] = ()
    results: tuple[JobResult, ...] = ()


def job_key(job_id: str) -> str:
    """Return the key of a job's hash, under RQ's own prefix."""
    key: str | bytes = Job.key_for(job_id)
    return key.decode() if isinstance(key, bytes) else key


def probe_jobs(redis: Redis, job_ids: Sequence[str]) -> list[tuple[bytes, bytes, bytes] | None]:
    """Return status, run and queue of many jobs, undecoded and as cheaply as can be; ``None`` if absent.

    The run is ``enqueued_at``, or empty for a job that was not enqueued yet.
    """
    if not job_ids:
        return []
    prefix = job_key("")
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.execute_command("HMGET", prefix + job_id, *_PROBE_FIELDS)  # type: ignore[no-untyped-call]
        answers = pipeline.execute()
    return [
        # A heartbeat that came late leaves a hash with nothing else in it.
        None if created_at is None else (_raw(status), _raw(enqueued_at), _raw(origin))
        for status, enqueued_at, created_at, origin in answers
    ]


def any_exists(redis: Redis, job_ids: Sequence[str]) -> bool:
    """Say whether any of the jobs has a hash: one command for all, a tenth of the cost of a probe."""
    prefix = job_key("")
    return bool(job_ids) and bool(redis.exists(*[prefix + job_id for job_id in job_ids]))


def read_records(
    redis: Redis, job_ids: Sequence[str], *, child_prefix: str | None = None, results: bool = False
) -> dict[str, JobRecord]:
    """Return the jobs that exist.

    The state is read first: what a job noted in its meta before it ended is seen with its ending.

    :param child_prefix: also read the children named in meta under keys that begin so.
    :param results: see :func:`~flask_rq_webhooks.queue.job_reader.read_jobs`.
    """
    ids = list(dict.fromkeys(job_ids))
    states = read_jobs(redis, ids, results=results)
    present = [job_id for job_id in ids if states[job_id].created_at is not None]
    records = {}
    for start in range(0, len(present), _CHUNK):
        chunk = present[start : start + _CHUNK]
        with redis.pipeline(transaction=False) as pipeline:
            for job_id in chunk:
                pipeline.execute_command(  # type: ignore[no-untyped-call]
                    "HMGET", job_key(job_id), *_DETAIL_FIELDS, NEVER_DECODE=True
                )
            answers = pipeline.execute()
        for job_id, values in zip(chunk, answers, strict=True):
            details = dict(zip(_DETAIL_FIELDS, values, strict=True))
            records[job_id] = _record(states[job_id], details, child_prefix)
    return records


def read_statuses(redis: Redis, job_ids: Iterable[str]) -> dict[str, str | None]:
    """Return the status of each job, ``None`` for absent ones, in one round trip."""
    ids = list(dict.fromkeys(job_ids))
    return {
        job_id: None if probe is None else probe[0].decode("utf-8", "replace")
        for job_id, probe in zip(ids, probe_jobs(redis, ids), strict=True)
    }


def uses_pickle(redis: Redis, queue: str) -> bool:
    """Say whether the started jobs of *queue* were written by RQ's default serializer.

    Judged by one of them; ``True`` where there is none.
    """
    # Entries are "<job id>", from RQ 2 on "<job id>:<execution id>".
    entries: Any = redis.zrange(StartedJobRegistry(queue, connection=redis).key, 0, 0)
    for entry in _texts(entries):
        for job_id in (entry, entry.rpartition(":")[0]):
            data = redis.hget(job_key(job_id), "data") if job_id else None
            if data:
                raw = _inflate(_raw(data))
                return raw is None or raw[:1] == b"\x80"
    return True


def read_dependents(redis: Redis, job_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the ids of the jobs that wait for each job, in one round trip."""
    if not job_ids:
        return {}
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.smembers(Job.dependents_key_for(job_id))
        answers = pipeline.execute(raise_on_error=False)
    return {
        job_id: [] if isinstance(members, Exception) else sorted(_texts(members))
        for job_id, members in zip(job_ids, answers, strict=True)
    }


# -- fields -----------------------------------------------------------------------------------------------


def _raw(value: Any) -> bytes:
    if value is None:
        return b""
    return value.encode() if isinstance(value, str) else cast(bytes, value)


def _record(state: JobState, details: dict[str, Any], child_prefix: str | None) -> JobRecord:
    func, argument = _call(details["data"])
    meta = load_plain(details["meta"]) if details["meta"] else {}
    meta = meta if isinstance(meta, dict) else {}
    runid = meta.get("runid")
    return JobRecord(
        job_id=state.job_id,
        status=state.status,
        run=cast(str, state.run),
        created_at=cast(datetime, state.created_at),
        enqueued_at=state.enqueued_at,
        started_at=state.started_at,
        ended_at=state.ended_at,
        queue=state.queue,
        func=func or state.func,
        runid=_run_name(runid if isinstance(runid, str) else argument),
        retries_left=state.retries_left,
        repeats=details["repeat_intervals"] is not None,
        dependency_ids=_dependencies(details),
        allow_dependency_failures=details["allow_dependency_failures"] == b"1",
        exc=state.exc,
        tokens=state.tokens,
        results=state.results or (),
        children=_children(meta, child_prefix) if child_prefix is not None else (),
    )


def _run_name(text: str | None) -> str | None:
    """Return *text* as callbacks tell it: one that SQL can hold, and an index of PostgreSQL too."""
    return safe_text(text.replace("\0", ""), MAX_RUN_NAME) or None if text is not None else None


def _texts(values: Iterable[bytes | str]) -> list[str]:
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def _dependencies(fields: dict[str, Any]) -> tuple[str, ...]:
    if fields["dependency_ids"]:
        try:
            ids = json.loads(fields["dependency_ids"])
        except ValueError:
            ids = None
        if isinstance(ids, list):
            return tuple(item for item in ids if isinstance(item, str))
    return (fields["dependency_id"].decode("utf-8", "replace"),) if fields["dependency_id"] else ()


def _children(meta: dict[Any, Any], prefix: str) -> tuple[str, ...]:
    children: list[str] = []
    for key, value in meta.items():
        if isinstance(key, str) and key.startswith(prefix):
            ids = value if isinstance(value, list | tuple | set) else [value]
            children += [item for item in ids if isinstance(item, str) and item]
    return tuple(dict.fromkeys(children))


def _inflate(value: bytes) -> bytes | None:
    """Return *value* decompressed, or as it is where RQ did not compress it; ``None`` for a bomb."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(value, MAX_PICKLE_BYTES)
    except zlib.error:
        return value
    return None if inflater.unconsumed_tail else raw


def _call(data: bytes | None) -> tuple[str | None, str | None]:
    """Return the function's dotted name and the first positional argument where it is a text."""
    raw = _inflate(data) if data else None
    call = load_plain(raw) if raw else None
    if not isinstance(call, tuple | list) or len(call) != 4:
        return None, None
    name, _instance, arguments, _keywords = call
    first = arguments[0] if isinstance(arguments, tuple | list) and arguments else None
    return name if isinstance(name, str) else None, first if isinstance(first, str) else None


# -- pickles ----------------------------------------------------------------------------------------------

#: Of these a short pickle makes short data: no bytearray(2**40), set(range(2**40)), Fraction("1e999999999").
_PLAIN_TYPES = {
    "builtins": {"set", "frozenset", "complex", "slice"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "uuid": {"UUID"},
    "collections": {"OrderedDict", "deque", "Counter"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
}


#: What a broken pickle raises.
_BROKEN = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError,
    RecursionError, TypeError, ValueError,
)  # fmt: skip


class _Opaque:
    """Stands for any object of a type that is not plain data; takes all a pickle does to it."""

    def __new__(cls, *_arguments: object, **_keywords: object) -> _Opaque:
        return super().__new__(cls)

    def __init__(self, *_arguments: object, **_keywords: object) -> None:
        return

    def __setstate__(self, _state: object) -> None:
        return

    def __setitem__(self, _key: object, _value: object) -> None:
        return

    def append(self, _item: object) -> None:
        return

    def extend(self, _items: object) -> None:
        return


class _PlainUnpickler(pickle.Unpickler):
    """Loads plain data; what else there is becomes opaque."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if name in _PLAIN_TYPES.get(module, ()) else _Opaque

    def persistent_load(self, _pid: object) -> Any:
        return _Opaque()


def load_plain(raw: bytes) -> Any:
    """Return what *raw* holds, with placeholders for what is no plain data; ``None`` if it is broken.

    :param raw: written by RQ's pickle or JSON serializer.
    """
    if len(raw) > MAX_PICKLE_BYTES:
        return None
    try:
        if raw[:1] == b"\x80":
            return _PlainUnpickler(io.BytesIO(raw)).load()
        return json.loads(raw)
    except _BROKEN:
        return None
