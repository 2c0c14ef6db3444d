"""The guest maps a file that is aligned in its segment in large pages (DAX, PMD faults).

One fault and one page table entry cover 512 pages. smaps does not report them for device memory.
Not here: the host's page tables.
"""

from __future__ import annotations

import os
from pathlib import Path

from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import HUGE_PAGE_SIZE, PAGE_SIZE, Reference
from onecopy.store import Artifact
from tests.vm.conftest import Boot, RunIn

SIZE = 2 * HUGE_PAGE_SIZE
READS = """\
import mmap, resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with open("/data/z-file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
    before = faults()
    tops = [data[at] for at in range(0, len(data), mmap.PAGESIZE)]
    print(faults() - before, bytes(tops).hex())
"""


def aligned(host: Runtime, folder: Path, data: bytes) -> Artifact:
    """A segment in which the file z-file begins at a multiple of 2 MiB."""
    folder.mkdir()
    (folder / "z-file").write_bytes(data)
    padding = 0
    for _ in range(2):
        # Files lie in the order of their names.
        (folder / "a-padding").write_bytes(os.urandom(padding or PAGE_SIZE))
        segment = build_segment(host.store, Reference("aligned"), f"dir:{folder}")
        begin = segment.layer("image").path.read_bytes().index(data[:PAGE_SIZE])
        padding = PAGE_SIZE + -begin % HUGE_PAGE_SIZE
    assert begin % HUGE_PAGE_SIZE == 0
    return segment


def test_an_aligned_file(
    host: Runtime, python_root: Artifact, boot: Boot, run_in: RunIn, tmp_path: Path
) -> None:
    data = os.urandom(SIZE)
    segment = aligned(host, tmp_path / "tree", data)
    guest = boot(python_root, segments=["aligned:/data"], memory=192 << 20)
    done = run_in(guest, "python3", "-c", READS)
    assert done.exit_code == 0, done.stderr
    faults, tops = done.stdout.decode().split()
    assert bytes.fromhex(tops) == data[::PAGE_SIZE]
    # One for each large page, and those of the interpreter's own memory.
    assert int(faults) < SIZE // PAGE_SIZE // 8
    host.end(guest)
    host.store.remove(Reference.parse(segment.ref))
