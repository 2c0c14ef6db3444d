"""From running guests to what sharing/ needs to know of them."""

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
from onecopy.vmm import external_qemu
from onecopy.vmm.external_qemu import Vmm

#: How often a report is checked when processes end meanwhile.
_TRIES = 10


def report_all(host: Runtime) -> Report:
    """The report of a host: its guests, what is prepared, and other QEMU processes."""
    maps = guest_maps([*host.guests(), *host.prepared()])
    others = external_qemu.find({each.pid for each in maps})
    return collect(maps, map(vmm_maps, others.vmms), left_out=others.left_out)


def checked_report(host: Runtime) -> tuple[Report, Check]:
    """The same, and whether its parts add up; taken anew while processes end meanwhile.

    Raises what `check.read` and `check.check` do; NotFound if that goes on and on.
    """
    before = cross_check.read(host.memory_before)
    for _ in range(_TRIES - 1):
        result = report_all(host)
        with suppress(NotFound):
            return result, cross_check.check(before, result)
    result = report_all(host)
    return result, cross_check.check(before, result)


def guest_maps(guests: Iterable[GuestRecord]) -> list[GuestMaps]:
    """One GuestMaps per guest."""
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


def vmm_maps(vmm: Vmm) -> GuestMaps:
    """The GuestMaps of another's QEMU."""
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
