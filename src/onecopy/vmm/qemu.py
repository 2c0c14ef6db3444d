"""The features of this host's QEMU: probed from the binary, not guessed from its version."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import msgspec

from onecopy.errors import CommandFailed, Incompatible, as_root
from onecopy.linux import files
from onecopy.subprocesses import find_program, run

BINARY = "qemu-system-x86_64"
_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'


class Qemu(msgspec.Struct, frozen=True):
    """One QEMU binary."""

    binary: str
    version: str
    machine: str
    """The versioned name of the newest q35 machine, for example ``pc-q35-7.2``."""
    machines: tuple[str, ...]
    """All q35 machines that it supports."""
    rom: bool
    """Whether it can map a read-only file copy-on-write: memory-backend-file's ``rom`` (>= 8.2).
    """
    traces: tuple[str, ...]
    """The trace events by which it logs how it ends (end_traces.py); empty if it does not."""

    def require_machine(self, machine: str) -> None:
        """Require that this QEMU supports a machine type.

        Raises:
            Incompatible: it does not.
        """
        if machine not in self.machines:
            raise Incompatible(
                f"QEMU {self.version} does not have the machine type {machine}",
                hint="start the system on the host where it was saved, or save it again here",
            )


def probe(cache: Path) -> Qemu:
    """Probe the QEMU of this host.

    This runs QEMU four times, so the result is cached until the binary changes.

    Args:
        cache: the directory for the result.

    Raises:
        MissingProgram: QEMU is not installed.
    """
    binary = find_program(BINARY)
    stat = Path(binary).resolve().stat()
    cached = cache / f"qemu-{stat.st_dev:x}-{stat.st_ino:x}-{stat.st_mtime_ns:x}.json"
    try:
        return msgspec.json.decode(cached.read_bytes(), type=Qemu)
    except (OSError, msgspec.MsgspecError):
        qemu = _probe(binary)
    files.replace(cached, msgspec.json.encode(qemu))
    return qemu


def _probe(binary: str) -> Qemu:
    version = re.search(r"version (\S+)", run([binary, "--version"]))
    machines = run([binary, "-machine", "help"])
    newest = re.search(r"^q35\s.*\(alias of (\S+)\)", machines, re.MULTILINE)
    if not version or not newest:
        raise Incompatible(
            f"{binary} has no q35 machine", hint=as_root("apt-get install qemu-system-x86")
        )
    options = run([binary, "-object", "memory-backend-file,help"])
    return Qemu(
        binary=binary,
        version=version[1],
        machine=newest[1],
        machines=tuple(re.findall(r"^(pc-q35-\S+)", machines, re.MULTILINE)),
        rom=bool(re.search(r"^\s*rom=", options, re.MULTILINE)),
        traces=_traces(binary),
    )


def _traces(binary: str) -> tuple[str, ...]:
    from onecopy.vmm import end_traces  # the result is kept

    # QEMU warns of events that it lacks. How it was built decides where it writes events.
    line = [binary, "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    for name in end_traces.WANTED:
        line += ["-trace", name]
    with contextlib.suppress(CommandFailed):
        return end_traces.of_binary(run(line, stdin=_QUIT, both=True))
    return ()
