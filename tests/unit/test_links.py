"""The link checker of the documentation: it finds what is broken, and nothing is in the sources."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.servers import ROOT


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "_ext" / "links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = load()


@pytest.mark.parametrize("path", links.sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_sources_point_at_is_there(path: Path) -> None:
    assert list(links.broken_in_source(path)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see ``docs/gone.rst``", "``docs/gone.rst``: there is no such file"),
        ("see ``docs/here.rst`` and ``protocol/here.py``", None),
        ("see ``protocol/gone.py``", "``protocol/gone.py``: there is no such file"),
        ("a ``/path/of/yours`` and ``your/own`` too", None),
        (".. image:: docs/gone.png", "docs/gone.png: there is no such file"),
        ("`here <docs/here.rst>`_ and `there <https://example.com/x>`_", None),
        ("`there <docs/gone.rst>`_", "docs/gone.rst: there is no such file"),
        ("run ``make all``, then ``make gone``", "make gone: there is no such target"),
        ("    make all        # everything", None),
        ("    make gone      # nothing", "make gone: there is no such target"),
        ("we make do with what is there", None),
    ],
)
def test_in_sources(tmp_path: Path, text: str, expected: str | None) -> None:
    for name in ("docs/here.rst", "flask_rq_webhooks/protocol/here.py", "Makefile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("all:\n")
    page = tmp_path / "README.rst"
    page.write_text(text + "\n")

    assert list(links.broken_in_source(page, tmp_path)) == ([f"README.rst: {expected}"] if expected else [])


def test_in_pages(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html">1</a><a href="b.html#there">2</a><a href="#top">3</a>'
        '<a href="https://example.com/gone">4</a><a href="b.html#gone">5</a><a href="gone.html">6</a>'
        '<a href="#gone">7</a><img src="gone.png"><script src="b.html"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="there">B</p>')

    assert list(links.broken_in_pages(tmp_path)) == [
        "a.html: b.html#gone: there is no such place in the page",
        "a.html: gone.html: there is no such file",
        "a.html: #gone: there is no such place in the page",
        "a.html: gone.png: there is no such file",
    ]


def test_no_pages_are_no_success(tmp_path: Path) -> None:
    assert list(links.broken_in_pages(tmp_path)) == [f"{tmp_path} holds no pages"]
