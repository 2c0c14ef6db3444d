"""What a VMM is given to open: files by descriptor, so that it needs no way to where they lie.

QEMU takes names, so it gets /proc/self/fd/N, which opens the file anew with the rights of QEMU's
user (proc_pid_fd(5)). Not here: what QEMU may open besides (confine.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec.structs import replace

from onecopy.linux.sandbox.landlock import READ_FILE, TRUNCATE, WRITE_FILE
from onecopy.vmm.argv import PORTS, Hardware, Launch, MapMode, Slot
from onecopy.vmm.logs import CONSOLE
from onecopy.vmm.vmm_user import User

READ = READ_FILE
WRITE = READ_FILE | WRITE_FILE | TRUNCATE


class Given:
    """Open files for one VMM; ``rights`` are those of linux/sandbox/landlock.py."""

    def __init__(self, user: User | None, inherited: Sequence[int]) -> None:
        self._user = user
        self._ends = ExitStack()
        self.rights: dict[int, int] = dict.fromkeys(inherited, READ)
        """Descriptor -> what the VMM may open the file for, which is no more than it is open for
        here."""
        self.passed: list[int] = list(inherited)
        """Descriptors that the VMM inherits."""
        self.asked: list[int] = []
        """Those of files that some QEMUs open for writing (open_notify.py), in order."""

    def name(self, path: Path, *, write: bool = False, own: bool = False) -> Path:
        """The name of a file for the VMM, which inherits it; ``own`` makes it the VMM's file."""
        fd = self._open(path, os.O_RDWR if write else os.O_RDONLY, WRITE if write else READ)
        if own and self._user:
            self._user.own(fd)
        self.passed.append(fd)
        return Path(f"/proc/self/fd/{fd}")

    def memory(self, slot: Slot) -> Slot:
        """A slot with a name for the VMM."""
        name = self.name(slot.path, write=slot.mode is MapMode.SHARED)
        if slot.mode is not MapMode.READ_ONLY:
            self.asked.append(self.passed[-1])
        return replace(slot, path=name)

    def let_read(self, folder: Path) -> None:
        """Let the VMM read files below a folder, of which it is given some later."""
        self._open(folder, os.O_PATH | os.O_DIRECTORY, READ)

    def let_open(self, path: Path) -> None:
        """Let the VMM open a file of its run folder by name, for writing, too; but not cut it."""
        # A path descriptor: to open a pipe would be to use it.
        fd = self._open(path, os.O_PATH, READ_FILE | WRITE_FILE)
        if self._user:
            self._user.own(Path(f"/proc/self/fd/{fd}"))

    def _open(self, path: Path, flags: int, rights: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._ends.callback(os.close, fd)
        self.rights[fd] = rights
        return fd

    def close(self) -> None:
        """Close all that was opened here; the VMM has copies."""
        self._ends.close()


@contextmanager
def given(
    hardware: Hardware, spec: Launch, user: User | None, inherited: Sequence[int]
) -> Iterator[tuple[Hardware, Launch, Given]]:
    """Open what a machine is made of; yields it with names for the VMM in place of paths."""
    files = Given(user, inherited)
    try:
        for name, _ in PORTS:
            files.let_open(spec.folder / f"{name}.in")
            files.let_open(spec.folder / f"{name}.out")
        files.let_open(spec.folder / CONSOLE)
        if spec.later:
            files.let_read(spec.later)
        # QEMU runs in its run folder: it reaches no other one.
        named = replace(_with_names(spec, files), folder=Path())
        segments = tuple(files.memory(slot) for slot in hardware.segments)
        yield replace(hardware, segments=segments), named, files
    finally:
        files.close()


def _with_names(spec: Launch, files: Given) -> Launch:
    if spec.kernel:
        initrd = spec.kernel.initrd and files.name(spec.kernel.initrd, own=True)
        kernel = replace(spec.kernel, image=files.name(spec.kernel.image), initrd=initrd)
        spec = replace(spec, kernel=kernel)
    if spec.ram_path:
        spec = replace(spec, ram_path=files.name(spec.ram_path))
        files.asked.append(files.passed[-1])
    return spec
