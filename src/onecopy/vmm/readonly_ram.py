"""A saved system's RAM for a QEMU that opens it for writing: it gets it, read-only.

QEMU before 8.2 opens even a RAM file that it maps private with O_RDWR (softmmu/physmem.c,
file_ram_open). Its seccomp filter (confine.py) hands that one call to us, and the answer is a
descriptor that is open for reading only, which the kernel maps private all the same (mmap(2)).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from onecopy.errors import Incompatible
from onecopy.host import seccomp
from onecopy.vmm.qemu import Qemu


def require(qemu: Qemu) -> None:
    """Raise Incompatible if this QEMU would need what this kernel cannot do."""
    if not is_possible(qemu):
        raise Incompatible(
            f"QEMU {qemu.version} opens the saved RAM for writing, and this kernel cannot answer "
            "such a call with a read-only file",
            hint="use QEMU 8.2, or Linux 5.9, or later; `run --cold` boots guests meanwhile",
        )


def is_possible(qemu: Qemu) -> bool:
    """Whether this QEMU can have a saved system's RAM without being able to write to the file."""
    return qemu.rom or seccomp.can_ask()


class ReadOnlyRam:
    """Answers one question of one VMM, from the running event loop.

    What file it asks for is not looked at. A VMM could change the name while we look
    (seccomp_unotify(2)); and what it gets is open in it already. Any later call of that kind fails
    with ENOSYS.
    """

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._ram = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._listener: int | None = None

    def serve(self, listener: int) -> None:
        """Wait for the question at ``listener`` (Confinement.asks), which is ours to close."""
        self._listener = listener
        self._loop.add_reader(listener, self._answer, listener)

    def _answer(self, listener: int) -> None:
        # It is also ready when the VMM has ended; to receive would block then.
        if seccomp.is_asked(listener):
            # If it fails the VMM is gone, or gets ENOSYS and says what it could not open.
            with contextlib.suppress(OSError):
                seccomp.answer_with(listener, self._ram)
        self.close()

    def close(self) -> None:
        """Answer no more; as often as you like."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = None
        if self._ram >= 0:
            os.close(self._ram)
            self._ram = -1
