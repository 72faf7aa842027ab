"""The outbox: one Redis stream between the callbacks in users' workers and the dispatchers.

Owns the stream's keys, its consumer group, and what a valid entry looks like. Whoever can write to Redis
can write here, so every entry is validated like any input. Knows nothing of jobs beyond the entry, nor of
what becomes of it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from redis import Redis
from redis.exceptions import ResponseError

from ..callbacks import DEFAULT_MAXLEN, ENTRY_VERSION, OUTBOX_KEY_PREFIX
from ..errors import OutboxEntryError
from ..protocol.events import parse_time

logger = logging.getLogger(__name__)

#: The consumer group all dispatchers of one SQL database belong to.
GROUP = "dispatchers"
#: Bytes of a valid entry: a result of 1 MiB, a traceback of 64 Ki characters escaped, and the rest.
MAX_ENTRY_BYTES = 2 * 2**20
#: Containers within containers. Results come cut at 50.
MAX_DEPTH = 60
#: Job ids in one ``confirm`` entry.
MAX_JOBS = 10_000
#: Entries kept in the stream of rejected ones, and bytes kept of each.
MAX_REJECTED, MAX_REJECTED_BYTES = 1000, 65_536
#: Milliseconds after which an entry a reader took and did not finish goes to another one. A living reader
#: keeps one for 5 s at most while SQL is there; reading it twice does no harm.
TAKE_OVER_IDLE_MS = 15_000
#: Seconds between two looks for such entries, and for readers that are gone for good.
TAKE_OVER_EVERY_S, FORGET_EVERY_S = 5.0, 3600.0
#: Milliseconds by which servers are late to end a wait (Redis and Valkey look ten times a second).
TICK_MS = 100
#: Milliseconds of silence after which a reader that holds nothing is forgotten.
FORGET_IDLE_MS = 24 * 3600 * 1000

#: How servers say that the stream or its group is not there, or was deleted while we waited for it. The last
#: one is fakeredis.
_NO_GROUP = ("NOGROUP", "UNBLOCKED", "requires the key to exist")

_KINDS = frozenset({"success", "failure", "stopped"})
_ENDPOINT = re.compile(r"ep[0-9a-z]{1,16}_(?:[0-9a-z]{26}|all)")
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_MAX_JOB_ID = 512
_MAX_NAME = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxEntry:
    """One valid entry. Times are texts as RQ writes them, or ``None``.

    :param kind: ``"success"``, ``"failure"``, ``"stopped"``: a callback's word on a job; ``"confirm"``: jobs
        whose watches the web process could not confirm in SQL.
    :param endpoint: endpoint id, or ``ep<namespace>_all`` for a job only standing endpoints hear of.
    :param job_id: RQ's id; empty for ``"confirm"``.
    :param run: identity of the run, see :func:`~flask_rq_webhooks.protocol.events.run_key`; empty for
        ``"confirm"``.
    :param at: when Redis took the entry, unix seconds; its results are stamped by the same clock.
    :param retries_left: as the failing run left it; more than 0 means RQ will retry.
    :param error: ``{"type", "message", "traceback"}`` with kind ``"failure"``.
    :param jobs: job ids, only with ``"confirm"``.
    :param seal: what a web process of ours encrypted, only with ``"confirm"``; see :func:`confirm_entry`.
    :param size: bytes of the JSON it was read from; 0 where it was not.
    """

    kind: str
    endpoint: str
    job_id: str = ""
    run: str = ""
    at: float = 0.0
    func: str | None = None
    queue: str | None = None
    created_at: str | None = None
    enqueued_at: str | None = None
    started_at: str | None = None
    runid: str | None = None
    retries_left: int | None = None
    result: Any = None
    result_truncated: bool = False
    error: Mapping[str, str] | None = None
    jobs: tuple[str, ...] = ()
    seal: str | None = None
    size: int = field(default=0, compare=False)

    def to_json(self) -> str:
        """Return the entry as :func:`parse_entry` reads it."""
        if self.kind == "confirm":
            return _dumps(confirm_entry(self.endpoint, self.jobs, seal=self.seal))
        fields = {name: getattr(self, name) for name in _JOB_FIELDS if name != "v"}
        return _dumps({"v": ENTRY_VERSION, **fields})


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was read.

    :param id: its id in the stream; hand it back to :meth:`Outbox.done` or :meth:`Outbox.reject`.
    :param entry: what it says, or ``None`` where it is not valid.
    :param error: why it is not valid.
    :param raw: its bytes, as far as there are any.
    """

    id: str
    entry: OutboxEntry | None
    error: str | None = None
    raw: bytes = b""


def confirm_entry(endpoint: str, jobs: Sequence[str], *, seal: str | None = None) -> dict[str, Any]:
    """Return the entry by which a web process that cannot write to SQL asks for its watches' confirmation.

    :param endpoint: endpoint id.
    :param jobs: ids of the jobs the request enqueued, as the web process saw them in Redis.
    :param seal: the same once more, with the jobs' runs, encrypted: proof that it comes from a web process.
        Without it the entry counts only for jobs that prove it themselves.
    """
    entry = {"v": ENTRY_VERSION, "kind": "confirm", "endpoint": endpoint, "jobs": list(jobs)}
    return entry if seal is None else {**entry, "seal": seal}


class Outbox:
    """The stream of one SQL database's endpoints. Any thread may append, one at a time may read.

    :param redis: a client for the database RQ uses, whether it decodes or not.
    :param namespace: what the SQL database's endpoint ids begin with, after ``ep``.
    :param maxlen: entries kept while nobody reads.
    """

    def __init__(self, redis: Redis, namespace: str, *, maxlen: int = DEFAULT_MAXLEN) -> None:
        self.key = f"{OUTBOX_KEY_PREFIX}ep{namespace}"
        self.rejected_key = f"{self.key}:rejected"
        self._redis = redis
        self._maxlen = maxlen
        self._prefix = f"ep{namespace}_"
        #: Consumer → last id of its own unfinished entries that was read again after a start.
        self._recovered: dict[str, str | None] = {}
        self._take_over_at = self._forget_at = 0.0
        self._take_over_cursor = "0-0"

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append *entry*; see :func:`confirm_entry`.

        :raises redis.RedisError: when Redis cannot be reached.
        """
        self._redis.xadd(self.key, {"entry": _dumps(entry)}, maxlen=self._maxlen, approximate=True)

    def length(self) -> int:
        """Return how many entries are in the stream: new ones, and taken but unfinished ones."""
        return int(self._redis.xlen(self.key))

    def read(self, consumer: str, count: int, block_ms: int) -> list[Entry]:
        """Return up to *count* entries: first what this reader left unfinished before a restart, then what a
        dead reader left, then new ones.

        An entry may be returned again until it is done; whoever uses it has to bear that.

        :param consumer: name of this reader, unique among living ones.
        :param block_ms: how long to wait for a new entry; kept below the client's socket timeout.
        :raises redis.RedisError: when Redis cannot be reached. Nothing is lost.
        """
        try:
            return self._read(consumer, count, block_ms)
        except ResponseError as exc:
            if not any(sign in str(exc) for sign in _NO_GROUP):
                raise
        self._create_group()
        self._recovered[consumer] = None
        return self._read(consumer, count, 0)

    def done(self, ids: Iterable[str]) -> None:
        """Acknowledge and delete entries."""
        ids = list(ids)
        if not ids:
            return
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xack(self.key, GROUP, *ids)
            pipeline.xdel(self.key, *ids)
            pipeline.execute()

    def reject(self, id: str, raw: bytes | str, why: str) -> None:  # noqa: A002
        """Set an entry aside in the stream of rejected ones, where an operator can look at it.

        :param raw: its bytes; cut where they are many.
        :param why: one sentence.
        """
        raw = raw.encode("utf-8", "backslashreplace") if isinstance(raw, str) else raw
        fields: Any = {
            "id": id,
            "why": why.encode("utf-8", "backslashreplace")[:1000],
            "entry": raw[:MAX_REJECTED_BYTES],
        }
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xadd(self.rejected_key, fields, maxlen=MAX_REJECTED, approximate=True)
            pipeline.execute()
        # Only then: an entry set aside twice is better than one that is gone.
        self.done([id])

    def _read(self, consumer: str, count: int, block_ms: int) -> list[Entry]:
        return (
            self._read_own(consumer, count)
            or self._take_over(consumer, count)
            or self._read_new(consumer, count, block_ms)
        )

    def _read_new(self, consumer: str, count: int, block_ms: int) -> list[Entry]:
        started = time.monotonic()
        wait_ms = min(block_ms, self._longest_wait_ms())
        found = self._read_group(consumer, count, ">", wait_ms if wait_ms > TICK_MS else None)
        if found or not block_ms:
            return found
        # Too short a wait for the server, or one that does not wait at all (fakeredis).
        left_s = min(block_ms, TICK_MS) / 1000 - (time.monotonic() - started)
        if left_s <= 0:
            return []
        time.sleep(left_s)
        return self._read_group(consumer, count, ">", None)

    def _read_own(self, consumer: str, count: int) -> list[Entry]:
        last = self._recovered.get(consumer, "0")
        while last is not None:
            seen: list[str] = []
            entries = self._read_group(consumer, count, last, None, seen)
            last = self._recovered[consumer] = seen[-1] if seen else None
            if entries:
                return entries
        return []

    def _read_group(
        self, consumer: str, count: int, after: str, block_ms: int | None, seen: list[str] | None = None
    ) -> list[Entry]:
        block = ["BLOCK", block_ms] if block_ms else []
        answer = self._raw(
            "XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, *block, "STREAMS", self.key, after
        )
        return self._entries(_only_stream(answer), seen)

    def _take_over(self, consumer: str, count: int) -> list[Entry]:
        if time.monotonic() < self._take_over_at:
            return []
        answer = self._raw(
            "XAUTOCLAIM", self.key, GROUP, consumer, TAKE_OVER_IDLE_MS, self._take_over_cursor, "COUNT", count
        )
        self._take_over_cursor = _text(answer[0])
        if self._take_over_cursor == "0-0":  # all have been looked at
            self._take_over_at = time.monotonic() + TAKE_OVER_EVERY_S
            self._forget_readers()
        return self._entries(answer[1])

    def _forget_readers(self) -> None:
        if time.monotonic() < self._forget_at:
            return
        self._forget_at = time.monotonic() + FORGET_EVERY_S
        for reader in self._redis.xinfo_consumers(self.key, GROUP):
            if reader["pending"] == 0 and reader["idle"] > FORGET_IDLE_MS:
                self._redis.xgroup_delconsumer(self.key, GROUP, reader["name"])

    def _entries(self, pairs: Iterable[Any], seen: list[str] | None = None) -> list[Entry]:
        entries, gone = [], []
        for pair in pairs:
            if pair is None or pair[0] is None:  # servers before 7 say so of a deleted entry
                continue
            entry_id, fields = _text(pair[0]), pair[1]
            if seen is not None:
                seen.append(entry_id)
            if not fields:  # trimmed or deleted after it was taken
                gone.append(entry_id)
            else:
                entries.append(self._entry(entry_id, fields))
        self.done(gone)
        return entries

    def _entry(self, entry_id: str, fields: Any) -> Entry:
        pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=False)
        raw = next((value for name, value in pairs if name in (b"entry", "entry")), None)
        if raw is None:
            return Entry(
                entry_id, None, "it has no field 'entry'", repr(fields).encode()[:MAX_REJECTED_BYTES]
            )
        raw = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else bytes(raw)
        try:
            entry = replace(parse_entry(raw), at=int(entry_id.partition("-")[0]) / 1000)
            if not entry.endpoint.startswith(self._prefix):
                raise OutboxEntryError(f"its endpoint {entry.endpoint!r} belongs to another database.")
        except OutboxEntryError as exc:
            return Entry(entry_id, None, str(exc), raw)
        return Entry(entry_id, entry, None, raw)

    def _longest_wait_ms(self) -> int:
        """Return how long the server may surely be waited for within the client's socket timeout."""
        # Connections made without one have redis-py's own: none before release 8, 5 seconds since.
        timeout_s = self._redis.connection_pool.connection_kwargs.get("socket_timeout", 5)
        return max(1, int(timeout_s * 500) - TICK_MS) if timeout_s else 60_000

    def _create_group(self) -> None:
        try:
            self._redis.xgroup_create(self.key, GROUP, id="0", mkstream=True)
        except ResponseError as exc:
            if not str(exc).startswith("BUSYGROUP"):  # another dispatcher was faster
                raise

    def _raw(self, *command: Any) -> Any:
        # Undecoded even where the client decodes: bytes that are no text must not end the whole read.
        return self._redis.execute_command(*command, NEVER_DECODE=True)  # type: ignore[no-untyped-call]


def age_of_oldest(redis: Redis, key: str) -> float | None:
    """Return for how many seconds the oldest entry of a stream has waited, ``None`` where there is none.

    :param key: the stream's, :attr:`Outbox.key`.
    """
    with redis.pipeline(transaction=False) as pipeline:
        pipeline.xrange(key, count=1)
        pipeline.time()
        oldest, (seconds, _microseconds) = pipeline.execute()
    return int(seconds) - int(_text(oldest[0][0]).partition("-")[0]) / 1000 if oldest else None


def read_until(redis: Redis, key: str | None) -> datetime | None:
    """Return when Redis took the oldest entry that is not done: every earlier one is stored in SQL by now.

    Entries stay until then, whether nobody has read them yet or a reader died that had.

    :param key: the stream's, :attr:`Outbox.key`.
    :returns: ``None`` where the stream is empty.
    """
    oldest: Any = redis.xrange(key, count=1) if key is not None else []
    if not oldest:
        return None
    milliseconds = int(_text(oldest[0][0]).partition("-")[0])
    return datetime.fromtimestamp(milliseconds // 1000, UTC) + timedelta(milliseconds=milliseconds % 1000)


def server_time(redis: Redis) -> datetime:
    """Return the time on Redis' clock."""
    answer: Any = redis.time()
    seconds, microseconds = answer
    return datetime.fromtimestamp(int(seconds), UTC) + timedelta(microseconds=int(microseconds))


def _only_stream(answer: Any) -> Any:
    """Return the entries of the one stream asked for, in whichever shape the protocol version has."""
    if not answer:
        return []
    entries = next(iter(answer.values())) if isinstance(answer, dict) else answer[0][1]
    # redis-py 5 wraps them once more under RESP3.
    if (
        len(entries) == 1
        and isinstance(entries[0], list)
        and (not entries[0] or isinstance(entries[0][0], tuple))
    ):
        return entries[0]
    return entries


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _dumps(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False)


# -- validation ---------------------------------------------------------------------------------------------

_JOB_FIELDS = (
    "v", "kind", "endpoint", "job_id", "run", "at", "func", "queue", "created_at", "enqueued_at",
    "started_at", "runid", "retries_left", "result", "result_truncated", "error",
)  # fmt: skip
_CONFIRM_FIELDS = ("v", "kind", "endpoint", "jobs")


def parse_entry(raw: bytes) -> OutboxEntry:
    """Return the entry that *raw* is.

    :param raw: ASCII JSON, exactly the fields of its kind.
    :raises OutboxEntryError: saying what is wrong with it, without repeating its content at length.
    """
    fields = _loads(raw)
    version = fields.get("v")
    if type(version) is not int or version != ENTRY_VERSION:
        raise OutboxEntryError(f"its version is {_short(version)}, this release reads {ENTRY_VERSION}.")
    kind = fields.get("kind")
    if kind == "confirm":
        return _parse_confirm(fields)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise OutboxEntryError(f"its kind {_short(kind)} is unknown.")
    _check_names(fields, _JOB_FIELDS)
    created_at, enqueued_at = _moment(fields, "created_at"), _moment(fields, "enqueued_at")
    error = fields["error"]
    if kind == "failure":
        error = _parse_error(error)
    elif error is not None:
        raise OutboxEntryError(f"a {kind} has no error.")
    if kind != "success" and (fields["result"] is not None or fields["result_truncated"] is not False):
        raise OutboxEntryError(f"a {kind} has no result.")
    return OutboxEntry(
        kind=kind,
        endpoint=_endpoint(fields),
        job_id=_job_id(fields["job_id"]),
        run=_run(fields["run"]),
        at=_unix_time(fields["at"]),
        func=_optional_text(fields, "func"),
        queue=_optional_text(fields, "queue"),
        created_at=created_at,
        enqueued_at=enqueued_at,
        started_at=_moment(fields, "started_at"),
        runid=_optional_text(fields, "runid"),
        retries_left=_optional_count(fields, "retries_left"),
        result=fields["result"],
        result_truncated=_flag(fields, "result_truncated"),
        error=error,
        size=len(raw),
    )


def _parse_confirm(fields: dict[str, Any]) -> OutboxEntry:
    seal = fields.pop("seal", None)
    if seal is not None and not isinstance(seal, str):
        raise OutboxEntryError("its seal is no text.")
    _check_names(fields, _CONFIRM_FIELDS)
    jobs = fields["jobs"]
    if not isinstance(jobs, list) or not 0 < len(jobs) <= MAX_JOBS:
        raise OutboxEntryError(f"its jobs are not a list of 1 to {MAX_JOBS} ids.")
    return OutboxEntry(
        kind="confirm", endpoint=_endpoint(fields), jobs=tuple(_job_id(job) for job in jobs), seal=seal
    )


def _loads(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_ENTRY_BYTES:
        raise OutboxEntryError(f"it has {len(raw)} bytes, more than {MAX_ENTRY_BYTES}.")
    try:
        # Text first: bytes would also be accepted as UTF-16 or UTF-32.
        fields = _DECODER.decode(raw.decode("ascii"))
    except RecursionError:
        raise OutboxEntryError("it is nested too deeply.") from None
    except ValueError as exc:  # UnicodeDecodeError and JSONDecodeError are ones; so is a number too long
        raise OutboxEntryError(f"it is not JSON ({type(exc).__name__}).") from exc
    if not isinstance(fields, dict):
        raise OutboxEntryError("it is not a JSON object.")
    if not _is_harmless(raw):
        _check_values(fields)
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise OutboxEntryError("it has the same key twice.")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise OutboxEntryError(f"it contains {name}.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e999
        raise OutboxEntryError("it contains an infinite number.")
    return number


#: Built once: building it takes longer than reading a small entry.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _is_harmless(raw: bytes) -> bool:
    """Say whether *raw* cannot hold what :func:`_check_values` looks for; nearly every entry says yes.

    Half characters need an escape, and depth needs as many brackets.
    """
    return b"\\u" not in raw and raw.count(b"[") + raw.count(b"{") < MAX_DEPTH


def _check_values(fields: dict[str, Any]) -> None:
    """Refuse what JSON can say and SQL or a receiver cannot: depth and half characters."""
    level: list[Any] = [fields]
    for _depth in range(MAX_DEPTH):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                deeper += value.keys()
                deeper += value.values()
            elif isinstance(value, list):
                deeper += value
            elif isinstance(value, str):
                _check_text(value)
        if not deeper:
            return
        level = deeper
    raise OutboxEntryError("it is nested too deeply.")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise OutboxEntryError("it contains half a surrogate pair.") from None


def _check_names(fields: Mapping[str, Any], expected: Sequence[str]) -> None:
    if missing := [name for name in expected if name not in fields]:
        raise OutboxEntryError(f"it lacks {', '.join(missing)}.")
    if len(fields) != len(expected):
        unknown = sorted(set(fields) - set(expected))
        raise OutboxEntryError(f"it has the unknown field {_short(unknown[0])}.")


def _endpoint(fields: Mapping[str, Any]) -> str:
    endpoint = fields["endpoint"]
    if not isinstance(endpoint, str) or _ENDPOINT.fullmatch(endpoint) is None:
        raise OutboxEntryError(f"its endpoint {_short(endpoint)} is no endpoint id.")
    return endpoint


def _job_id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_JOB_ID or "\0" in value:
        raise OutboxEntryError(f"{_short(value)} is no job id.")
    return value


def _run(value: Any) -> str:
    text = value.removeprefix("created:") if isinstance(value, str) else ""
    if not _is_moment(text):
        raise OutboxEntryError(f"its run {_short(value)} is not one.")
    return str(value)


def _moment(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields[name]
    if value is not None and not (isinstance(value, str) and _is_moment(value)):
        raise OutboxEntryError(f"its {name} {_short(value)} is no time as RQ writes it.")
    return value


def _is_moment(text: str) -> bool:
    if _MOMENT.fullmatch(text) is None:
        return False
    try:
        parse_time(text)
    except ValueError:  # the 31st of a short month
        return False
    return True


def _unix_time(value: Any) -> float:
    # From 2001 to 2286: what every datetime can hold, in every time zone.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e9 <= value < 1e10:
        raise OutboxEntryError(f"its at {_short(value)} is no unix time.")
    return float(value)


def _optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields[name]
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _MAX_NAME or "\0" in value:
        raise OutboxEntryError(f"its {name} is no text of at most {_MAX_NAME} characters.")
    return value


def _optional_count(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields[name]
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 2**31:
        raise OutboxEntryError(f"its {name} {_short(value)} is no count.")
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields[name]
    if not isinstance(value, bool):
        raise OutboxEntryError(f"its {name} {_short(value)} is not true or false.")
    return value


def _parse_error(error: Any) -> dict[str, str]:
    if (
        not isinstance(error, dict)
        or set(error) != {"type", "message", "traceback"}
        or not all(isinstance(text, str) for text in error.values())
    ):
        raise OutboxEntryError("its error is not {type, message, traceback} in texts.")
    return error


def _short(value: Any) -> str:
    return ascii(value)[:60]
