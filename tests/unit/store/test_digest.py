"""Digests of files with holes: right, and the holes stay out of the page cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from onecopy.linux.counters.residency import resident_bytes
from onecopy.model import MIB
from onecopy.store.digest import file_digest
from tests.conftest import cannot_run

#: (offset, bytes of data) of each piece, and the file's size.
LAYOUTS = [
    ([], 0),
    ([], 5 * MIB + 3),
    ([(0, 7)], 7),
    ([(0, 3 * MIB + 17)], 3 * MIB + 17),
    ([(2 * MIB, 4096)], 2 * MIB + 4096),
    ([(0, 4096), (64 << 10, 2 * MIB), (9 * MIB, 100)], 12 * MIB + 1),
]


@pytest.mark.parametrize(("pieces", "size"), LAYOUTS)
def test_it_is_the_digest_of_all_bytes(
    tmp_path: Path, pieces: list[tuple[int, int]], size: int
) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        for offset, length in pieces:
            file.seek(offset)
            file.write(os.urandom(length))
        file.truncate(size)
    assert file_digest(path) == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_holes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.truncate(64 * MIB)
    if path.stat().st_blocks * 512 > 32 * MIB:
        cannot_run("this file system makes no holes")
    before = resident_bytes(path) or 0
    file_digest(path)
    assert (resident_bytes(path) or 0) - before < MIB
    # The counter does see holes that are read.
    path.read_bytes()
    assert (resident_bytes(path) or 0) > 32 * MIB
