"""What a database error means: unavailable, not allowed, no tables, try again, or a bad row.

Decided by SQLSTATE on PostgreSQL, whatever the driver; by result code on SQLite; and by the class of the
error if there is neither, as for a connection that could not be opened.
"""

from __future__ import annotations

from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError as ArgumentError
from sqlalchemy.exc import DataError as DataError
from sqlalchemy.exc import DBAPIError as DBAPIError
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import NoSuchModuleError as NoSuchModuleError
from sqlalchemy.exc import SQLAlchemyError as SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ..errors import StorageUnavailableError

#: Classes of SQLSTATE (PostgreSQL, appendix A) that are about the connection, the server or the transaction,
#: and not about a statement: connection, transaction state, rollback, resources, operator, system.
_UNAVAILABLE_CLASSES = frozenset({"08", "25", "28", "3D", "40", "53", "55", "57", "58", "F0", "XX"})
#: Serialization failure and deadlock: PostgreSQL says to try again.
_TRY_AGAIN = frozenset({"40001", "40P01"})
#: Primary result codes of SQLite that are about the file and not about a statement: internal, perm, abort,
#: busy, locked, nomem, readonly, interrupt, ioerr, corrupt, full, cantopen, protocol, nolfs, auth, notadb.
_SQLITE_UNAVAILABLE = frozenset({2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 22, 23, 26})
#: Those of them that another process causes and will end: busy, locked.
_SQLITE_BUSY = frozenset({5, 6})
#: Classes of SQLSTATE that need an operator: authorization, no such database, name or privilege.
_REFUSED_CLASSES = frozenset({"28", "3D", "3F", "42"})
#: The same for refused connections, which drivers report without SQLSTATE.
_REFUSALS = (
    "authentication failed",
    "does not exist",
    "pg_hba.conf",
    "no password",
    "not permitted to log in",
)


def sqlstate(exc: BaseException) -> str:
    """Return PostgreSQL's five-character error code; empty for other errors."""
    orig = getattr(exc, "orig", exc)
    return getattr(orig, "sqlstate", None) or getattr(orig, "pgcode", None) or ""


def _is_unavailable(exc: DBAPIError | PoolTimeoutError, state: str) -> bool:
    if isinstance(exc, PoolTimeoutError) or exc.connection_invalidated:
        return True
    if state:
        return state[:2] in _UNAVAILABLE_CLASSES
    code = getattr(exc.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_UNAVAILABLE
    return isinstance(exc, OperationalError | InterfaceError)


def is_missing_schema(exc: SQLAlchemyError) -> bool:
    """Return whether *exc* means that a table or column of ours does not exist."""
    if not isinstance(exc, DBAPIError):
        return False
    reason = str(exc.orig)
    state = sqlstate(exc)
    if state:
        ours = "rq_webhooks_" in reason or "rq_webhooks_" in (exc.statement or "")
        return ours and state in ("42P01", "42703", "3F000")
    missing = ("no such table: ", "no such column: ", "no such index: ix_rq_webhooks_")
    return (reason.startswith(missing) and "rq_webhooks_" in (exc.statement or "")) or (
        " has no column named " in reason and "table rq_webhooks_" in reason
    )


def is_about_a_row(exc: BaseException) -> bool:
    """Return whether *exc* is about the values to be stored, so that other rows may succeed."""
    if isinstance(exc, StorageUnavailableError):
        return False
    return not isinstance(exc, DBAPIError) or isinstance(exc, DataError | IntegrityError)


def may_try_again(exc: StorageUnavailableError) -> bool:
    """Return whether the same transaction may succeed at once: on a new connection, or after another one."""
    cause = exc.__cause__
    return isinstance(cause, DBAPIError) and (cause.connection_invalidated or sqlstate(cause) in _TRY_AGAIN)


def is_overtaken(exc: StorageUnavailableError) -> bool:
    """Return whether another SQLite writer was faster."""
    orig = getattr(exc.__cause__, "orig", None)
    return getattr(orig, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BUSY


def is_away(exc: StorageUnavailableError) -> bool:
    """Return whether waiting may help: the database is down, starting or busy, but does not refuse us."""
    cause = exc.__cause__
    if not isinstance(cause, DBAPIError):
        return True
    code = getattr(cause.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_BUSY
    state = sqlstate(cause)
    if state:
        return state[:2] not in _REFUSED_CLASSES
    return not is_missing_schema(cause) and not any(words in str(cause.orig) for words in _REFUSALS)


def why_unavailable(exc: DBAPIError | PoolTimeoutError, url: URL, schema: str | None) -> str | None:
    """Return one sentence for an error that is not about our statement or its values, else ``None``."""
    where = f"The database of flask_rq_webhooks ({url!r})"
    reason = " ".join(str(getattr(exc, "orig", exc)).partition("\nLINE ")[0].split())
    if is_missing_schema(exc):
        return (
            f"{where}: the tables of flask_rq_webhooks are missing or older than this version; run `flask "
            f"rq-webhooks init-db` or your migrations: {reason}"
        )
    state = sqlstate(exc)
    if state == "42501":
        return f"{where} refuses us: {reason}; let its owner run `{_grant(reason, url, schema or 'public')}`."
    if not _is_unavailable(exc, state):
        return None
    if "readonly database" in reason:
        reason += "; give this process the right to write the file and its folder"
    return f"{where} cannot be used now: {type(exc).__name__}: {reason}"


def _grant(reason: str, url: URL, schema: str) -> str:
    if "for schema" in reason:
        return f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {url.username}"
    if "owner of" in reason:
        return "flask rq-webhooks init-db"
    return f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {url.username}"
