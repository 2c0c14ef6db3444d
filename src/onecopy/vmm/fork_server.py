"""Fork servers: QEMUs that were initialised once and fork the VMMs of one trust domain.

The socket of a server is named KEY. A VMM inherits what its creator has. So KEY covers what a
command would pass on: namespaces, control group, resource limits, scheduling, restrictions. A
command with others has another server. KEY also covers the trust domain and the accelerator, QEMU's
binary, this host's libraries and the library here: after an upgrade new guests have another server,
and the old one ends.

A server ends if it has had no children for a while. It is renewed regularly, because all its
children have the same addresses. One that does not answer is killed. Its end affects no VMM.

Not here: the library (files/fork_server.c), the request (fork_request.py), which servers run
(fork_registry.py), and whether this host's QEMU can be forked (fork_probe.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from onecopy.linux import child_reaper, memfd, process
from onecopy.linux.lock import locked_blocking
from onecopy.linux.syscall import PR_GET_MEMORY_MERGE, buffer, prctl, syscall
from onecopy.linux.vmm_registry import has_ended
from onecopy.subprocesses import run
from onecopy.vmm import fork_registry
from onecopy.vmm.fork_request import Unserved, is_open

_SOURCES = [
    Path(__file__).with_name("files") / f"fork_{name}.c"
    for name in ("server", "heap", "template", "child", "accel", "preload")
]
#: The library that a package brings along.
_SHIPPED = _SOURCES[0].with_suffix(".so")
#: What the server's command line shows. Without the library QEMU refuses it and ends at once.
_ARGUMENTS = ("-machine", "none", "-fork-server")
#: Seconds for a server to start, and for a killed one to end; and between two looks.
_PATIENCE, _PAUSE = 10.0, 0.001
#: This host's shared libraries; ldconfig(8) replaces it when one is upgraded.
_LIBRARIES = Path("/etc/ld.so.cache")
_COMPILE = ("-O2", "-Wall", "-shared", "-fPIC")
#: The most that is told of what a server has printed; and struct ucred (unix(7)).
_PRINTED, _CREDENTIALS = 500, struct.Struct("3i")
_RESTRICTIONS = (
    *(b"Umask:", b"CapInh:", b"CapPrm:", b"CapBnd:", b"CapAmb:"),
    *(b"NoNewPrivs:", b"Seccomp:", b"Seccomp_filters:", b"SigBlk:", b"SigIgn:"),
)
#: System calls (asm/unistd_64.h), ioprio_get(2)'s argument, and more NUMA nodes than hosts have.
_IOPRIO_GET, _GET_MEMPOLICY, _OF_THREAD, _NODES = 252, 239, 1, 1024
#: Larger than any file of /proc that is read here.
_LARGEST = 1 << 16
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


class ForkServer(msgspec.Struct, frozen=True):
    """How to reach the fork server of a trust domain, which starts when it is first needed."""

    library: Path
    store: str = ""
    """The store of its guests (`vmm_registry.store_id`)."""
    domain: str = ""
    """Their trust domain; "" is none."""
    accel: str = ""
    """Their accelerator, which the server prepares; "" if they differ."""
    idle: int = 600
    """Seconds until a server without children ends."""
    life: int = 3600
    """Seconds until a server is renewed."""

    def connect(self, binary: str, environment: Mapping[str, str]) -> socket.socket:
        """Return a connection to the server of ``binary``.

        The caller has set what new children inherit (spawn.py), except for descriptors.

        Raises:
            Unserved, OSError, NotPermitted: it cannot be started.
        """
        path = fork_registry.directory() / self._key(binary, environment)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # The queue of a server that hangs is full at some time.
            patience = struct.pack("ll", int(_PATIENCE), 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            if not _connects(connection, path):
                with locked_blocking(fork_registry.lock_of(path), _PATIENCE):
                    if not _connects(connection, path):
                        path.unlink(missing_ok=True)
                        self._start(binary, environment, path, connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _start(
        self, binary: str, environment: Mapping[str, str], path: Path, connection: socket.socket
    ) -> None:
        """Start a server, and connect to it."""
        with (
            _copied(self.library) as library,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
            os.fdopen(memfd.scratch("errors"), "rb") as errors,
        ):
            listener.bind(str(path))
            passed = listener.fileno(), library
            settings = (*passed, self.idle, self.life, self.accel)
            added = {
                "LD_PRELOAD": f"/proc/self/fd/{library}",
                "ONECOPY_FORK_SERVER": " ".join(map(str, settings)),
            }
            started = subprocess.Popen(
                [binary, *_ARGUMENTS],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**environment, **added},
                pass_fds=passed,
                cwd="/",
                restore_signals=False,
                start_new_session=True,
            )
            try:
                fork_registry.record(path, started.pid, self.store, self.domain)
                _await(started, connection, path)
            except BaseException as error:
                started.kill()
                started.wait()
                path.unlink(missing_ok=True)
                if isinstance(error, Unserved):
                    text = memfd.take(errors.fileno(), _PRINTED).decode(errors="replace")
                    printed = text.split("\n")[0]
                    raise Unserved(f"{error}: {printed}" if printed else str(error)) from error
                raise
        # Otherwise Popen would warn that the process is still running.
        started.returncode = 0
        child_reaper.adopt(started.pid)

    def _key(self, binary: str, environment: Mapping[str, str]) -> str:
        parts: list[object] = [self.store, self.domain, os.geteuid(), sorted(os.getgroups())]
        parts += [sorted(environment.items()), self.idle, self.life, self.accel]
        parts += [_file(path) for path in (Path(binary), self.library, Path("/"))]
        if _LIBRARIES.exists():
            parts += [_file(_LIBRARIES)]
        parts += [_namespace(name) for name in _NAMESPACES]
        parts += [resource.getrlimit(number) for number in _LIMITS]
        parts += [os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)]
        parts += [sorted(os.sched_getaffinity(0))]
        names = ("cgroup", "oom_score_adj", "attr/current", "personality")
        parts += [_read(name) for name in names]
        parts += [_restrictions(), *_policies()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def forsake(connection: socket.socket) -> None:
    """Kill the server of a connection, which does not answer.

    Otherwise it would keep what the request has sent: the lease of the guest, which starts by exec.
    """
    pid, _, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            # Otherwise the server has ended, and another process may have its pid.
            if is_open(connection):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                has_ended(pidfd, _PATIENCE)
        finally:
            os.close(pidfd)


def is_server(pid: int) -> bool:
    """Whether a process of root's or of this user's is a fork server.

    Raises:
        NotFound: it does not exist.
    """
    return tuple(process.cmdline(pid)[1:]) == _ARGUMENTS


def _connects(connection: socket.socket, path: Path) -> bool:
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def _await(server: subprocess.Popen[bytes], connection: socket.socket, path: Path) -> None:
    """Connect to a server as soon as it listens."""
    deadline = time.monotonic() + _PATIENCE
    while not _connects(connection, path):
        if (code := server.poll()) is not None:
            raise Unserved(f"the fork server ended while starting (exit code {code})")
        if time.monotonic() > deadline:
            raise Unserved("the fork server did not start")
        time.sleep(_PAUSE)


@contextlib.contextmanager
def _copied(path: Path) -> Iterator[int]:
    """Copy a library that no other user may have changed, since root executes it, too.

    A server that had the file itself would keep the file's file system from being unmounted.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Unserved(f"{path} belongs to another user, or others may write to it")
        data = file.read()
    copy = memfd.create_sealed("fork-server", data)
    try:
        yield copy
    finally:
        os.close(copy)


def _file(path: Path) -> tuple[str, int, int, int, int]:
    found = path.stat()
    return str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _namespace(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/thread-self/ns/{name}")  # noqa: PTH115 - Path takes 8 times as long
    return ""


def _read(name: str) -> bytes:
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/thread-self/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, _LARGEST)
        finally:
            os.close(fd)
    return b""


def _restrictions() -> bytes:
    """Return what restricts this thread and its children, by its lines in /proc."""
    status = _read("status").split(b"\n")
    return b"".join(line for line in status if line.startswith(_RESTRICTIONS))


def _policies() -> list[object]:
    """Return the I/O priority, the NUMA policy, and whether KSM may merge all of its memory."""
    mode, nodes = buffer(bytes(4)), buffer(bytes(_NODES // 8))
    calls: tuple[Callable[[], object], ...] = (
        lambda: syscall(_IOPRIO_GET, _OF_THREAD, 0),
        lambda: syscall(_GET_MEMPOLICY, mode, nodes, _NODES, 0, 0),
        lambda: prctl(PR_GET_MEMORY_MERGE),
    )
    found: list[object] = []
    for call in calls:
        # Containers refuse some, and older kernels lack the last one.
        with contextlib.suppress(OSError):
            found.append(call())
    return [*found, mode.raw, nodes.raw]


def library(cache: Path) -> Path:
    """Return the library, compiled unless a package has brought it along.

    Args:
        cache: the directory for the result.

    Raises:
        MissingProgram, CommandFailed: it cannot be compiled.
    """
    if _SHIPPED.exists():
        return _SHIPPED
    path = cache / f"fork-server-{_source_digest()}.so"
    if not path.exists():
        import tempfile  # it is compiled once

        with tempfile.TemporaryDirectory(dir=cache) as directory:
            made = Path(directory) / path.name
            build(made)
            made.rename(path)
    return path


@functools.cache
def _source_digest() -> str:
    # Each start asks for the library.
    text = b"".join(each.read_bytes() for each in _SOURCES)
    return hashlib.sha256(text).hexdigest()[:16]


def build(path: Path) -> None:
    """Compile the library to ``path``.

    Raises:
        MissingProgram, CommandFailed: it cannot be compiled.
    """
    run(["gcc", *_COMPILE, "-o", path, _SOURCES[0], "-ldl"])
    path.chmod(0o555)
