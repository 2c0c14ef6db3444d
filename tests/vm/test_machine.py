"""A guest's view of its machine: CPU model, clock, random numbers, and page sizes.

All of these differ between KVM and TCG. script/test-kvm runs the tests under KVM, too.
"""

from __future__ import annotations

import itertools
import time

import msgspec
import pytest

from onecopy.errors import GuestFailed, Incompatible
from onecopy.guest.machine import SystemConfig
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import smaps
from onecopy.store import Artifact
from onecopy.vmm.accel import Choice
from onecopy.vmm.cpu import DEFAULT, LEVELS
from tests.vm.conftest import Boot, Clones, RunIn
from tests.vm.guests import boot_plan, clone_plan

#: /proc/cpuinfo's names of the features of x86-64-v2 (x86-64 psABI) and of our addition to it.
V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3", "aes", "rdrand"}
V3 = V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}


def flags(guest: GuestRecord, run_in: RunIn) -> set[str]:
    done = run_in(guest, "sed", "-n", "s/^flags.*: //p", "/proc/cpuinfo")
    found = set(done.stdout.decode().split())
    # Only its kernel does without (vmm/tcg.py).
    return found | {"cx16"} if hides_cmpxchg16b(guest, run_in) else found


def hides_cmpxchg16b(guest: GuestRecord, run_in: RunIn) -> bool:
    return b"Clearing CPUID bits: cx16" in run_in(guest, "dmesg").stdout


#: Lets cmpxchg16b follow a subtraction whose flags nobody has asked for yet, and prints the flags.
CMPXCHG16B = """
import ctypes, mmap
code = bytes.fromhex(
    "53"  # push rbx
    "4889f1 31d2 31db b8ffff0000"  # mov rcx, rsi; xor edx, edx; xor ebx, ebx; mov eax, 0xffff
    "9c 9d"  # pushfq; popfq
    "4829c8 480fc70f"  # sub rax, rcx; cmpxchg16b [rdi]
    "9c 58 5b c3"  # pushfq; pop rax; pop rbx; ret
)
page = mmap.mmap(-1, 4096, prot=7)
page.write(code)
entry = ctypes.addressof(ctypes.c_char.from_buffer(page))
function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)(entry)
data = ctypes.create_string_buffer(64)
print(hex(function((ctypes.addressof(data) + 15) & ~15, 0x12345000)))
"""


def test_a_kernel_uses_no_cmpxchg16b_that_spoils_flags(clones: Clones, run_in: RunIn) -> None:
    """QEMU's TCG before 8.0: what it leaves in the flags may end the kernel by a trap."""
    (guest,) = clones(1)
    done = run_in(guest, "python3", "-c", CMPXCHG16B)
    spoiled = int(done.text, 16) >> 12 != 0
    assert spoiled == hides_cmpxchg16b(guest, run_in)


def test_under_tcg_the_kernel_does_not_unpack_itself(
    saved: Artifact, clones: Clones, run_in: RunIn
) -> None:
    """It lies at the address that it was linked for, which a bzImage would have changed."""
    (guest,) = clones(1)
    done = run_in(guest, "grep", "-w", "_text", "/proc/kallsyms")
    if SystemConfig.of(saved).accel == "tcg":
        assert int(done.stdout.split()[0], 16) == 0xFFFFFFFF81000000


def test_clones_have_the_portable_cpu(saved: Artifact, clones: Clones, run_in: RunIn) -> None:
    assert SystemConfig.of(saved).cpu == LEVELS[DEFAULT]
    (guest,) = clones(1)
    assert flags(guest, run_in) >= V2
    # Nothing that not every host has.
    assert not flags(guest, run_in) & {"avx", "svm", "vmx", "tsc_deadline_timer"}


def test_another_cpu_is_asked_for(busybox_root: Artifact, boot: Boot, run_in: RunIn) -> None:
    guest = boot(busybox_root, cpu="x86-64-v3")
    wanted = set(V3)
    if b"XSAVE consistency problem" in run_in(guest, "dmesg").stdout:
        # KVM on a processor that QEMU before 8.0 emulates: Linux then does without these.
        wanted -= {"avx", "avx2", "fma", "xsave"}
    assert flags(guest, run_in) >= wanted


def test_the_hosts_own_cpu_needs_kvm(
    host: Runtime, busybox_root: Artifact, boot: Boot, run_in: RunIn, saved: Artifact
) -> None:
    if SystemConfig.of(saved).accel == "kvm":
        assert flags(boot(busybox_root, cpu="host"), run_in) >= V2
    else:
        with pytest.raises(Incompatible, match="host needs KVM"):
            boot_plan(host, busybox_root.ref, cpu="host", command="")


def test_an_unknown_cpu(busybox_root: Artifact, boot: Boot) -> None:
    with pytest.raises(GuestFailed, match="unable to find CPU model 'quantum'"):
        boot(busybox_root, cpu="quantum")


def test_a_saved_system_of_another_host(
    host: Runtime, saved: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SystemConfig.of(saved)
    other = Choice.TCG if config.accel == "kvm" else Choice.KVM
    with pytest.raises(Incompatible, match=f"was saved under {config.accel} and cannot start"):
        clone_plan(host, saved, accel=other)
    machines = tuple(each for each in host.qemu.machines if each != config.machine)
    without = msgspec.structs.replace(host.qemu, machines=machines)
    monkeypatch.setitem(vars(host), "qemu", without)  # a cached property
    with pytest.raises(Incompatible, match=f"not have the machine type {config.machine}"):
        clone_plan(host, saved)


def test_a_clones_clock_goes_on(clones: Clones, run_in: RunIn) -> None:
    (guest,) = clones(1)
    readings = []
    for _ in range(3):
        before = time.monotonic()
        uptime = float(run_in(guest, "cat", "/proc/uptime").stdout.split()[0])
        readings.append((before, uptime, time.monotonic()))
        time.sleep(1)
    for (begin, first, first_known), (asked, second, end) in itertools.pairwise(readings):
        # The guest's time between two readings is no shorter and no longer than it can have been.
        assert asked - first_known - 0.1 < second - first < end - begin + 0.1
    said = run_in(guest, "dmesg").stdout.decode()
    trouble = ("unstable", "soft lockup", "stall", "clock skew", "time jumped")
    assert not [line for line in said.splitlines() if any(word in line for word in trouble)]


def test_clones_have_random_numbers_of_their_own(clones: Clones, run_in: RunIn) -> None:
    guests = clones(3)
    script = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1"
    said = [run_in(guest, "sh", "-c", script).stdout.decode().splitlines() for guest in guests]
    assert all(len(lines) == 2 for lines in said)
    assert len({line for lines in said for line in lines}) == 2 * len(guests)
    for guest in guests:
        done = run_in(
            guest, "sh", "-c", "dmesg | grep -c 'crng reseeded due to virtual machine fork'"
        )
        assert done.stdout.strip() == b"1"


def test_no_vmm_gets_huge_pages_unasked(clones: Clones, busybox_root: Artifact, boot: Boot) -> None:
    # A small guest would then occupy memory that it never touches.
    for guest in (*clones(1), boot(busybox_root)):
        mappings = smaps.read(guest.pid)
        assert mappings
        assert sum(mapping.anon_huge for mapping in mappings) == 0
