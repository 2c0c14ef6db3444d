"""process, meminfo and ksm: recorded figures, and real processes and settings."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecopy.errors import Incompatible, NotFound
from onecopy.linux import process
from onecopy.linux.counters import ksm, meminfo
from tests.unit.recorded import RECORDED

GONE = 2**22 + 1  # above the kernel's largest pid


def test_recorded_process() -> None:
    recorded = process.Stat("T", 8, 5, 194845, flags=0x8400180, virtual=525307904)
    assert process.stat(1001, RECORDED) == recorded
    assert process.cmdline(1001, RECORDED)[-4:] == ["-M", "q35", "-m", "256M"]
    assert process.page_table_bytes(1001, RECORDED) == 212 << 10
    assert process.exists(1001, RECORDED)
    # This process's recording has no stat: the process is there, the file is not.
    with pytest.raises(NotFound):
        process.stat(1002, RECORDED)


def test_the_parent() -> None:
    assert process.parent(os.getpid()) == os.getppid()
    assert process.parent(1) == 0
    with pytest.raises(NotFound):
        process.parent(GONE)


def test_own_times() -> None:
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert process.cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.1)
    with subprocess.Popen(["sleep", "60"]) as child:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert process.start_time(child.pid) == pytest.approx(now, abs=2)
        assert process.start_time(child.pid) > process.start_time(os.getpid())
        child.kill()


def test_a_name_made_to_confuse() -> None:
    code = "open('/proc/self/comm', 'w').write('a) Z 1 (('); print(flush=True); input()"
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        assert b"(a) Z 1 (()" in Path(f"/proc/{child.pid}/stat").read_bytes()
        assert process.stat(child.pid).state in "SR"
        assert process.exists(child.pid)
        assert process.cmdline(child.pid) == argv
        child.kill()


def test_a_zombie_does_not_exist() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.stat(child.pid).state == "Z"
    assert not process.exists(child.pid)
    assert process.page_table_bytes(child.pid) is None
    child.wait()
    assert not process.exists(child.pid)


def test_a_process_that_is_gone() -> None:
    for read in (
        process.stat,
        process.cmdline,
        process.cpu_seconds,
        process.page_table_bytes,
        ksm.read_process,
    ):
        with pytest.raises(NotFound):
            read(GONE)
    assert not process.exists(GONE)


def test_meminfo_recorded_and_live(tmp_path: Path) -> None:
    assert meminfo.read(RECORDED) == meminfo.MemInfo(
        total=24684084 << 10,
        free=24291860 << 10,
        available=24294320 << 10,
        cached=93152 << 10,
        buffers=1064 << 10,
        swap_cached=0,
        shmem=8872 << 10,
        reclaimable=164440 << 10,
        unreclaimable=26584 << 10,
        per_cpu=664 << 10,
        swap_total=0,
        swap_free=0,
        page_tables=2220 << 10,
        secondary_page_tables=0,
        kernel_stacks=1492 << 10,
    )
    live = meminfo.read()
    assert live.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert live.available and 0 < live.available < live.total
    assert meminfo.parse(b"MemTotal:  1 kB\n").available is None
    with pytest.raises(Incompatible):
        meminfo.read(tmp_path)


def test_ksm_recorded(tmp_path: Path) -> None:
    figures = ksm.read(RECORDED)
    assert figures
    assert (figures.run, figures.pages_to_scan, figures.sleep_millisecs) == (0, 100, 20)
    assert (figures.advisor_mode, figures.smart_scan) == ("none", 1)
    assert ksm.read(tmp_path) is None
    told = ksm.read_process(1001, RECORDED)
    assert told == ksm.ProcessKsm(merging_pages=0, zero_pages=0, profit=0, merge_any=False)


def test_ksm_of_older_kernels(tmp_path: Path) -> None:
    older = tmp_path / "proc/7"
    older.mkdir(parents=True)
    assert ksm.read_process(7, tmp_path) == ksm.ProcessKsm(None, None, None, None)
    (older / "ksm_merging_pages").write_text("12\n")
    assert ksm.read_process(7, tmp_path) == ksm.ProcessKsm(12, None, None, None)
    folder = tmp_path / "sys/kernel/mm/ksm"
    folder.mkdir(parents=True)
    (folder / "run").write_text("1\n")
    figures = ksm.read(tmp_path)
    assert figures and figures.run == 1
    assert figures.smart_scan is None and figures.advisor_mode is None
    with pytest.raises(Incompatible), ksm.settings({"run": 0, "smart_scan": 1}, tmp_path):
        pass
    assert (folder / "run").read_text().strip() == "1"
