"""What several kernels tell of the same two QEMUs (data/record.py): our figures against their text.

Figures of single recordings, added up by hand, are in the tests of the rooms.
"""

import re
from pathlib import Path

import pytest

from onecopy.linux import process
from onecopy.linux.counters import ksm, meminfo, smaps
from onecopy.model import MIB
from onecopy.sharing import live_figures, report
from onecopy.sharing.account import GuestMaps, find_ram, measure
from tests.unit.recorded import check_against_rollup, rollup

KERNELS = sorted(path.parent for path in (Path(__file__).parents[1] / "data").glob("*/proc"))
COLD = GuestMaps("cold", 1001, None, 256 * MIB)
CLONE = GuestMaps(
    "clone", 1002, "/tmp/onecopy-rec/ram", 256 * MIB, {"/tmp/onecopy-rec/segment": "base"}
)
BOTH = [COLD, CLONE]

pytestmark = pytest.mark.parametrize("root", KERNELS, ids=[path.name for path in KERNELS])


def test_there_are_several(root: Path) -> None:
    assert root in KERNELS and len({path.name[:4] for path in KERNELS}) >= 2


def figures(text: str) -> dict[str, int]:
    """NAME: NUMBER kB lines, in bytes."""
    found = re.findall(r"^(\w+)(?:\(\w+\))?:\s+(\d+) kB$", text, re.M)
    return {key: int(kib) << 10 for key, kib in found}


def ram_of(text: str, size: int) -> dict[str, int]:
    """What the kernel says of the one mapping of that size."""
    found = [part for part in re.split(r"^(?=[0-9a-f]+-)", text, flags=re.M) if part]
    (ram,) = (part for part in found if figures(part)["Size"] == size)
    return figures(ram)


def test_sums_are_the_kernels_own(root: Path) -> None:
    for maps in BOTH:
        path = root / f"proc/{maps.pid}/smaps_rollup"
        if path.exists():
            check_against_rollup(smaps.read(maps.pid, root), rollup(path.read_text()))


def test_accounts_add_up(root: Path) -> None:
    for maps in BOTH:
        found, mappings = measure(maps, root), smaps.read(maps.pid, root)
        told = ram_of((root / f"proc/{maps.pid}/smaps").read_text(), 256 * MIB)
        assert found.ram_private == told["Anonymous"]
        assert found.ram_shared == told["Rss"] - told["Anonymous"]
        (ram,) = find_ram(maps, mappings)
        assert ram.size == 256 * MIB
        segments = found.segments or ()
        parts = (found.ram_private, found.ram_shared, found.vmm_private, found.vmm_shared)
        assert None not in parts
        resident = sum(part or 0 for part in parts) + sum(each.resident for each in segments)
        assert resident == sum(mapping.rss for mapping in mappings)
        assert (found.swapped, found.ksm, found.note) == (0, 0, "")
        status = figures((root / f"proc/{maps.pid}/status").read_text())
        if (root / f"proc/{maps.pid}/stat").exists():
            assert found.page_tables == status["VmPTE"]


def test_reports_total(root: Path) -> None:
    found = report.collect(BOTH, root=root)
    assert [guest.name for guest in found.guests] == ["cold", "clone"]
    parts = [guest.ram_private or 0 for guest in found.guests]
    assert found.totals["ram_private"] == sum(parts)
    assert found.totals["ram_size"] == 512 * MIB


def test_the_hosts_memory(root: Path) -> None:
    text = figures((root / "proc/meminfo").read_text())
    found = meminfo.read(root)
    for key, name in (
        ("MemTotal", "total"),
        ("MemFree", "free"),
        ("MemAvailable", "available"),
        ("Cached", "cached"),
        ("SReclaimable", "reclaimable"),
        ("SUnreclaim", "unreclaimable"),
        ("KernelStack", "kernel_stacks"),
        ("PageTables", "page_tables"),
        ("SecPageTables", "secondary_page_tables"),
    ):
        assert getattr(found, name) == text.get(key), key
    zones = root / "proc/zoneinfo"
    if zones.exists():
        counts = re.findall(r"^ +count: +(\d+)$", zones.read_text(), re.M)
        assert found.on_lists == sum(map(int, counts)) * 4096
        assert found.unused == text["MemFree"] + found.on_lists
    else:
        assert found.on_lists is None


def test_ksm(root: Path) -> None:
    folder = root / "sys/kernel/mm/ksm"
    found = ksm.read(root)
    assert found
    for name in ("run", "pages_to_scan", "sleep_millisecs", "pages_sharing", "full_scans"):
        assert getattr(found, name) == int((folder / name).read_text()), name
    assert ("smart_scan" in {path.name for path in folder.iterdir()}) == (
        found.smart_scan is not None
    )
    told = ksm.read_process(1001, root)
    text = (root / "proc/1001/ksm_stat").read_text()
    assert (told.merging_pages, told.profit) == (0, 0)
    # What the kernel does not tell is unknown.
    assert told.merge_any is (False if "ksm_merge_any" in text else None)


def test_top(root: Path) -> None:
    (found,) = live_figures.sample([("cold", 1001), ("gone", 2**22 + 1)], merging=True, root=root)
    status = figures((root / "proc/1001/status").read_text())
    assert (found.name, found.own) == ("cold", status["RssAnon"])
    assert found.shared == status["RssFile"] + status["RssShmem"]
    assert found.page_tables == status["VmPTE"]
    ticks = (root / "proc/1001/stat").read_text().rpartition(")")[2].split()
    assert found.cpu_seconds * 100 == pytest.approx(int(ticks[11]) + int(ticks[12]))
    assert process.exists(1001, root)
