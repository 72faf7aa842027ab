"""Machines made of network namespaces: a bridge in the first, a cable from it to each of the others.

Names begin with the process id, so that nobody else's namespaces are touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """Return why namespaces cannot be made here, or ``None``."""
    if shutil.which("ip") is None:
        return "the ip command (Debian: iproute2) is not installed"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"rqw{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode != 0:
        return f"network namespaces cannot be made: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Machine:
    """One namespace.

    :param name: of the namespace.
    :param cable: its end of the cable at the hub; empty for the hub itself.
    """

    name: str
    address: str
    cable: str = ""
    hub: str = ""

    def command(self, *arguments: str) -> tuple[str, ...]:
        """Return the command line that runs *arguments* on this machine."""
        return ("ip", "netns", "exec", self.name, *arguments)

    def cut_off(self) -> None:
        """Take the cable out of the switch: packets vanish without an error."""
        _ip("-n", self.hub, "link", "set", self.cable, "nomaster")

    def bring_back(self) -> None:
        """Put the cable back."""
        _ip("-n", self.hub, "link", "set", self.cable, "master", "switch")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread, and the threads and processes it starts, be on this machine."""
        with ExitStack() as stack:
            before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            stack.callback(os.close, before)
            here = os.open(Path("/run/netns") / self.name, os.O_RDONLY)
            stack.callback(os.close, here)
            _setns(here)
            try:
                yield
            finally:
                _setns(before)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def network(*names: str) -> Iterator[list[Machine]]:
    """Give machines on one network, the first of them the hub; nothing is left afterwards."""
    prefix = f"rqw{os.getpid()}-"
    hub = Machine(prefix + names[0], "10.231.0.1")
    machines = [hub]
    made: list[str] = []
    try:
        for number, name in enumerate(names, 1):
            _ip("netns", "add", prefix + name)
            made.append(prefix + name)
            _ip("-n", prefix + name, "link", "set", "lo", "up")
            if number == 1:
                # An address of its own: otherwise it has that of one of the cables, and changes with them.
                _ip("-n", hub.name, "link", "add", "switch", "address", "02:00:0a:e7:00:01", "type", "bridge")
                _ip("-n", hub.name, "addr", "add", f"{hub.address}/24", "dev", "switch")
                _ip("-n", hub.name, "link", "set", "switch", "up")
                continue
            machine = Machine(prefix + name, f"10.231.0.{number}", cable=f"to-{name}", hub=hub.name)
            _ip("-n", hub.name, "link", "add", machine.cable, "type", "veth",
                "peer", "name", "eth0", "netns", machine.name)  # fmt: skip
            _ip("-n", hub.name, "link", "set", machine.cable, "master", "switch", "up")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            _ip("-n", machine.name, "link", "set", "eth0", "up")
            machines.append(machine)
        yield machines
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)
