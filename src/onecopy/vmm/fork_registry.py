"""The registry of fork servers: which of them run, and what ended ones have left.

    BASE/forks/KEY              the socket of a server
    BASE/forks/KEY=PID-TICKS    the record of its process
    BASE/forks/KEY.lock         held while a command starts the server

A server that is killed leaves these files. The next command removes them.

Not here: what a server is, and its KEY (fork_server.py).
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import msgspec

from onecopy.linux import vmm_registry
from onecopy.linux.lock import take_over
from onecopy.linux.process import stat
from onecopy.linux.run_base import make_own, make_run_base
from onecopy.linux.vmm_registry import Process

_DIRECTORY, _LOCK = "forks", ".lock"
_RECORD = re.compile(r"([0-9a-f]+)=([0-9]{1,10})-([0-9]{1,20})")


class _Content(msgspec.Struct, frozen=True):
    store: str
    domain: str


class Server(msgspec.Struct, frozen=True):
    """A fork server on record."""

    path: Path
    process: Process
    store: str
    domain: str
    """The trust domain; "" is none."""


def directory() -> Path:
    """Return the directory of the sockets, created if missing."""
    return make_own(_path())


def _path() -> Path:
    return make_run_base() / _DIRECTORY


def lock_of(socket: Path) -> Path:
    """Return the lock for the start of a server."""
    return socket.with_name(socket.name + _LOCK)


def record(socket: Path, pid: int, store: str, domain: str) -> None:
    """Record a server that has just started, under its lock."""
    path = socket.with_name(f"{socket.name}={pid}-{stat(pid).start_ticks}")
    path.write_bytes(msgspec.json.encode(_Content(store, domain)))


def running() -> list[Server]:
    """List this user's fork servers that run, those of all stores, by pid."""
    found = [each for each in _records("") if each.process.lives()]
    return sorted(found, key=lambda each: each.process.pid)


def pids() -> list[int]:
    """List the processes of this user's fork servers."""
    return [each.process.pid for each in running()]


def end(store: str) -> None:
    """Kill the servers of a store, and remove their files."""
    vmm_registry.end(each.process for each in _records("") if each.store == store)
    sweep()


def sweep() -> None:
    """Remove what ended servers have left."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(_path())  # noqa: PTH208 - each command calls this
        for key in [name.removesuffix(_LOCK) for name in names if name.endswith(_LOCK)]:
            _clean(key)


def _clean(key: str) -> None:
    """Remove the files of a server if it has ended, unless another command starts one."""
    found = _records(key)
    if found and all(each.process.lives() for each in found):
        return
    socket = _path() / key
    with take_over(lock_of(socket)) as lock:
        if lock is None:
            return
        found = _records(key)
        ended = [each for each in found if not each.process.lives()]
        for each in ended:
            each.path.unlink(missing_ok=True)
        if len(ended) == len(found):
            socket.unlink(missing_ok=True)
            lock_of(socket).unlink(missing_ok=True)


def _records(key: str) -> list[Server]:
    """Read the records of a server, or of all."""
    found = []
    for path in _path().glob(f"{key or '*'}=*"):
        match = _RECORD.fullmatch(path.name)
        with contextlib.suppress(OSError, msgspec.DecodeError):
            if match:
                content = msgspec.json.decode(path.read_bytes(), type=_Content)
                process = Process(int(match[2]), int(match[3]))
                found.append(Server(path, process, content.store, content.domain))
    return found
