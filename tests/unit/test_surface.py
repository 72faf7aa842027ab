"""The surface: nothing that users see by name gets lost or changes without being decided.

A red test here means: a setting, a public name, a route, a header, a payload, a column, a command or a JSON
key is not what it was. If nobody decided that, the code is wrong. If it was decided, write it into
``CHANGES.rst`` (Unreleased) and renew the snapshot with ``python -m tests.unit.surface``.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

import pytest

from tests.unit.surface import RENEW, SECTIONS, SNAPSHOT, as_text


def difference(name: str, expected: Any, found: Any) -> str:
    """Return what differs, line by line, and what to do about it; empty where nothing does."""
    lines = list(
        difflib.unified_diff(
            as_text(expected).splitlines(),
            as_text(found).splitlines(),
            "surface.json",
            "found now",
            "",
            "",
            4,
            "",
        )
    )
    if not lines:
        return ""
    return "\n".join(
        [
            f"What users see has changed ({name}):",
            *lines,
            "Not decided? Then repair the code. Decided? Add a line to CHANGES.rst (Unreleased),",
            f"run `{RENEW}` and commit both together.",
        ]
    )


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_users_see_what_they_saw(name: str) -> None:
    expected = json.loads(SNAPSHOT.read_text())[name]
    # Compared as JSON, as it is in the file.
    found = json.loads(as_text(SECTIONS[name]()))
    said = difference(name, expected, found)
    if said:
        pytest.fail(said, pytrace=False)


def test_the_snapshot_is_of_these_sections() -> None:
    """A section that nobody collects any more would freeze nothing."""
    text = SNAPSHOT.read_text()
    snapshot = json.loads(text)
    assert sorted(snapshot) == sorted(SECTIONS)
    assert all(snapshot.values())
    assert text == as_text(snapshot) + "\n", f"edited by hand; run `{RENEW}`"


def test_a_lost_name_is_shown_and_says_what_to_do() -> None:
    expected = {"RQ_WEBHOOKS_TIMEOUT": {"default": "15.0"}, "RQ_WEBHOOKS_BATCH": {"default": "500"}}
    said = difference("settings", expected, {"RQ_WEBHOOKS_TIMEOUT": {"default": "10.0"}})
    assert '-  "default": "15.0"' in said
    assert '+  "default": "10.0"' in said
    assert '- "RQ_WEBHOOKS_BATCH": {' in said
    assert RENEW in said
    assert "CHANGES.rst" in said
    assert difference("settings", expected, expected) == ""
