"""Shared by the commands: times on the command line, output, and errors as one sentence with the fix.

Commands use :func:`explain` for errors that end them, and ``doctor`` uses it for what its checks find.
"""

from __future__ import annotations

import errno
import json
import re
import socket
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from ..dispatch.processes import available_processors
from ..errors import RQWebhooksError, StorageUnavailableError
from ..queue.redis_database import database_name
from ..storage.sql_errors import ArgumentError, NoSuchModuleError, SQLAlchemyError

if TYPE_CHECKING:
    from ..state import State

_AGE = re.compile(r"([0-9]{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


if TYPE_CHECKING:
    _MomentType = click.ParamType[datetime]
    _NumberType = click.ParamType[int]
else:
    _MomentType = _NumberType = click.ParamType  # generic from click 8.2 on


class Moment(_MomentType):
    """A time: ISO 8601 (UTC if no offset is given), or an age such as ``90m``, ``24h``, ``7d``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return *value* as an aware time."""
        if isinstance(value, datetime):
            return value
        if match := _AGE.fullmatch(value):
            return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is neither ISO 8601 nor an age such as 90m, 24h or 7d.", param, ctx)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


MOMENT = Moment()


class ProcessCount(_NumberType):
    """A number of processes, or ``auto``: as many as there are processors."""

    name = "number|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return *value* as a number from 1 to 64."""
        if value == "auto":
            return available_processors()
        if str(value).isdecimal() and 1 <= int(value) <= 64:
            return int(value)
        self.fail(f"{value!r} is neither a number from 1 to 64 nor auto.", param, ctx)


def cleaned(value: object) -> str:
    """Return text as one line that cannot control a terminal: control characters are written as escapes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(value))


def echo(text: object) -> None:
    """Print one cleaned line: commands print other people's text, which must not control the terminal."""
    click.echo(cleaned(text))


def progress_to_stderr(done: int) -> None:
    """Show the progress of long work on a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r{done} …", nl=False, err=True)


#: Option of a command whose output is data.
as_json = click.option("--json", "json_wanted", is_flag=True, help="Print JSON, for programs.")


def echo_json(value: Any) -> None:
    """Print *value* as JSON; times as ISO 8601."""
    click.echo(json.dumps(value, indent=2, default=datetime.isoformat))


# -- errors -----------------------------------------------------------------------------------------------

#: Errors that :func:`explain` accepts. Any other error is a bug and keeps its traceback.
EXPLAINED = (RQWebhooksError, RedisError, RecursionError, SQLAlchemyError, ModuleNotFoundError)


def explain(exc: Exception, state: State | None) -> str:
    """Return one sentence about *exc* that says what to do.

    :param state: the app's state; ``None`` if it has none.
    """
    if isinstance(exc, RQWebhooksError):
        text = str(exc)
        if state is not None and isinstance(exc, StorageUnavailableError) and "cannot be used now" in text:
            text = f"{text.rstrip('.')}; start the database, or correct {sql_source(state)}."
    elif state is None:
        text = f"{type(exc).__name__}: {exc}"
    elif isinstance(exc, RedisError | RecursionError):
        text = of_redis(exc, state)
    else:
        text = of_sql(exc, state)
    return " ".join(text.split())


def of_redis(exc: Exception, state: State) -> str:
    """Return what *exc* says about Redis, and what to do."""
    name = database_name(state.redis)
    if isinstance(exc, AuthenticationError | RecursionError):
        # redis-py 5 calls itself without end if a password is required and none was given.
        why = exc if isinstance(exc, AuthenticationError) else "a password is required"
        return f"{name} refuses us ({why}); correct user name and password in {redis_source(state)}."
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return (
            f"the certificate of {name} is not trusted ({exc}); for one of your own authority append "
            f"`?ssl_ca_certs=/path/to/ca.pem&ssl_cert_reqs=required` to the URL in {redis_source(state)}."
        )
    if isinstance(exc, NoPermissionError):
        return f"{name} allows our user too little ({exc}); give it the rights of RQ."
    if str(exc).startswith("READONLY"):
        return f"{name} is a replica, which takes no writes; name its primary in {redis_source(state)}."
    return (
        f"{name} does not answer ({type(exc).__name__}: {exc}); start it, or correct {redis_source(state)}."
    )


def of_sql(exc: Exception, state: State) -> str:
    """Return what *exc* says about the database, and what to do; never a URL, which has a password."""
    where = sql_source(state)
    if isinstance(exc, ModuleNotFoundError):
        return (
            f"{where} needs the driver {exc.name!r}, which is not installed; for PostgreSQL run `pip install "
            "'flask-rq-webhooks[postgres]'` and begin the URL with postgresql+psycopg://."
        )
    if isinstance(exc, ArgumentError):
        why = "no such dialect" if isinstance(exc, NoSuchModuleError) else type(exc).__name__
        return (
            f"{where} is not usable ({why}); write it as postgresql+psycopg://user:password@host/database or "
            "sqlite:///file."
        )
    said = str(getattr(exc, "orig", exc)).strip().partition("\n")[0]
    return (
        f"the database refused ({type(exc).__name__}: {said}); allow our user to use our tables, or correct "
        f"{where}."
    )


def sql_source(state: State) -> str:
    """Return the name of the setting that says where the database is."""
    if state.settings.database_uri is not None:
        return "RQ_WEBHOOKS_DATABASE_URI"
    bind_key = state.settings.bind_key
    return f"SQLALCHEMY_BINDS[{bind_key!r}]" if bind_key else "SQLALCHEMY_DATABASE_URI"


def redis_source(state: State) -> str:
    """Return the name of the argument or setting that says where Redis is."""
    return "what RQWebhooks(redis=...) gets" if state.redis_is_given else "RQ_WEBHOOKS_REDIS_URL"


def of_port(exc: OSError, host: str, port: int) -> str:
    """Return why nothing can listen on *host* and *port*, and what to do."""
    if exc.errno == errno.EADDRINUSE:
        return (
            f"Port {port} on {host} is in use by another process; end that one, or choose another with "
            "--port (0 for any free one)."
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return f"Port {port} on {host} is reserved for privileged users; choose one above 1023 with --port."
    if isinstance(exc, socket.gaierror) or exc.errno == errno.EADDRNOTAVAIL:
        return f"{host!r} is not an address of this machine; choose one with --host, such as 127.0.0.1."
    return f"Nothing can listen on {host} port {port} ({exc}); choose others with --host and --port."
