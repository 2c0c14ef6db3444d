"""Power cuts: QEMU is killed while a database commits to a disk, and no commit may be lost.

A commit is acknowledged when its number arrives on the standard output of exec, after the
database's call has returned. After each cut a new guest mounts the disk. The database recovers, and
must have all acknowledged commits.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import msgspec

import onecopy
from onecopy.aio.options import BootOptions
from onecopy.errors import OnecopyError
from onecopy.guest.lifecycle import disks
from onecopy.guest.runtime import Runtime
from onecopy.model import Reference
from tests.workloads import places
from tests.workloads.catalogue import PYTHON, SERVERS, Root
from tests.workloads.tap import Lost

NAME = "powercut"
_DISK = "256M:/data"
_SYSTEM = "powercut-system"
#: Seconds until a guest must have committed what it is waited for.
_PATIENCE = 600.0


class Database(msgspec.Struct, frozen=True):
    """A database whose commits are counted; ``{verb}`` is ``write`` or ``check``."""

    name: str
    root: Root
    command: str
    memory: str = "256M"


DATABASES = (
    Database("sqlite-wal", PYTHON, f"python3 {places.MOUNTPOINT}/commits.py {{verb}} /data/db wal"),
    Database(
        "sqlite-delete", PYTHON, f"python3 {places.MOUNTPOINT}/commits.py {{verb}} /data/db delete"
    ),
    Database(
        "postgresql", SERVERS, f"sh {places.MOUNTPOINT}/commits.sh {{verb}} /data/cluster", "512M"
    ),
)


class Cut(msgspec.Struct, frozen=True):
    """One power cut."""

    kind: str
    """``booted`` or ``clone``."""
    accel: str
    acknowledged: int
    """Commits, of which a later guest found all."""


class _Campaign:
    """Guests on one disk, one after another."""

    def __init__(self, api: onecopy.Host, database: Database, accel: str) -> None:
        self._api, self._database, self._accel = api, database, accel
        self.used = ""

    @contextmanager
    def guest(self, kind: str) -> Iterator[onecopy.Guest]:
        """A guest of this kind, with the disk; it need not live to the end of the block."""
        if kind == "clone":
            started = self._api.start(_SYSTEM, name=NAME, disks=[_DISK], accel=self._accel)
        else:
            root = self._database.root
            started = self._api.boot(
                f"{root.name}:{root.suite}", name=NAME, disks=[_DISK], **self._options()
            )
        with started as [guest]:
            self.used = guest.record.accel
            yield guest

    def save(self) -> None:
        """Save what clones start from."""
        root = self._database.root
        self._api.save(_SYSTEM, f"{root.name}:{root.suite}", **self._options())

    def _options(self) -> BootOptions:
        return BootOptions(
            segments=[f"{places.SEGMENT}:{places.MOUNTPOINT}"],
            memory=self._database.memory,
            accel=self._accel,
            timeout=1200,
            command="",
        )

    def cut(self, kind: str, commits: int) -> tuple[int, int]:
        """Kill a guest some commits after it found the disk; return (found, acknowledged)."""
        numbers, said = _Numbers(), bytearray()
        try:
            with self.guest(kind) as guest:
                power = threading.Thread(target=_kill_after, args=(guest, numbers, commits))
                power.start()
                try:
                    command = self._database.command.format(verb="write")
                    guest.exec(["sh", "-c", command], stdout=numbers.take, stderr=said.extend)
                finally:
                    numbers.ended.set()
                    power.join()
        except OnecopyError as error:
            # A guest that is gone is what is wanted, if enough of it was seen before.
            said += error.message.encode()
        if not numbers.killed or len(numbers.all) <= commits:
            told = f"{len(numbers.all)} commits came, not {commits}"
            raise Lost(f"{self._database.name}: {told}\n{said[-3000:].decode(errors='replace')}")
        return numbers.all[0], numbers.all[-1]

    def check(self, kind: str) -> int:
        """How many commits a new guest finds."""
        with self.guest(kind) as guest:
            command = self._database.command.format(verb="check")
            return int(places.in_guest(guest, command, _PATIENCE).splitlines()[0])


class _Numbers:
    """The whole lines of numbers that came from a guest; of the last one a part may be missing."""

    def __init__(self) -> None:
        self.all: list[int] = []
        self.killed = False
        self.more, self.ended = threading.Event(), threading.Event()
        self._rest = b""

    def take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.all += map(int, lines)
        self.more.set()


def _kill_after(guest: onecopy.Guest, numbers: _Numbers, commits: int) -> None:
    """Kill a guest's QEMU once so many commits are acknowledged."""
    deadline = time.monotonic() + _PATIENCE
    while len(numbers.all) <= commits and time.monotonic() < deadline:
        if numbers.ended.is_set():
            return
        numbers.more.wait(0.5)
        numbers.more.clear()
    process = os.pidfd_open(guest.record.pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [], _PATIENCE)
    os.close(process)
    numbers.killed = True


def cuts(
    host: Runtime, database: Database, kinds: Sequence[str], random: Random, accel: str = "auto"
) -> list[Cut]:
    """Cut the power of one guest after another, each of its kind, on the same disk.

    Raises Lost if the database cannot be read, lacks what was acknowledged, or no commit came.
    """
    done: list[Cut] = []
    acknowledged = 0
    with onecopy.Host(host.store.root) as api:
        campaign = _Campaign(api, database, accel)
        try:
            if "clone" in kinds:
                campaign.save()
            for kind in kinds:
                found, last = campaign.cut(kind, random.randint(1, 12))
                _require(database, acknowledged, found)
                acknowledged = last
                done.append(Cut(kind, campaign.used, acknowledged))
            _require(database, acknowledged, campaign.check(kinds[-1]))
        finally:
            _remove(host)
    return done


def _require(database: Database, acknowledged: int, found: int) -> None:
    if found < acknowledged:
        raise Lost(f"{database.name}: {acknowledged} commits were acknowledged, {found} are there")


def _remove(host: Runtime) -> None:
    host.sweep()
    if any(disk.name == NAME for disk in disks.list_own_disks(host)):
        disks.remove(host, NAME)
    if host.store.find(Reference(_SYSTEM), "system"):
        host.store.remove(Reference(_SYSTEM))
