"""A QEMU without a guest, forked by a server or started by exec, for tests of fork servers."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onecopy.linux.vmm_registry import has_ended
from onecopy.subprocesses import find_program
from onecopy.vmm import vmm_user
from onecopy.vmm.confine import Confinement
from onecopy.vmm.fork_server import ForkServer
from onecopy.vmm.qemu import BINARY
from onecopy.vmm.spawn import Started, start

PATIENCE = 60.0


def servers(base: Path) -> list[int]:
    """Return the servers whose sockets are below ``base``."""
    found = []
    for path in (base / "forks").glob("*"):
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                try:
                    connection.connect(str(path))
                except OSError:
                    continue
                peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                found.append(int.from_bytes(peer[:4], "little"))
    return found


def confinement(**options: Any) -> Confinement:
    given = {"user": vmm_user.new_user("tcg"), "kvm": False, "asks": False, **options}
    return Confinement(**{"capabilities": 0, "rights": {}, **given})


class Vmm:
    """A QEMU without a guest, with a monitor at an inherited socket."""

    def __init__(
        self,
        folder: Path,
        server: ForkServer | None,
        *more: str,
        binary: str = "",
        **options: Any,
    ) -> None:
        folder.mkdir(mode=0o711)
        self.log = folder / "log"
        argv = [
            binary or find_program(BINARY),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]
        argv += ["-machine", "q35", "-accel", "tcg,tb-size=8", "-m", "16M", "-S", *more]
        with socket.socket(socket.AF_UNIX) as listener, self.log.open("wb") as out:
            listener.bind(str(folder / "qmp"))
            listener.listen()
            fd = listener.fileno()
            argv += [
                "-chardev",
                f"socket,id=m,fd={fd},server=on,wait=off",
                "-mon",
                "m,mode=control",
            ]
            self.argv = argv
            self.started: Started = start(
                argv, confinement(**options), folder, out.fileno(), [fd], server
            )
        self.process = self.started.process
        self.pid = self.process.pid
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.settimeout(PATIENCE)
        self.monitor.connect(str(folder / "qmp"))
        self.lines = self.monitor.makefile("r")
        assert "QMP" in self.lines.readline(), self.log.read_text()
        self.execute("qmp_capabilities")

    def close(self) -> None:
        self.lines.close()
        self.monitor.close()
        self.process.kill()
        self.process.wait()

    def execute(self, command: str) -> Any:
        self.monitor.sendall(json.dumps({"execute": command}).encode())
        while "return" not in (reply := json.loads(self.lines.readline())):
            pass
        return reply["return"]

    def read(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()

    def descriptors(self) -> list[str]:
        found = [os.readlink(each) for each in Path(f"/proc/{self.pid}/fd").iterdir()]  # noqa: PTH115
        return sorted(re.sub(r"\d+|/\S+/", "", each) for each in found)


@contextmanager
def vmm(folder: Path, server: ForkServer | None, *more: str, **options: Any) -> Iterator[Vmm]:
    found = Vmm(folder, server, *more, **options)
    try:
        yield found
    finally:
        found.close()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> str:
    """Return the process ids of a server's children, as the kernel writes them."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def connected(server: ForkServer, base: Path) -> tuple[socket.socket, int]:
    """Connect to the only server, which has forked a child; return its process id, too."""
    connection = server.connect(find_program(BINARY), {})
    (pid,) = servers(base)
    wait_for(lambda: children(pid))
    return connection, pid


def runs(pid: int) -> bool:
    """Whether any thread of a process runs: not of a zombie, which process 1 need not reap."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not has_ended(pidfd, 0)
    finally:
        os.close(pidfd)
