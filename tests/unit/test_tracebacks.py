"""Type and message of a failure, from the text that RQ keeps of it, against the exception itself."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from flask_rq_webhooks.protocol.job_errors import error_from_text


def group() -> None:
    raise ExceptionGroup("several", [ValueError("one"), ExceptionGroup("inner", [KeyError("key")])])


def group_whose_text_has_lines() -> None:
    raise ExceptionGroup("first\nsecond", [ValueError("one")])


def group_while_another_is_handled() -> None:
    try:
        raise ZeroDivisionError("division")
    except ZeroDivisionError:
        group()


def group_as_a_cause() -> None:
    try:
        group()
    except ExceptionGroup as exc:
        raise RuntimeError("after the group") from exc


def traceback_in_a_message() -> None:
    raise RuntimeError('it failed:\nTraceback (most recent call last):\n  File "x.py", line 1\nKeyError: 1')


def message_with_lines() -> None:
    raise ValueError("first\nsecond: third")


def fail_with_notes() -> None:
    error = ValueError("no rain")
    error.add_note('  File "basin.py", line 7')
    error.add_note("Traceback (most recent call last):")
    error.add_note("hint: look at the gauge")
    raise error


def wrong_syntax() -> None:
    compile("a b", "<text>", "exec")


@pytest.mark.parametrize(
    "fail",
    [
        group,
        group_whose_text_has_lines,
        group_while_another_is_handled,
        group_as_a_cause,
        traceback_in_a_message,
        message_with_lines,
    ],
)
def test_text_says_what_the_exception_says(fail: Callable[[], None]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fail()
    text = "".join(traceback.format_exception(caught.value))
    error = error_from_text(text)
    assert (error["type"], error["message"]) == (type(caught.value).__name__, str(caught.value))
    assert error["traceback"] == text


def test_type_of_a_syntax_error() -> None:
    with pytest.raises(SyntaxError) as caught:
        wrong_syntax()
    error = error_from_text("".join(traceback.format_exception(caught.value)))
    assert (error["type"], error["message"]) == ("SyntaxError", "invalid syntax")


def test_notes_follow_the_message_and_do_not_hide_the_type() -> None:
    with pytest.raises(ValueError, match="no rain") as caught:
        fail_with_notes()
    found = error_from_text("".join(traceback.format_exception(caught.value)))
    assert found["type"] == "ValueError"
    assert found["message"].splitlines()[0] == "no rain"
    assert found["message"].endswith("hint: look at the gauge")
