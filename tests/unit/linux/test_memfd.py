"""Memory files and private pages, of this process and of real children."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import NotFound
from onecopy.linux import cow_pages, memfd
from onecopy.model import PAGE_SIZE
from tests.conftest import cannot_run

SIZE = 64 * PAGE_SIZE


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """Data, a hole, data; shorter than SIZE."""
    path = tmp_path / "content"
    with path.open("wb") as file:
        file.write(b"head")
        file.seek(40 * PAGE_SIZE)
        file.write(b"tail")
    return path


def test_it_starts_with_the_content(content: Path) -> None:
    fd = memfd.create("onecopy-test", SIZE, content)
    try:
        data = os.pread(fd, SIZE, 0)
        assert len(data) == SIZE
        assert data.startswith(b"head\0") and data[40 * PAGE_SIZE :].startswith(b"tail\0")
        assert os.fstat(fd).st_blocks * 512 < SIZE
    finally:
        os.close(fd)


def test_nobody_can_resize_it_nor_write_to_a_sealed_one(content: Path) -> None:
    for sealed in (False, True):
        fd = memfd.create("onecopy-test", SIZE, content, sealed=sealed)
        try:
            for size in (0, 2 * SIZE):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            if sealed:
                with pytest.raises(PermissionError):
                    os.pwrite(fd, b"x", 0)
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, SIZE)
            else:
                assert os.pwrite(fd, b"x", 0) == 1
        finally:
            os.close(fd)


def test_filled_again_nothing_is_left(content: Path) -> None:
    fd = memfd.create("onecopy-test", SIZE)
    try:
        os.pwrite(fd, b"x" * SIZE, 0)
        memfd.fill(fd, content)
        assert os.pread(fd, SIZE, 0).replace(b"\0", b"") == b"headtail"
        memfd.fill(fd, None)
        assert os.pread(fd, SIZE, 0) == bytes(SIZE)
    finally:
        os.close(fd)


def test_it_is_found_in_who_has_it(content: Path) -> None:
    fd = memfd.create("onecopy-test-found", SIZE, content)
    try:
        os.pwrite(fd, b"mine", 0)
        found = memfd.find(os.getpid(), "onecopy-test-found", SIZE)
        assert found is not None
        assert os.pread(found, 4, 0) == b"mine"
        os.close(found)
        assert memfd.find(os.getpid(), "onecopy-test-found", 2 * SIZE) is None
        assert memfd.find(os.getpid(), "onecopy-test-other", SIZE) is None
    finally:
        os.close(fd)
    assert memfd.find(os.getpid(), "onecopy-test-found", SIZE) is None


def test_one_that_can_be_cut_off_is_not_taken() -> None:
    fd = os.memfd_create("onecopy-test-loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        assert memfd.find(os.getpid(), "onecopy-test-loose", SIZE) is None
    finally:
        os.close(fd)


WRITER = """\
import mmap, sys
with open(sys.argv[1], "rb") as file:
    data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
data[5 * 4096] = 1
data[6 * 4096 : 6 * 4096 + 4] = b"mine"
data[30 * 4096 : 30 * 4096 + 4] = b"also"
sum(data[at] for at in range(0, len(data), 4096))
print("ready", flush=True)
for line in sys.stdin:
    print(data[6 * 4096 : 6 * 4096 + 4].hex(), flush=True)
"""


@pytest.fixture
def writer(content: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has written to its private mapping of `content`."""
    command = [sys.executable, "-c", WRITER, str(content)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def runs(process: subprocess.Popen[str], content: Path) -> list[cow_pages.Run]:
    if os.geteuid() != 0:
        cannot_run("another process's memory is seen by root")
    return cow_pages.own_runs(process.pid, str(content))


def test_what_it_has_written_and_nothing_else(
    writer: subprocess.Popen[str], content: Path, tmp_path: Path
) -> None:
    found = runs(writer, content)
    pages = [(run.offset // PAGE_SIZE, run.size // PAGE_SIZE) for run in found]
    assert pages == [(5, 2), (30, 1)]
    before = content.read_bytes()
    copy = tmp_path / "copy"
    copy.write_bytes(before)
    with copy.open("r+b", buffering=0) as out:
        cow_pages.copy_out(writer.pid, found, out.fileno())
    after = copy.read_bytes()
    assert after[6 * PAGE_SIZE :].startswith(b"mine")
    assert after[30 * PAGE_SIZE :].startswith(b"also")
    assert [n for n in range(40) if page(after, n) != page(before, n)] == [5, 6, 30]
    assert content.read_bytes() == before


def page(data: bytes, number: int) -> bytes:
    return data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]


def test_it_can_be_undone(writer: subprocess.Popen[str], content: Path) -> None:
    with content.open("rb", buffering=0) as file:
        cow_pages.revert(writer.pid, runs(writer, content), file.fileno())
    assert writer.stdin and writer.stdout
    writer.stdin.write("show\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "00000000\n"


def test_a_process_that_is_gone(writer: subprocess.Popen[str], content: Path) -> None:
    found = runs(writer, content)
    writer.kill()
    writer.wait()
    with pytest.raises(NotFound):
        cow_pages.own_runs(writer.pid, str(content))
    with pytest.raises(NotFound):
        cow_pages.copy_out(writer.pid, found, 1)
