"""Keeps the records of guests that ended on their own: the reason, and the end of their logs.

::

    RUN/.ended/NAME/    guest.json with the reason; console.log and qemu.log (vmm/logs.py)
    RUN/.ended/.new     a record that is being written

The invoking user owns all files, and they are small. The oldest records are removed when there are
more than `MOST`. A new guest replaces the record of its name. A boot of the host removes all.
Writers hold the host's lock (Runtime.locked). Not here: finding guests that ended (sweep.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from onecopy.errors import Incompatible, NotFound
from onecopy.guest.end import Ended
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.linux import cgroup
from onecopy.linux.removal import remove_tree
from onecopy.model import in_order
from onecopy.vmm import logs

if TYPE_CHECKING:
    from onecopy.linux.kmsg import Death

_FOLDER = ".ended"
_NEW = ".new"
#: The number of records, and the bytes of each log.
MOST, KEPT = 100, 64 << 10
_TICKS = os.sysconf("SC_CLK_TCK")


class Left(msgspec.Struct, frozen=True):
    """The record and logs of an ended guest."""

    record: GuestRecord
    """The record, with its ``ended``."""
    said: dict[str, logs.Tail]
    """Name of a log -> its end."""


class Deaths:
    """The host kernel's log of processes that it killed; read once, on the first question."""

    @cached_property
    def _found(self) -> list[Death]:
        from onecopy.linux import kmsg  # few guests are killed

        return kmsg.deaths()

    def why(self, record: GuestRecord, uid: int) -> str:
        """Return why a guest's VMM, run by ``uid``, was killed or crashed; "" if unknown."""
        from onecopy.linux import kmsg  # few guests are killed

        death = kmsg.of(self._found, record.pid, uid, record.start_ticks / _TICKS)
        return death.why if death else ""


def look(folder: RunDirectory, uid: int, deaths: Deaths) -> Left | None:
    """Collect the record and logs of a guest whose VMM has ended; None if it was never ready."""
    try:
        record = folder.record()
    except (NotFound, Incompatible):
        return None
    from onecopy.guest import end_reason  # few guests end by themselves

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
    """Store the record of an ended guest; replace an earlier one of its name.

    Nothing is stored in another user's run directory: that user could not read or remove it.

    Raises:
        OSError: The record cannot be written.
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
    """List the names of ended guests, without those that a running guest has taken."""
    found = _entries(run)
    known = found - {_NEW} - {name for name in _others(run, found) if _is_replaced(run, name)}
    return sorted(known, key=in_order)


def _entries(run: Path) -> set[str]:
    # Every command calls this. os.listdir is faster than Path.iterdir.
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(run / _FOLDER))  # noqa: PTH208
    return set()


def _others(run: Path, found: set[str]) -> set[str]:
    """Return the names in ``found`` that also have a run directory."""
    return found and found.intersection(os.listdir(run))  # noqa: PTH208


def _is_replaced(run: Path, name: str) -> bool:
    return (run / name / "guest.json").exists()


def records(run: Path) -> list[GuestRecord]:
    """Return the records of all ended guests, by name."""
    return [record for name in names(run) if (record := find(run, name))]


def find(run: Path, name: str) -> GuestRecord | None:
    """Return an ended guest's record; None if there is none or another version wrote it."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
        text = (path(run, name) / "guest.json").read_bytes()
        record = msgspec.json.decode(text, type=GuestRecord)
        return record if record.ended else None
    return None


def path(run: Path, name: str) -> Path:
    """Return the directory of an ended guest's record and logs."""
    return run / _FOLDER / name


def forget(run: Path, *gone: str) -> None:
    """Remove records, and their common directory with the last one."""
    for name in gone:
        remove_tree(path(run, name))
    with contextlib.suppress(OSError):
        (run / _FOLDER).rmdir()


def sweep(run: Path) -> None:
    """Remove records whose name a ready guest has taken, and incomplete ones."""
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
    """Return the error for a request to a guest that has ended."""
    return NotFound(
        f"{record.name} has ended: {record.ended.reason if record.ended else 'unknown'}",
        hint=f"see `onecopy logs {record.name}` for its last output; "
        f"remove it with `onecopy rm {record.name}`",
    )
