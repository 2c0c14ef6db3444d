"""smaps: our figures against the kernel's own sums, recorded and live."""

import mmap
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecopy.errors import NotFound
from onecopy.linux.counters import smaps
from tests.unit.recorded import RECORDED, check_against_rollup, rollup

# A real QEMU with 256 MiB of anonymous RAM, stopped while smaps and smaps_rollup were read.
ANONYMOUS = 1001


def test_recorded_sums_are_the_kernels_own() -> None:
    sums = rollup((RECORDED / f"proc/{ANONYMOUS}/smaps_rollup").read_text())
    assert sums["Rss"] > 40 << 20
    check_against_rollup(smaps.read(ANONYMOUS, RECORDED), sums)


def test_live_sums_are_the_kernels_own() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        while b"libc.so" not in Path(f"/proc/{process.pid}/maps").read_bytes():
            pass
        os.kill(process.pid, signal.SIGSTOP)
        while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "T":
            pass
        try:
            mappings, sums = _of_one_moment(process.pid)
        finally:
            process.kill()
    check_against_rollup(mappings, sums)


def _of_one_moment(pid: int) -> tuple[list[smaps.Mapping], dict[str, int]]:
    """Read a stopped process while no other one begins or ends to share its libraries' pages."""
    path, deadline = Path(f"/proc/{pid}/smaps_rollup"), time.monotonic() + 120
    while True:
        before, mappings = path.read_text(), smaps.read(pid)
        if before == path.read_text():
            return mappings, rollup(before)
        assert time.monotonic() < deadline, "other processes never stay the same"


def test_every_line_of_the_map_is_one_mapping() -> None:
    text = (RECORDED / f"proc/{ANONYMOUS}/smaps").read_text()
    heads = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (.{4}) ", text, re.M)
    mappings = smaps.parse(text.encode())
    assert [(f"{m.start:08x}", f"{m.end:08x}", m.perms) for m in mappings] == heads
    sizes = [int(kib) << 10 for kib in re.findall(r"^Size: +(\d+) kB", text, re.M)]
    assert [m.size for m in mappings] == sizes


def test_one_mapping_in_full() -> None:
    (ram,) = (m for m in smaps.read(1002, RECORDED) if m.path == "/tmp/onecopy-rec/ram")
    assert ram == smaps.Mapping(
        start=0x7F9ABBFFF000,
        end=0x7F9ACBFFF000,
        perms="rw-p",
        offset=0,
        device="fe:00",
        inode=2303729,
        path="/tmp/onecopy-rec/ram",
        rss=1112 << 10,
        pss=1112 << 10,
        shared_clean=0,
        shared_dirty=0,
        private_clean=0,
        private_dirty=1112 << 10,
        anonymous=1092 << 10,
        swap=0,
        ksm=0,
        anon_huge=0,
        file_huge=0,
        hugetlb_private=0,
        hugetlb_shared=0,
    )


def test_a_kernel_that_does_not_tell_ksm() -> None:
    text = (RECORDED / f"proc/{ANONYMOUS}/smaps").read_text()
    older = re.sub(r"^KSM:.*\n", "", text, flags=re.M)
    assert {m.ksm for m in smaps.parse(text.encode())} == {0}
    assert {m.ksm for m in smaps.parse(older.encode())} == {None}


def test_a_strange_file_name(tmp_path: Path) -> None:
    path = tmp_path / "a (deleted) b\nKSM:  7 kB"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert mapped[4096] == 0
        found = [m for m in smaps.read(os.getpid()) if m.path == str(path)]
        path.unlink()
        gone = [m for m in smaps.read(os.getpid()) if m.path == f"{path} (deleted)"]
    assert [m.size for m in found] == [8192]
    assert [m.inode for m in found] == [m.inode for m in gone]


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(NotFound):
        smaps.read(process.pid)
    process.wait()
    with pytest.raises(NotFound, match=str(process.pid)):
        smaps.read(process.pid)
