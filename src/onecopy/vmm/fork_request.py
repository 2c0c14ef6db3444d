"""Ask a fork server for a VMM: the protocol of files/fork_server.c.

The server forks a child for each connection. The child takes the request and its descriptors,
confines itself as confine.py says, and reports. It runs once this process has agreed.

Not here: the server's process (fork_server.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from onecopy.errors import NotFound
from onecopy.linux.process import stat
from onecopy.linux.vmm_registry import Process, has_ended
from onecopy.vmm import name_servers
from onecopy.vmm.confine import Confinement, filter_program

_VERSION, _MOST_FDS, _MOST_GROUPS, _MOST_WORDS, _LARGEST = 1, 64, 8, 256, 160 << 10
_SWITCH_USER, _MERGE, _LISTEN, _RULES = 1, 2, 4, 8
_HEADER = struct.Struct(f"=4I{_MOST_GROUPS}IQI{_MOST_FDS}i4I4x")
_ANSWER = struct.Struct("=4i")
_STATUS = struct.Struct("=i")
#: The steps of the child that can fail, by number.
_STEPS = (
    *("", "receive the request", "place its descriptors", "set its command line", "mount"),
    *("enter its directory", "let KSM merge its memory", "change its user"),
    *("drop its capabilities", "drop its privileges", "apply Landlock", "apply seccomp"),
    *("be confined, because QEMU already has threads", "fork"),
)
_GO = b"."
#: Seconds to wait for the child's report, and for the server's when the child has ended.
_PATIENCE, _REPORTING = 10.0, 1.0


class Listener(NamedTuple):
    """The listener for a VMM's open requests (open_notify.py)."""

    fd: int
    number: int
    """Its number in the VMM."""


class Unserved(Exception):
    """The server did not fork a VMM, and none is left: it may be started by exec."""


class ServerEnded(Unserved):
    """The server has ended meanwhile: another one may serve."""


class Unanswered(Unserved):
    """The server does not answer in time."""


class Forked:
    """A VMM that a fork server started, with the methods of Popen that its users need."""

    def __init__(self, identity: Process, pidfd: int, connection: socket.socket) -> None:
        self.identity = identity
        """The process: the server reaps it, so the kernel may say nothing of it after its end."""
        self.pid = identity.pid
        self.returncode: int | None = None
        """The exit code after the end, as Popen has it; None if the server has ended before."""
        self._pidfd = pidfd
        self._connection = connection

    def open_pidfd(self) -> int | None:
        """Return a pidfd of the process; None if its end was noticed."""
        return os.dup(self._pidfd) if self._pidfd >= 0 else None

    def begin(self) -> None:
        """Let the process, which is confined, run QEMU.

        Raises:
            Unserved: it has ended.
        """
        try:
            self._connection.send(_GO)
        except OSError as error:
            raise Unserved(f"the VMM has ended: {error.strerror}") from error

    def poll(self) -> int | None:
        """Return the exit code if the process has ended."""
        self._wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait up to ``timeout`` seconds for the end; return the exit code."""
        self._wait(timeout)
        return self.returncode

    def kill(self) -> None:
        """Kill the process."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def release(self) -> None:
        """Let the process go on without this one."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            self._connection.close()

    def _wait(self, timeout: float | None) -> None:
        if self._pidfd >= 0 and has_ended(self._pidfd, timeout):
            self._connection.settimeout(_REPORTING)
            with contextlib.suppress(OSError, struct.error):
                (status,) = _STATUS.unpack(self._connection.recv(_STATUS.size))
                self.returncode = os.waitstatus_to_exitcode(status)
            self.release()


def pack(
    argv: Sequence[str], confinement: Confinement, targets: Sequence[int], *, rules: bool
) -> bytes:
    """Pack a request.

    Args:
        targets: the number of each descriptor that comes along.
        rules: whether the second of them is a Landlock ruleset.

    Raises:
        Unserved: it is too large.
    """
    user, code = confinement.user, filter_program(confinement, executes=False)
    mounts = name_servers.mounts(confinement.etc) if confinement.etc else []
    words = [*(str(path) for pair in mounts for path in pair), *argv]
    text = b"".join(os.fsencode(word) + b"\0" for word in words)
    groups = user.groups if user else ()
    if len(targets) > _MOST_FDS or len(groups) > _MOST_GROUPS or len(argv) > _MOST_WORDS:
        raise Unserved("the request has too many parts")
    flags = _SWITCH_USER * (user is not None) | _MERGE * confinement.merge
    flags |= _LISTEN * confinement.asks | _RULES * rules
    header = _HEADER.pack(
        *(_VERSION, flags, user.id if user else 0, len(groups)),
        *(*groups, *[0] * (_MOST_GROUPS - len(groups))),
        *(confinement.capabilities, len(targets)),
        *(*targets, *[-1] * (_MOST_FDS - len(targets))),
        *(len(code), len(mounts), len(argv), len(text)),
    )
    if len(header) + len(code) + len(text) > _LARGEST:
        raise Unserved("the request is too large")
    return header + code + text


def ask(
    connection: socket.socket,
    argv: Sequence[str],
    confinement: Confinement,
    folder: Path,
    descriptors: Sequence[tuple[int, int]],
    rules: int | None,
) -> tuple[Forked, Listener | None]:
    """Have a server fork a confined VMM with the working directory ``folder``.

    Args:
        descriptors: pairs of a descriptor and its number in the VMM.
        rules: a Landlock ruleset.

    Returns:
        The VMM, and the listener for its open requests, if it makes them.

    Raises:
        Unserved: the server or its child failed. If it is for the host's sake, exec fails, too.
    """
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sent = [directory, *([] if rules is None else [rules]), *(fd for fd, _ in descriptors)]
        targets = [-1] * (len(sent) - len(descriptors)) + [number for _, number in descriptors]
        request = pack(argv, confinement, targets, rules=rules is not None)
        connection.settimeout(_PATIENCE)
        try:
            reply, fds = _exchange(connection, request, sent)
        except TimeoutError as error:
            raise Unanswered("the fork server does not answer") from error
        except OSError as error:
            raise Unserved(f"cannot ask the fork server: {error.strerror}") from error
    finally:
        os.close(directory)
    return _accept(connection, reply, fds)


def _exchange(
    connection: socket.socket, request: bytes, sent: Sequence[int]
) -> tuple[bytes, list[int]]:
    """Send a request; return the reply and its descriptors, b"" if the server has ended."""
    # A server that cannot fork replies and closes the connection. The kernel reports first that it
    # has not read the request (unix(7)), and then delivers the reply.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(connection, [request], sent)
    try:
        reply, fds, _, _ = socket.recv_fds(connection, _ANSWER.size, 1)
    except ConnectionResetError:
        reply, fds, _, _ = socket.recv_fds(connection, _ANSWER.size, 1)
    return reply, fds


def _accept(
    connection: socket.socket, reply: bytes, received: Sequence[int]
) -> tuple[Forked, Listener | None]:
    """Return the child that has reported; it ends if this fails."""
    listener = Listener(received[0], 0) if received else None
    try:
        if not reply:
            raise ServerEnded("the fork server has ended")
        if len(reply) != _ANSWER.size:
            raise Unserved("the forked QEMU has ended")
        pid, step, code, number = _ANSWER.unpack(reply)
        if step:
            raise Unserved(f"fork server: could not {_STEPS[step]}: {os.strerror(code)}")
        identity, pidfd = _open(pid, connection)
    except BaseException:
        if listener:
            os.close(listener.fd)
        raise
    return Forked(identity, pidfd, connection), listener and Listener(listener.fd, number)


def _open(pid: int, connection: socket.socket) -> tuple[Process, int]:
    """Return the child at the other end and a pidfd; while it lives nobody else has its pid.

    Raises:
        Unserved: it has ended.
    """
    with contextlib.suppress(ProcessLookupError, NotFound):
        pidfd = os.pidfd_open(pid)
        try:
            identity = Process(pid, stat(pid).start_ticks)
            if is_open(connection):
                return identity, os.dup(pidfd)
        finally:
            os.close(pidfd)
    raise Unserved("the forked QEMU has ended")


def is_open(connection: socket.socket) -> bool:
    """Whether a server or its child has the other end of a connection, and has sent no more."""
    received = select.poll()
    received.register(connection, select.POLLIN)
    return not received.poll(0)
