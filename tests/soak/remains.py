"""All that guests and commands could leave behind on a host, as its kernel and file systems tell.

Nothing here asks onecopy, whose own word would prove nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

from onecopy.guest.runtime import Runtime


@dataclass(frozen=True)
class Remains:
    """What there is at one moment, by name."""

    processes: frozenset[str]
    """Command lines of those with this store in their environment, or that work in a run folder."""
    run: frozenset[str]
    """Of the run folder: folders of guests, marks."""
    sockets: frozenset[str]
    """Bound in the run folder."""
    leases: frozenset[str]
    work: frozenset[str]
    """Of the store's folders for what is in the making, and for live content."""
    blobs: frozenset[tuple[str, int]]
    """Names, and bytes on disk."""
    mounts: frozenset[str]
    links: frozenset[str]
    """Network interfaces, taps among them."""
    shared_memory: frozenset[str]

    @classmethod
    def look(cls, host: Runtime) -> Remains:
        """What there is now."""
        root = host.store.root
        return cls(
            processes=frozenset(_processes(host)),
            run=_names(host.run) - {".lock"},
            sockets=frozenset(_sockets(host.run)),
            leases=_names(root / "leases"),
            work=_names(root / "tmp") | _names(root / "live"),
            blobs=frozenset(
                (path.name, path.stat().st_blocks * 512)
                for path in (root / "blobs" / "sha256").iterdir()
            ),
            mounts=frozenset(Path("/proc/self/mounts").read_text().splitlines()),
            links=_names(Path("/sys/class/net")),
            shared_memory=_names(Path("/dev/shm")),
        )

    def require(self, before: Remains) -> None:
        """Raise AssertionError, saying what, unless all is as it was ``before``."""
        for field in fields(self):
            was, now = getattr(before, field.name), getattr(self, field.name)
            assert now <= was, f"{field.name} left: {sorted(now - was)}"
            assert now == was, f"{field.name} gone: {sorted(was - now)}"


def _names(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def _processes(host: Runtime) -> list[str]:
    ours = f"ONECOPY_HOME={host.store.root}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            here = (entry / "cwd").readlink().is_relative_to(host.run)
            if here or ours in (entry / "environ").read_bytes().split(b"\0"):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(f"{entry.name}: {line}")
        except OSError:  # it ended meanwhile, or is a zombie
            continue
    return found


def _sockets(run: Path) -> list[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line for line in lines if str(run) in line]
