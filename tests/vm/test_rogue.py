"""A guest that writes to its segments changes nothing: not the store, not a neighbour, not QEMU.

virtio-pmem has no read-only bit, so the guest believes that it can write. Under KVM the memory slot
is read-only and each write leaves to QEMU, which drops it (Linux Documentation/virt/kvm/api.rst,
KVM_MEM_READONLY).
"""

from __future__ import annotations

import pytest

from onecopy.guest.host import Host
from onecopy.store import Artifact
from tests.vm import physical
from tests.vm.conftest import Clones, RunIn

#: Three pages of each segment, past the guest's page cache; and not flushed: a clone's virtio-pmem
#: never ends a flush (docs/architecture.md).
WRITES = """\
import mmap, os, sys
pattern = mmap.mmap(-1, 4096)
pattern.write(b"scribble" * 512)
for number in range(int(sys.argv[1])):
    device = f"/dev/pmem{number}"
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    size = os.lseek(fd, 0, os.SEEK_END)
    for page in {0, size // 8192, size // 4096 - 1}:
        assert os.pwritev(fd, [pattern], page * 4096) == 4096
    os.close(fd)
    print(device)
"""


@pytest.mark.smoke
def test_its_writes_are_dropped(
    host: Host, clones: Clones, run_in: RunIn, saved: Artifact, python_root: Artifact, app: Artifact
) -> None:
    rogue, neighbour = clones(2)
    count = len(physical.query(host, rogue, "query-memory-devices"))
    done = run_in(rogue, "python3", "-c", WRITES, str(count))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.decode().split() == [f"/dev/pmem{number}" for number in range(count)]

    assert physical.query(host, rogue, "query-status")["status"] == "running"
    for artifact in (saved, python_root, app):
        host.store.verify(artifact)
    for guest in (neighbour, rogue):
        answer = run_in(guest, "wget", "-q", "-O-", "http://127.0.0.1/")
        assert answer.stdout.decode().strip() == guest.name
