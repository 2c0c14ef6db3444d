"""Limits on one process, as the kernel has them."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator

import pytest

from onecopy.linux.sandbox import rlimits
from onecopy.vmm import vmm_limits

GIB = 1 << 30


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


def test_what_may_grow_is_soft(child: int) -> None:
    _, hard = resource.prlimit(child, resource.RLIMIT_AS)
    rlimits.apply(child, {rlimits.ADDRESS_SPACE: 8 * GIB, rlimits.OPEN_FILES: 100, rlimits.CORE: 0})
    assert resource.prlimit(child, resource.RLIMIT_AS) == (8 * GIB, hard)
    assert resource.prlimit(child, resource.RLIMIT_NOFILE) == (100, 100)
    # Never more than there was.
    rlimits.apply(child, {rlimits.OPEN_FILES: 1000})
    assert resource.prlimit(child, resource.RLIMIT_NOFILE) == (100, 100)


def test_more_comes_and_nothing_goes(child: int) -> None:
    rlimits.apply(child, {rlimits.ADDRESS_SPACE: 8 * GIB, rlimits.PRIVATE: 4 * GIB})
    vmm_limits.let_map(child, GIB, private=False)
    vmm_limits.let_map(child, GIB, private=True)
    assert rlimits.of(child, rlimits.ADDRESS_SPACE) == 10 * GIB
    assert rlimits.of(child, rlimits.PRIVATE) == 5 * GIB
    rlimits.raise_to(child, {rlimits.PRIVATE: GIB})
    assert rlimits.of(child, rlimits.PRIVATE) == 5 * GIB


def test_what_has_no_limit_keeps_none(child: int) -> None:
    """As a guest has it that was started by an older version."""
    rlimits.apply(child, {rlimits.FILE_SIZE: rlimits.UNLIMITED})
    vmm_limits.let_map(child, GIB, private=True)
    vmm_limits.let_write(child, GIB)
    assert rlimits.of(child, rlimits.FILE_SIZE) == rlimits.UNLIMITED
    assert rlimits.of(child, rlimits.ADDRESS_SPACE) == rlimits.UNLIMITED
    with vmm_limits.writing_at_most(child, 4096):
        assert rlimits.of(child, rlimits.FILE_SIZE) == 4096
    assert rlimits.of(child, rlimits.FILE_SIZE) == rlimits.UNLIMITED


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    vmm_limits.let_map(process.pid, GIB, private=True)
    with pytest.raises(ProcessLookupError):
        vmm_limits.let_write(process.pid, GIB)
