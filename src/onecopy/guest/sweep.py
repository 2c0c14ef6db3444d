"""Removes the leftovers of killed commands and ended VMMs from the run directories.

Every command sweeps at its start. A VMM is killed before its files are removed. No code waits for a
guest or another command while it holds a lock. A file that cannot be removed is reported once, and
left to the next sweep. Not here: leftovers in the store (store/collect.py).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

from onecopy.guest import ended_guests
from onecopy.guest.ended_guests import Deaths
from onecopy.guest.run_directory import POOL, RunDirectory, is_mark
from onecopy.linux import vmm_registry
from onecopy.linux.lock import is_left, take_over
from onecopy.linux.removal import remove_tree
from onecopy.linux.vmm_registry import Entry, Process
from onecopy.store import Store
from onecopy.store.leftovers import tolerate_failure, warn
from onecopy.vmm import fork_registry


class Swept(Protocol):
    """The part of `Runtime` that a sweep needs."""

    @property
    def store(self) -> Store: ...
    @property
    def run(self) -> Path: ...
    def folders(self) -> list[Path]: ...
    def on_record(self, name: str = "", /) -> list[Entry]: ...
    def processes(self, names: list[str], /) -> list[tuple[str, Process]]: ...
    def remove(self, *folders: RunDirectory) -> None: ...
    def locked(self) -> contextlib.AbstractContextManager[int]: ...


def sweep(host: Swept) -> None:
    """Remove what no living command or VMM owns, and resume guests that were left paused."""
    with host.locked():
        unwanted = _unwanted(host)
    if unwanted:
        vmm_registry.end(unwanted)
    with host.locked():
        _sweep_folders(host)
    if unwanted:
        # Only now their leases are stale.
        host.store.sweep()
    left = [path for path in host.folders() if RunDirectory(path).left_paused]
    if left:
        # Rare, and it needs an event loop and QEMU's monitor.
        from onecopy.guest.resume import go_on

        go_on(left)
    _sweep_stores(host.run)
    with tolerate_failure(host.run.parent):
        fork_registry.sweep()


def _unwanted(host: Swept) -> list[Process]:
    """Return the VMMs of killed commands and ended owners."""
    abandoned = [path.name for path in host.folders() if RunDirectory(path).abandoned]
    found = [process for _, process in host.processes(abandoned)] if abandoned else []
    # A standby VMM without its run directory cannot be used.
    return found + [
        entry.process
        for entry in host.on_record()
        if entry.holder.startswith(POOL) and not (host.run / entry.holder).exists()
    ]


def _sweep_folders(host: Swept) -> None:
    there, deaths = host.folders(), Deaths()
    ended_guests.sweep(host.run)
    for path in there:
        with tolerate_failure(path):
            folder = RunDirectory(path)
            if folder.abandoned:
                _remove(host, folder)
            elif not host.store.is_held(path.name):
                preserve(host, deaths, folder)
                _remove(host, folder)
    for path in host.run.iterdir():
        if is_mark(path):
            with tolerate_failure(path):
                if is_left(path):
                    path.unlink(missing_ok=True)
    names = {path.name for path in there}
    for entry in host.on_record():
        if entry.holder not in names and not entry.process.lives():
            with tolerate_failure(entry.path):
                entry.forget()


def preserve(host: Swept, deaths: Deaths, folder: RunDirectory) -> None:
    """Keep the record and logs of an ended guest before its directory is removed; needs the lock.

    A guest that a command ended, or that was never ready, leaves no record.
    """
    if folder.is_being_ended or not (left := ended_guests.look(folder, _uid(host, folder), deaths)):
        return
    if _kept(host.run, left):
        # Its own logs may fill the disk. Free them and try again.
        folder.remove()
        if why := _kept(host.run, left):
            import logging  # few commands need it

            log = logging.getLogger("onecopy")
            log.warning("onecopy: the logs of %s are lost: %s", folder.name, why)


def _kept(run: Path, left: ended_guests.Left) -> str:
    """Store the record of an ended guest; return the reason of a failure, else ""."""
    try:
        ended_guests.keep(run, left)
    except OSError as error:
        return error.strerror or "unknown error"
    return ""


def _uid(host: Swept, folder: RunDirectory) -> int:
    return next((each.uid for each in host.on_record(folder.name)), -1)


def _remove(host: Swept, folder: RunDirectory) -> None:
    if any(each.process.lives() for each in host.on_record(folder.name)):
        warn(folder.path, "its QEMU cannot be killed")
        return
    host.remove(folder)
    if folder.path.exists():
        warn(folder.path, "a file in it cannot be removed")


def _sweep_stores(run: Path) -> None:
    """Remove the run directories of stores that no longer exist and have no VMM left."""
    for store in vmm_registry.stores() - {run.name}:
        if not (run.parent / store).exists():
            _forget_dead(vmm_registry.of_store(store))
    others = [
        path
        for path in run.parent.iterdir()
        if path != run and (path / vmm_registry.STORE).exists()
    ]
    gone = [path for path in others if _is_gone(path)]
    if not gone:
        return
    for path in gone:
        theirs = vmm_registry.of_store(path.name)
        if any(entry.process.lives() for entry in theirs):
            continue  # `ps` shows it (lost_vmms.py)
        with tolerate_failure(path), take_over(path / ".lock") as lock:
            if lock is not None and _is_gone(path):
                warn(path, remove_tree(path))
                _forget_dead(theirs)


def _forget_dead(entries: list[Entry]) -> None:
    for entry in entries:
        if not entry.process.lives():
            entry.forget()


def _is_gone(run: Path) -> bool:
    with contextlib.suppress(OSError):
        root = Path(os.fsdecode((run / vmm_registry.STORE).read_bytes()))
        return root.is_absolute() and not vmm_registry.is_store(root, run.name)
    return False
