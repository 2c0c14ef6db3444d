"""What the children of a fork server write of its memory, and the functions that see to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from msgspec.structs import replace

from onecopy.linux.counters import smaps
from onecopy.model import MIB
from onecopy.vmm.fork_server import ForkServer
from tests.unit.vmm.fork_kit import Vmm, vmm

#: Uses the library's functions in a program that is no fork server.
BLOCKS = """
import ctypes, random, resource, threading
libc = ctypes.CDLL(None)
void, size = ctypes.c_void_p, ctypes.c_size_t
for name, result, *given in (
    ("calloc", void, size, size), ("realloc", void, void, size), ("free", None, void),
    ("malloc_usable_size", size, void),
):
    getattr(libc, name).restype, getattr(libc, name).argtypes = result, given

def work(seed):
    chance, live = random.Random(seed), {}
    for _ in range(4000):
        step = chance.random()
        if step < 0.5 or not live:
            length = chance.choice((100, 4095, 4096, 5000, 60_000, 1 << 20, (1 << 20) + 1))
            at = libc.calloc(1, length)
            assert ctypes.string_at(at, length) == bytes(length)
        else:
            at = chance.choice(list(live))
            length, mark = live.pop(at)
            assert libc.malloc_usable_size(at) >= length
            assert ctypes.string_at(at, length) == mark * length
            if step < 0.8:
                libc.free(at)
                continue
            kept, length = length, chance.choice((50, 4096, 9000, 70_000))
            at = libc.realloc(at, length)
            kept = min(kept, length)
            assert ctypes.string_at(at, kept) == mark * kept
        mark = bytes([chance.randrange(1, 256)])
        ctypes.memset(at, mark[0], length)
        live[at] = length, mark
        if len(live) > 40:
            libc.free(live.popitem()[0])
    for at in live:
        libc.free(at)
    done.append(seed)

# Nobody writes to these.
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks = [libc.calloc(7, 1024) for _ in range(1000)]
assert not any(each % 4096 for each in blocks)
[libc.free(each) for each in blocks]
assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 500
done = []
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
[each.start() for each in threads], [each.join() for each in threads]
assert sorted(done) == [0, 1, 2, 3]
# More than the mapping has.
assert len({libc.calloc(1, 1 << 20) for _ in range(100)}) == 100
print("fine")
"""


def _heap_of_server(found: Vmm) -> int:
    """Return the bytes of its server's heap that a VMM has not written."""
    return sum(each.shared for each in smaps.read(found.pid) if each.path == "[heap]")


def test_blocks_are_zero_and_apart(library: Path) -> None:
    argv = [sys.executable, "-c", BLOCKS]
    done = subprocess.run(argv, env={"LD_PRELOAD": str(library)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)


def test_a_wrong_block_ends_the_program(library: Path) -> None:
    wrong = (
        "import ctypes as c; l = c.CDLL(None); l.calloc.restype = c.c_void_p; p = {}; l.free({})"
    )
    twice = "c.c_void_p(l.calloc(1, 9000))", "p); l.free(p"
    inside = "c.c_void_p(l.calloc(1, 9000))", "c.c_void_p(p.value + 16)"
    for case in (twice, inside):
        argv = [sys.executable, "-c", wrong.format(*case)]
        done = subprocess.run(argv, env={"LD_PRELOAD": str(library)}, stderr=subprocess.DEVNULL)
        assert done.returncode < 0


def test_a_server_prepares_the_accelerator(server: ForkServer, tmp_path: Path) -> None:
    """QEMU's classes of CPU models note it, which are in a hundred pages."""
    prepared = replace(server, accel="tcg")
    with (
        vmm(tmp_path / "a", server) as first,
        vmm(tmp_path / "b", server) as other,
        vmm(tmp_path / "c", prepared) as one,
        vmm(tmp_path / "d", prepared) as two,
    ):
        assert not one.started.why_exec and not two.started.why_exec
        more = min(map(_heap_of_server, (one, two))) - max(map(_heap_of_server, (first, other)))
        assert more > MIB / 4
        for each in (first, one, two):
            (cpu,) = each.execute("query-cpus-fast")
            models = each.execute("query-cpu-definitions")
            assert cpu["target"] == "x86_64"
            assert len(models) > 50 and models == first.execute("query-cpu-definitions")


def test_an_unknown_accelerator_is_left_to_the_children(server: ForkServer, tmp_path: Path) -> None:
    with vmm(tmp_path / "a", replace(server, accel="quantum")) as forked:
        assert not forked.started.why_exec
        assert forked.execute("query-status")
