"""A store does without fs-verity where there is none (where there is: tests/vm/test_verity.py)."""

import errno
import os
from pathlib import Path

import pytest

from onecopy.linux import verity
from onecopy.store import Store
from tests.unit.store_kit import check_whole, put


def test_where_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    on = verity.enable(file)
    assert verity.is_enabled(file) is on
    artifact = put(Store(tmp_path / "store"))
    assert verity.is_enabled(artifact.layers[0].path) is on


@pytest.mark.parametrize("number", [errno.ETXTBSY, errno.EIO, errno.EINTR])
def test_a_blob_is_stored_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: Path) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(verity, "enable", fail)
    store = Store(tmp_path / "store")
    put(store)
    check_whole(store.root)
