"""Clones share one copy of their saved system's RAM, and keep their writes to themselves.

Not here: segments (test_sharing.py), changes to the kernel's text (test_patching.py).
"""

from __future__ import annotations

import secrets
import time

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import kpage, pagemap
from onecopy.model import MIB, PAGE_SIZE
from onecopy.store import Artifact
from tests.vm import physical
from tests.vm.conftest import Clones, RunIn

PYTHON_FILE = "/usr/lib/python3.11/this.py"


@pytest.mark.smoke
def test_unwritten_ram_is_one_copy(host: Runtime, clones: Clones, run_in: RunIn) -> None:
    guests = clones(2)
    for guest in guests:
        assert run_in(guest, "wget", "-q", "-O-", "http://127.0.0.1/").exit_code == 0
    with physical.paused(host, guests):
        check_ram(*(physical.ram(guest) for guest in guests))
    for guest in guests:
        assert run_in(guest, "hostname").stdout.decode().strip() == guest.name


def test_an_idle_clone_owns_little(clones: Clones) -> None:
    # What a guest was about to do when it was saved each clone would do again, on pages of its own.
    (guest,) = clones(1)
    time.sleep(3)
    own = sum(physical.private(entry) for entry in physical.ram(guest)) * PAGE_SIZE
    print(f"private RAM of an idle clone: {own / MIB:.2f} MiB")
    # Of 1.5 MiB becoming another machine takes 1 (docs/performance.md).
    assert 0 < own < 2 * MIB


def check_ram(first: list[int], second: list[int]) -> None:
    pairs = list(zip(first, second, strict=True))
    both = [(a, b) for a, b in pairs if pagemap.present(a) and pagemap.present(b)]
    shared = [(a, b) for a, b in both if not physical.private(a) and not physical.private(b)]
    own = [[e for e in entries if physical.private(e)] for entries in (first, second)]
    print(
        f"RAM pages: {len(first)}; in both page tables: {len(both)}; "
        f"shared: {len(shared)}; private: {len(own[0])} and {len(own[1])}"
    )
    pfns = [pagemap.pfn(a) or 0 for a, _ in shared]
    assert pfns == [pagemap.pfn(b) for _, b in shared]
    assert min(kpage.counts(pfns)) >= 2
    assert not any(flag & kpage.Flags.ANON for flag in kpage.flags(pfns))
    assert len(shared) * PAGE_SIZE > 8 << 20
    # Written pages, and only these, are each guest's own.
    frames = [{pagemap.pfn(e) or 0 for e in entries} for entries in own]
    assert frames[0].isdisjoint(frames[1])
    assert all(set(kpage.counts(sorted(f))) == {1} for f in frames)
    assert all(len(f) < len(first) / 8 for f in frames)


def holds(guest: GuestRecord, token: bytes) -> bool:
    """Whether the token stands anywhere in the guest's RAM."""
    return token in physical.ram_bytes(guest, 0, guest.memory)


def test_what_one_clone_writes_no_other_sees(
    host: Runtime, clones: Clones, run_in: RunIn, saved: Artifact, python_root: Artifact
) -> None:
    writer, *others = clones(3)
    token = secrets.token_hex(16)
    script = f"echo {token} >/root/new && echo {token} >>{PYTHON_FILE} && echo {token} >/dev/shm/x"
    done = run_in(writer, "sh", "-c", script)
    assert done.exit_code == 0, done.stderr
    assert run_in(writer, "tail", "-n", "1", PYTHON_FILE).stdout.decode().strip() == token
    for other in others:
        done = run_in(other, "sh", "-c", f"ls -A /root /dev/shm; tail -n 1 {PYTHON_FILE}")
        assert done.exit_code == 0, done.stderr
        assert "new" not in done.stdout.decode().split()
        assert token.encode() not in done.stdout
    # Not a trace of it in their memory, either.
    assert holds(writer, token.encode())
    assert not any(holds(other, token.encode()) for other in others)
    # A clone started later does not see it: nothing reached the saved RAM.
    assert not holds(clones(1)[0], token.encode())
    for artifact in (saved, python_root):
        host.store.verify(artifact)


def test_a_kernel_module_loads_in_one_clone(clones: Clones, run_in: RunIn) -> None:
    loads, other = clones(2)
    script = "modprobe dummy && ip link add dummy7 type dummy && ip link show dummy7 && lsmod"
    done = run_in(loads, "sh", "-c", script)
    assert done.exit_code == 0, done.stderr
    assert "dummy7" in done.stdout.decode()
    assert b"\ndummy " in done.stdout
    done = run_in(other, "sh", "-c", "lsmod; ls /sys/class/net")
    assert done.exit_code == 0
    assert b"virtio_net" in done.stdout
    assert b"dummy" not in done.stdout
