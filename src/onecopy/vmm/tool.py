"""Programs of the host that read what a guest has written: confined as a VMM is.

Not here: which programs, and why (guest/disks.py).
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from onecopy.errors import CommandFailed
from onecopy.run import find_program
from onecopy.vmm.confine import Confinement
from onecopy.vmm.given import READ, WRITE
from onecopy.vmm.spawn import start
from onecopy.vmm.user import new_user


def run_on_file(argv: Sequence[str], file: int, *, fine: Sequence[int] = (0,)) -> None:
    """Run a program on an open file, whose name becomes its last argument; it changes no other.

    Raises CommandFailed for an exit code that is not ``fine``, MissingProgram, Incompatible.
    """
    line = [find_program(argv[0]), *argv[1:], f"/proc/self/fd/{file}"]
    user, before = new_user("tcg"), os.fstat(file)
    with ExitStack() as ends:
        said = ends.enter_context(tempfile.TemporaryFile())
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        # Programs for file systems look there whether it is mounted.
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        ends.callback(os.close, proc)
        if user:
            folder.chmod(0o711)
            user.own(file)
            ends.callback(os.fchown, file, before.st_uid, before.st_gid)
        confinement = Confinement(user, 0, {file: WRITE, proc: READ}, kvm=False, asks=False)
        code = start(line, confinement, folder, said.fileno(), [file]).process.wait()
        if code not in fine:
            said.seek(0)
            raise CommandFailed(shlex.join(line), code, said.read().decode(errors="replace"))
