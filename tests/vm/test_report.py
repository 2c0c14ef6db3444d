"""The figures of `report` compared with the kernel's entry for each page of the guests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onecopy as onecopy_api
from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.create import NewRange, create_segment
from onecopy.linux.counters import kpage, pagemap, smaps
from onecopy.linux.counters.smaps import Mapping
from onecopy.model import MIB, PAGE_SIZE, PageClass, Reference
from onecopy.sharing import cross_check, report
from onecopy.sharing.account import GuestMaps, find_ram
from onecopy.vmm import external_qemu
from tests.command import answer, onecopy
from tests.vm.conftest import Clones, RunIn
from tests.vm.segments import SIZE, load, make


@dataclass(frozen=True, slots=True)
class Pages:
    """What pagemap, kpagecount and kpageflags say of some mappings; bytes, swap is not counted."""

    resident: int
    anonymous: int
    alone: int
    proportional: float

    @classmethod
    def of(cls, pid: int, mappings: Iterable[Mapping]) -> Pages:
        """Look at every page. The zero page and the kernel's own (vvar) are in no figure."""
        entries = [
            entry
            for m in mappings
            if m.rss
            for entry in pagemap.read(pid, m.start, m.size // PAGE_SIZE)
            if pagemap.present(entry)
        ]
        frames = [pagemap.pfn(entry) or 0 for entry in entries]
        real = [not flags & kpage.Flags.ZERO_PAGE for flags in kpage.flags(frames)]
        counts = kpage.counts(frames)
        known = [(e, n) for e, n, is_real in zip(entries, counts, real, strict=True) if is_real]
        return cls(
            resident=len(known) * PAGE_SIZE,
            anonymous=sum(not pagemap.file_or_shared(entry) for entry, _ in known) * PAGE_SIZE,
            alone=sum(count == 1 for _, count in known) * PAGE_SIZE,
            proportional=sum(1 / count for _, count in known) * PAGE_SIZE,
        )


@contextlib.contextmanager
def frozen(guests: Sequence[GuestRecord]) -> Iterator[None]:
    """Let no QEMU run: nothing of it changes between two looks."""
    for guest in guests:
        os.kill(guest.pid, signal.SIGSTOP)
        while Path(f"/proc/{guest.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            pass
    try:
        yield
    finally:
        for guest in guests:
            os.kill(guest.pid, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class GuestPages:
    """The pages of one QEMU: of its RAM, of its segments, of the rest, and of all mappings."""

    ram: Pages
    ram_mappings: int
    segments: Pages
    rest: Pages
    every: Pages
    mappings: int

    @classmethod
    def of(cls, pid: int, maps: GuestMaps) -> GuestPages:
        mappings = smaps.read(pid)
        ram = find_ram(maps, mappings)
        segments = [m for m in mappings if m.path in maps.segments]
        rest = [m for m in mappings if m not in ram and m not in segments]
        return cls(
            ram=Pages.of(pid, ram),
            ram_mappings=len(ram),
            segments=Pages.of(pid, segments),
            rest=Pages.of(pid, rest),
            every=Pages.of(pid, mappings),
            mappings=len(mappings),
        )


def collected(guests: Sequence[GuestRecord]) -> tuple[report.Report, list[GuestPages]]:
    """Report frozen guests, and read their pages just before and after.

    Other QEMUs share libraries with them: the figures are comparable once both readings agree.
    """
    deadline = time.monotonic() + 120
    maps = guest_maps(guests)

    def pages() -> list[GuestPages]:
        return [GuestPages.of(guest.pid, of) for guest, of in zip(guests, maps, strict=True)]

    while True:
        before = pages()
        found = report.collect(maps)
        if before == pages():
            return found, before
        assert time.monotonic() < deadline, "other guests never stay the same"


def test_every_figure_is_pagemaps(
    host: Runtime, clones: Clones, run_in: RunIn, tmp_path: Path
) -> None:
    guests = clones(2)
    (tmp_path / "file").write_text("no other segment's content")
    own = NewRange(PageClass.EW, SIZE, tmp_path / "file")
    create_segment(host.store, Reference("mine"), [own])
    make(host, tmp_path, "ours", PageClass.SR)
    for guest in guests:
        load(host, guest, "mine")
        load(host, guest, "ours")
        read = "dd if=/dev/onecopy/ours of=/dev/null bs=64k count=4 iflag=direct 2>&1"
        assert run_in(guest, "sh", "-c", read).exit_code == 0
    write = "dd if=/dev/zero of=/dev/onecopy/mine bs=4k count=5 oflag=direct conv=notrunc 2>&1"
    assert run_in(guests[0], "sh", "-c", write).exit_code == 0
    guests = [host.guest(guest.name).record() for guest in guests]
    with frozen(guests):
        found, read_pages = collected(guests)
    for account, pages in zip(found.guests, read_pages, strict=True):
        assert account.ram_private == pages.ram.anonymous > 0
        assert account.ram_shared == pages.ram.resident - pages.ram.anonymous > MIB
        assert account.ram_proportional is not None
        off = account.ram_proportional - pages.ram.proportional
        assert abs(off) < 1024 * pages.ram_mappings
        segments = report.value(account, column("segments"))
        assert segments == pages.segments.resident > 0
        assert account.segments_private == pages.segments.anonymous
        assert account.vmm_private == pages.rest.alone
        assert account.vmm_shared == pages.rest.resident - pages.rest.alone
        assert account.pss_total is not None
        assert abs(account.pss_total - pages.every.proportional) < 1024 * pages.mappings
        assert (account.swapped, account.note) == (0, "")
    assert [account.segments_private for account in found.guests] == [5 * PAGE_SIZE, 0]
    uses = [{s.name: s for s in account.segments or ()} for account in found.guests]
    for use in uses:
        assert use["ours"].mapped == SIZE
        # Two guests have the same pages; their kernels have looked at some for themselves.
        both, alone = use["ours"].resident, use["ours"].resident - 4 * 65536
        assert use["ours"].proportional is not None and alone >= 0
        assert both / 2 <= use["ours"].proportional <= both / 2 + alone
        assert use["ours"].private == 0
    ways = Counter({blob.name: blob.guests or 0 for blob in found.blobs})
    assert ways["ours"] == 2


def column(key: str) -> report.Column:
    return next(each for each in report.COLUMNS if each.key == key)


def wait_until_found(pid: int) -> None:
    """Between fork and exec it is no QEMU."""
    deadline = time.monotonic() + 60
    while pid not in {each.pid for each in external_qemu.find(()).vmms}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_as_a_user_sees_it(host: Runtime, clones: Clones) -> None:
    """Guests, another's QEMU, and whether the parts add up."""
    guests = clones(2)
    argv = ["qemu-system-x86_64", "-S", "-display", "none", "-name", "theirs", "-m", "64M"]
    with subprocess.Popen([*argv, "-machine", "q35,accel=tcg"]) as theirs:
        try:
            wait_until_found(theirs.pid)
            text = onecopy("report", "--check").stdout
            told: dict[str, Any] = answer("report", "--check", "--json")
            inspected = answer("inspect", guests[0].name)
            with onecopy_api.Host() as api:
                theirs_too = api.report()
            pids = [theirs.pid, *(each["pid"] for each in (*told["guests"], *told["servers"]))]
            rollups = [smaps.read_rollup(pid) for pid in pids]
        finally:
            theirs.kill()
    names = [line.split()[0] for line in text.splitlines() if line]
    assert {"OTHER", "theirs", "CHECK", *(guest.name for guest in guests)} <= set(names)
    assert "theirs" in {each["name"] for each in told["others"]}
    assert {guest.name for guest in guests} <= {each["name"] for each in told["guests"]}
    assert {guest.name for guest in guests} <= {each.name for each in theirs_too.guests}
    assert theirs.pid in {each.pid for each in theirs_too.others}
    check = told["check"]
    parts = ("processes", "page_tables", "kernel", "blobs")
    assert check["parts"] == sum(check[part] for part in parts)
    assert check["blobs"] == told["blobs_resident"]
    shares = [r.anonymous + r.shared_memory for r in rollups if r]
    # A fork server may have had the pages before that its VMMs share now.
    before = sum(each.own for each in cross_check.read(host.memory_before).servers)
    # QEMU of another, started since, is in it; they run on meanwhile.
    assert check["processes"] > 0.9 * (sum(shares) - before) > 0
    assert inspected["account"]["pid"] == guests[0].pid
    assert inspected["account"]["ram_shared"] > MIB
