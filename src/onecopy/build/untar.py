"""Unpacking a tar archive that somebody else has written, as it comes: confined.

tar keeps owners, attributes and devices, for which it must be mighty; so it reaches one folder
only, through a mount in which no device can be opened. Not here: where the archive comes from.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

from onecopy.host.landlock import TREE
from onecopy.host.syscall import open_without_devices
from onecopy.vmm.tool import OWNER, Limits, Task, Tool, named, running

#: What makes tar keep all that a tree holds.
TAR_OPTIONS = ("--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner")
_PIPE = 1 << 20
_MAKE_DEVICES = 1 << 27  # CAP_MKNOD


@contextmanager
def unpacking(into: Path, seconds: float, most: int) -> Iterator[tuple[FileIO, Tool]]:
    """tar, which unpacks into ``into`` what is written to the pipe until that is closed.

    A file may have ``most`` bytes. Raises MissingProgram, Incompatible, OSError; that it fails is
    told by `Tool.finish`.
    """
    with ExitStack() as ends:
        read, write = os.pipe2(os.O_CLOEXEC)
        source, sink = (ends.enter_context(FileIO(*a)) for a in ((read, "rb"), (write, "wb")))
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE)
        folder, safe = _folder(into)
        ends.callback(os.close, folder)
        task = Task(
            ["tar", "-x", "-p", "--same-owner", *TAR_OPTIONS, "-C", named(folder), "-f", "-"],
            {folder: TREE},
            stdin=source.fileno(),
            capabilities=OWNER | (_MAKE_DEVICES if safe else 0),
            owns=True,
            limits=Limits(seconds=seconds, file_size=most),
        )
        tool = ends.enter_context(running(task))
        # Its end alone ends what we write.
        source.close()
        yield sink, tool


def _folder(path: Path) -> tuple[int, bool]:
    """The folder, and whether devices in it cannot be opened; else tar may make none."""
    try:
        return open_without_devices(path), True
    except OSError:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), False
