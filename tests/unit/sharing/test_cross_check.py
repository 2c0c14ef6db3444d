"""report --check: both sides of the sum, from figures that are known."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from onecopy.errors import Incompatible, NotFound
from onecopy.linux.counters import meminfo, smaps
from onecopy.model import MIB
from onecopy.sharing import cross_check, report
from onecopy.sharing.account import GuestMaps
from tests.conftest import cannot_run
from tests.unit.other_user import as_nobody

RECORDED = Path(__file__).parents[1] / "data/6.18.44-fc-v669"
COLD = GuestMaps("cold", 1001, None, 256 * MIB)
#: What a host has before and after: 100 MiB less free, but 2 more on the CPUs' lists; 30 of it page
#: cache, 5 objects that can be given back, 8 of shared memory (in Cached, too).
BEFORE = {"MemFree": 900, "Cached": 50, "Shmem": 2, "SReclaimable": 10, "SUnreclaim": 20}
AFTER = {"MemFree": 800, "Cached": 88, "Shmem": 10, "SReclaimable": 15, "SUnreclaim": 23}
OTHERS = {"Buffers": 1, "SwapCached": 0, "KernelStack": 4, "Percpu": 2}


def told(figures: dict[str, int], **more: int) -> meminfo.MemInfo:
    lines = (figures | OTHERS | more).items()
    text = "".join(f"{key}:  {mib << 10} kB\n" for key, mib in lines)
    return msgspec.structs.replace(meminfo.parse(text.encode()), on_lists=0)


@pytest.fixture
def after(tmp_path: Path) -> Path:
    """A root with the recorded guest, and the second host's memory."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/1001").symlink_to(RECORDED / "proc/1001")
    lines = (AFTER | OTHERS | {"SecPageTables": 1}).items()
    text = "".join(f"{key}:  {mib << 10} kB\n" for key, mib in lines)
    (tmp_path / "proc/meminfo").write_text(text)
    (tmp_path / "proc/zoneinfo").write_text("cpu: 0\n   count:    256\n   high:    9\n" * 2)
    return tmp_path


def test_both_sides(after: Path) -> None:
    found = report.collect([COLD], root=after)
    before = cross_check.Before(0, told(BEFORE, SecPageTables=0))
    told_now = cross_check.check(before, found, after)
    rollup = smaps.read_rollup(1001, RECORDED)
    assert rollup and rollup.anonymous > 10 * MIB
    assert told_now.processes == rollup.anonymous + rollup.shared_memory
    assert told_now.page_tables == found.totals["page_tables"]
    assert told_now.kernel == (3 + 1) * MIB
    # 98 less free, of which 30 (38 less 8 of shared memory) are page cache and 5 objects.
    assert (told_now.host, told_now.blobs) == (63 * MIB, 0)
    parts = told_now.processes + told_now.page_tables + told_now.kernel
    assert told_now.parts == parts and told_now.difference == parts - 63 * MIB
    assert told_now.ratio == told_now.difference / (63 * MIB)


def test_an_older_fork_server_counts_by_its_increase(after: Path) -> None:
    server = msgspec.structs.replace(COLD, ram_bytes=0, serves=True)
    found = report.collect([], servers=[server], root=after)
    assert (found.guests, found.others, len(found.servers)) == ((), (), 1)
    assert found.blobs == ()
    memory = told(BEFORE, SecPageTables=0)
    whole = cross_check.check(cross_check.Before(0, memory), found, after)
    assert whole.processes > 10 * MIB and whole.page_tables > 0
    noted = cross_check.look([1001], after).servers
    same = cross_check.check(cross_check.Before(0, memory, noted), found, after)
    assert (same.processes, same.page_tables) == (0, 0)
    # It has ended: the guests that it forked have its pages, which are nothing new.
    ended = report.collect([COLD], root=after)
    assert cross_check.check(cross_check.Before(0, memory, noted), ended, after).processes == 0


def test_a_server_that_has_just_ended_is_not_noted(after: Path) -> None:
    assert cross_check.look([4321], after).servers == ()


def test_a_kernel_that_does_not_tell_is_no_zero(after: Path) -> None:
    found = report.collect([COLD], root=after)
    lacks = msgspec.structs.replace(told(BEFORE, SecPageTables=0), free=None)
    with pytest.raises(Incompatible, match="does not report unused"):
        cross_check.check(cross_check.Before(0, lacks), found, after)
    text = (RECORDED / "proc/1001/smaps_rollup").read_text().replace("Pss_Shmem", "Pss_Old")
    assert "Pss_Old" in text
    (after / "proc/1001").unlink()
    (after / "proc/1001").mkdir()
    (after / "proc/1001/smaps_rollup").write_text(text)
    assert smaps.read_rollup(1001, after) is None
    with pytest.raises(Incompatible, match="share"):
        cross_check.check(cross_check.Before(0, told(BEFORE, SecPageTables=0)), found, after)


def test_a_note_is_kept_or_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        cross_check.read(tmp_path / "note")
    assert "stop all guests" in str(missing.value.hint)
    cross_check.note(tmp_path / "note")
    kept = cross_check.read(tmp_path / "note")
    assert kept.memory.total == meminfo.read().total
    (tmp_path / "note").write_text("{")
    with pytest.raises(NotFound):
        cross_check.read(tmp_path / "note")
    cross_check.note(tmp_path / "none/note")


HOLDER = """
import sys
held = bytearray(256 << 20)
for at in range(0, len(held), 4096):
    held[at] = 1
print(flush=True)
input()
"""


def test_a_real_process_is_what_the_host_lost() -> None:
    """Other tests take and give back memory meanwhile: one of several looks has to agree."""
    if os.geteuid():
        cannot_run("another process's maps need root")
    shares: list[float | None] = []
    while len(shares) < 30:
        before = cross_check.Before(0, meminfo.read())
        argv = [sys.executable, "-c", HOLDER]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            found = report.collect([GuestMaps("held", process.pid, None, 256 * MIB)])
            both = cross_check.check(before, found)
            process.kill()
        assert both.processes > 256 * MIB
        shares.append(both.ratio)
        if both.ratio is not None and abs(both.ratio) < 0.03:
            return
    pytest.fail(f"never agreed: {shares}")


def test_others_that_may_not_be_read_are_left_out() -> None:
    pid = os.getpid()

    def left_out() -> int:
        found = report.collect([], [GuestMaps("root's", pid, None, 0, regular={})])
        assert found.others[0].note
        return cross_check.check(cross_check.Before(0, meminfo.read()), found).left_out

    assert as_nobody(left_out) == 1
    found = report.collect([], [GuestMaps("mine", pid, None, 0, regular={})], left_out=["more"])
    told = cross_check.check(cross_check.Before(0, meminfo.read()), found)
    assert told.left_out == 1 and told.processes > MIB


def test_a_guest_that_ended_is_told() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        found = report.collect([GuestMaps("guest", process.pid, None, 0)])
        process.kill()
    with pytest.raises(NotFound):
        cross_check.check(cross_check.Before(0, meminfo.read()), found)
