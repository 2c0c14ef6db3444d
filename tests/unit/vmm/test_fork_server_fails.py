"""Fork servers that end, hang, lack something or cannot start: no VMM is lost, and a fallback told.

Not here: what a forked VMM is (test_fork_server.py).
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from onecopy.errors import Incompatible
from onecopy.linux.lock import locked_blocking
from onecopy.linux.sandbox import seccomp
from onecopy.linux.syscall import PR_SET_NO_NEW_PRIVS, prctl, syscall
from onecopy.subprocesses import find_program
from onecopy.vmm import fork_registry, fork_request, fork_server
from onecopy.vmm.fork_server import ForkServer
from onecopy.vmm.qemu import BINARY
from onecopy.vmm.spawn import release, start
from tests.unit.other_user import NOBODY, as_nobody
from tests.unit.vmm.fork_kit import (
    PATIENCE,
    Vmm,
    children,
    confinement,
    connected,
    runs,
    servers,
    vmm,
    wait_for,
)

PRCTL, PR_SET_MM = 157, 35
#: A system call, and an I/O priority (ioprio_set(2)).
IOPRIO_SET, IDLE = 251, 3 << 13


def test_the_end_of_the_server_harms_no_vmm(server: ForkServer, base: Path, tmp_path: Path) -> None:
    with vmm(tmp_path / "a", server) as before:
        (pid,) = servers(base)
        os.kill(pid, signal.SIGKILL)
        assert before.execute("query-status")["status"] == "prelaunch"
        with vmm(tmp_path / "b", server) as after:
            assert not after.started.why_exec
            assert servers(base) != [pid]
    # Nobody could report how it ended.
    assert before.process.returncode is None
    assert after.process.returncode == -signal.SIGKILL
    for found in (before, after):
        wait_for(lambda pid=found.pid: not runs(pid))  # type: ignore[misc]


def test_servers_that_are_killed_during_starts_lose_no_vmm(
    server: ForkServer, base: Path, tmp_path: Path
) -> None:
    over = threading.Event()
    killed = []

    def kill() -> None:
        while not over.wait(0.05):
            for pid in servers(base):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    killer = threading.Thread(target=kill)
    with ExitStack() as ends, ThreadPoolExecutor(4) as pool:
        killer.start()
        try:
            folders = [tmp_path / str(number) for number in range(12)]
            found = list(pool.map(lambda folder: Vmm(folder, server), folders))
        finally:
            over.set()
            killer.join()
        for each in found:
            ends.callback(each.close)
        assert len(killed) > 1
        for each in found:
            assert each.execute("query-status")["status"] == "prelaunch"
            if each.started.why_exec:
                assert isinstance(each.process, subprocess.Popen)


def test_a_child_without_its_server_serves_its_client(
    server: ForkServer, base: Path, tmp_path: Path
) -> None:
    connection, pid = connected(server, base)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not runs(pid))
    argv = [find_program(BINARY)]
    process, _ = fork_request.ask(connection, argv, confinement(), tmp_path, [], None)
    process.kill()
    assert process.wait(PATIENCE) is None


def test_a_server_that_hangs_is_killed_and_replaced(
    server: ForkServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vmm(tmp_path / "a", server) as before:
        (pid,) = servers(base)
        monkeypatch.setattr(fork_request, "_PATIENCE", 1.0)
        os.kill(pid, signal.SIGSTOP)
        # The end of a child is seen without its server.
        before.process.kill()
        assert before.process.wait(PATIENCE) is None
        with vmm(tmp_path / "b", server) as executed:
            assert "does not answer" in executed.started.why_exec
            # It would keep the descriptors of its requests.
            wait_for(lambda: not runs(pid))
        monkeypatch.setattr(fork_request, "_PATIENCE", PATIENCE)
        with vmm(tmp_path / "c", server) as forked:
            assert not forked.started.why_exec


def test_a_queue_that_is_full_delays_no_start_for_long(
    server: ForkServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "_PATIENCE", 1.0)
    with vmm(tmp_path / "a", server):
        (path,) = [each for each in (base / "forks").iterdir() if each.is_socket()]
        path.unlink()
        with ExitStack() as ends:
            full = ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            full.bind(str(path))
            full.listen(0)
            waiting = ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            waiting.connect(str(path))
            with vmm(tmp_path / "b", server) as executed:
                assert "unavailable" in executed.started.why_exec


def test_a_starter_that_hangs_delays_no_start_for_long(
    server: ForkServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vmm(tmp_path / "a", server):
        (path,) = [each for each in (base / "forks").iterdir() if each.is_socket()]
        path.unlink()
    monkeypatch.setattr(fork_server, "_PATIENCE", 0.5)
    with (
        locked_blocking(path.with_name(f"{path.name}.lock")),
        vmm(tmp_path / "b", server) as executed,
    ):
        assert "has locked" in executed.started.why_exec


def test_a_server_without_descriptors_is_replaced(
    server: ForkServer, base: Path, tmp_path: Path
) -> None:
    with vmm(tmp_path / "a", server) as before:
        # A connection would need a descriptor.
        (pid,) = fork_registry.pids()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
        with vmm(tmp_path / "b", server) as after:
            assert not after.started.why_exec
            assert len(fork_registry.pids()) == 2
            assert before.execute("query-status")
        # It still had a client.
        wait_for(lambda: not before.process.poll() and runs(pid))
    wait_for(lambda: not runs(pid))


def test_a_server_that_cannot_fork_is_told(library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="onecopy-fork-") as directory:
        folder = Path(directory)
        shutil.copy(library, folder / "library.so")
        os.chown(folder, NOBODY, NOBODY)
        told = as_nobody(lambda: _start_without_processes(folder))
    assert told == ["", "fork server: could not fork: Resource temporarily unavailable", ""]


def _start_without_processes(folder: Path) -> list[str]:
    base = folder / "base"
    base.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork_registry, "make_run_base", lambda: base)
        server = ForkServer(folder / "library.so")
        with vmm(folder / "a", server) as first:
            assert not first.started.why_exec
            (pid,) = servers(base)
            before = resource.prlimit(pid, resource.RLIMIT_NPROC)
            resource.prlimit(pid, resource.RLIMIT_NPROC, (1, before[1]))
            with vmm(folder / "b", server) as second:
                resource.prlimit(pid, resource.RLIMIT_NPROC, before)
                with vmm(folder / "c", server) as third:
                    os.kill(pid, signal.SIGKILL)
                    return [each.started.why_exec for each in (first, second, third)]


def test_a_server_ends_when_idle(server: ForkServer, base: Path, tmp_path: Path) -> None:
    short = replace(server, idle=1)
    with vmm(tmp_path / "a", short) as forked:
        (pid,) = servers(base)
        # Longer than it would be idle.
        assert not forked.process.wait(2.5)
        assert forked.execute("query-status")
        assert servers(base) == [pid]
    wait_for(lambda: not runs(pid))
    fork_registry.sweep()
    assert list((base / "forks").iterdir()) == []


def test_a_server_is_renewed(server: ForkServer, base: Path, tmp_path: Path) -> None:
    short = replace(server, life=1)
    with vmm(tmp_path / "a", short) as before:
        release(before.process)
        # It serves nobody any more, so its last client lets it end.
        wait_for(lambda: not servers(base))
        with vmm(tmp_path / "b", short) as after:
            assert not after.started.why_exec
            assert before.execute("query-status") and after.execute("query-status")
        os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: not runs(before.pid))


def test_a_server_without_a_name_ends(server: ForkServer, base: Path, tmp_path: Path) -> None:
    with vmm(tmp_path / "a", server):
        (pid,) = servers(base)
        (path,) = [each for each in (base / "forks").iterdir() if each.is_socket()]
        path.unlink()
        with vmm(tmp_path / "b", server) as after:
            assert not after.started.why_exec
            (other,) = servers(base)
            assert other != pid
            inode = path.stat().st_ino
    wait_for(lambda: not runs(pid))
    # It has left the name to the other one.
    assert path.stat().st_ino == inode


@pytest.fixture
def qemu() -> Iterator[Path]:
    """A copy of QEMU that any user can execute, and that finds its modules and firmware."""
    with tempfile.TemporaryDirectory(prefix="onecopy-qemu-") as directory:
        Path(directory).chmod(0o755)
        for name in ("lib", "share"):
            (Path(directory) / name).symlink_to(f"/usr/{name}")
        path = Path(directory) / "bin/qemu"
        path.parent.mkdir()
        yield Path(shutil.copy(find_program(BINARY), path))


def test_an_upgrade_brings_another_server(
    server: ForkServer, base: Path, library: Path, qemu: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copy(library, tmp_path / "library.so"))
    upgraded = replace(server, library=mine, idle=1)
    seen: set[int] = set()
    with ExitStack() as ends:
        for number, path in enumerate((None, qemu, mine)):
            if path:
                # As dpkg(1) replaces a file.
                Path(shutil.copy(path, path.with_suffix(".new"))).replace(path)
            found = ends.enter_context(vmm(tmp_path / str(number), upgraded, binary=str(qemu)))
            assert not found.started.why_exec
            seen |= set(servers(base))
            assert len(seen) == number + 1
    wait_for(lambda: not any(runs(pid) for pid in seen))


def test_starters_at_once_start_one_server(server: ForkServer, base: Path) -> None:
    binary = find_program(BINARY)
    with ThreadPoolExecutor(6) as pool, ExitStack() as ends:
        for each in pool.map(lambda _: server.connect(binary, {}), range(6)):
            ends.enter_context(closing(each))
        assert len(servers(base)) == 1
        assert len(fork_registry.running()) == 1


def test_what_a_killed_server_left_is_replaced(
    server: ForkServer, base: Path, tmp_path: Path
) -> None:
    with vmm(tmp_path / "a", server):
        (pid,) = servers(base)
        (path,) = [each for each in (base / "forks").iterdir() if each.is_socket()]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not runs(pid))
        path.unlink()
        path.write_text("no socket")
        with vmm(tmp_path / "b", server) as after:
            assert not after.started.why_exec


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("missing", "No such file"),
        ("truncated", "ended while starting"),
        ("empty", "ended while starting"),
        ("text", "ended while starting"),
        ("of another user", "belongs to another user"),
        ("writable", "others may write"),
        ("a link", "symbolic link"),
    ],
)
def test_a_library_that_does_not_fit_is_told(
    damage: str, why: str, server: ForkServer, base: Path, library: Path, tmp_path: Path
) -> None:
    path = tmp_path / "some library.so"
    data = library.read_bytes()
    if damage == "a link":
        path.symlink_to(library)
    elif damage != "missing":
        path.write_bytes(
            {"truncated": data[:700], "empty": b"", "text": b"hello"}.get(damage, data)
        )
        path.chmod(0o666 if damage == "writable" else 0o444)
        if damage == "of another user":
            os.chown(path, 1, 1)
    with vmm(tmp_path / "a", replace(server, library=path)) as executed:
        assert why in executed.started.why_exec
        assert isinstance(executed.process, subprocess.Popen)
    assert servers(base) == []


def test_a_path_with_spaces_and_colons_serves(
    server: ForkServer, library: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a path: with" / "library.so"
    path.parent.mkdir()
    shutil.copy(library, path)
    with vmm(tmp_path / "a", replace(server, library=path)) as forked:
        assert not forked.started.why_exec


@pytest.mark.parametrize("program", ["/bin/true", "/bin/sh"])
def test_another_program_falls_back_to_exec(
    program: str, server: ForkServer, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("wb") as out:
        argv = [program, "-c", "true"]
        started = start(argv, confinement(), tmp_path, out.fileno(), [], server)
    assert "ended while starting" in started.why_exec
    assert started.process.wait(PATIENCE) == 0
    assert isinstance(started.process, subprocess.Popen)


def test_a_directory_of_servers_that_is_none_is_told(
    server: ForkServer, base: Path, tmp_path: Path
) -> None:
    (base / "forks").write_text("")
    with vmm(tmp_path / "a", server) as executed:
        assert "not a directory" in executed.started.why_exec


def test_a_kernel_that_keeps_the_command_line_is_told(server: ForkServer, tmp_path: Path) -> None:
    # CONFIG_CHECKPOINT_RESTORE is missing.
    denied = seccomp.deny_if(PRCTL, 0, PR_SET_MM, 22)

    def work() -> str:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        seccomp.install(seccomp.program(denied), listen=False)
        with vmm(tmp_path / "a", server) as executed:
            return executed.started.why_exec

    # A filter stays with the thread.
    with ThreadPoolExecutor(1) as one:
        assert "set its command line" in one.submit(work).result()


def test_a_confinement_that_fails_starts_nothing(
    server: ForkServer, base: Path, tmp_path: Path
) -> None:
    wrong = confinement(etc=tmp_path / "missing")
    with (tmp_path / "log").open("wb") as out, pytest.raises(Incompatible, match="cannot confine"):
        start([find_program(BINARY)], wrong, tmp_path, out.fileno(), [], server)
    (pid,) = servers(base)
    wait_for(lambda: not children(pid))


@pytest.mark.parametrize("asked", [False, True])
def test_a_client_that_leaves_ends_its_child(
    asked: bool, server: ForkServer, base: Path, tmp_path: Path
) -> None:
    connection, pid = connected(server, base)
    if asked:
        argv = [find_program(BINARY)]
        process, _ = fork_request.ask(connection, argv, confinement(), tmp_path, [], None)
        assert process.poll() is None
        release(process)
    connection.close()
    wait_for(lambda: not children(pid))


def test_what_a_vmm_would_inherit_makes_another_server(server: ForkServer) -> None:
    binary = find_program(BINARY)
    keys = [server._key(binary, {})]
    assert keys == [server._key(binary, {})]
    before, limit = os.umask(0o077), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        keys.append(server._key(binary, {}))
        os.umask(before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[0] - 1, limit[1]))
        keys.append(server._key(binary, {}))
    finally:
        os.umask(before)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    keys += [server._key(binary, {"A": "b"}), replace(server, domain="x")._key(binary, {})]

    def changed() -> list[str]:
        """Of this thread alone."""
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        keys = [server._key(binary, {})]
        syscall(IOPRIO_SET, 1, 0, IDLE)
        keys.append(server._key(binary, {}))
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return [*keys, server._key(binary, {})]

    with ThreadPoolExecutor(1) as one:
        keys += one.submit(changed).result()
    assert len(set(keys)) == len(keys)
