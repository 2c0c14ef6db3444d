"""Files for a QEMU that opens them for writing: it gets those that we choose.

QEMU before 8.2 opens even a file that it maps private with O_RDWR (softmmu/physmem.c,
file_ram_open). Its seccomp filter (confine.py) hands these calls to us, and the answer is a
descriptor of ours: open for reading only where the mapping is private, which the kernel does all
the same (mmap(2)). What file QEMU asks for is not looked at: it could change the name while we look
(seccomp_unotify(2)). It gets files in the order in which its command line names them.

QEMU inherits the place where its questions come in. So there is somebody to ask as long as it
lives, and a later command that plugs memory in answers from there. A guest that takes QEMU over can
answer itself, which gives it nothing: Landlock and the rights of files are as they are.
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
    """Raise Incompatible if this QEMU would need what this kernel cannot do."""
    if not is_possible(qemu):
        raise Incompatible(
            f"QEMU {qemu.version} opens the saved RAM for writing, and this kernel cannot answer "
            "such a call with a read-only file",
            hint="use QEMU 8.2, or Linux 5.9, or later; `onecopy boot` boots guests meanwhile",
        )


def is_possible(qemu: Qemu) -> bool:
    """Whether this QEMU can map a file copy-on-write without being able to write to it."""
    return qemu.rom or seccomp.can_ask()


class Answers:
    """Answers one VMM's questions with ``files``, in order, from the running event loop."""

    def __init__(self, files: Sequence[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._files = [os.dup(fd) for fd in files]
        self._listener: int | None = None

    def serve(self, listener: int) -> None:
        """Wait for questions at ``listener`` (Confinement.asks), which is ours to close."""
        self._listener = listener
        self._loop.add_reader(listener, self._answer, listener)

    def _answer(self, listener: int) -> None:
        # It is also ready when the VMM has ended; to receive would block then.
        if self._files and seccomp.is_asked(listener):
            file = self._files.pop(0)
            # If it fails the VMM is gone, or says itself what it could not open.
            with contextlib.suppress(OSError):
                seccomp.answer_with(listener, file)
            os.close(file)
            return
        self.close()

    def close(self) -> None:
        """Answer no more; as often as you like."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = None
        while self._files:
            os.close(self._files.pop())


@contextlib.contextmanager
def answering(pid: int, number: int, file: int) -> Iterator[None]:
    """Answer the next question of a running VMM, whose descriptor ``number`` it comes in at.

    Raises NotPermitted without ptrace rights over it (pidfd_getfd(2)), GuestFailed if it is gone.
    """
    try:
        pidfd = os.pidfd_open(pid)
        try:
            listener = pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)
    except PermissionError as error:
        raise NotPermitted(
            f"may not answer QEMU (process {pid}): {error.strerror}",
            hint="become root, or the user who started the guest",
        ) from error
    except OSError as error:
        raise GuestFailed(f"QEMU cannot be answered: {error.strerror}") from error
    answers = Answers([file])
    answers.serve(listener)
    try:
        yield
    finally:
        answers.close()
