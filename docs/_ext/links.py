"""Follow every internal link: in the built pages, and in the sources that people read as they are.

``make links`` runs it. Addresses elsewhere are left alone, so no network is needed. Sphinx itself checks
references by name; this checks what it takes as it comes: fragments, images, paths written as literals, and
the targets of ``make`` that a page tells readers to run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
#: A literal that begins with one of these, or ends like a module, names a file here.
FOLDERS = ("docs", "tests", "flask_rq_webhooks", "example_app", "benchmarks", "requirements", ".ci")
#: What ``make docs`` makes.
BUILT = "docs/_build"

_LITERAL = re.compile(r"``([^`\s]+)``")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
_TARGET = re.compile(
    r"`[^`]*<([^`>]+)>`__?|^ *\.\. (?:image|figure|include|literalinclude):: (\S+)", re.MULTILINE
)
_MAKE = re.compile(r"(?:``|^ {4}(?:\$ )?)make ([a-z-]+(?: [a-z-]+)*)(?=``|  |$| [A-Z])", re.MULTILINE)


class _Page(HTMLParser):
    """The links of a built page, and what can be linked to within it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value is not None and (tag != "link" or value):
                self.links.append(value)


def broken_in_pages(built: Path) -> Iterator[str]:
    """Give a sentence for every link of the pages in *built* that leads nowhere."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(built.rglob("*.html"))}
    if not pages:
        yield f"{built} holds no pages"
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.is_file():
                yield f"{path.relative_to(built)}: {link}: there is no such file"
            elif fragment and target in pages and fragment not in pages[target].ids:
                yield f"{path.relative_to(built)}: {link}: there is no such place in the page"


def broken_in_source(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Give a sentence for everything that *path* points at in *root* and that is not there."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(root)
    for literal in _LITERAL.findall(text):
        if not _PATH.fullmatch(literal) or "/" not in literal or literal.startswith(BUILT):
            continue
        first = literal.partition("/")[0]
        below_package = root / FOLDERS[2] / literal
        if (first in FOLDERS or literal.endswith(".py")) and not (
            (root / literal).exists() or below_package.exists()
        ):
            yield f"{name}: ``{literal}``: there is no such file"
    for link, included in _TARGET.findall(text):
        target = link or included
        # <label> of a role, <where you found it>: no address.
        if not urlsplit(target).scheme and "/" in target and not (path.parent / target).exists():
            yield f"{name}: {target}: there is no such file"
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for words in _MAKE.findall(text):
        for word in set(words.split()) - targets:
            yield f"{name}: make {word}: there is no such target"


def sources() -> list[Path]:
    """Return the files that people read as they are."""
    return [*sorted(ROOT.glob("*.rst")), *sorted((ROOT / "docs").rglob("*.rst"))]


def main(built: str) -> int:
    """Say what is broken; return how many things are."""
    broken = [*broken_in_pages(Path(built).resolve())]
    for path in sources():
        broken += broken_in_source(path)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    print(f"{len(broken)} broken links")
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
