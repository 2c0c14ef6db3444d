"""The options of commands that start guests: `boot`, `run` and `save`.

Options of a group reach a command as one value. Not here: the starts (starting.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from onecopy.cli import completion
from onecopy.cli.commands import Option
from onecopy.cli.params import (
    AttachType,
    DiskType,
    NewGuestType,
    ParamType,
    PublishType,
    SecondsType,
    SizeType,
    accel_option,
    collect,
)
from onecopy.model import Mergeable, Reference

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from onecopy.guest.lifecycle.disks import DiskSpec
    from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec

Ports = tuple[tuple[int, int], ...]


class BootOptions(NamedTuple):
    """The options of `boot` and of `save --root`."""

    segments: tuple[tuple[Reference, str], ...]
    memory: int
    cpus: int
    cpu: str
    command: str | None
    ready: str | None
    timeout: float
    no_network: bool
    allow_host: bool
    kernel: Path | None
    modules: Path | None
    accel: str

    def spec(self, root: Reference, start: StartOptions | None = None) -> BootSpec:
        """Return the specification for a boot of a root segment or bare kernel."""
        from onecopy.guest.lifecycle.launchplan import BootSpec
        from onecopy.vmm.accel import Choice

        return BootSpec(
            **(start.for_each() if start else {}),
            root=root,
            segments=self.segments,
            memory=self.memory,
            cpus=self.cpus,
            cpu=self.cpu,
            command=self.command,
            ready=self.ready,
            timeout=self.timeout,
            network=not self.no_network,
            allow_host=self.allow_host,
            accel=Choice(self.accel),
            kernel=self.kernel,
            modules=self.modules,
        )


class StartOptions(NamedTuple):
    """The number of guests and their resources: the options of `boot` and `run`."""

    number: int
    name: str | None
    publish: Ports
    bridge: str
    ksm: Mergeable
    disks: tuple[DiskSpec, ...]
    isolated_vmm: bool
    overcommit: bool
    keep_going: bool
    keep: bool
    dry_run: bool
    as_json: bool

    def for_each(self) -> dict[str, Any]:
        """Return the fields of a GuestSpec that are the same for each guest."""
        names = "publish", "bridge", "ksm", "disks", "isolated_vmm"
        return {name: getattr(self, name) for name in names}


class CloneOptions(NamedTuple):
    """Resources of clones beyond the saved ones: options of `run`."""

    segments: tuple[tuple[Reference, str], ...]
    memory: int | None
    cpus: int | None
    allow_host: bool
    accel: str

    def spec(self, system: Reference, start: StartOptions) -> CloneSpec:
        """Return the specification for clones of a saved system."""
        from onecopy.guest.lifecycle.launchplan import CloneSpec
        from onecopy.vmm.accel import Choice

        return CloneSpec(
            **start.for_each(),
            system=system,
            memory=self.memory,
            cpus=self.cpus,
            segments=self.segments,
            allow_host=self.allow_host,
            accel=Choice(self.accel),
        )


class HookType(ParamType):
    """The type of clone hooks: the name of a ready hook, or an action."""

    name = "hook"

    def convert(self, value: Any, param: object, ctx: object) -> str:
        """Check the typed hook."""
        from onecopy.guest.lifecycle.clone_hooks import check_hook

        return check_hook(str(value))

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        """Complete the names of ready hooks and the prefixes of actions."""
        return completion.offered(_hooks, incomplete)


def _hooks() -> list[str]:
    from onecopy.guest.lifecycle.clone_hooks import AUTO, COMMAND, NONE
    from onecopy.images.tools import ready_hooks

    return [*ready_hooks(), AUTO, NONE, COMMAND, "restart:", "signal:"]


#: Keys of groups of options; each command gives them titles (`Command`).
BOOT, START = "boot", "start"
_boot = partial(click.option, cls=Option, group=BOOT)
_start = partial(click.option, cls=Option, group=START)
_ALLOW_HOST = _boot(
    "--allow-host",
    is_flag=True,
    help="Let guests reach this host: its 127.0.0.1 as 198.18.0.2, its other addresses, and "
    "published ports of other guests. Default: guests reach only the outside.",
)


def _segment(verb: str) -> Callable[[Any], Any]:
    """Return --segment; ``verb`` says how the guest gets the segment."""
    return _boot(
        "--segment",
        "segments",
        multiple=True,
        type=AttachType(),
        metavar="SEGMENT[:/MOUNTPOINT]",
        help=f"{verb} a further segment: mounted, or as /dev/onecopy/NAME. May be repeated.",
    )


_BOOT = [
    _segment("Map"),
    _boot(
        "--memory",
        type=SizeType(),
        default="256M",
        show_default=True,
        help="RAM of the guest, in bytes (512M, 2G); at least 128M.",
    ),
    _boot(
        "--cpus",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        metavar="N",
        help="vCPUs of the guest.",
    ),
    _boot(
        "--cpu",
        default="x86-64-v2",
        show_default=True,
        metavar="MODEL",
        help="CPU model: x86-64-v2 or x86-64-v3, which most hosts have; host (needs KVM) or max, "
        "this host's own; or a model of QEMU.",
    ),
    _boot(
        "--command",
        metavar="CMD",
        help="Run this shell command under a minimal init instead of the image's init. The guest "
        "ends with it; '' keeps the guest up.",
    ),
    _boot(
        "--ready",
        metavar="CMD",
        help="Wait until this shell command exits with 0 in the guest. Default: systemd is up; "
        "without systemd, the guest agent answers.",
    ),
    _boot(
        "--timeout",
        type=SecondsType(1),
        default=300,
        show_default=True,
        metavar="SECONDS",
        help="Fail if the guest is not ready after this time, in seconds.",
    ),
    _boot("--no-network", is_flag=True, help="Give the guest no network card."),
    _ALLOW_HOST,
    _boot(
        "--kernel",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Boot this kernel image. Default: the Debian kernel in the store.",
    ),
    _boot(
        "--modules",
        type=click.Path(path_type=Path),
        metavar="DIRECTORY",
        help="Modules of --kernel: its directory lib/modules/RELEASE.",
    ),
    accel_option(_boot),
]
_START = [
    _start(
        "--count",
        "-n",
        "number",
        type=click.IntRange(1, 10000),
        default=1,
        show_default=True,
        metavar="N",
        help="Start N guests: either all start or none does.",
    ),
    _start(
        "--name",
        type=NewGuestType(),
        metavar="NAME",
        help="Name and hostname of the guest; several guests are NAME-1, NAME-2... Default: made "
        "from the source's name.",
    ),
    _start(
        "--publish",
        "-p",
        "publish",
        multiple=True,
        type=PublishType(),
        metavar="[PORT:]GUEST-PORT",
        help="Forward a port of 127.0.0.1 to the guest; without PORT, a free one. Guest number I "
        "gets PORT + I - 1. May be repeated.",
    ),
    _start(
        "--bridge",
        default="",
        metavar="NAME",
        help="Connect the guest to this bridge of the host by a tap device; it gets its address "
        "by DHCP. Root only.",
    ),
    _start(
        "--disk",
        "disks",
        multiple=True,
        type=DiskType(),
        metavar="SIZE|FILE[:/MOUNTPOINT]",
        help="Add a disk whose content stays: SIZE is a disk of the guest's own, which needs "
        "--name; FILE is a qcow2 or raw image. Mounted (ext4), or /dev/onecopy/disk0. May be "
        "repeated.",
    ),
    _start(
        "--ksm",
        type=click.Choice(["none", "ram", "all"]),
        default="ram",
        show_default=True,
        callback=lambda _ctx, _param, value: Mergeable(value),
        help="Memory that KSM may merge while it runs: none; the guest's RAM; or all, also "
        "QEMU's own memory (needs Linux 6.4), most of which forked QEMUs share anyway. A QEMU "
        "that exec starts then has no address randomisation.",
    ),
    _start(
        "--isolated-vmm",
        is_flag=True,
        help="Start QEMU by exec, with memory addresses and pages of its own: slower, and some "
        "7 MiB more. Default: a server forks the QEMUs of a trust domain.",
    ),
    _start(
        "--overcommit",
        is_flag=True,
        help="Start guests even if the host may lack memory for them.",
    ),
    _start("--keep-going", is_flag=True, help="If a guest fails to start, keep the others."),
    _start("--keep", is_flag=True, help="With CMD: keep the guests running when it has ended."),
    _start("--dry-run", is_flag=True, help="Print QEMU's command lines, and start nothing."),
    _start("--json", "as_json", is_flag=True, help="Print JSON."),
]
_CLONE = [
    _segment("Load"),
    _boot(
        "--memory",
        type=SizeType(),
        help="RAM of the guest, in bytes (512M, 2G): what was saved and a multiple of 128M. "
        "Default: what was saved.",
    ),
    _boot(
        "--cpus",
        type=click.IntRange(1, 64),
        metavar="N",
        help="vCPUs of the guest; more than were saved only under KVM. Default: what was saved.",
    ),
    _ALLOW_HOST,
    accel_option(_boot, "the one that the system was saved under"),
]


boot_options = collect("boot", BootOptions, _BOOT)
start_options = collect("start", StartOptions, _START)
clone_options = collect("clone", CloneOptions, _CLONE)
