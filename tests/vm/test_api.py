"""The Python API: the documentation's examples, lifetimes, threads, and leftovers.

Not here: refused copies (test_copy.py), running programs (test_exec.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import onecopy
from onecopy import aio, errors
from onecopy.guest.run_directory import is_mark
from onecopy.guest.runtime import Runtime
from onecopy.model import Reference
from onecopy.store import Artifact
from onecopy.vmm import fork_registry
from tests.vm.conftest import vmms
from tests.vm.kept import PROJECT

#: Seconds after which something that must not block has blocked.
STUCK = 120


@pytest.fixture
def mine(saved: Artifact) -> Iterator[onecopy.Host]:
    with onecopy.Host() as opened:
        yield opened


@pytest.fixture
def hello(host: Runtime, saved: Artifact) -> Iterator[str]:
    """The saved system of the docs."""
    yield host.store.tag(Reference.parse(saved.ref), Reference("hello")).ref
    host.store.remove(Reference("hello"))


def examples(page: str) -> list[str]:
    """The programs in a page of the docs."""
    text = (PROJECT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(program: Path, *args: str) -> str:
    argv = [sys.executable, "-W", "error", program.name, *args]
    done = subprocess.run(argv, cwd=program.parent, capture_output=True, text=True, timeout=STUCK)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def suite(folder: Path, right: bool) -> None:
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import unittest\n"
        "class It(unittest.TestCase):\n"
        "    def test_it(self):\n"
        f"        with open('report', 'w') as file: file.write('says {folder.name}')\n"
        f"        self.assertTrue({right})\n"
    )


def test_the_examples_as_they_stand(host: Runtime, hello: str, tmp_path: Path) -> None:
    check, concurrent, tests = examples("docs/python.md")
    program = tmp_path / "test_program.py"
    program.write_text(check)
    suite(tmp_path / "one", True)
    suite(tmp_path / "two", False)
    assert run(program, "one", "two") == "one passed says one\ntwo failed says two\n"
    program.write_text(concurrent)
    assert re.fullmatch(r"(hello-\w{4}-[123]\n){3}", run(program))
    program.write_text(tests)
    argv = [sys.executable, "-m", "pytest", "-q", "--rootdir", ".", "-c", "/dev/null", program.name]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=STUCK)
    assert "1 passed" in done.stdout, done.stdout
    assert vmms(host) == []


def test_the_examples_of_the_package_and_the_readme(hello: str, tmp_path: Path) -> None:
    lines = (onecopy.__doc__ or "").splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    (tmp_path / "program.py").write_text(code)
    suite(tmp_path / "tests", True)
    (tmp_path / "tests/report.xml").write_text("<xml/>")
    assert len(run(tmp_path / "program.py").splitlines()) == 2
    assert len(list(tmp_path.glob("report-hello-*.xml"))) == 2
    (program,) = examples("README.md")
    (tmp_path / "program.py").write_text(program)
    assert len(re.findall(r"hello-\w{4}-\d passed", run(tmp_path / "program.py"))) == 2


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing's own is among them


def children() -> list[str]:
    """The VMMs that are children of this process, zombies included."""
    found, servers = [], set(fork_registry.pids())
    for entry in Path("/proc/self/task").glob("*/children"):
        for pid in entry.read_text().split():
            with contextlib.suppress(OSError):  # it ended meanwhile
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                found += [name] if name.startswith("qemu") and int(pid) not in servers else []
    return found


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + STUCK
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("isolated", [False, True])
def test_a_process_that_starts_many_keeps_nothing(
    host: Runtime, mine: onecopy.Host, saved: Artifact, isolated: bool
) -> None:
    with mine.start(saved.ref, 2, isolated_vmm=isolated):
        pass
    assert eventually(lambda: not children())
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        with mine.start(saved.ref, 4, name="again", isolated_vmm=isolated) as guests:
            assert guests[3].exec(["hostname"]).text == "again-4\n"
            # One that ends by itself is waited for, too.
            os.kill(guests[0].record.pid, signal.SIGKILL)
            assert guests[0].wait(STUCK)
            # A forked one is its server's child.
            assert eventually(lambda: len(children()) == (3 if isolated else 0))
        assert vmms(host) == []
        # The others ended with their block; each time it takes the place of the one before.
        assert [each.name for each in mine.ended()] == ["again-1"]
    mine.forget("again-1")
    assert eventually(lambda: not children())
    assert eventually(lambda: descriptors() == before)
    assert eventually(lambda: threading.active_count() <= threads)
    assert list((host.store.root / "leases").glob("again*.json")) == []


def test_guests_end_with_their_block(host: Runtime, mine: onecopy.Host, saved: Artifact) -> None:
    with pytest.raises(ZeroDivisionError), mine.start(saved.ref, 2, name="raises") as guests:
        assert {guest.name for guest in mine.guests()} == {"raises-1", "raises-2"}
        assert sorted(vmms(host)) == sorted(guest.record.pid for guest in guests)
        _ = 1 / 0
    assert (vmms(host), mine.guests()) == ([], [])
    with pytest.raises(errors.NotFound):
        guests[0].exec(["true"])

    with mine.start(saved.ref, name="stopped") as [guest]:
        assert not guest.wait(0)
        assert guest.stop()
        # Its name is another one's by now: that is not ended.
        with mine.start(saved.ref, name="stopped") as [other]:
            with pytest.raises(errors.NotFound, match="has ended"):
                guest.stop()
            assert other.exec(["true"]).exit_code == 0
            assert mine.guest("stopped").record == other.record


PROGRAM = """
import sys, time, onecopy
with onecopy.Host() as host, host.start(sys.argv[1], 2, name="left") as [kept, ended]:
    kept.keep()
    print("up", flush=True)
    ended.exec(["sleep", "1000"])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_program_that_is_killed(host: Runtime, saved: Artifact, number: signal.Signals) -> None:
    argv = [sys.executable, "-c", PROGRAM, saved.ref]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout
        assert program.stdout.readline() == "up\n"
        assert [each.name for each in Runtime.open().guests()] == ["left-1", "left-2"]
        program.send_signal(number)
        said = program.communicate(timeout=STUCK)[1]
    assert program.returncode == -number
    assert said.strip().endswith("KeyboardInterrupt") == (number == signal.SIGINT), said
    assert len(vmms(host)) == (2 if number == signal.SIGKILL else 1)
    # The next one to look ends what it did not want to leave.
    with onecopy.Host() as mine:
        assert [each.name for each in mine.guests()] == ["left-1"]
        assert len(vmms(host)) == 1
        assert mine.guest("left-1").exec(["hostname"]).text == "left-1\n"
    assert len(vmms(host)) == 1
    host.end(host.guest("left-1").record())
    assert not [path.name for path in host.run.iterdir() if path.is_dir() or is_mark(path)]


def test_programs(mine: onecopy.Host, saved: Artifact) -> None:
    with mine.start(saved.ref, publish=[(0, 80)]) as [guest]:
        done = guest.exec(["sh", "-c", "cat; echo bad >&2; exit 3"], stdin=b"in\xff", check=False)
        assert (done.exit_code, done.stdout, done.stderr) == (3, b"in\xff", b"bad\n")
        assert done.text == "in\ufffd"
        with pytest.raises(onecopy.ProgramFailed, match=r"exit code 7 in .* false") as failed:
            guest.exec(["sh", "-c", "echo why; false || exit 7"])
        assert (failed.value.returncode, failed.value.stdout) == (7, b"why\n")
        with pytest.raises(onecopy.ProgramFailed, match="exit code 124"):
            guest.exec(["sleep", "1000"], timeout=0.5)
        with pytest.raises(errors.InvalidInput, match="not a list of a program"):
            guest.exec("true")
        pieces: list[bytes] = []
        assert guest.exec(["echo", "piece"], stdout=pieces.append).stdout == b""
        assert b"".join(pieces) == b"piece\n"
        with pytest.raises(RuntimeError, match="a callback"):
            guest.exec(["echo"], stdout=lambda _: guest.exec(["true"]))
        assert guest.exec(["wget", "-qO-", "http://127.0.0.1/"]).text.strip() == guest.name
        assert guest.port(80) > 1024
        with pytest.raises(errors.NotFound, match="port 81"):
            guest.port(81)


def test_what_cannot_be_right(mine: onecopy.Host, saved: Artifact) -> None:
    wrong: list[tuple[type[onecopy.OnecopyError], Callable[[], object]]] = [
        (errors.NotFound, lambda: mine.start("nothing")),
        (errors.InvalidInput, lambda: mine.start(saved.ref, 0)),
        (errors.InvalidInput, lambda: mine.start(saved.ref, name="No")),
        (errors.InvalidInput, lambda: mine.start(saved.ref, publish=[(80, 0)])),
        (errors.InvalidInput, lambda: mine.start(saved.ref, 2, publish=[(65535, 80)])),
        (errors.InvalidInput, lambda: mine.start(saved.ref, accel="xen")),
        (errors.NotFound, lambda: mine.boot(saved.ref)),
        (errors.InvalidInput, lambda: mine.boot("python", memory="lots")),
    ]
    for kind, begin in wrong:
        with pytest.raises(kind), begin():  # type: ignore[attr-defined]
            pass
    with pytest.raises(errors.NotFound):
        mine.guest("nobody")
    with pytest.raises(RuntimeError, match="with block"):
        onecopy.Host().guests()


def test_threads_share_a_host_and_hosts_a_process(host: Runtime, saved: Artifact) -> None:
    def work(mine: onecopy.Host, number: int) -> str:
        with mine.start(saved.ref, 2, name=f"t{number}") as guests:
            assert {guest.name for guest in guests} <= {each.name for each in mine.guests()}
            # A VMM has its own lease, and no other's: that would outlive the other.
            for guest in guests:
                held = {path.name for path in leases(guest.record.pid)}
                assert held == {f"{guest.name}.json"}
            return guests[1].exec(["hostname"]).text

    with onecopy.Host() as one, onecopy.Host() as two, ThreadPoolExecutor(6) as pool:
        names = pool.map(work, [one, two] * 3, range(6))
        assert sorted(names) == [f"t{number}-2\n" for number in range(6)]
    assert vmms(host) == []


def leases(pid: int) -> Iterator[Path]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        # QEMU closes files meanwhile.
        with contextlib.suppress(FileNotFoundError):
            target = entry.readlink()
            if target.parent.name == "leases":
                yield target


def test_asyncio(host: Runtime, saved: Artifact) -> None:
    async def main() -> None:
        async with aio.Host() as mine, mine.start(saved.ref, 3) as guests:
            names = await asyncio.gather(*(guest.exec(["hostname"]) for guest in guests))
            assert [name.text.strip() for name in names] == [guest.name for guest in guests]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(guests[0].exec(["sleep", "1000"]), 0.5)
            assert "sleep" not in (await guests[0].exec(["ps", "-o", "args"])).text
        assert vmms(host) == []

    asyncio.run(main())


def test_boot_attach_save(
    host: Runtime, mine: onecopy.Host, busybox_root: Artifact, app: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("kept\n")
    with mine.boot(busybox_root.ref, memory="128M", name="booted", command="") as [guest]:
        assert "SeaBIOS" in guest.log()
        guest.copy_in(tmp_path / "state", "/state")
        stored = guest.save("again").artifact
        assert guest.attach(f"{app.ref}:/app").mountpoint == "/app"
        assert guest.exec(["ls", "/app"]).text == "app.py\n"
        with pytest.raises(errors.InvalidInput, match="no writable copy"):
            guest.commit("app")
        assert guest.detach("app").state == "detached"
    assert stored.ref in [each.ref for each in mine.artifacts("system")]
    with mine.start("again") as [clone]:
        clone.copy_out("/state", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "kept\n"
    host.store.remove(Reference("again"))
