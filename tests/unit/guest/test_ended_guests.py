"""What is kept of ended guests: bounded, whole or not at all, and until there is another.

Not here: which guests it is kept of (tests/vm/test_ended.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from onecopy.guest import ended_guests
from onecopy.guest.end import Cause
from onecopy.guest.ended_guests import KEPT, MOST, Deaths, Left
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.vmm import logs
from tests.conftest import cannot_run
from tests.unit.guest_kit import record
from tests.unit.small_disk import tmpfs

RESET = b"migrate_fd_cancel \n"


def dead(run: Path, name: str, console: bytes = b"hello\n", qemu: bytes = RESET) -> RunDirectory:
    """A run folder whose QEMU has ended."""
    folder = RunDirectory(run / name)
    folder.path.mkdir()
    logs.make(folder.path)
    (folder.path / logs.CONSOLE).write_bytes(console)
    (folder.path / logs.QEMU).write_bytes(qemu)
    folder.write(record(name, traced=True))
    return folder


def look(folder: RunDirectory) -> Left:
    left = ended_guests.look(folder, 0, Deaths())
    assert left
    return left


def kept(run: Path, name: str, **files: bytes) -> GuestRecord:
    folder = dead(run, name, **files)
    left = look(folder)
    ended_guests.keep(run, left)
    folder.remove()
    return left.record


def test_record_and_logs(tmp_path: Path) -> None:
    made = kept(tmp_path, "web")
    assert ended_guests.find(tmp_path, "web") == made
    assert made.ended and made.ended.cause == Cause.REBOOTED and made.ended.at
    assert logs.read(ended_guests.path(tmp_path, "web"), logs.CONSOLE) == "hello\n"
    assert ended_guests.names(tmp_path) == ["web"] and ended_guests.records(tmp_path) == [made]
    ended_guests.forget(tmp_path, "web")
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_long_logs(tmp_path: Path) -> None:
    text = b"".join(b"%09d\n" % number for number in range(20_000))
    kept(tmp_path, "web", console=text)
    log = logs.Log(ended_guests.path(tmp_path, "web"), logs.CONSOLE)
    assert b"".join(log.read()) == text[-KEPT:] and log.was_cut
    log.close()


def test_a_killed_qemu_has_no_time(tmp_path: Path) -> None:
    made = kept(tmp_path, "web", qemu=b"")
    assert made.ended and made.ended.cause == Cause.KILLED
    assert made.ended.at is None and made.ended.found > 0


def test_half_a_run_folder(tmp_path: Path) -> None:
    folder = dead(tmp_path, "web")
    for name in (logs.CONSOLE, logs.QEMU):
        (folder.path / name).unlink()
    ended_guests.keep(tmp_path, look(folder))
    assert logs.read(ended_guests.path(tmp_path, "web"), logs.CONSOLE) == ""
    # Without its record, or in another version's words, it was no guest.
    (folder.path / "guest.json").write_bytes(b"{")
    assert ended_guests.look(folder, 0, Deaths()) is None
    (folder.path / "guest.json").unlink()
    assert ended_guests.look(folder, 0, Deaths()) is None


def test_the_oldest_go(tmp_path: Path) -> None:
    left = look(dead(tmp_path, "first"))
    for number in range(MOST + 3):
        name = f"g-{number}"
        ended_guests.keep(tmp_path, replace(left, record=replace(left.record, name=name)))
        os.utime(ended_guests.path(tmp_path, name), ns=(number, number))
    assert len(ended_guests.names(tmp_path)) == MOST
    assert not ended_guests.path(tmp_path, "g-0").exists()
    assert ended_guests.path(tmp_path, f"g-{MOST + 2}").exists()


def test_another_guest_of_the_name(tmp_path: Path) -> None:
    kept(tmp_path, "web")
    kept(tmp_path, "other")
    dead(tmp_path, "web", b"a later one\n")
    # The name is a running guest's; what was kept goes with the next command.
    assert ended_guests.names(tmp_path) == ["other"]
    ended_guests.sweep(tmp_path)
    assert not ended_guests.path(tmp_path, "web").exists()
    # It ends, too.
    later = RunDirectory(tmp_path / "web")
    ended_guests.keep(tmp_path, look(later))
    ended_guests.keep(tmp_path, look(later))
    assert logs.read(ended_guests.path(tmp_path, "web"), logs.CONSOLE) == "a later one\n"


def test_one_that_is_only_starting_replaces_nothing(tmp_path: Path) -> None:
    kept(tmp_path, "web")
    folder, mark = dead(tmp_path, "web"), tmp_path / ".starting-1"
    mark.touch()
    (folder.path / "starting").symlink_to(mark)
    ended_guests.sweep(tmp_path)
    folder.remove()
    assert ended_guests.names(tmp_path) == ["web"]


def test_what_was_cut_off(tmp_path: Path) -> None:
    kept(tmp_path, "web")
    half = ended_guests.path(tmp_path, ".new")
    half.mkdir()
    (half / logs.CONSOLE).touch()
    assert ended_guests.names(tmp_path) == ["web"]
    ended_guests.sweep(tmp_path)
    assert not half.exists() and ended_guests.names(tmp_path) == ["web"]


def test_a_full_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=256k") as run:
        folder = dead(run, "web", b"x" * KEPT)
        filler = run / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
        left = look(folder)
        with pytest.raises(OSError, match="No space left"):
            ended_guests.keep(run, left)
        assert ended_guests.names(run) == []
        assert not ended_guests.path(run, ".new").exists()
        # Its own folder gives room for it (sweep.py).
        folder.remove()
        ended_guests.keep(run, left)
        assert ended_guests.find(run, "web") == left.record


def test_nothing_is_left_with_another_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("only root can end guests of another user")
    os.chown(tmp_path, 65534, 65534)
    kept(tmp_path, "web")
    assert ended_guests.records(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
