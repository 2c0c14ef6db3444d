"""Logs that cannot fill the host: a real process writes them, under a real limit.

Not here: that QEMU does not mind (tests/vm/test_limits.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.linux.sandbox import rlimits
from onecopy.vmm import log_room, logs
from onecopy.vmm.logs import CONSOLE, LOG_ROOM, QEMU, Log
from onecopy.vmm.vmm_limits import file_room

#: Appends so many lines, numbered through, to the console's log, and says how that ended.
WRITER = """\
import os, sys
log = os.open("console.log", os.O_WRONLY | os.O_APPEND)
number = 0
for line in sys.stdin:
    for _ in range(int(line)):
        text = b"line %058d\\n" % number
        number += 1
        try:
            done = os.write(log, text)
        except OSError as error:
            done = -error.errno
    print(done, flush=True)
"""
LINE = 64


class Writer:
    """A process that may have files of LOG_ROOM bytes."""

    def __init__(self, folder: Path) -> None:
        argv = [sys.executable, "-c", WRITER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, cwd=folder, stdin=pipe, stdout=pipe, text=True)
        rlimits.apply(self.process.pid, {rlimits.FILE_SIZE: LOG_ROOM})

    @property
    def pid(self) -> int:
        return self.process.pid

    def write(self, count: int) -> int:
        """What writing the last of ``count`` lines returned; an error's number is negative."""
        assert self.process.stdin and self.process.stdout
        print(count, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    logs.make(tmp_path)
    writer = Writer(tmp_path)
    yield writer
    with writer.process:
        writer.process.kill()


def allocated(folder: Path) -> int:
    return (folder / CONSOLE).stat().st_blocks * 512


def lines(text: str) -> list[int]:
    """The numbers of whole lines."""
    return [int(line[5:]) for line in text.splitlines(keepends=True) if len(line) == LINE]


def test_a_full_log_goes_on_when_room_is_made(writer: Writer, tmp_path: Path) -> None:
    more = LOG_ROOM // LINE
    assert writer.write(100) == LINE
    assert not logs.are_filling(tmp_path)
    assert writer.write(2 * more) == -errno.EFBIG
    assert (tmp_path / CONSOLE).stat().st_size == LOG_ROOM
    assert logs.are_filling(tmp_path)
    with contextlib.closing(Log(tmp_path, CONSOLE)) as log:
        assert lines(b"".join(log.read()).decode())[:2] == [0, 1]
        assert not log.was_cut
        log_room.make_room(tmp_path, writer.pid)
        # What was over the limit is gone, and of the rest the oldest.
        assert log.was_cut and not logs.are_filling(tmp_path)
        assert allocated(tmp_path) <= LOG_ROOM // 2 + 8192
        assert writer.write(1) == LINE
        # Who follows it sees what is new, and no NULs.
        assert b"".join(log.read()) == b"line %058d\n" % (100 + 2 * more)
    kept = logs.read(tmp_path, CONSOLE)
    found = lines(kept)
    assert "\0" not in kept
    assert found[-1] == 100 + 2 * more and found[-2] == more - 1
    assert len(found) > more // 2 - 2 and found[0] > more // 3


def test_it_never_ends(writer: Writer, tmp_path: Path) -> None:
    """Room is made again and again: the log stays small, and the newest is in it."""
    for _ in range(4):
        writer.write(2 * LOG_ROOM // LINE)
        log_room.make_room(tmp_path, writer.pid)
    assert writer.write(10) == LINE
    assert allocated(tmp_path) <= LOG_ROOM
    assert file_room(writer.pid) == 5 * LOG_ROOM
    written = 8 * LOG_ROOM // LINE
    assert lines(logs.read(tmp_path, CONSOLE))[-10:] == list(range(written, written + 10))
    # The other log, which nobody wrote to, has no more room than this one.
    assert (tmp_path / QEMU).stat().st_size == 4 * LOG_ROOM
    assert (tmp_path / QEMU).stat().st_blocks == 0


def test_a_disk_is_larger_than_a_log(writer: Writer, tmp_path: Path) -> None:
    writer.write(100)
    log_room.make_room(tmp_path, writer.pid, largest=1 << 34)
    assert file_room(writer.pid) == (1 << 34) + LOG_ROOM
    # Nothing was lost, and the log has as much room as before.
    with contextlib.closing(Log(tmp_path, CONSOLE)) as log:
        assert not log.was_cut
    assert writer.write(2 * LOG_ROOM // LINE) == -errno.EFBIG
    assert allocated(tmp_path) <= LOG_ROOM + 8192
    assert lines(logs.read(tmp_path, CONSOLE))[:101] == list(range(101))
    # A smaller one beside it changes nothing.
    log_room.make_room(tmp_path, writer.pid, largest=1 << 20)
    assert writer.write(1) == LINE


def test_what_was_planted_there_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / CONSOLE).symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic links"):
        Log(tmp_path, CONSOLE)
    with pytest.raises(FileExistsError):
        logs.make(tmp_path)
    os.mkfifo(tmp_path / QEMU)
    # Opened without waiting for somebody who writes.
    assert logs.read(tmp_path, QEMU) == ""
