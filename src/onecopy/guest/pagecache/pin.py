"""Keep blobs in memory: a small process (linux/page_locker.py) locks them and has their lease.

So they are in memory as long as that process lives, however it ends; `ls` shows it among the users,
and `rm` refuses. Not here: loading what the kernel may drop again (preload.py).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import sys
from typing import Any

import msgspec

from onecopy.errors import (
    AlreadyExists,
    InsufficientResources,
    NotFound,
    NotPermitted,
    OnecopyError,
    StoreDamaged,
)
from onecopy.guest.pagecache.preload import blobs_of, data_of
from onecopy.linux import process
from onecopy.linux.counters import meminfo
from onecopy.linux.process import capabilities
from onecopy.model import MIB
from onecopy.store import Artifact, Lease, Store
from onecopy.store.lease import PIN
from onecopy.subprocesses import Detached

#: What is left to guests and to the host itself; bytes.
_RESERVE = 256 * MIB
_IPC_LOCK = 1 << 14
#: In the folder of the lease: which process it is.
_RECORD = "pin.json"
#: Seconds that a process has to end itself.
_PATIENCE = 10.0


class Pinned(msgspec.Struct, frozen=True):
    """What is pinned now."""

    name: str
    """``NAME:VERSION``."""
    holder: str
    """Whom `ls` shows as its user."""
    pid: int
    locked: int
    """Bytes, without holes."""
    huge: int
    """Bytes of them that are mapped as huge pages."""
    collapse: str
    """Why the kernel made no huge pages of (some of) them; "" if it did."""


class _Process(msgspec.Struct, frozen=True):
    """The record that the process makes of itself."""

    pid: int
    start_ticks: int


def holder_of(artifact: Artifact) -> str:
    """Who has the lease of what is pinned: one for each artifact."""
    return f"{PIN}{artifact.name[:40]}-{artifact.digest.removeprefix('sha256:')[:8]}"


def pin(store: Store, artifact: Artifact) -> Pinned:
    """Lock all blobs of ``artifact`` in memory; at return they are.

    Raises AlreadyExists, InsufficientResources (memory, or what this user may lock), NotPermitted,
    StoreDamaged, NotFound.
    """
    holder = holder_of(artifact)
    if store.is_held(holder):
        raise AlreadyExists(
            f"{artifact.ref} is pinned already", hint=f"`onecopy preload --unpin {artifact.ref}`"
        )
    files = [(str(each.path), each.blob_size, data_of(each)) for each in blobs_of(artifact)]
    needed = sum(length for *_, extents in files for _, length in extents)
    _require_memory(needed)
    with store.hold([artifact.digest], holder) as lease:
        return Pinned(artifact.ref, holder, **_start(lease, files, needed))


def unpin(store: Store, artifact: Artifact) -> None:
    """End the process that keeps ``artifact`` in memory; raise NotFound, NotPermitted."""
    holder = holder_of(artifact)
    try:
        path = store.root / "leases" / f"{holder}.files" / _RECORD
        record = msgspec.json.decode(path.read_bytes(), type=_Process)
    except (OSError, msgspec.MsgspecError):
        record = None
    if record is None or not store.is_held(holder):
        raise NotFound(f"{artifact.ref} is not pinned", hint="`onecopy preload --pin` does it")
    _end(record)
    store.sweep()


def _require_memory(needed: int) -> None:
    """Raise InsufficientResources before anything is begun."""
    available = meminfo.read().available
    if available is not None and available < needed + _RESERVE:
        raise InsufficientResources(
            "memory",
            needed=needed + _RESERVE,
            available=available,
            hint="stop guests, or unpin something: `onecopy ls` shows what is pinned",
        )
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if limit != resource.RLIM_INFINITY and limit < needed and not capabilities() & _IPC_LOCK:
        raise InsufficientResources(
            "memory that this user may lock",
            needed=needed,
            available=limit,
            hint="raise the hard limit (limits.conf, memlock), or do it as root",
        )


def _start(lease: Lease, files: object, needed: int) -> dict[str, Any]:
    """Start the process and wait until it is ready; it keeps the lease."""
    wanted = json.dumps({"files": files, "record": str(lease.files / _RECORD)})
    with Detached(
        [sys.executable, "-m", "onecopy.linux.page_locker"], pass_fds=[lease.fd]
    ) as child:
        told = _told(child.ask(wanted.encode()))
        if "errno" in told:
            raise _error(told["errno"], told["error"], needed)
        child.keep()
        return {"pid": child.pid, **told}


def _told(answer: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(answer))
    except ValueError:
        return {"errno": 0, "error": "it ended without a word"}


def _error(number: int, text: str, needed: int) -> OnecopyError:
    if number in (errno.ENOMEM, errno.EAGAIN):
        available = meminfo.read().available or 0
        return InsufficientResources(
            "memory to lock", needed=needed, available=available, hint=f"the kernel said: {text}"
        )
    if number in (errno.EPERM, errno.EACCES):
        return NotPermitted(f"the blobs cannot be locked: {text}", hint="do it as root")
    return StoreDamaged(f"the blobs cannot be locked: {text}", hint="`onecopy verify`; dmesg")


def _end(record: _Process) -> None:
    """Ask the process to end, then make it; wait until it has. Raises NotPermitted."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        for number, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
            # Looked at with the descriptor open: it cannot be another process from here on.
            if not process.is_same(record.pid, record.start_ticks):
                return
            signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], patience)[0]:
                return
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise NotPermitted(
            f"process {record.pid} belongs to another user", hint="unpin it as that user"
        ) from error
    finally:
        os.close(pidfd)
