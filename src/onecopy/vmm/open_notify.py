"""Answer a QEMU that opens files for writing with descriptors of onecopy's choice.

QEMU before 8.2 opens even a file that it maps private with O_RDWR (softmmu/physmem.c,
file_ram_open). Its seccomp filter (confine.py) forwards these calls to a listener, which answers
with a descriptor. For a private mapping that descriptor is read-only, which suffices for the kernel
(mmap(2)). The path that QEMU asks for is ignored, because QEMU could change it in the meantime
(seccomp_unotify(2)). QEMU gets the files in the order of its command line.

QEMU inherits the listener. So the listener exists as long as QEMU, and a later command that
hot-plugs memory can use it. A compromised QEMU could answer itself, which gains nothing: Landlock
and file permissions still apply.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence

from onecopy.errors import GuestFailed, Incompatible, NotPermitted
from onecopy.linux.sandbox import seccomp
from onecopy.linux.syscall import pidfd_getfd
from onecopy.vmm.qemu import Qemu


def require(qemu: Qemu) -> None:
    """Require that this QEMU can map saved RAM without write access to it.

    Raises:
        Incompatible: neither QEMU nor the kernel supports that.
    """
    if not is_possible(qemu):
        raise Incompatible(
            f"QEMU {qemu.version} opens the saved RAM for writing, and this kernel cannot answer "
            "with a read-only file",
            hint="use QEMU 8.2 or later, or Linux 5.9 or later; `onecopy boot` boots guests "
            "without either",
        )


def is_possible(qemu: Qemu) -> bool:
    """Whether this QEMU can map a file copy-on-write without write access to it."""
    return qemu.rom or seccomp.can_ask()


class Answers:
    """Answers one VMM's open requests with ``files`` in order, from the running event loop."""

    def __init__(self, files: Sequence[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._files = [os.dup(fd) for fd in files]
        self._listener: int | None = None

    def serve(self, listener: int) -> None:
        """Start to answer at ``listener`` (Confinement.asks), which this object closes."""
        self._listener = listener
        self._loop.add_reader(listener, self._answer, listener)

    def _answer(self, listener: int) -> None:
        # The listener also becomes ready when the VMM ends; receiving would then block.
        if self._files and seccomp.is_asked(listener):
            file = self._files.pop(0)
            # If this fails, the VMM has ended, or reports itself what it could not open.
            with contextlib.suppress(OSError):
                seccomp.answer_with(listener, file)
            os.close(file)
            return
        self.close()

    def close(self) -> None:
        """Stop answering; may be called repeatedly."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = None
        while self._files:
            os.close(self._files.pop())


@contextlib.contextmanager
def answer_next(pid: int, number: int, file: int) -> Iterator[None]:
    """Answer the next open request of a running VMM with ``file``.

    Args:
        number: the VMM's descriptor of the listener.

    Raises:
        NotPermitted: this user may not trace the VMM (pidfd_getfd(2)).
        GuestFailed: the VMM has ended.
    """
    try:
        pidfd = os.pidfd_open(pid)
        try:
            listener = pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)
    except PermissionError as error:
        raise NotPermitted(
            f"cannot answer QEMU (process {pid}): {error.strerror}",
            hint="run the command as root or as the user who started the guest",
        ) from error
    except OSError as error:
        raise GuestFailed(f"cannot answer QEMU: {error.strerror}") from error
    answers = Answers([file])
    answers.serve(listener)
    try:
        yield
    finally:
        answers.close()
