"""Decide whether fork servers can start this host's QEMU, by having one do it.

The library takes over functions of a QEMU that nobody promised to keep. So a server of this QEMU
forks a VMM, which must answer and end. The result is kept until the host reboots, or QEMU or the
library changes. A failure is kept for an hour, because a very busy host may be its reason.

Not here: a server that fails later, whose guests start by exec, too (spawn.py).
"""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

import msgspec

from onecopy.errors import CommandFailed, Incompatible, MissingProgram, as_root
from onecopy.vmm import fork_registry, fork_server
from onecopy.vmm.confine import Confinement
from onecopy.vmm.fork_server import ForkServer
from onecopy.vmm.probe_cache import remember
from onecopy.vmm.spawn import start
from onecopy.vmm.vmm_user import new_user

#: Seconds to wait for the VMM.
_PATIENCE = 10.0
#: Seconds after which a probe that failed is repeated.
_AGAIN = 3600.0
_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
#: The Debian packages that compile the library.
_COMPILER = "apt-get install gcc libc6-dev"


class Library(msgspec.Struct, frozen=True):
    """The library for fork servers of this host's QEMU."""

    path: Path | None
    """None if each QEMU starts by exec."""
    why_not: str = ""
    """Why it does, and what to do."""


def find(binary: str, cache: Path, *, again: float = _AGAIN) -> Library:
    """Return the library, if a server with it has forked a VMM.

    Args:
        binary: QEMU.
        cache: keeps the compiled library and the probe's result.
        again: the seconds after which a probe that failed is repeated.
    """
    try:
        path = fork_server.library(cache)
        found = path.stat()
        name = f"fork-{found.st_size:x}-{found.st_mtime_ns:x}"
        why_not = remember(cache, name, binary, partial(_probe, binary, path), again=again)
    except MissingProgram:
        return Library(None, f"gcc is not installed, which fork servers need: {as_root(_COMPILER)}")
    except CommandFailed:
        return Library(None, f"gcc cannot compile fork_server.c: {as_root(_COMPILER)}")
    except OSError as error:
        return Library(None, f"cannot write to {cache}: {error.strerror or error}")
    if why_not:
        return Library(None, f"{why_not}; `onecopy doctor` tries again")
    return Library(path)


def _probe(binary: str, library: Path) -> str:
    """Have a server fork a VMM that answers and ends; return "" or why that failed."""
    import tempfile  # a probe runs once, and its result is kept

    server = ForkServer(library, store=f"probe {os.urandom(8).hex()}", accel="tcg")
    ours, theirs = socket.socketpair()
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-m", "16M", "-S"]
    argv += ["-machine", "q35", "-accel", "tcg,tb-size=8", "-mon", "m,mode=control"]
    argv += ["-chardev", f"socket,id=m,fd={theirs.fileno()}"]
    confinement = Confinement(new_user("tcg"), 0, {}, kvm=False, asks=False)
    try:
        with ours, theirs, tempfile.TemporaryFile() as output:
            passed = [theirs.fileno()]
            started = start(argv, confinement, Path("/"), output.fileno(), passed, server)
            try:
                if started.why_exec:
                    return f"this QEMU cannot be forked: {started.why_exec}"
                ours.sendall(_QUIT)
                code = started.process.wait(_PATIENCE)
            finally:
                started.process.kill()
                started.process.wait()
            output.seek(0)
            printed = output.read().decode(errors="replace").split("\n")[0]
    except (Incompatible, OSError) as error:
        return f"this QEMU cannot be forked: {error}"
    finally:
        fork_registry.end(server.store)
    return "" if code == 0 else f"a forked QEMU did not run: {printed[:200] or 'it did not answer'}"
