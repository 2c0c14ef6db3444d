"""Guests that ended by themselves stay known: their record, why, and what was printed last.

::

    RUN/.ended/NAME/    guest.json, which says why; console.log and qemu.log (vmm/logs.py)
    RUN/.ended/.new     one in the making

All of it is ours, and small: nothing of the guest's user is left. The oldest go when there are too
many, each with the next guest of its name, all with the host's next boot. Who changes something
here has the host's lock (Host.locked). Not here: which guests ended by themselves (sweep.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import cached_property
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import Incompatible, NotFound
from onecopy.guest import end_reason
from onecopy.guest.end_reason import Ended
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.linux import cgroup, kmsg
from onecopy.linux.kmsg import Death
from onecopy.linux.removal import remove_tree
from onecopy.model import in_order
from onecopy.vmm import logs

_FOLDER = ".ended"
_NEW = ".new"
#: How many are kept, and how many bytes of each of their two logs.
MOST, KEPT = 100, 64 << 10
_TICKS = os.sysconf("SC_CLK_TCK")


class Left(msgspec.Struct, frozen=True):
    """What is to be kept of one guest."""

    record: GuestRecord
    """With its end."""
    said: dict[str, logs.Tail]


class Deaths:
    """What the host's kernel says of processes that it ended; it is asked once, if at all."""

    @cached_property
    def _found(self) -> list[Death]:
        return kmsg.deaths()

    def why(self, record: GuestRecord, uid: int) -> str:
        """Why the VMM of a guest, which ran as ``uid``, was killed or crashed; "" if unknown."""
        death = kmsg.of(self._found, record.pid, uid, record.start_ticks / _TICKS)
        return death.why if death else ""


def look(folder: RunDirectory, uid: int, deaths: Deaths) -> Left | None:
    """What is to be kept of a guest whose VMM has ended; None if it was never handed out."""
    try:
        record = folder.record()
    except (NotFound, Incompatible):
        return None
    said = {name: logs.tail(folder.path, name, KEPT) for name in (logs.CONSOLE, logs.QEMU)}
    qemu = said[logs.QEMU]
    reason = end_reason.find(
        qemu.text,
        said[logs.CONSOLE].text,
        traced=record.traced,
        death=lambda: deaths.why(record, uid),
        oom=lambda: cgroup.was_short_of_memory(record.pid),
    )
    end = Ended(
        at=qemu.written if reason.noted else None,
        found=time.time(),
        cause=reason.cause,
        reason=reason.text,
        exit_code=reason.exit_code,
    )
    return Left(replace(record, ended=end), said)


def keep(run: Path, left: Left) -> None:
    """Keep it, in place of an earlier guest of its name. Raises OSError.

    Not in the run folder of another user, who could neither read nor remove it.
    """
    if run.stat().st_uid != os.geteuid():
        return
    folder = run / _FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    new = folder / _NEW
    remove_tree(new)
    try:
        new.mkdir(mode=0o700)
        for name, said in left.said.items():
            logs.write(new, name, said)
        (new / "guest.json").write_bytes(msgspec.json.encode(left.record))
        remove_tree(folder / left.record.name)
        new.rename(folder / left.record.name)
    except OSError:
        remove_tree(new)
        raise
    _trim(folder)


def _trim(folder: Path) -> None:
    with os.scandir(folder) as entries:
        found = [(each.stat().st_mtime_ns, each.name) for each in entries]
    for _, name in sorted(found)[: max(len(found) - MOST, 0)]:
        remove_tree(folder / name)


def names(run: Path) -> list[str]:
    """Those that are known; not those whose name a running guest has."""
    found = _entries(run)
    known = found - {_NEW} - {name for name in _others(run, found) if _is_replaced(run, name)}
    return sorted(known, key=in_order)


def _entries(run: Path) -> set[str]:
    # Each command asks: no time for paths.
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(run / _FOLDER))  # noqa: PTH208
    return set()


def _others(run: Path, found: set[str]) -> set[str]:
    """Those of them whose name a run folder has."""
    return found and found.intersection(os.listdir(run))  # noqa: PTH208


def _is_replaced(run: Path, name: str) -> bool:
    return (run / name / "guest.json").exists()


def records(run: Path) -> list[GuestRecord]:
    """All of them, by name."""
    return [record for name in names(run) if (record := find(run, name))]


def find(run: Path, name: str) -> GuestRecord | None:
    """The record of one; None if there is none, or another version of onecopy wrote it."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
        text = (path(run, name) / "guest.json").read_bytes()
        record = msgspec.json.decode(text, type=GuestRecord)
        return record if record.ended else None
    return None


def path(run: Path, name: str) -> Path:
    """The folder with its logs."""
    return run / _FOLDER / name


def forget(run: Path, *gone: str) -> None:
    """Remove some of them, and their folder with the last."""
    for name in gone:
        remove_tree(path(run, name))
    with contextlib.suppress(OSError):
        (run / _FOLDER).rmdir()


def sweep(run: Path) -> None:
    """Remove those whose name has another guest, which was handed out, and what was cut off."""
    found = _entries(run)
    replaced = {name for name in _others(run, found) if _has_been_replaced(run, name)}
    if gone := replaced | found & {_NEW}:
        forget(run, *gone)


def _has_been_replaced(run: Path, name: str) -> bool:
    if not _is_replaced(run, name):
        return False
    with contextlib.suppress(NotFound, Incompatible):
        RunDirectory(run / name).record()
        return True
    return False


def no_more(record: GuestRecord) -> NotFound:
    """The error for who wants something of a guest that has ended."""
    return NotFound(
        f"{record.name} has ended: {record.ended.reason if record.ended else 'unknown'}",
        hint=f"`onecopy logs {record.name}` shows what it printed last; "
        f"`onecopy rm {record.name}` removes it",
    )
