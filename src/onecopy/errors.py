"""The tree of errors that onecopy raises.

    OnecopyError
    ├── InvalidInput           a name, reference, size or option is not valid
    ├── NotFound               no such segment, saved system, guest or file
    ├── AlreadyExists          the name is taken
    ├── InUse                  guests still use it
    ├── MissingProgram         a host program is not installed
    ├── CommandFailed          a host program ran and failed
    ├── BadSource              the source of a build cannot be used
    ├── InsufficientResources  too little memory or disk space
    ├── GuestFailed            QEMU or the guest's kernel did not start, or ended on its own
    ├── NotReady               the guest runs but did not become ready in time
    ├── AgentFailed            the guest agent refused, failed or did not answer
    ├── Incompatible           this host cannot run the request
    ├── StoreDamaged           a blob or record of the store does not match its digest or format
    ├── NotPermitted           the user lacks the permission
    ├── Restricted             the segment or system is restricted and the guest has no grant
    ├── OtherDomain            it belongs to another trust domain
    ├── NoSlot                 the guest has no free slot for a segment or disk, or no free port
    ├── TooLarge               it does not fit the guest or exceeds a limit
    ├── NotUnmounted           a process in the guest uses the mounted segment
    ├── NameConflict           the name now refers to something else
    ├── ProgramFailed          a program in a guest ran and failed
    ├── OutputFailed           standard output cannot be written
    ├── HostFailed             the host's kernel refused an operation for an unexpected reason
    ├── Unreadable             the kernel's report on a process is too large, late or cut off
    └── Interrupted            Ctrl-C or SIGTERM

Each class has a stable ``id``, shown by ``--json``, and an exit code. Each instance says what
happened and what to do about it (``hint``), and carries its data as attributes. The library raises;
only ``onecopy.__main__`` exits.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import ClassVar


def as_root(command: str) -> str:
    """Return ``command`` as a hint to root, or a hint to have an administrator run it."""
    return command if os.geteuid() == 0 else f"ask an administrator of this host to run: {command}"


class OnecopyError(Exception):
    """The base of all errors.

    Attributes:
        message: what happened.
        hint: what to do about it; may be empty.
    """

    id: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""
    """What to do where the place that fails cannot say more."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint


class InvalidInput(OnecopyError):
    """A name, reference, size or option is not valid."""

    id = "invalid-input"
    exit_code = 2


class NotFound(OnecopyError):
    """Nothing of that name exists; ``guest`` is the name if it was a guest's."""

    id = "not-found"
    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", guest: str = "") -> None:
        super().__init__(message, hint=hint)
        self.guest = guest


class InUse(OnecopyError):
    """Guests still use it: ``users`` names them."""

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
    """A host program is not installed: ``package`` is the Debian package of ``program``."""

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
        """Record the failure of a program.

        Args:
            command: its command line, quoted for a shell.
            returncode: its exit code, or -N if signal N ended it.
            output: its output, of which the message shows the last 15 lines.
            limit: the limit that it exceeded and the limit's value, such as ("time", "60 s").
        """
        what = f"exit code {returncode} from"
        if limit:
            what = f"used more {limit[0]} than {limit[1]}"
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
    """The host has too little memory or disk space; both figures are in bytes."""

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
    """QEMU or the guest did not start, or ended; ``output`` holds the last lines of both."""

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
    """The guest runs but did not become ready in time."""

    id = "not-ready"
    exit_code = 11


class AgentFailed(OnecopyError):
    """The guest agent refused a command, failed or does not answer."""

    id = "agent-failed"
    exit_code = 12
    default_hint = "`onecopy logs GUEST` shows whether the guest still works; if not, stop it"


class Incompatible(OnecopyError):
    """This host's QEMU, accelerator or kernel does not support the request."""

    id = "incompatible"
    exit_code = 13


class StoreDamaged(OnecopyError):
    """A record or blob of the store does not match its digest or format."""

    id = "store-damaged"
    exit_code = 14


class NotPermitted(OnecopyError):
    """The user lacks the permission."""

    id = "not-permitted"
    exit_code = 15


class Restricted(OnecopyError):
    """The segment or saved system is restricted and the guest has no grant."""

    id = "restricted"
    exit_code = 16


class OtherDomain(OnecopyError):
    """It belongs to another trust domain."""

    id = "other-domain"
    exit_code = 17


class NoSlot(OnecopyError):
    """The guest has no free slot for a segment or disk, or no free port for a program."""

    id = "no-slot"
    exit_code = 18


class TooLarge(OnecopyError):
    """It exceeds the guest's space for segments, its memory, its vCPUs or another limit."""

    id = "too-large"
    exit_code = 19


class NotUnmounted(OnecopyError):
    """A process in the guest uses the mounted segment: ``holders`` names it."""

    id = "not-unmounted"
    exit_code = 20

    def __init__(self, message: str, *, holders: Sequence[str], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.holders = tuple(holders)


class NameConflict(OnecopyError):
    """The name now refers to something else."""

    id = "name-moved"
    exit_code = 21


class ProgramFailed(OnecopyError):
    """A program in a guest failed; raised by the Python API only."""

    id = "program-failed"
    exit_code = 22

    def __init__(
        self, guest: str, command: str, returncode: int, stdout: bytes, stderr: bytes
    ) -> None:
        tail = "\n".join((stdout + stderr).decode(errors="replace").strip().splitlines()[-15:])
        super().__init__(
            f"exit code {returncode} in {guest} from: {command}\n{tail}".rstrip(),
            hint="127 means no such program, 124 that its time limit expired, 128 + N that "
            "signal N ended it",
        )
        self.guest = guest
        self.command = command
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class OutputFailed(OnecopyError):
    """Standard output cannot be written; if its reader is gone, the exit code is 141, silently."""

    id = "output-failed"
    exit_code = 23

    def __init__(self, fd: int, number: int) -> None:
        stream = {1: "standard output", 2: "standard error"}.get(fd, f"descriptor {fd}")
        reason = "it is closed" if number == errno.EBADF else os.strerror(number)
        super().__init__(
            f"{stream} cannot be written: {reason}",
            hint="the command did its work but could not report it; redirect its output elsewhere",
        )
        self.errno = number


class HostFailed(OnecopyError):
    """The host refused an operation; the message gives the reason."""

    id = "host-failed"
    exit_code = 24


class Unreadable(OnecopyError):
    """The kernel's report on a process is too large, too late or cut off."""

    id = "unreadable"
    exit_code = 25
    default_hint = "try again; if it fails again, leave that process out"


class Interrupted(OnecopyError):
    """Ctrl-C or SIGTERM: unfinished work was undone; a name that was already published stays."""

    id = "interrupted"
    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted")


def did_you_mean(found: Iterable[str]) -> str:
    """Return the question that begins a hint about a wrong name; "" if nothing like it is known."""
    words = " or ".join(found)
    return f"did you mean {words}? " if words else ""
