"""QEMU processes that others started: libvirt's, hand-started ones, those of another store.

Anybody can start a process with any name and arguments, and let it be anything: so what a command
line says (cmdline.py) is a name for what the kernel says, and no file is taken from it that the
process does not have open. Nothing is asked of the QEMU itself.
"""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path, PurePath

import msgspec

from onecopy.errors import NotFound, NotPermitted, OnecopyError, Unreadable
from onecopy.linux import bounded_wait, process
from onecopy.linux.files import ROOT, Identity, process_directory, translating_errors
from onecopy.vmm import cmdline
from onecopy.vmm.cmdline import Told

#: Debian's names, Red Hat's, and that of old packages.
_PROGRAM = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm|kvm")
#: What QEMU calls a file that it makes in a folder (system/physmem.c, file_ram_open).
_MADE = "/qemu_back_mem."
_DELETED = " (deleted)"
_OF_ITSELF = "/proc/self/"
#: PATH_MAX: no file has a longer one.
_LONGEST_PATH = 4096
#: Descriptors of one process that are looked at.
_MOST_FDS = 8192
#: Processes that are looked at, as many of one user as of the next.
MOST = 256
#: How long one may keep us waiting, in seconds.
_PATIENCE = 2.0


class Vmm(msgspec.Struct, frozen=True):
    """A QEMU process of another."""

    pid: int
    #: With ``pid``, its identity; None if it was not told.
    start_ticks: int | None
    #: As `-name` has it, else ``pid PID``; anything that its user likes.
    name: str
    #: The RAM that its guest sees, in bytes.
    ram_bytes: int
    #: The file that backs it, or a folder in which QEMU made one (hugetlbfs); None when anonymous.
    ram_path: str | None = None
    #: Other files that it maps as memory (virtio-pmem, NVDIMM): path -> the backend's id.
    files: Mapping[str, str] = {}
    #: Files of its disks.
    disks: tuple[str, ...] = ()
    #: Which of all these are regular files, and which ones; the others are not to be opened.
    regular: Mapping[str, Identity] = {}
    #: Why its RAM cannot be told; empty if it can.
    note: str = ""


class Found(msgspec.Struct, frozen=True):
    """All of a host."""

    #: By pid.
    vmms: tuple[Vmm, ...]
    #: What else there is, one sentence each.
    left_out: tuple[str, ...] = ()


class _Process(msgspec.Struct, frozen=True):
    """One that is called as QEMU is, and its user; or one that does not say how it is called."""

    pid: int
    owner: int | None
    silent: bool = False


def find(known: Container[int], root: Path = ROOT) -> Found:
    """All QEMU processes with a machine, but those whose process id is in ``known``."""
    pids = [int(folder.name) for folder in (root / "proc").glob("[1-9]*")]
    pids = [pid for pid in pids if pid not in known]
    candidate, look = partial(_candidate, root=root), partial(_look, root=root)
    answers = bounded_wait.each(candidate, pids, _silent, seconds=_PATIENCE)
    processes = [each for each in answers if each]
    chosen = _some([each for each in processes if not each.silent])
    vmms = bounded_wait.each(look, [each.pid for each in chosen], _unknown, seconds=_PATIENCE)
    left_out = [f"process {each.pid} keeps us waiting" for each in processes if each.silent]
    if more := len(processes) - len(left_out) - len(chosen):
        left_out.append(f"there are {more} more processes that are called as QEMU is")
    found = sorted((vmm for vmm in vmms if vmm), key=lambda vmm: vmm.pid)
    return Found(tuple(found), tuple(left_out))


def _candidate(pid: int, root: Path) -> _Process | None:
    with suppress(NotFound, NotPermitted, Unreadable):
        if _PROGRAM.fullmatch(_program(pid, root)):
            return _Process(pid, process.owner(pid, root))
    return None


def _silent(pid: int) -> _Process:
    return _Process(pid, None, silent=True)


def _program(pid: int, root: Path) -> str:
    """The name of the program; of another user's process what it was called as."""
    try:
        path = str((process_directory(pid, root) / "exe").readlink())
    except OSError:
        path = next(iter(process.cmdline(pid, root)), "")
    return PurePath(path.removesuffix(_DELETED)).name


def _some(processes: Sequence[_Process]) -> list[_Process]:
    """Up to ``MOST``: who starts many does not hide those of others."""
    turns: dict[int | None, int] = defaultdict(int)
    ordered = []
    for each in sorted(processes, key=lambda each: each.pid):
        ordered.append((turns[each.owner], each.pid, each))
        turns[each.owner] += 1
    return [each for _, _, each in sorted(ordered, key=lambda item: item[:2])[:MOST]]


def _look(pid: int, root: Path) -> Vmm | None:
    """What one says, as far as the kernel confirms it; None if it has no machine, or has ended."""
    with suppress(NotFound, NotPermitted, Unreadable):
        started = process.stat(pid, root).start_ticks
        told = cmdline.parse(process.cmdline(pid, root))
        return _confirmed(pid, started, told, root) if told else None
    return None


def _unknown(pid: int) -> Vmm:
    return Vmm(pid, None, f"pid {pid}", 0, note="the process kept us waiting")


def _confirmed(pid: int, started: int, told: Told, root: Path) -> Vmm:
    vmm = Vmm(pid, started, told.name or f"pid {pid}", told.ram_bytes)
    try:
        files = _Files(pid, root)
    except OnecopyError as error:
        return msgspec.structs.replace(vmm, note=error.message)
    ram = None if told.ram_path is None else files.ram(told.ram_path)
    missing = told.ram_path is not None and ram is None
    named = {files.find(path): name for path, name in told.files.items()}
    disks = dict.fromkeys(map(files.find, told.disks))
    return msgspec.structs.replace(
        vmm,
        ram_path=ram,
        files={path: name for path, name in named.items() if path is not None},
        disks=tuple(path for path in disks if path in files.regular),
        regular=files.regular,
        note="the file that its command line names for RAM is not open in it" if missing else "",
    )


class _Files:
    """What a process has open, by the kernel's word. Raises NotFound, NotPermitted, Unreadable."""

    def __init__(self, pid: int, root: Path) -> None:
        self._root, self._own = root, process_directory(pid, root)
        #: Those that were found, and are regular files.
        self.regular: dict[str, Identity] = {}
        self._names: dict[Path, str] = {}
        self._ids: dict[Identity, list[Path]] = defaultdict(list)
        folder = self._own / "fd"
        with translating_errors(pid, folder):
            self._folder = (self._own / "cwd").readlink()
            for entry in islice(folder.iterdir(), _MOST_FDS):
                self._add(entry)

    def _add(self, entry: Path) -> None:
        with suppress(OSError):
            name = str(entry.readlink())
            # Others are sockets, pipes and what else has no name.
            if name.startswith("/"):
                found = entry.stat()
                self._names[entry] = name.removesuffix(_DELETED)
                self._ids[found.st_dev, found.st_ino].append(entry)

    def find(self, path: str) -> str | None:
        """The name by which the kernel knows an open file; None if it is not open."""
        with suppress(OSError, ValueError):
            found = self._place(path).stat()
            identity = found.st_dev, found.st_ino
            for entry in self._ids.get(identity, ()):
                if self._is_open(entry):
                    self._note(self._names[entry], found)
                    return self._names[entry]
        return self._by_name(path)

    def _note(self, name: str, found: os.stat_result) -> None:
        """In another mount namespace that name may be that of another file."""
        if stat.S_ISREG(found.st_mode):
            with suppress(OSError):
                if os.path.samestat(found, (self._root / name.lstrip("/")).stat()):
                    self.regular[name] = found.st_dev, found.st_ino

    def ram(self, path: str) -> str | None:
        """The same; or a folder in which QEMU made a file."""
        if found := self.find(path):
            return found
        with suppress(OSError, ValueError):
            folder = os.path.realpath(self._place(path))
            if any(name.startswith(folder + _MADE) for name in self._names.values()):
                return folder
        return None

    def _by_name(self, path: str) -> str | None:
        """What was removed meanwhile has its name all the same."""
        name = os.path.normpath(self._folder / path)
        known = (entry for entry, each in self._names.items() if each == name)
        return name if any(map(self._is_open, known)) else None

    def _place(self, path: str) -> Path:
        """Where it lies for that process. Raises ValueError if that is no path."""
        if len(path) > _LONGEST_PATH:
            raise ValueError(path)
        if path.startswith(_OF_ITSELF):
            return self._own / path.removeprefix(_OF_ITSELF)
        if path.startswith("/"):
            return Path(f"{self._own}/root{path}")
        return self._own / "cwd" / path

    def _is_open(self, entry: Path) -> bool:
        """Whether it can be read or written: O_PATH (open(2)) names what nobody may open."""
        with suppress(OSError, ValueError, IndexError):
            told = (entry.parent.parent / "fdinfo" / entry.name).read_bytes()
            return not int(told.partition(b"flags:")[2].split()[0][:12], 8) & os.O_PATH
        return False
