"""Open a running guest's RAM to KSM, or close it.

QEMU offers RAM to KSM when the guest starts, and takes that back when its memory backend is told
(property ``merge``; madvise(2), MADV_MERGEABLE). QEMU's own memory can be opened at the start only:
there is no prctl(2) for another process. Not here: KSM itself (sharing/ksm_settings.py).
"""

from __future__ import annotations

from onecopy.errors import InsufficientResources, InvalidInput
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import ksm, meminfo
from onecopy.model import PAGE_SIZE
from onecopy.vmm.monitor import connect

#: The memory backends that RAM has (vmm/argv.py, vmm/ram_cpu_hotplug.py).
_RAM = {"ram", "added-memory"}


async def set_mergeable(host: Runtime, name: str, *, mergeable: bool) -> None:
    """Open the RAM of a running guest to KSM, or close it, which tears its merged pages apart.

    Raises NotFound, InvalidInput for a guest of a trust domain, InsufficientResources when there is
    no memory for pages of its own, GuestFailed.
    """
    record = host.guest(name).record()
    if mergeable and record.domain:
        raise InvalidInput(
            f"{name} is of the trust domain {record.domain}, and KSM knows none: it would merge "
            "its memory with that of others",
            hint="what guests of one domain share are segments and saved systems of it",
        )
    if not mergeable:
        _require_memory(record.pid)
    async with connect(host.run / name / "monitor.sock") as monitor:
        for name in _RAM & await monitor.members("/objects"):
            change = {"property": "merge", "value": mergeable}
            await monitor.execute("qom-set", {"path": f"/objects/{name}", **change})


def _require_memory(pid: int) -> None:
    needed = (ksm.read_process(pid).merging_pages or 0) * PAGE_SIZE
    available = meminfo.read().available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory", needed=needed, available=available, hint="stop some guests first"
        )
