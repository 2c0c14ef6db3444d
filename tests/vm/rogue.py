"""Runs rogue.c in place of QEMU, in QEMU's confinement, and returns the result of its attempts.

Not here: the expected results (test_confinement.py).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from onecopy.vmm import fork_server
from onecopy.vmm.argv import Hardware, Launch
from onecopy.vmm.fork_server import ForkServer
from onecopy.vmm.logs import QEMU, read
from onecopy.vmm.qemu_process import launch
from tests.conftest import cannot_run

SOURCE = Path(__file__).with_suffix(".c")

Outcome = dict[str, str]
"""Attempt -> "ok" or the name of the error."""

#: For a file that may only be read; what it says by name is the same by descriptor.
READ_ONLY = {
    "open for writing": "EACCES",
    "open for both": "EACCES",
    "open and cut off": "EACCES",
    "truncate": "EACCES",
    "open for reading": "ok",
    "pwrite": "EBADF",
    "ftruncate": "EINVAL",
    "fallocate": "EBADF",
    "mmap shared": "EACCES",
    "mprotect": "EACCES",
    "mmap private": "ok",
}
#: Ways to a file that go by its name.
BY_NAME = ("open for writing", "open for both", "open and cut off", "truncate", "open for reading")


#: How a rogue is linked: for exec, and for a fork server, which needs what QEMU has.
LINKED = {"exec": ["-static"], "fork": ["-DFORKED", "-l:libgnutls.so.30"]}


class Rogue(NamedTuple):
    """The program, where every user finds it, and the library if a server is to fork it."""

    program: Path
    library: Path | None

    @property
    def server(self) -> ForkServer | None:
        return ForkServer(self.library, f"rogue {self.library}") if self.library else None


def compile_rogue(folder: Path, way: str) -> Rogue:
    """Compile the program for a way of starting it: exec or fork."""
    if shutil.which("gcc") is None:
        cannot_run("there is no gcc")
    program = folder / way
    subprocess.run(["gcc", SOURCE, "-pthread", "-Os", "-o", program, *LINKED[way]], check=True)
    folder.chmod(0o755)
    return Rogue(program, fork_server.library(folder) if way == "fork" else None)


async def run_rogue(
    rogue: Rogue,
    hardware: Hardware,
    spec: Launch,
    attempts: Sequence[tuple[str, str | Path | int]],
    inherit: Sequence[int] = (),
) -> Outcome:
    """Let it do its worst in a prepared run folder."""
    words = [str(word) for attempt in attempts for word in attempt]
    spec = replace(spec, binary=str(rogue.program), extra=("--", *words))
    vmm = launch(hardware, spec, inherit=inherit, server=rogue.server)
    try:
        assert vmm.forked == (rogue.library is not None), vmm.why_exec
        assert await vmm.wait(60) and vmm.returncode == 0, read(spec.folder, QEMU)
    finally:
        await vmm.kill()
    *lines, last = read(spec.folder, QEMU).rstrip().splitlines()
    assert last == "done"
    return dict(line.rsplit(": ", 1) for line in lines)
