"""What RQ keeps beside the few fields :mod:`~flask_rq_webhooks.capture.rq_state` reads for every callback.

Owns the reads reconcile needs: a cheap probe of many jobs, whole records, results with their values,
dependencies, dependents and children. Nothing here runs code of a pickle: values are loaded by an unpickler
that knows plain data types only (RQ's own ``Job.fetch`` and ``Result.restore`` would import and call
whatever a Redis writer names). Decides nothing.
"""

from __future__ import annotations

import io
import json
import pickle  # noqa: S403  (only through _PlainUnpickler, which calls nothing but plain types)
import zlib
from base64 import b64decode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from redis import Redis
from rq.job import Job
from rq.results import Result

from ..protocol.events import format_time, parse_time

#: Bytes of a pickle that are still looked into.
MAX_PICKLE_BYTES = 8 * 2**20
#: Results RQ keeps of one job.
MAX_RESULTS = 10

_PROBE_FIELDS = ("status", "enqueued_at", "created_at", "origin")
_RECORD_FIELDS = (
    "status", "enqueued_at", "created_at", "started_at", "ended_at", "origin", "retries_left",
    "repeat_intervals", "dependency_ids", "dependency_id", "allow_dependency_failures", "exc_info", "data",
    "meta", "success_callback_name", "failure_callback_name", "stopped_callback_name",
)  # fmt: skip
_CALLBACKS = "flask_rq_webhooks.callbacks."


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job as RQ's hash has it. Times are ``None`` where RQ wrote none or nonsense.

    :param run: identity of the current run, see :func:`~flask_rq_webhooks.protocol.events.run_key`.
    :param repeats: whether the job was enqueued with ``Repeat``.
    :param tokens: endpoint ids its callbacks carry.
    :param exc_info: text of a failure that RQ 1.16 keeps in the hash.
    :param children: ids in meta under the prefix asked for.
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
    exc_info: str | None = None
    tokens: frozenset[str] = frozenset()
    children: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRecord:
    """One entry of RQ's result stream.

    :param kind: ``"success"``, ``"failure"``, ``"stopped"``, ``"retried"``.
    :param value: the return value, where its pickle holds plain data only.
    :param readable: ``False`` where there is a value that could not be loaded.
    """

    kind: str
    at: datetime
    exc: str | None = None
    value: Any = None
    readable: bool = True


def job_key(job_id: str) -> str:
    """Return the key of a job's hash, under RQ's own prefix."""
    key: str | bytes = Job.key_for(job_id)
    return key.decode() if isinstance(key, bytes) else key


def probe_jobs(redis: Redis, job_ids: Sequence[str]) -> list[tuple[bytes, bytes, bytes] | None]:
    """Return status, run and queue of many jobs in one round trip, undecoded; ``None`` for absent ones.

    The run is ``enqueued_at``, or empty for a job that was not enqueued yet.
    """
    if not job_ids:
        return []
    prefix = job_key("")
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.execute_command("HMGET", prefix + job_id, *_PROBE_FIELDS)
        answers = pipeline.execute()
    return [
        # A heartbeat that came late leaves a hash with nothing else in it.
        None if created_at is None else (_raw(status), _raw(enqueued_at), _raw(origin))
        for status, enqueued_at, created_at, origin in answers
    ]


def read_records(
    redis: Redis, job_ids: Sequence[str], *, child_prefix: str | None = None
) -> dict[str, JobRecord]:
    """Return the jobs that exist, in one round trip.

    :param child_prefix: also read the children named in meta under keys that begin so.
    """
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.execute_command("HMGET", job_key(job_id), *_RECORD_FIELDS, NEVER_DECODE=True)
        answers = pipeline.execute()
    records = {}
    for job_id, values in zip(ids, answers, strict=True):
        record = _record(job_id, dict(zip(_RECORD_FIELDS, values, strict=True)), child_prefix)
        if record is not None:
            records[job_id] = record
    return records


def read_result_records(redis: Redis, job_ids: Sequence[str]) -> dict[str, list[ResultRecord]]:
    """Return the results of jobs, oldest first, in one round trip."""
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.execute_command(
                "XREVRANGE", Result.get_key(job_id), "+", "-", "COUNT", MAX_RESULTS, NEVER_DECODE=True
            )
        answers = pipeline.execute(raise_on_error=False)
    results = {}
    for job_id, entries in zip(ids, answers, strict=True):
        if isinstance(entries, Exception):  # a key of another type under that name
            entries = []
        found = [_result(*entry) for entry in reversed(entries)]
        results[job_id] = [result for result in found if result is not None]
    return results


def read_statuses(redis: Redis, job_ids: Iterable[str]) -> dict[str, str | None]:
    """Return the status of each job, ``None`` for absent ones, in one round trip."""
    ids = list(dict.fromkeys(job_ids))
    return {
        job_id: None if probe is None else probe[0].decode("utf-8", "replace")
        for job_id, probe in zip(ids, probe_jobs(redis, ids), strict=True)
    }


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


def _record(job_id: str, fields: dict[str, Any], child_prefix: str | None) -> JobRecord | None:
    created_at = _moment(fields["created_at"])
    if created_at is None:
        return None
    enqueued_at = _moment(fields["enqueued_at"])
    func, argument = _call(fields["data"])
    meta = _load_hashed(fields["meta"]) if fields["meta"] else {}
    meta = meta if isinstance(meta, dict) else {}
    runid = meta.get("runid")
    return JobRecord(
        job_id=job_id,
        status=_text(fields["status"]),
        run=format_time(enqueued_at) if enqueued_at is not None else "created:" + format_time(created_at),
        created_at=created_at,
        enqueued_at=enqueued_at,
        started_at=_moment(fields["started_at"]),
        ended_at=_moment(fields["ended_at"]),
        queue=_text(fields["origin"]),
        func=func,
        runid=runid if isinstance(runid, str) else argument,
        retries_left=_number(fields["retries_left"]),
        repeats=fields["repeat_intervals"] is not None,
        dependency_ids=_dependencies(fields),
        allow_dependency_failures=_text(fields["allow_dependency_failures"]) == "1",
        exc_info=_inflated_text(fields["exc_info"]),
        tokens=frozenset(
            token
            for name in ("success_callback_name", "failure_callback_name", "stopped_callback_name")
            if (token := _token(_text(fields[name]))) is not None
        ),
        children=_children(meta, child_prefix) if child_prefix is not None else (),
    )


def _moment(value: bytes | None) -> datetime | None:
    if not value:
        return None
    try:
        return parse_time(value.decode())
    except ValueError:
        return None


def _text(value: bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if value else None


def _texts(values: Iterable[bytes | str]) -> list[str]:
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def _number(value: bytes | None) -> int | None:
    try:
        return int(value) if value else None
    except ValueError:
        return None


def _token(callback_name: str | None) -> str | None:
    """Return the endpoint id in ``flask_rq_webhooks.callbacks.<kind>.<token>[.<user's path>]``."""
    if callback_name is None or not callback_name.startswith(_CALLBACKS):
        return None
    parts = callback_name.removeprefix(_CALLBACKS).split(".", 2)
    return parts[1].partition("~")[0] if len(parts) > 1 else None


def _dependencies(fields: dict[str, Any]) -> tuple[str, ...]:
    if fields["dependency_ids"]:
        try:
            ids = json.loads(fields["dependency_ids"])
        except ValueError:
            ids = None
        if isinstance(ids, list):
            return tuple(item for item in ids if isinstance(item, str))
    return (cast(str, _text(fields["dependency_id"])),) if fields["dependency_id"] else ()


def _children(meta: dict[Any, Any], prefix: str) -> tuple[str, ...]:
    children: list[str] = []
    for key, value in meta.items():
        if isinstance(key, str) and key.startswith(prefix):
            ids = value if isinstance(value, list | tuple | set) else [value]
            children += [item for item in ids if isinstance(item, str) and item]
    return tuple(dict.fromkeys(children))


def _result(entry_id: bytes, fields: Any) -> ResultRecord | None:
    if not isinstance(fields, dict):  # RESP answers that redis-py was told not to decode
        fields = dict(zip(fields[::2], fields[1::2], strict=False))
    number = _number(fields.get(b"type"))
    at = datetime.fromtimestamp(int(entry_id.split(b"-")[0]) / 1000, UTC)
    exc = _inflated_text(_unbase64(fields.get(b"exc_string")))
    if number == 1:
        raw = _unbase64(fields.get(b"return_value"))
        if raw is None:
            return ResultRecord(kind="success", at=at)
        value, readable = load_plain(raw)
        return ResultRecord(kind="success", at=at, value=value if readable else None, readable=readable)
    if number == 2:
        # RQ records a stop as a failure with a sentence of its own.
        stopped = exc is not None and exc.startswith("Job stopped by user")
        return ResultRecord(kind="stopped" if stopped else "failure", at=at, exc=exc)
    if number == 5:
        return ResultRecord(kind="failure", at=at, exc="MaxRetriesExceeded: the job returned Retry too often")
    kind = {3: "stopped", 4: "retried"}.get(number or 0)
    return None if kind is None else ResultRecord(kind=kind, at=at, exc=exc)


def _unbase64(value: bytes | None) -> bytes | None:
    if not value:
        return None
    try:
        return b64decode(value)
    except ValueError:
        return None


def _inflated_text(value: bytes | None) -> str | None:
    if not value:
        return None
    raw = _inflate(value)
    return None if raw is None else raw.decode("utf-8", "replace")


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
    call, _readable = load_plain(raw) if raw else (None, False)
    if not isinstance(call, tuple | list) or len(call) != 4:
        return None, None
    name, _instance, arguments, _keywords = call
    first = arguments[0] if isinstance(arguments, tuple | list) and arguments else None
    return name if isinstance(name, str) else None, first if isinstance(first, str) else None


def _load_hashed(value: bytes) -> Any:
    return load_plain(value)[0]


# -- pickles ----------------------------------------------------------------------------------------------

_PLAIN_TYPES = {
    "builtins": {"set", "frozenset", "complex", "bytearray", "range", "slice"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "uuid": {"UUID"},
    "collections": {"OrderedDict", "deque", "Counter"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
}


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
    """Loads plain data; what else there is becomes opaque and is noted."""

    met_opaque = False

    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN_TYPES.get(module, ()):
            return super().find_class(module, name)
        self.met_opaque = True
        return _Opaque

    def persistent_load(self, _pid: object) -> Any:
        self.met_opaque = True
        return _Opaque()


def load_plain(raw: bytes) -> tuple[Any, bool]:
    """Return what *raw* holds, pickled or JSON, and whether all of it is plain data.

    Never imports or calls anything but the plain types of the standard library. Objects of other types are
    replaced by a placeholder.

    :param raw: written by RQ's pickle or JSON serializer.
    """
    if len(raw) > MAX_PICKLE_BYTES:
        return None, False
    if raw[:1] != b"\x80":
        try:
            return json.loads(raw), True
        except (ValueError, RecursionError):
            return None, False
    unpickler = _PlainUnpickler(io.BytesIO(raw))
    try:
        value = unpickler.load()
    except Exception:  # noqa: BLE001  a pickle may fail in any way; the value is then simply not known
        return None, False
    return value, not unpickler.met_opaque
