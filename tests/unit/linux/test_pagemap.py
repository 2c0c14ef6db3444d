"""pagemap, kpagecount and kpageflags: the bits, and real pages whose state we made."""

import ctypes
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import Incompatible, InvalidInput, NotFound, NotPermitted
from onecopy.linux import process_memory
from onecopy.linux.counters import frame_flags, kpage, pagemap
from tests.conftest import cannot_run
from tests.unit.other_user import as_nobody

PAGE = mmap.PAGESIZE


def as_root() -> None:
    if os.geteuid():
        cannot_run("page frame numbers need root")


@contextmanager
def anonymous_pages(count: int) -> Iterator[tuple[mmap.mmap, int]]:
    """Private anonymous memory and its address."""
    memory = mmap.mmap(-1, count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(memory)
    try:
        yield memory, ctypes.addressof(anchor)
    finally:
        del anchor
        memory.close()


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 2**55 - 1),
    st.integers(0, 15),
)
def test_the_bits_of_an_entry(
    present: bool, swapped: bool, shared: bool, dirty: bool, number: int, others: int
) -> None:
    # Bits 56-60 are exclusive, uffd-wp, guard and two unused: none of ours.
    entry = present << 63 | swapped << 62 | shared << 61 | others << 56 | dirty << 55 | number
    assert pagemap.present(entry) is present
    assert pagemap.swapped(entry) is swapped
    assert pagemap.file_or_shared(entry) is shared
    assert pagemap.soft_dirty(entry) is dirty
    assert pagemap.pfn(entry) == (number if present else None)


def test_a_hidden_frame_number_is_not_a_number() -> None:
    with pytest.raises(NotPermitted) as caught:
        pagemap.pfn(1 << 63)
    assert "root" in caught.value.hint


def test_without_root_the_kernel_hides_the_number() -> None:
    def own_page() -> int:
        with anonymous_pages(1) as (memory, address):
            memory[0] = 1
            (entry,) = pagemap.read(os.getpid(), address, 1)
        return entry

    entry = as_nobody(own_page)
    assert pagemap.present(entry)
    with pytest.raises(NotPermitted):
        pagemap.pfn(entry)


def test_without_root_other_processes_are_closed() -> None:
    def refusals() -> list[str]:
        found = []
        for ask in (lambda: pagemap.read(1, 0, 1), lambda: kpage.counts([1])):
            with pytest.raises(NotPermitted) as caught:
                ask()
            found.append(caught.value.hint)
        return found

    assert all("root" in hint for hint in as_nobody(refusals))


def test_untouched_written_and_zero_pages() -> None:
    as_root()
    with anonymous_pages(3) as (memory, address):
        memory[0] = 1
        assert memory[PAGE] == 0  # read, not written: the kernel's zero page
        written, zero, untouched = pagemap.read(os.getpid(), address, 3)
        frame, zero_frame = pagemap.pfn(written), pagemap.pfn(zero)
        assert frame and zero_frame
        assert pagemap.pfn(untouched) is None
        assert not pagemap.present(untouched)
        assert not pagemap.file_or_shared(written)
        flags, zero_flags = kpage.flags([frame, zero_frame])
        assert kpage.counts([frame]) == [1]
    assert kpage.Flags.ANON | kpage.Flags.MMAP in flags
    assert kpage.Flags.ZERO_PAGE not in flags
    assert kpage.Flags.ZERO_PAGE in zero_flags


def test_a_file_page_mapped_twice_is_one_frame(tmp_path: Path) -> None:
    as_root()
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGE))
    frames = []
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as one,
        mmap.mmap(file.fileno(), 0) as two,
    ):
        for memory in (one, two):
            assert memory[0] in range(256)
            anchor = ctypes.c_char.from_buffer(memory)
            (entry,) = pagemap.read(os.getpid(), ctypes.addressof(anchor), 1)
            del anchor
            assert pagemap.file_or_shared(entry)
            frames.append(pagemap.pfn(entry))
        frame = frames[0]
        assert frame is not None
        assert kpage.counts([frame]) == [2]
        assert kpage.Flags.ANON not in kpage.flags([frame])[0]
    assert frames[0] == frames[1]


def test_what_cannot_be_asked() -> None:
    with pytest.raises(InvalidInput):
        pagemap.read(os.getpid(), 123, 1)
    with pytest.raises(NotFound):
        pagemap.read(2**22 + 1, 0, 1)
    assert len(pagemap.read(os.getpid(), 0, 2)) == 2


def test_frames_that_do_not_exist(tmp_path: Path) -> None:
    as_root()
    with pytest.raises(InvalidInput, match="page frame"):
        kpage.counts([1 << 50])
    with pytest.raises(Incompatible):
        kpage.flags([1], tmp_path)


def test_many_pages_of_a_process_but_those_that_are_not_there() -> None:
    pages, closed, libc = 3000, {5, 6, 1500, 2999}, ctypes.CDLL(None)
    with anonymous_pages(pages) as (memory, start):
        for number in range(pages):
            memory[number * PAGE] = number % 251 + 1

        def protect(number: int, how: int) -> None:
            where = ctypes.c_void_p(start + number * PAGE)
            assert libc.mprotect(where, ctypes.c_size_t(PAGE), how) == 0

        for number in closed:
            protect(number, 0)
        # All, and each second one: more ranges than one call takes.
        for numbers in (np.arange(pages), np.arange(0, pages, 2)):
            into = np.zeros((len(numbers), PAGE), np.uint8)
            there = process_memory.read(
                os.getpid(), (start + numbers * PAGE).astype(np.uint64), into
            )
            assert set(numbers[~there].tolist()) == closed & set(numbers.tolist())
            assert (into[there, 0] == numbers[there] % 251 + 1).all()
        for number in closed:
            protect(number, 3)
        with pytest.raises(NotFound):
            process_memory.read(2**22 + 1, np.array([start], np.uint64), into)


def test_flags_of_many_frames_are_those_of_each() -> None:
    as_root()
    with anonymous_pages(64) as (memory, start):
        memory[:] = os.urandom(64 * PAGE)
        numbers = [pagemap.pfn(entry) or 0 for entry in pagemap.read(os.getpid(), start, 64)]
        random.shuffle(numbers)
        known = kpage.flags(numbers)
        flags = frame_flags.flags(np.array(numbers, np.uint64))
    # Others change by themselves: the kernel looks at pages meanwhile.
    lasting = kpage.Flags.ANON | kpage.Flags.MMAP | kpage.Flags.SWAPBACKED | kpage.Flags.KSM
    assert [int(each) & lasting for each in flags] == [each & lasting for each in known]
    assert all(int(each) & kpage.Flags.MMAP for each in flags)
