"""account: recorded and live QEMUs, and two processes that share a file until one writes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from onecopy.linux.counters import pagemap, smaps
from onecopy.linux.counters.smaps import Mapping
from onecopy.sharing.account import GuestAccount, GuestMaps, account, find_ram, measure
from tests.conftest import cannot_run

RECORDED = Path(__file__).parents[1] / "data/6.18.44-fc-v669"
MIB = 1 << 20
ANONYMOUS = GuestMaps("cold", 1001, None, 256 * MIB)
FROM_FILE = GuestMaps(
    "clone", 1002, "/tmp/onecopy-rec/ram", 256 * MIB, {"/tmp/onecopy-rec/segment": "base"}
)
PAGE = 4096

# Maps argv[1] privately, reads all of it, then writes one byte to each page named on stdin.
CLONE = """
import ctypes, mmap, sys
with open(sys.argv[1], 'rb') as f:
    m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
print(ctypes.addressof(ctypes.c_char.from_buffer(m)), sum(m[::4096]), flush=True)
for line in sys.stdin:
    m[int(line) * 4096] = 1
    print(flush=True)
"""


def test_recorded_guest_with_anonymous_ram() -> None:
    found = measure(ANONYMOUS, RECORDED)
    (ram,) = find_ram(ANONYMOUS, smaps.read(1001, RECORDED))
    assert (ram.size, ram.path, ram.perms) == (256 * MIB, "", "rw-p")
    assert found.ram_private == ram.rss == 6 * MIB
    assert found.ram_shared == 0
    # With no segment, RAM and VMM are all there is: the kernel's own sum, from smaps_rollup.
    parts = (found.ram_private, found.vmm_private, found.vmm_shared)
    assert sum(part or 0 for part in parts) == 45248 << 10
    assert found.vmm_shared == 21876 << 10
    assert (found.page_tables, found.ksm, found.note) == (212 << 10, 0, "")


def test_memory_that_came_later_is_ram() -> None:
    nothing = dict.fromkeys((each.name for each in msgspec.structs.fields(Mapping)), 0)

    def mapping(start: int, end: int, path: str = "") -> Mapping:
        own = {"rss": end - start, "anonymous": end - start, "private_dirty": end - start}
        where = {"start": start, "end": end, "perms": "rw-p", "path": path}
        return Mapping(**nothing | own | where | {"inode": len(path)})  # type: ignore[arg-type]

    saved = mapping(0x1000, 0x5000, FROM_FILE.ram_path or "")
    mappings = [saved, mapping(0x8000, 0xA000), mapping(0xB000, 0xC000)]
    maps = replace(FROM_FILE, ram_bytes=0x6000, ram_added=0x2000)
    assert find_ram(maps, mappings) == mappings[:2]
    assert account(maps, mappings).ram_private == 0x6000
    assert find_ram(replace(maps, ram_added=0), mappings) == mappings[:1]
    lost = replace(maps, ram_added=0x9000)
    assert "RAM was not found" in account(lost, mappings).note


def test_recorded_guest_with_ram_from_a_file() -> None:
    # The figures were added up with awk from the recorded text.
    found = account(FROM_FILE, smaps.read(1002, RECORDED))
    assert found.ram_size == 256 * MIB
    assert found.ram_private == 1092 << 10
    assert found.ram_shared == (1112 - 1092) << 10
    assert found.vmm_private == (276 + 10696) << 10
    assert found.vmm_shared == 10624 << 10
    assert found.pss_total == (1112 + 16280) << 10
    assert found.segments
    (segment,) = found.segments
    assert (segment.name, segment.mapped, segment.resident) == ("base", 4 * MIB, 0)
    assert found.page_tables is None


@given(st.sets(st.integers(1, 65535), max_size=6), st.sampled_from([ANONYMOUS, FROM_FILE]))
def test_ram_split_in_several_mappings(cuts: set[int], maps: GuestMaps) -> None:
    mappings = smaps.read(maps.pid, RECORDED)
    (ram,) = find_ram(maps, mappings)
    at = mappings.index(ram)
    edges = [ram.start, *(ram.start + page * PAGE for page in sorted(cuts)), ram.end]
    pieces = [msgspec.structs.replace(ram, start=start, end=end) for start, end in pairwise(edges)]
    split = [*mappings[:at], *pieces, *mappings[at + 1 :]]
    assert find_ram(maps, split) == pieces


def test_ram_that_is_not_there_is_unknown_not_zero() -> None:
    mappings = smaps.read(1002, RECORDED)
    for maps in (
        replace(FROM_FILE, ram_path="/tmp/onecopy-rec/other"),
        replace(FROM_FILE, ram_path=None),
    ):
        found = account(maps, mappings)
        assert (found.ram_private, found.ram_shared, found.vmm_private) == (None, None, None)
        assert "RAM" in found.note
        assert found.pss_total


def test_a_fork_server_has_no_ram() -> None:
    found = measure(replace(ANONYMOUS, ram_bytes=0, serves=True), RECORDED)
    assert (found.ram_private, found.ram_shared, found.ram_proportional) == (0, 0, 0)
    assert (found.vmm_private or 0) + (found.vmm_shared or 0) == 45248 << 10
    assert found.note == ""


def test_without_per_mapping_ksm_the_processs_own_figure_serves() -> None:
    mappings = [msgspec.structs.replace(m, ksm=None) for m in smaps.read(1002, RECORDED)]
    assert account(FROM_FILE, mappings).ksm is None
    assert account(FROM_FILE, mappings, ksm_bytes=8192).ksm == 8192


@contextmanager
def clone(path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with ``path`` mapped privately and read, and the mapping's address."""
    argv = [sys.executable, "-c", CLONE, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        yield process, int(process.stdout.readline().split()[0])
        process.kill()


def write_page(process: subprocess.Popen[str], page: int) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(f"{page}\n")
    process.stdin.flush()
    process.stdout.readline()


def test_copy_on_write_of_one_page(tmp_path: Path) -> None:
    if os.geteuid():
        cannot_run("page frame numbers need root")
    pages = 16
    path = tmp_path / "ram"
    path.write_bytes(os.urandom(pages * PAGE))
    with clone(path) as (one, at_one), clone(path) as (two, at_two):

        def frames(pid: int, start: int) -> list[int | None]:
            return [pagemap.pfn(entry) for entry in pagemap.read(pid, start, pages)]

        def figures(pid: int) -> GuestAccount:
            return measure(GuestMaps("clone", pid, str(path), pages * PAGE))

        before = frames(one.pid, at_one)
        assert None not in before
        assert before == frames(two.pid, at_two)
        assert (figures(two.pid).ram_private, figures(two.pid).ram_shared) == (0, pages * PAGE)
        write_page(two, 3)
        after = frames(two.pid, at_two)
        assert [n for n in range(pages) if after[n] != before[n]] == [3]
        assert frames(one.pid, at_one) == before
        assert figures(two.pid).ram_private == PAGE
        assert figures(two.pid).ram_shared == (pages - 1) * PAGE
        assert figures(one.pid).ram_private == 0


def start_qemu(ram: list[str]) -> subprocess.Popen[bytes]:
    argv = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", *ram]
    try:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except FileNotFoundError:
        cannot_run("qemu-system-x86_64 is not installed")


@contextmanager
def qemu(maps: GuestMaps, ram: list[str]) -> Iterator[tuple[GuestMaps, list[Mapping]]]:
    """A real QEMU, stopped by signal when its RAM is there, and its mappings."""
    with start_qemu(ram) as process:
        try:
            maps = replace(maps, pid=process.pid)
            until = time.monotonic() + 60
            while not find_ram(maps, smaps.read(process.pid)):
                assert time.monotonic() < until, "QEMU never mapped its RAM"
                time.sleep(0.05)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            yield maps, smaps.read(process.pid)
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "file", "shared file"])
def test_ram_of_a_real_qemu(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    size = 256 * MIB
    file = f"memory-backend-file,id=m,size=256M,mem-path={path}"
    backend = {
        "memfd": "memory-backend-memfd,id=m,size=256M",
        "file": f"{file},share=off",
        "shared file": f"{file},share=on",
    }
    if kind == "anonymous":
        ram = ["-machine", "q35,accel=tcg", "-m", "256M"]
    else:
        ram = ["-machine", "q35,accel=tcg,memory-backend=m", "-object", backend[kind], "-m", "256M"]
    path.write_bytes(b"")
    os.truncate(path, size)
    maps = GuestMaps("guest", 0, str(path) if "file" in kind else None, size)
    with qemu(maps, ram) as (guest, mappings):
        found = find_ram(guest, mappings)
        assert sum(m.size for m in found) == size
        assert {m.perms for m in found} == {"rw-p" if kind in ("anonymous", "file") else "rw-s"}
        figures = measure(guest)
        assert figures.note == ""
        parts = (
            figures.ram_private,
            figures.ram_shared,
            figures.vmm_private,
            figures.vmm_shared,
        )
        assert None not in parts
        assert sum(part or 0 for part in parts) == sum(m.rss for m in mappings)
        assert figures.page_tables


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """16 huge pages more than the host had."""
    path = Path("/proc/sys/vm/nr_hugepages")
    if os.geteuid() or not path.exists():
        cannot_run("reserving huge pages needs root and a kernel with hugetlb")
    before = int(path.read_text())
    path.write_text(str(before + 16))
    try:
        if int(path.read_text()) < before + 16:
            cannot_run("the host has no 16 free huge pages")
        yield
    finally:
        path.write_text(str(before))


@pytest.mark.usefixtures("huge_pages")
def test_ram_in_reserved_huge_pages() -> None:
    """The kernel leaves them out of Rss and Pss."""
    size = 32 * MIB
    backend = "memory-backend-memfd,id=m,size=32M,hugetlb=on,hugetlbsize=2M,prealloc=on"
    ram = ["-machine", "q35,accel=tcg,memory-backend=m", "-object", backend, "-m", "32M"]
    with qemu(GuestMaps("guest", 0, None, size), ram) as (guest, mappings):
        found = account(guest, mappings)
        assert (found.ram_private, found.ram_shared) == (size, 0)
        assert found.huge == size + sum(m.anon_huge for m in mappings)
        assert found.ram_proportional == size
        rest = sum(m.pss for m in mappings)
        assert found.pss_total == rest + size and rest < size * 4
