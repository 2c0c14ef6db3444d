"""External QEMU processes: started by libvirt, by hand, or for another store.

Any user can start a process with any name and arguments. So the command line (cmdline.py) is only a
hint, which the kernel's data must confirm. A file counts only if the process has it open. The QEMU
itself is not queried.
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
from onecopy.vmm.cmdline import QemuOptions

#: The names in Debian, in Red Hat's distributions, and in old packages.
_PROGRAM = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm|kvm")
#: The prefix of files that QEMU creates in a given directory (system/physmem.c, file_ram_open).
_QEMU_FILE = "/qemu_back_mem."
_DELETED = " (deleted)"
_PROC_SELF = "/proc/self/"
#: PATH_MAX: no path is longer.
_PATH_LIMIT = 4096
#: The limit on descriptors examined per process.
_FDS_LIMIT = 8192
#: The limit on processes examined, shared evenly among users.
MOST = 256
#: Seconds to wait for one process.
_PATIENCE = 2.0


class Vmm(msgspec.Struct, frozen=True):
    """A QEMU process that onecopy did not start."""

    pid: int
    #: With ``pid``, the identity of the process; None if unknown.
    start_ticks: int | None
    #: The value of `-name`, else ``pid PID``; its user can choose any text.
    name: str
    #: The guest's RAM in bytes.
    ram_bytes: int
    #: The file that backs the RAM, or the directory in which QEMU created one (hugetlbfs); None if
    #: anonymous.
    ram_path: str | None = None
    #: Other files mapped as memory (virtio-pmem, NVDIMM): path -> the backend's id.
    files: Mapping[str, str] = {}
    #: The files of its disks.
    disks: tuple[str, ...] = ()
    #: Which of these paths are regular files, and their identities; the others must not be opened.
    regular: Mapping[str, Identity] = {}
    #: Why its RAM cannot be identified; empty if it can.
    note: str = ""


class Found(msgspec.Struct, frozen=True):
    """All external QEMU processes of a host."""

    #: Ordered by pid.
    vmms: tuple[Vmm, ...]
    #: What was not examined, one sentence each.
    left_out: tuple[str, ...] = ()


class _Process(msgspec.Struct, frozen=True):
    """A process named like QEMU, and its user; or one that did not answer."""

    pid: int
    owner: int | None
    silent: bool = False


def find(known: Container[int], root: Path = ROOT) -> Found:
    """Find all QEMU processes with a machine, except those whose pid is in ``known``."""
    pids = [int(folder.name) for folder in (root / "proc").glob("[1-9]*")]
    pids = [pid for pid in pids if pid not in known]
    candidate, look = partial(_candidate, root=root), partial(_look, root=root)
    answers = bounded_wait.each(candidate, pids, _silent, seconds=_PATIENCE)
    processes = [each for each in answers if each]
    chosen = _choose_fairly([each for each in processes if not each.silent])
    vmms = bounded_wait.each(look, [each.pid for each in chosen], _unknown, seconds=_PATIENCE)
    left_out = [
        f"process {each.pid} did not answer within {_PATIENCE:g} s"
        for each in processes
        if each.silent
    ]
    if more := len(processes) - len(left_out) - len(chosen):
        left_out.append(f"{more} more processes are named like QEMU; the limit is {MOST}")
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
    """Return the program's name; for another user's process the name under which it was started."""
    try:
        path = str((process_directory(pid, root) / "exe").readlink())
    except OSError:
        path = next(iter(process.cmdline(pid, root)), "")
    return PurePath(path.removesuffix(_DELETED)).name


def _choose_fairly(processes: Sequence[_Process]) -> list[_Process]:
    """Choose up to ``MOST`` processes, so that a user with many does not hide those of others."""
    turns: dict[int | None, int] = defaultdict(int)
    ordered = []
    for each in sorted(processes, key=lambda each: each.pid):
        ordered.append((turns[each.owner], each.pid, each))
        turns[each.owner] += 1
    return [each for _, _, each in sorted(ordered, key=lambda item: item[:2])[:MOST]]


def _look(pid: int, root: Path) -> Vmm | None:
    """Examine a process; return None if it has no machine or has ended."""
    with suppress(NotFound, NotPermitted, Unreadable):
        started = process.stat(pid, root).start_ticks
        options = cmdline.parse(process.cmdline(pid, root))
        return _confirmed(pid, started, options, root) if options else None
    return None


def _unknown(pid: int) -> Vmm:
    return Vmm(
        pid, None, f"pid {pid}", 0, note=f"the process did not answer within {_PATIENCE:g} s"
    )


def _confirmed(pid: int, started: int, options: QemuOptions, root: Path) -> Vmm:
    vmm = Vmm(pid, started, options.name or f"pid {pid}", options.ram_bytes)
    try:
        files = _Files(pid, root)
    except OnecopyError as error:
        return msgspec.structs.replace(vmm, note=error.message)
    ram = None if options.ram_path is None else files.ram(options.ram_path)
    missing = options.ram_path is not None and ram is None
    named = {files.find(path): name for path, name in options.files.items()}
    disks = dict.fromkeys(map(files.find, options.disks))
    return msgspec.structs.replace(
        vmm,
        ram_path=ram,
        files={path: name for path, name in named.items() if path is not None},
        disks=tuple(path for path in disks if path in files.regular),
        regular=files.regular,
        note="the process does not have the file open that its command line names for RAM"
        if missing
        else "",
    )


class _Files:
    """The files that a process has open, according to the kernel.

    Raises:
        NotFound: the process has ended.
        NotPermitted: this user may not examine it.
        Unreadable: the kernel refused for another reason.
    """

    def __init__(self, pid: int, root: Path) -> None:
        self._root, self._proc = root, process_directory(pid, root)
        #: The files that `find` found and that are regular.
        self.regular: dict[str, Identity] = {}
        self._names: dict[Path, str] = {}
        self._ids: dict[Identity, list[Path]] = defaultdict(list)
        folder = self._proc / "fd"
        with translating_errors(pid, folder):
            self._folder = (self._proc / "cwd").readlink()
            for entry in islice(folder.iterdir(), _FDS_LIMIT):
                self._add(entry)

    def _add(self, entry: Path) -> None:
        with suppress(OSError):
            name = str(entry.readlink())
            # Sockets, pipes and other files without a path are skipped.
            if name.startswith("/"):
                found = entry.stat()
                self._names[entry] = name.removesuffix(_DELETED)
                self._ids[found.st_dev, found.st_ino].append(entry)

    def find(self, path: str) -> str | None:
        """Return the kernel's name of an open file; None if the file is not open."""
        with suppress(OSError, ValueError):
            found = self._resolve(path).stat()
            identity = found.st_dev, found.st_ino
            for entry in self._ids.get(identity, ()):
                if self._is_open(entry):
                    self._record_regular(self._names[entry], found)
                    return self._names[entry]
        return self._by_name(path)

    def _record_regular(self, name: str, found: os.stat_result) -> None:
        """Record a regular file, unless its name is another file in this mount namespace."""
        if stat.S_ISREG(found.st_mode):
            with suppress(OSError):
                if os.path.samestat(found, (self._root / name.lstrip("/")).stat()):
                    self.regular[name] = found.st_dev, found.st_ino

    def ram(self, path: str) -> str | None:
        """Return the name of an open file, or of a directory in which QEMU created one."""
        if found := self.find(path):
            return found
        with suppress(OSError, ValueError):
            folder = os.path.realpath(self._resolve(path))
            if any(name.startswith(folder + _QEMU_FILE) for name in self._names.values()):
                return folder
        return None

    def _by_name(self, path: str) -> str | None:
        """Find an open file by name alone, since a removed file can no longer be opened."""
        name = os.path.normpath(self._folder / path)
        known = (entry for entry, each in self._names.items() if each == name)
        return name if any(map(self._is_open, known)) else None

    def _resolve(self, path: str) -> Path:
        """Return the path as that process sees it; raise ValueError if it is too long."""
        if len(path) > _PATH_LIMIT:
            raise ValueError(path)
        if path.startswith(_PROC_SELF):
            return self._proc / path.removeprefix(_PROC_SELF)
        if path.startswith("/"):
            return Path(f"{self._proc}/root{path}")
        return self._proc / "cwd" / path

    def _is_open(self, entry: Path) -> bool:
        """Whether it is open for access: with O_PATH (open(2)) anybody can open anything."""
        with suppress(OSError, ValueError, IndexError):
            fdinfo = (entry.parent.parent / "fdinfo" / entry.name).read_bytes()
            return not int(fdinfo.partition(b"flags:")[2].split()[0][:12], 8) & os.O_PATH
        return False
