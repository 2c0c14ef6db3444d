"""VMMs that run though not all of them is there: without their lease's lock, run folder or store.

Only a VMM that misbehaves lets go of its lease; folders are removed behind onecopy's back. Such a
VMM is shown, and can be ended, by its record (linux/vmm_registry.py); root's also by their user
numbers, which nothing else has, if the records are gone, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from onecopy.errors import Incompatible, NotFound, OnecopyError
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.linux import process, vmm_registry
from onecopy.linux.run_base import run_base
from onecopy.linux.vmm_registry import Entry, Process
from onecopy.model import check_name, in_order
from onecopy.vmm.vmm_user import GUESTS

#: The kind of a guest of which no more than its process is known.
LOST = "lost"
_GUEST = re.compile("\0-name\0guest=([^,\0]{1,63})")
#: A VMM has a mount namespace of its own.
_NAMESPACES = ("root", "ns/pid")


def shown(host: Runtime) -> list[GuestRecord]:
    """All that run, by name, each with what is wrong with it in its ``note``.

    A guest of which only the VMM is left is of the kind ``lost``.
    """
    guests = [_noted(host, record) for record in host.guests()]
    return sorted(guests + lost(host), key=lambda record: in_order(record.name))


def find(host: Runtime, name: str) -> GuestRecord:
    """A running guest, whatever is left of it; raise NotFound."""
    try:
        return host.guest(name).record()
    except (NotFound, Incompatible):
        for record in lost(host):
            if record.name == name:
                return record
        raise


def lost(host: Runtime) -> list[GuestRecord]:
    """What runs and is no guest any more: its run folder, store or record is gone."""
    with host.locked():  # nothing is renamed meanwhile
        known = vmm_registry.entries()
        found = [(each, note) for each in known if (note := _what_is_lost(host, each))]
    records = [
        _record(each.holder, each.process, note) for each, note in found if each.process.lives()
    ]
    if os.geteuid() == 0:
        records += _strays({each.process for each in known})
    return records


def _noted(host: Runtime, record: GuestRecord) -> GuestRecord:
    if host.store.is_locked(record.name) or not record.process.lives():
        return record
    return replace(record, note="QEMU has let go of its lease: do not trust this guest")


def _what_is_lost(host: Runtime, entry: Entry) -> str:
    """What a VMM on record is without; "" if it is as it should be, or another store's."""
    if entry.store != host.run.name:
        return f"its store {entry.root} was removed" if entry.is_orphan else ""
    folder = RunDirectory(host.run / entry.holder)
    if not folder.path.exists():
        return "its run folder was removed"
    try:
        folder.record()
    except NotFound:
        return "" if folder.is_starting or folder.prepared() else "its record was removed"
    except OnecopyError as error:
        return error.message
    return ""


def _strays(known: set[Process]) -> list[GuestRecord]:
    """Processes of root's guests that are not on record."""
    return [
        _record(name, stray, "it is on no record: the run folders were removed")
        for name, stray in _of_guests()
        if stray not in known
    ]


def _of_guests() -> Iterator[tuple[str, Process]]:
    """(name, process) of what runs as a user that only guests of this host have."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, OnecopyError):
            pid = int(folder.name)
            uid = folder.stat().st_uid
            if uid in GUESTS and _is_here(folder) and not _has_run_folder(folder):
                name, began = _name_of(pid), process.stat(pid).start_ticks
                # Programs that read what guests wrote are such users, too, but somebody's children.
                if name or b"\nPPid:\t1\n" in (folder / "status").read_bytes():
                    yield name or f"uid-{uid}", Process(pid, began)


def _is_here(folder: Path) -> bool:
    """Whether a process is no container's, which may give out the same numbers."""
    return all(
        (folder / name).readlink() == Path("/proc/self", name).readlink() for name in _NAMESPACES
    )


def _has_run_folder(folder: Path) -> bool:
    """Whether a process works in a run folder that is there: then a store knows it.

    Only a VMM of that folder can be in it: nobody else but root reaches it. The folder need not be
    one that is seen from here: in a chroot or a mount namespace /run may be another one.
    """
    where = folder / "cwd"
    return where.readlink().is_relative_to(run_base()) and where.stat().st_nlink > 0


def _name_of(pid: int) -> str:
    """What a VMM was started as; "" if it says no name that one can have."""
    match = _GUEST.search("\0".join(process.cmdline(pid)))
    with contextlib.suppress(OnecopyError):
        return check_name(match[1]) if match else ""
    return ""


def _record(name: str, lost_: Process, note: str) -> GuestRecord:
    return GuestRecord(
        name=name,
        kind=LOST,
        source="",
        digest="",
        accel="",
        accel_reason="",
        pid=lost_.pid,
        start_ticks=lost_.start_ticks,
        started=_started(lost_),
        start_seconds=0,
        memory=0,
        ram_path=None,
        agent=False,
        note=note,
    )


def _started(of: Process) -> float:
    """Seconds since the epoch."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + of.start_ticks / os.sysconf("SC_CLK_TCK")
