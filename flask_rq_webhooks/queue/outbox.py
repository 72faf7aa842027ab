"""The outbox: one Redis stream between the callbacks in users' workers and the dispatchers.

Owns the stream's keys and its consumer group. Does not know what an entry says
(:mod:`~flask_rq_webhooks.queue.outbox_entry`) or what happens to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from ..callbacks import DEFAULT_MAXLEN, OUTBOX_KEY_PREFIX
from ..errors import OutboxEntryError
from .job_reader import pairs_in
from .outbox_entry import OutboxEntry, dump_entry, parse_entry

#: The consumer group of all dispatchers of one SQL database.
GROUP = "dispatchers"
#: Entries kept in the stream of rejected entries, and bytes kept of each.
MAX_REJECTED, MAX_REJECTED_BYTES = 1000, 65_536
#: Milliseconds after which an entry that a reader took but did not finish goes to another reader. A live
#: reader holds an entry for 5 s at most while SQL is reachable; reading it twice does no harm.
TAKE_OVER_IDLE_MS = 15_000
#: Seconds between two searches for such entries, and for readers that are gone for good.
TAKE_OVER_EVERY_S, FORGET_EVERY_S = 5.0, 3600.0
#: Shortest wait requested from the server, in milliseconds; shorter ones are slept here. The server may end
#: a wait :data:`TICK_MS` too late, because Redis and Valkey check only ten times a second.
SHORTEST_WAIT_MS, TICK_MS = 20, 100
#: Milliseconds of inactivity after which a reader that holds no entries is forgotten.
FORGET_IDLE_MS = 24 * 3600 * 1000

#: Number of jobs without a callback's report from which a problem is reported, and seconds for which they are
#: counted. A few mean nothing: a callback that runs while its server shuts down leaves no report either.
SILENT_CALLBACKS, SILENCE_S = 3, 3600

#: Server messages that mean that the stream or its group does not exist, or was deleted while we waited. The
#: last one comes from fakeredis.
_NO_GROUP = ("NOGROUP", "UNBLOCKED", "requires the key to exist")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was read.

    :param id: its id in the stream; pass it to :meth:`Outbox.done` or :meth:`Outbox.reject`.
    :param entry: the parsed entry, or ``None`` if it is not valid.
    :param error: why it is not valid.
    :param raw: its bytes, if there are any.
    """

    id: str
    entry: OutboxEntry | None
    error: str | None = None
    raw: bytes = b""


class Outbox:
    """The stream of one SQL database's endpoints. Any thread may append, but only one at a time may read.

    :param redis: a client for the database RQ uses; it may decode responses or not.
    :param namespace: what the SQL database's endpoint ids begin with, after ``ep``.
    :param maxlen: entries kept while nobody reads.
    """

    def __init__(self, redis: Redis, namespace: str, *, maxlen: int = DEFAULT_MAXLEN) -> None:
        self.key = f"{OUTBOX_KEY_PREFIX}ep{namespace}"
        self.rejected_key = f"{self.key}:rejected"
        self._silent_key = f"{self.key}:silent"
        self._redis = redis
        self._maxlen = maxlen
        self._prefix = f"ep{namespace}_"
        #: Consumer → id of the last of its own unfinished entries that was read again after a start.
        self._recovered: dict[str, str | None] = {}
        self._take_over_at = self._forget_at = 0.0
        self._take_over_cursor = "0-0"

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append *entry*; see :func:`~flask_rq_webhooks.queue.outbox_entry.confirm_entry`.

        :raises redis.RedisError: when Redis cannot be reached.
        """
        self._redis.xadd(self.key, {"entry": dump_entry(entry)}, maxlen=self._maxlen, approximate=True)

    def length(self) -> int:
        """Return how many entries are in the stream: new ones, and ones taken but not finished."""
        return int(self._redis.xlen(self.key))

    def rejected(self) -> int:
        """Return how many malformed entries were set aside."""
        return int(self._redis.xlen(self.rejected_key))

    def note_silent_callbacks(self, count: int) -> None:
        """Count jobs that ended without the report their callbacks should have appended; kept one hour."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.incrby(self._silent_key, count)
            pipeline.expire(self._silent_key, SILENCE_S)
            pipeline.execute()

    def silent_callbacks(self) -> int:
        """Return how many such jobs there were; 0 while there are too few to be significant."""
        count = int(self._redis.get(self._silent_key) or 0)
        return count if count >= SILENT_CALLBACKS else 0

    def refused_user(self) -> str | None:
        """Return a Redis user whose commands on the stream were refused recently, if the server reports one.

        Only ``ACL LOG`` proves it, and not every user may read that; ``None`` means unknown.
        """
        try:
            log = self._raw("ACL", "LOG", 128)
        except RedisError:
            return None
        for refused in log:
            said = {_text(name): value for name, value in pairs_in(refused)}
            if said.get("reason") == b"key" and said.get("object") == self.key.encode():
                return _text(said["username"])
        return None

    def read(self, consumer: str, count: int, block_ms: float) -> list[Entry]:
        """Return up to *count* entries: first those this reader left unfinished before a restart, then those
        a dead reader left, then new ones.

        An entry may be returned again until it is done; processing it twice must do no harm.

        :param consumer: name of this reader, unique among the live ones.
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
        """Move an entry to the stream of rejected entries, where an operator can look at it.

        :param raw: its bytes; cut if there are too many.
        :param why: the reason, one sentence.
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
        # Delete it only now: an entry set aside twice is better than a lost one.
        self.done([id])

    def _read(self, consumer: str, count: int, block_ms: float) -> list[Entry]:
        return (
            self._read_own(consumer, count)
            or self._take_over(consumer, count)
            or self._read_new(consumer, count, block_ms)
        )

    def _read_new(self, consumer: str, count: int, block_ms: float) -> list[Entry]:
        wait_ms = int(min(block_ms, self._longest_wait_ms()))
        if wait_ms < SHORTEST_WAIT_MS:
            time.sleep(block_ms / 1000)
            return self._read_group(consumer, count, ">", None)
        started = time.monotonic()
        found = self._read_group(consumer, count, ">", wait_ms)
        left_s = min(block_ms, TICK_MS) / 1000 - (time.monotonic() - started)
        if not found and left_s > 0:  # the server did not block (fakeredis)
            time.sleep(left_s)
        return found

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
        if self._take_over_cursor == "0-0":  # all entries have been examined
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
            if pair is None or pair[0] is None:  # how servers before 7 return a deleted entry
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
        raw = next((value for name, value in pairs_in(fields) if name in (b"entry", "entry")), None)
        if raw is None:
            return Entry(
                entry_id, None, "it has no field 'entry'", repr(fields).encode()[:MAX_REJECTED_BYTES]
            )
        raw = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else bytes(raw)
        try:
            taken_at = _milliseconds(entry_id) / 1000
            if not 1e9 <= taken_at < 1e10:
                raise OutboxEntryError("its id is no time of this epoch.")
            entry = parse_entry(raw, at=taken_at)
            if not entry.endpoint.startswith(self._prefix):
                raise OutboxEntryError(f"its endpoint {entry.endpoint!r} belongs to another database.")
        except OutboxEntryError as exc:
            return Entry(entry_id, None, str(exc), raw)
        return Entry(entry_id, entry, None, raw)

    def _longest_wait_ms(self) -> int:
        """Return how long we can safely wait for the server within the client's socket timeout."""
        # Connections without a timeout of their own use redis-py's: none before release 8, 5 seconds since.
        timeout_s = self._redis.connection_pool.connection_kwargs.get("socket_timeout", 5)
        return max(1, int(timeout_s * 500) - TICK_MS) if timeout_s else 60_000

    def _create_group(self) -> None:
        try:
            self._redis.xgroup_create(self.key, GROUP, id="0", mkstream=True)
        except ResponseError as exc:
            if not str(exc).startswith("BUSYGROUP"):  # another dispatcher was faster
                raise

    def _raw(self, *command: Any) -> Any:
        # Undecoded even if the client decodes: bytes that are not text must not make the whole read fail.
        return self._redis.execute_command(*command, NEVER_DECODE=True)  # type: ignore[no-untyped-call]


def missing_reports(outbox: Outbox, count: int) -> tuple[str, str]:
    """Return what is known about jobs whose callbacks left no report, and what to do about it.

    :param count: the number from :meth:`Outbox.silent_callbacks`.
    """
    what = f"{count:,} jobs finished within an hour without a callback report in the outbox"
    user = outbox.refused_user()
    if user is not None:
        return (
            f"{what}: Redis refuses its user {user!r} the key {outbox.key} (NOPERM).",
            "Allow the workers' Redis user the keys ~rq_webhooks:* (ACL SETUSER).",
        )
    return (
        f"{what}: it was not written, or was lost with Redis.",
        "See the workers' logs: a callback that could not append says why there.",
    )


def age_of_oldest(redis: Redis, key: str) -> float | None:
    """Return for how many seconds the oldest entry of a stream has waited, ``None`` if the stream is empty.

    :param key: the stream's key, :attr:`Outbox.key`.
    """
    with redis.pipeline(transaction=False) as pipeline:
        pipeline.xrange(key, count=1)
        pipeline.time()
        oldest, (seconds, microseconds) = pipeline.execute()
    if not oldest:
        return None
    now_s = int(seconds) + int(microseconds) / 1e6
    return now_s - int(_text(oldest[0][0]).partition("-")[0]) / 1000


def read_until(redis: Redis, key: str | None) -> datetime | None:
    """Return when Redis received the oldest unfinished entry: every earlier one is stored in SQL by now.

    Entries stay in the stream until they are done, whether nobody has read them or their reader has died.

    :param key: the stream's key, :attr:`Outbox.key`.
    :returns: ``None`` if the stream is empty.
    """
    oldest: Any = redis.xrange(key, count=1) if key is not None else []
    if not oldest:
        return None
    milliseconds = min(_milliseconds(_text(oldest[0][0])), 10**13)  # an id may be any number
    return datetime.fromtimestamp(milliseconds // 1000, UTC) + timedelta(milliseconds=milliseconds % 1000)


def server_time(redis: Redis) -> datetime:
    """Return the time by Redis' clock."""
    answer: Any = redis.time()
    seconds, microseconds = answer
    return datetime.fromtimestamp(int(seconds), UTC) + timedelta(microseconds=int(microseconds))


def _milliseconds(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])


def _only_stream(answer: Any) -> Any:
    """Return the entries of the requested stream, whatever the protocol version's response shape."""
    if not answer:
        return []
    entries = next(iter(answer.values())) if isinstance(answer, dict) else answer[0][1]
    # redis-py 5 adds another level of nesting under RESP3.
    if (
        len(entries) == 1
        and isinstance(entries[0], list)
        and (not entries[0] or isinstance(entries[0][0], tuple))
    ):
        return entries[0]
    return entries


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
