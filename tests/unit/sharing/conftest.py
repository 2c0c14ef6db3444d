"""What the tests of sharing/ share: a host of the test's own."""

import shutil
from pathlib import Path

import pytest

from tests.unit.recorded import RECORDED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host of the test's own: the KSM settings and memory figures recorded of a real one."""
    shutil.copytree(RECORDED / "sys/kernel/mm/ksm", tmp_path / "sys/kernel/mm/ksm")
    (tmp_path / "proc").mkdir()
    shutil.copy(RECORDED / "proc/meminfo", tmp_path / "proc")
    return tmp_path
