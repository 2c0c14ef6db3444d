"""Every error onecopy raises, as one tree.

OnecopyError
├── InvalidInput       what was typed or passed cannot be right
├── NotFound           no such segment, system, guest or file
├── AlreadyExists      the name is taken
├── InUse              something still uses it
├── MissingProgram     a program of the host is not installed
├── CommandFailed      a program of the host ran and failed
├── BadSource          the source of a build cannot be used
├── InsufficientResources          too little memory or disk
├── GuestFailed        QEMU or the guest's kernel did not start, or ended on its own
├── NotReady           the guest runs but never became ready
├── AgentFailed        the guest agent refused, failed or did not answer
├── Incompatible       this host cannot run what was asked for
├── StoreDamaged       the store holds something that it must not
├── NotPermitted       this user may not do that
├── Restricted         it is restricted, and the guest is not granted it
├── OtherDomain        it belongs to another trust domain
├── NoSlot             the guest has no slot left for a segment or disk, or port for a program
├── TooLarge           it does not fit the guest, or is more than a limit allows
├── NotUnmounted       a process in the guest holds the segment
├── NameConflict          the name means something else by now
├── ProgramFailed      a program in a guest ran and failed
├── OutputFailed       standard output cannot be written
├── HostFailed         the host's kernel refused something that nobody foresaw
├── Unreadable         the kernel's account of a process is too large, late or cut off
└── Interrupted        Ctrl-C or SIGTERM

Each class owns a stable ``id`` (shown by ``--json``) and an exit code; each instance says what
happened, what to do about it (``hint``), and carries its data as attributes. The library raises;
only ``onecopy.__main__`` exits.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import ClassVar


def as_root(command: str) -> str:
    """A hint to run what only root may, for who is root or not."""
    return command if os.geteuid() == 0 else f"ask who administers this host to run: {command}"


class OnecopyError(Exception):
    """Base of all; ``message`` says what happened, ``hint`` what to do."""

    id: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""
    """What to do where the place that fails cannot say more."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint


class InvalidInput(OnecopyError):
    """A name, reference, size or option that cannot be right."""

    id = "invalid-input"
    exit_code = 2


class NotFound(OnecopyError):
    """Nothing of that name; ``guest`` is the name if it was to be a guest's."""

    id = "not-found"
    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", guest: str = "") -> None:
        super().__init__(message, hint=hint)
        self.guest = guest


class InUse(OnecopyError):
    """``users`` are the guests that hold it."""

    id = "in-use"
    exit_code = 4

    def __init__(self, message: str, *, users: Sequence[str], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.users = tuple(users)


class AlreadyExists(OnecopyError):
    """The name is taken."""

    id = "already-exists"
    exit_code = 5


class MissingProgram(OnecopyError):
    """``program`` is not installed; ``package`` is the Debian package that has it."""

    id = "missing-program"
    exit_code = 6

    def __init__(self, program: str, package: str) -> None:
        super().__init__(
            f"the program {program!r} is not installed",
            hint=as_root(f"apt-get install {package}"),
        )
        self.program = program
        self.package = package


class CommandFailed(OnecopyError):
    """A host program failed; ``command`` can be pasted into a shell."""

    id = "command-failed"
    exit_code = 7
    default_hint = "run the command of the message by hand to see more"

    def __init__(
        self,
        command: str,
        returncode: int,
        output: str,
        *,
        limit: tuple[str, str] | None = None,
        hint: str = "",
    ) -> None:
        """``limit`` is set if it took more than it may: of "time", for example, and how much."""
        what = f"exit code {returncode} from"
        if limit:
            what = f"more {limit[0]} than {limit[1]} taken by"
        tail = "\n".join(output.strip().splitlines()[-15:])
        super().__init__(f"{what}: {command}\n{tail}".rstrip(), hint=hint)
        self.command = command
        self.returncode = returncode
        self.output = output
        self.limit = limit[0] if limit else ""


class BadSource(OnecopyError):
    """The source of a build is missing, unreadable or unsafe."""

    id = "bad-source"
    exit_code = 8
    default_hint = "check that the source exists, can be read, and is of the kind that was named"


class InsufficientResources(OnecopyError):
    """Too little of ``what`` ("memory", "disk"); both figures in bytes."""

    id = "not-enough"
    exit_code = 9

    def __init__(self, what: str, *, needed: int, available: int, hint: str = "") -> None:
        super().__init__(
            f"not enough {what}: {needed >> 20} MiB needed, {available >> 20} MiB available",
            hint=hint,
        )
        self.what = what
        self.needed = needed
        self.available = available


class GuestFailed(OnecopyError):
    """QEMU or the guest did not start, or ended; ``output`` is what both printed last."""

    id = "guest-failed"
    exit_code = 10
    default_hint = "`onecopy logs GUEST` shows what the guest and its QEMU printed"

    def __init__(
        self,
        message: str,
        *,
        command: str = "",
        returncode: int | None = None,
        output: str = "",
        hint: str = "",
    ) -> None:
        tail = "\n".join(output.strip().splitlines()[-15:])
        super().__init__(f"{message}\n{tail}".rstrip(), hint=hint)
        self.command = command
        self.returncode = returncode
        self.output = output


class NotReady(OnecopyError):
    """The guest runs, but the sign of readiness did not come in time."""

    id = "not-ready"
    exit_code = 11


class AgentFailed(OnecopyError):
    """The guest agent refused a command, or does not answer."""

    id = "agent-failed"
    exit_code = 12
    default_hint = "`onecopy logs GUEST` shows whether the guest still works; if not, stop it"


class Incompatible(OnecopyError):
    """This host's QEMU, accelerator or kernel cannot do what was asked for."""

    id = "incompatible"
    exit_code = 13


class StoreDamaged(OnecopyError):
    """A record or blob of the store is not what its name says."""

    id = "store-damaged"
    exit_code = 14


class NotPermitted(OnecopyError):
    """This user may not do that."""

    id = "not-permitted"
    exit_code = 15


class Restricted(OnecopyError):
    """The segment or saved system is restricted, and this guest is not granted it."""

    id = "restricted"
    exit_code = 16


class OtherDomain(OnecopyError):
    """It belongs to another trust domain."""

    id = "other-domain"
    exit_code = 17


class NoSlot(OnecopyError):
    """The guest has no slot left for a further segment or disk, or port for a program."""

    id = "no-slot"
    exit_code = 18


class TooLarge(OnecopyError):
    """It does not fit the guest's room for segments, memory or processors, or exceeds a limit."""

    id = "too-large"
    exit_code = 19


class NotUnmounted(OnecopyError):
    """A process of the guest holds it."""

    id = "not-unmounted"
    exit_code = 20

    def __init__(self, message: str, *, holders: Sequence[str], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.holders = tuple(holders)


class NameConflict(OnecopyError):
    """The name means something else by now."""

    id = "name-moved"
    exit_code = 21


class ProgramFailed(OnecopyError):
    """A program in a guest failed; in the Python API only."""

    id = "program-failed"
    exit_code = 22

    def __init__(
        self, guest: str, command: str, returncode: int, stdout: bytes, stderr: bytes
    ) -> None:
        tail = "\n".join((stdout + stderr).decode(errors="replace").strip().splitlines()[-15:])
        super().__init__(
            f"exit code {returncode} in {guest} from: {command}\n{tail}".rstrip(),
            hint="127 is no such program, 124 that its time was up, 128 + n signal n",
        )
        self.guest = guest
        self.command = command
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class OutputFailed(OnecopyError):
    """Standard output cannot be written; with 141, and without a word, if its reader is gone."""

    id = "output-failed"
    exit_code = 23

    def __init__(self, fd: int, number: int) -> None:
        stream = {1: "standard output", 2: "standard error"}.get(fd, f"descriptor {fd}")
        said = "it is closed" if number == errno.EBADF else os.strerror(number)
        super().__init__(
            f"{stream} cannot be written: {said}",
            hint="what the command did is done, but not told: send its output somewhere else",
        )
        self.errno = number


class HostFailed(OnecopyError):
    """The host refused something, for a reason that the message gives."""

    id = "host-failed"
    exit_code = 24


class Unreadable(OnecopyError):
    """The kernel's account of a process is too large, too late or cut off."""

    id = "unreadable"
    exit_code = 25
    default_hint = "try again; if it fails again, leave that process out"


class Interrupted(OnecopyError):
    """Ctrl-C or SIGTERM: what was begun is undone; a name given just before stays, whole."""

    id = "interrupted"
    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted")
