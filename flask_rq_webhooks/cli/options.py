"""What the commands share: times on the command line, and all output."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from ..dispatch.processes import available_processors

_AGE = re.compile(r"([0-9]{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


if TYPE_CHECKING:
    _MomentType = click.ParamType[datetime]
    _NumberType = click.ParamType[int]
else:
    _MomentType = _NumberType = click.ParamType  # generic from click 8.2 on


class Moment(_MomentType):
    """A time: ISO 8601 (UTC where no offset is given), or an age such as ``90m``, ``24h``, ``7d``."""

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
    """Return text as one line that cannot steer a terminal: control characters are written as escapes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(value))


def echo(text: object) -> None:
    """Print one line; commands print text of others, so nothing in it can steer the terminal."""
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
