"""Pass files to a VMM by descriptor, so that it needs no access to their directories.

QEMU expects paths. It gets /proc/self/fd/N, which reopens the file with the permissions of QEMU's
user (proc_pid_fd(5)).

Not here: the other files that QEMU may open (confine.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec.structs import replace

from onecopy.linux.sandbox.landlock import READ_FILE, TRUNCATE, WRITE_FILE
from onecopy.vmm.argv import PORTS, Backing, Hardware, Launch, MapMode
from onecopy.vmm.logs import CONSOLE
from onecopy.vmm.vmm_user import User

READ = READ_FILE
WRITE = READ_FILE | WRITE_FILE | TRUNCATE


class PassedFiles:
    """The files of one VMM; ``rights`` are those of linux/sandbox/landlock.py."""

    def __init__(self, user: User | None, inherited: Sequence[int]) -> None:
        self._user = user
        self._ends = ExitStack()
        self.rights: dict[int, int] = dict.fromkeys(inherited, READ)
        """Descriptor -> how the VMM may reopen the file, within the descriptor's own mode.
        """
        self.passed: list[int] = list(inherited)
        """Descriptors that the VMM inherits."""
        self.open_requests: list[int] = []
        """Files that some QEMUs open for writing (open_notify.py), in order."""

    def name(self, path: Path, *, write: bool = False, own: bool = False) -> Path:
        """Open a file for the VMM to inherit; return its path there.

        Args:
            own: make the VMM's user the owner of the file.
        """
        fd = self._open(path, os.O_RDWR if write else os.O_RDONLY, WRITE if write else READ)
        if own and self._user:
            self._user.own(fd)
        self.passed.append(fd)
        return Path(f"/proc/self/fd/{fd}")

    def memory(self, backing: Backing) -> Backing:
        """Open the file of a backing; return the backing with the path for the VMM."""
        name = self.name(backing.path, write=backing.mode is MapMode.SHARED)
        if backing.mode is not MapMode.READ_ONLY:
            self.open_requests.append(self.passed[-1])
        return replace(backing, path=name)

    def let_read(self, folder: Path) -> None:
        """Let the VMM read files below a directory that may be hot-plugged later."""
        self._open(folder, os.O_PATH | os.O_DIRECTORY, READ)

    def let_open(self, path: Path) -> None:
        """Let the VMM read and write a file of its run directory by name, but not truncate it."""
        # O_PATH, because opening a pipe would have side effects.
        fd = self._open(path, os.O_PATH, READ_FILE | WRITE_FILE)
        if self._user:
            self._user.own(Path(f"/proc/self/fd/{fd}"))

    def _open(self, path: Path, flags: int, rights: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._ends.callback(os.close, fd)
        self.rights[fd] = rights
        return fd

    def close(self) -> None:
        """Close all descriptors that were opened here; the VMM has copies."""
        self._ends.close()


@contextmanager
def pass_files(
    hardware: Hardware, spec: Launch, user: User | None, inherited: Sequence[int]
) -> Iterator[tuple[Hardware, Launch, PassedFiles]]:
    """Open all files of a machine; yield it with the paths for the VMM."""
    files = PassedFiles(user, inherited)
    try:
        for name, _ in PORTS:
            files.let_open(spec.folder / f"{name}.in")
            files.let_open(spec.folder / f"{name}.out")
        files.let_open(spec.folder / CONSOLE)
        if spec.later:
            files.let_read(spec.later)
        # QEMU's working directory is its run directory, the only one that it can reach.
        named = replace(_with_names(spec, files), folder=Path())
        segments = tuple(files.memory(each) for each in hardware.segments)
        yield replace(hardware, segments=segments), named, files
    finally:
        files.close()


def _with_names(spec: Launch, files: PassedFiles) -> Launch:
    if spec.kernel:
        initrd = spec.kernel.initrd and files.name(spec.kernel.initrd, own=True)
        kernel = replace(spec.kernel, image=files.name(spec.kernel.image), initrd=initrd)
        spec = replace(spec, kernel=kernel)
    if spec.ram_path:
        spec = replace(spec, ram_path=files.name(spec.ram_path))
        files.open_requests.append(files.passed[-1])
    return spec
