"""Allows or denies KSM to merge a running guest's RAM.

QEMU's memory backends have a property ``merge``, which sets madvise(2) MADV_MERGEABLE or its
opposite. QEMU's own memory can be allowed only at its start, because no prctl(2) applies to another
process. Not here: KSM's settings (sharing/ksm_settings.py).
"""

from __future__ import annotations

from onecopy.errors import InsufficientResources, InvalidInput
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import ksm, meminfo
from onecopy.model import PAGE_SIZE
from onecopy.vmm.argv import RAM_BACKEND
from onecopy.vmm.monitor import connect
from onecopy.vmm.ram_cpu_hotplug import ADDED_BACKEND


async def set_mergeable(host: Runtime, name: str, *, mergeable: bool) -> None:
    """Allow or deny KSM to merge the RAM of a running guest.

    Denying it breaks up the guest's merged pages.

    Raises:
        NotFound: There is no such guest.
        InvalidInput: The guest belongs to a trust domain, whose memory must not be merged.
        InsufficientResources: There is too little memory to break up the merged pages.
        GuestFailed: QEMU failed.
    """
    record = host.guest(name).record()
    if mergeable and record.domain:
        raise InvalidInput(
            f"{name} belongs to the trust domain {record.domain}, but KSM merges pages across "
            "trust domains",
            hint="share segments and saved systems of the domain instead",
        )
    if not mergeable:
        _require_memory(record.pid)
    async with connect(host.run / name) as monitor:
        for name in {RAM_BACKEND, ADDED_BACKEND} & await monitor.members("/objects"):
            change = {"property": "merge", "value": mergeable}
            await monitor.execute("qom-set", {"path": f"/objects/{name}", **change})


def _require_memory(pid: int) -> None:
    needed = (ksm.read_process(pid).merging_pages or 0) * PAGE_SIZE
    available = meminfo.read().available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory for separate copies of merged pages",
            needed=needed,
            available=available,
            hint="stop some guests first",
        )
