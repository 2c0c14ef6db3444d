"""Guests share one copy of a segment in memory, as the kernels of host and guest count it.

Not here: RAM of clones (test_sharing_clones.py), reports (the unit tests).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.linux import prefetch
from onecopy.linux.counters import kpage, pagemap, residency
from onecopy.model import MIB, PAGE_SIZE, Reference
from onecopy.store import Artifact
from tests.vm import physical
from tests.vm.conftest import Boot, RunIn
from tests.vm.guests import Guests, open_guests, save_system

#: Where a guest says that a test has used it.
USED = "/run/used"
#: A busy program that tells where its own text is: [[physical address, checksum], ...].
BUSY = (
    physical.IN_GUEST
    + """\
import json, zlib
sum(n * n % 7 for n in range(50000))
found = []
with open("/proc/self/mem", "rb", 0) as memory:
    for line in open("/proc/self/maps"):
        where, perms, offset, device, inode, *path = line.split()
        if perms == "r-xp" and path and "/python3" in path[0]:
            start, end = (int(x, 16) for x in where.split("-"))
            for address, physical in pages(start, end).items():
                memory.seek(address)
                found.append((physical, zlib.crc32(memory.read(4096))))
print(json.dumps(found))
"""
)
#: A program that tells how much of its files it has mapped in place, and what it cost to start.
STARTED = (
    physical.IN_GUEST
    + """\
import argparse, json, resource
mapped = set()
for line in open("/proc/self/maps"):
    where, perms, offset, device, inode, *path = line.split()
    if path and path[0].startswith("/usr"):
        mapped.update(pages(*(int(x, 16) for x in where.split("-"))).values())
io = dict(line.split(": ") for line in open("/proc/self/io"))
print("majflt", resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
print("mapped", sum(4096 for address in mapped if address >= 1 << 32))
print("read", int(io["read_bytes"]))
"""
)
#: Its start, between two looks at the guest's counters.
FIRST_START = """\
for device in /sys/block/*; do echo 1 >$device/queue/iostats; done
look() {
    grep -E '^(nr_file_pages|pgmajfault) ' /proc/vmstat
    while read -r major minor name reads merged sectors rest; do
        echo "disk:$name $sectors"
    done </proc/diskstats
}
look
python3 -c "$1"
look
"""
#: Writes to a private mapping of the page that is being executed from.
PRIVATE_WRITE = (
    physical.IN_GUEST
    + """\
import ctypes, json, mmap, subprocess, sys
path = "/usr/bin/python3"
with open(path, "rb") as file:
    view = mmap.mmap(file.fileno(), 1 << 20, access=mmap.ACCESS_COPY)
start = ctypes.addressof(ctypes.c_char.from_buffer(view))
at = 0x80000
before = view[at:at + 8], view[at + 4096]
was = pages(start + at, start + at + 4096)[start + at]
view[at:at + 8] = b"scribble"
script = f"f = open({path!r}, 'rb'); f.seek({at}); print(f.read(8).hex())"
other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
print(json.dumps({
    "before": before[0].hex(), "mine": view[at:at + 8].hex(), "others": other.strip(),
    "was": was, "is": pages(start + at, start + at + 4096)[start + at],
    "next": pages(start + at + 4096, start + at + 8192)[start + at + 4096],
}))
"""
)


@pytest.fixture(scope="module")
def two(host: Runtime, python_root: Artifact) -> Iterator[list[GuestRecord]]:
    """Two guests, each booted by itself."""
    with open_guests() as guests:
        yield [guests.boot(python_root, memory="192M").record for _ in range(2)]


@pytest.fixture
def fresh(two: list[GuestRecord], run_in: RunIn) -> list[GuestRecord]:
    """The two, in which no test has run anything before."""
    for guest in two:
        assert run_in(guest, "test", "-e", USED).exit_code == 1, "not the first test of two guests"
    return two


@pytest.fixture
def used(two: list[GuestRecord], run_in: RunIn) -> list[GuestRecord]:
    """The two, whatever has run in them."""
    for guest in two:
        assert run_in(guest, "touch", USED).exit_code == 0
    return two


def blob(artifact: Artifact) -> Path:
    return artifact.layer("image").path


@dataclass(frozen=True, slots=True)
class FirstStart:
    """What the guest's kernel counted while a program started; bytes, but for the faults."""

    mapped: int
    """Of its files, in place."""
    cached: int
    """What the guest's page cache grew by."""
    read: int
    """From block devices, by the program."""
    sectors: int
    """From block devices, by anybody."""
    faults: tuple[int, int]
    """Major ones: the program's, everybody's."""


def first_start(guest: GuestRecord, run_in: RunIn) -> FirstStart:
    done = run_in(guest, "sh", "-c", FIRST_START, "sh", STARTED)
    assert done.exit_code == 0, done.stderr
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    told = {key: [int(v) for k, v in lines if k == key] for key, _ in lines}
    grown = {key: values[1] - values[0] for key, values in told.items() if len(values) == 2}
    disks = {key for key in grown if key.startswith("disk:")}
    # Segments are all the disks there are.
    assert disks == {f"disk:pmem{number}" for number in range(3)}
    result = FirstStart(
        mapped=told["mapped"][0],
        cached=grown["nr_file_pages"] * PAGE_SIZE,
        read=told["read"][0],
        sectors=sum(grown[key] for key in disks) * 512,
        faults=(told["majflt"][0], grown["pgmajfault"]),
    )
    print(f"{guest.name}: {result}")
    return result


def test_a_first_start_reads_and_caches_no_program(fresh: list[GuestRecord], run_in: RunIn) -> None:
    for guest in fresh:
        found = first_start(guest, run_in)
        assert found.mapped > 2 * MIB
        assert found.faults == (0, 0)
        # The file system's own records (folders, inodes) are read by block and kept in the guest;
        # of the files themselves not one page is.
        assert found.cached < found.mapped / 8
        assert found.read < found.mapped / 16
        assert found.sectors < found.mapped / 16

    # The counter does see a program that is not executed in place: a copy in RAM.
    script = "grep nr_file_pages /proc/vmstat; cp /usr/bin/python3 /tmp/p; "
    done = run_in(fresh[0], "sh", "-c", script + "grep nr_file_pages /proc/vmstat")
    before, after = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert (after - before) * PAGE_SIZE > 6 * MIB


def text_pages(host: Runtime, guest: GuestRecord, run_in: RunIn, image: Path) -> dict[int, int]:
    """Page of the segment -> checksum, of the text that a busy Python really has mapped."""
    done = run_in(guest, "python3", "-c", BUSY)
    assert done.exit_code == 0, done.stderr
    region = physical.regions(host, guest)[str(image)]
    found = physical.decode(done.stdout)
    # All of it is in the segment: nothing was copied into the guest's RAM.
    assert all(region.start <= address < region.start + region.size for address, _ in found)
    return {(address - region.start) // PAGE_SIZE: crc for address, crc in found}


@pytest.mark.smoke
def test_a_programs_text_is_one_copy(
    host: Runtime, used: list[GuestRecord], run_in: RunIn, python_root: Artifact
) -> None:
    image = blob(python_root)
    texts = [text_pages(host, guest, run_in, image) for guest in used]
    common = sorted(texts[0].keys() & texts[1].keys())
    frames = [physical.entries(guest, image) for guest in used]
    seen = [p for p in common if all(pagemap.present(f[p]) for f in frames)]
    pfns = [[pagemap.pfn(f[page]) or 0 for page in seen] for f in frames]
    print(f"text pages mapped in both guests: {len(common)}, in both VMMs: {len(seen)}")

    assert len(common) * PAGE_SIZE > MIB
    assert len(seen) > len(common) * 0.9
    assert pfns[0] == pfns[1]
    assert len(set(pfns[0])) == len(seen)
    assert min(kpage.counts(pfns[0])) >= 2
    assert not any(flag & kpage.Flags.ANON for flag in kpage.flags(pfns[0]))
    with image.open("rb") as file:
        for page in common:
            file.seek(page * PAGE_SIZE)
            checksum = zlib.crc32(file.read(PAGE_SIZE))
            assert texts[0][page] == texts[1][page] == checksum


def test_a_first_start_in_a_clone_reads_nothing_at_all(
    host: Runtime, guests: Guests, python_root: Artifact, run_in: RunIn
) -> None:
    # Nothing but an idle system was saved: the program starts for the first time in each clone.
    idle = save_system("idle", python_root, memory="192M", command="")
    try:
        for guest in guests.clone(idle, 2):
            found = first_start(guest.record, run_in)
            assert found.mapped > 2 * MIB
            assert (found.faults, found.read, found.sectors) == ((0, 0), 0, 0)
            assert found.cached < found.mapped / 64
    finally:
        guests.end()
        host.store.remove(Reference("idle"))


def test_what_nobody_touched_is_not_in_memory(
    host: Runtime, boot: Boot, run_in: RunIn, python_root: Artifact, tmp_path: Path
) -> None:
    read, ahead = 4 * MIB, 3 * (prefetch.read_ahead(tmp_path) or 0)
    data = os.urandom(read + ahead + 32 * MIB)
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "data").write_bytes(data)
    big = build_segment(host.store, Reference("big"), f"dir:{folder}")
    begin = blob(big).read_bytes().index(data[:PAGE_SIZE])
    assert begin % PAGE_SIZE == 0
    forget(blob(big))
    assert residency.resident_bytes(blob(big)) == 0

    guest = boot(python_root, segments=["big:/data"], memory=192 * MIB)
    done = run_in(guest, "sh", "-c", f"head -c {read} /data/data | cksum")
    assert done.exit_code == 0, done.stderr
    resident = residency.resident_pages(blob(big))
    assert resident is not None
    pages = resident[begin // PAGE_SIZE :][: len(data) // PAGE_SIZE]
    print(f"resident: {sum(pages)} of {len(pages)} pages; read in the guest: {read // PAGE_SIZE}")
    assert all(pages[: read // PAGE_SIZE])
    assert not any(pages[(read + ahead) // PAGE_SIZE :])
    host.end(guest)
    host.store.remove(Reference("big"))


def forget(path: Path) -> None:
    """Drop a file from the host's page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def test_a_private_write_stays_in_its_process(
    host: Runtime, used: list[GuestRecord], run_in: RunIn, python_root: Artifact
) -> None:
    done = run_in(used[0], "python3", "-c", PRIVATE_WRITE)
    assert done.exit_code == 0, done.stderr
    told = physical.decode(done.stdout)
    region = physical.regions(host, used[0])[str(blob(python_root))]
    in_segment = range(region.start, region.start + region.size)
    assert bytes.fromhex(told["mine"]) == b"scribble"
    assert told["was"] in in_segment
    assert told["is"] not in in_segment
    assert told["next"] in in_segment
    assert told["others"] == told["before"] != told["mine"]

    script = "f = open('/usr/bin/python3', 'rb'); f.seek(0x80000); print(f.read(8).hex())"
    for guest in used:
        done = run_in(guest, "python3", "-c", script)
        assert done.stdout.decode().strip() == told["before"]
    host.store.verify(python_root)
