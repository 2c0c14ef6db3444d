"""Checks what this host supports: programs, QEMU, the accelerator, the kernel's counters."""

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
from onecopy.vmm import closed_network, fork_probe, name_servers, open_notify, router, vmm_user
from onecopy.vmm.accel import Choice, choose
from onecopy.vmm.qemu import Qemu


class Finding(msgspec.Struct, frozen=True):
    """The result of a check."""

    check: str
    state: str
    """``ok``, ``limited`` (works with restrictions) or ``missing``."""
    says: str
    """The details, for a user."""


def examine(host: Runtime, progress: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Run all checks; a failed check is a finding, not an error."""
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
        yield Finding("programs", "ok", f"all {len(PACKAGES)} programs are installed")


def _virtualization(host: Runtime, progress: Callable[[str], None]) -> Iterator[Finding]:
    try:
        qemu = host.qemu
        yield _starting(qemu)
        yield _forking(qemu, host)
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
        return Finding("qemu", "ok", f"{says}; maps saved RAM from a read-only file")
    if open_notify.is_possible(qemu):
        return Finding("qemu", "ok", f"{says}; gets saved RAM as a read-only descriptor")
    return Finding("qemu", "limited", f"{says}; cannot start saved systems on this kernel")


def _forking(qemu: Qemu, host: Runtime) -> Finding:
    found = fork_probe.find(qemu.binary, host.store.cache, again=0)
    if found.path:
        return Finding("fork server", "ok", "a server forks the QEMUs of each trust domain")
    says = f"each QEMU starts by exec and shares none of its own memory: {found.why_not}"
    return Finding("fork server", "limited", says)


def _confinement(accel: str) -> Finding:
    says, limits = ["seccomp"], []
    if os.geteuid() != 0:
        says.append("QEMU runs as the invoking user")
    elif why_not := vmm_user.why_not(accel):
        limits.append(f"QEMU runs as root without capabilities: {why_not}")
    elif count := vmm_user.small_range_size():
        limits.append(
            f"each guest's QEMU has its own user ID, but there are only {count}, and other "
            "programs of this host may use them"
        )
    else:
        says.append("each guest's QEMU has its own user ID")
    if version := landlock.abi():
        says.append(f"Landlock ABI {version}")
        if version < landlock.BINDS_SINCE:
            limits.append(
                "before Linux 6.7, publishing a port below 1024 lets a guest listen on all of them"
            )
        if name_servers.opens_more() and not name_servers.can_hide():
            says.append("QEMU can read world-readable files in /etc, to find the name servers")
    else:
        limits.append(
            "this kernel has no Landlock (boot option lsm=), so only file permissions apply"
        )
    return Finding("confinement", "limited" if limits else "ok", "; ".join([*limits, *says]))


def _limits() -> Finding:
    """Check the limits on a guest's use of the host."""
    if why_not := cgroup.why_not():
        says = f"limits on memory, files and logs hold per process, without a cgroup: {why_not}"
        if os.geteuid():
            says += "; threads are not limited"
        return Finding("limits", "limited", says)
    says = "memory, threads, files and logs of each QEMU are limited, by a control group"
    return Finding("limits", "ok", says)


def _network(accel: str) -> Finding:
    """Check that guests can be closed off from the host; as root this applies the rules."""
    if vmm_user.have_own_numbers():
        why_not = closed_network.why_not(vmm_user.new_user(accel), vmm_user.why_not(accel))
    else:
        why_not = router.why_not()
    if why_not:
        return Finding("network", "limited", f"guests need --allow-host or --no-network: {why_not}")
    return Finding("network", "ok", "guests reach the network, but no port of this host")


def _memory() -> Iterator[Finding]:
    info = meminfo.read()
    known = info.available is not None and info.total is not None
    says = f"{format_size(info.available or 0)} available of {format_size(info.total or 0)}"
    yield Finding("memory", "ok" if known else "limited", says if known else "unknown")
    merging = ksm.read()
    if merging is None:
        yield Finding("KSM", "limited", "this kernel has no KSM")
    else:
        yield Finding("KSM", "ok", "running" if merging.run else "available, turned off")


def _counters() -> Iterator[Finding]:
    try:
        start = id(object()) & ~0xFFF
        for entry in pagemap.read(os.getpid(), start, 1):
            pagemap.pfn(entry)
        yield Finding("page counters", "ok", "pagemap shows physical page numbers")
    except NotPermitted:
        yield Finding("page counters", "limited", "only root can read physical page numbers")
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
    says = f"the kernel reads {format_size(size)} around each page of a segment that is accessed"
    if size <= MIB:
        return Finding("read-ahead", "ok", says)
    says += ", which fills the page cache: set read_ahead_kb of the store's disk (default: 128)"
    return Finding("read-ahead", "limited", says)


def _protection(host: Runtime) -> Finding:
    with host.store.workspace() as work:
        sample = work / "sample"
        sample.write_bytes(b"sample")
        if verity.enable(sample):
            return Finding("blobs", "ok", "fs-verity protects new blobs against changes")
    says = "the store's file system has no fs-verity: only `onecopy verify` finds changed blobs"
    return Finding("blobs", "limited", says)
