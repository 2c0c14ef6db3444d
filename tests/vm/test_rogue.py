"""A guest that writes to its segments changes neither the store, nor other guests, nor QEMU.

virtio-pmem has no read-only bit, so the guest believes that it can write. Under KVM the memory slot
is read-only. Each write exits to QEMU, which drops it.

Source: Linux Documentation/virt/kvm/api.rst, KVM_MEM_READONLY.
"""

from __future__ import annotations

import pytest

from onecopy.guest.runtime import Runtime
from onecopy.store import Artifact
from tests.vm import physical
from tests.vm.conftest import Clones, RunIn

#: Every page of each segment (or three blocks of a page, where each word that is written leaves to
#: QEMU, as under KVM), past the guest's page cache; and not flushed: a clone's virtio-pmem
#: never ends a flush (docs/architecture.md).
WRITES = """\
import mmap, os, struct, sys
import fcntl
BLKROSET, BLOCK = 0x125D, (1 if sys.argv[2] == "kvm" else 256) * 4096
pattern = mmap.mmap(-1, BLOCK)
pattern.write(b"scribble" * (BLOCK // 8))
for number in range(int(sys.argv[1])):
    device = f"/dev/pmem{number}"
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    # Its driver was told that it cannot be written to.
    fcntl.ioctl(fd, BLKROSET, struct.pack("i", 0))
    os.close(fd)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    size = os.lseek(fd, 0, os.SEEK_END)
    few = {0, size // 8192 * 4096, size - 4096}
    for start in few if sys.argv[2] == "kvm" else range(0, size, BLOCK):
        part = memoryview(pattern)[:min(BLOCK, size - start)]
        assert os.pwritev(fd, [part], start) == len(part)
    os.close(fd)
    print(device)
"""
#: The same through the physical addresses. The kernel may not let it (STRICT_DEVMEM), and says so.
PHYSICAL = """\
import mmap, os, re
lines = open("/proc/iomem").read().splitlines()
pattern = r" *([0-9a-f]+)-([0-9a-f]+) : (Persistent Memory|namespace)"
found = [re.match(pattern, line) for line in lines]
regions = [(int(m[1], 16), int(m[2], 16) + 1) for m in found if m]
assert regions, lines
written = 0
try:
    fd = os.open("/dev/mem", os.O_RDWR | os.O_SYNC)
except OSError as error:
    print("no /dev/mem:", error)
    raise SystemExit
for start, end in regions:
    try:
        with mmap.mmap(fd, end - start, offset=start) as memory:
            for at in range(0, len(memory), 4096):
                memory[at : at + 8] = b"scribble"
                written += 1
    except OSError as error:
        print("refused:", error)
print("written:", written)
"""


@pytest.mark.smoke
def test_its_writes_are_dropped(
    host: Runtime,
    clones: Clones,
    run_in: RunIn,
    saved: Artifact,
    python_root: Artifact,
    app: Artifact,
) -> None:
    rogue, neighbour = clones(2)
    count = len(physical.query(host, rogue, "query-memory-devices"))
    done = run_in(rogue, "python3", "-c", WRITES, str(count), rogue.accel)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.decode().split() == [f"/dev/pmem{number}" for number in range(count)]

    done = run_in(rogue, "python3", "-c", PHYSICAL)
    assert done.exit_code == 0 and done.stdout, done.stderr
    print(done.stdout.decode())

    assert physical.query(host, rogue, "query-status")["status"] == "running"
    for artifact in (saved, python_root, app):
        host.store.verify(artifact)
    for guest in (neighbour, rogue):
        answer = run_in(guest, "wget", "-q", "-O-", "http://127.0.0.1/")
        assert answer.stdout.decode().strip() == guest.name
