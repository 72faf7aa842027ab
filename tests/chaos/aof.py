"""Read Valkey's append-only file: every command that changed data, in the order in which it took effect.

Only the standard library. The format is the protocol of the wire, with lines ``#TS:<unix seconds>`` between
commands where ``aof-timestamp-enabled`` is on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """One command of the file.

    :param position: place in the order of effects. All commands of one transaction have the same.
    :param at: unix seconds, as of the last time line before it; 0 before the first.
    """

    position: int
    at: int
    words: tuple[bytes, ...]

    def __str__(self) -> str:
        words = " ".join(repr(word.decode("latin-1"))[1:-1] for word in self.words)
        return f"#{self.position} at {self.at}: {words[:600]}"


def encode(words: Sequence[bytes]) -> bytes:
    """Return a command as the file holds it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def parse(content: bytes) -> Iterator[Command]:
    """Give the commands of *content*; one that is cut off at the end is left out, as the server does."""
    place = position = at = 0
    in_transaction = False
    while place < len(content):
        end = content.find(b"\r\n", place)
        if end < 0:
            return
        line, place = content[place:end], end + 2
        if line.startswith(b"#TS:"):
            at = int(line[4:])
            continue
        if not line.startswith(b"*"):
            raise ValueError(f"byte {place} of the append-only file is no command: {line[:40]!r}")
        words: list[bytes] = []
        for _ in range(int(line[1:])):
            end = content.find(b"\r\n", place)
            if end < 0:
                return
            length, place = int(content[place + 1 : end]), end + 2
            if place + length + 2 > len(content):
                return
            words.append(content[place : place + length])
            place += length + 2
        name = words[0].upper()
        if name == b"MULTI":
            in_transaction = True
            position += 1
        elif name == b"EXEC":
            in_transaction = False
        else:
            position += not in_transaction
            yield Command(position, at, tuple(words))


def read(folder: Path) -> list[Command]:
    """Return the commands of the files that the manifest in *folder* (``appendonlydir``) names.

    :raises ValueError: a base file is an RDB snapshot, so that commands are missing.
    """
    (manifest,) = folder.glob("*.manifest")
    content = b""
    for line in manifest.read_text().splitlines():
        words = line.split()
        part = (folder / words[words.index("file") + 1]).read_bytes()
        if part.startswith((b"REDIS", b"VALKEY")):
            raise ValueError(f"{words[1]} is a snapshot: set aof-use-rdb-preamble no, and no rewriting")
        content += part
    return list(parse(content))
