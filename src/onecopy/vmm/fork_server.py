"""Fork servers: QEMUs that were initialised once and fork the VMMs of one trust domain.

The socket of a server is named KEY. A VMM inherits what its creator has. So KEY covers what a
command would pass on: namespaces, control group, resource limits, scheduling. A command with others
has another server. KEY also covers the trust domain, QEMU's binary and the library: after an
upgrade new guests have another server, and the old one ends.

A server ends if it has had no children for a while. It is renewed regularly, because all its
children have the same addresses. Its end, even by SIGKILL, affects no VMM.

Not here: the library (files/fork_server.c), the request (fork_request.py), which servers run
(fork_registry.py), and whether this host's QEMU can be forked (fork_probe.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec

from onecopy.linux import child_reaper
from onecopy.linux.lock import locked_blocking
from onecopy.subprocesses import run
from onecopy.vmm import fork_registry

_SOURCES = [
    Path(__file__).with_name("files") / f"fork_{name}.c" for name in ("server", "child", "preload")
]
#: The library that a package brings along.
_SHIPPED = _SOURCES[0].with_suffix(".so")
#: What the server's command line shows. Without the library QEMU refuses it and ends at once.
_ARGUMENTS = ("-machine", "none", "-fork-server")
_COMPILE = ("-O2", "-Wall", "-shared", "-fPIC")
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


class ForkServer(msgspec.Struct, frozen=True):
    """How to reach the fork server of a trust domain, which starts when it is first needed."""

    library: Path
    store: str = ""
    """The store of its guests (`vmm_registry.store_id`)."""
    domain: str = ""
    """Their trust domain; "" is none."""
    idle: int = 600
    """Seconds until a server without children ends."""
    life: int = 3600
    """Seconds until a server is renewed."""

    def connect(self, binary: str, environment: Mapping[str, str]) -> socket.socket:
        """Return a connection to the server of ``binary``.

        The caller has set what new children inherit (spawn.py), except for descriptors.

        Raises:
            OSError: it cannot be started.
        """
        path = fork_registry.directory() / self._key(binary, environment)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if not _connects(connection, path):
                with locked_blocking(fork_registry.lock_of(path)):
                    if not _connects(connection, path):
                        path.unlink(missing_ok=True)
                        self._start(binary, environment, path)
                        if not _connects(connection, path):
                            raise ConnectionError("it ended at its start")
        except BaseException:
            connection.close()
            raise
        return connection

    def forsake(self, connection: socket.socket) -> None:
        """Have later starts use another server than the one that does not answer here."""
        with contextlib.suppress(OSError):
            Path(connection.getpeername()).unlink()

    def _start(self, binary: str, environment: Mapping[str, str], path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            settings = f"{listener.fileno()} {self.idle} {self.life}"
            added = {"LD_PRELOAD": str(self.library), "ONECOPY_FORK_SERVER": settings}
            process = subprocess.Popen(
                [binary, *_ARGUMENTS],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**environment, **added},
                pass_fds=[listener.fileno()],
                cwd="/",
                restore_signals=False,
                start_new_session=True,
            )
        fork_registry.record(path, process.pid, self.store, self.domain)
        # Otherwise Popen would warn that the process is still running.
        process.returncode = 0
        child_reaper.adopt(process.pid)

    def _key(self, binary: str, environment: Mapping[str, str]) -> str:
        parts: list[object] = [self.store, self.domain, os.geteuid(), sorted(os.getgroups())]
        parts += [sorted(environment.items()), self.idle, self.life]
        for path in (Path(binary), self.library):
            found = path.stat()
            parts += [str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]
        parts += [_namespace(name) for name in _NAMESPACES]
        parts += [resource.getrlimit(number) for number in _LIMITS]
        parts += [os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)]
        parts += [sorted(os.sched_getaffinity(0))]
        parts += [_read(name) for name in ("cgroup", "oom_score_adj", "attr/current")]
        parts += [_mask()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _connects(connection: socket.socket, path: Path) -> bool:
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def _namespace(name: str) -> str:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/self/ns/{name}").readlink())
    return ""


def _read(name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/{name}").read_bytes()
    return b""


def _mask() -> bytes:
    """Return the umask, and the capabilities that a process of this one could have."""
    status = _read("status").split(b"\n")
    return b"".join(line for line in status if line.startswith((b"Umask:", b"CapBnd:", b"CapPrm:")))


def library(cache: Path) -> Path:
    """Return the library, compiled unless a package has brought it along.

    Args:
        cache: the directory for the result.

    Raises:
        MissingProgram, CommandFailed: it cannot be compiled.
    """
    if _SHIPPED.exists():
        return _SHIPPED
    text = b"".join(each.read_bytes() for each in _SOURCES)
    digest = hashlib.sha256(text).hexdigest()[:16]
    path = cache / f"fork-server-{digest}.so"
    if not path.exists():
        import tempfile  # it is compiled once

        with tempfile.TemporaryDirectory(dir=cache) as directory:
            made = Path(directory) / path.name
            build(made)
            made.rename(path)
    return path


def build(path: Path) -> None:
    """Compile the library to ``path``.

    Raises:
        MissingProgram, CommandFailed: it cannot be compiled.
    """
    run(["gcc", *_COMPILE, "-o", path, _SOURCES[0], "-ldl"])
    path.chmod(0o555)
