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
from onecopy.sharing import report
from onecopy.sharing.account import find_ram
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


def collected(guests: Sequence[GuestRecord]) -> report.Report:
    """Report frozen guests while the other QEMUs, which share libraries with them, stay."""
    deadline = time.monotonic() + 120
    while True:
        before = [Pages.of(guest.pid, smaps.read(guest.pid)) for guest in guests]
        found = report.collect(guest_maps(guests))
        if before == [Pages.of(guest.pid, smaps.read(guest.pid)) for guest in guests]:
            return found
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
        found = collected(guests)
        for guest, maps, account in zip(guests, guest_maps(guests), found.guests, strict=True):
            mappings = smaps.read(guest.pid)
            ram = find_ram(maps, mappings)
            segments = [m for m in mappings if m.path in maps.segments]
            rest = [m for m in mappings if m not in ram and m not in segments]
            pages = Pages.of(guest.pid, ram)
            assert account.ram_private == pages.anonymous > 0
            assert account.ram_shared == pages.resident - pages.anonymous > MIB
            assert account.ram_proportional is not None
            assert abs(account.ram_proportional - pages.proportional) < 1024 * len(ram)
            pages = Pages.of(guest.pid, segments)
            assert report.value(account, column("segments")) == pages.resident > 0
            assert account.segments_private == pages.anonymous
            pages = Pages.of(guest.pid, rest)
            assert account.vmm_private == pages.alone
            assert account.vmm_shared == pages.resident - pages.alone
            pages = Pages.of(guest.pid, mappings)
            assert account.pss_total is not None
            assert abs(account.pss_total - pages.proportional) < 1024 * len(mappings)
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
            rollups = [smaps.read_rollup(pid) for pid in (theirs.pid, *(g.pid for g in guests))]
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
    # QEMU of another, started since, is in it; they run on meanwhile.
    assert check["processes"] > 0.9 * sum(shares)
    assert inspected["account"]["pid"] == guests[0].pid
    assert inspected["account"]["ram_shared"] > MIB
