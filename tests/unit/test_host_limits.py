"""Limits on one process, as the kernel has them."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator

import pytest

from onecopy.host import limits
from onecopy.vmm import bounds

GIB = 1 << 30


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


def test_what_may_grow_is_soft(child: int) -> None:
    _, hard = resource.prlimit(child, resource.RLIMIT_AS)
    limits.apply(child, {limits.ADDRESS_SPACE: 8 * GIB, limits.OPEN_FILES: 100, limits.CORE: 0})
    assert resource.prlimit(child, resource.RLIMIT_AS) == (8 * GIB, hard)
    assert resource.prlimit(child, resource.RLIMIT_NOFILE) == (100, 100)
    # Never more than there was.
    limits.apply(child, {limits.OPEN_FILES: 1000})
    assert resource.prlimit(child, resource.RLIMIT_NOFILE) == (100, 100)


def test_more_comes_and_nothing_goes(child: int) -> None:
    limits.apply(child, {limits.ADDRESS_SPACE: 8 * GIB, limits.PRIVATE: 4 * GIB})
    bounds.let_map(child, GIB, private=False)
    bounds.let_map(child, GIB, private=True)
    assert limits.of(child, limits.ADDRESS_SPACE) == 10 * GIB
    assert limits.of(child, limits.PRIVATE) == 5 * GIB
    limits.raise_to(child, {limits.PRIVATE: GIB})
    assert limits.of(child, limits.PRIVATE) == 5 * GIB


def test_what_has_no_limit_keeps_none(child: int) -> None:
    """As a guest has it that was started by an older version."""
    limits.apply(child, {limits.FILE_SIZE: limits.UNLIMITED})
    bounds.let_map(child, GIB, private=True)
    bounds.let_write(child, GIB)
    assert limits.of(child, limits.FILE_SIZE) == limits.UNLIMITED
    assert limits.of(child, limits.ADDRESS_SPACE) == limits.UNLIMITED
    with bounds.writing_at_most(child, 4096):
        assert limits.of(child, limits.FILE_SIZE) == 4096
    assert limits.of(child, limits.FILE_SIZE) == limits.UNLIMITED


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    bounds.let_map(process.pid, GIB, private=True)
    with pytest.raises(ProcessLookupError):
        bounds.let_write(process.pid, GIB)
