"""Finds running VMMs that have lost their lease, run directory or store.

Only a malicious VMM releases its lease. Directories may be removed without onecopy. Such a VMM is
found by its registry entry (linux/vmm_registry.py), so that it can be listed and ended. Root's VMMs
are also found by their user IDs, which only guests have, even without an entry.
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

#: The kind of a guest of which only the process is known.
LOST = "lost"
_GUEST = re.compile("\0-name\0guest=([^,\0]{1,63})")
#: Namespaces that a VMM shares with the host. Its mount namespace is its own.
_NAMESPACES = ("root", "ns/pid")


def shown(host: Runtime) -> list[GuestRecord]:
    """Return the records of all running guests, by name.

    ``note`` describes a guest's damage. A guest of which only the VMM is left is of kind ``lost``.
    """
    guests = [_with_note(host, record) for record in host.guests()]
    return sorted(guests + lost(host), key=lambda record: in_order(record.name))


def find(host: Runtime, name: str) -> GuestRecord:
    """Return the record of a running guest, even a damaged one.

    Raises:
        NotFound: There is no such guest.
    """
    try:
        return host.guest(name).record()
    except (NotFound, Incompatible):
        for record in lost(host):
            if record.name == name:
                return record
        raise


def lost(host: Runtime) -> list[GuestRecord]:
    """Return the VMMs that run without a run directory, store or record."""
    with host.locked():  # nothing is renamed meanwhile
        known = vmm_registry.entries()
        found = [(each, note) for each in known if (note := _what_is_lost(host, each))]
    records = [
        _record(each.holder, each.process, note) for each, note in found if each.process.lives()
    ]
    if os.geteuid() == 0:
        records += _strays({each.process for each in known})
    return records


def _with_note(host: Runtime, record: GuestRecord) -> GuestRecord:
    if host.store.is_locked(record.name) or not record.process.lives():
        return record
    return replace(record, note="QEMU has released its lease: do not trust this guest")


def _what_is_lost(host: Runtime, entry: Entry) -> str:
    """Describe what a registered VMM lacks; "" if nothing, or if it belongs to another store."""
    if entry.store != host.run.name:
        return f"its store {entry.root} was removed" if entry.is_orphan else ""
    folder = RunDirectory(host.run / entry.holder)
    if not folder.path.exists():
        return "its run directory was removed"
    try:
        folder.record()
    except NotFound:
        return "" if folder.is_starting or folder.prepared() else "its record was removed"
    except OnecopyError as error:
        return error.message
    return ""


def _strays(known: set[Process]) -> list[GuestRecord]:
    """Return the processes of root's guests that are not registered."""
    return [
        _record(name, stray, "it is not registered: the run directories were removed")
        for name, stray in _of_guests()
        if stray not in known
    ]


def _of_guests() -> Iterator[tuple[str, Process]]:
    """Yield (name, process) of the processes that run with a user ID of guests."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, OnecopyError):
            pid = int(folder.name)
            uid = folder.stat().st_uid
            if uid in GUESTS and _is_here(folder) and not _has_run_folder(folder):
                name, began = _name_of(pid), process.stat(pid).start_ticks
                if name or _is_vmm(pid):
                    yield name or f"uid-{uid}", Process(pid, began)


def _is_vmm(pid: int) -> bool:
    """Whether it is no confined tool: these have such user IDs, too, but a command as parent."""
    from onecopy.vmm import fork_server  # there is rarely such a process

    parent = process.parent(pid)
    return parent == 1 or fork_server.is_server(parent)


def _is_here(folder: Path) -> bool:
    """Return whether a process is not in a container, which may use the same user IDs."""
    return all(
        (folder / name).readlink() == Path("/proc/self", name).readlink() for name in _NAMESPACES
    )


def _has_run_folder(folder: Path) -> bool:
    """Return whether a process's working directory is an existing run directory.

    Then it is the VMM of that directory: only that VMM and root can enter. The directory may be
    invisible from here: in a chroot or a mount namespace /run may be another one.
    """
    where = folder / "cwd"
    return where.readlink().is_relative_to(run_base()) and where.stat().st_nlink > 0


def _name_of(pid: int) -> str:
    """Return the guest name on a VMM's command line; "" if there is no valid one."""
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
    """Return the start time of a process in seconds since 1970."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + of.start_ticks / os.sysconf("SC_CLK_TCK")
