"""Confined tools: what they reach, what they may take, and when they end."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onecopy.errors import CommandFailed
from onecopy.linux.syscall import open_without_devices
from onecopy.vmm.confined_tool import (
    READ_ANY,
    READ_TREE,
    Limits,
    Task,
    ToolResult,
    named,
    run_tool,
    running,
)
from onecopy.vmm.passed_files import READ
from tests.conftest import cannot_run

MIB = 1 << 20


def _sh(script: str, *arguments: str, limits: Limits | None = None) -> ToolResult:
    limits = limits or Limits(processes=8, seconds=60)
    return run_tool(Task(["sh", "-c", script, "sh", *arguments], limits=limits))


@contextmanager
def _open(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def test_both_streams_are_returned() -> None:
    ran = _sh("echo out; echo err >&2")
    assert (ran.code, ran.out, ran.err) == (0, "out\n", "err\n")


def test_an_exit_code_that_is_fine() -> None:
    assert run_tool(Task(["sh", "-c", "exit 3"]), fine=(0, 3)).code == 3
    with pytest.raises(CommandFailed) as caught:
        _sh("echo why >&2; exit 4")
    assert (caught.value.returncode, caught.value.limit) == (4, "")
    assert "why" in caught.value.message


def test_streams_are_descriptors(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("text")
    with _open(tmp_path / "in") as given, _open(tmp_path / "out", os.O_CREAT | os.O_WRONLY) as out:
        limits = Limits(file_size=MIB)
        ran = run_tool(Task(["cat"], stdin=given, stdout=out, limits=limits))
    assert (ran.out, (tmp_path / "out").read_text()) == ("", "text")


def test_it_reads_a_folder_of_others_only_if_it_is_given_it(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("only root can have files of others read")
    folder, beside = tmp_path / "folder", tmp_path / "beside"
    folder.mkdir()
    for path in (folder / "file", beside):
        path.write_text("secret")
        path.chmod(0)
    folder.chmod(0)
    with _open(folder, os.O_PATH | os.O_DIRECTORY) as fd:
        task = Task(["cat", f"{named(fd)}/file"], {fd: READ_TREE}, capabilities=READ_ANY)
        assert run_tool(task).out == "secret"
        with pytest.raises(CommandFailed, match="ermission denied"):
            run_tool(Task(task.argv, task.rights))
        for other in (f"{named(fd)}/../beside", str(beside), "/etc/shadow"):
            with pytest.raises(CommandFailed, match="ermission denied"):
                run_tool(Task(["cat", other], task.rights, capabilities=READ_ANY))


def test_it_opens_no_device_of_a_tree(tmp_path: Path) -> None:
    """Not even by the names at which others can: a tree of anybody's may hold the host's disk."""
    if os.geteuid() != 0:
        cannot_run("only root can make devices")
    os.mknod(tmp_path / "zero", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    (tmp_path / "file").write_text("text")
    for name in ("file", "zero"):
        for by_path in (False, True):
            # It is the tool's, and ends with it.
            fd = open_without_devices(tmp_path)
            folder = str(tmp_path) if by_path else named(fd)
            argv = ["head", "-c", "4", f"{folder}/{name}"]
            task = Task(argv, {fd: READ_TREE}, over={fd: tmp_path}, capabilities=READ_ANY)
            try:
                if name == "file":
                    assert run_tool(task).out == "text"
                else:
                    with pytest.raises(CommandFailed, match="ermission denied"):
                        run_tool(task)
            finally:
                os.close(fd)
    with (tmp_path / "zero").open("rb") as device:
        assert device.read(1) == b"\0"


def test_it_has_no_network_and_no_other_descriptor(tmp_path: Path) -> None:
    (tmp_path / "held").touch()
    with _open(tmp_path / "held") as held:
        os.set_inheritable(held, True)
        script = f"""
import os, socket
try:
    socket.socket()
except PermissionError:
    print("no socket")
try:
    os.fstat({held})
except OSError:
    print("no descriptor")
"""
        with _open(Path("/usr"), os.O_PATH) as usr:
            ran = run_tool(Task(["python3", "-I", "-S", "-c", script], {usr: READ_TREE}))
        assert ran.out == "no socket\nno descriptor\n"
        assert os.get_inheritable(held)


def test_it_is_ended_when_its_time_is_up() -> None:
    start = time.monotonic()
    with pytest.raises(CommandFailed, match=r"more time than 0\.3 s") as caught:
        # What it started holds its streams open.
        _sh("sleep 1000 & sleep 1000", limits=Limits(seconds=0.3, processes=8))
    assert caught.value.limit == "time"
    assert time.monotonic() - start < 100


@pytest.mark.parametrize(
    ("script", "limits", "limit"),
    [
        ("import os; x = b'x' * (1 << 30)", Limits(memory=512 * MIB), "memory"),
        ("open('/proc/self/fd/0', 'r'); print('x' * (8 << 20))", Limits(), "output"),
        ("while True: pass", Limits(seconds=1), "time"),
    ],
)
def test_it_takes_no_more_than_it_may(script: str, limits: Limits, limit: str) -> None:
    if limit == "memory":
        script = f"import sys\ntry:\n  {script}\nexcept MemoryError:\n  sys.exit('out of memory')"
    with pytest.raises(CommandFailed) as caught:
        run_tool(Task(["python3", "-I", "-S", "-c", script], limits=limits))
    assert caught.value.limit == limit


def test_it_writes_no_larger_file_than_it_may(tmp_path: Path) -> None:
    with _open(tmp_path / "out", os.O_CREAT | os.O_WRONLY) as out:
        limits = Limits(file_size=MIB)
        with pytest.raises(CommandFailed) as caught:
            run_tool(Task(["head", "-c", "4M", "/dev/zero"], stdout=out, limits=limits))
    assert caught.value.limit in ("file size", "") and (tmp_path / "out").stat().st_size <= MIB


def test_it_starts_no_more_processes_than_it_may() -> None:
    if os.geteuid() != 0:
        cannot_run("the limit is that of a user of its own")
    with pytest.raises(CommandFailed, match="fork"):
        _sh("true & true & true; wait", limits=Limits(processes=1))


def test_much_that_it_says_is_cut_in_the_middle() -> None:
    ran = _sh(
        "echo first >&2; head -c 3000000 /usr/bin/sh >&2; yes | head -n 2000000 >&2; echo last >&2"
    )
    assert ran.err.startswith("first\n") and ran.err.endswith("last\n") and "[...]" in ran.err
    assert len(ran.err) < MIB


def test_it_ends_with_the_block() -> None:
    with running(Task(["sleep", "1000"])) as tool:
        process = tool._process
    assert process
    assert process.returncode == -9


def test_it_ends_with_us(tmp_path: Path) -> None:
    """Killed, we leave nothing running."""
    script = (
        "from onecopy.vmm.confined_tool import *\n"
        "with running(Task(['sleep', '1000'])) as tool:\n"
        "    print(tool._process.pid, flush=True)\n"
        "    tool.finish()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as ours:
        assert ours.stdout
        pid = int(ours.stdout.readline())
        # Until it has set what ends it.
        _until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
        pidfd = os.pidfd_open(pid)
        ours.kill()
    try:
        _until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX")
    except FileNotFoundError:
        pass
    finally:
        os.close(pidfd)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_file_to_read_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    path.chmod(0o666)
    with _open(path, os.O_RDWR) as fd, pytest.raises(CommandFailed, match="ermission denied"):
        task = Task(["sh", "-c", 'echo >"$0"', named(fd)], {fd: READ}, limits=Limits(file_size=9))
        run_tool(task)
    assert path.read_text() == "text"
