"""residency: real files whose pages we bring into the page cache and drop from it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import InvalidInput, NotFound, NotPermitted
from onecopy.linux.counters import residency
from onecopy.model import PAGE_SIZE
from tests.conftest import cannot_run
from tests.unit.other_user import as_nobody

PAGES = 64


@pytest.fixture
def file() -> Iterator[Path]:
    """A file on disk, all of it written back, none of it in the page cache."""
    # Not tmp_path: other users must be able to enter.
    folder = Path(tempfile.mkdtemp(prefix="onecopy-"))
    folder.chmod(0o755)
    path = folder / "file"
    kind = subprocess.run(["stat", "-fc", "%T", folder], capture_output=True, text=True, check=True)
    try:
        if kind.stdout.strip() in ("tmpfs", "ramfs"):
            cannot_run("the temporary folder is memory: its pages cannot be dropped")
        path.write_bytes(os.urandom(PAGES * PAGE_SIZE))
        drop(path)
        yield path
    finally:
        shutil.rmtree(folder)


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_page(path: Path, page: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    assert len(os.pread(fd, PAGE_SIZE, page * PAGE_SIZE)) == PAGE_SIZE
    os.close(fd)


def test_in_the_cache_and_dropped(file: Path) -> None:
    assert residency.resident_bytes(file) == 0
    assert residency.resident_pages(file) == bytes(PAGES)
    file.read_bytes()
    assert residency.resident_bytes(file) == PAGES * PAGE_SIZE
    assert residency.resident_pages(file) == b"\1" * PAGES
    drop(file)
    assert residency.resident_bytes(file) == 0


def test_which_pages(file: Path) -> None:
    read_page(file, 5)
    read_page(file, 63)
    pages = residency.resident_pages(file)
    assert pages is not None
    assert [number for number, there in enumerate(pages) if there] == [5, 63]
    assert residency.resident_bytes(file) == 2 * PAGE_SIZE


def test_a_kernel_without_cachestat(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_SYS_CACHESTAT", 9999)  # the kernel says ENOSYS
    read_page(file, 7)
    assert residency.resident_bytes(file) == PAGE_SIZE


def test_who_may_not_ask_is_told_nothing(file: Path) -> None:
    file.chmod(0o644)

    def told() -> list[object]:
        assert file.read_bytes()
        return [residency.resident_pages(file), os.access(file, os.W_OK)]

    assert as_nobody(told) == [None, False]
    assert residency.resident_pages(file) == b"\1" * PAGES
    file.chmod(0o600)

    def closed() -> str:
        with pytest.raises(NotPermitted) as caught:
            residency.resident_bytes(file)
        return caught.value.message

    assert str(file) in as_nobody(closed)


def test_odd_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert residency.resident_bytes(empty) == 0
    assert residency.resident_pages(empty) == b""
    odd = tmp_path / "odd"
    odd.write_bytes(b"x" * (PAGE_SIZE + 1))
    assert residency.resident_pages(odd) == b"\1\1"
    with pytest.raises(NotFound):
        residency.resident_bytes(tmp_path / "none")
    with pytest.raises(InvalidInput):
        residency.resident_pages(tmp_path)


def test_a_partial_last_page_counts_as_what_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE + 100))
    assert residency.resident_bytes(path) == PAGE_SIZE + 100
