"""The format of outbox entries, which our callbacks and web processes write, and its validation.

Every Redis client with write access can write to the stream, so entries are validated like any input. Pure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..callbacks import ENTRY_VERSION
from ..errors import OutboxEntryError
from ..protocol.events import parse_time
from ..tracing import checked

#: Maximum bytes of an entry: a result of 1 MiB, an escaped traceback of 64 Ki characters, and the rest.
MAX_ENTRY_BYTES = 2 * 2**20
#: Maximum lists and objects, including brackets in strings: in memory, an empty one takes 30 times its bytes.
MAX_CONTAINERS = 200_000
#: Maximum depth of nested containers. Results arrive already cut at 50.
MAX_DEPTH = 60
#: Maximum characters of a job's id: what a PostgreSQL index can hold besides the rest of its row.
MAX_JOB_ID = 512
#: Maximum job ids in one ``confirm`` entry.
MAX_JOBS = 10_000

_KINDS = frozenset({"success", "failure", "stopped"})
_ENDPOINT = re.compile(r"ep[0-9a-z]{1,16}_(?:[0-9a-z]{26}|all)")
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_MAX_NAME = 512

_JOB_FIELDS = dict.fromkeys((
    "v", "kind", "endpoint", "job_id", "run", "at", "func", "queue", "created_at", "enqueued_at",
    "started_at", "runid", "retries_left", "result", "result_truncated", "error",
))  # fmt: skip
_CONFIRM_FIELDS = dict.fromkeys(("v", "kind", "endpoint", "jobs"))


# Not frozen: creating a frozen one takes three times as long, for every entry.
@dataclass(slots=True, kw_only=True)
class OutboxEntry:
    """One valid entry. Times are strings as RQ writes them, or ``None``.

    :param kind: ``"success"``, ``"failure"``, ``"stopped"``: a callback's report; ``"confirm"``: jobs whose
        watches the web process could not confirm in SQL.
    :param endpoint: endpoint id, or ``ep<namespace>_all`` for a job reported to standing endpoints only.
    :param job_id: RQ's id; empty for ``"confirm"``.
    :param run: identity of the run, see :func:`~flask_rq_webhooks.protocol.events.run_key`; empty for
        ``"confirm"``.
    :param at: when Redis received the entry, unix seconds; the same clock timestamps RQ's results.
    :param retries_left: the value after the failing run; more than 0 means RQ will retry.
    :param error: ``{"type", "message", "traceback"}`` with kind ``"failure"``.
    :param trace: trace of the span in which the callback ran, if the worker has OpenTelemetry; else absent.
    :param jobs: job ids, only with ``"confirm"``.
    :param seal: encrypted by a web process, only with ``"confirm"``; see :func:`confirm_entry`.
    :param size: bytes of the JSON it was read from; 0 if it was not read from JSON.
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
    trace: str | None = None
    jobs: tuple[str, ...] = ()
    seal: str | None = None
    size: int = field(default=0, compare=False)

    def to_json(self) -> str:
        """Return the entry as JSON that :func:`parse_entry` can read."""
        if self.kind == "confirm":
            return dump_entry(confirm_entry(self.endpoint, self.jobs, seal=self.seal))
        fields = {name: getattr(self, name) for name in _JOB_FIELDS if name != "v"}
        trace = {} if self.trace is None else {"trace": self.trace}
        return dump_entry({"v": ENTRY_VERSION, **fields, **trace})


def confirm_entry(endpoint: str, jobs: Sequence[str], *, seal: str | None = None) -> dict[str, Any]:
    """Return the entry with which a web process that cannot write to SQL asks to confirm its watches.

    :param endpoint: endpoint id.
    :param jobs: ids of the jobs the request enqueued.
    :param seal: the same data again, encrypted, with each job's run and the ids of the jobs that were not in
        Redis yet: it proves that the entry comes from a web process. Without it, the entry counts only for
        jobs whose own hash names the endpoint.
    """
    entry = {"v": ENTRY_VERSION, "kind": "confirm", "endpoint": endpoint, "jobs": list(jobs)}
    return entry if seal is None else {**entry, "seal": seal}


def dump_entry(entry: Mapping[str, Any]) -> str:
    """Return *entry* as the JSON that is appended to the stream."""
    return json.dumps(entry, separators=(",", ":"), allow_nan=False)


def parse_entry(raw: bytes, *, at: float | None = None) -> OutboxEntry:
    """Return the entry that *raw* contains.

    :param raw: ASCII JSON with exactly the fields of its kind.
    :param at: when Redis received it (unix seconds); by default, the time in the entry itself.
    :raises OutboxEntryError: says what is wrong with the entry, without repeating its content at length.
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
    trace = fields.pop("trace", None)
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
        at=_unix_time(fields["at"] if at is None else at),
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
        trace=checked(*trace.split(" ", 1)) if isinstance(trace, str) else None,
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
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > MAX_CONTAINERS:
        raise OutboxEntryError(f"it has more than {MAX_CONTAINERS} lists and objects.")
    try:
        # Decode to text first: bytes would also be accepted as UTF-16 or UTF-32.
        fields = _DECODER.decode(raw.decode("ascii"))
    except RecursionError:
        raise OutboxEntryError("it is nested too deeply.") from None
    except ValueError as exc:  # also UnicodeDecodeError, JSONDecodeError, and a number too long
        raise OutboxEntryError(f"it is not JSON ({type(exc).__name__}).") from exc
    if not isinstance(fields, dict):
        raise OutboxEntryError("it is not a JSON object.")
    # Lone surrogates need an escape, and depth needs as many brackets: nearly every entry has neither.
    if b"\\u" in raw or containers >= MAX_DEPTH:
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


# Built once: building a decoder takes longer than reading a small entry.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _check_values(fields: dict[str, Any]) -> None:
    """Refuse what JSON allows but SQL or a receiver does not: deep nesting and lone surrogates."""
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


def _check_names(fields: Mapping[str, Any], expected: Mapping[str, None]) -> None:
    if fields.keys() == expected.keys():
        return
    if missing := [name for name in expected if name not in fields]:
        raise OutboxEntryError(f"it lacks {', '.join(missing)}.")
    unknown = sorted(fields.keys() - expected.keys())
    raise OutboxEntryError(f"it has the unknown field {_short(unknown[0])}.")


def _endpoint(fields: Mapping[str, Any]) -> str:
    endpoint = fields["endpoint"]
    if not isinstance(endpoint, str) or _ENDPOINT.fullmatch(endpoint) is None:
        raise OutboxEntryError(f"its endpoint {_short(endpoint)} is no endpoint id.")
    return endpoint


def _job_id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_JOB_ID or "\0" in value:
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
    # From 2001 to 2286, which every datetime can hold in every time zone.
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
