"""Programs in guests: exit codes, streams, time limits, and images without any tools.

The real command runs where its exit code or its process matters, otherwise the library. Not here:
`onecopy run SYSTEM -- CMD` (test_lifecycle.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from onecopy.errors import GuestFailed, NoSlot
from onecopy.guest.exec import run_captured
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
from onecopy.store import Artifact
from onecopy.vmm.monitor import connect
from tests.command import ONECOPY
from tests.vm.conftest import Boot, Clones, RunIn
from tests.vm.guests import Guests

#: Takes more and more memory (perl).
_HOG = "push @taken, 'x' x 1e6 while 1"
#: Seconds after which something that must not block has blocked.
STUCK = 120
LAST = 14_000_000  # `seq 1 LAST` prints about 115 MB, no two lines of them equal


def execute(*args: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([ONECOPY, "exec", *args], stdin=stdin, capture_output=True, timeout=STUCK)


@contextmanager
def begun(*args: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
    """The command, its standard input and output; it is gone at the end of the ``with``."""
    with subprocess.Popen(
        [ONECOPY, "exec", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        try:
            yield process, process.stdin, process.stdout
        finally:
            process.kill()


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + STUCK
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def guest(clones: Clones) -> GuestRecord:
    return clones(1)[0]


def test_exit_codes(guest: GuestRecord) -> None:
    expected = {
        "exit 0": 0,
        "exit 3": 3,
        "exit 255": 255,
        "kill -KILL $$": 128 + 9,
        "kill -TERM $$": 128 + 15,
        "kill -SEGV $$": 128 + 11,
    }
    done = {script: execute(guest.name, "--", "sh", "-c", script) for script in expected}
    assert {script: each.returncode for script, each in done.items()} == expected, done

    unknown = execute(guest.name, "no-such-program")
    assert unknown.returncode == 127
    assert b"no-such-program" in unknown.stderr
    assert execute(guest.name, "/etc/passwd").returncode == 126


def test_failures_of_onecopy_itself_are_125(host: Runtime, guest: GuestRecord) -> None:
    nobody = execute("nobody", "true")
    assert nobody.returncode == 125
    assert b"onecopy: there is no guest 'nobody'" in nobody.stderr
    assert execute(guest.name).returncode == 125
    assert execute("--no-such-option", guest.name, "true").returncode == 125
    assert execute("--timeout", "soon", guest.name, "true").returncode == 125

    with begun(guest.name, "--", "sh", "-c", "echo on; sleep 1000") as (lost, _, output):
        assert output.readline() == b"on\n"
        os.kill(guest.pid, 9)
        assert lost.wait(STUCK) == 125
    # It is then no guest any more.
    assert execute(guest.name, "true").returncode == 125


def test_streams_stay_apart_and_are_not_changed(guest: GuestRecord, run_in: RunIn) -> None:
    program = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 999);"
    program += "sys.stderr.buffer.write(bytes(range(255, -1, -1)) * 77); sys.exit(5)"
    done = execute(guest.name, "--", "python3", "-c", program)
    assert done.returncode == 5
    assert done.stdout == bytes(range(256)) * 999
    assert done.stderr == bytes(range(255, -1, -1)) * 77

    odd = ["", " two  words ", "$HOME `id` \\ ' \"", "-n", "ü\n\tx"]
    echoed = run_in(guest, "python3", "-c", "import sys; print(sys.argv[1:])", *odd)
    assert echoed.stdout.decode() == f"{odd}\n"


def test_stdin_streams_both_ways_until_its_end(guest: GuestRecord) -> None:
    data = secrets.token_bytes(6 * MIB)
    with begun("-i", guest.name, "cat") as (process, to_guest, from_guest):
        to_guest.write(b"ping\n")
        to_guest.flush()
        # Before the end of the input: nothing waits for more of it.
        assert from_guest.readline() == b"ping\n"
        with ThreadPoolExecutor(1) as pool:
            echo = pool.submit(from_guest.read)
            to_guest.write(data)
            to_guest.close()
            assert echo.result(STUCK) == data
        assert process.wait(STUCK) == 0


def test_input_is_empty_unless_asked_for(guest: GuestRecord, run_in: RunIn) -> None:
    with begun(guest.name, "cat") as (process, _, output):
        # Our standard input stays open, and the guest's `cat` ends all the same.
        assert (process.wait(STUCK), output.read()) == (0, b"")
    assert execute("-i", guest.name, "cat").stdout == b""
    with Path(__file__).open() as file:
        assert (
            execute("-i", guest.name, "cat", stdin=file.fileno()).stdout
            == Path(__file__).read_bytes()
        )

    # A program that does not read its input is no failure.
    assert run_in(guest, "true", stdin=bytes(4 * MIB)).exit_code == 0
    some = run_in(guest, "head", "-c", "5", stdin=b"12345" + bytes(4 * MIB))
    assert (some.exit_code, some.stdout) == (0, b"12345")


def test_timeout_leaves_nothing_running(guest: GuestRecord, run_in: RunIn) -> None:
    script = "trap '' TERM INT HUP; echo on; sleep 1001 & sleep 1002"
    done = execute("--timeout", "5", guest.name, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (124, b"on\n")
    assert eventually(lambda: not sleeping(guest, run_in))
    assert execute("--timeout", "60", guest.name, "--", "sh", "-c", "exit 4").returncode == 4


def sleeping(guest: GuestRecord, run_in: RunIn) -> list[str]:
    """The sleeping programs in the guest."""
    listed = run_in(guest, "ps", "-o", "args").stdout.decode()
    return re.findall(r"^sleep \d+", listed, re.MULTILINE)


def numbers() -> tuple[int, str]:
    """Size and digest of what `seq 1 LAST` prints."""
    digest, size = hashlib.sha256(), 0
    for first in range(1, LAST + 1, 1_000_000):
        last = min(first + 1_000_000, LAST + 1)
        chunk = "".join(f"{number}\n" for number in range(first, last)).encode()
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def test_a_hundred_megabytes_and_a_slow_reader(guest: GuestRecord) -> None:
    expected = numbers()
    assert expected[0] > 100_000_000
    digest, size, highest = hashlib.sha256(), 0, 0
    with begun(guest.name, "seq", "1", str(LAST)) as (process, _, output):
        while data := output.read(1 << 16):
            digest.update(data)
            size += len(data)
            if size < 20 << 16:
                time.sleep(0.1)
            highest = peak_memory(process.pid) or highest
        assert process.wait(STUCK) == 0
    assert (size, digest.hexdigest()) == expected
    # It waits for its reader, and keeps nothing back itself.
    assert 0 < highest < 100 * MIB


def peak_memory(pid: int) -> int:
    """Bytes of memory that a process had at most (proc(5)); 0 once it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else 0


def test_a_child_left_behind_holds_nothing_up(guest: GuestRecord, run_in: RunIn) -> None:
    done = execute(guest.name, "--", "sh", "-c", "sleep 1003 & echo done; echo bad >&2; exit 6")
    assert (done.returncode, done.stdout, done.stderr) == (6, b"done\n", b"bad\n")
    assert sleeping(guest, run_in) == ["sleep 1003"]


def test_five_at_once_in_one_guest(guest: GuestRecord) -> None:
    # Each waits for the other four, so that all five must run at the same time.
    script = "touch /tmp/run.$0; until [ $(ls /tmp | grep -c run) = 5 ]; do sleep 0.1; done; "
    script += "seq $0 5 100000; exit $0"
    with ThreadPoolExecutor(5) as pool:
        jobs = [
            pool.submit(
                execute, "--timeout", "100", guest.name, "--", "sh", "-c", script, str(number)
            )
            for number in range(1, 6)
        ]
    for number, job in enumerate(jobs, start=1):
        done = job.result()
        assert done.returncode == number, done.stderr
        assert done.stdout.split() == [b"%d" % n for n in range(number, 100_001, 5)]


def test_more_at_once_than_there_are_ports_for(
    host: Runtime, guest: GuestRecord, run_in: RunIn
) -> None:
    folder = host.run / guest.name

    async def main() -> None:
        # A machine has 27 ports for them, and each takes two.
        holding = [
            asyncio.create_task(run_captured(folder, ["sh", "-c", "sleep 1000"])) for _ in range(13)
        ]
        while await in_use() < 26:
            await asyncio.sleep(0.1)
        with pytest.raises(NoSlot, match="no free port for the"):
            await run_captured(folder, ["true"], timeout=1)
        waiting = [
            asyncio.create_task(run_captured(folder, ["sh", "-c", f"exit {code}"], timeout=STUCK))
            for code in range(1, 5)
        ]
        await asyncio.sleep(0.5)
        assert not any(each.done() for each in waiting)
        # Cancelled, they leave at once, and those that wait take their places. One after another:
        # the agent kills one program at a time.
        for each in holding:
            each.cancel()
            await asyncio.gather(each, return_exceptions=True)
        done = await asyncio.gather(*waiting)
        assert [each.exit_code for each in done] == [1, 2, 3, 4]

    async def in_use() -> int:
        async with connect(folder) as monitor:
            chardevs = await monitor.execute("query-chardev")
        return sum(str(each["label"]).startswith("exec.") for each in chardevs)

    asyncio.run(main())
    assert eventually(lambda: not sleeping(guest, run_in))


def test_a_killed_command_leaves_no_port_behind(
    host: Runtime, guest: GuestRecord, run_in: RunIn
) -> None:
    at_first = ports_in(guest, run_in)
    with begun("-i", guest.name, "--", "sh", "-c", "echo on; sleep 1000") as (_, _, output):
        assert output.readline() == b"on\n"
        assert len(exec_ports(host, guest)) == 3
        # The end of the `with` kills it.
    assert execute(guest.name, "true").returncode == 0
    assert exec_ports(host, guest) == []
    assert ports_in(guest, run_in) == at_first


def exec_ports(host: Runtime, guest: GuestRecord) -> list[str]:
    """QEMU's character devices that belong to running programs."""

    async def ask() -> Any:
        async with connect(host.run / guest.name) as monitor:
            return await monitor.execute("query-chardev")

    labels = [str(chardev["label"]) for chardev in asyncio.run(ask())]
    assert "agent" in labels
    return [label for label in labels if label.startswith("exec.")]


def ports_in(guest: GuestRecord, run_in: RunIn) -> int:
    """How many virtio ports the guest sees, those of asking it included."""
    return len(run_in(guest, "ls", "/sys/class/virtio-ports").stdout.split())


def test_a_guest_that_ends_meanwhile(guest: GuestRecord, run_in: RunIn) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_in, guest, "sh", "-c", "echo on >/tmp/on; sleep 1000")
        assert eventually(lambda: run_in(guest, "test", "-e", "/tmp/on").exit_code == 0)
        os.kill(guest.pid, 9)
        with pytest.raises(GuestFailed, match="ended"):
            running.result(STUCK)


def test_in_a_tree_with_only_busybox(guests: Guests, minimal: Artifact, run_in: RunIn) -> None:
    guest = guests.clone(minimal)[0].record
    assert run_in(guest, "busybox", "echo", "hello").stdout == b"hello\n"
    done = run_in(guest, "sh", "-c", "readlink /proc/$$/exe; cat >/root.txt; exit 9", stdin=b"x")
    assert (done.exit_code, done.stdout) == (9, b"/bin/busybox\n")
    assert run_in(guest, "cat", "/root.txt").stdout == b"x"


def test_in_a_tree_with_one_static_program(
    boot: Boot, static_root: Artifact, run_in: RunIn
) -> None:
    guest = boot(static_root, memory=128 * MIB)
    done = run_in(guest, "probe", "42", "one", "two")
    assert (done.exit_code, done.stdout) == (42, b"one\ntwo\n")
    assert run_in(guest, "/bin/probe", "0").exit_code == 0
    assert run_in(guest, "test", "-e", "/bin/sh").exit_code == 1
    # The image has no shell; onecopy's tools do.
    assert run_in(guest, "sh", "-c", "exit $((6 * 7))").exit_code == 42
    assert run_in(guest, "bash").exit_code == 127


def test_in_a_debian_with_systemd(guests: Guests, systemd_system: Artifact, run_in: RunIn) -> None:
    guest = guests.clone(systemd_system)[0].record
    failed = run_in(guest, "systemctl", "--failed", "--plain", "--no-legend").stdout.decode()
    state = run_in(guest, "systemctl", "is-system-running")
    assert (state.exit_code, state.stdout) == (0, b"running\n"), failed
    assert run_in(guest, "systemctl", "is-active", "multi-user.target").stdout == b"active\n"
    assert run_in(guest, "cat", "/proc/1/comm").stdout == b"systemd\n"
    # The agent has logged none of that, and a program that takes all memory takes nobody with it.
    journal = run_in(guest, "sh", "-c", "journalctl -q | grep -c -e qemu-ga -e guest-exec")
    assert journal.stdout == b"0\n"
    assert run_in(guest, "perl", "-e", _HOG).exit_code == 137
    assert b"Killed process" in run_in(guest, "dmesg").stdout
    assert run_in(guest, "systemctl", "is-system-running").stdout == b"running\n"
    assert run_in(guest, "hostname").stdout.decode().strip() == guest.name
