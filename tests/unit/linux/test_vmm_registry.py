"""VMMs on record: processes that are known for sure, user numbers that nobody has, what sweeps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import Incompatible, InUse
from onecopy.guest.runtime import Runtime
from onecopy.linux import run_base, vmm_registry
from onecopy.linux.process import stat
from onecopy.linux.vmm_registry import Process
from onecopy.model import Reference
from onecopy.store import Store, leftovers
from onecopy.vmm import free_uids
from tests.conftest import cannot_run
from tests.unit.store_kit import put

#: Its first thread ends, and the other one stays.
_HEADLESS = """\
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where run folders lie, for this test alone."""
    folder = tmp_path / "onecopy"
    monkeypatch.setattr(run_base, "run_base", lambda: folder)
    monkeypatch.setattr(vmm_registry, "run_base", lambda: folder)
    monkeypatch.setattr("onecopy.guest.run_directory.run_base", lambda: folder)
    return folder


@pytest.fixture
def sleeper() -> Iterator[Process]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield Process(process.pid, stat(process.pid).start_ticks)
        process.kill()


def test_a_process_is_no_other_one(sleeper: Process) -> None:
    assert sleeper.lives()
    assert not Process(sleeper.pid, sleeper.start_ticks - 1).lives()
    assert not Process(1 << 22, 0).lives()
    assert vmm_registry.end([Process(sleeper.pid, sleeper.start_ticks - 1)]) == []
    assert sleeper.lives()
    assert vmm_registry.end([sleeper]) == []
    # Nobody has waited for it yet.
    assert stat(sleeper.pid).state == "Z" and not sleeper.lives()


def test_one_whose_first_thread_has_ended_lives() -> None:
    argv = [sys.executable, "-c", _HEADLESS]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        while stat(process.pid).state != "Z":
            pass
        headless = Process(process.pid, stat(process.pid).start_ticks)
        assert headless.lives()
        vmm_registry.end([headless])
        assert not headless.lives()


def test_a_registered_vmm_holds_what_its_lease_says(
    base: Path, tmp_path: Path, sleeper: Process
) -> None:
    host = Runtime.open(tmp_path / "store")
    artifact = put(host.store)
    with host.batch() as batch, host.claim("web", [artifact.digest], batch) as (folder, _):
        vmm_registry.register(folder.path, sleeper, 5)
        batch.hand_out()
    # From here on nobody has its lock.
    assert not host.store.is_locked("web")
    host.sweep()
    host.store.collect()
    assert folder.path.exists()
    assert host.store.users(artifact.digest) == ["web"]
    assert vmm_registry.users() == {5}
    with pytest.raises(InUse):
        host.store.remove(Reference.parse("app:1"))
    vmm_registry.end([sleeper])
    assert vmm_registry.users() == {5}
    Runtime.open(tmp_path / "store").store.remove(Reference.parse("app:1"))
    assert not folder.path.exists()
    assert vmm_registry.users() == set()


def test_a_batch_that_is_not_handed_out_ends_what_is_its(
    base: Path, tmp_path: Path, sleeper: Process
) -> None:
    host = Runtime.open(tmp_path / "store")
    with host.batch() as batch, host.claim("web", [], batch) as (folder, _):
        vmm_registry.register(folder.path, sleeper, 5)
    assert not sleeper.lives()
    assert host.folders() == []
    assert vmm_registry.entries() == []


def test_run_folders_of_removed_stores_go(base: Path, tmp_path: Path, sleeper: Process) -> None:
    gone, kept, mine = (Runtime.open(tmp_path / name) for name in ("gone", "kept", "mine"))
    other = Runtime.open(tmp_path / "with guest")
    vmm_registry.register(other.run / "web", sleeper, 5)
    shutil.rmtree(gone.store.root)
    shutil.rmtree(other.store.root)
    mine.sweep()
    assert not gone.run.exists()
    assert kept.run.exists() and mine.run.exists()
    # It still has a VMM.
    assert other.run.exists()
    vmm_registry.end([sleeper])
    mine.sweep()
    assert not other.run.exists() and vmm_registry.entries() == []
    # A store that was moved is there all the same.
    shutil.move(kept.store.root, tmp_path / "moved")
    Runtime.open(tmp_path / "moved")
    mine.sweep()
    assert kept.run.exists()


def test_what_cannot_be_swept_is_told_and_is_nobody_else_s_fault(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Runtime.open(tmp_path / "store")
    for name in ("bad", "good"):
        (host.run / name).mkdir()
    remove = Runtime.remove

    def failing(self: Runtime, *folders: object) -> None:
        if "bad" in str([getattr(each, "path", "") for each in folders]):
            raise PermissionError(13, "no", "bad")
        remove(self, *folders)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "remove", failing)
    monkeypatch.setattr(leftovers, "_warned", set())
    for _ in range(2):
        Runtime.open(tmp_path / "store")
    assert [path.name for path in host.folders()] == ["bad"]
    (told,) = caplog.messages
    assert "bad" in told


def test_run_folders_that_are_removed_under_a_command_are_made_again(
    base: Path, tmp_path: Path
) -> None:
    host = Runtime.open(tmp_path / "store")
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError):
        os.stat(base)  # noqa: PTH116
    with host.batch() as batch, host.claim("web", [], batch) as (folder, _):
        assert folder.path.is_dir()
        batch.hand_out()


def test_of_few_numbers_each_is_given_out_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: Process
) -> None:
    few = range(0x6F000000, 0x6F000003)
    taken = {free_uids.unused(few) for _ in few}
    assert taken == set(few)
    with pytest.raises(Incompatible, match="3"):
        free_uids.unused(few)
    # Of a command that has ended they are free again, but for what it put on record.
    vmm_registry.register(base / "0-0" / "web", sleeper, few[0])
    assert vmm_registry.users() == taken
    for entry in vmm_registry.entries():
        if not entry.holder:
            dead = entry.path.name.rpartition("=")[0] + f"={os.getpid()}-1"
            entry.path.rename(entry.path.with_name(dead))
    assert {free_uids.unused(few) for _ in range(2)} == {few[1], few[2]}
    vmm_registry.end([sleeper])
    with pytest.raises(Incompatible):
        free_uids.unused(few)


def test_a_number_that_a_process_has_is_not_given_out(base: Path) -> None:
    mine = os.geteuid()
    with pytest.raises(Incompatible):
        free_uids.unused(range(mine, mine + 1))


def test_the_number_of_a_zombie_is_given_out(base: Path) -> None:
    """In a container without an init nobody reaps VMMs, and there are few numbers."""
    if os.geteuid():
        cannot_run("only root can start a process as another user")
    few = range(0x6F000000, 0x6F000001)
    with subprocess.Popen(["sleep", "60"], user=few[0]) as process:
        with pytest.raises(Incompatible):
            free_uids.unused(few)
        sleeper = Process(process.pid, stat(process.pid).start_ticks)
        assert vmm_registry.end([sleeper]) == []
        assert stat(process.pid).state == "Z"
        assert free_uids.unused(few) == few[0]


def test_one_of_many_is_not_one_that_is_left(base: Path, sleeper: Process) -> None:
    many = range(0x70000000, 0x70000000 + free_uids.MANY)
    vmm_registry.register(base / "0-0" / "web", sleeper, many[7])
    choices = iter([many[7], many[7], many[9]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(free_uids, "_any_of", lambda _: next(choices))
        assert free_uids.unused(many) == many[9]
    assert vmm_registry.users() == {many[7]}


def test_another_process_that_registers_meanwhile_is_waited_for(base: Path) -> None:
    few = range(0x6F000000, 0x6F000040)

    def take(write: int) -> None:
        os.write(write, b"".join(free_uids.unused(few).to_bytes(4, "big") for _ in range(16)))
        os.read(hold[0], 1)

    hold, results = os.pipe(), []
    children = []
    for _ in range(4):
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                take(write)
            finally:
                os._exit(0)
        os.close(write)
        children.append(child)
        results.append(read)
    given = b"".join(os.read(read, 64) for read in results)
    os.write(hold[1], b"x" * 4)
    for child in children:
        os.waitpid(child, 0)
    for fd in (*results, *hold):
        os.close(fd)
    assert len({given[at : at + 4] for at in range(0, len(given), 4)}) == 64


def test_a_registry_that_somebody_else_made_is_refused(base: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    base.mkdir(0o700)
    (base / "vmms").symlink_to(tmp_path)
    with pytest.raises(Exception, match="cannot hold run directories"):
        store.is_held("web")
