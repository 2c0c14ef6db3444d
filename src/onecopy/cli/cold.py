"""From the options of `save` and `run --cold` (params.cold_options) to what boots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onecopy.guest.lifecycle.disks import DiskSpec
    from onecopy.guest.lifecycle.launchplan import BootSpec
    from onecopy.model import Reference


def boot_spec(
    root: Reference,
    *,
    segments: tuple[tuple[Reference, str], ...],
    memory: int,
    cpus: int,
    cpu: str,
    run_command: str | None,
    ready: str | None,
    timeout: float,
    no_network: bool,
    allow_host: bool,
    kernel: Path | None,
    modules: Path | None,
    accel: str,
    publish: tuple[tuple[int, int], ...] = (),
    bridge: str = "",
    ksm: str = "ram",
    disks: tuple[DiskSpec, ...] = (),
) -> BootSpec:
    """What the user asked for."""
    from onecopy.guest.lifecycle.launchplan import BootSpec
    from onecopy.model import Mergeable
    from onecopy.vmm.accel import Choice

    return BootSpec(
        root=root,
        segments=segments,
        memory=memory,
        cpus=cpus,
        cpu=cpu,
        command=run_command,
        ready=ready,
        timeout=timeout,
        network=not no_network,
        allow_host=allow_host,
        publish=publish,
        bridge=bridge,
        ksm=Mergeable(ksm),
        disks=disks,
        accel=Choice(accel),
        kernel=kernel,
        modules=modules,
    )
