"""The one door to external programs: what they get, what a failure says, that none is left."""

import asyncio
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecopy import subprocesses as door
from onecopy.errors import CommandFailed, MissingProgram

_PARENT = """
import sys, time
from onecopy.subprocesses import run
try:
    run(["sleep", sys.argv[1]])
except KeyboardInterrupt:
    time.sleep(1000)  # we live on: it is not our end that ends the child
"""


def test_a_missing_program_names_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(door, "_PATH", str(tmp_path))
    for program, package in door.PACKAGES.items():
        with pytest.raises(MissingProgram) as caught:
            door.run([program])
        assert (caught.value.program, caught.value.package) == (program, package)
        assert caught.value.hint == f"apt-get install {package}"


def test_a_failure_shows_both_streams_and_a_command_to_paste(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    script = 'echo said; echo "it broke" >&2; touch "$0"; exit 3'
    with pytest.raises(CommandFailed) as caught:
        door.run(["sh", "-c", script, mark], hint="try again")
    error = caught.value
    assert (error.returncode, error.hint) == (3, "try again")
    assert "said" in error.message
    assert "it broke" in error.message
    assert error.command in error.message
    mark.unlink()
    pasted = subprocess.run(["bash", "-c", error.command], capture_output=True, check=False)
    assert (pasted.returncode, pasted.stdout, pasted.stderr) == (3, b"said\n", b"it broke\n")
    assert mark.exists()


def test_a_long_output_is_cut_in_the_message_only() -> None:
    with pytest.raises(CommandFailed) as caught:
        door.run(["sh", "-c", "seq 1000; exit 1"])
    assert "\n1000" in caught.value.message
    assert "\n900\n" not in caught.value.message
    assert "\n900\n" in caught.value.output


def test_what_a_program_prints_is_bounded() -> None:
    with pytest.raises(CommandFailed, match="more output than 64 MiB") as caught:
        door.run(["sh", "-c", "echo why >&2; exec cat /dev/zero"])
    assert (caught.value.limit, caught.value.output) == ("output", "why\n")
    script = "echo first >&2; head -c 9000000 /dev/zero >&2; echo last >&2; exit 1"
    with pytest.raises(CommandFailed) as caught:
        door.run(["sh", "-c", script])
    assert len(caught.value.output) < 1 << 20
    assert caught.value.output.startswith("first\n")
    assert caught.value.output.strip().endswith("last")


def test_a_program_need_not_read_what_it_is_given() -> None:
    data = bytes(1 << 20)
    assert door.run(["true"], stdin=data) == ""
    assert door.run(["sh", "-c", "cat; cat >&2"], stdin=data, both=True) == "\0" * len(data)
    assert door.run(["cat"], stdin=b"") == ""


def test_standard_input_is_empty() -> None:
    assert door.run(["readlink", "/proc/self/fd/0"]) == "/dev/null\n"
    assert door.run(["cat"], stdin=b"given") == "given"


def test_the_environment_is_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD_OF_MINE", "x")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("http_proxy", "http://proxy.invalid")
    lines = door.run(["env"], env={"EXTRA": "1"}).splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert seen["LC_ALL"] == "C.UTF-8"
    assert seen["EXTRA"] == "1"
    assert seen["http_proxy"] == "http://proxy.invalid"
    assert "/usr/bin" in seen["PATH"]
    assert "LD_PRELOAD_OF_MINE" not in seen


def test_what_a_program_makes_does_not_depend_on_our_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        door.run(["touch", tmp_path / "file"])
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_us(number: signal.Signals) -> None:
    """Interrupted, we end it; killed, the kernel does."""
    # Its own length of sleep tells this child from all others.
    length = f"{1000 + os.getpid()}.{time.monotonic_ns()}"
    argv = [sys.executable, "-c", _PARENT, length]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as parent:
        child = _pid_of(["sleep", length])
        pidfd = os.pidfd_open(child)
        try:
            parent.send_signal(number)
            # A zombie that nobody reaps counts as gone, so: the pidfd.
            assert select.select([pidfd], [], [], 30)[0], "the child lives on"
        finally:
            os.close(pidfd)
            parent.kill()
    assert parent.returncode != 0


def _pid_of(argv: list[str]) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                cmdline = (entry / "cmdline").read_bytes().decode().split("\0")[:-1]
            except OSError:
                continue
            if cmdline and [Path(cmdline[0]).name, *cmdline[1:]] == argv:
                return int(entry.name)
        time.sleep(0.01)
    raise AssertionError(f"{shlex.join(argv)} does not run")


def test_a_child_that_ignores_a_polite_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """_end_group waits for the program to tidy up, but not for ever."""
    script = "trap '' TERM; echo up; while :; do sleep 1; done"
    process = subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    )
    assert process.stdout is not None
    process.stdout.readline()
    real = process.wait
    monkeypatch.setattr(process, "wait", lambda patience=None: real(patience and 0.2))
    door._end_group(process)
    assert process.returncode == -signal.SIGKILL


def test_a_users_own_command_ends_with_us(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    async def interrupted() -> None:
        command = "sleep 1000 & echo $! >$FILE; wait"
        running = asyncio.ensure_future(door.run_shell(command, {"FILE": str(file)}))
        while not (file.exists() and file.read_text().strip()):
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(interrupted())
    # Not the shell alone, but what it has started: it may be a zombie, which runs nothing.
    assert not Path(f"/proc/{file.read_text().strip()}/exe").exists()


def test_what_a_users_own_command_says() -> None:
    command = "echo $MINE; echo too >&2; exit 3"
    assert asyncio.run(door.run_shell(command, {"MINE": "here"})) == (3, "here\ntoo")
