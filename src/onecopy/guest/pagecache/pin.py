"""Pins blobs in memory: a small process (linux/page_locker.py) locks them and holds their lease.

The blobs stay in memory as long as that process lives. `ls` lists it among the users, and `rm`
refuses to remove the blobs. Not here: loading pages without a lock (preload.py).
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

#: Bytes of memory to leave to guests and the host.
_RESERVE = 256 * MIB
_IPC_LOCK = 1 << 14
#: The record of the process, in the lease's directory.
_RECORD = "pin.json"
#: Seconds for the process to exit after SIGTERM.
_PATIENCE = 10.0


class Pinned(msgspec.Struct, frozen=True):
    """A pinned artifact."""

    name: str
    """``NAME:VERSION``."""
    holder: str
    """The holder of its lease, which `ls` lists as a user."""
    pid: int
    """The process that locks it."""
    locked: int
    """Locked bytes, without holes."""
    huge: int
    """Locked bytes in huge pages."""
    collapse: str
    """Why the kernel did not make huge pages of all; "" if it did."""


class _Process(msgspec.Struct, frozen=True):
    """The record that the process writes of itself."""

    pid: int
    start_ticks: int


def holder_of(artifact: Artifact) -> str:
    """Return the holder of a pinned artifact's lease; each artifact has its own."""
    return f"{PIN}{artifact.name[:40]}-{artifact.digest.removeprefix('sha256:')[:8]}"


def pin(store: Store, artifact: Artifact) -> Pinned:
    """Lock all blobs of ``artifact`` in memory; return when they are locked.

    Raises:
        AlreadyExists: It is pinned already.
        InsufficientResources: There is too little memory, or this user may not lock as much.
        NotPermitted, StoreDamaged, NotFound: The blobs cannot be locked.
    """
    holder = holder_of(artifact)
    if store.is_held(holder):
        raise AlreadyExists(
            f"{artifact.ref} is pinned already",
            hint=f"unpin it with `onecopy preload --unpin {artifact.ref}`",
        )
    files = [(str(each.path), each.blob_size, data_of(each)) for each in blobs_of(artifact)]
    needed = sum(length for *_, extents in files for _, length in extents)
    _require_memory(needed)
    with store.hold([artifact.digest], holder) as lease:
        return Pinned(artifact.ref, holder, **_start(lease, files, needed))


def unpin(store: Store, artifact: Artifact) -> None:
    """End the process that locks ``artifact`` in memory.

    Raises:
        NotFound: It is not pinned.
        NotPermitted: Another user pinned it.
    """
    holder = holder_of(artifact)
    try:
        path = store.root / "leases" / f"{holder}.files" / _RECORD
        record = msgspec.json.decode(path.read_bytes(), type=_Process)
    except (OSError, msgspec.MsgspecError):
        record = None
    if record is None or not store.is_held(holder):
        raise NotFound(f"{artifact.ref} is not pinned", hint="pin it with `onecopy preload --pin`")
    _end(record)
    store.sweep()


def _require_memory(needed: int) -> None:
    """Raise InsufficientResources unless ``needed`` bytes can be locked."""
    available = meminfo.read().available
    if available is not None and available < needed + _RESERVE:
        raise InsufficientResources(
            "memory",
            needed=needed + _RESERVE,
            available=available,
            hint="stop guests, or unpin segments, which `onecopy ls` lists",
        )
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if limit != resource.RLIM_INFINITY and limit < needed and not capabilities() & _IPC_LOCK:
        raise InsufficientResources(
            "memory that this user may lock",
            needed=needed,
            available=limit,
            hint="raise the hard limit of memlock in limits.conf(5), or pin as root",
        )


def _start(lease: Lease, files: object, needed: int) -> dict[str, Any]:
    """Start the process, pass it the lease, and wait until all pages are locked."""
    from onecopy.subprocesses import Detached  # `ls` only asks who pins

    wanted = json.dumps({"files": files, "record": str(lease.files / _RECORD)})
    with Detached(
        [sys.executable, "-m", "onecopy.linux.page_locker"], pass_fds=[lease.fd]
    ) as child:
        reply = _parse_reply(child.ask(wanted.encode()))
        if "errno" in reply:
            raise _error(reply["errno"], reply["error"], needed)
        child.keep()
        return {"pid": child.pid, **reply}


def _parse_reply(answer: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(answer))
    except ValueError:
        return {"errno": 0, "error": "the locking process ended without a message"}


def _error(number: int, text: str, needed: int) -> OnecopyError:
    if number in (errno.ENOMEM, errno.EAGAIN):
        available = meminfo.read().available or 0
        return InsufficientResources(
            "memory to lock",
            needed=needed,
            available=available,
            hint=f"stop guests or unpin segments; the kernel's error is: {text}",
        )
    if number in (errno.EPERM, errno.EACCES):
        return NotPermitted(f"cannot lock the blobs in memory: {text}", hint="pin as root")
    return StoreDamaged(
        f"cannot lock the blobs in memory: {text}", hint="run `onecopy verify`, and look at dmesg"
    )


def _end(record: _Process) -> None:
    """End the process with SIGTERM, then SIGKILL, and wait for it; raise NotPermitted."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        for number, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
            # With the pidfd open, the pid cannot be reused after this check.
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
