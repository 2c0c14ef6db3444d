"""Converts running guests, fork servers and other QEMU processes to the input of sharing/."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from onecopy.errors import NotFound
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.sharing import cross_check
from onecopy.sharing.account import GuestMaps
from onecopy.sharing.cross_check import Check
from onecopy.sharing.report import Report, collect
from onecopy.vmm import external_qemu, fork_registry
from onecopy.vmm.external_qemu import Vmm

#: Attempts at a consistent report while processes end.
_TRIES = 10


def report_all(host: Runtime) -> Report:
    """Report the memory of guests, standby VMMs, fork servers and other QEMU processes."""
    maps, servers = guest_maps([*host.guests(), *host.prepared()]), server_maps()
    others = external_qemu.find({each.pid for each in (*maps, *servers)})
    return collect(maps, map(vmm_maps, others.vmms), servers=servers, left_out=others.left_out)


def report_of(guests: Iterable[GuestRecord]) -> Report:
    """Report the memory of some guests and of the fork servers, whose pages they share."""
    return collect(guest_maps(guests), servers=server_maps())


def checked_report(host: Runtime) -> tuple[Report, Check]:
    """Report as `report_all`, and check that the parts add up to the host's memory.

    The report is taken again if a process ends during the check.

    Raises:
        NotFound: A process ended in each of several attempts.
        OnecopyError: Any error of `cross_check.read` and `cross_check.check`.
    """
    before = cross_check.read(host.memory_before)
    for _ in range(_TRIES - 1):
        result = report_all(host)
        with suppress(NotFound):
            return result, cross_check.check(before, result)
    result = report_all(host)
    return result, cross_check.check(before, result)


def guest_maps(guests: Iterable[GuestRecord]) -> list[GuestMaps]:
    """Return one GuestMaps per guest."""
    return [
        GuestMaps(
            name=guest.name,
            pid=guest.pid,
            ram_path=guest.ram_path,
            ram_bytes=guest.memory,
            ram_added=guest.added,
            mergeable=not guest.domain,
            start_ticks=guest.start_ticks,
            segments={
                device.path: f"{item.name}.{number}" if number else item.name
                for item in guest.attached
                for number, device in enumerate(item.devices)
            },
            files={
                device.path: device.file
                for item in guest.attached
                for device in item.devices
                if device.file
            },
        )
        for guest in guests
    ]


def server_maps() -> list[GuestMaps]:
    """Return one GuestMaps per fork server of this user."""
    return [
        GuestMaps(
            name=each.domain or f"pid {each.process.pid}",
            pid=each.process.pid,
            ram_path=None,
            ram_bytes=0,
            start_ticks=each.process.start_ticks,
            serves=True,
        )
        for each in fork_registry.running()
    ]


def vmm_maps(vmm: Vmm) -> GuestMaps:
    """Return the GuestMaps of a QEMU process that onecopy did not start."""
    return GuestMaps(
        name=vmm.name,
        pid=vmm.pid,
        ram_path=vmm.ram_path,
        ram_bytes=vmm.ram_bytes,
        segments=vmm.files,
        start_ticks=vmm.start_ticks,
        note=vmm.note,
        regular=vmm.regular,
    )
