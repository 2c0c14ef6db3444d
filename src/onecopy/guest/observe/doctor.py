"""What this host can do: programs, QEMU, the accelerator, the kernel's counters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import msgspec

from onecopy.errors import (
    MissingProgram,
    NotFound,
    NotPermitted,
    OnecopyError,
    Unreadable,
    as_root,
)
from onecopy.guest.runtime import Runtime
from onecopy.images.kernel import KernelConfig, ensure_kernel
from onecopy.linux import cgroup, prefetch, verity
from onecopy.linux.counters import ksm, meminfo, pagemap
from onecopy.linux.sandbox import landlock
from onecopy.model import MIB, format_size
from onecopy.subprocesses import PACKAGES, find_program
from onecopy.vmm import closed_network, name_servers, open_notify, router, vmm_user
from onecopy.vmm.accel import Choice, choose
from onecopy.vmm.qemu import Qemu


class Finding(msgspec.Struct, frozen=True):
    """One check; ``state`` is ok, limited (something works less well) or missing."""

    check: str
    state: str
    says: str


def examine(host: Runtime, progress: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """All checks; raises nothing for what it finds."""
    return [
        *_programs(),
        *_virtualization(host, progress),
        *_memory(),
        *_counters(),
        *_store(host),
    ]


def _programs() -> Iterator[Finding]:
    absent: set[str] = set()
    for program, package in PACKAGES.items():
        try:
            find_program(program)
        except MissingProgram:
            absent.add(package)
    if absent:
        install = as_root(f"apt-get install {' '.join(sorted(absent))}")
        yield Finding("programs", "missing", install)
    else:
        yield Finding("programs", "ok", f"all {len(PACKAGES)} found")


def _virtualization(host: Runtime, progress: Callable[[str], None]) -> Iterator[Finding]:
    try:
        qemu = host.qemu
        yield _starting(qemu)
        kernel = ensure_kernel(host.store, progress=progress)
        yield Finding("kernel", "ok", KernelConfig.of(kernel).release)
        progress("running a probe guest under KVM")
        path = kernel.layer("kernel").path
        accel = choose(Choice.AUTO, qemu.binary, path, host.store.cache)
        state = "ok" if accel.name == "kvm" else "limited"
        yield Finding("accelerator", state, f"{accel.name}: {accel.reason}")
        yield _confinement(accel.name)
        yield _limits()
        yield _network(accel.name)
    except OnecopyError as error:
        yield Finding("virtualization", "missing", f"{error.message} ({error.hint})")


def _starting(qemu: Qemu) -> Finding:
    says = f"{qemu.version}, {qemu.machine}"
    if qemu.rom:
        return Finding("qemu", "ok", f"{says}; it maps saved RAM from a read-only file")
    if open_notify.is_possible(qemu):
        return Finding("qemu", "ok", f"{says}; it is given saved RAM read-only")
    return Finding("qemu", "limited", f"{says}; it cannot start saved systems on this kernel")


def _confinement(accel: str) -> Finding:
    says, limits = ["seccomp"], []
    if os.geteuid() != 0:
        says.append("QEMU runs as you")
    elif why_not := vmm_user.why_not(accel):
        limits.append(f"QEMU runs as root, without capabilities: {why_not}")
    elif count := vmm_user.small_range_size():
        limits.append(
            f"each guest's QEMU is a user of its own, of only {count} numbers, which others on "
            "this host may have, too"
        )
    else:
        says.append("each guest's QEMU is a user of its own")
    if version := landlock.abi():
        says.append(f"Landlock ABI {version}")
        if version < landlock.BINDS_SINCE:
            limits.append("who publishes a port below 1024 has them all: that takes Linux 6.7")
        if name_servers.opens_more() and not name_servers.can_hide():
            says.append("what all may read in /etc is open to it, for the name servers' sake")
    else:
        limits.append(
            "this kernel has no Landlock (LSM=landlock), so files are kept by rights only"
        )
    return Finding("confinement", "limited" if limits else "ok", "; ".join([*limits, *says]))


def _limits() -> Finding:
    """What one guest can take of the host at the most."""
    if why_not := cgroup.why_not():
        says = f"memory, files and logs of each QEMU are limited, but by process alone: {why_not}"
        if os.geteuid():
            says += "; its threads are not"
        return Finding("limits", "limited", says)
    says = "memory, threads, files and logs of each QEMU are limited, and it has a control group"
    return Finding("limits", "ok", says)


def _network(accel: str) -> Finding:
    """Whether guests can be kept from the host: root's rules for it are in force afterwards."""
    if vmm_user.have_own_numbers():
        why_not = closed_network.why_not(vmm_user.new_user(accel), vmm_user.why_not(accel))
    else:
        why_not = router.why_not()
    if why_not:
        return Finding("network", "limited", f"guests need --allow-host or --no-network: {why_not}")
    return Finding("network", "ok", "guests reach the outside, and nothing of this host")


def _memory() -> Iterator[Finding]:
    info = meminfo.read()
    known = info.available is not None and info.total is not None
    says = f"{format_size(info.available or 0)} available of {format_size(info.total or 0)}"
    yield Finding("memory", "ok" if known else "limited", says if known else "unknown")
    merging = ksm.read()
    if merging is None:
        yield Finding("KSM", "limited", "this kernel has none")
    else:
        yield Finding("KSM", "ok", "running" if merging.run else "there, and off")


def _counters() -> Iterator[Finding]:
    try:
        start = id(object()) & ~0xFFF
        for entry in pagemap.read(os.getpid(), start, 1):
            pagemap.pfn(entry)
        yield Finding("page counters", "ok", "pagemap shows physical pages")
    except NotPermitted:
        yield Finding("page counters", "limited", "physical pages are shown to root only")
    except (NotFound, Unreadable) as error:
        yield Finding("page counters", "limited", error.message)


def _store(host: Runtime) -> Iterator[Finding]:
    free = shutil.disk_usage(host.store.root).free
    state = "ok" if free > 2 << 30 else "limited"
    yield Finding("store", state, f"{host.store.root}, {format_size(free)} free")
    yield _read_ahead(prefetch.read_ahead(host.store.root))
    yield _protection(host)


def _read_ahead(size: int | None) -> Finding:
    if size is None:
        return Finding("read-ahead", "limited", "unknown")
    says = f"the kernel reads {format_size(size)} around a page of a segment that a guest touches"
    if size <= MIB:
        return Finding("read-ahead", "ok", says)
    says += ", which fills the page cache; read_ahead_kb of the store's disk sets it (Linux: 128)"
    return Finding("read-ahead", "limited", says)


def _protection(host: Runtime) -> Finding:
    with host.store.workspace() as work:
        sample = work / "sample"
        sample.write_bytes(b"sample")
        if verity.enable(sample):
            return Finding("blobs", "ok", "fs-verity guards new ones against change")
    says = "the store's file system has no fs-verity: only `onecopy verify` finds a changed one"
    return Finding("blobs", "limited", says)
