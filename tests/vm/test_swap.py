"""A guest swaps while programs run from its DAX root, and its kernel logs no warning.

Linux's multi-generational LRU warns of such mappings (get_pte_pfn() in mm/vmscan.c), so it is off.
"""

from __future__ import annotations

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.model import MIB
from onecopy.store import Artifact
from tests.vm.conftest import Clones, RunIn
from tests.vm.guests import Guests
from tests.vm.physical import decode

LRU = "/sys/kernel/mm/lru_gen/enabled"
#: Writes more memory than the guest has, twice, and reads it. Printed are the pages that went to
#: swap and came back meanwhile, those that were not what had been written, and the mappings of this
#: process that are executed in place and were there all the time.
WORK = """\
import decimal, json, mmap, sqlite3

def events():
    return {name: int(count) for name, count in map(str.split, open("/proc/vmstat"))}

before, size = events(), 160 << 20
memory = mmap.mmap(-1, size)
wrong = 0
for turn in range(2):
    for at in range(0, size, 4096):
        wrong += turn and memory[at : at + 8] != at.to_bytes(8, "little")
        memory[at : at + 8] = at.to_bytes(8, "little")
after = events()
moved = {name: after[name] - before[name] for name in ("pswpin", "pswpout", "pgsteal_anon")}
code = sum(" r-xp " in line and "/usr/" in line for line in open("/proc/self/maps"))
print(json.dumps(moved | {"wrong": wrong, "code": code}))
"""


@pytest.fixture
def swapping(guests: Guests, python_root: Artifact, run_in: RunIn) -> GuestRecord:
    """A guest of 128 MiB, with a disk for swap."""
    guest = guests.boot(python_root, name="swaps", memory="128M", disks=["256M"]).record
    use = "mkswap /dev/onecopy/disk0 && swapon /dev/onecopy/disk0"
    done = run_in(guest, "sh", "-c", use)
    assert done.exit_code == 0, done.stderr
    return guest


def warnings(guest: GuestRecord, run_in: RunIn) -> list[str]:
    said = run_in(guest, "dmesg").stdout.decode(errors="replace")
    return [line for line in said.splitlines() if "WARNING" in line]


def swap(guest: GuestRecord, run_in: RunIn) -> None:
    """Let its kernel reclaim memory of a program that is executed in place."""
    done = run_in(guest, "python3", "-c", WORK, timeout=600)
    assert done.exit_code == 0, done.stderr
    found = decode(done.stdout)
    assert found["wrong"] == 0
    assert found["code"] >= 4
    pages = 32 * MIB // 4096
    assert min(found["pswpin"], found["pswpout"], found["pgsteal_anon"]) > pages, found


def test_swapping_is_nothing_to_warn_of(swapping: GuestRecord, run_in: RunIn) -> None:
    swap(swapping, run_in)
    assert warnings(swapping, run_in) == []
    # With it on, the same is. Once it is not, nobody need switch it off.
    run_in(swapping, "sh", "-c", f"echo 7 >{LRU}")
    swap(swapping, run_in)
    (warning,) = warnings(swapping, run_in)
    assert "get_pte_pfn" in warning


def test_clones_are_without_it_too(clones: Clones, run_in: RunIn) -> None:
    (guest,) = clones(1)
    assert run_in(guest, "cat", LRU).stdout == b"0x0000\n"
